"""Choice of the feature tensor in an encoder's output: the tensor from which the graph leads to the logits."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from balanceopt._pooling import Projection, pool_features, samples_in
from balanceopt._torch import base_of
from balanceopt.modality import unwrap
from balanceopt.monitor._forward import Edge, Pass
from balanceopt.monitor._outputs import detached_copy, feature_tensors, map_tensors, shapes_of

Select = Mapping[str, Callable[[Any], Tensor]]

_CURE = "Pass `select={{{name!r}: function}}`, which picks the features from the encoder's output."


class Features:
    """Learned layout from each encoder's output to the head's input.

    Attributes:
        projections: by modality, the projection from features to the head's input; None where no projection fits.
        repeats: by modality, the number of consecutive rows of the encoder's output for a sample.
        paths: by modality, the path of the output tensor that reaches the logits.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], select: Select, *, apart: bool) -> None:
        """Prepare for the user's `select`; `apart` refuses an encoder that works on another encoder's output."""
        self.encoders = dict(encoders)
        self.select = dict(select)
        self.projections: dict[str, Projection | None] = {}
        self.repeats: dict[str, int] = {}
        self.paths: dict[str, str] = {}
        self._apart = apart
        self._several: dict[str, list[str]] = {}

    def candidates(self, name: str, output: Any) -> dict[str, Tensor]:
        """Return the output tensors that may be the features, samples first for torch's recurrent layers."""
        tensors = {"": output} if isinstance(output, Tensor) and output.dim() else feature_tensors(output)
        return {path: samples_first(self.encoders[name], output, x) for path, x in tensors.items()}

    def settled(self, name: str, output: Any) -> bool:
        """Tell whether the feature tensor of this output is determined."""
        return isinstance(output, Tensor) or name in self.select or name in self.paths

    def of(self, name: str, output: Any) -> Tensor:
        """Return the feature tensor of an encoder's output, attached to its graph.

        Raises:
            TypeError: if the output holds no tensor, or `select` returns none.
            RuntimeError: if several tensors may be the features, and no pass has decided.
        """
        select = self.select.get(name)
        if select is None and isinstance(output, Tensor):
            return output
        tensors = {} if select is not None else self.candidates(name, output)
        features = select(output) if select is not None else tensors.get(self.paths.get(name, ""))
        if features is None and len(tensors) == 1:
            features = next(iter(tensors.values()))
        if isinstance(features, Tensor):
            return features
        if len(tensors) < 2:
            raise TypeError(
                f"the encoder of {name!r} should return a tensor, or something that holds one. Found "
                f"{type(output).__name__}; pass `select={{{name!r}: function}}` to pick its features."
            )
        several = self._several.get(name)
        why = (
            f"{several} all reach the logits"
            if several
            else "no training pass has shown which reaches the logits"
        )
        raise RuntimeError(
            f"the encoder of {name!r} returns several tensors ({shapes_of(tensors)}), and which holds its features "
            f"can't be told: {why}. {_CURE.format(name=name)}"
        )

    def held(
        self, name: str, output: Any, copied: Callable[[Tensor], Tensor] = detached_copy
    ) -> Callable[[], Tensor]:
        """Copy an encoder's output; return a function that reads the features from the copy later."""
        if self.settled(name, output):
            features = copied(self.of(name, output))
            return lambda: features
        whole = map_tensors(copied, output)
        return lambda: self.of(name, whole)

    # -- learned from a pass -------------------------------------------------------------------------------------------

    def note(self, name: str, current: Pass, output: Any) -> None:
        """Record the graph edges of an encoder's output tensors, until the feature tensor is determined."""
        if name in self.paths or name in self._several:
            return
        edges = current.edges.setdefault(name, {})
        for path, x in feature_tensors(output).items():
            if x.requires_grad:
                edges.setdefault(edge_of(x), path)
                # A change in place removes a view's node from the graph, but not the node of its base.
                base = base_of(x)
                if base is not None and base.requires_grad:
                    current.bases.setdefault(edge_of(base), (name, path))

    def learn(self, current: Pass) -> None:
        """Choose each modality's features by following the graph back from the logits.

        Raises:
            ValueError: if features reach no logits, or an encoder works on another encoder's output.
        """
        if self._apart and current.roots:
            self._refuse_downstream(current)
        for own, roots in current.roots.items():
            names = [own] if own is not None else list(current.edges)
            ends = {
                edge: (name, path) for name in names for edge, path in current.edges.get(name, {}).items()
            }
            reached = reach(roots, {**{e: of for e, of in current.bases.items() if of[0] in names}, **ends})
            for name in names:
                if current.edges.get(name):
                    self._choose(name, reached, ends, current)
        for name, output in current.pending.items():
            if self.settled(name, output):
                current.features[name] = self.of(name, output)
                current.sent_features[name] = self.of(name, current.pending_sent.get(name, output))

    def _choose(
        self, name: str, reached: Collection[Edge], ends: Mapping[Edge, tuple[str, str]], current: Pass
    ) -> None:
        paths = sorted({ends[edge][1] for edge in reached if edge in ends and ends[edge][0] == name})
        if not paths:
            paths = sorted(
                {current.bases[e][1] for e in reached if e not in ends and current.bases[e][0] == name}
            )
        if not paths:
            raise ValueError(
                f"the features of {name!r} reach no logits: nothing that its encoder returns is used on the way to the "
                "head's output. Give the encoder and the head that the loss uses"
                + (", or another `select=`." if name in self.select else f". {_CURE.format(name=name)}")
            )
        if len(paths) == 1:
            self.paths[name] = paths[0]
        else:
            self._several[name] = paths

    def _refuse_downstream(self, current: Pass) -> None:
        """Raise if an encoder works on another encoder's output, which mixes both modalities."""
        for name in current.edges:
            others = {
                edge: other for other, edges in current.edges.items() if other != name for edge in edges
            }
            for edge in reach(current.edges[name], others):
                raise ValueError(
                    f"the encoder of {name!r} works on what the encoder of {others[edge]!r} returns, so that its "
                    "output is of both modalities. Give as encoders the parts before the modalities meet: in a joint "
                    "model its embeddings or projections (docs/concepts.md)."
                )

    def options(self, name: str, current: Pass) -> dict[str, Tensor]:
        """Return the tensors that entered the fusion and may be a modality's features."""
        if name in current.features:
            return {self.paths.get(name, ""): current.sent_features[name]}
        output = current.pending_sent.get(name, current.pending[name])
        return {} if name in self._several else self.candidates(name, output)

    def settle(self, name: str, path: str, current: Pass) -> None:
        """Set a modality's feature tensor, as found by comparing values."""
        if name not in current.features:
            self.paths[name] = path
            current.features[name] = self.of(name, current.pending[name])
            current.sent_features[name] = self.of(name, current.pending_sent.get(name, current.pending[name]))

    def count_rows(self, current: Pass, batch: int) -> None:
        """Count samples and rows; the head's `batch` may have several rows for each sample."""
        rows = {name: z.shape[0] for name, z in current.features.items() if z.dim() > 0}
        flags = next(iter(current.present.values()), None)
        most = max(rows.values(), default=batch)
        positions = flags is None and 0 < most < batch and batch % most == 0
        current.samples = most if positions else batch if flags is None else len(flags)
        for name, z in current.features.items():
            states = z.dim() == 3 and z.shape[1] == current.samples and rows[name] % max(current.samples, 1)
            current.rows[name] = current.samples if states else rows.get(name, 0)
            output = current.returned.get(name, 0)
            if current.samples and output and output % current.samples == 0:
                self.repeats[name] = output // current.samples

    def vectors(self, name: str, current: Pass) -> Tensor:
        """Pool a modality's clean features to what enters the fusion, a row for each sample with the modality."""
        if name in current.vectors:
            return current.vectors[name]
        z = current.features[name] if name in current.features else self.of(name, current.pending[name])
        return self.pooled(name, z, current.samples)

    def pooled(self, name: str, z: Tensor, samples: int | None) -> Tensor:
        """Pool a modality's features `(B, ...)` to a row for each sample with the modality; `samples` None if unknown.

        Raises:
            ValueError: if the number of rows fits no number of samples.
        """
        if samples is not None and 0 < len(z) < samples and not (z.dim() == 3 and z.shape[1] == samples):
            samples = len(z)  # the samples that have the modality, by `present`
        project = self.projections.get(name)
        return pool_features(z, "auto", project, samples_in(name, z, samples, frames=project is not None))


def samples_first(encoder: nn.Module, output: Any, x: Tensor) -> Tensor:
    """Transpose an output tensor of torch's recurrent layers to have the samples along dimension 0."""
    return x.transpose(0, 1) if sample_dim(encoder, output, x, None) else x


def sample_dim(encoder: nn.Module, output: Any, x: Tensor, samples: int | None) -> int:
    """Return the dimension of an output tensor of an encoder along which the samples are.

    Of torch's recurrent layers the layer tells: states are `(L, B, H)`. Of other encoders a tensor `(T, B, D)` is known
    by its sizes: T is no multiple of the number of `samples`, which is B.
    """
    layer = unwrap(encoder)
    if x.dim() != 3:
        return 0
    if isinstance(layer, nn.RNNBase):
        return 0 if layer.batch_first and x is output[0] else 1
    return int(bool(samples) and x.shape[0] % samples != 0 and x.shape[1] == samples)  # type: ignore[operator]


def edge_of(x: Tensor) -> Edge:
    """Return the graph edge that produces a tensor which requires a gradient."""
    if x.grad_fn is None:
        return x.view_as(x).grad_fn.next_functions[0]  # type: ignore[union-attr]
    return x.grad_fn, x.output_nr


def reach(roots: Iterable[Edge], ends: Collection[Edge]) -> list[Edge]:
    """Return the edges of `ends` from which the graph leads to `roots` without passing through another end."""
    found, seen, waiting = [], set(), list(roots)
    while waiting:
        edge = waiting.pop()
        if edge in seen:
            continue
        seen.add(edge)
        if edge in ends:
            found.append(edge)
        else:
            node, _ = edge
            waiting.extend(following for following in node.next_functions if following[0] is not None)
    return found
