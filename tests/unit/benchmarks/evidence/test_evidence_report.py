"""From runs to tables, pictures and the aim."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import accuracy
from benchmarks.evidence import sets
from benchmarks.evidence.aim import checks, of_classes, recipes
from benchmarks.evidence.report import aim_text, write
from benchmarks.evidence.results import Results
from benchmarks.evidence.rows import JOINT
from benchmarks.evidence.statistics import paired
from benchmarks.evidence.stored import dumps, load
from benchmarks.evidence.summary import summarise
from benchmarks.evidence.tables import (
    differences_table,
    main_table,
    options_text,
    overview,
    p_value,
    put,
    robustness_table,
)
from tests.unit.benchmarks.evidence.conftest import DROPOUT, RECIPE, made_up


@pytest.fixture
def found(grid, tmp_path):
    results = Results(tmp_path / "results.jsonl")
    while jobs := grid.ready(results):
        for job in jobs:
            results.add(job, made_up(job))
    return summarise(grid, results)


def test_rows_are_paired_by_seed(found, grid):
    rows = found.sets["mfeat_3"].rows
    joint, recipe = rows[JOINT], rows[RECIPE]
    differences = np.subtract(recipe.metric, joint.metric)
    assert recipe.difference == paired(differences)
    assert recipe.difference.mean == pytest.approx(differences.mean())
    assert joint.difference is None
    assert recipe.seeds == (0, 1)


def test_a_seed_that_is_missing_is_left_out_of_the_pairs(grid, tmp_path):
    results = Results(tmp_path / "results.jsonl")
    while jobs := [j for j in grid.ready(results) if (j.row, j.part, j.seed) != (DROPOUT, "test", 1)]:
        for job in jobs:
            results.add(job, made_up(job))
    dropout = summarise(grid, results).sets["mfeat_3"].rows[DROPOUT]
    assert dropout.seeds == (0,)
    assert dropout.difference is not None
    assert np.isnan(dropout.difference.t)


def test_recovery_and_the_starved_encoder(found):
    summary = found.sets["mfeat_3"]
    gaps = {
        m: np.mean(summary.rows[f"{m} alone"].probes[m]) - np.mean(summary.rows[JOINT].probes[m])
        for m in summary.modalities
    }
    assert summary.starved == max(gaps, key=lambda m: gaps[m])
    m = summary.starved
    gained = np.mean(summary.rows[RECIPE].probes[m]) - np.mean(summary.rows[JOINT].probes[m])
    assert summary.rows[RECIPE].recovery[m][0] == pytest.approx(gained / gaps[m])


def test_holm_is_over_the_rows_that_compete(found):
    rows = found.sets["mfeat_3"].rows
    competing = [row for row in rows.values() if row.difference and row.kind != "alone"]
    assert all(row.holm >= row.difference.t for row in competing)
    smallest = min(competing, key=lambda row: row.difference.t)
    assert smallest.holm == pytest.approx(min(1, smallest.difference.t * len(competing)))
    assert np.isnan(rows["fou alone"].holm)


def test_the_tables_have_a_line_for_each_row(found):
    of_set = found.sets["mfeat_3"]
    lines = main_table(of_set).splitlines()
    assert names_in(lines) == list(of_set.rows)
    compared = [name for name, row in of_set.rows.items() if name != JOINT and row.kind != "alone"]
    overall = overview(found.sets).splitlines()
    assert [name for name in names_in(overall) if not name.startswith("**")] == compared
    everywhere = differences_table(found.sets).splitlines()
    assert names_in(everywhere) == compared
    assert all(len({line.count("|") for line in table}) == 1 for table in (lines, overall, everywhere))


def names_in(table):
    """First cells of a table, in order."""
    return [line.split("|")[1].strip() for line in table[2:]]


def with_differences(found, differences):
    """Sets whose recipe, and whose dropout, differ from joint training by these."""
    of_set = found.sets["mfeat_3"]
    recovered = dict.fromkeys(of_set.modalities, (0.9, 0.8, 1.0))
    changed = {
        name: replace(of_set.rows[name], difference=paired(values), recovery=recovered)
        for name, values in differences.items()
    }
    rows = {name: row for name, row in of_set.rows.items() if row.kind not in ("control", "method")}
    return {"mfeat_3": replace(of_set, rows={**rows, **changed})}


def test_the_aim_is_met_and_missed_for_the_right_reason(found):
    good = {RECIPE: [1.0, 1.5], DROPOUT: [1.2, 1.1]}
    assert [c.met for c in checks(with_differences(found, good), RECIPE)] == [True] * 4
    for place, change in [
        (0, {RECIPE: [-0.6, -0.7]}),
        (1, {RECIPE: [-0.1, 0.4]}),
        (3, {DROPOUT: [1.2, 1.4]}),
    ]:
        met = [c.met for c in checks(with_differences(found, {**good, **change}), RECIPE)]
        assert not met[place]


def test_recipes_are_ranked_where_they_were_chosen(found):
    rows = found.sets["mfeat_3"].rows
    assert rows[f"{RECIPE}, heads vote"].tuned > rows[RECIPE].tuned
    assert recipes(found.sets) == [f"{RECIPE}, heads vote", RECIPE]
    assert f"recommended: {RECIPE}, heads vote" in aim_text(found.sets)


def test_everything_is_written(found, tmp_path):
    page, numbers = tmp_path / "docs" / "evidence.md", tmp_path / "docs" / "evidence.json"
    page.parent.mkdir()
    page.write_text("# Evidence\n\nBefore.\n")
    for _ in range(2):
        paths = write(found, page, numbers)
    text = page.read_text()
    assert text.startswith("# Evidence\n\nBefore.\n")
    assert text.count("### Numerals in three views") == 1
    assert all(path.stat().st_size > 100 for path in paths)
    content = json.loads(numbers.read_text())
    values = found.sets["mfeat_3"].rows[JOINT].metric
    assert content["sets"]["mfeat_3"]["rows"][JOINT]["metric"] == pytest.approx(values, rel=1e-4)


def test_a_page_is_made_of_the_numbers_alone(found, tmp_path):
    first, again = tmp_path / "page.md", tmp_path / "again.md"
    write(found, first, tmp_path / "page.json")
    again.with_suffix(".json").write_bytes((tmp_path / "page.json").read_bytes())
    accuracy.main(["--from-json", "--page", str(again)])
    assert again.read_text() == first.read_text()
    assert dumps(load(tmp_path / "page.json")) == (tmp_path / "page.json").read_text()


def test_sets_that_were_not_run_keep_their_numbers(found, tmp_path):
    other = replace(found.sets["mfeat_3"], title="Other numerals")
    write(
        replace(found, sets={"mfeat_6": other, "gone": other}), tmp_path / "page.md", tmp_path / "page.json"
    )
    assert "minutes on the clock" in (tmp_path / "page.md").read_text()
    write(found, tmp_path / "page.md", tmp_path / "page.json")
    assert list(load(tmp_path / "page.json").sets) == ["mfeat_3", "mfeat_6"]
    text = (tmp_path / "page.md").read_text()
    assert "### Other numerals" in text
    # Two commands share no clock.
    assert "minutes on the clock" not in text


def test_the_clock_counts_time_in_which_several_run_once(found):
    # Both seeds of all rows ran in [1000, 1001.5] and [1001, 1002.5].
    assert 60 * found.minutes == pytest.approx(2.5)
    assert found.sets["mfeat_3"].cpu_minutes == pytest.approx(1.5 * found.sets["mfeat_3"].runs / 60)


def test_text_between_marks_is_replaced_and_nothing_else(tmp_path):
    page, mark = tmp_path / "page.md", "<!-- x of benchmarks.accuracy -->"
    page.write_text(f"a\n{mark}\nold\n{mark}\nb\n")
    put(page, {"x": "new"})
    assert page.read_text() == f"a\n{mark}\n\nnew\n\n{mark}\nb\n"


def test_another_page_gets_what_it_has_marks_for(found, tmp_path):
    other, mark = tmp_path / "README.md", "<!-- short of benchmarks.accuracy -->"
    other.write_text(f"a\n{mark}\n{mark}\nb\n")
    write(found, tmp_path / "page.md", tmp_path / "page.json", [other])
    text = other.read_text()
    assert text.startswith(f"a\n{mark}\n\n|  | mean of 1 sets |")
    assert text.endswith(f"{mark}\nb\n")
    assert f"| {RECIPE}, heads vote |" in text


def test_the_aim_speaks_of_accuracy_alone(found):
    other = {"other": replace(found.sets["mfeat_3"], metric="R2")}
    assert of_classes({**found.sets, **other}) == found.sets
    assert aim_text(other).startswith("No recipe was run on every set")


def test_a_table_names_its_metric_and_leaves_out_what_was_not_measured(found):
    of_set = found.sets["mfeat_3"]
    rows = {name: replace(row, ece=float("nan")) for name, row in of_set.rows.items()}
    other = replace(of_set, metric="R2", rows=rows)
    assert main_table(other).splitlines()[0].startswith("|  | R2 | difference")
    assert "calibration error" in robustness_table(of_set)
    assert "calibration error" not in robustness_table(other)


def test_cells():
    assert [p_value(p) for p in (0.00001, 0.0123, 0.2)] == ["< 0.001", "0.012", "0.20"]
    assert (
        options_text({"lr": 0.03, "epochs": 25, "amss_scale": "none"})
        == "lr 0.03, epochs 25, amss scale none"
    )


def test_without_files_and_packages_only_what_comes_with_the_demo_is_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sets, "installed", lambda package: False)
    accuracy.main(["--no-run"])
    said = capsys.readouterr().out
    assert "Without av_digits.npz, bokeh_sampledata, mfeat.npz, river, seglearn (files in --data" in said
    assert "only digits, diabetes." in said


def test_unknown_rows_are_told(folder, capsys):
    with pytest.raises(SystemExit):
        accuracy.main(["--data", str(folder), "--sets", "mfeat_3", "--rows", "OGX"])
    assert "`--rows` should be among" in capsys.readouterr().err
