"""A probe: a linear head on standardised features, trained by Adam."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from balanceopt._options import check_count, check_entries, check_kind
from balanceopt.functional import AnswerKind
from balanceopt.probes._rows import Rows

# Adam's constants, as in its paper.
_DECAYS = (0.9, 0.999)
_EPSILON = 1e-8
# Least weight of a batch in the running statistics of the features.
_MOMENTUM = 0.05


class Probe:
    """A linear head on standardised features, with Adam's moments.

    Attributes:
        weight: `(O, D + 1)`, the last column the bias.
        first: Adam's first moment.
        second: Adam's second moment.
        mean: `(D,)` running mean of the features.
        variance: `(D,)` running variance of the features.
        steps: number of steps.
    """

    _TENSORS = ("weight", "first", "second", "mean", "variance")

    def __init__(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        self.weight, self.first, self.second, self.mean, self.variance = (tensors[n] for n in self._TENSORS)
        self.steps = steps

    @classmethod
    def new(cls, width: int, outputs: int, device: torch.device) -> Probe:
        """Build a probe of zeros, from which the convex problem is solved as well as from any other start."""
        zeros = partial(torch.zeros, dtype=torch.float32, device=device)
        matrices = {name: zeros(outputs, width + 1) for name in cls._TENSORS[:3]}
        return cls({**matrices, "mean": zeros(width), "variance": zeros(width) + 1}, 0)

    def predict(self, z: Tensor) -> Tensor:
        """Return the outputs `(B, O)` of features `(B, D)`."""
        return F.linear(
            self._standardised(z), self.weight[:, :-1].to(z.dtype), self.weight[:, -1].to(z.dtype)
        )

    def gradient(self, rows: Rows, prediction: Tensor, task: AnswerKind) -> tuple[Tensor, Tensor]:
        """Return the gradient, and the features' moments with the number of samples: sums over the samples, flat."""
        z, y, weight = rows
        if task == "classes":
            # Not F.one_hot, which reads the labels.
            hot = torch.zeros_like(prediction)
            target = y if y.dim() == 2 else hot.scatter_(1, y.unsqueeze(1), 1.0)
            residual = prediction.softmax(1) - target
        else:
            residual = (prediction.sigmoid() if task == "labels" else prediction) - y
        share = weight.unsqueeze(1)
        x = torch.cat([self._standardised(z), torch.ones_like(z[:, :1])], 1)
        gradient = ((residual * share).T @ x).flatten()
        moments = torch.cat([(z * share).sum(0), (z.square() * share).sum(0), weight.sum().view(1)])
        return gradient.float(), moments.float()

    def nothing(self) -> tuple[Tensor, Tensor]:
        """Return the gradient and the moments of a batch without the modality."""
        return torch.zeros_like(self.weight).flatten(), self.mean.new_zeros(2 * len(self.mean) + 1)

    def step(self, gradient: Tensor, moments: Tensor, lr: float) -> None:
        """Take a step of Adam and update the running statistics, which stay as they are for no samples."""
        self.steps += 1
        count = moments[-1].clamp(min=1)
        mean, square = (moments[:-1] / count).chunk(2)
        share = (moments[-1] > 0).float()
        share_of_batch = share * max(_MOMENTUM, 1 / self.steps)
        self.mean.lerp_(mean, share_of_batch)
        self.variance.lerp_((square - mean.square()).clamp(min=0), share_of_batch)
        g = gradient.view_as(self.weight) / count
        for moment, value, decay in ((self.first, g, _DECAYS[0]), (self.second, g.square(), _DECAYS[1])):
            moment.lerp_(value, share * (1 - decay))
        first, second = (
            moment / (1 - decay**self.steps)
            for moment, decay in zip((self.first, self.second), _DECAYS, strict=True)
        )
        self.weight.sub_(share * lr / len(self.mean) ** 0.5 * first / (second.sqrt() + _EPSILON))

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the tensors, and the number of steps."""
        return {"steps": self.steps, **{name: getattr(self, name).clone() for name in self._TENSORS}}

    @classmethod
    def of_state(cls, state: Mapping[str, Any], device: torch.device) -> Probe:
        """Build a probe from a state."""
        tensors = {name: state[name].detach().to(device, torch.float32).clone() for name in cls._TENSORS}
        return cls(tensors, int(state["steps"]))

    @classmethod
    def check(cls, role: str, state: Any) -> None:
        """Raise for a state of another form."""
        check_entries(role, state, ("steps", *cls._TENSORS))
        check_count("steps", state["steps"])
        for name in cls._TENSORS:
            check_kind(f"{role}, {name!r},", state[name], Tensor, "a tensor")
        shape = state["weight"].shape
        wanted = [shape] * 3 + [shape[1:] and (shape[1] - 1,)] * 2
        shapes = [tuple(state[name].shape) for name in cls._TENSORS]
        if len(shape) != 2 or shapes != [tuple(s) for s in wanted]:
            raise ValueError(f"{role} should hold a weight (O, D + 1) and statistics (D,). Found {shapes}.")

    def _standardised(self, z: Tensor) -> Tensor:
        deviation = self.variance.sqrt()
        # Features that do not vary stay out.
        scale = torch.where(deviation > 1e-6, 1 / deviation.clamp(min=1e-6), 0)
        return (z - self.mean.to(z)) * scale.to(z)
