"""The laws of the tree, read from its source: floors, forbidden imports, names, sizes.

    floor 5  cluster/                                 Ray lives here and nowhere else
    floor 4  prefill/  decode/  scheduler/  api/      four neighbours that never import each other
    floor 3  engine/
    floor 2  models/  kvtransfer/
    floor 1  kernels/
    floor 0  protocol/  configs/                      configs may raise protocol.errors
    beside   bench/  simulation/  examples/  tests/  tandem.py     import anything; no floor imports them

Every law is a function from a `Module` to sentences; `test_every_law_catches_its_mutant` shows that each can fail.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "protocol": 0,
    "configs": 0,
    "kernels": 1,
    "models": 2,
    "kvtransfer": 2,
    "engine": 3,
    "prefill": 4,
    "decode": 4,
    "scheduler": 4,
    "api": 4,
    "cluster": 5,
}
BESIDE = {"bench", "simulation", "examples", "tests", "tandem"}
NOT_READ = {"tests", "build", "dist"}
SIDEWAYS = {("configs", "protocol")}  # (importer, imported) on one floor
TORCH_FREE = ("protocol", "configs", "scheduler", "api", "simulation")
MONOTONIC = {"kvtransfer", "scheduler", "prefill", "decode", "engine"}
VAGUE = {"utils", "util", "common", "core", "base", "manager", "managers", "helpers", "helper", "misc"}
CODE_FROM_BYTES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "jsonpickle"}
OBJECT_COLLECTIVES = {
    "broadcast_object_list",
    "all_gather_object",
    "gather_object",
    "scatter_object_list",
    "send_object_list",
}
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
# path, or path:function -> why it is one piece
LARGE_WITH_A_REASON: dict[str, str] = {
    "examples/train_bundled_model.py": "one script in six stages, read from top to bottom and imported by nobody",
}
TRITON_FREE = {"kernels/__init__.py", "kernels/ops.py", "kernels/reference.py"}
# import name -> distribution, where it may not be installed to be asked
NAMED_OTHERWISE = {"cupy": ["cupy-cuda13x"], "pynvml": ["nvidia-ml-py"]}
PROVIDED_BY_RAY = {"starlette"}  # part of fastapi's interface, never asked for by itself


class Import(NamedTuple):
    name: str  # dotted, absolute
    line: int
    at_import: bool  # runs when the module is imported: not in a function, not under TYPE_CHECKING


class Module(NamedTuple):
    path: str  # relative to the root, with slashes
    source: str

    @property
    def folder(self) -> str:
        return self.path.split("/")[0].removesuffix(".py")

    @property
    def name(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.source, self.path)

    def imports(self) -> Iterator[Import]:
        is_package = self.path.endswith("__init__.py")
        yield from _imports(self.tree.body, self.name if is_package else self.name.rpartition(".")[0])


def _imports(body: list[ast.stmt], package: str, at_import: bool = True) -> Iterator[Import]:
    for node in body:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (parent, node.module) if part)
            yield from (Import(f"{origin}.{alias.name}", node.lineno, at_import) for alias in node.names)
        else:
            deferred = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or _is_type_checking(node)
            for child in ast.iter_child_nodes(node):
                if isinstance(child, (ast.ExceptHandler, ast.match_case)):
                    yield from _imports(child.body, package, at_import and not deferred)
                elif isinstance(child, ast.stmt):
                    yield from _imports([child], package, at_import and not deferred)


def _is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _top(name: str) -> str:
    return name.split(".")[0]


def modules() -> list[Module]:
    """Every Python file of the project outside tests/."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).parts
        if parts[0] not in NOT_READ and not any(part.startswith(".") for part in parts):
            found.append(Module("/".join(parts), path.read_text(encoding="utf-8")))
    return found


MODULES = modules()
BY_NAME = {module.name: module for module in MODULES}


# ---- the laws: Module -> sentences -----------------------------------------------------------------------------------


def floors(module: Module) -> Iterator[str]:
    if module.folder not in FLOORS.keys() | BESIDE:
        yield f"{module.path}: {module.folder!r} stands on no floor; give it one in tests/test_architecture.py"
        return
    for name, line, _ in module.imports():
        target = _top(name)
        if module.folder in BESIDE or target == module.folder:
            continue
        if target in BESIDE:
            yield f"{module.path}:{line} imports {target}, which stands beside the floors and is imported by nobody"
        elif target in FLOORS:
            mine, theirs = FLOORS[module.folder], FLOORS[target]
            if theirs > mine:
                yield f"{module.path}:{line} (floor {mine}) imports {name} from above (floor {theirs})"
            elif theirs == mine and (module.folder, target) not in SIDEWAYS:
                yield f"{module.path}:{line} imports {name}, its neighbour on floor {mine}"


def ray_only_in_cluster(module: Module) -> Iterator[str]:
    for name, line, _ in module.imports():
        if _top(name) == "ray" and module.folder not in {"cluster", "bench"}:
            yield f"{module.path}:{line} imports ray outside cluster/"


def no_torch_on_the_control_side(module: Module) -> Iterator[str]:
    for name, line, _ in module.imports():
        if module.folder in TORCH_FREE and _top(name) in {"torch", "triton", "transformers"}:
            yield f"{module.path}:{line} imports {_top(name)} in {module.folder}/, which is free of torch"


def transformers_only_where_it_is_an_oracle(module: Module) -> Iterator[str]:
    is_generic_backend = module.path.startswith("models/generic")
    for name, line, at_import in module.imports():
        if _top(name) != "transformers" or module.folder in {"bench", "examples"}:
            continue
        if not is_generic_backend:
            yield f"{module.path}:{line} imports transformers; only models/generic*.py may"
        elif at_import:
            yield f"{module.path}:{line} imports transformers when imported; it must wait until it is used"


def nothing_runs_code_from_bytes(module: Module) -> Iterator[str]:
    for name, line, _ in module.imports():
        if CODE_FROM_BYTES & set(name.split(".")):
            yield f"{module.path}:{line} imports {name}: no pickle and its like (truth rule R8)"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and node.attr in OBJECT_COLLECTIVES:
            yield f"{module.path}:{node.lineno} uses {node.attr}, which pickles (truth rule R8)"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            # A training script may read back the checkpoint it wrote, tensors only; the product never does.
            tensors_only = any(kw.arg == "weights_only" and ast.unparse(kw.value) == "True" for kw in node.keywords)
            if not (module.folder == "examples" and tensors_only):
                yield f"{module.path}:{node.lineno} calls torch.load, which unpickles; weights are safetensors"


def time_is_monotonic(module: Module) -> Iterator[str]:
    if module.folder not in MONOTONIC:
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute):
            is_wall = ast.unparse(node) in {"time.time", "time.time_ns", "datetime.now", "datetime.datetime.now"}
        elif isinstance(node, ast.ImportFrom):
            is_wall = node.module == "time" and any(alias.name in {"time", "time_ns"} for alias in node.names)
        else:
            continue
        if is_wall:
            yield f"{module.path}:{node.lineno} reads the wall clock; times are monotonic, the clock an argument (R3)"


def names_say_something(module: Module) -> Iterator[str]:
    vague = VAGUE & set(module.path.removesuffix(".py").split("/"))
    if vague:
        yield f"{module.path}: {', '.join(vague)} says nothing about what is inside"


def every_module_says_what_it_is(module: Module) -> Iterator[str]:
    if not ast.get_docstring(module.tree):
        yield f"{module.path}: no module docstring (what it is, what it is not, who calls it)"


def pieces_are_small(module: Module) -> Iterator[str]:
    num_lines = module.source.count("\n")
    if num_lines > MAX_FILE_LINES and module.path not in LARGE_WITH_A_REASON:
        yield f"{module.path}: {num_lines} lines; above {MAX_FILE_LINES} wants a reason in LARGE_WITH_A_REASON"
    for node in ast.walk(module.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            place, length = f"{module.path}:{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES and place not in LARGE_WITH_A_REASON:
                yield f"{place}: {length} lines; above {MAX_FUNCTION_LINES} wants a reason in LARGE_WITH_A_REASON"


def errors_are_not_swallowed(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            broad = caught == "everything" or re.search(r"\b(Base)?Exception\b", caught)
            silent = all(isinstance(step, (ast.Pass, ast.Continue)) or _is_ellipsis(step) for step in node.body)
            if broad and silent:
                yield f"{module.path}:{node.lineno} catches {caught} and says nothing"
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith("suppress")
            and any(ast.unparse(arg) in {"Exception", "BaseException"} for arg in node.args)
        ):
            yield f"{module.path}:{node.lineno} suppresses every exception"


def _is_ellipsis(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.value.value is Ellipsis


LAWS: list[Callable[[Module], Iterator[str]]] = [
    floors,
    ray_only_in_cluster,
    no_torch_on_the_control_side,
    transformers_only_where_it_is_an_oracle,
    nothing_runs_code_from_bytes,
    time_is_monotonic,
    names_say_something,
    every_module_says_what_it_is,
    pieces_are_small,
    errors_are_not_swallowed,
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Callable[[Module], Iterator[str]]) -> None:
    broken = [sentence for module in MODULES for sentence in law(module)]
    assert not broken, "\n" + "\n".join(broken)


MUTANTS: list[tuple[Callable[[Module], Iterator[str]], str, str]] = [
    (floors, "engine/a.py", "from cluster import gateway"),
    (floors, "engine/a.py", "def f():\n    import decode.worker"),
    (floors, "prefill/a.py", "from decode.worker import Worker"),
    (floors, "models/a.py", "try:\n    pass\nexcept ImportError:\n    import kvtransfer"),
    (floors, "protocol/a.py", "from configs import schema"),
    (floors, "cluster/a.py", "import bench"),
    (floors, "engine/deep/a.py", "from ...cluster import cli"),
    (floors, "attic/a.py", "import os"),
    (ray_only_in_cluster, "decode/a.py", "async def f():\n    with x:\n        from ray import serve"),
    (ray_only_in_cluster, "tandem.py", "import ray"),
    (no_torch_on_the_control_side, "api/a.py", "class C:\n    def f(self):\n        import torch.nn"),
    (transformers_only_where_it_is_an_oracle, "models/llama.py", "def f():\n    import transformers"),
    (transformers_only_where_it_is_an_oracle, "models/generic.py", "from transformers import AutoModel"),
    (nothing_runs_code_from_bytes, "cluster/a.py", "from ray import cloudpickle"),
    (nothing_runs_code_from_bytes, "models/a.py", "state = torch.load(path, weights_only=True)"),
    (nothing_runs_code_from_bytes, "examples/a.py", "state = torch.load(path)"),
    (nothing_runs_code_from_bytes, "engine/a.py", "dist.broadcast_object_list(x)"),
    (time_is_monotonic, "scheduler/a.py", "now = time.time()"),
    (time_is_monotonic, "kvtransfer/a.py", "from time import time"),
    (names_say_something, "engine/utils.py", ""),
    (names_say_something, "engine/core/a.py", ""),
    (every_module_says_what_it_is, "engine/a.py", "x = 1"),
    (pieces_are_small, "engine/a.py", "x = 1\n" * 501),
    (pieces_are_small, "engine/a.py", "def f():\n" + "    x = 1\n" * 81),
    (errors_are_not_swallowed, "engine/a.py", "try:\n    f()\nexcept Exception:\n    pass"),
    (errors_are_not_swallowed, "engine/a.py", "try:\n    f()\nexcept (OSError, Exception):\n    ..."),
    (errors_are_not_swallowed, "engine/a.py", "with contextlib.suppress(Exception):\n    f()"),
]


@pytest.mark.parametrize(("law", "path", "source"), MUTANTS, ids=lambda value: getattr(value, "__name__", None))
def test_every_law_catches_its_mutant(law: Callable[[Module], Iterator[str]], path: str, source: str) -> None:
    assert list(law(Module(path, source)))


def test_no_mutant_is_missing() -> None:
    assert {law for law, _, _ in MUTANTS} == set(LAWS)


def test_reasons_are_still_needed() -> None:
    for place in LARGE_WITH_A_REASON:
        path, _, function = place.partition(":")
        assert (ROOT / path).exists(), f"{place} is gone; take its reason out"
        assert not function or f"def {function}(" in (ROOT / path).read_text(), f"{place} is gone; take its reason out"


# ---- what one module's text cannot tell ------------------------------------------------------------------------------


def closure(start: str) -> dict[str, str]:
    """Every module that importing `start` imports, ours followed, mapped to who imported it first."""
    reached, waiting = {start: ""}, [start]
    while waiting:
        module = BY_NAME.get(waiting.pop())
        if module is None:
            continue
        for name, _, at_import in module.imports():
            if not at_import:
                continue
            parts = name.split(".")
            for end in range(1, len(parts) + 1):  # importing a.b.c runs a, a.b and (when it is a module) a.b.c
                prefix = ".".join(parts[:end])
                if prefix not in reached and (end == 1 or prefix in BY_NAME):
                    reached[prefix] = module.name
                    waiting.append(prefix)
    return reached


@pytest.mark.parametrize("start", ["cluster.cli", "tandem"])
def test_the_doors_do_not_wait_for_ray(start: str) -> None:
    """`tandem --help` must not take the seconds that `import ray` takes, and the Python face needs no Ray at all."""
    assert start in BY_NAME
    reached = closure(start)
    assert "ray" not in reached, f"{start} reaches ray through {reached['ray']}"


@pytest.mark.parametrize("folder", TORCH_FREE)
def test_the_control_side_is_free_of_torch_when_it_runs(folder: str) -> None:
    names = [module.name for module in MODULES if module.folder == folder]
    assert names
    code = (
        "import importlib, json, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert not loaded & {"torch", "triton", "ray", "transformers"}


def test_the_door_to_the_kernels_opens_without_triton() -> None:
    reached = closure("kernels.ops")
    assert "triton" not in reached, f"kernels.ops reaches triton through {reached['triton']}"


def _canonical(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found, requirement
    return re.sub(r"[-_.]+", "-", found.group()).lower()


def test_what_is_imported_is_declared() -> None:
    """A package that happens to be there through another one is not there tomorrow."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    always = {_canonical(line) for line in project["dependencies"]}
    extras = {_canonical(line) for lines in project["optional-dependencies"].values() for line in lines}
    providers = packages_distributions()
    missing = []
    for module in MODULES:
        for name, line, at_import in module.imports():
            top = _top(name)
            if top in FLOORS.keys() | BESIDE | PROVIDED_BY_RAY | sys.stdlib_module_names:
                continue
            # An extra may be missing at run time, so whoever uses one imports it when used; kernels/ops.py imports
            # the files of Triton kernels that way, as wholes.
            if top == "triton" and module.folder == "kernels" and module.path not in TRITON_FREE:
                continue
            declared = always if at_import and module.folder in FLOORS else always | extras
            if not {_canonical(dist) for dist in providers.get(top) or NAMED_OTHERWISE.get(top, [top])} & declared:
                missing.append(f"{module.path}:{line} imports {top}, not declared in pyproject.toml (or as an extra)")
    assert not missing, "\n" + "\n".join(missing)


def test_every_package_of_the_tree_is_shipped() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(FLOORS) <= set(setuptools["packages"]["find"]["include"])
    for module in MODULES:
        if module.folder in FLOORS:
            package = (ROOT / module.path).parent
            assert (package / "__init__.py").exists(), f"{package} has no __init__.py: a wheel would leave it out"
