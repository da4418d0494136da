"""`tandem doctor`: what this machine has, what it lacks, and what to do about it, in words.

Every check looks at the machine itself, by doing in small what serving does in large, and returns findings; none changes
anything. Called by `cli.py`. torch is imported only to ask it about devices.
"""

from __future__ import annotations

import json
import mmap
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

from configs.schema import Config
from protocol.errors import TandemError

OK, NOTE, MISSING = "ok", "note", "missing"
GB = 1e9
MIN_CAPABILITY = (8, 0)  # of a GPU; bfloat16 and the kernels' instructions begin there


class Finding(NamedTuple):
    level: str  # OK | NOTE | MISSING: only the last one makes serving impossible
    name: str
    text: str
    todo: str = ""


def examine(config: Config, as_json: bool = False) -> int:
    """Print one line per finding. 0 unless something that is needed is missing."""
    return report(findings(config), as_json)


def report(found: list[Finding], as_json: bool) -> int:
    """Prints them. -> the exit status."""
    if as_json:
        print(json.dumps([finding._asdict() for finding in found], indent=2))
    else:
        width = max(len(finding.name) for finding in found)
        for finding in found:
            todo = f"\n{'':<{width + 10}}-> {finding.todo}" if finding.todo else ""
            print(f"{finding.level:<8}{finding.name:<{width}}  {finding.text}{todo}")
        missing = sum(finding.level == MISSING for finding in found)
        print(f"\n{missing} of what is needed is missing" if missing else "\nnothing that is needed is missing")
    return 1 if any(finding.level == MISSING for finding in found) else 0


def findings(config: Config) -> list[Finding]:
    """All checks in the order in which they matter. A check that breaks is itself a finding."""
    out: list[Finding] = []
    for check in CHECKS:
        try:
            out += check(config)
        except Exception as error:  # an odd machine is exactly what a doctor is called for
            out.append(Finding(NOTE, check.__name__, f"this check failed: {type(error).__name__}: {error}"))
    return out


# ---- software --------------------------------------------------------------------------------------------------------


def python(config: Config) -> list[Finding]:
    return [Finding(OK, "python", f"{platform.python_version()} ({sys.executable})")]


def packages(config: Config) -> list[Finding]:
    """What the distribution says it needs, and whether it is there."""
    try:
        needs = metadata.requires("tandem-serve") or []
        out = [Finding(OK, "tandem", metadata.version("tandem-serve"))]
    except metadata.PackageNotFoundError:
        out = [Finding(NOTE, "tandem", "runs from a folder that is not installed", "pip install -e .")]
        needs = ["ray", "torch", "msgspec", "tokenizers", "safetensors", "fastapi", "xxhash", "psutil", "pyyaml"]
    absent = []
    for need in needs:
        found = re.match(r"[A-Za-z0-9._-]+", need)
        if found and "extra ==" not in need and _version(found[0]) is None:
            absent.append(found[0])
    for name in ("ray", "torch"):
        version = _version(name)
        if version is not None:
            out.append(Finding(OK, name, version))
    if absent:
        out.append(Finding(MISSING, "packages", f"not installed: {', '.join(absent)}", f"pip install {' '.join(absent)}"))
    triton = _version("triton")
    if triton is not None:
        out.append(Finding(OK, "triton", triton))
    else:
        out.append(Finding(NOTE, "triton", "not installed; only GPUs need it", "pip install 'tandem-serve[gpu]'"))
    return out


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def kernels_package(config: Config) -> list[Finding]:
    """Hugging Face's package `kernels` has the name of a folder of ours; one of the two would be imported for the other."""
    version = _version("kernels")
    ours = Path(__file__).resolve().parents[1] / "kernels"
    spec = util.find_spec("kernels")
    places = [Path(p).resolve() for p in (spec.submodule_search_locations or ())] if spec else []
    if version is not None:
        todo = "pip uninstall kernels (Tandem has kernels of its own and does not use that package)"
        return [Finding(MISSING, "kernels", f"Hugging Face's package kernels {version} is installed here", todo)]
    if ours not in places:
        return [Finding(MISSING, "kernels", f"{places} would be imported instead of {ours}", "see PYTHONPATH")]
    return [Finding(OK, "kernels", "Tandem's own, nothing in their way")]


def ray(config: Config) -> list[Finding]:
    """A Ray that somebody else runs here. Ours is private: found or not, it is left alone."""
    import psutil

    seen = []
    for process in psutil.process_iter(["name", "pid"]):
        if process.info["name"] in ("raylet", "gcs_server"):
            seen.append(f"{process.info['name']} {process.info['pid']}")
    where = os.environ.get("RAY_ADDRESS")
    if where:
        seen.append(f"RAY_ADDRESS={where}")
    if seen:
        text = f"a Ray is on this machine already ({', '.join(seen[:4])})"
        return [Finding(NOTE, "ray here", f"{text}; `tandem serve` starts one of its own and leaves that one alone")]
    return [Finding(OK, "ray here", "no other Ray on this machine")]


# ---- machine ---------------------------------------------------------------------------------------------------------


def system(config: Config) -> list[Finding]:
    text = f"{platform.system()} {platform.release()}, {platform.machine()}"
    if platform.system() != "Linux":
        return [Finding(MISSING, "system", text, "Tandem needs Linux (memfd, /proc); a container or WSL2 will do")]
    return [Finding(OK, "system", text)]


def processor(config: Config) -> list[Finding]:
    cores = len(os.sched_getaffinity(0))
    flags, model = _cpu_flags()
    quota = _cgroup_cpus()
    text = f"{cores} cores" + (f", of which the container may use {quota:g}" if quota and quota < cores else "")
    wide = [name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("asimd", "NEON"), ("sve", "SVE")) if flag in flags]
    half = [
        name
        for flag, name in (
            ("avx512_bf16", "bf16"),
            ("bf16", "bf16"),
            ("amx_bf16", "AMX bf16"),
            ("amx_int8", "AMX int8"),
            ("avx512_vnni", "VNNI"),
            ("i8mm", "int8 matmul"),
        )
        if flag in flags
    ]
    text += f"; {', '.join(wide + half) or 'no vector extensions known to us'}; {model}"
    out = [Finding(OK, "cpu", text)]
    if not {"avx512_bf16", "bf16", "amx_bf16"} & flags:
        out.append(Finding(NOTE, "cpu bf16", "no bf16 arithmetic; --dtype auto computes in float32"))
    if cores < 2:
        text = "one core for prefill and decode: they take turns"
        out.append(Finding(NOTE, "cores", text, "--prefill 0 saves the hand-off on such a machine"))
    return out


def _cpu_flags() -> tuple[set[str], str]:
    flags: set[str] = set()
    model = "unknown model"
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features") and not flags:
                flags = set(value.split())
            elif name.strip() == "model name":
                model = value.strip()
    return flags, model


def _cgroup_cpus() -> float | None:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def memory(config: Config) -> list[Finding]:
    import psutil

    found = psutil.virtual_memory()
    limit = _cgroup_memory()
    text = f"{found.available / GB:.1f} of {found.total / GB:.1f} GB available"
    available = found.available
    if limit is not None and limit < found.total:
        text += f", the container may use {limit / GB:.1f} GB"
        available = min(available, limit)
    if available < 2 * GB:
        todo = "the bundled model with one worker of each kind needs about 2 GB (Ray included); --prefill 0 needs less"
        return [Finding(NOTE, "memory", text, todo)]
    return [Finding(OK, "memory", text)]


def _cgroup_memory() -> int | None:
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return None
    return None if text == "max" else int(text)


def files(config: Config) -> list[Finding]:
    """A writable place for Ray's sockets and logs, open files, shared memory."""
    out = []
    folder = tempfile.gettempdir()
    try:
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        return [Finding(MISSING, "tmp", f"{folder} is not writable: {error.strerror}", "point TMPDIR at a folder that is")]
    free = shutil.disk_usage(folder).free
    text = f"{folder} is writable, {free / GB:.1f} GB free"
    if free < GB:
        out.append(Finding(NOTE, "tmp", text, "Ray's logs go there; point TMPDIR at a larger disk"))
    elif len(folder) > 60:
        out.append(Finding(NOTE, "tmp", f"{text}, a long path; Ray's sockets will go below /tmp instead"))
    else:
        out.append(Finding(OK, "tmp", text))
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096:
        todo = f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}"
        out.append(Finding(NOTE, "open files", f"at most {soft}: enough for a few hundred connections", todo))
    shm = Path("/dev/shm")
    if not shm.is_dir() or shutil.disk_usage(shm).free < 256e6:
        text = "/dev/shm is missing or nearly full; Ray falls back to slower files in tmp (KV does not use it)"
        out.append(Finding(NOTE, "/dev/shm", text, "docker run --shm-size=1g"))
    return out


# ---- KV in shared memory ---------------------------------------------------------------------------------------------

_CHILD = """
import os, sys
fd = os.memfd_create("tandem-doctor")
os.ftruncate(fd, 4096)
print(fd, flush=True)
sys.stdin.read()
sys.stdout.write(os.pread(fd, 5, 0).decode())
"""


def shared_memory(config: Config) -> list[Finding]:
    """Just what the shm transport does: write into a memfd of another process, opened through /proc/PID/fd."""
    if not hasattr(os, "memfd_create"):
        return [Finding(MISSING, "memfd", "this Python has no os.memfd_create", "use a Python built for glibc 2.27 or later")]
    try:
        os.close(os.memfd_create("tandem-doctor"))
    except OSError as error:
        return [Finding(MISSING, "memfd", f"memfd_create is refused: {error.strerror}", "see the container's seccomp profile")]
    problem = _write_into_a_child()
    if problem is None:
        return [Finding(OK, "shm", "KV can travel through shared memory (memfd, /proc/PID/fd)")]
    scope = _read("/proc/sys/kernel/yama/ptrace_scope")
    text = f"one process cannot open another's memory: {problem}"
    todo = "KV will travel over loopback tcp (--kv-transport tcp); run all workers as one user with the same /proc"
    if scope not in (None, "0"):
        todo += f" (kernel.yama.ptrace_scope is {scope})"
    return [Finding(NOTE, "shm", text, todo)]


def _write_into_a_child() -> str | None:
    """None when it works, else why it does not."""
    command = [sys.executable, "-I", "-S", "-c", _CHILD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None, "it is a pipe"
        try:
            fd = int(child.stdout.readline())
            with open(f"/proc/{child.pid}/fd/{fd}", "r+b", buffering=0) as file, mmap.mmap(file.fileno(), 4096) as view:
                view[:5] = b"hello"
            seen, _ = child.communicate(timeout=10)
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            child.kill()
            return str(error)
    return None if seen == "hello" else "what was written did not arrive"


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


# ---- network ---------------------------------------------------------------------------------------------------------


def network(config: Config) -> list[Finding]:
    from cluster.beforehand import holder, listen_problem

    out = []
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), timeout=5):
            out.append(Finding(OK, "loopback", "127.0.0.1 answers"))
    except OSError as error:
        text = f"no connection to 127.0.0.1: {error.strerror or error}"
        out.append(Finding(MISSING, "loopback", text, "workers talk over it: ip link set lo up"))
    host, port = config.gateway.host, config.gateway.port
    problem = listen_problem(host, port)
    if problem is None:
        out.append(Finding(OK, "port", f"{host}:{port} is free"))
    else:
        who = holder(port) if "in use" in str(problem) else ""
        text = f"{host}:{port}: {problem.strerror or problem}{who}"
        out.append(Finding(NOTE, "port", text, "choose another with --port (or --host)"))
    return out


# ---- devices ---------------------------------------------------------------------------------------------------------


def devices(config: Config) -> list[Finding]:
    """Which devices run, which are untested, which are refused."""
    out = [Finding(OK, "device cpu", "runs")]
    driver = _nvidia_smi()
    wanted = config.model.device == "cuda"
    if _version("torch") is None:
        return out
    try:
        import torch
    except (ImportError, OSError, RuntimeError) as error:
        return [
            *out,
            Finding(MISSING, "torch", f"cannot be imported: {error}", "reinstall it: pip install --force-reinstall torch"),
        ]
    if torch.version.cuda is not None and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            out.append(
                gpu(
                    index, properties.name, (properties.major, properties.minor), properties.total_memory, triton=_version("triton")
                )
            )
    elif driver:
        build = "has no CUDA" if torch.version.cuda is None else f"was built for CUDA {torch.version.cuda}"
        todo = "install a torch that fits the driver: make TORCH=torch==2.13.0, or see pytorch.org"
        out.append(Finding(MISSING if wanted else NOTE, "device cuda", f"{driver}, but this torch {build}", todo))
    else:
        found = Finding(NOTE, "device cuda", "no NVIDIA GPU here; workers compute on the CPU")
        out.append(Finding(MISSING, "device cuda", "no NVIDIA GPU here", "--device cpu") if wanted else found)
    other = [
        name for name, there in (("ROCm", torch.version.hip), ("MPS", _has(torch, "mps")), ("XPU", _has(torch, "xpu"))) if there
    ]
    if other:
        out.append(Finding(NOTE, "other", f"{', '.join(other)} found and refused: --device knows cpu and cuda"))
    return out


def gpu(index: int, name: str, capability: tuple[int, int], num_bytes: int, triton: str | None) -> Finding:
    """The verdict on one NVIDIA GPU."""
    what = f"device cuda:{index}"
    text = f"{name}, {num_bytes / 2**30:.0f} GiB, compute capability {capability[0]}.{capability[1]}"
    if capability < MIN_CAPABILITY:
        need = ".".join(map(str, MIN_CAPABILITY))
        return Finding(NOTE, what, f"{text}: not supported, the kernels need {need}", "--device cpu")
    if triton is None:
        return Finding(NOTE, what, f"{text}: Triton is not installed", "pip install 'tandem-serve[gpu]'")
    return Finding(NOTE, what, f"{text}: untested, should run", "compare its greedy output with --device cpu before you rely on it")


def _has(torch: Any, name: str) -> bool:
    backend = getattr(torch, name, None) if name == "xpu" else getattr(torch.backends, name, None)
    return bool(backend is not None and backend.is_available())


def _nvidia_smi() -> str:
    """The GPUs that the driver names; empty without a driver."""
    if shutil.which("nvidia-smi") is None:
        return ""
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=20, check=False
    )
    return ", ".join(line.strip() for line in done.stdout.splitlines() if line.strip()) if done.returncode == 0 else ""


# ---- model -----------------------------------------------------------------------------------------------------------


def model(config: Config) -> list[Finding]:
    """The model that would be served, as far as it is on this machine. Nothing is downloaded."""
    from models.locate import BUILT_IN, locate

    name = config.model.name
    if name not in BUILT_IN and not Path(name).expanduser().exists():
        return [Finding(NOTE, "model", f"{name} is not on this machine; it would be downloaded, or taken from the hub's cache")]
    try:
        folder = locate(name, config.model.revision)
    except TandemError as error:
        return [Finding(MISSING, "model", error.message)]
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if not weights and name != "toy":
        return [Finding(MISSING, "model", f"{folder} holds no *.safetensors", "see `tandem serve --help`: MODEL")]
    return [Finding(OK, "model", f"{name}: {folder}" + (f", {weights / 1e6:.1f} MB of weights" if weights else ""))]


CHECKS: tuple[Callable[[Config], list[Finding]], ...] = (
    python,
    packages,
    kernels_package,
    system,
    processor,
    memory,
    devices,
    shared_memory,
    files,
    network,
    ray,
    model,
)
