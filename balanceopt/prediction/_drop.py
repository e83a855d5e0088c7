"""Drop masks of a forward, the rescaling of features, and a check that the fusion supports zero features."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from balanceopt._deferred import DeferredCounts, on_host

Rescale = Literal["none", "official"]


@torch.no_grad()
def sample_kept(q: Tensor, samples: int, generator: torch.Generator, present: Tensor | None = None) -> Tensor:
    r"""Draw the modalities that each sample keeps, at least one: \(r^m_i \sim \text{Bernoulli}(1 - q^m)\).

    Args:
        q: `(M,)` drop probabilities.
        samples: number of samples B.
        generator: generator on the device of `q`.
        present: bool `(M, B)`, modalities that each sample has; None for all.

    Returns:
        bool `(M, B)`. A sample that would lose all its modalities keeps the one with the smallest q.

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
    r"""Return the factors on the features after the drop.

    `"official"`: \(1 / (1 - \theta)\) for all modalities, \(\theta = \sum_m d_m q_m / \sum_m d_m\), and 1 where
    \(\theta = 1\); `"none"`: no factors.

    Args:
        q: `(M,)` drop probabilities.
        rescale: `"none"` or `"official"`.
        widths: `(M,)` numbers of features \(d_m\), for `"official"`; None for equal numbers.

    Returns:
        `(M,)` factors, or None for `"none"`.

    Example:
        >>> rescale_factors(torch.tensor([0.5, 0.0]), "official", torch.tensor([1.0, 1.0]))
        tensor([1.3333, 1.3333])

    Reference:
        Published code of Wei et al., TPAMI 2024, for "official".
    """
    if rescale == "none":
        return None
    d = torch.ones_like(q) if widths is None else widths
    theta = ((d * q).sum() / d.sum()).expand_as(q)
    return torch.where(theta < 1, 1 / (1 - theta), 1)


def feature_width(features: Tensor) -> int:
    """Return the number of features: C of a map `(B, C, H, W)`, D of vectors `(B, D)` and tokens `(B, T, D)`."""
    if features.dim() < 2:
        return 1
    return features.shape[1] if features.dim() > 3 else features.shape[-1]


@dataclass(eq=False)
class Drop:
    """Drop of features in one forward, the same when activation checkpointing repeats the forward.

    Attributes:
        modalities: names of the modalities, in the order of `q`.
        generator: function from a device to the mask's generator.
        repeats: rows of each encoder's output for a sample, by modality, from earlier forwards.
        present: bool `(B,)` by modality, samples that have the modality, where given before the forward.
        q: `(M,)` drop probabilities; None in a forward without a drop.
        draw: function from q, the number of samples B, a generator and flags of what is present to the bool `(M, B)`
            of modalities that the samples keep.
        factors: `(M,)` factors on the features; None for no rescaling.
        rows: number of rows of each encoder's output, by modality.
        applied: modalities whose features were changed.
    """

    modalities: Sequence[str]
    generator: Callable[[torch.device], torch.Generator]
    repeats: Mapping[str, int]
    present: Mapping[str, Tensor] = field(default_factory=dict)
    q: Tensor | None = None
    draw: Callable[[Tensor, int, torch.Generator, Tensor | None], Tensor] = sample_kept
    factors: Tensor | None = None
    rows: dict[str, int] = field(default_factory=dict)
    applied: set[str] = field(default_factory=set)
    _mask: Tensor | None = None

    def note(self, name: str, views: Sequence[Tensor], kind: str) -> None:
        """Record the number of rows of the tensors in an encoder's first output, of type `kind`.

        Raises:
            TypeError: if the output holds no tensor of features.
            ValueError: if the tensors' rows can't belong to the same samples.
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
        """Return a modality's features with zeros for dropped samples; `x` itself where nothing is dropped.

        Raises:
            ValueError: if the rows of `x` are not those of the samples.
        """
        if not self.applies_to(name):
            return x
        self.applied.add(name)
        x = x.masked_fill(self._mask_of(name, x).view(-1, *[1] * (x.dim() - 1)), 0)
        if self.factors is None:
            return x
        return x * self.factors[self.modalities.index(name)].to(x.device, x.dtype)

    def applies_to(self, name: str) -> bool:
        """Whether the modality's features may change in this pass, judged without device synchronisation."""
        if self.q is None:
            return False
        host_value = on_host(self.q)
        return (
            self.factors is not None
            or host_value is None
            or bool(host_value[self.modalities.index(name)] > 0)
        )

    def dropped_rows(self, rows: int) -> Tensor | None:
        """Return bool `(rows,)`, rows of the logits with a dropped modality; None where rows do not match samples."""
        samples = 0 if self._mask is None else self._mask.shape[1]
        if self._mask is None or samples == 0 or rows % samples:
            return None
        applied = [self.modalities.index(name) for name in self.applied]
        return self._mask[applied].any(0).repeat_interleave(rows // samples)

    def _mask_of(self, name: str, x: Tensor) -> Tensor:
        """Return the drop mask of the rows of a modality's tensor `x`, bool.

        Raises:
            ValueError: if the rows of `x` are not those of the samples.
        """
        dropped = self._draw(name)[self.modalities.index(name)].to(x.device)
        flags, samples = self.present.get(name), len(dropped)
        if flags is not None and len(x) != samples and len(flags) == samples:
            having = dropped[flags.to(x.device)]  # the encoder ran only on samples with the modality
            if len(x) == len(having) * self.repeats.get(name, 1):
                dropped = having
        repeat = len(x) // len(dropped) if len(dropped) else 1
        if repeat not in (1, self.repeats.get(name, 1)) or repeat * len(dropped) != len(x):
            raise self._misfit(name, x, samples)
        # Rows of one sample, such as frames of a clip, are consecutive.
        return dropped if repeat == 1 else dropped.unsqueeze(1).expand(-1, repeat).reshape(-1)

    def _misfit(self, name: str, x: Tensor, samples: int) -> ValueError:
        return ValueError(
            f"every tensor that the encoder of {name!r} returns should have a row, or the same number of rows, for "
            f"each of the {samples} samples along dimension 0. Found shape {tuple(x.shape)}: let the encoder "
            "return its features alone, samples first. Where it runs on the samples alone that have the modality, tell "
            "which before the forward: monitor.observe(labels, present={modality: bool (B,)})."
        )

    def _draw(self, name: str) -> Tensor:
        """Return the drop mask, bool `(M, B)`, drawn after the output of the first encoder, `name`."""
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
            self._mask = ~self.draw(self.q, samples, self.generator(self.q.device), present)
        return self._mask


class Zeros:
    """Check that the fusion supports zero features: NaN logits would make every weight NaN in a step.

    The first forward that may drop is checked with a device synchronisation; if no sample was dropped, later forwards
    are checked without one.

    Attributes:
        are_taken: whether samples were dropped without NaN in the logits.
    """

    def __init__(self, who: str) -> None:
        """Start with zero features unchecked, for the method `who`."""
        self._who = who
        self.are_taken = False
        self._is_first = True
        self._counts = DeferredCounts(("dropped", "broken"), self._judge)

    def look(self, drop: Drop, features: Iterable[Tensor], logits: Tensor) -> None:
        """Check the logits `(N, C)` of a pass with clean `features`.

        Raises:
            RuntimeError: if logits are NaN in rows with a dropped modality only.
        """
        rows = drop.dropped_rows(len(logits))
        finite = [z.isfinite().all() for z in features]
        if rows is None or not finite:
            return
        clean = torch.stack([one.to(rows.device) for one in finite]).all()
        lost = logits.isnan().any(1).to(rows.device)
        dropped, broken = clean & rows.any(), clean & (lost & rows).any() & ~(lost & ~rows).any()
        is_first, self._is_first = self._is_first, False
        self._counts.add(dropped=dropped, broken=broken)
        if is_first:
            self._judge(self._counts.read())

    def _judge(self, counts: dict[str, int]) -> None:
        if counts["broken"]:
            raise RuntimeError(
                f"the logits are NaN in the first forward in which {self._who} dropped features (set them to zero): "
                "the fusion can't take zeros, as where it divides features by their norm (CLIP, SigLIP, cosine heads). "
                f"Use torch.nn.functional.normalize, which adds an eps, or do without {self._who} there."
            )
        self.are_taken = counts["dropped"] > 0
