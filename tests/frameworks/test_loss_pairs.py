"""Scores of models of public families, under losses of every kind, against a loop over samples."""

from __future__ import annotations

import pytest
import torch

from benchmarks.loss_models import PAIRS
from benchmarks.loss_pairs import compare

pytest.importorskip("transformers")

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")]


@pytest.mark.parametrize("pair", PAIRS, ids=" under ".join)
def test_scores_of_a_pass_are_those_of_a_loop_over_samples(pair):
    torch.manual_seed(0)
    case = PAIRS[pair]()
    result = compare(PAIRS[pair])
    assert (result.scores, result.source) == (case.scores, case.source)
    assert all(0 < score < 1 for score in result.loop.values())
    assert len({round(score, 6) for score in result.loop.values()}) == len(result.loop)
    assert result.difference < 1e-6
