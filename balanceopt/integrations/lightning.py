"""Lightning callback for balanced training: `Trainer(callbacks=[BalanceCallback(encoders, head)])`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from balanceopt._options import check_flag
from balanceopt.integrations._callback import (
    Balance,
    Methods,
    Prediction,
    ReLearn,
    WhichEncoders,
    WhichHead,
    smallest_holder,
)
from balanceopt.monitor import refuse_model

try:
    from lightning.pytorch import Callback, LightningModule
except ImportError as error:
    raise ImportError(
        "balanceopt.integrations.lightning needs Lightning. Install it with: pip install 'balanceopt[lightning]'"
    ) from error

__all__ = ["BalanceCallback"]


class BalanceCallback(Balance, Callback):
    """Balance modalities in a `Trainer.fit` without a change to the LightningModule.

    From the start of the fit to its end, or to an exception, a monitor hooks the smallest part of the LightningModule
    that holds the encoders and the head, and the modulation is attached to every optimizer that trains an encoder. The
    modulation acts once an optimizer step, after gradient clipping, in automatic and in manual optimization. The step
    counter and the seed are in the optimizers' param groups, and so in every `.ckpt`.

    Args:
        encoders: each modality's encoder, as a module of the LightningModule or its dotted name (`"net.audio"`); a
            function from the LightningModule to such a mapping; or a `ModalityMonitor`.
        head: the `head` of `ModalityMonitor`, or a function from the LightningModule to such a head.
        modulation: the method, several to act in order, `()` for none, or None for `OGM()`.
        prediction: function from the monitor to an `OPM`, such as that class; None for none.
        relearn: function from the optimizer and the monitor to a `ReLearnScheduler`, which is stepped between epochs;
            None for none.
        seed: seed of the modulation; None for `torch.initial_seed()`, which `seed_everything` sets.
        strict: True to raise where labels are doubtful, False to go on without scores; None to warn of doubtful
            labels and to raise after ten steps in a row without scores.
        labels: the `labels` of `ModalityMonitor`, or a function from the batch to its targets.
        log: log scores, ratios, signals and what the methods report as `balance/ratio/audio` by the LightningModule's
            `log`, where the Trainer has a logger.
        **monitor_options: further options of `ModalityMonitor`, such as `train_only=False`; `loss` may be the dotted
            name of the LightningModule's loss module.

    Raises:
        ValueError, KeyError, NotImplementedError: when the fit starts, as `ModalityMonitor` and `attach`.

    Example:
        >>> BalanceCallback({"audio": "net.audio", "visual": "net.visual"}, "net.head", seed=0).stats()
        {}

    Reference:
        docs/integrations.md.
    """

    def __init__(
        self,
        encoders: WhichEncoders,
        head: WhichHead = None,
        modulation: Methods = None,
        *,
        prediction: Prediction | None = None,
        relearn: ReLearn | None = None,
        seed: int | None = None,
        strict: bool | None = None,
        labels: str | Callable[[Any], Tensor] | None = None,
        log: bool = True,
        **monitor_options: Any,
    ) -> None:
        of_batch = callable(labels) and not isinstance(labels, nn.Module)
        if labels is not None and not of_batch:
            monitor_options["labels"] = labels
        super().__init__(
            encoders,
            head,
            modulation,
            prediction=prediction,
            relearn=relearn,
            seed=seed,
            strict=strict,
            options=monitor_options,
        )
        self._labels_of: Callable[[Any], Tensor] | None = labels if of_batch else None  # type: ignore[assignment]
        self._labels: Tensor | None = None
        self._observed: object = None
        check_flag("log", log)
        self._with_logs = log  # not `log`, as Lightning sets its own functions of this name on callbacks

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Build the monitor and attach the modulation, before a checkpoint's state is loaded into the optimizers."""
        self.remove()  # an interrupted run may have left hooks
        refuse_model(trainer.strategy.model)
        bare = (nn.Module.forward, LightningModule.forward)
        optimizers = trainer.strategy.optimizers
        self._start(
            pl_module,
            lambda model, parts: smallest_holder(model, parts, bare),
            optimizers,
            logs=self._with_logs and bool(trainer.loggers),
        )

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Step re-learning and set the methods' epoch."""
        self._begin_epoch(trainer.current_epoch)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Read the batch's labels, and attach the modulation to optimizers that were replaced."""
        self._attach(trainer.strategy.optimizers)
        if self._labels_of is not None:
            self._labels = self._labels_of(batch)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Pass the batch's labels to the monitor for the forward that made this loss."""
        if self._labels is None:
            return
        latest = self.monitor.hooks.latest
        if latest is not None and latest is not self._observed:  # a pass takes labels once
            self._observed = latest
            self.monitor.observe(self._labels)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the values of a step."""
        if self._logged:
            pl_module.log_dict(self._logged, on_step=True, on_epoch=False)
            self._logged = {}

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove every hook after an exception."""
        self.remove()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Remove every hook at the end of a fit."""
        self.remove()

    def remove(self) -> None:
        """Remove every hook, as at the end of the fit; the state for checkpoints stays in the param groups."""
        super().remove()
        self._labels = self._observed = None
