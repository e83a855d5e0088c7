"""Compiled noise on shards: each rank makes its own part, of the numbers that the whole tensor would get."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from balanceopt._gaussian_compiled import warm_up
from balanceopt._random import scale_and_add_gaussians_
from tests.ranks import on_ranks
from tests.unit.test_gaussian_compiled import ROUNDING

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
]

# Shards begin and end within a block of 512 elements, or at its edge; one is smaller than two blocks.
SHAPES = [(65, 333), (64, 512), (3, 50_001), (4, 300)]
PLACES: dict[str, Any] = {"rows": Shard(0), "columns": Shard(1), "copies": Replicate()}
CASES = [(shape, place) for shape in SHAPES for place in PLACES]


def given(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def noisy(tensor: torch.Tensor, *, compiled: bool) -> torch.Tensor:
    factor, scale = torch.tensor([0.5]), torch.tensor([1.0])
    scale_and_add_gaussians_([tensor], factor, scale, 1, 2, [7], compiled=compiled)
    return tensor


def work(rank: int) -> dict[Any, torch.Tensor]:
    mesh = init_device_mesh("cpu", (2,))
    told = {}
    for shape, place in CASES:
        shards: Any = noisy(distribute_tensor(given(shape), mesh, [PLACES[place]]), compiled=True)
        told[shape, place] = shards.full_tensor()
    return told


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    warm_up([(torch.device("cpu"), torch.float32)])  # so that ranks find the kernels compiled
    return on_ranks(work, Path(tmp_path_factory.mktemp("noise")))


@pytest.mark.parametrize(("shape", "place"), CASES)
def test_shards_get_the_noise_of_the_whole(ranks: list[Any], shape: tuple[int, ...], place: str):
    first, second = (told[shape, place] for told in ranks)
    assert torch.equal(first, second)
    for compiled in (True, False):
        torch.testing.assert_close(first, noisy(given(shape), compiled=compiled), rtol=0, atol=ROUNDING)


def test_the_noise_is_there(ranks: list[Any]):
    added = ranks[0][(65, 333), "rows"] - 0.5 * given((65, 333))
    assert float(added.std()) == pytest.approx(1, abs=0.02)
