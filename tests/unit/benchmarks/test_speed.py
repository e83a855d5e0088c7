"""The speed benchmark: interleaved timing, the table, and the naive loops it compares with."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks import naive, speed, speed_step
from benchmarks.shapes import CASES, Model
from benchmarks.speed_options import Options
from benchmarks.speed_report import Growth, Section, mark, write_into
from benchmarks.timing import Contender, Timing, measure

CPU = torch.device("cpu")


def test_contenders_take_turns_forwards_and_backwards_after_two_rounds_that_do_not_count():
    calls: list[str] = []
    contenders = {name: Contender(partial(calls.append, name)) for name in "abc"}
    timings = measure(contenders, 2, CPU)
    assert "".join(calls) == "abccbaabccba"
    assert all(0 <= t.low <= t.median <= t.high for t in timings.values())


def test_preparation_is_not_timed(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("benchmarks.timing.time.perf_counter", lambda: next(clock))
    prepared = []
    timings = measure({"a": Contender(lambda: None, lambda: prepared.append(1))}, 3, CPU)
    assert timings["a"].median == 1
    assert len(prepared) == 5


def cannot_compile(kinds: object) -> None:
    raise RuntimeError("no compiler")


def test_every_contender_steps_and_the_table_names_it(monkeypatch):
    monkeypatch.setattr(speed_step, "warm_up", cannot_compile)
    options = Options(CPU, batch=8)
    setting = speed_step.Setting([(4, 3, 3, 3), (4,), (5, 4)], options)
    rows = speed_step.contenders(setting, "fused")
    timings = measure(rows, 1, CPU)
    text = Section("tiny", timings, "fused", speed_step.against(list(rows))).table()
    assert all(f"| {name} |" in text for name in rows)
    assert all(torch.isfinite(p).all() for p in setting.model.parameters())


def test_a_table_has_ratios_and_what_a_row_is_compared_with():
    timings = {
        "base": Timing(0.010, 0.009, 0.011),
        "old": Timing(0.040, 0.040, 0.040),
        "new": Timing(0.020, 0.015, 0.025),
    }
    lines = Section("case", timings, "base", {"new": "old"}, {"new": "better"}).table().splitlines()
    assert lines[0] == "**case**"
    assert lines[2] == "|  | ms | x base | quartiles | published / this |  |"
    assert lines[4] == "| base | 10 | 1.00 | 0.90 - 1.10 |  |  |"
    assert lines[6] == "| new | 20 | 2.00 | 1.50 - 2.50 | 2.0 | better |"


def test_a_table_of_growth():
    timings = {"2": {"base": Timing(0.001, 0, 0), "ours": Timing(0.003, 0, 0)}}
    lines = Growth("step", "modalities", timings, "base").table().splitlines()
    assert lines[2:] == ["| modalities | base | ours |", "| --- | --: | --: |", "| 2 | 1 | 3 (3.00) |"]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("part", speed.PARTS)
def test_every_part_runs_and_writes_its_tables(part, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(CASES, "tiny", lambda: [(4, 3, 3, 3), (4,), (5, 4)])
    monkeypatch.setattr(speed_step, "warm_up", cannot_compile)
    page = tmp_path / "page.md"
    page.write_text(f"a\n{mark(part)}\nold\n{mark(part)}\nb\n")
    speed.main(
        [
            part,
            "--quick",
            "--cases",
            "tiny",
            "--repetitions",
            "1",
            "--out",
            str(tmp_path),
            "--page",
            str(page),
        ]
    )
    text = (tmp_path / f"{part}.md").read_text()
    assert text in page.read_text()
    assert page.read_text().startswith(f"a\n{mark(part)}\n**")
    assert text.strip() in capsys.readouterr().out
    assert json.loads((tmp_path / f"{part}.json").read_text())


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        speed.main(["nothing"])
    assert "parts should be of step, training" in capsys.readouterr().err


def test_a_page_without_marks_is_left_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text")
    with pytest.raises(ValueError, match="two lines"):
        write_into(page, "step", "table")
    assert page.read_text() == "text"


def test_the_naive_diagnosis_counts_the_most_frequent_class():
    features = np.array([[0.0, 0.0], [0.1, 0.0], [0.0, 0.1], [5.0, 5.0], [5.1, 5.0]], dtype=np.float32)
    assert naive.diagnosis(features, np.array([0, 0, 1, 1, 1]), 2, seed=0) == 0.8


def test_ratios_are_of_medians():
    assert Timing(3.0, 2.0, 4.0).ratio_to(Timing(2.0, 1.0, 3.0)) == 1.5


def test_naive_ogm_scales_the_leader_alone_and_only_matrices():
    model = Model([(4, 3), (4,)])
    for p in model.carried():
        p.grad = torch.ones_like(p)
    logits = torch.stack([torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])])
    parameters = {name: list(encoder.carried) for name, encoder in model.modalities.items()}
    naive.ogm(parameters, logits, torch.tensor([0]), 0.5, noise=False)
    ratio = (1 / (1 + math.exp(-2))) / 0.5
    expected = 1 - math.tanh(0.5 * ratio)
    assert torch.allclose(model.modalities["m0"].carried[0].grad, torch.full((4, 3), expected))
    assert torch.equal(model.modalities["m0"].carried[1].grad, torch.ones(4))
    assert torch.equal(model.modalities["m1"].carried[0].grad, torch.ones(4, 3))


def test_naive_amss_keeps_the_published_number_of_units():
    model = Model([(10, 3)])
    for p in model.carried():
        p.grad = torch.rand_like(p) + 0.1
    parameters = {name: list(encoder.carried) for name, encoder in model.modalities.items()}
    naive.amss(parameters, (0.31, 0.69), unbiased=False)
    gradients = [p.grad for p in model.carried() if p.grad is not None]
    assert [int(g.count_nonzero(1).bool().sum()) for g in gradients] == [4, 7]
