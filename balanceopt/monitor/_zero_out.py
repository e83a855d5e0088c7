"""Uni-modal logits of any fusion, by running the fusion again with the other modalities' features zero or averaged."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from balanceopt._pooling import Projection
from balanceopt._torch import AFTER_FORWARD, BEFORE_FORWARD
from balanceopt.modality import modules_outside
from balanceopt.monitor._answers import Answers
from balanceopt.monitor._columns import projection_onto
from balanceopt.monitor._features import Features, sample_dim
from balanceopt.monitor._forward import Pass
from balanceopt.monitor._logits import UnimodalLogits
from balanceopt.monitor._outputs import is_differentiable, map_tensors, tensors_in
from balanceopt.monitor._replay import State, quieten

# What stands in for the outputs of the other encoders: zeros, or their mean over the batch.
Fill = Literal["zero", "mean"]


class ZeroOut(UnimodalLogits):
    """Uni-modal logits by one more run of the fusion for each modality, without the other encoders' information.

    The other encoders' outputs are zero, or their mean over the batch: what the fusion sees of an average sample.
    """

    name = "zero-out"
    needs_outputs = True

    def __init__(
        self, model: nn.Module, head: nn.Module, features: Features, answers: Answers, fill: Fill
    ) -> None:
        """Prepare to replay `model` from the outputs of its encoders, others replaced by `fill`, to that of `head`."""
        super().__init__(features)
        self.model = model
        self.encoders = features.encoders
        self.head = head
        self.answers = answers
        self.fill: Fill = fill
        self._seen_all = False

    @property
    def knows_layout(self) -> bool:
        """Whether some pass has called every encoder."""
        return self._seen_all

    def __call__(self, current: Pass) -> dict[str, Tensor]:
        self._seen_all = self._seen_all or len(current.calls) == len(self.encoders)
        if current.inputs is None:
            raise RuntimeError(
                "`scores='zero-out'` runs the model's forward again, but the model itself was not called, only its "
                "parts. Call the model, or pass `scores=` with a function from features to uni-modal logits."
            )
        for name, outputs in current.outputs.items():
            if not any(map(is_differentiable, tensors_in(outputs))):
                raise RuntimeError(
                    f"the encoder of {name!r} returns a {type(outputs[0]).__name__}, in which nothing can be set to "
                    "zero. Return tensors, or pass `scores=` with a function from features to uni-modal logits."
                )
        unimodal = {}
        undo = current.undo
        with undo, undo:
            self._quieten(current)
            depth = undo.depth
            for name in current.outputs:
                unimodal[name] = self._alone(name, current)
                undo.restore(depth)  # each modality's run starts from the state after the training forward
        return unimodal

    def join(self, current: Pass) -> None:
        """Gather a sharded fusion, a collective of all ranks."""
        with current.undo, current.undo:
            self._quieten(current)

    def replayed(self) -> list[nn.Module]:
        """Return the modules that run again, and the encoders, whose cached outputs are returned."""
        # Looked up each time, since a layer may have been replaced and would run in training mode if missed.
        fusion = modules_outside(self.model, self.encoders.values())
        return [*fusion, *self.encoders.values()]

    def _quieten(self, current: Pass) -> None:
        """Prepare the re-runs once for all modalities, since ranks gather shards and may see different modalities."""
        quieten(current.undo, current.replayed, next(self.model.parameters()).device)

    def _alone(self, alone: str, current: Pass) -> Tensor:
        assert current.inputs is not None
        undo = current.undo
        state = State(undo, current.replayed, current.written_parameters)
        state.quieten(current.hooks)
        for name, outputs in current.outputs.items():
            stand_in = self._stand_in(name, alone, current.samples)
            undo.set(vars(self.encoders[name]), "forward", _Cached(outputs, stand_in))
        if self.head is not self.model:
            stop = _Stop(current.answering_call)
            hooks = vars(self.head)[AFTER_FORWARD]
            undo.set(vars(self.head), AFTER_FORWARD, OrderedDict([*hooks.items(), (_Stop.key, stop)]))
        look = self._look(alone, current)
        # A forward may change its inputs in place, so each input tensor is copied or watched.
        args, kwargs = map_tensors(lambda x: state.tensor(x, "its inputs"), current.inputs)
        try:
            output = self.model.forward(*args, **kwargs)
        except _Reached as reached:
            output = reached.output
        except Exception as error:
            raise RuntimeError(
                "`scores='zero-out'` could not run the model again with some features zero. "
                "Pass `scores=` with a function from features to uni-modal logits."
            ) from error
        state.refuse_changed()
        if look is not None:
            self.features.projections[alone] = look.project
        logits = self.answers.logits(self.head, output)
        assert logits is not None
        return self.answers.rows(self.head, logits).float()

    def _stand_in(self, name: str, alone: str, samples: int | None) -> Callable[[Any], Any]:
        """Return the function of an encoder's output that makes what the run of modality `alone` sees."""
        if name == alone:
            return partial(map_tensors, Tensor.clone)
        if self.fill == "zero":
            return partial(map_tensors, _zeros)
        return partial(_average, self.encoders[name], samples)

    def _look(self, alone: str, current: Pass) -> _Look | None:
        """Register pre-hooks that search, once, for the projection of the modality's features in the fusion."""
        z = current.features.get(alone)
        if alone in self.features.projections or z is None or not bool(torch.isfinite(z).all() & z.any()):
            return None
        look = _Look(z)
        for module in modules_outside(self.model, self.encoders.values()):
            hooks = vars(module)[BEFORE_FORWARD]
            current.undo.set(vars(module), BEFORE_FORWARD, OrderedDict([*hooks.items(), (_Stop.key, look)]))
        return look


class _Reached(BaseException):
    """Signal that the head has returned; no Exception, which the user's forward might catch."""

    def __init__(self, output: Any) -> None:
        self.output = output


class _Stop:
    """Last forward hook of a head, which ends the run at the head call that made the logits."""

    key = -1  # torch's hook numbers start at 0

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.left -= 1
        if self.left <= 0:
            raise _Reached(output)


class _Look:
    """Pre-hook on the fusion's modules that finds a module whose input is the features, plain or pooled."""

    def __init__(self, features: Tensor) -> None:
        self.features = features
        self.project: Projection | None = None

    def __call__(self, module: nn.Module, args: Any) -> None:
        for x in tensors_in(args) if self.project is None else ():
            if is_differentiable(x) and x.dim() == 2:
                self.project = projection_onto(self.features, x, within=True)


class _Cached:
    """Forward that returns copies of an encoder's outputs, or what stands in for them, in the order of calls."""

    def __init__(self, outputs: Sequence[Any], stand_in: Callable[[Any], Any]) -> None:
        self.outputs = outputs
        self.stand_in = stand_in
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.outputs[self.calls % len(self.outputs)]
        self.calls += 1
        return self.stand_in(output)


def _zeros(x: Tensor) -> Tensor:
    """Return zeros for features; copy masks and indices among an encoder's outputs."""
    return torch.zeros_like(x) if is_differentiable(x) else x.clone()


def _average(encoder: nn.Module, samples: int | None, output: Any) -> Any:
    """Return an encoder's output averaged over the samples, in the same shapes; copy masks and indices in it."""

    def mean(x: Tensor) -> Tensor:
        if not is_differentiable(x) or x.dim() == 0:
            return x.clone()
        dim = sample_dim(encoder, output, x, samples)
        return x.mean(dim, keepdim=True).expand_as(x).contiguous()

    return map_tensors(mean, output)
