"""Parameters that the base optimizer is not shown in a step, and so leaves as they are."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from balanceopt._undo import optimizers_in


class Hiding:
    """Take the gradients from chosen parameters for the time of one step.

    An optimizer passes over parameters without a gradient: weights, momentum and all other state stay, bit for bit.
    """

    def __init__(self) -> None:
        """Start without hidden parameters."""
        self._wanted: dict[nn.Parameter, None] = {}
        self._gradients: dict[nn.Parameter, Tensor] = {}

    def add(self, params: Iterable[nn.Parameter]) -> None:
        """Choose parameters for the next `begin`."""
        self._wanted.update(dict.fromkeys(params))

    def begin(self) -> None:
        """Take the gradients from the chosen parameters."""
        for p in self._wanted:
            if p.grad is not None:
                self._gradients[p], p.grad = p.grad, None
        self._wanted.clear()

    def end(self) -> None:
        """Put the gradients back that were taken, except where a newer one came."""
        for p, gradient in self._gradients.items():
            p.grad = gradient if p.grad is None else p.grad
        self.forget()

    def forget(self) -> None:
        """Release the gradients that an interrupted step did not put back."""
        self._wanted.clear()
        self._gradients.clear()


def refuse_unhidden(optimizer: torch.optim.Optimizer, who: str) -> None:
    """Raise for optimizers that move parameters without a gradient.

    Raises:
        NotImplementedError: for LBFGS, and for optimizers around another one; the message names the alternative.
    """
    if isinstance(optimizer, torch.optim.LBFGS) or len(optimizers_in(optimizer)) > 1:
        raise NotImplementedError(
            f"{who} keeps encoders from the optimizer's step by taking their gradients away, and "
            f"{type(optimizer).__name__} moves parameters without a gradient too. Use another optimizer, or build "
            "this one without the frozen encoder's parameters."
        )
