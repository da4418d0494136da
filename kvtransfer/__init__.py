"""Moves KV blocks from a prefill worker's pool into a decode worker's pool, and proves that they arrived whole.

Not here: who sends to whom (scheduler/), which blocks (engine/blocks.py), the messages around it
(protocol/messages.py).

Read in this order: transport.py (the two Protocols), handoff.py (the state machines, no I/O), pool.py, outbox.py,
shm.py, tcp.py.
"""
