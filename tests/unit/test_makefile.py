"""The Makefile does what its command line says, whatever the environment holds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def planned(*arguments: str, **environment: str) -> str:
    """The commands that make would run; without what an outer make tells an inner one."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "--dry-run", "--always-make", *arguments]
    run = subprocess.run(
        command,
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return run.stdout


def test_clean_removes_no_environment_of_the_users():
    plan = planned("clean", VENV="/home/me/env")
    assert "rm -rf .venv " in plan
    assert "/home/me/env" not in plan


@pytest.mark.parametrize("name", ["DATA", "ARGS", "JOBS", "PYTHON", "VENV"])
@pytest.mark.parametrize("target", ["demo", "test", "evidence", "bench"])
def test_variables_of_the_environment_do_not_count(target: str, name: str):
    assert "/from/outside" not in planned(target, **{name: "/from/outside"})


def test_variables_of_the_command_line_count():
    assert '--data "/mine.npz"' in planned("demo", "DATA=/mine.npz")
    assert "-k ogm" in planned("test", "ARGS=-k ogm")
    assert "rm -rf /my/env " in planned("clean", "VENV=/my/env")


# -- installing, with a Python and a pip that only write down how they are called ------------------------------------

FAKE_PYTHON = r"""#!/bin/sh
echo "$@" >>"$LOG"
case "$*" in
  *"import ensurepip"*) exit "${NO_VENV:-0}" ;;
  *version_info*) exit "${OLD:-0}" ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *"pip install"*) exit "${NO_NETWORK:-0}" ;;
esac
"""
Make = Callable[..., "subprocess.CompletedProcess[str]"]
needs_a_shell = pytest.mark.skipif(sys.platform == "win32", reason="the fake Python is a shell script")


@pytest.fixture
def tree(tmp_path) -> Path:
    """What make needs, under a path with spaces."""
    folder = tmp_path / "a tree"
    folder.mkdir()
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    fake = tmp_path / "fake python"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    return folder


@pytest.fixture
def make(tree) -> Make:
    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        return subprocess.run(
            ["make", f"PYTHON={tree.parent / 'fake python'}", *arguments],
            cwd=tree,
            env={**inherited, "LOG": str(tree.parent / "log"), **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def calls(tree: Path, what: str) -> int:
    return sum(what in line for line in (tree.parent / "log").read_text().splitlines())


@needs_a_shell
def test_a_second_call_installs_nothing(tree, make):
    for _ in range(2):
        assert make("-j4", "test", "check").returncode == 0
    assert calls(tree, "-m venv") == 1
    assert [
        calls(tree, f"pip install{rest}")
        for rest in ("", " -qq --disable-pip-version-check -c constraints.txt torch==")
    ] == [3, 1]
    assert [calls(tree, f"-m {tool}") for tool in ("pytest", "mypy")] == [2, 2]


@needs_a_shell
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"OLD": "1"}, "Python 3.10 or newer is needed"),
        ({"NO_VENV": "1"}, "apt install python3-venv"),
        ({"NO_NETWORK": "1"}, "could not be installed into .venv: pip says why above; without a network"),
    ],
)
def test_what_fails_says_so(tree, make, environment, expected):
    failed = make("test", **environment)
    assert failed.returncode != 0
    assert expected in failed.stderr
    assert calls(tree, "-m pytest") == 0
    assert make("test").returncode == 0
    assert calls(tree, "-m pytest") == 1


@needs_a_shell
def test_a_python_that_is_not_there_is_named(make):
    failed = make("test", "PYTHON=python9")
    assert failed.returncode != 0
    assert "there is no python9" in failed.stderr


@needs_a_shell
def test_packages_of_an_interrupted_installation_are_installed_again(tree, make):
    make("test", NO_NETWORK="1")
    packages = tree / ".venv" / "lib" / "python3.11" / "site-packages"
    for name, last in (("half", "METADATA"), ("whole", "INSTALLER")):
        (packages / f"{name}-1.0.dist-info").mkdir(parents=True)
        (packages / f"{name}-1.0.dist-info" / last).touch()
    assert make("test").returncode == 0
    assert [path.name for path in packages.iterdir()] == ["whole-1.0.dist-info"]


@needs_a_shell
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_a_tree_that_is_read_only_is_refused(tree, make):
    tree.chmod(0o555)
    try:
        failed = make("test")
    finally:
        tree.chmod(0o755)
    assert failed.returncode != 0
    assert "have to be writable" in failed.stderr


def test_lower_bounds_are_those_of_the_package(tree, make):
    assert make(".venv-lower/constraints.txt").returncode == 0
    lines = (tree / ".venv-lower" / "constraints.txt").read_text().splitlines()
    pinned = {line.split("#")[0].strip() for line in lines}
    code = re.sub("#.*", "", (tree / "pyproject.toml").read_text(encoding="utf-8"))
    bounds = set(re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\d.]+)', code))
    assert {("torch", "2.6"), ("numpy", "1.25"), ("mkdocstrings", "0.27")} <= bounds
    assert pinned == {"pyparsing<3.3", *(f"{name}=={version}" for name, version in bounds)}
