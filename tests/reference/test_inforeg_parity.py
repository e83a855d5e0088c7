"""InfoReg against its formulas written naively: the rules, and the gradients of a run over several epochs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import balanceopt as bo
from balanceopt.functional import in_prime_window, linear_logits, regulation_strength
from tests.reference.inforeg import is_open, pulls, strength
from tests.training import backward, batch, grad_of, modulated


@pytest.mark.parametrize("losses", [[0.5, 1.5], [0.2, 0.9, 0.4], [1.0, 0.99]])
def test_the_strength(losses: list[float]):
    found = regulation_strength(torch.tensor(losses, dtype=torch.float64), 0.9)
    torch.testing.assert_close(found, torch.tensor(strength(losses, 0.9), dtype=torch.float64))


@pytest.mark.parametrize("trace", [[1.0], [1.0, 1.5], [1.5, 1.0], [3.0, 1.0, 1.03], [1.0, 1.05]])
def test_the_window(trace: list[float]):
    assert bool(in_prime_window(torch.tensor(trace, dtype=torch.float64), 0.04)) == is_open(trace, 0.04)


@pytest.mark.parametrize("kind", ["modality", "model"])
def test_a_run_is_the_papers(kind: str):
    model, optimizer = modulated(bo.InfoReg(0.9, threshold=-0.05, trace=kind))  # type: ignore[arg-type]
    names = list(model.modalities)
    traces: dict[str, list[float]] = {name: [] for name in names}
    pulled = closed = 0
    for epoch in range(5):
        optimizer.set_epoch(epoch)
        anchors = {n: [p.detach().clone() for p in e.parameters()] for n, e in model.modalities.items()}
        norms: dict[str, list[float]] = {name: [] for name in names}
        for number in range(3):
            given = batch(3 * epoch + number, model)
            optimizer.zero_grad()
            backward(model, given)
            before = {n: [grad_of(p).clone() for p in e.parameters()] for n, e in model.modalities.items()}
            weights = {n: [p.detach().clone() for p in e.parameters()] for n, e in model.modalities.items()}
            with torch.no_grad():
                features = [e.forward(x) for e, x in zip(model.modalities.values(), given[0], strict=True)]
                logits = linear_logits(features, model.head.weight, model.head.bias)
                losses = [float(F.cross_entropy(own, given[1])) for own in logits]
            optimizer.step()
            for name, a in zip(names, strength(losses, 0.9), strict=True):
                norms[name].append(sum(float(g.square().sum()) for g in before[name]))
                past = (
                    traces[name]
                    if kind == "modality"
                    else [sum(row) for row in zip(*traces.values(), strict=True)]
                )
                a = a if is_open(past, -0.05) else 0.0
                closed += not is_open(past, -0.05)
                pulled += a > 0 and number > 0
                expected = pulls(weights[name], anchors[name], a)
                for p, g, pull in zip(
                    model.modalities[name].parameters(), before[name], expected, strict=True
                ):
                    torch.testing.assert_close(grad_of(p), g + pull, rtol=1e-4, atol=1e-6)
        for name in names:
            traces[name].append(sum(norms[name]) / len(norms[name]))
    assert pulled > 0  # there is something to see
    assert closed > 0
