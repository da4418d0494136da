"""Typed configuration: the schema, the one table of flags, the presets, and who gave each value.

Floor 0: standard library, msgspec, PyYAML and `protocol.errors`. It reads files and the environment it is given, and
starts nothing. `load.load` is the door; `cluster/cli.py` calls it and hands the frozen `Config` to everything else.
"""
