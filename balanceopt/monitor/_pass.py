"""One training pass: what the hooks saw of a forward, and what backward added."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from balanceopt.monitor._sums import ModalitySums

Observed = tuple[Tensor, dict[str, Tensor]]


@dataclass(eq=False)
class Pass:
    """One forward in training.

    Attributes:
        scored: uni-modal logits are made of it.
        inputs: the model's `(args, kwargs)`, held until its forward ends; None where only its parts were called.
        calls: how often each modality's encoder ran.
        outputs: each modality's encoder outputs, one a call, clean (before any drop), copied; for zero-out only.
        features: each modality's clean feature tensor, batch first, from its last call; a copy.
        sent_features: the same as it went on into the fusion (after any drop).
        head_inputs: what each head got, by modality; under None what the joint head got.
        head_outputs: each modality's own head's logits `(N, C)`, for per-head fusion.
        logits: the joint logits `(N, C)`, N rows.
        unimodal: each modality's logits `(N, C)` float32; None before the forward's end.
        entropies: each modality's feature entropy by sample `(B,)`, where a consumer asked for it.
        present: bool `(B,)` by modality, the samples that have it; all of them where not given.
        observed: what the user gave: labels, and `present`.
        labels: as given by the user, a loss module or the model's keyword; None to recover them.
        label_source: where `labels` come from.
        gradients: of the loss at the joint logits, one a backward.
        head_calls: how often heads ran.
        answering_call: which run of the joint head made `logits`.
        listening: for the gradient of how many logits hooks were put on; only that of the last one counts.
        vectors: each modality's clean features as the head gets them `(N, D_m)`, where that is known.
        ignore_index: of the loss module that gave the labels, where it has one.
        ended: nothing of its forward is awaited.
        closed: its scores were taken or discarded: labels that come now are for another pass.
        settled: its sums are made.
        sums: what it contributes, once made.
        first_node: number of the first autograd node that its forward may have made.
        end_node: number after the last one; None while the forward runs.
        notes: what other parts of the package remember of this pass (a drop mask).
    """

    scored: bool = True
    inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    calls: Counter[str] = field(default_factory=Counter)
    outputs: dict[str, list[Any]] = field(default_factory=dict)
    features: dict[str, Tensor] = field(default_factory=dict)
    sent_features: dict[str, Tensor] = field(default_factory=dict)
    head_inputs: dict[str | None, Tensor] = field(default_factory=dict)
    head_outputs: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None
    unimodal: dict[str, Tensor] | None = None
    entropies: dict[str, Tensor] = field(default_factory=dict)
    present: dict[str, Tensor] = field(default_factory=dict)
    observed: Observed | None = None
    labels: Tensor | None = None
    label_source: str = "gradient"
    gradients: list[Tensor] = field(default_factory=list)
    head_calls: int = 0
    answering_call: int = 0
    listening: int = 0
    vectors: dict[str, Tensor] = field(default_factory=dict)
    ignore_index: int | None = None
    ended: bool = False
    closed: bool = False
    settled: bool = False
    sums: ModalitySums | None = None
    first_node: int = 0
    end_node: int | None = None
    notes: dict[Any, Any] = field(default_factory=dict)

    def was_dropped(self, name: str) -> bool:
        """Whether something (OPM) changed the modality's features on their way into the fusion."""
        return name in self.features and self.sent_features[name] is not self.features[name]

    @property
    def answered(self) -> int:
        """How many heads have answered."""
        return len(self.head_outputs) or int(self.logits is not None)

    def made(self, node: int) -> bool:
        """Whether its forward made the autograd node of this number."""
        return self.first_node <= node and (self.end_node is None or node < self.end_node)

    def end_forward(self) -> None:
        """Let go of what only the forward needed."""
        self.ended = True
        self.inputs = None
        self.outputs, self.features, self.sent_features, self.vectors = {}, {}, {}, {}
        self.head_inputs, self.head_outputs = {}, {}
