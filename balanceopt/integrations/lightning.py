"""A Lightning callback that needs nothing else: `Trainer(callbacks=[BalanceCallback(encoders, head)])`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from balanceopt.integrations._balance import Balance, Methods, WhichEncoders, WhichHead, smallest_holder
from balanceopt.integrations._beside import Prediction, ReLearn
from balanceopt.monitor import refuse_model

try:
    from lightning.pytorch import Callback, LightningModule
except ImportError as error:
    raise ImportError(
        "balanceopt.integrations.lightning needs Lightning. Install it with: pip install 'balanceopt[lightning]'"
    ) from error

__all__ = ["BalanceCallback"]


class BalanceCallback(Balance, Callback):
    """Balance modalities in a `Trainer.fit`; the LightningModule stays as it is.

    From the start of the fit to its end, or to an exception, a monitor watches the smallest part of the LightningModule
    that holds the encoders and the head, and the modulation is attached to every optimizer that trains an encoder. It
    acts once an optimizer step, after gradient clipping, in automatic and in manual optimization. The step counter
    and the seed are in the optimizers' param groups, and so in every `.ckpt`.

    Args:
        encoders: each modality's encoder: a module of the LightningModule or its dotted name (`"net.audio"`); a
            function from the LightningModule to such a mapping; or a `ModalityMonitor` that you built yourself.
        head: what makes the logits, as `ModalityMonitor` takes it, or a function from the LightningModule to it.
        modulation: the method, `OGM()` by default, several to act in order, or `()` for none.
        prediction: OPM too: a function from the monitor to a `OPM`, or that class itself.
        relearn: re-learning too: a function from optimizer and monitor to a `ReLearnScheduler`, which is stepped
            between epochs.
        seed: of the modulation's randomness; None for `torch.initial_seed()`, which `seed_everything` sets.
        strict: True to raise where labels are doubtful, False to go on without scores; None to warn of doubtful
            labels and to raise after ten steps in a row without scores.
        labels: as `ModalityMonitor` takes it, the dotted name of the LightningModule's loss module, or a function from
            the batch to its labels.
        **monitor_options: further ones of `ModalityMonitor`, such as `train_only=False`.

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
        labels: str | nn.Module | Callable[[Any], Tensor] | None = None,
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

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin: the optimizers are there, a checkpoint's state is about to be loaded into them."""
        self.remove()  # what an interrupted run left
        refuse_model(trainer.strategy.model)
        bare = (nn.Module.forward, LightningModule.forward)
        optimizers = trainer.strategy.optimizers
        self._start(pl_module, lambda model, parts: smallest_holder(model, parts, bare), optimizers)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Re-learn if it is time; tell the methods which epoch begins."""
        self._begin_epoch(trainer.current_epoch)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Take the labels from the batch; follow optimizers that were replaced."""
        self._attach(trainer.strategy.optimizers)
        if self._labels_of is not None:
            self._labels = self._labels_of(batch)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Give the batch's labels to the pass that made this loss."""
        if self._labels is None:
            return
        latest = self.monitor.latest
        if latest is not None and latest is not self._observed:  # a second backward of one pass brings none
            self._observed = latest
            self.monitor.observe(self._labels)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take everything off."""
        self.remove()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take everything off."""
        self.remove()

    def remove(self) -> None:
        """Take every hook off, as the end of the fit does. What a checkpoint needs stays in the param groups."""
        super().remove()
        self._labels = self._observed = None
