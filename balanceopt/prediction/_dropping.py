"""FeatureDropping: base of methods that set samples' features of a modality to zero before the fusion."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from balanceopt._method import Unit
from balanceopt._options import check_count, check_entries, check_kind, shown
from balanceopt._random import generator_for, mixed
from balanceopt._warnings import WarnOnce, warn_user
from balanceopt.distributed import rank_in
from balanceopt.monitor import (
    CallWatch,
    ModalityMonitor,
    Pass,
    check_layout,
    enter,
    leave,
    refuse_company,
    samples_first,
    tensors_in,
)
from balanceopt.prediction._base import ForwardMethod, is_feature
from balanceopt.prediction._drop import Drop, Zeros

# Mixed into the seed, so that masks and the noise of optimizers with the same seed are independent.
_MASKS = 0x4F504D


class FeatureDropping(ForwardMethod):
    """Base of methods that drop features: in a training forward some samples lose a modality's features.

    A subclass defines `choose`. The encoder runs, and its output is set to zero; a sample keeps at least one modality.

    Args:
        monitor: a `ModalityMonitor`, with no other method that drops features.
        start: first training forward or epoch of the window, counted from 0.
        end: last training forward or epoch of the window, inclusive; None for no end.
        unit: unit of the window: `"step"` for training forwards, or `"epoch"`, set by `set_epoch`.
        seed: seed of all randomness; None for `torch.initial_seed()` of the first rank, read now.

    Raises:
        TypeError: if `monitor` is no `ModalityMonitor`.
        ValueError: for an option outside its range, a monitor with another such method, or an encoder with samples
            along another dimension than 0.
    """

    def __init__(
        self,
        monitor: ModalityMonitor,
        *,
        start: int = 0,
        end: int | None = None,
        unit: Unit = "step",
        seed: int | None = None,
    ) -> None:
        _check_monitor(monitor, type(self).__name__)
        alone = len(monitor.modalities) == 1
        if alone:  # before any hook, because a warning may be raised as an error
            warn_user(
                f"with the single modality {monitor.modalities[0]!r} there is nothing to balance: nothing is dropped."
            )
        super().__init__(monitor, start=start, end=end, unit=unit, seed=seed)
        self._dropping = 0
        self._repeats: dict[str, int] = {}
        self._latest: Drop | None = None
        self._latest_pass: Pass | None = None
        self._zeros = Zeros(type(self).__name__)
        self._forwards_here = 0
        self._warn = WarnOnce()
        self._watch: CallWatch | None = None
        if alone:
            monitor.hooks.transforms.drop(self._on_output)
        else:
            self._hook()

    @abstractmethod
    def choose(self, drop: Drop, number: int, acts: bool) -> None:
        """Set the probabilities `drop.q` of training forward `number`, if features are dropped in it.

        `acts` is whether the forward lies in the window.
        """

    def stats(self) -> dict[str, int]:
        """Return counts of training forwards, forwards with a drop and irregularities, by name."""
        return {"forwards": self.forwards, "dropping": self._dropping, **super().stats()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state for an exact resume, of plain numbers and tensors."""
        unimodal = self.monitor.unimodal
        return {
            "modalities": list(self.monitor.modalities),
            **super().state_dict(),
            "repeats": self._known_repeats(),
            "layout": None if unimodal is None else unimodal.layout(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state of a checkpoint, which holds no options. A load that fails changes nothing.

        Raises:
            TypeError, ValueError: if the state has other modalities, or an entry has another type.
            KeyError: if an entry is missing.
        """
        super().load_state_dict(state)
        if self.monitor.unimodal is not None and state["layout"] is not None:
            self.monitor.unimodal.load_layout(state["layout"])
        self._repeats = dict(state["repeats"])
        self._latest = None

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise where `load_state_dict` would, before anything changes."""
        super().check_state(state)
        check_entries(f"the state of {type(self).__name__}", state, self.state_dict())
        modalities = list(self.monitor.modalities)
        if state["modalities"] != modalities:
            raise ValueError(
                f"the state should be of modalities {modalities}. Found {shown(state['modalities'])}."
            )
        check_counts("repeats", state["repeats"])
        if state["layout"] is not None:
            check_layout(state["layout"])

    def remove(self) -> None:
        """Remove the method's hooks; the monitor stays. May be called twice."""
        super().remove()
        leave(self)
        self.monitor.hooks.logits.drop(self._on_logits)
        if self._watch is not None:
            self._watch.remove()
        self._latest = self._latest_pass = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy is inert, because hooks exist on the original monitor's model only; the current forward is not copied.
        name = type(self).__name__
        warn_user(
            f"a copy of {name} drops nothing. To balance a copy of the model too, build a monitor and {name} on it, "
            "and give that this one's state_dict()."
        )
        return {**super().__getstate__(), **dict.fromkeys(("_latest", "_latest_pass", "_watch"))}

    # -- in a forward --------------------------------------------------------------------------------------------

    def _hook(self) -> None:
        """Register the hooks, with removal at garbage collection of the method."""
        self._watch = CallWatch(self.monitor, type(self).__name__, "nothing is dropped")
        weakref.finalize(self, self._watch.remove).atexit = False
        enter(self)
        self.monitor.hooks.logits.add(self._on_logits)

    def begin(self, current: Pass, acts: bool) -> Drop:
        """Return the `Drop` of a training forward."""
        if self._forwards_here == 0:
            refuse_company(self, type(self).__name__)
        self._forwards_here += 1
        number = self.number_of(current)
        self._warn_of_lost_samples()
        self._latest_pass = current
        drop = self._latest = Drop(
            modalities=self.monitor.modalities,
            generator=partial(generator_for, mixed(self.seed, _MASKS), number, rank_in(self.monitor.group)),
            repeats=self._known_repeats(),
            present=dict(current.present),
        )
        self.choose(drop, number, acts)
        self._dropping += drop.q is not None
        return drop

    def transform(self, name: str, features: Tensor, current: Pass) -> Tensor:
        """Return the features with zeros for dropped samples."""
        drop: Drop = self.choice_in(current)
        return drop.apply(name, features)

    def look(self, name: str, output: Any, current: Pass) -> None:
        """Record the number of rows of an encoder's output."""
        drop: Drop = self.choice_in(current)
        encoder = self.monitor.encoders[name]
        views = [samples_first(encoder, output, x) for x in tensors_in(output) if is_feature(x)]
        drop.note(name, views, type(output).__name__)

    def _on_logits(self, current: Pass, logits: Tensor) -> None:
        """Check the logits of the first pass with dropped samples."""
        drop: Drop | None = self.choice_in(current)
        if drop is not None and not self._zeros.are_taken:
            self._zeros.look(drop, current.features.values(), logits)

    def _known_repeats(self) -> dict[str, int]:
        """Return the rows of each encoder's output for a sample, from a checkpoint and from earlier passes."""
        return {**self._repeats, **self.monitor.features.repeats}

    def _warn_of_lost_samples(self) -> None:
        """Warn where the last forward dropped a modality and did not run the encoder of another modality.

        Which encoders run is unknown before the forward, so that samples with only the dropped modality lost all.
        """
        drop, earlier = self._latest, self._latest_pass
        if drop is None or earlier is None or earlier.broke_off or drop.present:
            return
        if len(drop.rows) == len(drop.modalities):
            return
        if all(drop.applies_to(name) for name in drop.rows):
            missing = next(name for name in drop.modalities if name not in drop.rows)
            self._warn(
                "lost",
                f"the encoder of {missing!r} was not called in a forward in which features of {list(drop.rows)} were "
                "dropped: samples may have lost all that they had. Say before the forward which samples have which "
                "modality: monitor.observe(labels, present={modality: bool (B,)}).",
            )


def check_counts(entry: str, counts: Any) -> None:
    """Raise for an entry of a state that is no mapping to whole numbers of at least 1."""
    check_kind(f"the state's {entry}", counts, Mapping, "a mapping from modality to numbers")
    for value in counts.values():
        check_count(entry, value, at_least=1)


def _check_monitor(monitor: ModalityMonitor, who: str) -> None:
    check_kind("`monitor`", monitor, ModalityMonitor, "a ModalityMonitor")
    for name, encoder in monitor.encoders.items():
        if getattr(encoder, "batch_first", True) is False:
            raise ValueError(
                f"{who} needs the samples along dimension 0 of the encoders' outputs. Found the encoder of {name!r}, a "
                f"{type(encoder).__name__} with batch_first=False: build it with batch_first=True, or put it into a "
                "module that returns (B, ...)."
            )
    for listener in monitor.hooks.transforms:
        other = getattr(listener, "__self__", None)
        if isinstance(other, FeatureDropping):
            raise ValueError(
                "the features of this monitor are dropped by another method already: "
                f"{type(other).__name__}. Both together could drop all that a sample has. Call its remove() first."
            )
