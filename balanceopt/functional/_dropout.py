"""Modality dropout at fixed rates: which modalities each sample keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from balanceopt._deferred import on_host
from balanceopt._options import check_count, check_generator, check_kind, check_tensor


@torch.no_grad()
def kept_modalities(
    p: Tensor, samples: int, generator: torch.Generator | None = None, present: Tensor | None = None
) -> Tensor:
    r"""Draw the modalities that each sample keeps, each lost independently: \(r^m_i \sim \text{Bernoulli}(1 - p^m)\).

    A sample that would lose all its modalities keeps one of them, each with the same chance.

    Args:
        p: `(M,)` probabilities of losing a modality, in [0, 1].
        samples: number of samples B.
        generator: generator on the device of `p`; None for torch's global one.
        present: bool `(M, B)`, modalities that each sample has; None for all.

    Returns:
        bool `(M, B)`.

    Raises:
        ValueError: if `p` or `present` has another shape or dtype, `samples` is negative, or a probability lies outside
            [0, 1] (checked on the CPU alone, since reading it would synchronise with another device).
        TypeError: if `p` or `present` is not a tensor, or `generator` not a `torch.Generator`.

    Example:
        >>> kept_modalities(torch.tensor([1.0, 0.0]), 3)
        tensor([[False, False, False],
                [ True,  True,  True]])

    Reference:
        Neverova et al., ModDrop: Adaptive Multi-modal Gesture Recognition, TPAMI 2016.
    """
    check_tensor("p", p, "(M,)", dims=(1,), empty=False)
    check_count("samples", samples)
    check_generator(generator)
    values = on_host(p)
    if values is not None and not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"`p` should hold probabilities from 0 to 1. Found {values.tolist()}.")
    here = _present_of(present, len(p), samples, p.device)
    uniform = torch.rand(len(p), samples, generator=generator, dtype=torch.float32, device=p.device)
    rate = p.float().unsqueeze(1)
    kept = uniform >= rate
    lost_all = ~(kept & here).any(0)
    # Of a sample that loses all, u / p is uniform for each modality: the largest is at any of them with equal chance.
    spared = torch.where(here, uniform / rate, -1).argmax(0)
    index = torch.arange(len(p), dtype=torch.int64, device=p.device).unsqueeze(1)
    return kept | (lost_all & (index == spared))


@torch.no_grad()
def kept_but_one(
    modalities: int,
    samples: int,
    generator: torch.Generator | None = None,
    present: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    r"""Draw for each sample one modality to lose, or none, all with the chance \(1 / (n_i + 1)\).

    With \(n_i\) the number of modalities that sample i has. A sample with a single modality keeps it.

    Args:
        modalities: number of modalities M.
        samples: number of samples B.
        generator: generator on `device`; None for torch's global one.
        present: bool `(M, B)`, modalities that each sample has; None for all.
        device: device of the result; None for the CPU.

    Returns:
        bool `(M, B)`, False for a lost modality.

    Raises:
        ValueError: if `present` has another shape or dtype, or a number is negative.
        TypeError: if `present` is not a tensor, `generator` not a `torch.Generator`, or `device` not a `torch.device`.

    Example:
        >>> kept_but_one(2, 100).sum(0).unique()
        tensor([1, 2])

    Reference:
        Ours, the common practice of training on each subset that lacks one modality as often as on all.
    """
    check_count("modalities", modalities, at_least=1)
    check_count("samples", samples)
    check_generator(generator)
    check_kind("`device`", device, (torch.device, type(None)), "a torch.device or None")
    where = torch.device("cpu") if device is None else device
    here = _present_of(present, modalities, samples, where)
    count = here.sum(0)
    uniform = torch.rand(samples, generator=generator, dtype=torch.float32, device=where)
    # 0 for none, else the lost one's place among the sample's modalities; rounding may reach the number itself.
    lost = (uniform * (count + 1)).long().clamp(max=count)
    return ~(here & (here.cumsum(0) == lost) & (count > 1))


def _present_of(present: Tensor | None, modalities: int, samples: int, device: torch.device) -> Tensor:
    """Return `present` as checked flags `(M, B)` on a device, all True for None."""
    if present is None:
        return torch.ones(modalities, samples, dtype=torch.bool, device=device)
    check_tensor("present", present, "(M, B)", dims=(2,), kind="bool")
    if present.shape != (modalities, samples):
        raise ValueError(
            f"`present` should have a flag for each of {modalities} modalities and {samples} samples. "
            f"Found shape {tuple(present.shape)}."
        )
    return present.to(device)
