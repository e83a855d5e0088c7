import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.amss import ROWS, main, table
from benchmarks.data import mfeat
from benchmarks.experiment import Comparison, Outcome
from benchmarks.training import Recipe


def outcome(accuracy: float, **kept: float) -> Outcome:
    curves = {"keep_ratio": {name: np.array([value]) for name, value in kept.items()}} if kept else {}
    return Outcome(accuracy, {"pix": 90.0, "fou": 70.0}, curves)


def test_the_table_compares_with_joint_seed_by_seed(mfeat_file: Path) -> None:
    comparison = Comparison(
        data=mfeat(mfeat_file, ("pix", "fou"), train_samples=20),
        recipe=Recipe(),
        alone={m: [outcome(80.0)] * 2 for m in ("pix", "fou")},
        methods={
            "joint": [outcome(90.0), outcome(92.0)],
            "AMSS": [outcome(91.0, pix=0.25, fou=0.75), outcome(94.0, pix=0.35, fou=0.65)],
        },
    )
    lines = table(comparison).splitlines()
    assert lines[0] == "|  | accuracy | against joint | pix probe | fou probe | kept of pix | kept of fou |"
    assert lines[3].startswith("| joint | 91.0 ± 1.4 |  | 90.0 ± 0.0 |")
    assert lines[4] == "| AMSS | 92.5 ± 2.1 | 1.5 ± 0.7 | 90.0 ± 0.0 | 70.0 ± 0.0 | 0.30 | 0.70 |"


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_it_runs_from_end_to_end(av_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--data", str(av_file), "--seeds", "1", "--epochs", "1", "--out", str(tmp_path)])
    assert '| AMSS+ `"unbiased"` |' in capsys.readouterr().out
    saved = json.loads((tmp_path / "av_digits.json").read_text(encoding="utf-8"))
    assert list(saved["methods"]) == list(ROWS)
