"""Uni-modal logits of late fusion: each modality has a head of its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from balanceopt._undo import Undo
from balanceopt.monitor._columns import Projection, as_rows, logit_rows, projected, projection_onto
from balanceopt.monitor._forward import Pass
from balanceopt.monitor._outputs import logits_of
from balanceopt.monitor._replay import State, keep_random_states, quieten


class PerHead:
    """Each modality's own head answers for it, with its own bias."""

    name = "per-head"
    needs_outputs = False

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        """Take the outputs of `heads`, one for each modality."""
        self.heads = dict(heads)
        self.projections: dict[str, Projection | None] = {}

    @property
    def knows_layout(self) -> bool:
        """Whether passes have shown how each modality's features become its head's input."""
        return self.projections.keys() >= self.heads.keys()

    def __call__(self, current: Pass) -> dict[str, Tensor]:
        found = {}
        for name, output in current.head_outputs.items():
            dropped = current.was_dropped(name)
            if not dropped:
                self._learn(name, current)
            found[name] = self._without_drop(name, current) if dropped else output.float()
        return found

    def replayed(self) -> list[nn.Module]:
        """The heads', where features were dropped."""
        return [module for head in self.heads.values() for module in head.modules()]

    def join(self, current: Pass) -> None:
        """Nothing: the heads' own outputs are used."""

    def live(self, name: str, features: Tensor) -> Tensor:
        """The modality's logits `(B, C)` from clean features, attached to the graphs of features and head."""
        head, x = self.heads[name], projected(name, self.projections.get(name), features)
        undo = Undo()
        with undo, undo:
            keep_random_states(undo, [x.device])
            state = State(undo, head.modules())
            # Not called as a module: this is not the pass's own call, which hooks wait for.
            logits = logits_of(head.forward(x))
            state.refuse_changed()
        assert logits is not None
        return logits

    def _learn(self, name: str, current: Pass) -> None:
        if name not in self.projections and name in current.features:
            sent = current.sent_features[name]
            if bool(torch.isfinite(sent).all()):
                self.projections[name] = projection_onto(sent, as_rows(current.head_inputs[name]))

    def _without_drop(self, name: str, current: Pass) -> Tensor:
        if self.projections.get(name) is None:
            raise RuntimeError(
                f"the features of {name!r} were dropped, and what its head gets can't be made from its encoder's "
                "output. Pass `select=` with a function that turns that output into the head's input."
            )
        head = self.heads[name]
        x = projected(name, self.projections[name], current.features[name])
        undo, modules = current.undo, list(head.modules())
        with undo, undo:
            quieten(undo, modules, x.device)
            state = State(undo, modules, current.written_parameters)
            state.quieten(current.hooks)
            logits = logits_of(head.forward(x.to(current.head_inputs[name].dtype)))
            state.refuse_changed()
        assert logits is not None
        return logit_rows(head, logits).float()
