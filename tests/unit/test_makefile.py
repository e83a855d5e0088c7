"""The Makefile does what its command line says, whatever the environment holds."""

from __future__ import annotations

import os
import shutil
import subprocess
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
