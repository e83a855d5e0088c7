import json
from pathlib import Path

import pytest

from benchmarks.demo import main


def test_quick_demo_runs_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.index("What it says") < printed.index("whole model   image encoder")
    assert printed.index("whole model   image encoder") < printed.index("bo.report(recorder)")
    for part in ("whole model", "image encoder", "spectrum encoder", "OGM-GE", "What it says"):
        assert part in printed
    made = {
        "views.png",
        "training.png",
        "methods.png",
        "encoders.png",
        "table.txt",
        "results.json",
        "report.html",
    }
    assert {path.name for path in tmp_path.iterdir()} == made
    ratio = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["methods"]["joint"]["ratio"]
    assert ratio["image"][0] > 1 > ratio["spectrum"][0]


def test_demo_takes_other_data(av_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--quick", "--seeds", "2", "--data", str(av_file), "--out", str(tmp_path / "out")])
    assert "audio encoder" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--seeds", "0"], "should be at least 1"), (["--data", "absent.npz"], "there is no absent.npz")],
)
def test_mistakes_are_said_in_a_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
