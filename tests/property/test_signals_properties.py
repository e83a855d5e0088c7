"""The signals' rules: ranges, invariances, arguments unchanged."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from balanceopt.functional import agreement, effective_rank


@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 2**32), st.floats(1e-6, 1e6))
def test_the_effective_rank_lies_in_its_range_and_has_no_scale(
    rows: int, width: int, seed: int, scale: float
):
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    before = x.clone()
    rank = effective_rank(x)
    assert 1 - 1e-9 <= float(rank) <= min(rows - 1, width) + 1e-9
    torch.testing.assert_close(effective_rank(scale * x + 3), rank, rtol=1e-4, atol=1e-6)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(effective_rank(x[order]), rank)
    assert torch.equal(x, before)


@given(
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(0, 2**32),
    st.sampled_from(["classes", "labels", "numbers"]),
)
def test_the_joint_answer_agrees_with_itself(modalities: int, rows: int, classes: int, seed: int, kind: str):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(modalities, rows, classes, generator=generator, dtype=torch.float64)
    result = agreement(logits, logits[0], kind)  # type: ignore[arg-type]
    assert result.shape == (modalities,)
    if kind != "numbers":
        assert bool(((result >= 0) & (result <= 1)).all())
        assert result[0] == 1
    elif rows > 1:
        assert bool((result.abs() <= 1 + 1e-9).all())
        torch.testing.assert_close(result[0], torch.ones((), dtype=torch.float64))
    flipped = agreement(logits.flip(0), logits[0], kind)  # type: ignore[arg-type]
    torch.testing.assert_close(flipped, result.flip(0), equal_nan=True)
