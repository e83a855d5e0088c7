"""Small multimodal models, one for each kind of fusion, that the tests share.

Every model says what a user would hand over: `model.modalities` (encoders by name) and `model.heads` (the head, a head
for each modality, or the model itself). Inputs are one `(B, INPUTS[m])` tensor for each modality.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import balanceopt as bo

NAMES = ("audio", "visual", "text", "depth", "touch", "smell")
INPUTS = (5, 6, 7, 4, 3, 8)
CLASSES = 5

MakeEncoder = Callable[[int, int], nn.Module]


def mlp(inputs: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, width))


def linear(inputs: int, width: int) -> nn.Module:
    return nn.Linear(inputs, width)


def batch_norm(inputs: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, width))


def with_dropout(inputs: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 6), nn.Dropout(0.3), nn.Linear(6, width))


class Signal(nn.Module):
    """`(B, inputs)` to `(B, width, 4)`: as a convolution's feature map."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(inputs, 8)
        self.conv = nn.Conv1d(2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.project(x).unflatten(1, (2, 4)))


class Tokens(nn.Module):
    """`(B, inputs)` to `(B, 3, width)`: as a sequence of tokens."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(inputs, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x).unflatten(1, (3, -1))


class Multimodal(nn.Module):
    """Encoders of the first `modalities` of `NAMES`; subclasses fuse what they return.

    Args:
        modalities: how many.
        width: of every feature; a sequence for one each.
        classes: number of logits.
        encoder: makes an encoder from its input width and its feature width.
    """

    def __init__(
        self,
        modalities: int = 2,
        *,
        width: int | Sequence[int] = 4,
        classes: int = CLASSES,
        encoder: MakeEncoder = mlp,
    ) -> None:
        super().__init__()
        self.names = NAMES[:modalities]
        self.widths = [width] * modalities if isinstance(width, int) else list(width)
        self.encoders = nn.ModuleDict(
            {
                name: encoder(n, d)
                for name, n, d in zip(self.names, INPUTS[:modalities], self.widths, strict=True)
            }
        )

    @property
    def modalities(self) -> dict[str, nn.Module]:
        return dict(self.encoders.items())

    @property
    def heads(self) -> Any:
        return self.get_submodule("head")

    def encode(self, *inputs: Tensor) -> list[Any]:
        # A list, because torch 2.6 can't compile a loop over `zip(..., strict=True)` with a graph break inside.
        return [encoder(x) for encoder, x in list(zip(self.encoders.values(), inputs, strict=True))]

    def fuse(self, features: list[Tensor]) -> Tensor:
        raise NotImplementedError

    def forward(self, *inputs: Tensor) -> Any:
        return self.fuse(self.encode(*inputs))


class Concat(Multimodal):
    """One linear head over concatenated features, in any `order`, after `between` was applied to each of them."""

    def __init__(
        self,
        modalities: int = 2,
        *,
        order: Sequence[int] | None = None,
        between: Callable[[Tensor], Tensor] | None = None,
        bias: bool = True,
        joint_width: int | None = None,
        classes: int = CLASSES,
        **options: Any,
    ) -> None:
        super().__init__(modalities, classes=classes, **options)
        self.order = list(range(modalities)) if order is None else list(order)
        self.between = between
        self.head = nn.Linear(sum(self.widths) if joint_width is None else joint_width, classes, bias=bias)

    def fuse(self, features: list[Tensor]) -> Tensor:
        if self.between is not None:
            features = [self.between(z) for z in features]
        return self.head(torch.cat([features[i] for i in self.order], -1))


class SumHeads(Multimodal):
    """Sum fusion: a linear head for each modality, with its own bias."""

    def __init__(self, modalities: int = 2, *, classes: int = CLASSES, **options: Any) -> None:
        super().__init__(modalities, classes=classes, **options)
        self.own_heads = nn.ModuleDict(
            {name: nn.Linear(d, classes) for name, d in zip(self.names, self.widths, strict=True)}
        )

    @property
    def heads(self) -> dict[str, nn.Module]:
        return dict(self.own_heads.items())

    def fuse(self, features: list[Tensor]) -> Tensor:
        logits = [head(z) for head, z in list(zip(self.own_heads.values(), features, strict=True))]
        return torch.stack(logits).sum(0)


class MLPHead(Multimodal):
    """Concatenation, then several layers with BatchNorm and dropout; the head is all of them."""

    def __init__(self, modalities: int = 2, *, classes: int = CLASSES, **options: Any) -> None:
        super().__init__(modalities, classes=classes, **options)
        self.head = nn.Sequential(
            nn.Linear(sum(self.widths), 7),
            nn.BatchNorm1d(7),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(7, classes),
        )

    def fuse(self, features: list[Tensor]) -> Tensor:
        return self.head(torch.cat(features, -1))


class FiLM(Multimodal):
    """The first modality scales and shifts the second; further ones are added."""

    def __init__(self, modalities: int = 2, *, classes: int = CLASSES, **options: Any) -> None:
        super().__init__(modalities, classes=classes, **options)
        d = self.widths[0]
        self.film = nn.Linear(d, 2 * d)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(d, classes)

    def fuse(self, features: list[Tensor]) -> Tensor:
        scale, shift = self.film(features[0]).chunk(2, -1)
        fused = scale * features[1] + shift + sum(features[2:], torch.zeros_like(shift))
        return self.head(self.drop(fused))


class Gated(Multimodal):
    """The first modality gates the product of the others."""

    def __init__(self, modalities: int = 2, *, classes: int = CLASSES, **options: Any) -> None:
        super().__init__(modalities, classes=classes, **options)
        d = self.widths[0]
        self.gate = nn.Linear(d, d)
        self.head = nn.Linear(d, classes)

    def fuse(self, features: list[Tensor]) -> Tensor:
        fused = torch.sigmoid(self.gate(features[0]))
        for z in features[1:]:
            fused = fused * z
        return self.head(fused)


class TransformerFusion(Multimodal):
    """One token for each modality, an encoder layer over them, a linear head on their mean."""

    def __init__(self, modalities: int = 2, *, classes: int = CLASSES, **options: Any) -> None:
        super().__init__(modalities, classes=classes, **options)
        self.mixer = nn.TransformerEncoderLayer(self.widths[0], 2, 8, dropout=0.1, batch_first=True)
        self.head = nn.Linear(self.widths[0], classes)

    def fuse(self, features: list[Tensor]) -> Tensor:
        return self.head(self.mixer(torch.stack(features, 1)).mean(1))


class Inline(Multimodal):
    """Fusion written out in `forward` with bare parameters: no head module, the model itself makes the logits."""

    def __init__(self, modalities: int = 2, *, classes: int = CLASSES, **options: Any) -> None:
        super().__init__(modalities, classes=classes, **options)
        self.weight = nn.Parameter(torch.randn(classes, sum(self.widths)) / 2)
        self.bias = nn.Parameter(torch.randn(classes))

    @property
    def heads(self) -> nn.Module:
        return self

    def forward(self, *inputs: Tensor) -> Tensor:
        features = torch.cat(
            [encoder(x) for encoder, x in list(zip(self.encoders.values(), inputs, strict=True))], -1
        )
        return F.linear(F.dropout(features.tanh(), 0.2, self.training), self.weight, self.bias)


@dataclass
class ModelOutput:
    """As Hugging Face models return: the loss first, the logits after it."""

    loss: Tensor | None
    logits: Tensor


class HuggingFaceStyle(Concat):
    """Keyword arguments, `labels=` among them, and an output with a loss in it."""

    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> ModelOutput:  # type: ignore[override]
        logits = self.fuse([encoder(inputs[name]) for name, encoder in self.encoders.items()])
        return ModelOutput(None if labels is None else F.cross_entropy(logits, labels), logits)


class BatchDict(Concat):
    """One dictionary of inputs."""

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:  # type: ignore[override]
        return self.fuse([encoder(batch[name]) for name, encoder in self.encoders.items()])


# Encoders that return more than a tensor, each in another wrapping.


class Named(NamedTuple):
    hidden: Tensor
    mask: Tensor


@dataclass
class EncoderOutput:
    last_hidden_state: Tensor
    pooler_output: Tensor | None = None


class Wrapped(nn.Module):
    """An encoder whose output is `wrap(features)`."""

    def __init__(self, encoder: nn.Module, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.encoder = encoder
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.encoder(x))


WRAPPINGS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tuple": (lambda z: (z, z.detach() * 2), lambda output: output[0]),
    "list": (lambda z: [z, None], lambda output: output[0]),
    "dict": (lambda z: {"mask": None, "hidden": z}, lambda output: output["hidden"]),
    "namedtuple": (lambda z: Named(z, torch.ones(len(z), dtype=torch.bool)), lambda output: output.hidden),
    "dataclass": (lambda z: EncoderOutput(z), lambda output: output.last_hidden_state),
    "pooled": (lambda z: EncoderOutput(torch.stack([z, -z], 1), z), lambda output: output.pooler_output),
}


class ConcatOfWrapped(Concat):
    """Concatenation of what `unwrap` finds in each encoder's output."""

    def __init__(self, wrapping: str, **options: Any) -> None:
        wrap, self.unwrap = WRAPPINGS[wrapping]
        super().__init__(encoder=lambda n, d: Wrapped(mlp(n, d), wrap), **options)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.fuse([self.unwrap(output) for output in self.encode(*inputs)])


SPLIT: dict[str, Callable[..., Multimodal]] = {
    "concat": Concat,
    "reversed": lambda modalities=2, **options: Concat(modalities, order=range(modalities)[::-1], **options),
    "no_bias": lambda modalities=2, **options: Concat(modalities, bias=False, **options),
}
PER_HEAD: dict[str, Callable[..., Multimodal]] = {"sum": SumHeads}
ZERO_OUT: dict[str, Callable[..., Multimodal]] = {
    "mlp": MLPHead,
    "film": FiLM,
    "gated": Gated,
    "transformer": TransformerFusion,
    "inline": Inline,
}
FUSIONS: dict[str, Callable[..., Multimodal]] = {**SPLIT, **PER_HEAD, **ZERO_OUT}


def batch(size: int = 8, modalities: int = 2, *, classes: int = CLASSES) -> tuple[list[Tensor], Tensor]:
    """Random inputs of each modality, and labels."""
    inputs = [torch.randn(size, n) for n in INPUTS[:modalities]]
    return inputs, torch.randint(classes, (size,))


def watch(model: Multimodal, **options: Any) -> bo.ModalityMonitor:
    """A monitor of the model's own encoders and head."""
    options.setdefault("head", model.heads)
    return bo.ModalityMonitor(model, model.modalities, **options)


def compiled(module: nn.Module, **options: Any) -> Any:
    """What `torch.compile` returns, with the backend that needs no compiler."""
    return torch.compile(module, backend="eager", **options)


def train_step(model: nn.Module, inputs: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Forward, cross-entropy, backward; returns the joint logits, detached."""
    logits = model(*inputs)
    F.cross_entropy(logits, labels).backward()
    return logits.detach()


def columns_of(monitor: bo.ModalityMonitor) -> dict[str, slice]:
    """Each modality's columns of the head, as far as passes have shown them."""
    assert monitor.unimodal is not None
    return monitor.unimodal.columns
