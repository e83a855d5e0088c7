"""The speed benchmark: interleaved timing, the table, and the naive loops it compares with."""

import math
from functools import partial

import pytest
import torch

from benchmarks import naive, speed
from benchmarks.shapes import Model
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


def test_every_contender_steps_and_the_table_names_it(tmp_path):
    setting = speed.Setting([(4, 3, 3, 3), (4,), (5, 4)], CPU, batch=8)
    rows = speed.contenders(setting, "fused")
    text = speed.table({"tiny": measure(rows, 1, CPU)}, "fused")
    assert all(f"| {name} |" in text for name in rows)
    assert all(torch.isfinite(p).all() for p in setting.model.parameters())
    page = tmp_path / "page.md"
    page.write_text(f"a\n{speed.MARK}\nold\n{speed.MARK}\nb\n")
    speed.write_into(page, text)
    assert page.read_text() == f"a\n{speed.MARK}\n{text}\n{speed.MARK}\nb\n"


def test_a_page_without_marks_is_left_alone(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("text")
    with pytest.raises(ValueError, match="two lines"):
        speed.write_into(page, "table")
    assert page.read_text() == "text"


def test_ratios_are_of_medians():
    assert Timing(3.0, 2.0, 4.0).ratio_to(Timing(2.0, 1.0, 3.0)) == 1.5


def test_naive_ogm_scales_the_leader_alone_and_only_matrices():
    model = Model([(4, 3), (4,)])
    for p in model.carried():
        p.grad = torch.ones_like(p)
    logits = torch.stack([torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])])
    parameters = {"first": list(model.first.carried), "second": list(model.second.carried)}
    naive.ogm(parameters, logits, torch.tensor([0]), 0.5, noise=False)
    ratio = (1 / (1 + math.exp(-2))) / 0.5
    expected = 1 - math.tanh(0.5 * ratio)
    assert torch.allclose(model.first.carried[0].grad, torch.full((4, 3), expected))
    assert torch.equal(model.first.carried[1].grad, torch.ones(4))
    assert torch.equal(model.second.carried[0].grad, torch.ones(4, 3))


def test_naive_amss_keeps_the_published_number_of_units():
    model = Model([(10, 3)])
    for p in model.carried():
        p.grad = torch.rand_like(p) + 0.1
    parameters = {"first": list(model.first.carried), "second": list(model.second.carried)}
    naive.amss(parameters, (0.31, 0.69), unbiased=False)
    gradients = [p.grad for p in model.carried() if p.grad is not None]
    assert [int(g.count_nonzero(1).bool().sum()) for g in gradients] == [4, 7]
