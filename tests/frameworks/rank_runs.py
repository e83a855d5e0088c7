"""What each of two processes does in test_ranks.py; in a module of its own, since they import it anew."""

from __future__ import annotations

import copy
import os
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from tests.frameworks.loops import model_and_batches


def as_launched(rank: int, ranks: int = 2) -> None:
    """The environment that torchrun makes."""
    warnings.simplefilter("ignore")  # the frameworks' own: pytest's filters are not here
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",  # the group is there already
        "TORCHELASTIC_RUN_ID": "test",
    }


class Halves(IterableDataset):
    """This rank's half of each batch."""

    def __init__(self, rank: int) -> None:
        self.rows = slice(4 * rank, 4 * rank + 4)

    def __iter__(self):
        for inputs, labels in model_and_batches()[1]:
            yield [x[self.rows] for x in inputs], labels[self.rows]


def answer(model: torch.nn.Module, balance: Any) -> tuple[dict[str, Tensor], dict[str, int]]:
    return {name: x.detach().clone() for name, x in model.state_dict().items()}, balance.stats()


def lightning(rank: int) -> Any:
    """Fits whose encoders are deep in the LightningModule, or right on it: DDP then calls it twice, nested."""
    as_launched(rank)
    from torch.utils.data import DataLoader

    from tests.frameworks.under_lightning import Direct, Lit, callback, trainer

    answers = []
    for lit in (Lit(), Direct()):
        for options in ({}, {"labels": lambda batch: batch[1]}):
            balance = callback(direct=isinstance(lit, Direct), **options)
            net: Any = getattr(lit, "net", lit)
            before = copy.deepcopy(net.state_dict())
            trainer(balance, strategy="ddp", devices=2).fit(lit, DataLoader(Halves(rank), batch_size=None))
            answers.append(answer(net, balance))
            net.load_state_dict(before)
    return answers


def transformers(rank: int, folder: str) -> Any:
    """The Trainer's own sharding: batches of four samples go to the ranks in turn."""
    as_launched(rank)
    from tests.frameworks.under_transformers import Net, callback, trainer

    model, balance = Net(), callback()
    trainer(folder, model, balance, per_device_train_batch_size=4).train()
    return answer(model, balance)


def accelerate(rank: int) -> Any:
    """The recipe, with a loader that Accelerate does not shard."""
    as_launched(rank)
    from tests.frameworks.test_accelerate import setup, train

    parts = setup()
    train(parts, Halves(rank))
    return answer(parts[0].unwrap_model(parts[1]), parts[-1])


def fabric(rank: int) -> Any:
    """The recipe, with a loader that Fabric does not shard."""
    as_launched(rank)
    from tests.frameworks.test_fabric import setup, train

    parts = setup(strategy="ddp", devices=2)
    train(parts, Halves(rank))
    return answer(parts[1].module, parts[-1])
