"""Uni-modal losses over ranks: own heads get the mean gradient, encoders what DDP makes of theirs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import balanceopt as bo
from tests.models import CLASSES, Concat, batch
from tests.parallel import shard_encoders
from tests.ranks import SHARDS, on_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(180)]

RANKS = 2
ROWS = 12
CASES = [
    *((heads, inject, nn.CrossEntropyLoss, 1) for heads in ("own", "shared") for inject in (False, True)),
    *(("own", inject, nn.MSELoss, 1) for inject in (False, True)),
    *(("own", inject, nn.CrossEntropyLoss, 0) for inject in (False, True)),
    ("shared", False, nn.CrossEntropyLoss, 0.3),
]


def made():
    torch.manual_seed(0)
    return Concat().double()


def batches(rows):
    for number in range(4):
        torch.manual_seed(10 + number)
        inputs, labels = batch(ROWS)
        yield [x.double()[rows] for x in inputs], labels[rows]


def train(model, case, rows, accumulate=1):
    """Four batches; a step after every `accumulate` of them."""
    heads, inject, loss, share = case
    # Without a loss module the gradient at the logits tells labels and scale of cross-entropy.
    criterion = loss()
    monitor = watch(model, None if loss is nn.CrossEntropyLoss else criterion)
    objective = bo.UnimodalObjective(monitor, CLASSES, heads=heads, inject=inject, joint=share, seed=0)
    objective.double()
    groups = [{"params": list(model.parameters())}, {"params": list(objective.parameters())}]
    optimizer = torch.optim.SGD([g for g in groups if g["params"]], lr=0.1, momentum=0.9)
    for number, (inputs, labels) in enumerate(batches(rows)):
        last = (number + 1) % accumulate == 0
        if hasattr(model, "require_backward_grad_sync"):
            model.require_backward_grad_sync = last  # as no_sync() does
        target = labels if loss is nn.CrossEntropyLoss else 3 + F.one_hot(labels, CLASSES).double()
        joint = criterion(model(*inputs), target)
        ((joint if inject else joint + objective(target)) / accumulate).backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
    objective.remove()
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    parameters = {**dict(inner.named_parameters()), **dict(objective.named_parameters())}
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in parameters.items()}
    return {name: p.detach().clone() for name, p in whole.items()}


def watch(model, loss=None):
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return bo.ModalityMonitor(model, inner.modalities, head=inner.head, loss=loss)


def in_ddp(rank):
    rows = slice(rank * ROWS // RANKS, (rank + 1) * ROWS // RANKS)
    results = []
    for case in CASES:
        for accumulate in (1, 2):
            torch.manual_seed(50 + rank)
            wrapped = DistributedDataParallel(made())
            results.append(train(wrapped, case, rows, accumulate))
    if not SHARDS:
        return results
    for case in CASES:
        if case[:2] == ("shared", True):
            continue
        sharded = shard_encoders(made())
        results.append(train(sharded, case, rows))
    with pytest.raises(NotImplementedError, match="not supported for a sharded head"):
        bo.UnimodalObjective(watch(sharded), CLASSES, heads="shared", inject=True)
    return results


def test_equals_one_process_on_all_samples(tmp_path):
    ranks = on_ranks(in_ddp, tmp_path)
    expected = []
    for case in CASES:
        for accumulate in (1, 2):
            model = made()
            expected.append(train(model, case, slice(None), accumulate))
    for case in CASES if SHARDS else ():
        if case[:2] != ("shared", True):
            model = made()
            expected.append(train(model, case, slice(None)))
    for first, second, whole in zip(*ranks, expected, strict=True):
        assert first.keys() == whole.keys()
        for name, value in whole.items():
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], value, msg=name, rtol=1e-6, atol=1e-8)


def with_a_modality_that_one_rank_lacks(rank):

    class Partial(Concat):
        def forward(self, *inputs):
            audio, visual = (*inputs, None)[:2]
            z = torch.zeros(len(audio), 4) if visual is None else self.encoders["visual"](visual)
            return self.head(torch.cat([self.encoders["audio"](audio), z], 1))

    torch.manual_seed(0)
    model = DistributedDataParallel(Partial(), find_unused_parameters=True)
    objective = bo.UnimodalObjective(watch(model), CLASSES, seed=0)
    inputs, labels = batch()
    logits = model(*(inputs if rank == 0 else inputs[:1]))
    (F.cross_entropy(logits, labels) + objective(labels)).backward()
    return [p.grad for p in objective.parameters()]


def test_a_modality_that_one_rank_lacks(tmp_path):
    first, second = on_ranks(with_a_modality_that_one_rank_lacks, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(bool(g.any()) for g in first)
