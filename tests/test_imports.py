"""The order of imports, and the walls between the folders."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import mpillm

Run = Callable[..., "subprocess.CompletedProcess[str]"]

PACKAGE = Path(mpillm.__file__).parent

# From the entry point down to the leaves. A folder imports what stands below it; those of one line
# may import each other as long as there is no circle. "mpillm" is the Python API in __init__.py.
ORDER = [
    {"__main__"},
    {"cli"},
    {"mpillm"},
    {"training", "inference"},
    {"models", "data", "checkpoint", "report"},
    {"nn"},
    {"parallel", "array", "storage"},
    {"config", "errors"},
]
LEVEL = {folder: level for level, folders in enumerate(ORDER) for folder in folders}


@dataclass(frozen=True)
class Import:
    """One imported name: where, what, and whether importing the module runs it."""

    module: str
    target: str
    line: int
    runs: bool


def module_name(path: Path) -> str:
    parts = ("mpillm", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def folder(module: str) -> str:
    """The part of the package that a module belongs to."""
    return module.split(".")[1] if "." in module else module


def imports_of(module: str) -> Iterator[Import]:
    """All imports of a module, those inside functions and `if TYPE_CHECKING` too."""
    tree = ast.parse(MODULES[module].read_text())
    later: set[ast.AST] = set()
    for node in ast.walk(tree):
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if function or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            later.update(ast.walk(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            kept = {*MODULES, "mpillm.__version__"}
            targets = [name if name in kept else node.module for name in names]
        else:
            continue
        for target in targets:
            yield Import(module, target, node.lineno, node not in later)


IMPORTS = [item for module in MODULES for item in imports_of(module)]
# The version is a plain string of the package, which anyone may write into a file.
OWN = [
    item
    for item in IMPORTS
    if item.target.split(".")[0] == "mpillm" and item.target != "mpillm.__version__"
]


def told(items: list[Import]) -> list[str]:
    return [f"{item.module}, line {item.line}: imports {item.target}" for item in items]


def test_the_scan_sees_the_package() -> None:
    assert {folder(module) for module in MODULES} == set(LEVEL)
    assert Import("mpillm.parallel.shard", "math", 10, True) in IMPORTS
    inside = next(item for item in IMPORTS if item.target == "mpillm.training.loop")
    assert inside.module == "mpillm" and not inside.runs


def test_imports_run_one_way() -> None:
    back = [item for item in OWN if LEVEL[folder(item.target)] < LEVEL[folder(item.module)]]
    assert told(back) == []


def test_what_is_imported_exists() -> None:
    assert told([item for item in OWN if item.target not in MODULES]) == []


@pytest.mark.parametrize("unit", ["modules", "folders"])
def test_there_are_no_circles(unit: str) -> None:
    graph: dict[str, set[str]] = {}
    for item in OWN:
        ends = item.module, item.target
        source, target = ends if unit == "modules" else (folder(ends[0]), folder(ends[1]))
        if source != target:
            graph.setdefault(source, set()).add(target)
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_only_parallel_imports_mpi4py() -> None:
    users = [item for item in IMPORTS if item.target.split(".")[0] == "mpi4py"]
    assert users
    assert told([item for item in users if folder(item.module) != "parallel"]) == []


def test_arrays_know_nothing_of_ranks() -> None:
    seen = {folder(item.target) for item in OWN if folder(item.module) == "array"}
    assert seen == {"array", "errors"}


def test_schedules_see_no_array() -> None:
    seen = {item.target for item in IMPORTS if item.module == "mpillm.parallel.schedules"}
    pure = {"mpillm.errors", "mpillm.parallel.shard", "collections.abc"}
    assert seen <= set(sys.stdlib_module_names) | pure


def without_numpy() -> list[str]:
    """Modules that are imported before the number of BLAS threads is set, or need no arrays."""
    return [
        module
        for module, path in MODULES.items()
        if path.name in ("__init__.py", "__main__.py", "settings.py", "launch.py")
        or folder(module) in ("cli", "config", "errors", "nn", "models")
    ]


def test_modules_without_numpy() -> None:
    arrays = {"numpy", "h5py", "cupy", "scipy", "ml_dtypes"}
    users = [
        item
        for item in IMPORTS
        if item.module in without_numpy() and item.runs and item.target.split(".")[0] in arrays
    ]
    assert told(users) == []


def test_package_files_hold_only_a_docstring() -> None:
    for module, path in MODULES.items():
        if path.name == "__init__.py" and module != "mpillm":
            body = ast.parse(path.read_text()).body
            assert len(body) == 1 and isinstance(body[0], ast.Expr), module


def test_settings_and_commands_load_neither_numpy_nor_mpi(python: Run) -> None:
    early = [
        module
        for module, path in MODULES.items()
        if folder(module) in ("mpillm", "__main__", "cli", "config", "errors")
        or path.name in ("settings.py", "launch.py")
    ]
    program = f"""
import importlib, sys
for module in {early}:
    importlib.import_module(module)
from mpillm.config import describe, from_table
from mpillm.models.settings import families
from mpillm.training.settings import RunConfig
for family in families():
    from_table(RunConfig, {{"model": {{"family": family}}}})
describe(RunConfig)
print([name for name in ("numpy", "h5py", "mpi4py", "cupy", "matplotlib") if name in sys.modules])
"""
    result = python("-c", program)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_importing_everything_starts_nothing(python: Run) -> None:
    program = f"""
import mpi4py
mpi4py.rc.initialize = False  # from here on only mpillm itself could start MPI or use it
import importlib, logging, os, sys, threading
before = dict(os.environ), sys.excepthook, threading.excepthook, logging.root.handlers[:]
for module in {list(MODULES)}:
    importlib.import_module(module)
from mpi4py import MPI
assert not MPI.Is_initialized()
assert before == (dict(os.environ), sys.excepthook, threading.excepthook, logging.root.handlers)
assert threading.active_count() == 1
print("quiet")
"""
    result = python("-c", program)
    assert (result.stdout, result.stderr) == ("quiet\n", "")
