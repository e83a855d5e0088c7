"""What is released: the wheel, the source distribution, the notes of a version, and the workflows that make them."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import balanceopt

ROOT = Path(__file__).parent.parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def text(path: str | Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


RELEASE_NOTES = runpy.run_path(str(ROOT / ".github" / "release_notes.py"))


# -- notes -----------------------------------------------------------------------------------------------------------

CHANGELOG = """# Changelog

## [Unreleased]

- not yet

## [0.2.0] - 2026-12-01

### Added

- `this`

## [0.1.0]

- that
"""


def test_notes_are_the_section_of_the_version():
    notes = RELEASE_NOTES["notes"]
    assert notes(CHANGELOG, "0.2.0") == "### Added\n\n- `this`"
    assert notes(CHANGELOG, "0.1.0") == "- that"
    for missing in ("0.3.0", "0.2", "0.2.0] - 2026-12-01"):
        with pytest.raises(SystemExit, match="no section"):
            notes(CHANGELOG, missing)


def test_a_tag_is_the_version():
    assert RELEASE_NOTES["version"](text("balanceopt/__init__.py")) == balanceopt.__version__
    for tag in ("", balanceopt.__version__, "v0.0.0"):
        with pytest.raises(SystemExit, match=f"should be v{re.escape(balanceopt.__version__)}"):
            RELEASE_NOTES["main"](tag)


# -- workflows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_commit(path):
    actions = re.findall(r"uses: (.*)", text(path))
    assert actions
    assert [line for line in actions if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", line)] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_jobs_call_targets_of_the_makefile(path):
    makefile = text("Makefile")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    called = re.findall(r"(?:make|targets?:)((?: (?!--)[a-z-]+)+)", text(path))
    names = {name.removesuffix("-lower") for line in called for name in line.split()}
    assert names
    assert names <= targets


def test_python_versions_are_those_of_the_classifiers():
    classified = set(re.findall(r"Python :: (3\.\d+)", text("pyproject.toml")))
    tests = text(".github/workflows/tests.yml")
    assert set(re.findall(r"\{ python: \"(3\.\d+)\"", tests)) == classified


# -- citation and issues ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "methods").glob("*.md")), ids=lambda path: path.stem)
def test_the_papers_of_every_method_are_cited(path):
    paragraphs = [p for p in text(path).split("\n\n") if p.startswith(("Paper:", "Papers:"))]
    titles = [" ".join(t.split()) for p in paragraphs for t in re.findall(r"\*([^*]{20,})\*", p)]
    assert titles or path.stem in ("dropout", "index")
    assert [title for title in titles if f'"{title}"' not in text("CITATION.cff")] == []


def test_issues_ask_for_the_versions():
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"):
        assert "balanceopt.show_versions()" in text(path)


# -- distributions ---------------------------------------------------------------------------------------------------


def build(source: Path, target: Path) -> tuple[Path, Path]:
    """Build the sdist of a folder, and the wheel of the sdist."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), str(source)]
    subprocess.run(command, check=True, timeout=600, capture_output=True)
    (sdist,), (wheel,) = target.glob("*.tar.gz"), target.glob("*.whl")
    return sdist, wheel


def members(path: Path) -> set[str]:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            return set(archive.namelist())
    with tarfile.open(path) as archive:
        return {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    pytest.importorskip("build", reason="make test-dist installs it")
    ignored = shutil.ignore_patterns(
        ".[!g]*", ".git", "__pycache__", "*.egg-info", "build", "dist", "out", "site"
    )
    source = tmp_path_factory.mktemp("tree") / "source"  # a copy: a build leaves files beside what it builds
    shutil.copytree(ROOT, source, ignore=ignored)
    return build(source, tmp_path_factory.mktemp("dist"))


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(built):
    wheel = built[1]
    assert wheel.name == f"balanceopt-{balanceopt.__version__}-py3-none-any.whl"
    package = Path(balanceopt.__file__).parent
    files = {path for path in package.rglob("*") if path.suffix == ".py" or path.name == "py.typed"}
    info = f"balanceopt-{balanceopt.__version__}.dist-info"
    names = members(wheel)
    assert {n for n in names if not n.startswith(info)} == {f.relative_to(ROOT).as_posix() for f in files}
    assert "balanceopt/py.typed" in names
    assert f"{info}/licenses/LICENSE" in names


@pytest.mark.slow
def test_the_sdist_holds_the_tree_and_builds_the_same(built, tmp_path):
    sdist, wheel = built
    tracked = ["Makefile", "constraints.txt", "LICENSE", "CHANGELOG.md", "CITATION.cff", "mkdocs.yml"]
    tracked += [path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")]
    assert set(tracked) <= members(sdist)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    sdist_again, wheel_again = build(source, tmp_path / "dist")
    assert members(sdist_again) == members(sdist)
    assert members(wheel_again) == members(wheel)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # installs torch
def test_the_wheel_works_beside_torch_alone(built, tmp_path):
    python = tmp_path / "env" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True, timeout=600)
    torch = re.findall(r"^torch==.*", text("constraints.txt"), re.MULTILINE)[0]
    install = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", torch, built[1]]
    subprocess.run(install, check=True, timeout=3000)
    code = """
import warnings
import torch
warnings.simplefilter("error")
import balanceopt
for name in balanceopt.__all__:
    getattr(balanceopt, name)
print(balanceopt.__file__)
print(balanceopt.show_versions())
"""
    ran = subprocess.run(
        [python, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(str(tmp_path / "env"))
    assert "tqdm: not installed" in ran.stdout
