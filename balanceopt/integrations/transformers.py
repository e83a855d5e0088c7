"""Transformers callback for balanced training: `Trainer(..., callbacks=[BalanceCallback(encoders, head)])`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from balanceopt._options import shown
from balanceopt._warnings import warn_user
from balanceopt.integrations._callback import Balance, Methods, Prediction, ReLearn, WhichEncoders, WhichHead
from balanceopt.optim import BARE_STATE, STEP

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "balanceopt.integrations.transformers needs Transformers and Accelerate. Install them with: "
        "pip install 'balanceopt[transformers]'"
    ) from error

__all__ = ["BalanceCallback"]


class BalanceCallback(Balance, TrainerCallback):
    """Balance modalities in a `Trainer.train`, with the Trainer's default optimizer or a user's.

    From the start of training to its end a monitor hooks the model, and the modulation is attached to the
    optimizer inside Accelerate's wrapper. The modulation acts once an optimizer step, after gradient clipping.
    Parameters belong to the encoder that holds them, whatever groups the optimizer has. The step counter and the seed
    are in the optimizer's param groups, and so in every checkpoint's `optimizer.pt`. Without `loss=` the scores are
    those of cross-entropy, with the Trainer's `label_smoothing_factor`.

    The Trainer does not notify callbacks of an exception: call `remove()` after one, or train again.

    Args:
        encoders: each modality's encoder, as a module of the model or its dotted name; a function from the model to
            such a mapping; or a `ModalityMonitor`.
        head: the `head` of `ModalityMonitor`, or a function from the model to such a head.
        modulation: the method, several to act in order, `()` for none, or None for `OGM()`. The Trainer's default
            optimizer is AdamW, under which `OGM(apply_to="update")` does more.
        prediction: function from the monitor to an `OPM`, such as that class; None for none.
        relearn: function from the optimizer and the monitor to a `ReLearnScheduler`, which is stepped between epochs;
            None for none.
        seed: seed of the modulation; None for `torch.initial_seed()`, which `TrainingArguments(seed=)` sets.
        strict: True to raise where labels are doubtful, False to go on without scores; None to warn of doubtful
            labels and to raise after ten steps in a row without scores.
        **monitor_options: further options of `ModalityMonitor`; `loss` may be the dotted name of a module of the model.

    Raises:
        ValueError, KeyError, NotImplementedError: when training starts, as `ModalityMonitor` and `attach`.

    Example:
        >>> BalanceCallback({"audio": "audio", "visual": "visual"}, "head", seed=0).stats()
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
        **monitor_options: Any,
    ) -> None:
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
        self._trainer: Any = None

    def log_to(self, trainer: Any) -> None:
        """Log scores, ratios, signals and what the methods report by the `log` of a Trainer, as `balance/ratio/audio`.

        The values are those of each step that the Trainer logs (`logging_steps`).

        Args:
            trainer: the Trainer that has this callback, which gives its callbacks no reference to itself.

        Raises:
            TypeError: if `trainer` has no `log`.
        """
        if not callable(getattr(trainer, "log", None)):
            raise TypeError(f"`trainer` should be a transformers.Trainer. Found {shown(trainer)}.")
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Build the monitor and attach the modulation, after a checkpoint's state is loaded."""
        self.remove()  # an interrupted run may have left hooks
        if args.n_gpu > 1:
            raise NotImplementedError(
                "DataParallel is not supported: its replicas' hooks run in threads. Start one process for each GPU "
                "(torchrun, accelerate launch), or let the Trainer see one GPU."
            )
        optimizer = _base_of(kwargs["optimizer"])
        resumed = state.global_step > 0
        if resumed and self.modulation != () and STEP not in optimizer.param_groups[0]:
            warn_user(BARE_STATE)
        # With label smoothing the Trainer takes `labels` away from the model, so that only the gradient tells them.
        smoothing = args.label_smoothing_factor
        loss = nn.CrossEntropyLoss(label_smoothing=smoothing) if smoothing else None
        self._start(
            kwargs["model"],
            lambda model, parts: model,
            [optimizer],
            loss=loss,
            resumed=resumed,
            logs=self._trainer is not None,
        )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Step re-learning and set the methods' epoch."""
        self._begin_epoch(int(state.epoch or 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reset the monitor, because scores of a step that the scaler skipped have no gradients any more."""
        self.monitor.reset()
        if self._logged and control.should_log:
            values = {name: float(value) for name, value in self._logged.items()}
            self._logged = {}
            self._trainer.log({name: value for name, value in values.items() if not math.isnan(value)})
            control.should_log = True  # which the Trainer's `log` turned off, before the loss is logged

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove every hook at the end of training."""
        self.remove()


def _base_of(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer inside Accelerate's wrapper.

    Raises:
        NotImplementedError: for DeepSpeed, and for optimizers that step inside backward.
    """
    from accelerate.optimizer import AcceleratedOptimizer

    if any(kind.__name__.startswith("DeepSpeed") for kind in type(optimizer).__mro__):
        raise NotImplementedError(
            "DeepSpeed is not supported: it keeps gradients in buffers of its own. "
            "Use DistributedDataParallel or torch.distributed.fsdp.fully_shard."
        )
    base: torch.optim.Optimizer = (
        optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    )
    if type(base).__name__ in ("Lomo", "AdaLomo"):
        raise NotImplementedError(
            f"{type(base).__name__} steps inside backward and leaves no gradients to modulate. Use another `optim`."
        )
    return base
