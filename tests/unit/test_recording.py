"""Recorder: rows, CSV and pictures of what the methods computed."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import balanceopt as bo
from balanceopt.plotting import plot_rows
from balanceopt.recording import Row
from tests.models import watch
from tests.training import batches, groups_of, modulated, sgd, small_model, train


class Source:
    """Anything that tells its listeners numbers."""

    def __init__(self) -> None:
        self.listeners: list[Any] = []

    def tell(self, step: int, name: str, *values: float, dtype: torch.dtype = torch.float32) -> None:
        for listener in self.listeners:
            listener(step, name, ("a", "b")[: len(values)], torch.tensor(values, dtype=dtype))


def recorded(steps: int = 4, **options: Any) -> bo.Recorder:
    model, optimizer = modulated()
    recorder = bo.Recorder(optimizer, **options)
    train(model, optimizer, batches(model, steps))
    return recorder


def test_rows_of_a_run():
    recorder = recorded(2)
    found = [(row.step, row.quantity, row.modality) for row in recorder.rows()]
    names = [(q, m) for q in ("score", "ratio", "coefficient") for m in ("audio", "visual")]
    assert found == [(step, *name) for step in (0, 1) for name in names]
    values = {(row.step, row.quantity, row.modality): row.value for row in recorder.rows()}
    for step in (0, 1):
        rho = values[step, "score", "audio"] / values[step, "score", "visual"]
        assert values[step, "ratio", "audio"] == pytest.approx(rho, rel=1e-5)
        assert 0 < values[step, "coefficient", "audio"] < 1 == values[step, "coefficient", "visual"]


def test_series():
    steps, values = recorded(3).series("coefficient")["audio"]
    assert steps == [0, 1, 2]
    assert len(values) == 3
    assert bo.Recorder().series("nothing") == {}


def test_every():
    assert sorted({row.step for row in recorded(7, every=3).rows()}) == [0, 3, 6]
    with pytest.raises(ValueError, match=r"`every` should be at least 1\. Found every = 0"):
        bo.Recorder(every=0)


def test_several_sources():
    one, other = Source(), Source()
    recorder = bo.Recorder(one, other)
    one.tell(0, "q", 0.5)
    other.tell(0, "purity", 0.25, 0.75)
    assert recorder.rows() == [
        Row(0, "q", "a", 0.5),
        Row(0, "purity", "a", 0.25),
        Row(0, "purity", "b", 0.75),
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_any_dtype(dtype: torch.dtype):
    source = Source()
    recorder = bo.Recorder(source)
    source.tell(0, "k", 1.0, 2.0, dtype=dtype)
    assert [row.value for row in recorder.rows()] == [1.0, 2.0]


@pytest.mark.parametrize("waits", [False, True])
def test_what_is_told_may_change_later(waits: bool, monkeypatch: pytest.MonkeyPatch):
    if waits:
        monkeypatch.setattr(bo.Recorder, "_fetch", lambda self: None)
    source = Source()
    recorder = bo.Recorder(source)
    values = torch.ones(1)
    source.listeners[0](0, "k", ("a",), values)
    values.zero_()
    monkeypatch.undo()
    assert recorder.rows()[0].value == 1.0


def test_remove():
    source = Source()
    with bo.Recorder(source) as recorder:
        source.tell(0, "k", 1.0)
    source.tell(1, "k", 2.0)
    recorder.remove()
    assert source.listeners == []
    assert [row.step for row in recorder.rows()] == [0]


def test_of_an_attached_modulation():
    model = small_model()
    base = sgd(groups_of(model))
    recorder = bo.Recorder(bo.attach(base, watch(model), bo.OGM()))
    train(model, base, batches(model, 2))
    assert len(recorder.series("ratio")["audio"][0]) == 2


def test_rows_are_the_callers_own():
    recorder = recorded(1)
    recorder.rows().clear()
    assert recorder.rows()


def test_csv(tmp_path: Path):
    recorder = recorded(2)
    recorder.to_csv(tmp_path / "run.csv")
    with open(tmp_path / "run.csv", newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["step", "quantity", "modality", "value"]
    assert [Row(int(s), q, m, float(v)) for s, q, m, v in lines] == recorder.rows()


def test_on_an_accelerator_numbers_are_fetched_when_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("balanceopt.recording.on_host", lambda tensor: None)
    source = Source()
    recorder = bo.Recorder(source)
    for step in range(600):
        source.tell(step, "k", float(step))
    assert 0 < len(recorder._rows) < 600
    assert [row.value for row in recorder.rows()] == list(range(600))


# -- pictures ----------------------------------------------------------------------------------------------------


def test_a_panel_for_each_quantity_and_a_line_for_each_modality(tmp_path: Path):
    figure = recorded(5).plot(tmp_path / "run.png", smooth=3)
    assert [axes.get_ylabel() for axes in figure.axes] == ["score", "ratio", "coefficient"]
    for axes in figure.axes:
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["audio", "visual"]
    assert figure.axes[-1].get_xlabel() == "step"
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG"


def test_chosen_quantities_in_the_order_given():
    figure = recorded(3).plot(quantities=["coefficient", "score"])
    assert [axes.get_ylabel() for axes in figure.axes] == ["coefficient", "score"]


def test_the_running_mean_of_a_constant_is_the_constant():
    rows = [Row(step, "k", "a", 0.5) for step in range(9)]
    (axes,) = plot_rows(rows, smooth=4).axes
    steps, values = axes.get_lines()[-1].get_data()
    assert list(steps) == list(range(9))
    assert values == pytest.approx([0.5] * 9)


@pytest.mark.parametrize("smooth", [1, 2, 50])
def test_any_width(smooth: int):
    for count in (1, 2, 7):
        plot_rows([Row(step, "k", "a", float(step)) for step in range(count)], smooth=smooth)


def test_more_modalities_than_colours():
    rows = [Row(0, "k", f"m{i}", 1.0) for i in range(9)]
    assert len(plot_rows(rows).axes[0].get_legend().get_texts()) == 9


def test_nothing_to_draw():
    with pytest.raises(ValueError, match=r"nothing to draw: asked for everything, recorded \[\]"):
        bo.Recorder().plot()
    with pytest.raises(ValueError, match=r"asked for \['q'\], recorded \['score', 'ratio', 'coefficient'\]"):
        recorded(1).plot(quantities=["q"])


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'balanceopt\[plot\]'"):
        recorded(1).plot()
