"""A loop shared by the very threads that torch computes with, for compiled code that torch does not know of.

A second pool of threads (numba's own, say) would spin against torch's on the same cores. OpenMP's run-time library, which torch has
loaded, offers what its compilers call for a parallel region: `GOMP_parallel(body, argument, num_threads, flags)`. Called here with
the address of a compiled function; who takes which part is the body's business (an atomic counter, so a slow core takes less).
Called by kernels/cpu_linear.py.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch


@functools.cache
def _region() -> Any:
    """None where the OpenMP library of this torch has no such entry."""
    try:
        region = ctypes.CDLL(None).GOMP_parallel
    except (OSError, AttributeError):
        return None
    region.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    region.restype = None
    return region


def run_on_all(body: int, argument: int) -> None:
    """Call the function at this address with this address, once on each of torch's threads, and wait. Without the GIL.

    Alone on the calling thread where torch has one thread, or an OpenMP library that cannot be asked.
    """
    num_threads, region = torch.get_num_threads(), _region()
    if num_threads == 1 or region is None:
        _FUNCTION(body)(argument)
    else:
        region(body, argument, num_threads, 0)


_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
