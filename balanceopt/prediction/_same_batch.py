"""The published code's order: q from the batch that it is applied to, where labels are known before the forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from balanceopt._deferred import DeferredCounts
from balanceopt.monitor._outputs import map_tensors
from balanceopt.monitor._pass import Pass
from balanceopt.prediction._drop import Drop, is_feature

# Backwards in which it is checked that no encoder's output was used before the last one had run.
_CHECKED = 50


class SameBatch:
    """Hold encoders' outputs until all have run, then choose q and drop from them in place."""

    def __init__(self, choose: Callable[[Pass, Drop], None]) -> None:
        """Call `choose(pass, drop)` when all encoders have run."""
        self._choose = choose
        self._checks = 0
        self._leaks = DeferredCounts(("leaks",), self._refuse_leaks)

    def hold(self, name: str, current: Pass, drop: Drop, output: Any) -> Any:
        """What goes on into the fusion: a copy, whose dropped samples become zero when the last encoder has run.

        Raises:
            NotImplementedError: inside reentrant activation checkpointing.
        """
        if not torch.is_grad_enabled():
            refuse_checkpointing()
        sent = map_tensors(lambda x: x.clone() if is_feature(x, drop.batch_dim[name]) else x, output)
        drop.waiting.setdefault(name, []).append(sent)
        if drop.waiting.keys() >= set(drop.modalities):
            self._choose(current, drop)
            self._drop(drop)
        return sent

    def _drop(self, drop: Drop) -> None:
        if drop.q is not None:
            self._checks += 1
        for name, outputs in drop.waiting.items():
            for sent in outputs:
                if self._checks <= _CHECKED and drop.applies_to(name):
                    map_tensors(partial(self._check, drop, name), sent)
                drop.apply(name, sent, in_place=True)
        drop.waiting.clear()
        drop.decided = True

    def _check(self, drop: Drop, name: str, x: Tensor) -> Tensor:
        """Before the drop in place: what reads x from here on sends no gradient to the dropped samples."""
        if x.requires_grad and is_feature(x, drop.batch_dim[name]):
            mask = drop.mask_for(name, x)
            x.register_hook(lambda gradient: self._leaks.add(((gradient != 0) & mask).any()))
        return x

    @staticmethod
    def _refuse_leaks(counts: dict[str, int]) -> None:
        if counts["leaks"]:
            raise RuntimeError(
                "`same_batch=True` needs every encoder to run before the features of any is used. Found features that "
                "were used earlier, where they could not be dropped. Use same_batch=False, or run the encoders first."
            )


def refuse_checkpointing() -> None:
    """Raise where an encoder's output is made twice.

    Raises:
        NotImplementedError: saying what to do instead.
    """
    raise NotImplementedError(
        "`same_batch=True` does not go with activation checkpointing around a whole encoder: its output is made twice, "
        "and dropped only later. Use same_batch=False, or checkpoint inside the encoder."
    )
