"""A loop shared by the very threads that torch computes with, for compiled code that torch does not know of.

A second pool of threads (numba's own, say) would spin against torch's on the same cores. OpenMP's run-time library, which torch has
loaded, offers what its compilers call for a parallel region: `GOMP_parallel(body, argument, num_threads, flags)`. Called here with
the address of a compiled function; who takes which part is the body's business (an atomic counter, so a slow core takes less).
Called by kernels/cpu.py and kernels/cpu_linear.py.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch


@functools.cache
def _region() -> Any:
    """GOMP_parallel of the OpenMP library that torch has loaded (a system may hold another); None where there is none."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split(maxsplit=5)[5].strip() for line in maps if "/lib" in line}
    except OSError:  # no Linux
        return None
    for path in sorted(paths, key=lambda path: "torch" not in path):
        if path.rpartition("/")[2].startswith(("libgomp", "libiomp5", "libomp")):
            try:
                region = ctypes.CDLL(path).GOMP_parallel
            except (OSError, AttributeError):
                continue
            region.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
            region.restype = None
            return region
    return None


@functools.cache
def _function(body: int) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(body)


def run_on_all(body: int, argument: int, most: int | None = None) -> None:
    """Call the function at this address with this address, once on each of torch's threads, at most so many, and wait. Without
    the GIL.

    Alone on the calling thread where torch has one thread, or an OpenMP library that cannot be asked.
    """
    num_threads = torch.get_num_threads()
    if most is not None:
        num_threads = min(num_threads, most)
    region = _region() if num_threads > 1 else None
    if region is None:
        _function(body)(argument)
    else:
        region(body, argument, num_threads, 0)
