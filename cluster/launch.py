"""`tandem serve`: start a Ray of our own, deploy the application, tell how far it is, wait for Ctrl-C, leave nothing behind.

Called by `cli.py` with a resolved configuration; imports Ray, so it is imported late.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from cluster.deploy import APP_NAME, apply, document, with_absolute_paths
from configs.load import Resolved
from configs.schema import Config
from protocol.errors import ConfigError, TandemError

log = logging.getLogger(__name__)

FOLDER_PREFIX = "tandem-"
QUESTION = "What does the prefill worker do, and what does the decode worker do?"
POLL_S = 0.1
DOUBLE_S = 1.0  # two signals within it are one: `make`, `timeout` and terminals deliver Ctrl-C twice
START_TIMEOUT_S = 600.0
RESOURCE_UNITS = 4096  # of each role on one machine; how many fit is the user's choice, not Ray's
OBJECT_STORE_BYTES = 128 << 20  # nothing of ours goes through it


class Line:
    """Prints `  12.3 s  text` lines; the clock starts with the command."""

    def __init__(self) -> None:
        self.started = time.monotonic()

    def __call__(self, text: str) -> None:
        print(f"{time.monotonic() - self.started:6.1f} s  {text}", flush=True)


def run(resolved: Resolved) -> int:
    """Serve until interrupted. -> the exit status."""
    config = with_absolute_paths(resolved.config)
    line = Line()
    interrupts = Interrupts()
    stop = interrupts.stop
    interrupts.listen()
    _banner(resolved)
    with _private_ray(line, interrupts.hurry):
        interrupts.listen()  # again: ray.init puts a handler of its own on SIGTERM, which would leave processes behind
        secret = secrets.token_hex(32).encode()
        with _explained("the cluster does not start"):
            actor = _deploy(config, secret, line)
        seen: set[tuple[str, str]] = set()
        if _wait_until_ready(config, actor, seen, line, stop):
            _say_hello(config, line)
            _watch(config, actor, seen, line, stop)
        print(flush=True)
        line("stopping: what runs may end (Ctrl-C again: at once)")
    line("stopped")
    return 0


class Interrupts:
    """Ctrl-C, `kill`, a closed terminal: the first one drains, a later one does not wait. Nothing is raised out of nowhere, so
    that whatever is being put away at that moment is put away."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.hurry = threading.Event()
        self._first_at = 0.0

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # under nohup a terminal may close
                signal.signal(number, self._hear)

    def _hear(self, *_: object) -> None:
        now = time.monotonic()
        if not self.stop.is_set():
            self._first_at = now
            self.stop.set()
        elif now - self._first_at > DOUBLE_S:
            self.hurry.set()


def _banner(resolved: Resolved) -> None:
    from models.locate import locate

    config = resolved.config
    for i, one in enumerate(config.each()):
        model = one.model
        print(f"{'Tandem:' if i == 0 else '    and'} {one.served_name} from {locate(model.name, model.revision)}")
        if model.name == "bundled":
            print("        a 3-million-parameter demonstration model, trained on Python's standard library and questions about")
            print("        Tandem: it is here to show the walk, not to be wise")
        if model.name == "toy":
            print("        a hash function in the shape of a model: its text means nothing, and any wrong byte of KV changes it")
        print(
            f"        {_pool_size(one, 'prefill')} + {_pool_size(one, 'decode')}, device {model.device}, "
            f"KV over {config.transfer.transport}, cores {len(os.sched_getaffinity(0))}"
        )
    for server in config.overflow:
        print(f"        overflow to {server.url}, {server.max_num_seqs} requests at once")
    for note in resolved.notes:
        print(f"        note: {note}")
    sys.stdout.flush()


def _pool_size(config: Config, role: str) -> str:
    pool, parallel = config.pool(role), config.parallel(role)
    size = f"{pool.replicas}" if pool.fewest == pool.most else f"{pool.replicas} ({pool.fewest} to {pool.most})"
    return f"{size} {role}" + (f" of {parallel} ranks" if pool.replicas and parallel.num_ranks > 1 else "")


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Whatever Ray and Serve raise, as one sentence; their traceback is in the log at debug level."""
    try:
        yield
    except TandemError:
        raise
    except Exception as error:
        log.debug("%s", what, exc_info=True)
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(f"{what} ({type(error).__name__}: {reason}); `tandem doctor` may know why") from error


@contextlib.contextmanager
def _private_ray(line: Line, hurry: threading.Event) -> Iterator[None]:
    """A Ray of our own, with token authentication, on loopback, in a directory of its own; gone afterwards."""
    try:
        _sweep(_short_tmp())
        folder = tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-", dir=_short_tmp())
    except OSError as error:
        advice = "point TMPDIR at one that is writable"
        raise ConfigError(f"no folder for Ray's sockets and logs can be made: {error}; {advice}") from None
    os.environ.update(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=secrets.token_hex(32),
        RAY_USAGE_STATS_ENABLED="0",
        RAY_DEDUP_LOGS="0",
        RAY_SERVE_LOG_TO_STDERR="0",
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",  # despite its name: Ray takes loopback as its address, and listens there only
    )
    os.environ.pop("RAY_ADDRESS", None)  # a foreign Ray on this machine is none of our business
    os.chdir(folder)  # Ray's workers look for modules where it was started: not among somebody else's api/ and models/
    import ray

    try:
        with _explained("Ray does not start"):
            ray.init(
                address="local",
                namespace="tandem",
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=True,
                logging_level=logging.WARNING,
                resources={"tandem_prefill": RESOURCE_UNITS, "tandem_decode": RESOURCE_UNITS},
                object_store_memory=OBJECT_STORE_BYTES,
                _node_ip_address="127.0.0.1",
                _temp_dir=folder,
            )
        line("Ray is up (its own, private to this command)")
        yield
    finally:
        _shut_down(ray, hurry)
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: str) -> None:
    """Folders of ours whose command was killed before it could remove them."""
    import psutil

    for path in Path(parent).glob(f"{FOLDER_PREFIX}*-*"):
        pid = path.name.removeprefix(FOLDER_PREFIX).split("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)) and path.stat().st_uid == os.getuid():
            shutil.rmtree(path, ignore_errors=True)


def _short_tmp() -> str:
    """Ray's sockets live below this path, and a socket's path has at most 107 bytes."""
    default = tempfile.gettempdir()
    return default if len(default) < 40 else "/tmp"


def _shut_down(ray: Any, hurry: threading.Event) -> None:
    """The application drains and goes, then Ray ends every process it started; what is left is killed by its parentage."""
    import psutil

    children = psutil.Process().children(recursive=True)
    if ray.is_initialized():
        draining = threading.Thread(target=_delete_application, daemon=True)
        draining.start()
        while draining.is_alive() and not hurry.is_set():
            draining.join(POLL_S)
        children = list({*children, *psutil.Process().children(recursive=True)})  # Serve may have started others meanwhile
        ray.shutdown()
    _, alive = psutil.wait_procs(children, timeout=3)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()


def _delete_application() -> None:
    from ray import serve

    try:
        serve.delete(APP_NAME)
    except Exception as error:  # half of it may be dead already; what matters is that all of it goes now
        log.warning("while stopping Serve: %s", error)


def _deploy(config: Any, secret: bytes, line: Line) -> Any:
    """Hand the application to Serve without waiting for it. -> the scheduler's actor."""
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    from cluster.app import application, check_gpus
    from cluster.deployments import scheduler_actor

    check_gpus(config)
    actor = scheduler_actor(msgspec.json.encode(config), secret)
    serve.start(
        proxy_location="HeadOnly",
        http_options={
            "host": config.gateway.host,
            "port": config.gateway.port,
            "keep_alive_timeout_s": max(1, round(config.gateway.keep_alive_s)),  # Serve counts in whole seconds
        },
    )
    line("Serve is up")
    if config.is_sized:  # only a document can have a policy for the whole application; slower by the process that builds it then
        apply(document(config, secret.decode()))
    else:
        serve.api._run(application(config, secret), _blocking=False, name=APP_NAME, route_prefix="/")
    line("deployed: gateway, workers")
    return actor


def _url(config: Any) -> str:
    host = config.gateway.host
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{config.gateway.port}"


def _is_healthy(config: Any) -> bool:
    try:
        with urllib.request.urlopen(f"{_url(config)}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _wait_until_ready(config: Any, actor: Any, seen: set[tuple[str, str]], line: Line, stop: threading.Event) -> bool:
    """Print each worker's phases as they come; True once /health says so. Raises ConfigError when a worker cannot start."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not stop.is_set():
        _print_phases(actor, seen, line, stop_on_failure=True)
        if _is_healthy(config):
            return True
        _raise_if_failed()
        if time.monotonic() > deadline:
            raise ConfigError(f"not healthy after {START_TIMEOUT_S:.0f} s; `tandem doctor` may know why")
        stop.wait(POLL_S)
    return False


def _print_phases(actor: Any, seen: set[tuple[str, str]], line: Line, stop_on_failure: bool = False) -> dict[str, Any]:
    import ray

    try:
        status: dict[str, Any] = ray.get(actor.status.remote(), timeout=5)
    except ray.exceptions.RayError:
        return {}
    for phase in status.get("starting", ()):
        key = (phase["incarnation"], phase["phase"] + phase["detail"])
        if key not in seen:
            seen.add(key)
            line(f"{phase['name']:<10} {phase['phase']:<10} {phase['detail']} ({phase['elapsed_s']:.1f} s)")
            if phase["phase"] == "failed" and stop_on_failure:
                raise ConfigError(f"{phase['name']} cannot start: {phase['detail']}")
    return status


def _raise_if_failed() -> None:
    """A worker whose constructor failed says why in Serve's status; we say it in one sentence and stop."""
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        application = serve.status().applications.get(APP_NAME)
    except (ray.exceptions.RayError, RayServeException, RuntimeError) as error:
        log.debug("no status of Serve: %s", error)
        return
    for name, deployment in application.deployments.items() if application is not None else ():
        if "DEPLOY_FAILED" in str(deployment.status):
            raise ConfigError(f"{name} cannot start: {_last_line(deployment.message)}")


def _last_line(message: str) -> str:
    lines = [text.strip() for text in message.splitlines() if text.strip()]
    ours = [text for text in lines if text.startswith("protocol.errors.")]
    return (ours or lines or [""])[-1].removeprefix("protocol.errors.")


def _say_hello(config: Any, line: Line) -> None:
    model = config.served_name
    key = " -H 'Authorization: Bearer '$TANDEM_GATEWAY_API_KEY" if config.gateway.api_key else ""
    url = _url(config)
    line(f"ready: {url}/v1   dashboard: {url}/dashboard")
    print(
        f"""
  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\
    -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "{QUESTION}"}}]}}'

Ctrl-C stops everything that was started.
""",
        flush=True,
    )


def _watch(config: Any, actor: Any, seen: set[tuple[str, str]], line: Line, stop: threading.Event) -> None:
    """Until interrupted: tell of workers that come later, die or return.

    Missing twice in a row is gone; once may be a scheduler that has just been restarted and does not know everybody yet.
    """
    known: dict[str, str] = {}
    missed: set[str] = set()
    refused = ""
    expected = sum(one.prefill.replicas + one.decode.replicas for one in config.each()) + len(config.overflow)
    while not stop.is_set():
        changes = config.is_sized or len(known) < expected or missed
        status = _print_phases(actor, seen, line) if changes else _status(actor)
        if status:
            refused = _tell_tenants(status.get("tenants_file") or {}, refused, line)
            alive = {w["name"]: w["incarnation"] for w in status.get("workers", ()) if w["alive"]}
            missing = known.keys() - alive.keys()
            for name, incarnation in alive.items():
                if known.get(name) != incarnation:
                    line(f"{name} is serving" + (" again" if name in known else ""))
            for name in missing & missed:
                line(f"{name} is gone" + ("" if config.is_sized else "; Serve starts another"))
                del known[name]
            missed = set(missing - missed)
            known |= alive
        stop.wait(1.0)


def _tell_tenants(file: dict[str, Any], known: str, line: Line) -> str:
    """What is wrong with the tenants file, once; -> what was told last."""
    problem = file.get("problem")
    told = f"{file['path']}:{problem['line']}: {problem['reason']}" if problem else ""
    if told != known:
        line(f"tenants file {told}; the old one stays in force" if told else f"tenants file {file.get('path')} is in force")
    return told


def _status(actor: Any) -> dict[str, Any]:
    import ray

    try:
        status: dict[str, Any] = ray.get(actor.status.remote(), timeout=5)
        return status
    except ray.exceptions.RayError:
        return {}
