"""OPM as hooks on the encoders, from the scores that the monitor has anyway."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from balanceopt._deferred import on_host
from balanceopt._warnings import warn_user
from balanceopt.distributed import rank_in, shared_seed
from balanceopt.functional._scores import RatioReduction
from balanceopt.monitor import ModalityMonitor
from balanceopt.monitor._pass import Pass
from balanceopt.monitor._supported import in_backward
from balanceopt.prediction._drop import Drop, Rescale, is_executed, mask_generator, rescale_factors
from balanceopt.prediction._options import Options
from balanceopt.prediction._probability import DropProbabilities
from balanceopt.prediction._watch import BackwardWatch, LostSamples
from balanceopt.prediction._widths import Widths

Listener = Callable[[int, str, tuple[str, ...], Tensor], None]


class OPM:
    r"""On-the-fly prediction modulation (OPM): drop the dominant modality's features before the fusion.

    In each training forward a sample loses the features of modality m with probability

    $$q^m = q_{base} (1 + \lambda \tanh(\rho^m - 1)) \text{ if } \rho^m > 1, \text{ else } 0$$

    clipped to [0, 1], where \(\rho\) are the discrepancy ratios of the clean features in the last pass that backward
    reached. The weakest modality is never dropped, so no sample loses all that it has. The encoder runs; its output is
    set to zero. Neither model nor loop changes, and nothing happens in eval mode or without gradients.

    Args:
        monitor: a `ModalityMonitor` built with a head; others may use it at the same time.
        q_base: probability just above a ratio of 1.
        lam: growth with the ratio, >= 0.
        p_exe: part of the batches in which anything is dropped (0.7 in the published scripts).
        rescale: `"none"`, or `"official"`: all features times \(1 / (1 - \theta)\) with \(\theta\) the mean of q over
            all features.
        warmup: training forwards (epochs, once `set_epoch` was called) before anything is dropped.
        end: the last one in which anything is, inclusive; None for no end.
        ratio: `"mean_of_ratios"` or `"ratio_of_means"`, for three modalities or more.
        seed: of all randomness, a function of (seed, forward, modality, rank); None for `torch.initial_seed()` of the
            first rank, read now.

    Raises:
        TypeError: if `monitor` is no `ModalityMonitor`.
        ValueError: for an option outside its range, a monitor without a head or with another `OPM`, or an encoder whose
            outputs don't have the samples along dimension 0.

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
        warmup: int = 0,
        end: int | None = None,
        ratio: RatioReduction = "mean_of_ratios",
        seed: int | None = None,
    ) -> None:
        if not isinstance(monitor, ModalityMonitor):
            raise TypeError(f"`monitor` should be a ModalityMonitor. Found {type(monitor).__name__}.")
        monitor.expect_scores("OPM")
        _refuse_batch_second(monitor)
        if any(isinstance(getattr(t, "__self__", None), OPM) for t in monitor._transforms):
            raise ValueError("this monitor serves a OPM already. Call its remove() first.")
        self.options = Options(q_base, lam, p_exe, rescale, warmup, end, ratio)
        self.monitor = monitor
        self.listeners: list[Listener] = []
        self._seed = shared_seed(monitor.group, seed)
        self._forwards = self._dropping = 0
        self._epoch: int | None = None
        self._repeats: dict[str, int] = {}
        self._widths = Widths(monitor)
        self._latest: Drop | None = None
        self._lost = LostSamples()
        self._probabilities = DropProbabilities(
            monitor, q_base=q_base, lam=lam, ratio=ratio, report=self._report_ratio
        )
        self._watch: BackwardWatch | None = None
        if len(monitor.modalities) > 1:
            self._watch = BackwardWatch(monitor)
            monitor.add_transform(self._on_output)
        else:
            warn_user(
                f"with the single modality {monitor.modalities[0]!r} there is nothing to balance: nothing is dropped."
            )

    # -- what the user calls -------------------------------------------------------------------------------------

    @property
    def q(self) -> Tensor:
        """`(M,)` the drop probabilities of the latest training forward, in the order of `monitor.modalities`."""
        return self._probabilities.value.clone()

    def update(self) -> None:
        """Bring q up to date now, not at the next training forward. Several ranks have to call it together."""
        self._probabilities.update()

    def set_epoch(self, epoch: int) -> None:
        """Count `warmup` and `end` in epochs from now on."""
        self._epoch = int(epoch)

    def stats(self) -> dict[str, int]:
        """Training forwards seen, those in which something may have been dropped, updates of q, and oddities."""
        return {
            "forwards": self._forwards,
            "dropping": self._dropping,
            "updates": self._probabilities.updates,
            "unusable_scores": self._probabilities.unusable(),
        }

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to go on bit for bit: plain numbers and tensors.

        The last pass's scores are this rank's own. With several ranks call `update()` on all of them first: then one
        rank's state is everyone's.
        """
        waiting = self._probabilities.waiting()
        return {
            "modalities": list(self.monitor.modalities),
            "q": self._probabilities.value.cpu().clone(),
            "pending": None if waiting is None else waiting.cpu(),
            "forwards": self._forwards,
            "seed": self._seed,
            "epoch": self._epoch,
            "repeats": dict(self._repeats),
            "widths": dict(self._widths.seen),
            "layout": self.monitor.layout,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; options are this object's own.

        Raises:
            ValueError: if the state is of other modalities.
        """
        if state["modalities"] != list(self.monitor.modalities):
            raise ValueError(
                f"the state should be of modalities {list(self.monitor.modalities)}. Found {state['modalities']}."
            )
        self._probabilities.load(state["q"], state["pending"])
        self._forwards, self._seed, self._epoch = state["forwards"], state["seed"], state["epoch"]
        self._repeats, self._widths.seen = dict(state["repeats"]), dict(state["widths"])
        self._latest = None
        self.monitor.layout = state["layout"]

    def remove(self) -> None:
        """Drop nothing any more. The monitor stays. May be called twice."""
        self.monitor.drop_transform(self._on_output)
        self._probabilities.close()
        self._latest = None
        if self._watch is not None:
            self._watch.stop()

    def __enter__(self) -> OPM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"OPM({self.options}, seed={self._seed})"

    def __getstate__(self) -> dict[str, Any]:
        # Who listens from outside, and a forward under way, are no part of a model's copy.
        return {**self.__dict__, "listeners": [], "_latest": None}

    # -- in a forward --------------------------------------------------------------------------------------------

    def _on_output(self, name: str, current: Pass, output: Any) -> Any:
        """What goes on into the fusion instead of an encoder's output; the same when the forward is run again."""
        drop: Drop | None = current.notes.get(self)
        if in_backward():
            return output if drop is None else drop.apply(name, output)
        encoder = self.monitor.encoders[name]
        if drop is None:
            drop = self._begin(current, next(encoder.parameters()).device)
            current.notes[self] = drop
        drop.note(name, output, encoder.training)
        if self.options.rescale == "official":
            self._widths.note(name, output)
        return drop.apply(name, output)

    def _begin(self, current: Pass, device: torch.device) -> Drop:
        """A new pass: bring q up to date and choose what to do with it."""
        number = self._forwards
        if self._watch is not None:
            self._watch.stop()
        if self._latest is not None:
            self._lost.look(self._latest)
        self.update()
        self._forwards += 1
        drop = self._latest = Drop(
            modalities=self.monitor.modalities,
            generator=partial(mask_generator, self._seed, number, rank_in(self.monitor.group)),
            repeats=self._repeats,
            present=dict(current.present),
        )
        clock = number if self._epoch is None else self._epoch
        acts = self.options.acts_at(clock)
        self._report(number, acts)
        if acts and is_executed(self.options.p_exe, self._seed, number):
            self._arm(drop, device)
        return drop

    def _arm(self, drop: Drop, device: torch.device) -> None:
        q = self._probabilities.value.to(device)
        known = on_host(q)
        if not self._probabilities.possible or (known is not None and not known.any()):
            return
        self._dropping += 1
        drop.q = q
        widths = self._widths.on(device) if self.options.rescale == "official" else None
        drop.factors = rescale_factors(q, self.options.rescale, widths)

    # -- what is told --------------------------------------------------------------------------------------------

    def _report(self, number: int, acts: bool) -> None:
        q = self._probabilities.value
        self._tell(number, "drop_probability", q if acts else torch.zeros_like(q))

    def _report_ratio(self, quantity: str, values: Tensor) -> None:
        # Of the latest forward; the one under way is counted when q is up to date.
        self._tell(max(self._forwards - 1, 0), quantity, values)

    def _tell(self, number: int, quantity: str, values: Tensor) -> None:
        for listener in self.listeners:
            listener(number, quantity, self.monitor.modalities, values)


def _refuse_batch_second(monitor: ModalityMonitor) -> None:
    for name, encoder in monitor.encoders.items():
        if getattr(encoder, "batch_first", True) is False:
            raise ValueError(
                f"OPM needs the samples along dimension 0 of the encoders' outputs. Found the encoder of {name!r}, a "
                f"{type(encoder).__name__} with batch_first=False: build it with batch_first=True, or put it into a "
                "module that returns (B, ...)."
            )
