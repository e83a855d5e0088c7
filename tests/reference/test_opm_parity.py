"""OPM against the paper's formulas, written naively: the order of a run, the drop, the rescaling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import balanceopt as bo
from tests.models import Concat, batch, watch
from tests.reference import ogm, opm


def encoded(model, inputs):
    with torch.no_grad():
        return [z.double() for z in model.encode(*inputs)]


def scores_of(model, features, labels):
    """Eq. 6 of each modality alone, sample by sample."""
    weights = model.head.weight.detach().double().split(model.widths, 1)
    bias, m = model.head.bias.detach().double(), len(features)
    return [ogm.score_eq8(z, w, bias, m, labels) for z, w in zip(features, weights, strict=True)]


def expected_input(features, kept, widths, q, rescale):
    """What the head should get, sample by sample."""
    rows = []
    for i in range(len(features[0])):
        row = []
        for m, z in enumerate(features):
            numbers, keep = z[i].tolist(), bool(kept[m][i])
            if rescale == "official":
                row += opm.official_feature(numbers, keep, widths, q)
            else:
                row += opm.feature(numbers, keep)
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("rescale", ["none", "official"])
@pytest.mark.parametrize("modalities", [2, 3])
def test_a_run_is_the_papers(modalities, rescale):
    """q_0 = 0; the features of batch t are dropped with q_t; then q_t+1 comes from the clean features of batch t."""
    model = Concat(modalities, width=[2, 6, 3][:modalities])
    options: dict[str, Any] = {"q_base": 0.4, "lam": 0.7}
    modulator = bo.OPM(watch(model), rescale=rescale, seed=0, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    q, dropped = [0.0] * modalities, 0
    for _ in range(6):
        inputs, labels = batch(12, modalities)
        features, scores = encoded(model, inputs), scores_of(model, encoded(model, inputs), labels)
        seen: list[torch.Tensor] = []
        handle = model.head.register_forward_pre_hook(lambda _, args, to=seen: to.append(args[0].detach()))
        optimizer.zero_grad()
        F.cross_entropy(model(*inputs), labels).backward()
        optimizer.step()
        handle.remove()
        torch.testing.assert_close(modulator.q, torch.tensor(q))
        kept = [(part != 0).any(1) for part in seen[0].split(model.widths, 1)]
        expected = expected_input(features, kept, model.widths, q, rescale)
        torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-5)
        assert all(bool(k.all()) for k, p in zip(kept, q, strict=True) if p == 0)
        dropped += sum(int((~k).sum()) for k in kept)
        q = opm.drop_probabilities(scores, **options)
    assert dropped > 0


def test_a_published_fault_is_not_ours():
    """Scores 20 and 10: a benchmark's loop divides in place and drops the weaker one."""
    ratio = bo.functional.discrepancy_ratio(torch.tensor([20.0, 10.0]))
    q = bo.functional.drop_probability(ratio)
    torch.testing.assert_close(q, torch.tensor(opm.drop_probabilities([20.0, 10.0], 0.5, 0.5)))
    assert q[1] == 0
