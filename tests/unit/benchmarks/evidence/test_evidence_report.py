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
from benchmarks.evidence.rows import FIXED_DROPOUT, JOINT, UNIMODAL
from benchmarks.evidence.statistics import paired
from benchmarks.evidence.summary import summarise
from benchmarks.evidence.tables import main_table, options_text, p_value, put, robustness_table
from tests.unit.benchmarks.evidence.conftest import made_up

RECIPE = "recipe: uni-modal losses"


@pytest.fixture
def found(grid, tmp_path):
    results = Results(tmp_path / "results.jsonl")
    while jobs := grid.ready(results):
        for job in jobs:
            results.add(job, made_up(job))
    return summarise(grid, results)


def test_rows_are_paired_by_seed(found, grid):
    rows = found[0].rows
    joint, recipe = rows[JOINT], rows[RECIPE]
    differences = np.subtract(recipe.metric, joint.metric)
    assert recipe.difference == paired(differences)
    assert recipe.difference.mean == pytest.approx(differences.mean())
    assert joint.difference is None
    assert recipe.seeds == (0, 1)


def test_a_seed_that_is_missing_is_left_out_of_the_pairs(grid, tmp_path):
    results = Results(tmp_path / "results.jsonl")
    while jobs := [j for j in grid.ready(results) if (j.row, j.part, j.seed) != (RECIPE, "test", 1)]:
        for job in jobs:
            results.add(job, made_up(job))
    recipe = summarise(grid, results)[0].rows[RECIPE]
    assert recipe.seeds == (0,)
    assert recipe.difference is not None
    assert np.isnan(recipe.difference.t)


def test_recovery_and_the_starved_encoder(found):
    summary = found[0]
    gaps = {
        m: np.mean(summary.rows[f"{m} alone"].probes[m]) - np.mean(summary.rows[JOINT].probes[m])
        for m in summary.modalities
    }
    assert summary.starved == max(gaps, key=lambda m: gaps[m])
    m = summary.starved
    gained = np.mean(summary.rows[RECIPE].probes[m]) - np.mean(summary.rows[JOINT].probes[m])
    assert summary.rows[RECIPE].recovery[m][0] == pytest.approx(gained / gaps[m])


def test_holm_is_over_the_rows_that_compete(found):
    competing = [r for r in found[0].rows.values() if r.difference and r.row.kind != "alone"]
    assert all(row.holm >= row.difference.t for row in competing)
    smallest = min(competing, key=lambda row: row.difference.t)
    assert smallest.holm == pytest.approx(min(1, smallest.difference.t * len(competing)))
    assert np.isnan(found[0].rows["fou alone"].holm)


def test_the_table_has_a_line_for_each_row(found):
    lines = main_table(found[0]).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(found[0].rows)
    assert len({line.count("|") for line in lines}) == 1


def with_differences(found, against):
    """The set with a recipe whose differences are these."""
    row = found.rows[RECIPE]
    made = {name: paired(values) for name, values in against.items()}
    recovered = dict.fromkeys(found.modalities, (0.9, 0.8, 1.0))
    return replace(found, rows={**found.rows, RECIPE: replace(row, against=made, recovery=recovered)})


def test_the_aim_is_met_and_missed_for_the_right_reason(found):
    good = {JOINT: [1.0, 1.5], FIXED_DROPOUT: [0.2, -0.1], UNIMODAL: [0.1, 0.0]}
    assert [c.met for c in checks([with_differences(found[0], good)], RECIPE)] == [True] * 5
    for place, change in [
        (0, {JOINT: [-0.6, -0.7]}),
        (1, {JOINT: [-0.1, 0.4]}),
        (3, {FIXED_DROPOUT: [-0.5, -0.2]}),
    ]:
        met = [c.met for c in checks([with_differences(found[0], {**good, **change})], RECIPE)]
        assert not met[place]


def test_recipes_are_ranked_where_they_were_chosen(found):
    assert recipes(found) == [RECIPE]
    assert aim_text(found).startswith("Recipes, the best on the data for choices first; recommended: recipe")


def test_everything_is_written(found, tmp_path):
    page = tmp_path / "docs" / "evidence.md"
    page.parent.mkdir()
    page.write_text("# Evidence\n\nBefore.\n")
    for _ in range(2):
        paths = write(found, page, tmp_path / "evidence.json")
    text = page.read_text()
    assert text.startswith("# Evidence\n\nBefore.\n")
    assert text.count("### Numerals in three views") == 1
    assert all(path.stat().st_size > 100 for path in paths)
    content = json.loads((tmp_path / "evidence.json").read_text())
    assert content["sets"][0]["rows"][JOINT]["metric"] == found[0].rows[JOINT].metric


def test_text_between_marks_is_replaced_and_nothing_else(tmp_path):
    page, mark = tmp_path / "page.md", "<!-- x of benchmarks.accuracy -->"
    page.write_text(f"a\n{mark}\nold\n{mark}\nb\n")
    put(page, "x", "new")
    assert page.read_text() == f"a\n{mark}\n\nnew\n\n{mark}\nb\n"


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
    assert "Without av_digits.npz, mfeat.npz, river (files in --data" in said
    assert "only digits, diabetes." in said


def test_a_run_of_some_sets_leaves_the_others_in_the_page(found, tmp_path):
    page = tmp_path / "evidence.md"
    mark = "<!-- {} of benchmarks.accuracy -->"
    page.write_text(
        "".join(f"{mark.format(n)}\n{n} before\n{mark.format(n)}\n" for n in ("aim", "probes", "yeast"))
    )
    write(found, page, tmp_path / "evidence.json")
    text = page.read_text()
    assert all(f"{name} before" in text for name in ("aim", "probes", "yeast"))
    assert "### Numerals in three views" in text
    assert not (tmp_path / "images" / "evidence_recovery.png").exists()


def test_the_aim_speaks_of_accuracy_alone(found):
    other = replace(found[0], metric="R2")
    assert of_classes([found[0], other]) == [found[0]]
    assert aim_text([other]).startswith("No recipe was run on every set")


def test_a_table_names_its_metric_and_leaves_out_what_was_not_measured(found):
    rows = {name: replace(row, ece=float("nan")) for name, row in found[0].rows.items()}
    other = replace(found[0], metric="R2", rows=rows)
    assert main_table(other).splitlines()[0].startswith("|  | R2 | difference")
    assert "calibration error" in robustness_table(found[0])
    assert "calibration error" not in robustness_table(other)


def test_unknown_rows_are_told(folder, capsys):
    with pytest.raises(SystemExit):
        accuracy.main(["--data", str(folder), "--sets", "mfeat_3", "--rows", "OGX"])
    assert "`--rows` should be among" in capsys.readouterr().err
