"""linear_logits: Eq. 8's split of a linear head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from balanceopt.functional import linear_logits


def example(widths=(4, 3, 1), classes=5, size=6, dtype=torch.float32):
    features = [torch.randn(size, d, dtype=dtype) for d in widths]
    return features, torch.randn(classes, sum(widths), dtype=dtype), torch.randn(classes, dtype=dtype)


@pytest.mark.parametrize("widths", [(4,), (4, 3), (4, 3, 1), (2, 2, 2, 2, 2, 2)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_logits_add_up_to_the_joint_logits(widths, with_bias):
    features, weight, bias = example(widths, dtype=torch.float64)
    bias = bias if with_bias else None
    logits = linear_logits(features, weight, bias)
    assert logits.shape == (len(widths), 6, 5)
    joint = F.linear(torch.cat(features, 1), weight, bias)
    torch.testing.assert_close(logits.sum(0), joint, rtol=1e-12, atol=1e-12)


def test_each_modality_has_its_own_columns_and_a_share_of_the_bias():
    features, weight, bias = example((4, 3))
    logits = linear_logits(features, weight, bias)
    torch.testing.assert_close(logits[0], features[0] @ weight[:, :4].T + bias / 2)
    torch.testing.assert_close(logits[1], features[1] @ weight[:, 4:].T + bias / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_of_the_features_is_kept(dtype):
    features, weight, bias = example()
    logits = linear_logits([z.to(dtype) for z in features], weight, bias)
    assert logits.dtype == dtype


def test_nothing_records_gradients_and_nothing_is_changed():
    features, weight, bias = example()
    weight.requires_grad_()
    before = [z.clone() for z in features]
    assert not linear_logits(features, weight, bias).requires_grad
    assert all(map(torch.equal, features, before))


def test_empty_batch():
    assert linear_logits([torch.ones(0, 4), torch.ones(0, 3)], torch.ones(5, 7)).shape == (2, 0, 5)


def test_widths_that_do_not_add_up():
    with pytest.raises(ValueError, match=r"7 columns of `weight`. Found widths \[4, 4\]"):
        linear_logits([torch.ones(2, 4), torch.ones(2, 4)], torch.ones(5, 7))


def test_no_features():
    with pytest.raises(ValueError, match=r"one tensor per modality. Found none"):
        linear_logits([], torch.ones(5, 7))
