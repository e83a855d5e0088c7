"""run_together: computations side by side give what each gives alone, with one transfer for all."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from balanceopt.functional._together import Ask, run_together, to_host


def halve(start, how="sum"):
    """Ask until the answer is below 1; return the answers."""
    values, seen = torch.tensor(start), []
    while (values >= 1).any():
        values = yield Ask(values, how)
        seen.append(values.tolist())
        values = values / 2
    return seen


@pytest.fixture
def reductions(monkeypatch):
    """Two ranks that hold the same: a sum doubles in place, a maximum changes nothing."""
    sizes = []

    def all_reduce(values, op=dist.ReduceOp.SUM, group=None):
        assert values.is_contiguous()
        sizes.append((op, values.numel(), values.dtype))
        if op == dist.ReduceOp.SUM:
            values.mul_(2)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return sizes


def test_each_gets_its_own_answers(reductions):
    # A sum of two equal ranks doubles, so halving stands still; a maximum lets it fall.
    starts = [[4.0, 8.0], [0.5], [2.0]]
    together = run_together([halve(s, "max") for s in starts], None)
    assert together == [[[4.0, 8.0], [2.0, 4.0], [1.0, 2.0], [0.5, 1.0]], [], [[2.0], [1.0]]]
    alone = [run_together([halve(s, "max")], None)[0] for s in starts]
    assert alone == together


def test_one_transfer_for_all_of_a_kind(reductions):
    def asks(dtype, *hows):
        for how in hows:
            yield Ask(torch.ones(2, 3, dtype=dtype), how)

    run_together(
        [asks(torch.float32, "sum", "max"), asks(torch.float32, "sum"), asks(torch.int64, "sum")], None
    )
    assert reductions == [
        (dist.ReduceOp.SUM, 12, torch.float32),
        (dist.ReduceOp.SUM, 6, torch.int64),
        (dist.ReduceOp.MAX, 6, torch.float32),
    ]


def test_what_was_asked_with_stays_as_it_was(reductions):
    mine = torch.ones(3)

    def steps():
        return (yield Ask(mine, "sum"))

    assert run_together([steps()], None)[0].tolist() == [2, 2, 2]
    assert mine.tolist() == [1, 1, 1]


def test_answers_have_the_shape_that_was_asked_with(reductions):
    def steps(shape):
        answer = yield Ask(torch.zeros(shape), "sum")
        return answer.shape

    shapes = [(), (0,), (2, 0, 3), (2, 3)]
    assert run_together([steps(shape) for shape in shapes], None) == [torch.Size(s) for s in shapes]


def test_an_error_comes_out(reductions):
    def broken():
        yield Ask(torch.ones(1), "sum")
        raise ValueError("it is broken")

    with pytest.raises(ValueError, match="it is broken"):
        run_together([halve([4.0], "max"), broken()], None)


def test_the_host_reads_without_asking_on_a_cpu():
    values = torch.ones(2)

    def steps():
        return (yield from to_host(values))

    assert run_together([steps(), steps()], None)[0] is values
    assert run_together([], None) == []
