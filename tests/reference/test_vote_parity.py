"""The vote of several predictions against its naive form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from balanceopt.functional import vote
from tests.reference import vote as naive


def logits(seed: int, *shape: int) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("voters", [1, 2, 4])
def test_classes(voters):
    x = logits(voters, voters, 6, 5)
    expected = [naive.classes(sample) for sample in x.movedim(0, 1).tolist()]
    torch.testing.assert_close(vote(x).exp(), torch.tensor(expected, dtype=x.dtype))


def test_labels():
    x = logits(0, 3, 6, 4)
    expected = [[naive.label(label) for label in sample] for sample in x.movedim(0, 2).tolist()]
    torch.testing.assert_close(vote(x, answers="labels").sigmoid(), torch.tensor(expected, dtype=x.dtype))


def test_a_sample_has_the_predictions_that_are_present():
    x = logits(1, 3, 4, 5)
    present = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 1]], dtype=torch.bool)
    expected = [naive.classes(x[present[:, i], i].tolist()) for i in range(4)]
    torch.testing.assert_close(vote(x, present).exp(), torch.tensor(expected, dtype=x.dtype))
