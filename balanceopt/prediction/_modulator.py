"""OPM: drop features of the dominant modality, with probabilities from the monitor's scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor

from balanceopt._deferred import on_host
from balanceopt._method import Unit
from balanceopt._options import check_choice, check_kind, check_number, shown
from balanceopt._random import mixed
from balanceopt.distributed import sum_over_ranks
from balanceopt.functional import RatioReduction, discrepancy_ratio, drop_probability
from balanceopt.monitor import ModalityMonitor, Pass, ScoreBuffer, Scores, UnimodalLogits, require_scores
from balanceopt.prediction._drop import Drop, Rescale, feature_width, rescale_factors
from balanceopt.prediction._dropping import FeatureDropping, check_counts

# Number of updates in a row without scores before a warning: two forwards before one backward are usual.
_SILENT_UPDATES = 10
# Mixed into the seed, so that gates, masks and the noise of optimizers with the same seed are independent.
_GATES = 0x47415445
_STAYS = "OPM leaves its drop probabilities as they are"


class OPM(FeatureDropping):
    r"""On-the-fly prediction modulation (OPM): drop the dominant modality's features before the fusion.

    In each training forward a sample loses the features of modality m with probability

    $$q^m = q_{base} (1 + \lambda \tanh(\rho^m - 1)) \text{ if } \rho^m > 1, \text{ else } 0$$

    clipped to [0, 1], where \(\rho\) are the discrepancy ratios of the clean features in the last pass with a backward.
    The weakest modality is never dropped, so that no sample loses all its modalities. The encoder runs, and its output
    is set to zero. Model and loop are unchanged; eval mode and forwards without gradients are no-ops.

    Keep a reference to the OPM: garbage collection of the OPM removes its hooks.

    Args:
        monitor: a `ModalityMonitor` built with a head, which other methods may share.
        q_base: drop probability just above a ratio of 1, in [0, 1].
        lam: growth of the probability with the ratio, >= 0.
        p_exe: share of the batches with a drop, in [0, 1] (0.7 in the published scripts).
        rescale: `"none"`, or `"official"`: all features times \(1 / (1 - \theta)\) with \(\theta\) the mean of q over
            all features.
        ratio: reduction of three or more modalities, `"mean_of_ratios"` or `"ratio_of_means"`.
        start: first training forward or epoch of the window, counted from 0.
        end: last training forward or epoch of the window, inclusive; None for no end.
        unit: unit of the window: `"step"` for training forwards, or `"epoch"`, set by `set_epoch`.
        seed: seed of all randomness, a function of (seed, forward, modality, rank); None for `torch.initial_seed()` of
            the first rank, read now.

    Raises:
        TypeError: if `monitor` is no `ModalityMonitor`.
        ValueError: for an option outside its range, a monitor without a head or with another `OPM`, or an encoder with
            samples along another dimension than 0.

    Example:
        >>> import balanceopt as bo
        >>> model = torch.nn.ModuleDict({m: torch.nn.Linear(2, 3) for m in ("a", "b", "head")})
        >>> monitor = bo.ModalityMonitor(model, {"a": "a", "b": "b"}, head="head")
        >>> with bo.OPM(monitor, q_base=0.4) as modulator:
        ...     print(modulator.q)
        tensor([0., 0.])

    Reference:
        Wei et al., On-the-fly Modulation for Balanced Multimodal Learning, TPAMI 2024, Eq. 8; docs/methods/opm.md.
    """

    def __init__(
        self,
        monitor: ModalityMonitor,
        *,
        q_base: float = 0.5,
        lam: float = 0.5,
        p_exe: float = 1.0,
        rescale: Rescale = "none",
        ratio: RatioReduction = "mean_of_ratios",
        start: int = 0,
        end: int | None = None,
        unit: Unit = "step",
        seed: int | None = None,
    ) -> None:
        check_kind("`monitor`", monitor, ModalityMonitor, "a ModalityMonitor")
        require_scores(monitor, "OPM")
        check_number("q_base", q_base, at_least=0, at_most=1)
        check_number("lam", lam, at_least=0)
        check_number("p_exe", p_exe, at_least=0, at_most=1)
        check_choice("rescale", rescale, get_args(Rescale))
        check_choice("ratio", ratio, get_args(RatioReduction))
        super().__init__(monitor, start=start, end=end, unit=unit, seed=seed)
        self.q_base, self.lam, self.p_exe = q_base, lam, p_exe
        self.rescale: Rescale = rescale
        self.ratio: RatioReduction = ratio
        self._updates = self._silent = 0
        self._q = torch.zeros(len(monitor.modalities), dtype=torch.float32, device="cpu")
        self._pending: Tensor | None = None
        self._widths: dict[str, int] = {}
        self._width_cache: tuple[torch.device, list[int], Tensor] = torch.device("cpu"), [], self._q
        self._scores: ScoreBuffer | None = None
        if len(monitor.modalities) > 1:
            self._scores = monitor.scores(steps=False)

    # -- what the user calls -------------------------------------------------------------------------------------

    @property
    def q(self) -> Tensor:
        """`(M,)` drop probabilities of the latest training forward, in the order of `monitor.modalities`."""
        return self._q.clone()

    def update(self) -> None:
        """Update q from the pending scores before the next training forward; a collective of all ranks."""
        scores = None if self._scores is None else self._scores.take()
        sums = None if scores is None else torch.stack([scores.score, scores.count])
        if self._pending is not None:  # of a checkpoint, which every rank has loaded
            pending = self._pending.to(next(self.monitor.model.parameters()).device)
            pending, self._pending = sum_over_ranks(pending, self.monitor.group), None
            sums = pending if sums is None else pending + sums
        host_value = None if sums is None else on_host(sums)
        if sums is None or (host_value is not None and not host_value[1].any()):
            self._silent += 1
            if self._silent >= _SILENT_UPDATES:
                causes = f"Likely causes: {self.monitor.silence()}."
                self._warn(
                    "silence",
                    f"no scores in {_SILENT_UPDATES} training forwards in a row: {_STAYS}. {causes}",
                )
            return
        self._silent = 0
        self._follow(*sums)

    def stats(self) -> dict[str, int]:
        """Return counts of training forwards, forwards with a drop, updates of q and irregularities, by name."""
        return {"updates": self._updates, "unusable_scores": 0, **super().stats()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state for an exact resume, of plain numbers and tensors.

        Pending scores of the last pass differ between ranks. With several ranks call `update()` on all ranks first, so
        that the state is the same on every rank.
        """
        pending = self._waiting()
        return {
            **super().state_dict(),
            "q": self._q.cpu().clone(),
            "pending": None if pending is None else pending.cpu(),
            "widths": dict(self._widths),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state of a checkpoint, which holds no options. A load that fails changes nothing.

        Raises:
            TypeError, ValueError: if the state has other modalities, or an entry has another type.
            KeyError: if an entry is missing.
        """
        super().load_state_dict(state)
        pending = state["pending"]
        self._q = state["q"].detach().clone()
        self._pending = None if pending is None else pending.detach().clone()
        self._widths = dict(state["widths"])
        self._silent = 0
        if self._scores is not None:
            self._scores.discard()

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise where `load_state_dict` would, before anything changes."""
        super().check_state(state)
        modalities = self.monitor.modalities
        _check_numbers("q", state["q"], (len(modalities),))
        if not bool(((state["q"] >= 0) & (state["q"] <= 1)).all()):
            raise ValueError(f"the state's q should be probabilities. Found {state['q'].tolist()}.")
        if state["pending"] is not None:
            _check_numbers("pending", state["pending"], (2, len(modalities)))
        check_counts("widths", state["widths"])

    def remove(self) -> None:
        """Remove the OPM's hooks; the monitor stays. May be called twice."""
        super().remove()
        if self._scores is not None:
            self._scores.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_scores": None}

    @property
    def _unimodal(self) -> UnimodalLogits:
        assert self.monitor.unimodal is not None  # checked in the constructor
        return self.monitor.unimodal

    # -- in a forward --------------------------------------------------------------------------------------------

    def look(self, name: str, output: Any, current: Pass) -> None:
        """Record the numbers of rows and features of an encoder's output."""
        super().look(name, output, current)
        unknown = self.rescale == "official" and name not in self._widths
        if unknown and self.monitor.features.settled(name, output):
            self._widths[name] = feature_width(self.monitor.features.of(name, output))

    def choose(self, drop: Drop, number: int, acts: bool) -> None:
        """Update q, and set the probabilities and factors of a training forward with a drop."""
        self.update()
        shown_q = self._q if acts else torch.zeros_like(self._q)
        self.report(number, "drop_probability", self.monitor.modalities, shown_q)
        host_value = on_host(self._q)
        nothing = host_value is not None and not host_value.any()
        # The gate of `p_exe`, the same on every rank.
        if acts and not nothing and mixed(self.seed, _GATES, number) < self.p_exe * 2**64:
            device = next(self.monitor.model.parameters()).device
            drop.q = self._q.to(device)
            widths = self._widths_on(device) if self.rescale == "official" else None
            drop.factors = rescale_factors(drop.q, self.rescale, widths)

    def _widths_on(self, device: torch.device) -> Tensor:
        """Return `(M,)` numbers of features: columns of a linear head, else the encoder's features, else 1."""
        columns = self._unimodal.columns
        widths = [
            columns[name].stop - columns[name].start if name in columns else self._widths.get(name, 1)
            for name in self.monitor.modalities
        ]
        if self._width_cache[:2] != (device, widths):  # cached, as a copy to the device synchronises
            self._width_cache = device, widths, torch.tensor(widths, dtype=torch.float32, device=device)
        return self._width_cache[2]

    # -- q follows the scores --------------------------------------------------------------------------------------

    def _waiting(self) -> Tensor | None:
        """Return `(2, M)` summed scores and counts of this rank since the last update of q; None for no scores."""
        sums = None if self._scores is None else self._scores.peek()
        if sums is None:
            return self._pending
        new = torch.stack([sums.score, sums.count])
        return new if self._pending is None else self._pending.to(new.device) + new

    def _follow(self, score: Tensor, count: Tensor) -> None:
        """Set q from the summed scores `(M,)` of `count` `(M,)` samples of all ranks."""
        empty = Scores.zeros(len(score), 2, score.device)
        sums = replace(empty, score=score, count=count)
        usable = sums.usable.any()
        ratio = discrepancy_ratio(sums.mean_score, self.ratio, sums.present)
        q = drop_probability(ratio, self.q_base, self.lam)  # TPAMI Eq. 8
        # The weakest modality is excluded explicitly, because rounding of the ratios could make its q positive.
        weakest = torch.where(sums.present, sums.mean_score, torch.inf).min()
        q = q.masked_fill((sums.mean_score <= weakest) | ~sums.present, 0)
        self._q = torch.where(usable, q, self._q.to(q.device))
        self._updates += 1
        self.count(unusable_scores=~usable & (count > 0).any())
        counts = self._counts.arrived()
        if counts is not None and counts["unusable_scores"]:
            self._warn(
                "scores",
                f"scores are not finite, all zero, or of fewer than two modalities: {_STAYS}. stats() counts such "
                "updates.",
            )
        # Number of the latest forward, because the current forward is counted after the update.
        self.report(max(self.forwards - 1, 0), "ratio", self.monitor.modalities, ratio)


def _check_numbers(entry: str, value: object, shape: tuple[int, ...]) -> None:
    fits = isinstance(value, Tensor) and value.is_floating_point() and value.shape == shape
    if not fits:
        raise ValueError(
            f"the state's {entry} should be a floating tensor of shape {shape}. Found {shown(value)}."
        )
