"""Modality dropout against its naive form, sample by sample, with the same random numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from balanceopt.functional import kept_but_one, kept_modalities
from tests.reference.dropout import equal, independent

SAMPLES = 200


def presence(modalities: int) -> Tensor:
    """Flags of samples that have at least one modality."""
    flags = torch.rand(modalities, SAMPLES, generator=torch.Generator().manual_seed(1)) < 0.7
    flags[0] |= ~flags.any(0)
    return flags


@pytest.mark.parametrize("flags", ["all", "some"])
@pytest.mark.parametrize("p", [[0.5, 0.5], [0.9, 0.6, 0.8], [1.0, 1.0]])
def test_independent_rates(p: list[float], flags: str):
    present = presence(len(p)) if flags == "some" else torch.ones(len(p), SAMPLES, dtype=torch.bool)
    found = kept_modalities(torch.tensor(p), SAMPLES, torch.Generator().manual_seed(0), present)
    drawn = torch.rand(len(p), SAMPLES, generator=torch.Generator().manual_seed(0))
    rates = torch.tensor(p).tolist()
    for i in range(SAMPLES):
        assert found[:, i].tolist() == independent(rates, drawn[:, i].tolist(), present[:, i].tolist())


@pytest.mark.parametrize("flags", ["all", "some"])
@pytest.mark.parametrize("modalities", [1, 2, 3])
def test_equal_chances(modalities: int, flags: str):
    present = presence(modalities) if flags == "some" else None
    found = kept_but_one(modalities, SAMPLES, torch.Generator().manual_seed(0), present)
    drawn = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(0))
    for i in range(SAMPLES):
        here = [True] * modalities if present is None else present[:, i].tolist()
        assert found[:, i].tolist() == equal(float(drawn[i]), here)
