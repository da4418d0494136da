"""Mapped memory between real processes: found, refused, and survived when the other end dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time

import msgspec
import numpy as np
import pytest

from kvtransfer import process
from kvtransfer.link import make_sender
from kvtransfer.shm import ShmLane
from protocol.errors import HandshakeRefused, TransferFailed
from protocol.kv import KVLayout, ShmEndpoint

# A decode worker without anything but its pool: prints where it is, then answers "x" with the hash of its bytes.
OWNER = """
import sys, msgspec, hashlib
from kvtransfer.pool import KVPool
from protocol.kv import KVLayout
pool = KVPool(KVLayout(2, 2, 4, 4, "float32", "m"), 16)
print(msgspec.json.encode(pool.shm_endpoint()).decode(), flush=True)
for line in sys.stdin:
    print(hashlib.sha256(pool.runs.tobytes()).hexdigest(), flush=True)
"""


@contextlib.contextmanager
def owner():
    child = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": os.getcwd()}
    )
    try:
        yield child, msgspec.json.decode(child.stdout.readline(), type=ShmEndpoint)
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()


def test_another_process_sees_the_bytes_and_its_death_is_seen(pair, run):
    import hashlib

    async def scenario():
        with owner() as (child, endpoint):
            sender = make_sender(endpoint, pair.source, b"", incarnation="P1")
            grant = pair.grant(endpoints=(endpoint,))
            sender.open(grant, endpoint)
            pair.push_all(sender, grant)
            await sender.finish(grant.grant_id, 2.0)
            expected = np.zeros_like(pair.target.runs)
            expected[:, 3], expected[:, 4] = pair.source.runs[:, 5], pair.source.runs[:, 6]
            expected.reshape(2, 16, 2, 2, 4, 16)[:, 4, :, :, 3] = 0  # the 12th slot of 11 tokens
            child.stdin.write("x\n")
            child.stdin.flush()
            assert child.stdout.readline().strip() == hashlib.sha256(expected.tobytes()).hexdigest()

            late = pair.grant(endpoints=(endpoint,))
            sender.open(late, endpoint)
            sender.push(late.grant_id, 0, pair.pairs(late))
            child.send_signal(signal.SIGKILL)
            child.wait()
            sender.push(late.grant_id, 1, pair.pairs(late))  # into memory that nobody will read: harmless
            with pytest.raises(TransferFailed, match=f"process {endpoint.pid}.* is dead"):
                await sender.finish(late.grant_id, 2.0)
            await sender.abort(late.grant_id)
            sender.close()
            with pytest.raises(HandshakeRefused, match="dead, or another pid namespace"):
                ShmLane(endpoint, pair.layout)

    run(scenario())


def test_only_the_meant_memory_is_mapped(pair):
    real = pair.receiver("shm").endpoint()
    replace = msgspec.structs.replace
    lane = ShmLane(real, pair.layout)
    assert lane.num_blocks == 16
    lane.close()
    read, write = os.pipe()
    cases = [
        (replace(real, boot_id="another"), "another host"),
        (replace(real, inode=real.inode + 1), rf"inode {real.inode}, {real.nbytes} bytes; .*inode\s+{real.inode + 1}"),
        (replace(real, nbytes=real.nbytes * 2), f"{real.nbytes} bytes; the peer spoke of .* {real.nbytes * 2} bytes"),
        (replace(real, fd=12345), "cannot open"),
        (replace(real, fd=read), "is pipe:"),
        (replace(real, pid=2**22 + 5), "not visible from here"),
    ]
    for endpoint, why in cases:
        with pytest.raises(HandshakeRefused, match=why):
            ShmLane(endpoint, pair.layout)
    os.close(read)
    os.close(write)
    with pytest.raises(HandshakeRefused, match="is not a number of our blocks"):
        ShmLane(real, KVLayout(3, 5, 7, 11, "float32", "m"))


def test_a_mapping_gives_its_descriptors_back(pair):
    endpoint = pair.receiver("shm").endpoint()
    before = len(os.listdir("/proc/self/fd"))
    lanes = [ShmLane(endpoint, pair.layout) for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) <= before + 10, "a pidfd each, and what Python's mmap keeps"
    for lane in lanes:
        lane.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_killed_owner_leaves_nothing_behind():
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    with owner() as (child, endpoint):
        path = f"/proc/{endpoint.pid}/fd/{endpoint.fd}"
        assert os.readlink(path).startswith("/memfd:tandem-kv")
        child.kill()
        child.wait()
        assert not os.path.exists(path)
    after = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    assert not {name for name in after - before if "tandem-kv" in name}


def test_watching_a_process():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    ticks = process.start_ticks(child.pid)
    assert ticks > 0
    watched = process.observe(process.boot_id(), child.pid, ticks)
    assert watched is not None
    assert process.observe("another boot", child.pid, ticks) is None
    assert process.observe(process.boot_id(), child.pid, ticks - 1) is None, "the pid was used again"
    assert process.observe(process.boot_id(), 0) is None
    child.send_signal(signal.SIGSTOP)
    assert not watched.is_dead(), "a stopped process may go on and store"
    child.kill()
    deadline = time.monotonic() + 2.0
    while not watched.is_dead() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert watched.is_dead(), "a zombie that nobody has waited for is dead"
    assert process.observe(process.boot_id(), child.pid, ticks) is None
    child.wait()
    assert watched.is_dead()
    watched.close()
    assert process.start_ticks(child.pid) == 0
    child.stdin.close()


def test_death_wakes_an_event_loop():
    async def scenario():
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", stdin=subprocess.PIPE)
        watched = process.observe(process.boot_id(), child.pid)
        died = asyncio.Event()
        asyncio.get_running_loop().add_reader(watched.fileno(), died.set)
        child.kill()
        await asyncio.wait_for(died.wait(), 2.0)
        asyncio.get_running_loop().remove_reader(watched.fileno())
        assert watched.is_dead()
        watched.close()
        await child.wait()

    asyncio.run(scenario())
