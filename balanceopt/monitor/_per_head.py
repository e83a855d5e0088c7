"""Uni-modal logits of late fusion, with one head for each modality."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from balanceopt._undo import Undo
from balanceopt.monitor._answers import Answers
from balanceopt.monitor._columns import as_rows, projected, projection_onto
from balanceopt.monitor._features import Features
from balanceopt.monitor._forward import Pass
from balanceopt.monitor._logits import UnimodalLogits
from balanceopt.monitor._replay import State, keep_random_states, quieten


class PerHead(UnimodalLogits):
    """Uni-modal logits as the outputs of the modalities' heads, each with the head's full bias."""

    name = "per-head"
    are_parts = True

    def __init__(self, heads: Mapping[str, nn.Module], features: Features, answers: Answers) -> None:
        """Prepare for `heads`, one for each modality."""
        super().__init__(features)
        self.heads = dict(heads)
        self.projections = features.projections
        self.answers = answers

    @property
    def knows_layout(self) -> bool:
        """Whether passes have shown how each modality's features become its head's input."""
        return self.projections.keys() >= self.heads.keys()

    def __call__(self, current: Pass) -> dict[str, Tensor]:
        found = {}
        for name, output in current.head_outputs.items():
            if name in current.dropped:
                found[name] = self._without_drop(name, current)
            else:
                self._learn(name, current)
                found[name] = output.float()
        return found

    def replayed(self) -> list[nn.Module]:
        """Return the heads' modules, which run again where features were dropped."""
        return [module for head in self.heads.values() for module in head.modules()]

    def live(self, name: str, features: Tensor, samples: int) -> Tensor:
        """Return the modality's logits `(B, C)` of clean features, attached to the graphs of features and head."""
        head, x = self.heads[name], projected(name, self.projections.get(name), features, samples)
        undo = Undo()
        with undo, undo:
            keep_random_states(undo, [x.device])
            state = State(undo, head.modules())
            # Calls forward, not the module, since the monitor's hooks would take the call for the pass's.
            logits = self.answers.logits(head, head.forward(x))
            state.refuse_changed()
        assert logits is not None
        return logits

    def _learn(self, name: str, current: Pass) -> None:
        x = as_rows(current.head_inputs[name])
        if name not in self.projections and current.calls[name]:
            options = self.features.options(name, current)
            if not all(bool(torch.isfinite(sent).all()) for sent in options.values()):
                return
            self.projections[name] = None
            for path, sent in options.items():
                if (project := projection_onto(sent, x)) is not None:
                    self.projections[name] = project
                    self.features.settle(name, path, current)
                    break
        if current.calls[name] and self.projections[name] is not None:
            current.vectors[name] = x

    def _without_drop(self, name: str, current: Pass) -> Tensor:
        if self.projections.get(name) is None:
            raise RuntimeError(
                f"the features of {name!r} were dropped, and what its head gets can't be made from its encoder's "
                "output. Pass `select=` with a function that turns that output into the head's input."
            )
        head = self.heads[name]
        samples = len(as_rows(current.head_inputs[name]))
        x = current.vectors[name] = projected(name, self.projections[name], current.features[name], samples)
        undo, modules = current.undo, list(head.modules())
        with undo, undo:
            quieten(undo, modules, x.device)
            state = State(undo, modules, current.written_parameters)
            state.quieten(current.hooks)
            logits = self.answers.logits(head, head.forward(x.to(current.head_inputs[name].dtype)))
            state.refuse_changed()
        assert logits is not None
        return self.answers.rows(head, logits).float()


def refuse_widths(logits: Mapping[str, Tensor]) -> None:
    """Raise if the modalities' logits differ in shape, so that the logits can't be added up."""
    shapes = {name: tuple(x.shape) for name, x in logits.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            "`head` by modality should be heads of the same classes, whose logits are added up. Found logits of shapes "
            f"{shapes}. Heads of different tasks are one `head` each: build a monitor for the task that is balanced."
        )
