"""Print the changelog's section of a release: `python .github/release_notes.py v0.1.0`, or `make notes TAG=v0.1.0`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def version(source: str) -> str:
    """Read the version from the package's `__init__.py`, without importing torch."""
    return re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE)[0]


def notes(changelog: str, number: str) -> str:
    """Return the text of a version's section, without its heading."""
    sections = re.split(r"^## \[(.+?)\].*\n", changelog, flags=re.MULTILINE)
    texts = dict(zip(sections[1::2], sections[2::2], strict=True))
    text = texts.get(number, "").strip()
    if not text:
        raise SystemExit(f"CHANGELOG.md has no section [{number}]: rename [Unreleased], and begin a new one")
    return text


def main(tag: str) -> None:
    """Print the notes of a tag, which has to be the package's version."""
    number = version((ROOT / "balanceopt" / "__init__.py").read_text(encoding="utf-8"))
    if tag != f"v{number}":
        raise SystemExit(f"the tag should be v{number}, as balanceopt.__version__ says. Found {tag!r}")
    sys.stdout.write(notes((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), number) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:] or [""])
