"""Who is served next, and where: the queue, the in-flight ledger, the cost model, placement, liveness of workers.

Pure: no Ray, no sockets, no threads, no clock (every method is told `now`), no torch. The door is `scheduler.Scheduler`;
`cluster/scheduler_service.py` gives it a network. The same classes run under a virtual clock in tests and simulations.
"""
