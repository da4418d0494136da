"""The decode role: `planner.py` (pure: state in, plan out) and `worker.py` (plan, run, emit)."""
