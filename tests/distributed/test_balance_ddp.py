"""bo.balance over ranks: the same weights and decisions on all of them, and a vote that waits for nobody."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset

import balanceopt as bo
from tests.models import CLASSES, Concat
from tests.ranks import on_ranks
from tests.relearning import samples

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(180)]

EPOCHS = 3


def work(rank):
    torch.manual_seed(0)
    inner = Concat()
    model = DistributedDataParallel(inner)
    torch.manual_seed(100 + rank)  # what seed=None reads, on the first rank
    train, val = (
        DataLoader(Subset(part, range(rank, len(part), 2)), batch_size=10)
        for part in (samples(60, seed=1), samples(40, seed=2))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    balance = bo.balance(
        model, inner.modalities, optimizer, CLASSES, train_loader=train, val_loader=val, epochs=EPOCHS
    )
    strengths = []
    for _ in range(EPOCHS):
        model.train()
        for *inputs, labels in train:
            optimizer.zero_grad()
            (F.cross_entropy(model(*inputs), labels) + balance(labels)).backward()
            optimizer.step()
        diagnosis = balance.step()
        strengths.append(None if diagnosis is None else diagnosis.strength)
        model.eval()
        for *inputs, _ in list(val)[: 2 * rank]:  # the first rank predicts nothing
            with torch.no_grad():
                answer = balance.predict(inner(*inputs))
            torch.testing.assert_close(answer.exp().sum(1), torch.ones(len(answer)))
    return strengths, inner.state_dict(), balance.objective.state_dict()


def test_ranks_agree(tmp_path):
    (strengths, weights, heads), (its_strengths, its_weights, its_heads) = on_ranks(work, tmp_path)
    assert strengths == its_strengths
    assert [x is None for x in strengths] == [False] * (EPOCHS - 1) + [True]
    for mine, its in ((weights, its_weights), (heads, its_heads)):
        assert all(torch.equal(mine[name], its[name]) for name in mine)
