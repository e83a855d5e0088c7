"""Engine: the modulation around a base optimizer's step, shared by the wrapper and the hook form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from balanceopt._method import Listener
from balanceopt._options import shown
from balanceopt._sharding import local_part
from balanceopt._torch import holds_compiled_code, uncompiled
from balanceopt._warnings import warn_user
from balanceopt.distributed import sum_over_ranks
from balanceopt.modulation import Hiding, Modulation, Slot, StepContext, UpdateScaling
from balanceopt.monitor import ModalityMonitor, Scores, compiled_before
from balanceopt.optim._checks import (
    check_arguments,
    claim,
    refuse_groups,
    refuse_shared_gradients,
    release,
    steps_others,
    warn_of_known_defects,
)
from balanceopt.optim._health import Health
from balanceopt.optim._state import EPOCH, STEP, State, device_of


class Engine:
    """Take the monitor's scores before a step and let the modulations change gradients or scale the step's update.

    No cycle refers to the engine: it is freed with its wrapper, and the monitor then makes no scores for it.

    Args:
        optimizer: the base optimizer.
        monitor: the source of the scores.
        modulations: the methods, applied in order.
        seed: seed of all randomness; None for `torch.initial_seed()` of the first rank.
        strict: raise after ten steps in a row with non-zero gradients and without usable scores.
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
        self.listeners: list[Listener] = []
        self._owners = Owners(optimizer, monitor)
        self._owners.refresh()
        for modulation in chosen:
            modulation.check(optimizer, monitor)
        warn_of_known_defects(optimizer)
        self._needs_scores = any(modulation.needs_scores for modulation in chosen)
        if len(monitor.modalities) == 1 and self._needs_scores:
            warn_user(
                f"with the single modality {monitor.modalities[0]!r} there is nothing to balance: "
                "every step is the base optimizer's."
            )
        self._state = State(optimizer, monitor, chosen, seed)
        # All checks come before this line and all changes after it, so that an error changes nothing.
        self.accumulator = monitor.scores(needs_entropy=any(m.needs_entropy for m in chosen))
        if not self._needs_scores:
            self.accumulator.remove()  # so that the monitor computes no scores
        claim(self, optimizer, chosen)
        self._state.begin()
        self.removed = False
        self._number, self._seed, _ = self._state.read()  # of the current step
        self._has_own_groups = steps_others(optimizer)
        self._updates = UpdateScaling()
        self._hiding = Hiding()
        self._seen: list[tuple[int, list[int]]] = []
        self._looked = self._looked_for_calls = False
        self._health = Health(monitor, strict=strict)

    @property
    def number(self) -> int:
        """Number of the step that comes next, or runs."""
        return self._state.read()[0]

    # -- around a step -------------------------------------------------------------------------------------------

    @uncompiled()
    def begin(self, closure: Callable[[], Any] | None) -> Callable[[], Any] | None:
        """Begin a step: modulate the gradients; with a closure, return it with modulation after each evaluation.

        The adaptor ends the step by `finish()`, or by `cancel()` after an exception.

        Raises:
            TypeError: if `closure` is no function.
            RuntimeError: after `remove`.
        """
        if closure is not None and not callable(closure):
            raise TypeError(f"`closure` should be a function that returns the loss. Found {shown(closure)}.")
        if self.removed:
            raise _removed(self.optimizer)
        self._hiding.forget()
        self._updates.reset(has_closure=closure is not None)
        self.refresh()
        # Read here, because a step has one number however often its closure runs.
        self._number, self._seed, epoch = self._state.read()
        for modulation in self.modulations:
            modulation.epoch = epoch  # written each step: optimizers may share a modulation
        for listener in self.monitor.hooks.before_step:
            listener(self.optimizer, closure is not None)
        if closure is None:
            self._act()
            return None
        noisy = any(getattr(m, "noise", False) for m in self.modulations)
        if noisy and isinstance(self.optimizer, torch.optim.LBFGS):
            self._health.warn(
                "closure",
                f"{type(self.optimizer).__name__} evaluates its closure several times a step: noise on the gradients "
                "breaks its line search. Use OGM(noise=False).",
            )

        def modulated() -> Any:
            self._hiding.end()
            with torch.enable_grad():
                loss = closure()
            for listener in self.monitor.hooks.after_closure:
                listener(self.optimizer)
            self._updates.restart()
            self._act()
            return loss

        return modulated

    def finish(self) -> None:
        """End a step: scale the base optimizer's update, and put hidden gradients back."""
        self._updates.finish()
        self._hiding.end()
        for listener in self.monitor.hooks.after_step:
            listener(self.optimizer)

    def cancel(self) -> None:
        """End a step that raised: parameters stay as the base optimizer left them, hidden gradients come back."""
        self._updates.reset()
        self._hiding.end()

    # -- state ---------------------------------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Set the current epoch, for windows that count epochs.

        Raises:
            RuntimeError: after `remove`.
        """
        if self.removed:
            raise _removed(self.optimizer)
        for modulation in self.modulations:
            modulation.set_epoch(epoch)
        self._state.write(EPOCH, int(epoch))

    def before_save(self) -> None:
        """Write the methods' states into the param groups, which the optimizer's checkpoint carries."""
        if not self.removed:
            self._state.save()

    def refresh(self) -> None:
        """Update the modality of each parameter, and write the state into new groups, where groups have changed."""
        # Parameters are compared too, because Accelerate puts sharded ones into the same groups.
        seen = [(id(group), [id(p) for p in group["params"]]) for group in self.optimizer.param_groups]
        if seen != self._seen and not self.removed:
            self._owners.refresh()
            self._state.fill()
            self._seen = seen

    def after_load(self) -> None:
        """Restore the state after a load: tags from this optimizer, counters and methods from the checkpoint."""
        if self.removed:
            return
        self._owners.restore_tags()
        self._state.load()
        _, _, epoch = self._state.read()
        for modulation in self.modulations:
            modulation.epoch = epoch
        self._owners.refresh()
        self._seen = []
        self.accumulator.discard()
        self._health.restart()
        if steps_others(self.optimizer) and not self._has_own_groups:
            self._health.warn(
                "parted",
                f"loading gave {type(self.optimizer).__name__} param groups of its own: learning rates set in them no "
                "longer reach the optimizer inside it. Set them in its `.optimizer` too.",
            )

    def remove(self, *, keep_state: bool = False) -> None:
        """Restore the base optimizer and the monitor to their unmodulated form. May be called twice.

        Args:
            keep_state: leave the step counter, the seed, the epoch and the methods' states in the groups.
        """
        if self.removed:
            return
        self.cancel()
        self.accumulator.remove()
        if keep_state:
            self._state.save()
        else:
            self._state.clear()
        release(self.optimizer, self.modulations)
        self.removed = True

    def stats(self) -> dict[str, int]:
        """Return counts of steps modulated, without scores and outside the window, and of irregularities, by name."""
        return self._health.stats()

    # -- parts of a step -----------------------------------------------------------------------------------------

    @uncompiled()
    def _act(self) -> None:
        """Modulate the gradients, count the step."""
        scores = self.accumulator.take() if self._needs_scores else None
        slots, gradients = self._owners.slots()
        if scores is not None and not gradients:
            self._health.warn(
                "stale",
                "scores came, but no parameter of this optimizer has a gradient: nothing was updated. Build the "
                "optimizer after `fully_shard` or a move that replaces parameters.",
            )
        if not gradients or (scores is None and self._is_idle(gradients)):
            return
        balances = len(self.monitor.modalities) > 1
        acting = [
            m
            for m in self.modulations
            if (balances or not m.needs_scores) and not m.removed and m.is_open(self._number)
        ]
        without_need = [m for m in acting if not m.needs_scores]
        if scores is None and len(without_need) < len(acting):
            self._health.without_scores()
        ready = acting if scores is not None else without_need
        if not acting:
            self._health.outside_window()
        elif ready:
            self._modulate(ready, scores, slots)
        self._state.write(STEP, self._number + 1)

    def _modulate(
        self, acting: Sequence[Modulation], scores: Scores | None, slots: dict[str, list[Slot]]
    ) -> None:
        if not self._looked:  # once: a loop treats `.grad` alike in every step
            refuse_shared_gradients(slot for scaled in slots.values() for slot in scaled)
            self._looked = True
        if scores is not None and not self._looked_for_calls:
            self._refuse_compiled(slots)
            self._looked_for_calls = True
        if not any(slots.values()):
            self._health.warn(
                "idle", "no encoder's parameter in this optimizer has a gradient: nothing was modulated."
            )
        counts: dict[str, Tensor] = {}
        names = self.monitor.modalities
        for modulation in acting:
            modulation.modulate(
                StepContext(
                    scores=Scores.zeros(len(names), 0, device_of(self.optimizer))
                    if scores is None
                    else scores,
                    modalities=names,
                    slots=slots,
                    optimizer=self.optimizer,
                    seed=self._seed,
                    number=self._number,
                    report=partial(self._report, modulation),
                    count=partial(_count, counts, modulation),
                    scale_update=self._updates.scale,
                    hide=self._hiding.add,
                    monitor=self.monitor,
                    held=self._owners.held,
                )
            )
        self._hiding.begin()
        self._health.modulated(scores if any(m.needs_scores for m in acting) else None, counts)

    def _refuse_compiled(self, slots: dict[str, list[Slot]]) -> None:
        """Raise where compiled code bypassed the hooks of an encoder, once in a run."""
        if not holds_compiled_code():
            return
        names, uncalled = self.monitor.modalities, self.accumulator.uncalled()
        here = [float(name not in uncalled) for name in names]
        called = torch.tensor(here, dtype=torch.float32, device=device_of(self.optimizer))
        # Of all ranks, since the batches of one may lack a modality, and the sum below takes all ranks.
        for name, calls in zip(names, sum_over_ranks(called, self.monitor.group).tolist(), strict=True):
            if not calls and self._any_nonzero(slot.grad for slot in slots.get(name, ())):
                raise RuntimeError(f"{compiled_before(name)} Until then its modality is not balanced.")

    def _is_idle(self, gradients: Iterable[Tensor]) -> bool:
        """Tell whether a step without scores is no training step, as that by which torch.distributed builds states.

        Such a step has zero gradients and a learning rate of 0. Methods that need no scores look only where one is
        possible, since looking synchronises the device.
        """
        rates = [group.get("lr") for group in self.optimizer.param_groups]
        stands = all(isinstance(rate, (int, float)) and rate == 0 for rate in rates)
        possible = self._needs_scores or self._number == 0 or stands
        return possible and not self._any_nonzero(gradients)

    def _any_nonzero(self, gradients: Iterable[Tensor]) -> bool:
        # A device synchronisation is acceptable, because steps without scores are exceptional. The sum over ranks makes
        # all ranks agree, though a shard may be empty.
        nonzero = torch.zeros((), dtype=torch.float32, device=device_of(self.optimizer))
        for gradient in gradients:
            values = gradient.coalesce().values() if gradient.is_sparse else gradient
            nonzero += (local_part(values) != 0).any().to(nonzero.device)
        return bool(sum_over_ranks(nonzero, self.monitor.group) > 0)

    def _report(self, modulation: Modulation, name: str, values: Tensor) -> None:
        for listener in (*modulation.listeners, *self.listeners):
            listener(self._number, name, self.monitor.modalities, values)


def _removed(optimizer: torch.optim.Optimizer) -> RuntimeError:
    return RuntimeError(
        f"balancing was removed from this {type(optimizer).__name__}. Use the base optimizer, which remove() "
        "returned, or build a new ModulatedOptimizer (or attach) on it."
    )


def _count(counts: dict[str, Tensor], modulation: Modulation, name: str, count: Tensor) -> None:
    """Add a count of an irregularity to the method's and to the step's `counts`; unusable scores count once a step."""
    modulation.count(**{name: count})
    earlier = counts.get(name)
    if earlier is not None:
        count = earlier.logical_or(count) if name == "unusable_scores" else earlier + count
    counts[name] = count


class Owners:
    """Modality by parameter: the tag of the parameter's group, else the encoder that holds the parameter.

    Args:
        optimizer: the base optimizer.
        monitor: the monitor, whose encoders have the modalities' names.

    Attributes:
        held: index of each parameter of the optimizer, by id.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, monitor: ModalityMonitor) -> None:
        self._optimizer = optimizer
        self._monitor = monitor
        self._tags: list[str | None] = []
        self._slots: list[tuple[str | None, Slot]] = []
        self.held: dict[int, int] = {}

    def refresh(self) -> None:
        """Update the modality of each parameter from the groups.

        Raises:
            KeyError: for a tag that is no modality of the monitor.
            NotImplementedError: for groups that can't be modulated.
        """
        groups = self._optimizer.param_groups
        refuse_groups(groups)
        # Tags are stored, because loading a checkpoint without tags removes them from the groups.
        tags = self._tags[: len(groups)]
        self._tags = tags + [group.get("modality") for group in groups[len(tags) :]]
        names = self._monitor.modalities
        modality_of = {id(p): name for name, params in self._monitor.parameters.items() for p in params}
        for group, tag in zip(groups, self._tags, strict=True):
            if tag is not None and tag not in names:
                raise KeyError(
                    f"param groups are tagged with modality {shown(tag)}, the monitor has {list(names)}. "
                    "Give both the same names, and None to parameters of no modality."
                )
            if tag is not None:
                modality_of.update({id(p): tag for p in group["params"]})
        parameters = [p for group in groups for p in group["params"]]
        self._slots = [(modality_of.get(id(p)), Slot(index, p)) for index, p in enumerate(parameters)]
        self.held = {id(p): index for index, p in enumerate(parameters)}

    def restore_tags(self) -> None:
        """Restore this optimizer's tags, or their absence, in groups that a checkpoint changed."""
        tagged = any(tag is not None for tag in self._tags)
        for group, tag in zip(self._optimizer.param_groups, self._tags, strict=False):
            if tagged:
                group["modality"] = tag
            else:
                group.pop("modality", None)

    def slots(self) -> tuple[dict[str, list[Slot]], list[Tensor]]:
        """Return the parameters with a gradient by modality, and all gradients."""
        slots: dict[str, list[Slot]] = {name: [] for name in self._monitor.modalities}
        gradients: list[Tensor] = []
        for modality, slot in self._slots:
            parameter = slot.parameter
            if parameter.grad is None:
                continue
            gradients.append(parameter.grad)
            if modality is not None and parameter.numel() > 0:
                slots[modality].append(slot)
        return slots, gradients
