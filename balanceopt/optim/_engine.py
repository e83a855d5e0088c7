"""What happens around a base optimizer's step, written once for the wrapper and for the hook form."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from balanceopt._deferred import DeferredCounts, on_host
from balanceopt.distributed import active_group, shared_seed
from balanceopt.modality import unwrap
from balanceopt.modulation import Modulation, Slot, Step, Undo
from balanceopt.monitor import ModalityMonitor, ModalitySums

Listener = Callable[[int, str, tuple[str, ...], Tensor], None]

# Kept in every param group: the only place that every checkpoint format carries.
STEP, SEED, EPOCH, HELD, WINDOW = (
    f"balanceopt_{name}" for name in ("step", "seed", "epoch", "held_scores", "window")
)
_OWN_KEYS = (STEP, SEED, EPOCH, HELD, WINDOW)
_SILENT_STEPS = 10
_ODDITIES = ("unusable_scores", "nonfinite_gradients")


class Engine:
    """Take the monitor's sums before a step, let the modulations change the gradients, undo afterwards.

    Args:
        optimizer: the base.
        monitor: where scores come from.
        modulations: applied in order.
        seed: of all randomness; None for `torch.initial_seed()` of the first rank.
        strict: raise after ten steps in a row without a score, where gradients are not zero.
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
        chosen = [modulations] if isinstance(modulations, Modulation) else list(modulations)
        _check_arguments(optimizer, monitor, chosen)
        self.optimizer = optimizer
        self.monitor = monitor
        self.modulations = chosen
        self.strict = strict
        self.listeners: list[Listener] = []
        self.accumulator = monitor.accumulator(needs_entropy=any(m.needs_entropy for m in chosen))
        self._undo: list[Undo] = []
        self._counted = False
        self._silent = 0
        self._warned: set[str] = set()
        self._steps = {"modulated": 0, "without_scores": 0, "outside_window": 0}
        self._oddities = DeferredCounts(_ODDITIES, self._warn_of_oddities)
        self._odd: dict[str, Tensor] = {}
        self._owner: dict[int, str] = {}
        self._known_groups: tuple[tuple[int, int], ...] = ()
        self._tags: list[str | None] = [group.get("modality") for group in optimizer.param_groups]
        self._seed = shared_seed(monitor.group) if seed is None else int(seed)
        self.refresh()
        for modulation in chosen:
            modulation.check(optimizer)
        if len(monitor.modalities) == 1:
            warnings.warn(
                f"with the single modality {monitor.modalities[0]!r} there is nothing to balance: "
                "every step is the base optimizer's.",
                stacklevel=3,
            )

    # -- around a step -------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def before(self) -> None:
        """Modulate the gradients that are there now."""
        self.undo()
        if self._groups_changed():
            self.refresh()
        sums = self._take()
        slots, graded = self._slots()
        if not graded:
            return
        if sums is None:
            if self._any_nonzero(graded):
                self._without_scores()
                self._count_step()
            return
        self._silent = 0
        self._modulate(sums, slots)
        self._count_step()

    def after(self) -> None:
        """Put back what was changed only for the step."""
        self.undo()
        self._counted = False

    def undo(self) -> None:
        """Put back what a modulation changed for one step, also after an exception in that step."""
        while self._undo:
            self._undo.pop()()

    def wrap(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure with its gradients modulated."""
        if self._is_line_search() and any(getattr(m, "noise", False) for m in self.modulations):
            self._warn(
                "closure",
                f"{type(self.optimizer).__name__} evaluates its closure several times a step: noise on the gradients "
                "breaks its line search. Use OGM(noise=False).",
            )

        def modulated() -> Any:
            with torch.enable_grad():
                loss = closure()
            self.before()
            return loss

        return modulated

    def discard(self) -> None:
        """Forget scores whose gradients are thrown away."""
        self.accumulator.discard()

    # -- state ---------------------------------------------------------------------------------------------------

    def set_epoch(self, epoch: int) -> None:
        """Count the modulations' windows in epochs from now on."""
        for group in self.optimizer.param_groups:
            group[EPOCH] = int(epoch)

    def refresh(self) -> None:
        """Learn who owns which parameter; give new groups the counters."""
        groups = self.optimizer.param_groups
        refuse_groups(groups)
        self._tags += [group.get("modality") for group in groups[len(self._tags) :]]
        self._owner = self._owners(groups)
        first = groups[0]
        for group in groups:
            group.setdefault(STEP, first.get(STEP, 0))
            group.setdefault(SEED, first.get(SEED, self._seed))
            if EPOCH in first:
                group.setdefault(EPOCH, first[EPOCH])
        self._known_groups = self._shape_of_groups()

    def before_save(self) -> None:
        """Put what is not in the groups yet there."""
        if self.monitor.every > 1:
            held = self.accumulator.held
            for group in self.optimizer.param_groups:
                group[WINDOW] = self.monitor.window
                group[HELD] = torch.empty(0) if held is None else held.flat()

    def after_load(self) -> None:
        """Take a checkpoint's state over: tags from this optimizer, counters from the checkpoint."""
        groups = self.optimizer.param_groups
        for group, tag in zip(groups, self._tags, strict=False):
            if tag is not None or "modality" in group:
                group["modality"] = tag
        if STEP not in groups[0]:
            warnings.warn(
                "the checkpoint holds a bare optimizer's state: it is loaded, and balanceopt's step counter and seed "
                "start anew.",
                stacklevel=4,
            )
        held = groups[0].get(HELD)
        if held is not None:
            device = groups[0]["params"][0].device
            sums = None
            if held.numel():
                sums = ModalitySums.from_flat(held.to(device), len(self.monitor.modalities))
            self.accumulator.held = sums
            self.monitor.window = groups[0][WINDOW]
        self.discard()
        self._silent = 0
        self.refresh()

    def detach(self) -> None:
        """Leave the base optimizer and the monitor as they were."""
        self.undo()
        self.monitor.drop_accumulator(self.accumulator)
        for group in self.optimizer.param_groups:
            for key in _OWN_KEYS:
                group.pop(key, None)

    def stats(self) -> dict[str, int]:
        """Steps modulated, left to the base for want of scores, outside the window; and oddities met."""
        return {**self._steps, **self._oddities.read()}

    # -- parts of a step -----------------------------------------------------------------------------------------

    def _modulate(self, sums: ModalitySums, slots: dict[str, list[Slot]]) -> None:
        group = self.optimizer.param_groups[0]
        clock = group.get(EPOCH, group[STEP])
        acting = [m for m in self.modulations if m.acts_at(clock)] if len(self.monitor.modalities) > 1 else []
        self._steps["modulated" if acting else "outside_window"] += 1
        self._odd.clear()
        step = Step(
            sums=sums,
            modalities=self.monitor.modalities,
            slots=slots,
            optimizer=self.optimizer,
            seed=group[SEED],
            number=group[STEP],
            report=self._report,
            count=self._note,
        )
        for modulation in acting:
            undo = modulation.modulate(step)
            if undo is not None:
                self._undo.append(undo)
        if self._odd:
            zero = torch.zeros((), dtype=torch.int64, device=sums.score.device)
            self._oddities.add(*(self._odd.get(name, zero) for name in _ODDITIES))

    def _take(self) -> ModalitySums | None:
        """This step's sums, over micro-batches and ranks; None where nobody has any."""
        sums = self.accumulator.take()
        if active_group(self.monitor.group) is None:
            return sums
        if sums is None:
            sums = self.monitor.empty_sums(self.optimizer.param_groups[0]["params"][0].device)
        total = sums.over_ranks(self.monitor.group)
        host = on_host(total.count)
        return None if host is not None and not host.any() else total

    def _slots(self) -> tuple[dict[str, list[Slot]], list[Tensor]]:
        """Each modality's parameters with a gradient, and all gradients."""
        slots: dict[str, list[Slot]] = {name: [] for name in self.monitor.modalities}
        graded: list[Tensor] = []
        index = 0
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    graded.append(parameter.grad)
                    owner = self._owner.get(id(parameter))
                    if owner is not None:
                        slots[owner].append(Slot(index, parameter))
                index += 1
        return slots, graded

    def _count_step(self) -> None:
        """Once an optimizer step, however often a closure runs."""
        if not self._counted:
            self._counted = True
            number = self.optimizer.param_groups[0][STEP] + 1
            for group in self.optimizer.param_groups:
                group[STEP] = number

    def _without_scores(self) -> None:
        self._steps["without_scores"] += 1
        self._silent += 1
        why = self.monitor.silence()
        if self.strict and self._silent >= _SILENT_STEPS:
            raise RuntimeError(
                f"no scores in {self._silent} steps in a row: training goes on without balancing. Likely causes: {why}. "
                "Pass strict=False to go on regardless."
            )
        self._warn("silent", f"no scores since the last step: the step was left unmodulated ({why}).")

    def _note(self, name: str, count: Tensor) -> None:
        self._odd[name] = self._odd[name] + count if name in self._odd else count

    def _report(self, name: str, values: Tensor) -> None:
        for listener in self.listeners:
            listener(self.optimizer.param_groups[0][STEP], name, self.monitor.modalities, values)

    def _warn_of_oddities(self, counts: dict[str, int]) -> None:
        if counts["unusable_scores"]:
            self._warn(
                "scores",
                "scores are not finite, all zero, or of fewer than two modalities: the step was left to the base "
                "optimizer. stats() counts such steps.",
            )
        if counts["nonfinite_gradients"]:
            self._warn(
                "gradients",
                "gradients that are not finite were left as they are. stats() counts them.",
            )

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=4)

    def _is_line_search(self) -> bool:
        return type(self.optimizer).__name__ == "LBFGS"

    @staticmethod
    def _any_nonzero(grads: Iterable[Tensor]) -> bool:
        # Only on the way of steps without scores, which should not be: here waiting for the device is no matter.
        for grad in grads:
            values = grad.coalesce().values() if grad.is_sparse else getattr(grad, "_local_tensor", grad)
            if bool(values.count_nonzero()):
                return True
        return False

    def _owners(self, groups: Sequence[dict[str, Any]]) -> dict[int, str]:
        """Modality by parameter: the group's tag, else the encoder that holds it."""
        known = self.monitor.modalities
        owner = {id(p): name for name, own in self.monitor.parameters.items() for p in own}
        for group, tag in zip(groups, self._tags, strict=True):
            if tag is None:
                continue
            if tag not in known:
                tags = sorted({t for t in self._tags if t is not None})
                raise KeyError(
                    f"param groups are tagged with modalities {tags}, the monitor has {list(known)}. "
                    "Give both the same names."
                )
            owner.update({id(p): tag for p in group["params"]})
        return owner

    def _groups_changed(self) -> bool:
        return self._known_groups != self._shape_of_groups()

    def _shape_of_groups(self) -> tuple[tuple[int, int], ...]:
        return tuple((id(group), len(group["params"])) for group in self.optimizer.param_groups)


def refuse_groups(groups: Sequence[dict[str, Any]]) -> None:
    """Raise for param groups that can't be modulated.

    Raises:
        NotImplementedError: naming the alternative.
    """
    for group in groups:
        if group.get("differentiable"):
            raise NotImplementedError(
                "differentiable=True is not supported: gradients are changed in place, and the derivative would be "
                "that of the unmodulated step. Use differentiable=False."
            )
        for parameter in group["params"]:
            if hasattr(parameter, "_in_backward_optimizers"):
                raise NotImplementedError(
                    "an optimizer that steps inside backward leaves no gradients to modulate. Step it after backward."
                )
            if getattr(parameter, "_fsdp_flattened", False):
                raise NotImplementedError(
                    "FullyShardedDataParallel (FSDP1) is not supported: its parameters are flat local shards. "
                    "Use torch.distributed.fsdp.fully_shard (FSDP2)."
                )


def is_balanced(optimizer: object) -> bool:
    """Whether balanceopt already acts on the optimizer, or on one that it wraps."""
    while optimizer is not None:
        if isinstance(getattr(optimizer, "_balanceopt_engine", None), Engine):
            return True
        optimizer = getattr(optimizer, "optimizer", None)
    return False


def _check_arguments(
    optimizer: torch.optim.Optimizer, monitor: ModalityMonitor, modulations: Sequence[Modulation]
) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"`optimizer` should be a torch.optim.Optimizer. Found {type(optimizer).__name__}.")
    if not isinstance(monitor, ModalityMonitor):
        raise TypeError(f"`monitor` should be a ModalityMonitor. Found {type(monitor).__name__}.")
    if not modulations or not all(isinstance(m, Modulation) for m in modulations):
        raise TypeError(f"`modulation` should be a Modulation such as OGM(), or several. Found {modulations!r}.")
    if is_balanced(optimizer):
        raise ValueError(
            f"this {type(optimizer).__name__} is modulated already. Give one wrapper all modulations: "
            "ModulatedOptimizer(optimizer, monitor, [OGM(), AMSS()])."
        )
    monitor.expect_scores(type(modulations[0]).__name__)
    held = {id(p) for p in unwrap(monitor.model).parameters()}
    own: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(id(p) in held for p in own):
        raise ValueError(
            "the optimizer holds none of the monitor's model's parameters. Build the monitor on the model that this "
            "optimizer trains, and both after `fully_shard` or a move that replaces parameters."
        )
