"""Notice what would go wrong without a word: forwards that are not seen, samples that lose all that they have."""

from __future__ import annotations

from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from balanceopt._warnings import warn_user
from balanceopt.monitor import ModalityMonitor
from balanceopt.prediction._drop import Drop

_BACKWARDS = 10


class BackwardWatch:
    """Count backwards on one encoder's parameter until a first forward is seen.

    Hooks on modules never fire on a model whose compiled code was there before them, and nothing else would tell.
    """

    def __init__(self, monitor: ModalityMonitor) -> None:
        """Begin to count, where an encoder is trained."""
        self._monitor = monitor
        self._backwards = 0
        self._handle: RemovableHandle | None = None
        trained = (
            p for own in monitor.parameters.values() for p in own if p.requires_grad and not is_lazy(p)
        )
        parameter = next(trained, None)
        if parameter is not None:
            self._handle = parameter.register_post_accumulate_grad_hook(self._count)

    def stop(self) -> None:
        """A forward was seen, or nobody needs to know any more."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _count(self, parameter: Tensor) -> None:
        self._backwards += 1
        if self._backwards == _BACKWARDS:
            warn_user(
                f"{_BACKWARDS} backwards without a training forward that OPM saw: nothing is dropped. "
                f"Likely causes: {self._monitor.silence()}."
            )
            self.stop()


class LostSamples:
    """Warn once where a forward dropped a modality and never ran the encoder of a weaker one.

    Whether an encoder will run can't be known before, so the samples that had only the dropped one have lost it.
    """

    def __init__(self) -> None:
        """Nobody was told yet."""
        self._told = False

    def look(self, drop: Drop) -> None:
        """Look at a forward that is over."""
        missing = [name for name in drop.modalities if name not in drop.rows]
        if self._told or drop.present or not missing or not all(drop.applies_to(name) for name in drop.rows):
            return
        self._told = True
        warn_user(
            f"the encoder of {missing[0]!r} was not called in a forward in which features of {list(drop.rows)} were "
            "dropped: samples may have lost all that they had. Say before the forward which samples have which "
            "modality: monitor.observe(labels, present={modality: bool (B,)})."
        )
