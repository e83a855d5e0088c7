"""The package as a whole: its public names, its layers, and what an import costs."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import balanceopt

PACKAGE = Path(balanceopt.__file__).parent
ROOT = PACKAGE.parent

# Imports go down only: a part may import from its own layer's line and those before it. Private helpers of the whole
# package (balanceopt/_x.py) are in the first.
LAYERS = [
    {"functional", "modality", "distributed"},
    {"monitor"},
    {"modulation"},
    {"optim", "prediction", "objective"},
    {"relearn", "signals", "probes"},
    {"balancing"},
    {"recording", "plotting", "reporting", "integrations"},
]


def test_every_public_name_resolves():
    assert len(set(balanceopt.__all__)) == len(balanceopt.__all__)
    missing = [name for name in balanceopt.__all__ if not hasattr(balanceopt, name)]
    assert missing == []


def test_every_public_name_has_a_docstring():
    public = {name: getattr(balanceopt, name) for name in balanceopt.__all__}
    described = {n: v for n, v in public.items() if inspect.isroutine(v) or inspect.isclass(v)}
    bare = [name for name, value in described.items() if not (value.__doc__ or "").strip()]
    assert bare == []


def test_types_are_shipped():
    assert (PACKAGE / "py.typed").is_file()


def test_import_has_no_side_effects_and_loads_nothing_else():
    code = """
import random, sys, warnings
import numpy, torch, torch.optim
loaded = set(sys.modules)
warnings.simplefilter("error")
before = torch.get_rng_state(), random.getstate(), torch.get_default_dtype(), torch.get_num_threads()
import balanceopt
after = torch.get_rng_state(), random.getstate(), torch.get_default_dtype(), torch.get_num_threads()
assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
new = {name.split(".")[0] for name in set(sys.modules) - loaded}
print(sorted(new - set(sys.stdlib_module_names)), "torch._dynamo" in sys.modules)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "['balanceopt'] False"
    assert ran.stderr == ""


def layer_of(part: str) -> int | None:
    if part.startswith("_"):
        return 0
    found = [number for number, layer in enumerate(LAYERS) if part in layer]
    return found[0] if found else None


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> Iterator[str]:
    """The package's parts that a file imports, also inside functions, but not for type checking only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            modules = [node.module or ""]
            if node.module == "balanceopt":
                modules = [f"balanceopt.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            if module.split(".")[0] == "balanceopt":
                yield module.split(".")[1] if "." in module else "balanceopt itself"


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_down_only(path):
    own = layer_of(part_of(path))
    assert own is not None, f"{path.name} belongs to no layer: give it a place in LAYERS"
    for part in imported_parts(path):
        other = layer_of(part)
        assert other is not None, f"{path.name} imports {part}, which belongs to no layer"
        assert other <= own, f"{path.name} imports {part} from a layer above its own"


def private_imports(path: Path) -> list[str]:
    """Private modules of other folders that a file imports from."""
    folder = path.relative_to(PACKAGE).parts[0]
    nodes = [
        node
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
    ]
    modules = [(node.module or "").split(".") for node in nodes]
    return [".".join(m) for m in modules if m[0] == "balanceopt" and len(m) > 2 and m[1] != folder]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_folder_imports_another_folders_private_module(path):
    assert private_imports(path) == []


# Names of torch's that begin with an underscore: of its modules, and of tensors, parameters and modules.
PRIVATE_TORCH = re.compile(
    r"\btorch(\.\w+)*\._(?!dynamo\.reset)\w|from torch\S* import (.*[ (,])?_\w"
    r"|\._(version|base|local_tensor|modules|buffers)\b(?! =)"
    r"|[\"']_(forward(_pre)?_hooks|orig_mod|in_backward_optimizers|fsdp_flattened|optimizer_\w+_hooks)\b"
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_private_torch_is_in_one_file(path):
    code = ast.unparse(without_docstrings(ast.parse(path.read_text(encoding="utf-8"))))
    lines = [line for line in code.splitlines() if PRIVATE_TORCH.search(line) and "balanceopt" not in line]
    assert path.name in ("_torch.py", "_sharding.py") or lines == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_shards_are_handled_in_one_file(path):
    code = ast.unparse(without_docstrings(ast.parse(path.read_text(encoding="utf-8"))))
    assert path.name == "_sharding.py" or not re.search(
        r"torch\.distributed\.tensor|DTensor|device_mesh|full_tensor|to_local", code
    )


def without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def test_init_only_exports():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    kinds = {type(node) for node in tree.body}
    assert kinds <= {ast.Expr, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign}


def test_a_monitor_shows_few_names():
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 3) for name in ("a", "b", "head")})
    monitor = balanceopt.ModalityMonitor(model, {"a": "a", "b": "b"}, "head")
    assert len([name for name in dir(monitor) if not name.startswith("_")]) <= 18
