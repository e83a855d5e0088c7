"""ModalityDropout: drop features of each modality at a fixed rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from balanceopt._method import Unit
from balanceopt._options import check_kind, check_number, names_of
from balanceopt.functional import kept_but_one, kept_modalities
from balanceopt.monitor import ModalityMonitor
from balanceopt.prediction._drop import Drop
from balanceopt.prediction._dropping import FeatureDropping


class ModalityDropout(FeatureDropping):
    r"""Modality dropout: in training each sample loses each modality's features with a fixed probability.

    The encoder runs, and its output is set to zero. A sample keeps at least one modality: one that would lose all keeps
    one of them, each with the same chance. With `p="equal"` a sample loses one modality or none, each of the
    \(M + 1\) cases with the same chance. No score is needed, and the monitor needs no head. Eval mode and forwards
    without gradients are no-ops. With a head, the very first forward drops nothing, since it shows the monitor which of
    the head's columns hold which modality.

    Keep a reference to the method: garbage collection of it removes its hooks.

    Args:
        monitor: a `ModalityMonitor`, with no other method that drops features.
        p: probability of losing a modality, in [0, 1]; a mapping from modality to its own, 0 for those not named; or
            `"equal"`.
        start: first training forward or epoch of the window, counted from 0.
        end: last training forward or epoch of the window, inclusive; None for no end.
        unit: unit of the window: `"step"` for training forwards, or `"epoch"`, set by `set_epoch`.
        seed: seed of all randomness, a function of (seed, forward, rank); None for `torch.initial_seed()` of the first
            rank, read now.

    Raises:
        TypeError: if `monitor` is no `ModalityMonitor`.
        ValueError: for an option outside its range, a monitor with another method that drops features, or an encoder
            with samples along another dimension than 0.
        KeyError: if `p` names an unknown modality.

    Example:
        >>> import balanceopt as bo
        >>> model = torch.nn.ModuleDict({m: torch.nn.Linear(2, 3) for m in ("a", "b")})
        >>> monitor = bo.ModalityMonitor(model, {"a": "a", "b": "b"})
        >>> ModalityDropout(monitor, p={"a": 0.3}, seed=0)
        ModalityDropout(p={'a': 0.3}, start=0, end=None, unit='step', seed=0)

    Reference:
        Neverova et al., ModDrop: Adaptive Multi-modal Gesture Recognition, TPAMI 2016; docs/methods/dropout.md.
    """

    def __init__(
        self,
        monitor: ModalityMonitor,
        *,
        p: float | Mapping[str, float] | Literal["equal"] = 0.2,
        start: int = 0,
        end: int | None = None,
        unit: Unit = "step",
        seed: int | None = None,
    ) -> None:
        check_kind("`monitor`", monitor, ModalityMonitor, "a ModalityMonitor")
        rates = _rates(p, monitor.modalities)
        super().__init__(monitor, start=start, end=end, unit=unit, seed=seed)
        self.p = dict(p) if isinstance(p, Mapping) else p
        self._drops = any(rates)
        self._q = torch.tensor(rates, dtype=torch.float32, device="cpu")

    def choose(self, drop: Drop, number: int, acts: bool) -> None:
        """Set the fixed rates of a training forward with a drop."""
        shows_layout = number == 0 and self.monitor.unimodal is not None
        acts = acts and not shows_layout and self._drops
        device = next(self.monitor.model.parameters()).device
        if self._q.device != device:  # once, as a copy to the device synchronises
            self._q = self._q.to(device)
        q = self._q if acts else torch.zeros_like(self._q)
        self.report(number, "drop_probability", self.monitor.modalities, q)
        if acts:
            drop.q = q
            drop.draw = _draw_equal if self.p == "equal" else kept_modalities


def _draw_equal(q: Tensor, samples: int, generator: torch.Generator, present: Tensor | None) -> Tensor:
    """Draw what each sample keeps if it loses one modality or none, with equal chance."""
    return kept_but_one(len(q), samples, generator, present, q.device)


def _rates(p: object, modalities: tuple[str, ...]) -> list[float]:
    """Return the checked probability of each modality."""
    if p == "equal":
        return [1 / (len(modalities) + 1)] * len(modalities)
    if not isinstance(p, Mapping):
        if isinstance(p, str):
            raise ValueError(
                f"`p` should be a number, a mapping from modality to one, or 'equal'. Found p = {p!r}."
            )
        check_number("p", p, at_least=0, at_most=1)
        return [float(p)] * len(modalities)  # type: ignore[arg-type]
    unknown = p.keys() - set(modalities)
    if unknown:
        raise KeyError(f"`p` should name modalities of {list(modalities)}. Found {names_of(unknown)}.")
    for name, value in p.items():
        check_number(f"p[{name!r}]", value, at_least=0, at_most=1)
    return [float(p.get(name, 0)) for name in modalities]
