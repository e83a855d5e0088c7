"""Combinations of a joint and a uni-modal loss's gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from balanceopt._options import check_number, check_tensor
from balanceopt.functional._dtypes import narrowed, wide

# Opposite directions leave only the rounding of a difference, which restoring the length would blow up.
_OPPOSITE = 1e-6


@torch.no_grad()
def mixed_gradient(joint: Tensor, unimodal: Tensor | None, share: float = 1.0) -> Tensor:
    r"""Combine a share of the joint loss's gradient with the uni-modal loss's gradient.

    $$h = s \, g_{\text{joint}} + g_{\text{uni}}$$

    At a share of 1 nothing is multiplied; at 0, disentangled gradient learning (DGL), nothing of the joint gradient is
    left, not even NaN.

    Args:
        joint: gradient of the joint loss, of any shape.
        unimodal: gradient of the uni-modal loss, of the same shape; None for none.
        share: share s of the joint gradient, in [0, 1].

    Returns:
        Tensor of the shape and dtype of `joint`.

    Raises:
        ValueError: if the shapes differ, or `share` is outside [0, 1].
        TypeError: if a gradient is not a tensor.

    Example:
        >>> mixed_gradient(torch.tensor([2.0, 4.0]), torch.tensor([1.0, -1.0]), share=0.5)
        tensor([2., 1.])

    Reference:
        Wei et al., Boosting Multimodal Learning via Disentangled Gradient Learning, ICCV 2025 (share 0).
    """
    check_number("share", share, at_least=0, at_most=1)
    _check_pair(joint, joint if unimodal is None else unimodal)
    if unimodal is not None and (joint.is_floating_point() or joint.is_complex()):
        unimodal = unimodal.to(joint.dtype)
    if share == 0:
        return torch.zeros_like(joint) if unimodal is None else unimodal.clone()
    part = joint if share == 1 else share * joint
    return part.clone() if unimodal is None else part + unimodal


@torch.no_grad()
def min_norm_weight(joint_sq: Tensor, unimodal_sq: Tensor, dot: Tensor) -> Tensor:
    r"""Compute the weight of the joint gradient j in the shortest vector between j and the uni-modal gradient u.

    $$a = \min\left(\max\left(\frac{|u|^2 - \langle j, u\rangle}{|j - u|^2}, 0\right), 1\right)$$

    minimises \(|a j + (1 - a) u|\). Equal gradients have a = 1/2.

    Args:
        joint_sq: `(M,)` squared norms of the modalities' joint gradients.
        unimodal_sq: `(M,)` squared norms of their uni-modal gradients.
        dot: `(M,)` inner products of the two.

    Returns:
        `(M,)` in [0, 1].

    Raises:
        ValueError: if the tensors are not real, of the same shape.
        TypeError: if an argument is not a tensor.

    Example:
        >>> min_norm_weight(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 3.0]), torch.tensor([0.0, -1.0]))
        tensor([0.5000, 0.6667])

    Reference:
        Wei, Hu, MMPareto: Boosting Multimodal Learning with Innocent Unimodal Assistance, ICML 2024.
    """
    for name, value in (("joint_sq", joint_sq), ("unimodal_sq", unimodal_sq), ("dot", dot)):
        check_tensor(name, value, "(M,)")
        if value.shape != joint_sq.shape:
            raise ValueError(
                f"`{name}` should have the shape of `joint_sq`, {tuple(joint_sq.shape)}. Found {tuple(value.shape)}."
            )
    j, u, d = wide(joint_sq), wide(unimodal_sq), wide(dot)
    difference = j + u - 2 * d
    weight = torch.where(difference > 0, (u - d) / torch.where(difference > 0, difference, 1), 0.5)
    return narrowed(weight.clamp(0, 1), joint_sq)


@torch.no_grad()
def pareto_gradient(
    joint: Tensor, unimodal: Tensor, gamma: float = 1.5, weight: Tensor | None = None
) -> Tensor:
    r"""Combine a joint and a uni-modal gradient into one that lowers both losses, of the length of gamma times the sum.

    $$h = \gamma \, \max\left(1, \frac{|j + u|}{|h_0|}\right) h_0, \qquad h_0 = 2 a j + 2 (1 - a) u$$

    with a = 1/2 where the gradients agree, \(\langle j, u\rangle > 0\), and else `min_norm_weight`. If either is 0, h
    is \(\gamma (j + u)\); opposite directions, along which nothing lowers both losses, give 0.

    Args:
        joint: gradient j of the joint loss, of any shape.
        unimodal: gradient u of the uni-modal loss, of the same shape.
        gamma: factor on the length, >= 0.
        weight: 0-d weight a in its place; None for the rule's.

    Returns:
        Tensor of the shape and dtype of `joint`.

    Raises:
        ValueError: if the shapes differ, or `gamma` is negative or not finite.
        TypeError: if a gradient is not a tensor.

    Example:
        >>> pareto_gradient(torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0]), gamma=1.0)
        tensor([0.4472, 0.8944])

    Reference:
        Wei, Hu, MMPareto: Boosting Multimodal Learning with Innocent Unimodal Assistance, ICML 2024.
    """
    _check_pair(joint, unimodal)
    check_number("gamma", gamma, at_least=0)
    if weight is not None:
        check_tensor("weight", weight, "()", dims=(0,))
    return combined_gradient(
        joint, unimodal, *pareto_coefficients(*gradient_products([joint], [unimodal]), gamma, weight)
    )


@torch.no_grad()
def pareto_coefficients(
    joint_sq: Tensor, unimodal_sq: Tensor, dot: Tensor, gamma: float, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the factors of joint and uni-modal gradient in `pareto_gradient`, from their products."""
    j, u, d = wide(joint_sq), wide(unimodal_sq), wide(dot)
    a = torch.where(d > 0, 0.5, min_norm_weight(j, u, d)) if weight is None else weight.to(j)
    x, y = 2 * a, 2 * (1 - a)
    total = j + 2 * d + u
    length = x * x * j + 2 * x * y * d + y * y * u
    # Norms that are 0, or too large for their dtype, tell no direction.
    tells = (j > 0) & (u > 0) & torch.isfinite(j + u)
    x, y = torch.where(tells, x, 1), torch.where(tells, y, 1)
    opposite = length <= _OPPOSITE * (j + u)
    factor = (total / torch.where(opposite, 1, length)).clamp(min=1).sqrt()
    factor = gamma * torch.where(tells, torch.where(opposite, 0, factor), 1)
    return factor * x, factor * y


@torch.no_grad()
def gradient_products(joint: Sequence[Tensor], unimodal: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the squared norms and the inner product of two gradients in several tensors, in float32 or wider."""
    pairs = [(_flat(j), _flat(u)) for j, u in zip(joint, unimodal, strict=True)]
    sums = [torch.stack([j @ j, u @ u, j @ u]) for j, u in pairs]
    j_sq, u_sq, dot = torch.stack([value.to(sums[0]) for value in sums]).sum(0).unbind()
    return j_sq, u_sq, dot


@torch.no_grad()
def combined_gradient(joint: Tensor, unimodal: Tensor, of_joint: Tensor, of_unimodal: Tensor) -> Tensor:
    """Return the sum of a joint and a uni-modal gradient times their factors, in the dtype of the joint one."""
    if joint.is_complex():
        return (of_joint * joint + of_unimodal * unimodal).to(joint.dtype)
    return narrowed(of_joint * wide(joint) + of_unimodal * wide(unimodal), joint)


def _flat(gradient: Tensor) -> Tensor:
    real = torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient
    return wide(real).flatten()


def _check_pair(joint: Tensor, unimodal: Tensor) -> None:
    check_tensor("joint", joint, "(...)", kind="any")
    check_tensor("unimodal", unimodal, "(...)", kind="any")
    if unimodal.shape != joint.shape:
        raise ValueError(
            f"`unimodal` should have the shape of `joint`, {tuple(joint.shape)}. Found {tuple(unimodal.shape)}."
        )
