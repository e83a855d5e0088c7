"""Common base of the frameworks' callbacks: a monitor and hooks for the time of a training run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from balanceopt._method import ABSENT, Listener
from balanceopt._options import check_flag, check_kind, check_seed, names_of, shown
from balanceopt._warnings import warn_user
from balanceopt.modality import Encoders, find_module, unwrap
from balanceopt.modulation import OGM, Modulation
from balanceopt.monitor import ModalityMonitor
from balanceopt.optim import SEED, AttachedModulation, attach, check_modulations
from balanceopt.prediction import ForwardMethod
from balanceopt.recording import log_name
from balanceopt.relearn import ReLearnScheduler
from balanceopt.signals import StepSignals

Head = nn.Module | str | Mapping[str, nn.Module | str] | None
WhichEncoders = Encoders | Callable[[Any], Encoders] | ModalityMonitor
WhichHead = Head | Callable[[Any], Head]
Methods = Modulation | Sequence[Modulation] | None
Prediction = Callable[[ModalityMonitor], ForwardMethod]
ReLearn = Callable[[torch.optim.Optimizer, ModalityMonitor], ReLearnScheduler]

# The state is in an optimizer's param groups, the only part that every framework's checkpoints carry.
KEY = "balanceopt_beside"


class Balance:
    """The base of a framework's callback: balances the modalities of a run and removes all hooks at the end.

    A framework's callback inherits from this class and calls it in the framework's hooks. `Recorder(callback)` records
    all quantities of a run, the signals of a monitor and what the methods report.

    Args:
        encoders: modules or dotted names by modality; a function from the model to such a mapping; or a monitor, which
            the callback does not remove.
        head: the `head` of `ModalityMonitor`, or a function from the model to such a head.
        modulation: the method, or several to act in order; `()` for none, None for `OGM()`.
        prediction: function from the monitor to an `OPM` or another `ForwardMethod`; None for none.
        relearn: function from the optimizer and the monitor to a `ReLearnScheduler`; None for none.
        seed: seed of all randomness, as in `attach`.
        strict: `strict` of the monitor and of `attach`; None for the default of each.
        options: further options of the monitor; `loss` may be the dotted name of a module of the model.

    Raises:
        ValueError: if a monitor is given together with a head or options; for an invalid `seed` or `strict`.
        TypeError: if an argument has another type, or an option is unknown to the monitor.
    """

    def __init__(
        self,
        encoders: WhichEncoders,
        head: WhichHead,
        modulation: Methods,
        *,
        prediction: Prediction | None,
        relearn: ReLearn | None,
        seed: int | None,
        strict: bool | None,
        options: dict[str, Any],
    ) -> None:
        if isinstance(encoders, type) or not (
            isinstance(encoders, (Mapping, ModalityMonitor)) or callable(encoders)
        ):
            raise TypeError(
                "`encoders` should map each modality to its module or the dotted name of one, or be a function from "
                f"the model to such a mapping, or a ModalityMonitor. Found {shown(encoders)}."
            )
        if isinstance(head, type) or not (
            head is None or isinstance(head, (str, nn.Module, Mapping)) or callable(head)
        ):
            raise TypeError(
                "`head` should be a module or the dotted name of one, a mapping from modality to its own, or a "
                f"function from the model to one of these. Found {shown(head)}."
            )
        if modulation is not None and modulation != ():
            check_modulations(modulation)
        for name, maker in (("prediction", prediction), ("relearn", relearn)):
            if maker is not None and not callable(maker):
                raise TypeError(f"`{name}` should be a function that makes the method. Found {shown(maker)}.")
        check_seed(seed)
        check_flag("strict", strict, or_none=True)
        unknown = options.keys() - signature(ModalityMonitor).parameters.keys()
        if unknown:
            raise TypeError(f"further options should be those of ModalityMonitor. Found {names_of(unknown)}.")
        given = isinstance(encoders, ModalityMonitor)
        beside = ([] if head is None else ["head"]) + sorted(options)
        if given and beside:
            raise ValueError(
                f"a ModalityMonitor knows its head and its options: give {beside} to it, not to the callback."
            )
        self.modulation = OGM() if modulation is None else modulation
        self.seed = seed
        self.strict = strict
        self._monitor: ModalityMonitor | None = encoders if isinstance(encoders, ModalityMonitor) else None
        self.handles: list[AttachedModulation] = []
        self.listeners: list[Listener] = []
        self._signals: StepSignals | None = None
        self._logs = False
        self._logged: dict[str, Tensor] = {}  # the latest values, by their names in a log
        self._owns_monitor = not given
        self._encoders = encoders
        self._head = head
        self._options = options
        self._beside = Beside(prediction, relearn)
        self._optimizers: list[torch.optim.Optimizer] = []

    @property
    def monitor(self) -> ModalityMonitor:
        """The monitor of the current or latest run; `stats()` works after the run too.

        Raises:
            RuntimeError: before the first run.
        """
        if self._monitor is None:
            raise RuntimeError("the monitor is built when training starts: there is none yet.")
        return self._monitor

    @property
    def modulator(self) -> Any:
        """The run's `OPM`, or other forward method; None without `prediction`."""
        return self._beside.modulator

    @property
    def scheduler(self) -> Any:
        """The run's `ReLearnScheduler`; None without `relearn`."""
        return self._beside.scheduler

    def remove(self) -> None:
        """Remove every hook, as at the end of training; the state for checkpoints stays in the param groups."""
        self._beside.remove()
        if self._signals is not None:
            self._signals.remove()
        self._signals, self._logged = None, {}
        for handle in self.handles:
            handle.remove(keep_state=True)
        if self._owns_monitor and self._monitor is not None:
            self._monitor.remove()
        self._optimizers = []

    def stats(self) -> dict[str, int]:
        """Return the latest run's counts of modulated, plain and unusual steps, summed over all optimizers."""
        total: dict[str, int] = {}
        for handle in self.handles:
            for name, count in handle.stats().items():
                total[name] = total.get(name, 0) + count
        return total

    def _start(
        self,
        model: nn.Module,
        watched: Callable[[nn.Module, list[nn.Module]], nn.Module],
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        loss: nn.Module | None = None,
        resumed: bool = False,
        logs: bool = False,
    ) -> None:
        """Start a run, `resumed` where a checkpoint is loaded already, that keeps the latest values if it `logs`.

        The monitor hooks the part of `model` that `watched(model, encoders and heads)` returns; its loss is `loss` if
        the user has not given one.
        """
        if self._owns_monitor:
            self._monitor = self._build(model, watched, loss)
        self._logs = logs
        if logs or self.listeners:
            self._signals = StepSignals(self.monitor)
            self._signals.listeners.append(self._tell)
        self._attach(optimizers)
        self._beside.start(self.monitor, self._trained(optimizers)[0], self._hear, resumed=resumed)

    def _build(
        self,
        model: nn.Module,
        watched: Callable[[nn.Module, list[nn.Module]], nn.Module],
        loss: nn.Module | None,
    ) -> ModalityMonitor:
        encoders = _resolved(self._encoders, model, "encoders")
        head = _resolved(self._head, model, "head")
        options = {"loss": loss, **self._options}
        if isinstance(options.get("loss"), str):
            options["loss"] = find_module(model, options["loss"], "`loss`")
        if self.strict is not None:
            options["strict"] = self.strict
        parts = [part for given in (encoders, head) for part in _parts(given)]
        return ModalityMonitor(watched(model, parts), encoders, head, **options)

    def _trained(self, optimizers: Sequence[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
        """Return the optimizers that train an encoder; all where none does, as frozen encoders may join one later."""
        encoder_params = {id(p) for parameters in self.monitor.parameters.values() for p in parameters}
        result = [
            o for o in optimizers if any(id(p) in encoder_params for g in o.param_groups for p in g["params"])
        ]
        return result or list(optimizers)

    def _attach(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Attach the modulation to the optimizers that train an encoder; a no-op for unchanged optimizers."""
        same = len(optimizers) == len(self._optimizers) and all(map(is_, optimizers, self._optimizers))
        if same:
            return
        for handle in self.handles:
            handle.remove(keep_state=True)
        self.handles = []
        chosen = self._trained(optimizers)
        if self.modulation != ():
            for index, optimizer in enumerate(chosen):
                # Parameters are numbered from 0 in each optimizer, so with one seed all would get the same noise.
                seed = self.seed
                if index:
                    seed = index + (torch.initial_seed() if seed is None else seed)
                if SEED in optimizer.param_groups[0]:
                    seed = None  # a resumed run continues with the checkpoint's seed
                strict = {} if self.strict is None else {"strict": self.strict}
                # A method has state for one optimizer, so each further optimizer gets a copy.
                modulation = copy.deepcopy(self.modulation) if index else self.modulation
                handle = attach(optimizer, self.monitor, modulation, seed=seed, **strict)
                handle.listeners.append(self._hear)
                self.handles.append(handle)
        self._optimizers = list(optimizers)
        self._beside.follow(chosen[0])

    def _begin_epoch(self, epoch: int) -> None:
        for handle in self.handles:
            handle.set_epoch(epoch)
        self._beside.begin_epoch(epoch)

    def _hear(self, step: int, quantity: str, modalities: tuple[str, ...], values: Tensor) -> None:
        # Scores and ratios come from the signals in every step.
        if self._signals is None or quantity not in ("score", "ratio"):
            self._tell(step, quantity, modalities, values)

    def _tell(self, step: int, quantity: str, modalities: tuple[str, ...], values: Tensor) -> None:
        for listener in self.listeners:
            listener(step, quantity, modalities, values)
        if self._logs:
            copied = torch.where(values == ABSENT, torch.nan, values.detach())
            self._logged.update(
                {log_name(quantity, name): copied[index] for index, name in enumerate(modalities)}
            )


class Beside:
    """A forward method and re-learning for the time of a run, with their state in the optimizer's checkpoints.

    Args:
        prediction: function from the monitor to an `OPM` or another `ForwardMethod`; None for none.
        relearn: function from the optimizer and the monitor to a `ReLearnScheduler`; None for none.
    """

    def __init__(self, prediction: Prediction | None, relearn: ReLearn | None) -> None:
        # The run's methods, by the names of their arguments.
        self.methods: dict[str, ForwardMethod | ReLearnScheduler] = {}
        self._prediction = prediction
        self._relearn = relearn
        self._optimizer: torch.optim.Optimizer | None = None
        self._hooks: list[RemovableHandle] = []
        self._ahead: int | None = None

    def start(
        self, monitor: ModalityMonitor, optimizer: torch.optim.Optimizer, listener: Listener, *, resumed: bool
    ) -> None:
        """Build the methods, and restore their state from a checkpoint in the optimizer."""
        self._ahead = None
        self.methods = {}
        if self._prediction is not None:
            self.methods["prediction"] = self._prediction(monitor)
        if self._relearn is not None:
            self.methods["relearn"] = self._relearn(optimizer, monitor)
        for method in self.methods.values():
            method.listeners.append(listener)
        self.follow(optimizer)
        if resumed or KEY in optimizer.param_groups[0]:
            self.load(optimizer)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Save the state in the checkpoints of `optimizer` from now on."""
        self._let_go()
        if not self.methods:
            return
        self._optimizer = optimizer
        self._hooks = [
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._check),
            optimizer.register_load_state_dict_post_hook(self.load),
        ]
        if self.scheduler is not None:
            self.scheduler.optimizer = optimizer

    @property
    def modulator(self) -> Any:
        """The run's forward method; None without one."""
        return self.methods.get("prediction")

    @property
    def scheduler(self) -> Any:
        """The run's `ReLearnScheduler`; None without one."""
        return self.methods.get("relearn")

    def begin_epoch(self, epoch: int) -> None:
        """Set the epoch, and step the scheduler once for each epoch that has ended, also after a resume."""
        if self.modulator is not None:
            self.modulator.set_epoch(epoch)
        if self.scheduler is None:
            return
        if self._ahead is None:  # a second run of the same optimizer counts epochs from 0 again
            self._ahead = max(0, self.scheduler.last_epoch - epoch)
        while self.scheduler.last_epoch < epoch + self._ahead:
            self.scheduler.step()

    def remove(self) -> None:
        """Remove all hooks; the state stays in the optimizer's param groups for later checkpoints."""
        if self._hooks and self._optimizer is not None:
            self._optimizer.param_groups[0][KEY] = self._state()
        self._let_go()
        for method in self.methods.values():
            method.remove()

    def load(self, optimizer: torch.optim.Optimizer) -> None:
        """Restore the state that a checkpoint put into the optimizer's param groups."""
        state = optimizer.param_groups[0].pop(KEY, {})
        self._check_state(state)
        for name, method in self.methods.items():
            if name in state:
                method.load_state_dict(state[name])
            else:
                warn_user(f"the checkpoint holds no state of `{name}`: {type(method).__name__} starts anew.")

    def _check(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        """Check a checkpoint's state before the optimizer loads anything, so that no load stops halfway."""
        groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
        if isinstance(groups, (list, tuple)) and groups and isinstance(groups[0], Mapping):
            self._check_state(groups[0].get(KEY, {}))

    def _check_state(self, state: Any) -> None:
        check_kind(f"the checkpoint's {KEY}", state, Mapping, "a mapping to states")
        for name, method in self.methods.items():
            if name in state:
                method.check_state(state[name])

    def _save(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict["param_groups"][0][KEY] = self._state()

    def _state(self) -> dict[str, Any]:
        return {name: method.state_dict() for name, method in self.methods.items()}

    def _let_go(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._optimizer = None


def smallest_holder(model: nn.Module, parts: Sequence[nn.Module], bare: Sequence[object]) -> nn.Module:
    """Return the smallest module that holds all `parts` and whose forward is not in `bare`; else `model`."""
    wanted = {id(part) for part in parts}
    result = model
    for module in model.modules():  # outer modules come first, so the last match is the smallest
        has_forward = getattr(type(module), "forward", None) not in bare
        if has_forward and wanted <= {id(inner) for inner in module.modules()}:
            result = module
    return unwrap(result)


def _resolved(given: Any, model: nn.Module, role: str) -> Any:
    """Return modules in place of dotted names, in one value, a mapping, or the result of a function of the model."""
    if callable(given) and not isinstance(given, nn.Module):
        given = given(model)
    if isinstance(given, Mapping):
        return {name: find_module(model, part, f"{role}[{name!r}]") for name, part in given.items()}
    return find_module(model, given, f"`{role}`") if isinstance(given, (str, nn.Module)) else given


def _parts(given: Any) -> list[nn.Module]:
    if isinstance(given, Mapping):
        return list(given.values())
    return [given] if isinstance(given, nn.Module) else []
