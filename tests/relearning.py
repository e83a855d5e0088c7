"""What the tests of re-learning share: data whose first modality shows the class, a model, its scheduler."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import balanceopt as bo
from tests.models import CLASSES, INPUTS, Concat, Multimodal, watch

OPTIONS: dict[str, Any] = {
    "lam": 3.0,
    "normalize": "minmax",
    "forward": None,
    "classes": None,
    "max_samples": 1000,
    "equal_counts": False,
    "gap": "absolute",
    "pool": "auto",
    "n_init": 1,
    "progress": None,
}


def samples(count: int, modalities: int = 2, *, classes: int = CLASSES, seed: int = 0) -> TensorDataset:
    """`(*inputs, labels)`: the first modality shows the class, the others hint at it."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    inputs = [torch.randn(count, n, generator=draw) for n in INPUTS[:modalities]]
    shown = F.one_hot(labels, max(INPUTS))[:, :].float()
    inputs = [x + (4.0 if m == 0 else 1.0) * shown[:, : x.shape[1]] for m, x in enumerate(inputs)]
    return TensorDataset(*inputs, labels)


def loaders(modalities: int = 2, *, shuffle: bool = False, **options: Any) -> tuple[DataLoader, DataLoader]:
    train, val = (samples(count, modalities, seed=s, **options) for count, s in ((60, 1), (40, 2)))
    return DataLoader(train, batch_size=16, shuffle=shuffle), DataLoader(val, batch_size=16)


def scheduled(
    make: Callable[..., Multimodal] = Concat,
    modalities: int = 2,
    *,
    model_options: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Any, Any, Any]:
    """A model, SGD, and a scheduler that fires at once."""
    model = make(modalities, **(model_options or {}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train, val = loaders(modalities)
    settings = {"every": 1, "epochs": 99, "seed": 0, **options}
    return model, optimizer, bo.ReLearnScheduler(optimizer, watch(model), train, val, **settings)


def train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, loader: Any) -> None:
    model.train()
    for *inputs, labels in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(*inputs), labels).backward()
        optimizer.step()


def move_away(model: nn.Module, by: float = 0.5) -> None:
    """As training would."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(by * torch.randn_like(p))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def random_streams() -> tuple[Any, ...]:
    state = np.random.get_state(legacy=True)
    return torch.get_rng_state().tolist(), state[1].tolist(), state[2], random.getstate()  # type: ignore[index]
