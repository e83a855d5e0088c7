"""G-Blending against its formula written naively: the rule, and the weights that a run trains with."""

from __future__ import annotations

import pytest
import torch

from balanceopt.functional import blend_weights
from tests.blending import Run
from tests.reference.blending import weights
from tests.training import same_bits

CASES = [
    ([1.6, 1.6, 1.6], [0.6, 1.4, 0.3], [1.6, 1.6, 1.7], [1.0, 1.5, 0.9]),
    ([1.6, 1.6], [0.6, 1.4], [1.6, 1.6], [1.7, 1.5]),  # the first one's validation loss rose
    ([1.6, 1.6], [1.0, 1.4], [1.6, 1.6], [1.001, 1.5]),  # the first one hardly overfits
    ([1.6, 1.6], [1.0, 1.4], [1.6, 1.6], [1.0, 1.4]),  # nobody overfits
    ([1.6], [1.0], [1.6], [1.2]),
    ([0.5, 0.5], [0.4, 0.4], [0.5, 0.6], [0.6, 0.6]),  # nobody gains
]


@pytest.mark.parametrize("floor", [0.001, 0.1, 1])
@pytest.mark.parametrize("losses", CASES)
def test_the_rule(losses: tuple[list[float], ...], floor: float):
    t0, t1, v0, v1 = (torch.tensor(x, dtype=torch.float64) for x in losses)
    expected = torch.tensor(weights(*losses, floor=floor), dtype=torch.float64)
    torch.testing.assert_close(blend_weights(t0, t1, v0, v1, floor=floor), expected)


@pytest.mark.parametrize("inject", [False, True])
def test_a_run_trains_with_the_formulas_weights(inject: bool):
    run, twin = Run(inject=inject), Run(inject=inject)
    before, blends = None, 0
    for epoch in range(6):
        result = run.epoch(epoch)
        twin.train(twin.training(epoch))
        twin.validate(twin.validation())
        losses = twin.probes.take_losses()
        if epoch % 2 == 0:
            if before is not None:
                pairs = [x.tolist() for pair in zip(before, losses, strict=True) for x in pair]
                *parts, joint = weights(*pairs, floor=0.1)
                new = [part / max(joint, 0.1) for part in parts]
                assert result == pytest.approx(dict(zip(("audio", "visual"), new, strict=True)), rel=1e-9)
                assert result is not None
                twin.objective.weight = result
                blends += 1
            before = losses
        else:
            assert result is None
    assert blends == 2
    assert same_bits(run.model, twin.model)
    assert dict(run.objective.weight) != {"audio": 1.0, "visual": 1.0}
