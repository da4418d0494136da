"""One memory, three views: tensor, runs, memfd."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from kvtransfer.layout import run_span, slot_span
from kvtransfer.pool import KVPool
from protocol.errors import ConfigError, Unsupported
from protocol.kv import KVLayout


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "uint8"])
def test_views_agree(dtype):
    layout = KVLayout(3, 2, 5, 4, dtype, "m")
    pool = KVPool(layout, 7)
    assert pool.tensor.shape == (3, 7, 2, 2, 4, 5)
    assert pool.tensor.dtype == getattr(torch, dtype)
    assert pool.tensor.is_contiguous()
    assert pool.nbytes == pool.tensor.numel() * pool.tensor.element_size() == 7 * layout.block_nbytes
    raw = pool.tensor.view(torch.uint8)
    raw.copy_(torch.arange(raw.numel()).to(torch.uint8).view(raw.shape))
    span = run_span(layout, 7, 2, 4)
    everything = raw.numpy().tobytes()
    assert bytes(pool.run(2, 4)) == everything[span.start : span.end] == raw[2, 4].numpy().tobytes()
    slot = slot_span(layout, 1, 1, 3)
    assert bytes(pool.run(2, 4))[slot.start : slot.end] == raw[2, 4, 1, 1, 3].numpy().tobytes()
    pool.run(0, 0)[0] = 201
    assert raw.view(-1)[0] == 201
    endpoint = pool.shm_endpoint()
    with open(f"/proc/self/fd/{endpoint.fd}", "rb") as file:
        assert np.frombuffer(file.read(), np.uint8).tobytes() == raw.numpy().tobytes()
    del raw
    pool.close()


def test_nobody_can_shrink_it_under_us():
    pool = KVPool(KVLayout(1, 1, 4, 4, "float32", "m"), 2)
    fd = os.open(f"/proc/self/fd/{pool.shm_endpoint().fd}", os.O_RDWR)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    os.close(fd)
    pool.close()


def test_close_twice_and_views_that_outlive_it():
    pool = KVPool(KVLayout(1, 1, 4, 4, "float32", "m"), 2)
    fds = len(os.listdir("/proc/self/fd"))
    tensor = pool.tensor
    pool.close()
    pool.close()
    tensor.fill_(1.0)  # the caller's view is still memory
    assert len(os.listdir("/proc/self/fd")) == fds - 1
    del tensor
    assert len(os.listdir("/proc/self/fd")) == fds - 2, "the memfd, and the mapping's own copy of it"
    with pytest.raises(AssertionError):
        _ = pool.tensor


def test_too_much_is_one_clear_error():
    with pytest.raises(ConfigError, match=r"GiB of KV .* lower model\.kv_cache_bytes"):
        KVPool(KVLayout(64, 64, 128, 1024, "float32", "m"), 1 << 40)


def test_other_devices_hold_a_tensor_and_refuse_transfers():
    pool = KVPool(KVLayout(1, 1, 4, 4, "float32", "m"), 2, device="meta")
    assert pool.tensor.shape == (1, 2, 2, 1, 4, 4)
    with pytest.raises(Unsupported, match="KV on meta is not in host memory"):
        pool.run(0, 0)
    with pytest.raises(Unsupported):
        pool.shm_endpoint()
    pool.close()
