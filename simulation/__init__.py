"""The cluster in virtual time: the scheduler's own classes, mock workers, traces. Stands beside the product like bench/.

No torch, no Ray, no sockets. `tandem simulate`, `tandem plan` and `tandem calibrate` run `__main__.py`; `bench/capacity.py`
compares policies. Start reading at `cluster.py`.
"""
