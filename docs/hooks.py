"""For MkDocs: MathJax and its fonts come from the installed package, so that formulas need no network."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_SCRIPT = "tex-chtml.js"
_FONTS = "output/chtml/fonts/woff-v2"


def on_files(sources: Files, *, config: MkDocsConfig) -> Files:
    """Add MathJax's script and fonts to the site, in the folders in which the script looks for them."""
    package = Path(str(files("mathjax"))) / "static" / "mathjax" / "es5"
    for path in (package / _SCRIPT, *sorted((package / _FONTS).glob("*.woff"))):
        name = path.relative_to(package).as_posix()
        sources.append(File.generated(config, f"javascripts/mathjax/{name}", abs_src_path=str(path)))
    return sources
