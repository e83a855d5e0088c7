"""Noise of shards: each rank makes its own part of the numbers that the whole tensor would get."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from balanceopt.modulation import _noise_compiled
from balanceopt.modulation._noise import scale_and_add_gaussians_
from tests.ranks import on_ranks
from tests.unit.modulation.test_noise_compiled import ROUNDING

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

# Small ones; several chunks, which shards cut; an odd number of elements; fewer rows than ranks.
SHAPES = [(5, 3), (65, 333), (700, 1_024), (3, 500_001), (1, 70_000)]
PLACES: dict[str, Any] = {"rows": Shard(0), "columns": Shard(1), "copies": Replicate()}
CASES = [(shape, place, compiled) for shape in SHAPES for place in PLACES for compiled in (False, True)]


def given(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def noisy(tensor: torch.Tensor, *, compiled: bool) -> torch.Tensor:
    factor, scale = torch.tensor([0.5]), torch.tensor([1.0])
    scale_and_add_gaussians_([tensor], factor, scale, 1, 2, [7], compiled=compiled)
    return tensor


def work(rank: int) -> dict[Any, Any]:
    """Each case's shards put together, and the whole tensor's noise as this rank alone makes it."""
    mesh = init_device_mesh("cpu", (2,))
    told = {}
    # Compiling takes half a minute on each rank, and which numbers a shard gets is decided before the kernel.
    with mock.patch.object(_noise_compiled, "_kernel", return_value=_noise_compiled._scale_and_add):
        for shape, place, compiled in CASES:
            shards: Any = noisy(distribute_tensor(given(shape), mesh, [PLACES[place]]), compiled=compiled)
            told[shape, place, compiled] = shards.full_tensor(), noisy(given(shape), compiled=compiled)
    return told


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return on_ranks(work, Path(tmp_path_factory.mktemp("noise")))


@pytest.mark.parametrize(("shape", "place", "compiled"), CASES)
def test_shards_get_the_noise_of_the_whole(
    ranks: list[Any], shape: tuple[int, ...], place: str, compiled: bool
):
    (first, alone), (second, also_alone) = (told[shape, place, compiled] for told in ranks)
    assert torch.equal(first, second)
    assert torch.equal(alone, also_alone)
    torch.testing.assert_close(first, alone, rtol=0, atol=ROUNDING if compiled else 0)


def test_the_noise_is_there(ranks: list[Any]):
    together, _ = ranks[0][(65, 333), "rows", False]
    added = together - 0.5 * given((65, 333))
    assert float(added.std()) == pytest.approx(1, abs=0.02)
