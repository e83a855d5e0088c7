import json
from pathlib import Path

import pytest

from benchmarks.noise import ROWS, interval, main


def test_the_interval_is_students():
    # Mean 2, standard deviation 1, three values: 4.303 / sqrt(3) on either side.
    assert interval([1.0, 2.0, 3.0]) == "-0.48 to 4.48"
    assert interval([1.0]) == "-"


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_it_runs_from_end_to_end(av_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--data", str(av_file), "--seeds", "2", "--epochs", "1", "--out", str(tmp_path)])
    assert "| OGM-GE, pool |" in capsys.readouterr().out
    saved = json.loads((tmp_path / "av_digits.json").read_text(encoding="utf-8"))
    assert list(saved["methods"]) == list(ROWS)
