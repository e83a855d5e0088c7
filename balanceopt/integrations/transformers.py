"""A Transformers callback that needs nothing else: `Trainer(..., callbacks=[BalanceCallback(encoders, head)])`."""

from __future__ import annotations

from typing import Any

import torch

from balanceopt._warnings import warn_user
from balanceopt.integrations._balance import Balance, Methods, WhichEncoders, WhichHead
from balanceopt.integrations._beside import Prediction, ReLearn
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
    """Balance modalities in a `Trainer.train`, with the Trainer's own optimizer or yours.

    From the start of training to its end a monitor watches the model, and the modulation is attached to the
    optimizer inside Accelerate's wrapper. It acts once an optimizer step, after gradient clipping. Parameters
    belong to the encoder that holds them, whatever groups the optimizer has. The step counter and the seed are in
    its param groups, and so in every checkpoint's `optimizer.pt`.

    The Trainer tells callbacks nothing of an exception: after one call `remove()`, or train again.

    Args:
        encoders: each modality's encoder: a module of the model or its dotted name; a function from the model to such a
            mapping; or a `ModalityMonitor` that you built yourself.
        head: what makes the logits, as `ModalityMonitor` takes it, or a function from the model to it.
        modulation: the method, `OGM()` by default, several to act in order, or `()` for none. The default optimizer is
            AdamW, under which `OGM(apply_to="update")` does more.
        prediction: OPM too: a function from the monitor to a `OPM`, or that class itself.
        relearn: re-learning too: a function from optimizer and monitor to a `ReLearnScheduler`, which is stepped
            between epochs.
        seed: of the modulation's randomness; None for `torch.initial_seed()`, which `TrainingArguments(seed=)` sets.
        strict: True to raise where labels are doubtful, False to go on without scores; None to warn of doubtful
            labels and to raise after ten steps in a row without scores.
        **monitor_options: further ones of `ModalityMonitor`; `labels` may be the dotted name of a loss module.

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

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin: model and optimizer are prepared, a checkpoint's state is loaded into them."""
        self.remove()  # what an interrupted run left
        if args.n_gpu > 1:
            raise NotImplementedError(
                "DataParallel is not supported: its replicas' hooks run in threads. Start one process for each GPU "
                "(torchrun, accelerate launch), or let the Trainer see one GPU."
            )
        optimizer = _base_of(kwargs["optimizer"])
        resumed = state.global_step > 0
        if resumed and self.modulation != () and STEP not in optimizer.param_groups[0]:
            warn_user(BARE_STATE)
        self._start(kwargs["model"], lambda model, parts: model, [optimizer], resumed=resumed)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Re-learn if it is time; tell the methods which epoch begins."""
        self._begin_epoch(int(state.epoch or 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget scores that no step used: the gradients of a step that the scaler skipped are thrown away."""
        self.monitor.reset()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take everything off."""
        self.remove()


def _base_of(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside Accelerate's wrapper.

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
