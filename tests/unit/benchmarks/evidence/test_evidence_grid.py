"""What is run when, what is never run twice, and what a killed benchmark leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import accuracy
from benchmarks.evidence.pool import run_all
from benchmarks.evidence.results import Results
from benchmarks.evidence.rows import JOINT
from tests.unit.benchmarks.evidence.conftest import DROPOUT, ENSEMBLE, RECIPE, made_up

ROOT = Path(__file__).parents[4]


def run_out(grid, results):
    """Everything with made-up results; the jobs in their order."""
    order = []
    while jobs := grid.ready(results):
        for job in jobs:
            results.add(job, made_up(job))
        order += jobs
    return order


def test_choices_come_before_what_rests_on_them(grid, tmp_path):
    results = Results(tmp_path / "results.jsonl")
    first = grid.ready(results)
    assert {job.row for job in first} == {JOINT}
    assert {job.options["lr"] for job in first} == {0.03, 0.1}
    assert {job.part for job in first} == {"tune"}
    order = run_out(grid, results)
    assert len({job.key for job in order}) == len(order)
    tests = [job for job in order if job.row == DROPOUT and job.part == "test"]
    joint = grid.chosen("mfeat_3", grid.rows["mfeat_3"][JOINT], results)
    assert all(job.options["lr"] == joint["lr"] for job in tests)
    assert [job.seed for job in tests] == [0, 1]


def test_the_best_candidate_is_chosen(grid, tmp_path):
    results = Results(tmp_path / "results.jsonl")
    for job in grid.ready(results):
        # The larger rate by a hair.
        results.add(job, {"metric": 90 + job.options["lr"], "train_s": 0.0, "all_s": 0.0})
    longer = grid.ready(results)
    assert {job.options["lr"] for job in longer} == {0.1}
    assert {job.options["epochs"] for job in longer} == {1}  # those of 2 were run with the learning rates


def test_what_remains_is_never_told_as_less_than_it_is(grid, tmp_path):
    results = Results(tmp_path / "results.jsonl")
    expected = sum(count for *_, count in grid.remaining(results))
    # Rows may come to the same options, and share their runs.
    assert len(run_out(grid, results)) <= expected
    assert {count for *_, count in grid.remaining(results)} == {0}


def test_rows_of_the_same_options_share_their_runs(grid, tmp_path):
    results = Results(tmp_path / "results.jsonl")
    order = run_out(grid, results)
    rows = grid.rows["mfeat_3"]
    before, vote = (grid.found("mfeat_3", rows[name], results) for name in (RECIPE, f"{RECIPE}, heads vote"))
    assert {seed: run["metric"] for seed, run in vote.items()} == {
        s: r["metric"] + 1 for s, r in before.items()
    }
    assert not any(job.row.endswith("heads vote") for job in order)
    assert len(grid.runs("mfeat_3", results)) == len(order)


def test_an_ensemble_takes_each_encoder_s_own_learning_rate(grid, tmp_path):
    results = Results(tmp_path / "results.jsonl")
    order = run_out(grid, results)
    rows = grid.rows["mfeat_3"]
    best = {m: grid.chosen("mfeat_3", rows[f"{m} alone"], results)["lr"] for m in ("fou", "pix", "mor")}
    assert {pool for job in order if job.row == ENSEMBLE for pool in [job.options["pool"]]} == {
        "logits", "probabilities"
    }  # fmt: skip
    assert all({m: job.options[f"{m}_lr"] for m in best} == best for job in order if job.row == ENSEMBLE)


def test_runs_of_other_settings_do_not_count(grid, tmp_path):
    results = Results(tmp_path / "results.jsonl")
    expected = list(grid.remaining(results))
    for job in grid.ready(results):
        results.add(replace(job, options={**job.options, "lr": 7.0}), made_up(job))
    assert list(grid.remaining(results)) == expected


def test_results_are_read_back(grid, tmp_path):
    results = Results(tmp_path / "results.jsonl")
    run_out(grid, results)
    again = Results(tmp_path / "results.jsonl")
    assert grid.ready(again) == []
    assert list(again) == list(results)


@pytest.mark.parametrize("cut", [1, 30])
def test_a_line_that_was_cut_is_run_again(grid, tmp_path, cut):
    path = tmp_path / "results.jsonl"
    order = run_out(grid, Results(path))
    path.write_bytes(path.read_bytes()[:-cut])
    results = Results(path)
    lost = [] if cut == 1 else [order[-1].key]
    assert [job.key for job in grid.ready(results)] == lost
    run_out(grid, results)
    results.add(order[0], made_up(order[0]))
    kept = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    assert {line["key"] for line in kept} == {job.key for job in order}


def test_no_run_begins_after_the_limit(grid, folder, tmp_path):
    jobs = grid.ready(Results(tmp_path / "results.jsonl"))
    assert list(run_all(jobs, folder, 1, time.monotonic() - 1)) == []


@pytest.mark.slow
def test_two_processes_give_what_one_gives(grid, folder, tmp_path):
    jobs = grid.ready(Results(tmp_path / "results.jsonl"))[:3]
    found = [
        {job.key: result["metric"] for job, result in run_all(jobs, folder, workers, time.monotonic() + 60)}
        for workers in (1, 2)
    ]
    assert len(found[0]) == 3
    assert found[0] == found[1]


def test_a_killed_benchmark_goes_on_where_it_stopped(folder, tmp_path):
    path = tmp_path / "out" / "results.jsonl"
    command = [sys.executable, "-m", "benchmarks.accuracy", "--data", str(folder), "--sets", "mfeat_3"]
    command += ["--rows", DROPOUT, "--seeds", "1", "--jobs", "1", "--out", str(path.parent)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=-3, stderr=-3)
    until = time.monotonic() + 60
    while time.monotonic() < until and not (path.is_file() and path.read_text().count("\n") >= 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    before = Results(path)
    assert len(before) >= 3
    accuracy.main(command[3:])
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    keys = [line["key"] for line in lines]
    assert len(keys) == len(set(keys)) > len(before)
    assert {line["key"] for line in before} <= set(keys)
    assert (path.parent / "evidence.json").is_file()
