import json
from pathlib import Path

import pytest

from benchmarks.opm import Run, main, table


def run(accuracy: float, ratio: float) -> Run:
    learning = [(0, 10.0), (5, 80.0), (10, accuracy)]
    ratios = {"pix": [ratio] * 4, "fou": [1 / ratio] * 4}
    return Run(accuracy, learning, {"pix": 90.0, "fou": 70.0}, ratios, ratios, {"pix": 0.5, "fou": 0.0}, 1.0)


def test_the_table_says_when_nine_tenths_were_reached() -> None:
    lines = table({"joint": [run(95.0, 2.0)], "OPM": [run(85.0, 1.5)]}).splitlines()
    assert lines[2].startswith("| joint | 95.0 |  | 10 | 10 | 90.0 | 70.0 | 2.00 | 100 % |")
    assert lines[3].startswith("| OPM | 85.0 | -10.0 | 5 | - (1 never) |")


def test_it_runs_from_end_to_end(av_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        ["--data", str(av_file), "--noise", "image", "--seeds", "1", "--epochs", "1", "--out", str(tmp_path)]
    )
    assert "| OGM-GE + OPM |" in capsys.readouterr().out
    rows = json.loads((tmp_path / "av_digits_noise_image.json").read_text(encoding="utf-8"))
    assert list(rows) == ["joint", "OGM-GE", "OPM", "OGM-GE + OPM", "fixed dropout"]
