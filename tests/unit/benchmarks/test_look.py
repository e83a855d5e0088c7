from pathlib import Path

import pytest

from benchmarks import look
from benchmarks.screenshot import browser, screenshot


def test_reports_and_compares_with_each_encoder_alone(
    av_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(av_file.parent), "--out", str(tmp_path), "--epochs", "8"]
    look.main([*arguments, "--sets", "av_digits, clean"])
    printed = capsys.readouterr().out
    assert "What was found" in printed
    rows = [line.split() for line in printed.splitlines() if line.startswith("av_digits, clean ")]
    assert [row[2] for row in rows] == ["audio", "image"]
    assert (tmp_path / "av_digits_clean.html").is_file()
    assert "noise" not in printed


def test_data_that_are_absent_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        look.main(["--data", str(tmp_path), "--out", str(tmp_path)])
    assert "there is no" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rule", "starved", "little", "right"),
    [
        ("fine", False, False, "yes"),
        ("fine", True, False, "no"),
        ("starved", True, False, "yes"),
        ("starved", True, True, "no"),
        ("starved and scarce", True, False, "yes"),
        ("starved and scarce", False, True, "no"),
        ("scarce", False, True, "yes"),
        ("weak", True, True, "no claim"),
    ],
)
def test_a_finding_is_right_where_its_claims_are(rule: str, starved: bool, little: bool, right: str) -> None:
    assert look.verdict(rule, starved=starved, little=little) == right


def test_a_picture_of_a_page(tmp_path: Path) -> None:
    if browser() is None:
        pytest.skip("needs a browser: apt-get install chromium")
    page = tmp_path / "page.html"
    page.write_text("<!DOCTYPE html><title>a</title><body style='background: #123456'>", encoding="utf-8")
    screenshot(page, tmp_path / "page.png", width=600, height=300)
    assert (tmp_path / "page.png").read_bytes()[:4] == b"\x89PNG"
