"""Recorder: rows, CSV and pictures of what the methods computed."""

from __future__ import annotations

import csv
import gc
import os
import subprocess
import sys
from itertools import pairwise
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


def recorder_of(name: str) -> bo.Recorder:
    recorder = bo.Recorder()
    recorder._rows.append(Row(0, "score", name, -1.0))
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


@pytest.mark.parametrize("every", [0, -1, 1.5, float("nan"), True, "2", None])
def test_every_is_a_count(every: Any):
    with pytest.raises(ValueError, match=r"`every` should be a whole number of at least 1\. Found every = "):
        bo.Recorder(every=every)


@pytest.mark.parametrize("wrong", [3, None, "optimizer", bo.Recorder, torch.nn.Linear(1, 1)])
def test_a_refused_source_leaves_no_listener_on_the_others(wrong: Any):
    source = Source()
    with pytest.raises(TypeError, match="a source should be a ModalityMonitor, a ModulatedOptimizer"):
        bo.Recorder(source, wrong)
    assert source.listeners == []


def test_a_dropped_recorder_stops_listening():
    source = Source()
    recorder = bo.Recorder(source)
    del recorder
    gc.collect()
    assert source.listeners == []


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


def test_log_gets_each_row_as_it_comes():
    logged: list[tuple[str, float, int]] = []
    source = Source()
    recorder = bo.Recorder(source, every=2, log=lambda *row: logged.append(row))
    for step in range(4):
        source.tell(step, "ratio", 0.5, 2.0)
    assert logged == [
        (f"balance/ratio/{name}", value, step) for step in (0, 2) for name, value in (("a", 0.5), ("b", 2.0))
    ]
    assert len(recorder.rows()) == 4


def test_values_on_a_device_are_logged_at_the_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("balanceopt.recording.on_host", lambda tensor: None)
    logged: list[str] = []
    source = Source()
    with bo.Recorder(source, log=lambda name, value, step: logged.append(name)):
        source.tell(0, "ratio", 0.5)
        assert logged == []
    assert logged == ["balance/ratio/a"]


def test_a_log_that_raises_loses_no_row():
    def fails(name: str, value: float, step: int) -> None:
        raise OSError

    source = Source()
    recorder = bo.Recorder(source, log=fails)
    with pytest.raises(OSError):  # noqa: PT011
        source.tell(0, "ratio", 0.5, 2.0)
    assert len(recorder.rows()) == 2


@pytest.mark.parametrize("log", [3, "print", bo.Recorder])
def test_log_is_a_function(log: Any):
    with pytest.raises(ValueError, match=r"`log` should be a function of \(name, value, step\), or None"):
        bo.Recorder(log=log)


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


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@a", "\t=1", "\r=1"])
def test_a_spreadsheet_runs_no_cell(name: str, tmp_path: Path):
    recorder = recorder_of(name)
    recorder.to_csv(tmp_path / "run.csv")
    with open(tmp_path / "run.csv", newline="", encoding="utf-8") as file:
        (_, _, modality, value) = list(csv.reader(file))[1]
    assert (modality, value) == (f"'{name}", "-1.0")


def test_names_are_written_in_utf_8_whatever_the_locale(tmp_path: Path):
    code = (
        "import balanceopt as bo; from balanceopt.recording import Row; recorder = bo.Recorder(); "
        "recorder._rows.append(Row(0, 'score', '\\u65e5\\u672c', 1.0)); recorder.to_csv('run.csv')"
    )
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    ascii_only["PYTHONPATH"] = str(Path(bo.__file__).parent.parent)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=ascii_only, timeout=120)
    assert "\u65e5\u672c" in (tmp_path / "run.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize("write", ["to_csv", "plot"])
def test_a_write_that_fails_leaves_the_old_file(write: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "run.png"
    target.write_text("old")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("balanceopt.recording.csv.writer", fail)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        getattr(recorder_of("a"), write)(target)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_stays_a_link(tmp_path: Path):
    (tmp_path / "run.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to(tmp_path / "run.csv")
    recorder_of("a").to_csv(tmp_path / "link.csv")
    assert (tmp_path / "link.csv").is_symlink()
    assert "score" in (tmp_path / "run.csv").read_text()


def test_on_an_accelerator_numbers_are_fetched_when_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("balanceopt.recording.on_host", lambda tensor: None)
    source = Source()
    recorder = bo.Recorder(source)
    for step in range(600):
        source.tell(step, "k", float(step))
    assert 0 < len(recorder._rows) < 600
    assert [row.value for row in recorder.rows()] == list(range(600))


def names_in(axes: Any) -> list[str]:
    """Names at the lines' ends; the lines to them are annotations."""
    return [text.get_text() for text in axes.texts if not hasattr(text, "arrow_patch")]


# -- pictures ----------------------------------------------------------------------------------------------------


def test_a_panel_for_each_quantity_and_a_line_for_each_modality(tmp_path: Path):
    figure = recorded(5).plot(tmp_path / "run.png", smooth=3)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["score", "ratio", "coefficient"]
    for axes in figure.axes:
        assert sorted(names_in(axes)) == ["audio", "visual"]
    assert figure.axes[-1].get_xlabel() == "step"
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG"


def test_chosen_quantities_in_the_order_given():
    figure = recorded(3).plot(quantities=["coefficient", "score"])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["coefficient", "score"]


def test_the_running_mean_of_a_constant_is_the_constant():
    rows = [Row(step, "k", "a", 0.5) for step in range(9)]
    (axes,) = plot_rows(rows, smooth=4).axes
    steps, values = axes.get_lines()[-1].get_data()
    assert list(steps) == list(range(9))
    assert values == pytest.approx([0.5] * 9)


def test_the_running_mean_is_as_wide_as_asked_in_steps():
    values = [0.0, 1.0] * 6
    dense = [Row(step, "k", "a", value) for step, value in enumerate(values)]
    sparse = [Row(10 * step, "k", "a", value) for step, value in enumerate(values)]
    assert set(plot_rows(dense, smooth=2).axes[0].get_lines()[-1].get_ydata()[1:]) == {0.5}
    assert list(plot_rows(sparse, smooth=2).axes[0].get_lines()[-1].get_ydata()) == values


@pytest.mark.parametrize("smooth", [1, 2, 50])
def test_any_width(smooth: int):
    for count in (1, 2, 7):
        plot_rows([Row(step, "k", "a", float(step)) for step in range(count)], smooth=smooth)


def test_more_modalities_than_colours():
    rows = [Row(step, "k", f"m{i}", 1.0) for i in range(9) for step in range(2)]
    (axes,) = plot_rows(rows).axes
    assert sorted(names_in(axes)) == [f"m{i}" for i in range(9)]
    looks = {(line.get_color(), line.get_linestyle(), str(line._dash_pattern)) for line in axes.get_lines()}
    assert len(looks) == 9


@pytest.mark.parametrize("count", [2, 9])
def test_names_at_the_lines_ends_do_not_overlap(count: int):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = plot_rows([Row(step, "k", f"m{i}", 1.0) for i in range(count) for step in range(2)])
    FigureCanvasAgg(figure).draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text()]
    assert len(boxes) == count
    boxes.sort(key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 + 1 for below, above in pairwise(boxes))
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_many_quantities_make_two_columns():
    figure = plot_rows([Row(0, f"q{i}", "a", 1.0) for i in range(7)])
    width, height = figure.get_size_inches()
    assert len(figure.axes) == 7
    assert 0.5 < width / height < 2


@pytest.mark.parametrize("name", ["$\\frac{$", "_audio", "", "a$b$", "\\alpha"])
def test_names_are_drawn_as_they_are(name: str, tmp_path: Path):
    figure = recorder_of(name).plot(tmp_path / "run.png")
    assert names_in(figure.axes[0]) == [name]
    assert (tmp_path / "run.png").stat().st_size > 0
    figure = plot_rows([Row(0, name, "a", 1.0)], tmp_path / "run.png")
    assert figure.axes[0].get_title(loc="left") == name


@pytest.mark.parametrize("smooth", [0, -1, 1.5])
def test_the_width_of_a_running_mean_is_a_count(smooth: Any):
    with pytest.raises(ValueError, match="`smooth` should be a whole number of at least 1"):
        recorder_of("a").plot(smooth=smooth)


def test_nothing_to_draw():
    with pytest.raises(ValueError, match=r"nothing to draw: asked for everything, recorded \[\]"):
        bo.Recorder().plot()
    with pytest.raises(ValueError, match=r"asked for \['q'\], recorded \['score', 'ratio', 'coefficient'\]"):
        recorded(1).plot(quantities=["q"])


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'balanceopt\[plot\]'"):
        recorded(1).plot()
