import json
from pathlib import Path

import pytest
import torch

from benchmarks.data import mfeat
from benchmarks.methods import Context
from benchmarks.models import classifier_for
from benchmarks.opm import Run, fixed_dropout, main, table


def run(accuracy: float, ratio: float) -> Run:
    learning = [(0, 10.0), (5, 80.0), (10, accuracy)]
    ratios = {"pix": [ratio] * 4, "fou": [1 / ratio] * 4}
    return Run(accuracy, learning, {"pix": 90.0, "fou": 70.0}, ratios, ratios, {"pix": 0.5, "fou": 0.0}, 1.0)


def test_the_table_says_when_nine_tenths_were_reached() -> None:
    lines = table({"joint": [run(95.0, 2.0)], "OPM": [run(85.0, 1.5)]}).splitlines()
    assert lines[2].startswith("| joint | 95.0 |  | 10 | 10 | 90.0 | 70.0 | 2.00 | 100 % |")
    assert lines[3].startswith("| OPM | 85.0 | -10.0 | 5 | - (1 never) |")


def test_fixed_dropout_takes_one_modality_from_half_of_the_samples(mfeat_file: Path) -> None:
    data = mfeat(mfeat_file, train_samples=40)
    model = classifier_for(data)
    method = fixed_dropout(model, Context((), (), 10, 0.1, 0.9, 0, 25))
    seen: list[torch.Tensor] = []
    model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    inputs = [x.repeat(25, 1) for x in data.train.inputs.values()]
    model(*inputs)
    lost = torch.stack([(part == 0).all(1) for part in seen[0].split(32, 1)])
    assert lost.sum(0).max() == 1
    assert 0.45 < lost.any(0).float().mean() < 0.55
    for remove in method.removes:
        remove()
    model(*inputs)
    assert not (seen[1].split(32, 1)[0] == 0).all(1).any()


def test_it_runs_from_end_to_end(av_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        ["--data", str(av_file), "--noise", "image", "--seeds", "1", "--epochs", "1", "--out", str(tmp_path)]
    )
    assert "| OGM-GE + OPM |" in capsys.readouterr().out
    rows = json.loads((tmp_path / "av_digits_noise_image.json").read_text(encoding="utf-8"))
    assert list(rows) == ["joint", "OGM-GE", "OPM", "OGM-GE + OPM", "fixed dropout"]
