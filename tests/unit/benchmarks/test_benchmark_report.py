import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.data import MultimodalData, Split
from benchmarks.experiment import Comparison, Curves, Outcome
from benchmarks.pictures import draw_all
from benchmarks.report import aligned, findings, mean_and_spread, report, save_json, table
from benchmarks.training import Recipe


def outcome(accuracy: float, image: float, sound: float, ratio: float, k: float) -> Outcome:
    curves: Curves = {
        "ratio": {"image": np.full(8, ratio), "sound": np.full(8, 1 / ratio)},
        "coefficient": {"image": np.full(8, k), "sound": np.ones(8)},
    }
    return Outcome(accuracy, {"image": image, "sound": sound}, curves)


def made(seeds: int = 1, joint_sound: float = 70.0) -> Comparison:
    examples = {"image": torch.rand(3, 1, 8, 8), "sound": torch.rand(3, 12)}
    split = Split(examples, torch.arange(3))
    about = {"image": "a picture", "sound": "a noise"}
    data = MultimodalData("made", split, split, split, 3, about, "made up for the test", examples)
    shifts = [0.5 * seed for seed in range(seeds)]
    return Comparison(
        data,
        Recipe(epochs=4),
        {
            "image": [Outcome(92.0 + x, {"image": 91.0 + x}, {}) for x in shifts],
            "sound": [Outcome(80.0 + x, {"sound": 80.0 + x}, {}) for x in shifts],
        },
        {
            "joint": [outcome(93.0 + x, 90.5 + x, joint_sound + x, 2.5, 1.0) for x in shifts],
            "OGM-GE": [outcome(94.0 + x * x, 89.0 - 3 * x, 75.0 + x, 1.25, 0.4) for x in shifts],
        },
    )


def test_table_of_one_seed() -> None:
    assert table(made()).splitlines() == [
        "                     whole model   image encoder   sound encoder   ratio image : sound",
        "-" * 86,
        "each trained alone             -            91.0            80.0                     -",
        "joint                       93.0            90.5            70.0                  2.50",
        "OGM-GE                      94.0            89.0            75.0                  1.25",
    ]


def test_what_opm_does_is_said() -> None:
    comparison = made()
    (found,) = comparison.methods["OGM-GE"]
    found.curves["drop_probability"] = {"image": np.full(8, 0.25), "sound": np.zeros(8)}
    found.curves["coefficient"]["image"][:] = 1
    said = " ".join(findings(comparison))
    assert "OGM-GE drops the image of 25% of the samples and moves the ratio from 2.50 to 1.25." in said


def test_table_of_several_seeds_has_the_spread() -> None:
    lines = table(made(3)).splitlines()
    assert "93.5 ± 0.5" in lines[3]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    ("values", "text"), [([1.26], "1.3"), ([1.0, 3.0], "2.0 ± 1.4"), ([], "-"), ([math.nan, 1.0], "-")]
)
def test_mean_and_spread(values: list[float], text: str) -> None:
    assert mean_and_spread(values) == text


def test_aligned_columns() -> None:
    assert aligned([["", "b"], ["long", "1.0"]]) == "         b\n----------\nlong   1.0"


def test_findings_name_the_gap_and_what_the_method_did() -> None:
    text = " ".join(findings(made()))
    assert "Trained alone, the sound encoder reaches 80.0 %." in text
    assert "only reaches 70.0 %: 10.0 points" in text
    assert "the image encoder gives the right answer 2.5 times" in text
    assert "1.0 points better than the image encoder trained alone" in text
    assert "OGM-GE leaves 40% of the image encoder's gradient" in text
    assert "from 2.50 to 1.25" in text
    assert "image encoder -1.5, sound encoder +5.0, whole model +1.0" in text
    assert "This is one seed" in text


def test_findings_do_not_claim_a_gap_that_is_not_there() -> None:
    assert "little to balance" in findings(made(joint_sound=79.8))[0]


def test_findings_name_every_encoder_that_loses() -> None:
    comparison = made(3)
    comparison.alone["image"] = [Outcome(99.0, {"image": 99.0 + 0.5 * seed}, {}) for seed in range(3)]
    assert "The image encoder loses 8.5 points as well." in findings(comparison)[0]


def test_findings_say_what_may_be_chance() -> None:
    text = findings(made(3))[-1]
    assert "sound encoder +5.0," in text
    assert "image encoder -3.5 (within chance)" in text


def test_a_method_without_a_recorder_has_a_dash_for_a_ratio() -> None:
    comparison = made()
    comparison.methods["other"] = [Outcome(90.0, {"image": 80.0, "sound": 70.0}, {})]
    assert table(comparison).splitlines()[-1].endswith(" -")
    assert findings(comparison)[-2].startswith("other against joint, in points: image encoder -10.5")


def test_json_holds_every_seed_and_no_nan(tmp_path: Path) -> None:
    comparison = made(2)
    comparison.methods["other"] = [Outcome(90.0, {"image": 80.0, "sound": 70.0}, {})] * 2
    save_json(comparison, tmp_path / "results.json")
    text = (tmp_path / "results.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    content = json.loads(text)
    assert content["methods"]["joint"]["accuracy"] == [93.0, 93.5]
    assert content["methods"]["other"]["ratio"]["image"] == [None, None]
    assert content["alone"]["sound"]["probe"] == [80.0, 80.5]


@pytest.mark.parametrize("seeds", [1, 2])
def test_pictures_are_drawn(seeds: int, tmp_path: Path) -> None:
    paths = draw_all(made(seeds), tmp_path)
    assert [path.name for path in paths] == ["views.png", "training.png", "methods.png", "encoders.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths)


def test_report_explains_itself() -> None:
    text = report(made())
    for part in ("Made up for the test.", "image  a picture", "How to read it", "What it says", "1 seed."):
        assert part in text
    assert max(map(len, text.splitlines())) <= 120
