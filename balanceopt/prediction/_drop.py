"""Which samples lose which modality's features in one forward, and how the rest is rescaled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from balanceopt._deferred import DeferredCounts, on_host
from balanceopt._random import generator_for, mixed

Rescale = Literal["none", "official"]

# Streams that are apart from each other, and from the noise of the optimizers that share the seed.
_MASKS, _GATES = 0x4F504D, 0x47415445


def mask_generator(seed: int, forward: int, rank: int, device: torch.device) -> torch.Generator:
    """Return the generator of a forward's masks, a function of seed, forward and rank."""
    return generator_for(mixed(seed, _MASKS), forward, rank, device)


def is_executed(p_exe: float, seed: int, forward: int) -> bool:
    """Whether a forward drops at all, which is so with probability `p_exe`; the same on every rank."""
    return mixed(seed, _GATES, forward) < p_exe * 2**64


@torch.no_grad()
def sample_kept(q: Tensor, samples: int, generator: torch.Generator, present: Tensor | None = None) -> Tensor:
    r"""Draw which modalities each sample keeps: \(r^m_i \sim \text{Bernoulli}(1 - q^m)\), never none of them.

    Args:
        q: `(M,)` drop probabilities.
        samples: B.
        generator: on the device of `q`.
        present: bool `(M, B)`, the modalities that each sample has; None for all.

    Returns:
        bool `(M, B)`. A sample that would lose all that it has keeps the one with the smallest q.

    Example:
        >>> sample_kept(torch.tensor([1.0, 0.0]), 3, torch.Generator())
        tensor([[False, False, False],
                [ True,  True,  True]])

    Reference:
        Wei et al., TPAMI 2024, Section on on-the-fly prediction modulation.
    """
    uniform = torch.rand(len(q), samples, generator=generator, dtype=torch.float32, device=q.device)
    kept = uniform >= q.unsqueeze(1)
    present = torch.ones_like(kept) if present is None else present.to(q.device)
    lost_all = ~(kept & present).any(0)
    least_dropped = torch.where(present, q.unsqueeze(1), torch.inf).argmin(0)
    return kept | (
        lost_all & (torch.arange(len(q), dtype=torch.int64, device=q.device).unsqueeze(1) == least_dropped)
    )


@torch.no_grad()
def rescale_factors(q: Tensor, rescale: Rescale, widths: Tensor | None = None) -> Tensor | None:
    r"""Return what features are multiplied by after the drop.

    `"official"`: \(1 / (1 - \theta)\) for all modalities, \(\theta = \sum_m d_m q_m / \sum_m d_m\), and 1 where
    \(\theta = 1\); `"none"`: nothing.

    Args:
        q: `(M,)` drop probabilities.
        rescale: which of them.
        widths: `(M,)` numbers of features \(d_m\), for `"official"`; None for equal ones.

    Returns:
        `(M,)`, or None for `"none"`.

    Example:
        >>> rescale_factors(torch.tensor([0.5, 0.0]), "official", torch.tensor([1.0, 1.0]))
        tensor([1.3333, 1.3333])

    Reference:
        "official" as in the published code of TPAMI 2024.
    """
    if rescale == "none":
        return None
    d = torch.ones_like(q) if widths is None else widths
    theta = ((d * q).sum() / d.sum()).expand_as(q)
    return torch.where(theta < 1, 1 / (1 - theta), 1)


def feature_width(features: Tensor) -> int:
    """Channels of a map `(B, C, H, W)`, else the last dimension: of vectors `(B, D)` and tokens `(B, T, D)`."""
    if features.dim() < 2:
        return 1
    return features.shape[1] if features.dim() > 3 else features.shape[-1]


@dataclass(eq=False)
class Drop:
    """What is done to the encoders' outputs in one forward, the same when activation checkpointing runs it again.

    Attributes:
        modalities: names, in the order of `q`.
        generator: makes the mask's generator on a device.
        repeats: rows that each modality's encoder returns for a sample, as earlier forwards have shown.
        present: bool `(B,)` by modality, the samples that have it, as far as that is known before the forward.
        q: `(M,)`, None while nothing is dropped.
        factors: `(M,)`, what features are multiplied by; None for nothing.
        rows: by modality, how many rows its encoder returned.
        applied: modalities whose features were changed.
    """

    modalities: Sequence[str]
    generator: Callable[[torch.device], torch.Generator]
    repeats: Mapping[str, int]
    present: Mapping[str, Tensor] = field(default_factory=dict)
    q: Tensor | None = None
    factors: Tensor | None = None
    rows: dict[str, int] = field(default_factory=dict)
    applied: set[str] = field(default_factory=set)
    _mask: Tensor | None = None

    def note(self, name: str, views: Sequence[Tensor], kind: str) -> None:
        """Remember how many rows the tensors of an encoder's first output, a `kind`, have.

        Raises:
            TypeError: if there is no tensor of features in the output.
            ValueError: if its tensors can't have their rows of the same samples.
        """
        if name in self.rows:
            return
        if not views:
            raise TypeError(
                f"the encoder of {name!r} should return a tensor of features (B, ...), or something that holds one. "
                f"Found {kind}."
            )
        rows = self.rows[name] = len(views[0])
        for x in views:
            fewer, more = sorted((len(x), rows))
            states = fewer < more and x.dim() > 1 and x.shape[1] == rows
            if states or (fewer < more and (fewer == 0 or more % fewer)):
                raise self._misfit(name, x, rows // self.repeats.get(name, 1))

    def apply(self, name: str, x: Tensor) -> Tensor:
        """Return a modality's features with those of dropped samples zero; the tensor itself where nothing is done.

        Raises:
            ValueError: if its rows are not those of the samples.
        """
        if not self.applies_to(name):
            return x
        self.applied.add(name)
        x = x.masked_fill(self._mask_of(name, x).view(-1, *[1] * (x.dim() - 1)), 0)
        if self.factors is None:
            return x
        return x * self.factors[self.modalities.index(name)].to(x.device, x.dtype)

    def applies_to(self, name: str) -> bool:
        """Whether the modality's features may change in this pass, as far as the host knows."""
        if self.q is None:
            return False
        host_value = on_host(self.q)
        return (
            self.factors is not None
            or host_value is None
            or bool(host_value[self.modalities.index(name)] > 0)
        )

    def dropped_rows(self, rows: int) -> Tensor | None:
        """bool `(rows,)`, the rows of the logits of which a modality was dropped; None where that is not known."""
        samples = 0 if self._mask is None else self._mask.shape[1]
        if self._mask is None or samples == 0 or rows % samples:
            return None
        applied = [self.modalities.index(name) for name in self.applied]
        return self._mask[applied].any(0).repeat_interleave(rows // samples)

    def _mask_of(self, name: str, x: Tensor) -> Tensor:
        """bool, one for each row of the modality's tensor `x`: what is dropped of it.

        Raises:
            ValueError: if its rows are not those of the samples.
        """
        dropped = self._draw(name)[self.modalities.index(name)].to(x.device)
        flags, samples = self.present.get(name), len(dropped)
        if flags is not None and len(x) != samples and len(flags) == samples:
            having = dropped[flags.to(x.device)]  # its encoder ran on the samples that have the modality
            if len(x) == len(having) * self.repeats.get(name, 1):
                dropped = having
        repeat = len(x) // len(dropped) if len(dropped) else 1
        if repeat not in (1, self.repeats.get(name, 1)) or repeat * len(dropped) != len(x):
            raise self._misfit(name, x, samples)
        # Several rows for a sample stand one after the other: frames of a clip.
        return dropped if repeat == 1 else dropped.unsqueeze(1).expand(-1, repeat).reshape(-1)

    def _misfit(self, name: str, x: Tensor, samples: int) -> ValueError:
        return ValueError(
            f"every tensor that the encoder of {name!r} returns should have a row, or the same number of rows, for "
            f"each of the {samples} samples along dimension 0. Found shape {tuple(x.shape)}: let the encoder "
            "return its features alone, samples first. Where it runs on the samples alone that have the modality, tell "
            "which before the forward: monitor.observe(labels, present={modality: bool (B,)})."
        )

    def _draw(self, name: str) -> Tensor:
        """bool `(M, B)`, what is dropped; drawn when the first encoder, `name`, has returned."""
        if self._mask is None:
            assert self.q is not None
            rows, repeat = self.rows[name], self.repeats.get(name, 1)
            flags = next(iter(self.present.values()), None)
            samples = len(flags) if flags is not None else rows // repeat if rows % repeat == 0 else rows
            present = torch.ones(len(self.q), samples, dtype=torch.bool, device=self.q.device)
            for index, modality in enumerate(self.modalities):
                flags = self.present.get(modality)
                if flags is not None and flags.shape == (samples,):
                    present[index] = flags.to(present)
            self._mask = ~sample_kept(self.q, samples, self.generator(self.q.device), present)
        return self._mask


class Zeros:
    """Whether the fusion takes features that are zero; one that can't would ruin every weight in a step.

    Once in a run, in the first forward that may drop, this waits for the device; if nothing was dropped then, later
    forwards are looked at when their numbers have arrived.

    Attributes:
        are_taken: samples were dropped, and the logits were numbers.
    """

    def __init__(self) -> None:
        """Nothing was dropped yet."""
        self.are_taken = False
        self._counts: DeferredCounts | None = None

    def look(self, drop: Drop, features: Iterable[Tensor], logits: Tensor) -> None:
        """Look at the logits `(N, C)` of a pass and at its clean `features`.

        Raises:
            RuntimeError: if the logits of dropped rows alone are NaN.
        """
        rows = drop.dropped_rows(len(logits))
        finite = [z.isfinite().all() for z in features]
        if rows is None or not finite:
            return
        clean = torch.stack([one.to(rows.device) for one in finite]).all()
        lost = logits.isnan().any(1).to(rows.device)
        dropped, broken = clean & rows.any(), clean & (lost & rows).any() & ~(lost & ~rows).any()
        if self._counts is not None:
            self._counts.add(dropped=dropped, broken=broken)
        else:
            self._counts = DeferredCounts(("dropped", "broken"), self._judge)
            self._counts.add(dropped=dropped, broken=broken)
            self._judge(self._counts.read())

    def _judge(self, counts: dict[str, int]) -> None:
        if counts["broken"]:
            raise RuntimeError(
                "the logits are NaN in the first forward in which OPM dropped features (set them to zero): the fusion "
                "can't take zeros, as where it divides features by their norm (CLIP, SigLIP, cosine heads). Use "
                "torch.nn.functional.normalize, which adds an eps, or do without OPM there."
            )
        self.are_taken = counts["dropped"] > 0
