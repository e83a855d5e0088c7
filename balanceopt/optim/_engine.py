"""What happens around a base optimizer's step, written once for the wrapper and for the hook form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from balanceopt._deferred import on_host
from balanceopt._method import Listener
from balanceopt._options import shown
from balanceopt._sharding import local_part
from balanceopt._torch import holds_compiled_code
from balanceopt._warnings import warn_user
from balanceopt.distributed import active_group, sum_over_ranks
from balanceopt.modulation import Modulation, Slot, StepContext
from balanceopt.monitor import ModalityMonitor, Scores, compiled_before
from balanceopt.optim._checks import (
    check_arguments,
    claim,
    refuse_shared_gradients,
    release,
    steps_others,
    warn_of_known_defects,
)
from balanceopt.optim._health import Health
from balanceopt.optim._method_states import MethodStates
from balanceopt.optim._owners import Owners
from balanceopt.optim._state import EPOCH, STEP, Counters, device_of
from balanceopt.optim._update import UpdateScaling


class Engine:
    """Take the monitor's sums before a step, let the modulations change the gradients or scale the step's update.

    Nothing refers back to it: without its wrapper it is gone at once, and the monitor sums no scores for it.

    Args:
        optimizer: the base.
        monitor: where scores come from.
        modulations: applied in order.
        seed: of all randomness; None for `torch.initial_seed()` of the first rank.
        strict: raise after ten steps in a row without a score that can be used, where gradients are not zero.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        monitor: ModalityMonitor,
        modulations: Modulation | Sequence[Modulation],
        *,
        seed: int | None,
        strict: bool,
    ) -> None:
        chosen = check_arguments(optimizer, monitor, modulations, seed, strict)
        self.optimizer = optimizer
        self.monitor = monitor
        self.modulations = chosen
        self.strict = strict
        self.listeners: list[Listener] = []
        self._owners = Owners(optimizer, monitor)
        self._owners.refresh()
        for modulation in chosen:
            modulation.check(optimizer)
        warn_of_known_defects(optimizer)
        if len(monitor.modalities) == 1:
            warn_user(
                f"with the single modality {monitor.modalities[0]!r} there is nothing to balance: "
                "every step is the base optimizer's."
            )
        self._counters = Counters(optimizer, monitor, seed)
        # Nothing was changed until here, and nothing raises or warns from here on.
        self.accumulator = monitor.scores(needs_entropy=any(m.needs_entropy for m in chosen))
        claim(self, optimizer, chosen)
        self._states = MethodStates(optimizer, chosen)
        self._counters.begin()
        self._states.begin()
        self.removed = False
        self._number, self._seed, _ = self._counters.read()  # of the step under way
        self._has_own_groups = steps_others(optimizer)
        self._updates = UpdateScaling()
        self._looked = False
        self._health = Health(monitor, strict=strict)

    # -- around a step -------------------------------------------------------------------------------------------

    def before(self) -> None:
        """Begin a step: modulate the gradients that are there now."""
        self._begin(has_closure=False)
        self._act()

    def wrap(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Begin a step with a closure: the closure with its gradients modulated.

        Raises:
            TypeError: if `closure` is no function.
        """
        if not callable(closure):
            raise TypeError(f"`closure` should be a function that returns the loss. Found {shown(closure)}.")
        self._begin(has_closure=True)
        noisy = any(getattr(m, "noise", False) for m in self.modulations)
        if noisy and isinstance(self.optimizer, torch.optim.LBFGS):
            self._health.warn(
                "closure",
                f"{type(self.optimizer).__name__} evaluates its closure several times a step: noise on the gradients "
                "breaks its line search. Use OGM(noise=False).",
            )

        def modulated() -> Any:
            with torch.enable_grad():
                loss = closure()
            self._updates.restart()
            self._act()
            return loss

        return modulated

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after(self) -> None:
        """End a step: scale the updates that the base optimizer made."""
        self._updates.finish()

    def abandon(self) -> None:
        """End a step that raised an exception: parameters stay as the base optimizer left them."""
        self._updates.abandon()

    def discard(self) -> None:
        """Forget scores whose gradients are thrown away."""
        self.accumulator.discard()

    # -- state ---------------------------------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Tell which epoch it is, for windows that count epochs."""
        self.refuse_removed()
        for modulation in self.modulations:
            modulation.set_epoch(epoch)
        self._counters.write(EPOCH, int(epoch))

    def before_save(self) -> None:
        """Put the methods' own states where the optimizer's checkpoint carries them."""
        if not self.removed:
            self._states.save()

    def refresh(self) -> None:
        """Learn who owns which parameter; give new groups the counters."""
        if self.removed:
            return
        self._owners.refresh()
        self._counters.fill()
        self._states.fill()

    def after_load(self) -> None:
        """Take a checkpoint's state over: tags from this optimizer, counters from the checkpoint."""
        if self.removed:
            return
        self._owners.restore_tags()
        self._counters.load()
        self._states.load()
        for modulation in self.modulations:
            modulation.epoch = self._counters.read()[2]
        self._owners.refresh()
        self.discard()
        self._health.restart()
        if steps_others(self.optimizer) and not self._has_own_groups:
            self._health.warn(
                "parted",
                f"loading gave {type(self.optimizer).__name__} param groups of its own: learning rates set in them no "
                "longer reach the optimizer inside it. Set them in its `.optimizer` too.",
            )

    def remove(self, *, keep_state: bool = False) -> None:
        """Leave the base optimizer and the monitor as they were. May be called twice.

        Args:
            keep_state: leave the step counter, the seed and the epoch in the groups.
        """
        if self.removed:
            return
        self.abandon()
        self.accumulator.remove()
        if keep_state:
            self._states.save()
        else:
            self._counters.clear()
            self._states.clear()
        release(self.optimizer, self.modulations)
        self.removed = True

    def refuse_removed(self) -> None:
        """Raise after `remove`.

        Raises:
            RuntimeError: saying what to do.
        """
        if self.removed:
            raise RuntimeError(
                f"balancing was removed from this {type(self.optimizer).__name__}. Use the base optimizer, which "
                "remove() returned, or build a new ModulatedOptimizer (or attach) on it."
            )

    def stats(self) -> dict[str, int]:
        """Steps modulated, left to the base for want of scores, outside the window; and oddities met."""
        return self._health.stats()

    # -- parts of a step -----------------------------------------------------------------------------------------

    def _begin(self, *, has_closure: bool) -> None:
        self.refuse_removed()
        self._updates.begin(has_closure=has_closure)
        if self._owners.changed():
            self.refresh()
        # However often a closure runs, it is one step with one number.
        self._number, self._seed, epoch = self._counters.read()
        for modulation in self.modulations:
            modulation.epoch = epoch  # one without a state may act in several optimizers

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _act(self) -> None:
        """Modulate the gradients, count the step."""
        sums = self._take()
        slots, gradients = self._owners.slots()
        if sums is not None and not gradients:
            self._health.warn(
                "stale",
                "scores came, but no parameter of this optimizer has a gradient: nothing was updated. Build the "
                "optimizer after `fully_shard` or a move that replaces parameters.",
            )
        if (sums is None and not self._any_nonzero(gradients)) or not gradients:
            return
        balances = len(self.monitor.modalities) > 1
        acting = [m for m in self.modulations if balances and not m.removed and m.is_open(self._number)]
        if not acting:
            self._health.outside_window()
        elif sums is None:
            self._health.without_scores()
        else:
            self._modulate(acting, sums, slots)
        self._counters.write(STEP, self._number + 1)

    def _modulate(self, acting: Sequence[Modulation], sums: Scores, slots: dict[str, list[Slot]]) -> None:
        if not self._looked:  # what a loop does with `.grad` it does in every step
            refuse_shared_gradients(slot for own in slots.values() for slot in own)
            self._refuse_compiled(slots)
            self._looked = True
        self._health.begin(sums)
        if not any(slots.values()):
            self._health.warn(
                "idle", "no encoder's parameter in this optimizer has a gradient: nothing was modulated."
            )
        for modulation in acting:
            modulation.modulate(
                StepContext(
                    scores=sums,
                    modalities=self.monitor.modalities,
                    slots=slots,
                    optimizer=self.optimizer,
                    seed=self._seed,
                    number=self._number,
                    report=partial(self._report, modulation),
                    count=partial(self._count, modulation),
                    scale_update=self._updates.scale,
                    monitor=self.monitor,
                    held=self._owners.held,
                )
            )
        self._health.end()

    def _refuse_compiled(self, slots: dict[str, list[Slot]]) -> None:
        """Raise where compiled code ran in place of the hooks on an encoder."""
        for name in self.accumulator.uncalled():
            if holds_compiled_code() and self._any_nonzero(slot.grad for slot in slots.get(name, ())):
                raise RuntimeError(f"{compiled_before(name)} Until then its modality is not balanced.")

    def _take(self) -> Scores | None:
        """This step's sums, over micro-batches and ranks; None where nobody has any."""
        sums = self.accumulator.take()
        if active_group(self.monitor.group) is None:
            return sums
        if sums is None:
            sums = self.accumulator.empty(device_of(self.optimizer))
        total = sums.over_ranks(self.monitor.group)
        host = on_host(total.count)
        return None if host is not None and not host.any() else total

    def _any_nonzero(self, gradients: Iterable[Tensor]) -> bool:
        # Only on the way of steps without scores, which should not be: here waiting for the device is no matter. Ranks
        # agree, though a shard may be empty.
        found = torch.zeros((), dtype=torch.float32, device=device_of(self.optimizer))
        for gradient in gradients:
            values = gradient.coalesce().values() if gradient.is_sparse else gradient
            found += (local_part(values) != 0).any().to(found.device)
        return bool(sum_over_ranks(found, self.monitor.group) > 0)

    def _count(self, modulation: Modulation, name: str, count: Tensor) -> None:
        modulation.count(**{name: count})
        self._health.count(name, count)

    def _report(self, modulation: Modulation, name: str, values: Tensor) -> None:
        modulation.report(self._number, name, self.monitor.modalities, values)
        for listener in self.listeners:
            listener(self._number, name, self.monitor.modalities, values)
