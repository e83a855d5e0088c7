"""`python -m benchmarks.screenshot page.html picture.png`: a picture of a page, by a headless Chromium."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.command import positive
from benchmarks.extras import need

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Of Chromium's setting `preferredColorScheme`.
_SCHEMES = {"dark": 0, "light": 1}


def browser() -> str | None:
    """Path of a Chromium, None if none is installed."""
    return next(filter(None, map(shutil.which, _BROWSERS)), None)


def screenshot(
    page: Path, picture: Path, *, width: int = 900, height: int = 1000, scheme: str = "light"
) -> None:
    """Save what a window of this size shows of a page, as a PNG of few colours.

    Raises:
        FileNotFoundError: without a browser.
        RuntimeError: if the browser made no picture.
    """
    path = browser()
    if path is None:
        raise FileNotFoundError(f"a browser is needed, one of {_BROWSERS}: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw.png"
        ran = subprocess.run(
            [path, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}",
             f"--window-size={width},{height}", f"--blink-settings=preferredColorScheme={_SCHEMES[scheme]}",
             f"--screenshot={raw}", page.resolve().as_uri()],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        if not raw.is_file():
            raise RuntimeError(f"the browser made no picture: {ran.stderr[-500:]}")
        with need("PIL.Image").open(raw) as image:
            image.convert("RGB").quantize(64).save(picture, optimize=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Take the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.screenshot", description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=positive, default=900)
    parser.add_argument("--height", type=positive, default=1000)
    parser.add_argument("--scheme", choices=_SCHEMES, default="light")
    options = parser.parse_args(arguments)
    try:
        screenshot(
            options.page, options.picture, width=options.width, height=options.height, scheme=options.scheme
        )
    except (FileNotFoundError, RuntimeError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
