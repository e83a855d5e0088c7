"""The samples of a split in bounded memory: given, or from a pass over a loader that restores all state."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from balanceopt._options import names_of, shown, to_tensor
from balanceopt._pooling import Projection, pool_features, samples_in
from balanceopt._torch import in_backward
from balanceopt._undo import Undo
from balanceopt.distributed import rank_in
from balanceopt.functional import Loss, as_loss
from balanceopt.monitor import (
    ModalityMonitor,
    Pass,
    State,
    evaluate,
    keep_random_states,
    map_tensors,
    without_gradients,
)
from balanceopt.relearn._classes import Kind, TargetReader

if TYPE_CHECKING:
    from balanceopt.relearn._diagnosis import Options

Features = tuple[Mapping[str, Tensor], Tensor]
Source = Iterable[Any] | Features
Forward = Callable[[nn.Module, Any], Any]

_LABEL_KEYS = ("labels", "label")
# A progress bar appears after this many seconds, because short passes need none.
_LONG = 10.0


# -- samples in bounded memory ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Samples:
    """One modality's samples.

    Attributes:
        features: `(N, D)`, one row for each sample.
        labels: `(N,)` int64 class indices, on the CPU; before `fit_classes`, targets as `TargetReader` reads them.
    """

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def parts(self, size: int, number: int, seed: int) -> list[Samples]:
        """Return `number` disjoint random parts of `size` samples; all samples each time where `len` is `size`."""
        if len(self) == size:
            return [self] * number
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed), device="cpu")
        chosen = (part.sort().values.to(self.labels.device) for part in order.split(size)[:number])
        return [Samples(self.features[index], self.labels[index]) for index in chosen]


class Reservoir:
    """A buffer of one modality's samples, pruned to `limit` and an eighth larger between prunings.

    Classes stay as equal as can be where labels are class indices; of other targets a random choice stays.
    """

    def __init__(self, limit: int) -> None:
        """Start with an empty buffer for `limit` samples."""
        self.limit = limit
        self._features: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._keys: list[Tensor] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, features: Tensor, labels: Tensor, keys: Tensor) -> None:
        """Add features `(B, D)` with labels `(B,)` or `(B, C)` and random keys `(B,)`."""
        if self._features and features.shape[1] != self._features[0].shape[1]:
            raise ValueError(
                f"features should have the same width in every batch. Found {self._features[0].shape[1]} and "
                f"{features.shape[1]}."
            )
        self._features.append(features)
        self._labels.append(labels)
        self._keys.append(keys)
        self._count += len(labels)
        if len(self) > self.limit + self.limit // 8:
            self._prune()

    def samples(self) -> Samples:
        """Return the buffer's samples, at most `limit`."""
        if len(self) > self.limit:
            self._prune()
        return Samples(torch.cat(self._features), torch.cat(self._labels))

    def _prune(self) -> None:
        labels, keys, features = (torch.cat(x) for x in (self._labels, self._keys, self._features))
        classes = labels if labels.dtype == torch.int64 else torch.zeros_like(keys, dtype=torch.int64)
        index = balanced(classes, keys, self.limit)
        self._features = [features[index.to(features.device)]]
        self._labels, self._keys, self._count = [labels[index]], [keys[index]], len(index)


def balanced(labels: Tensor, keys: Tensor, limit: int) -> Tensor:
    """Choose at most `limit` samples with class counts as equal as possible; return sorted indices.

    Within a class the samples of the smallest keys stay, so a sample dropped early would be dropped at the end too.
    """
    order = torch.argsort(keys, stable=True)
    by_class = order[torch.argsort(labels[order], stable=True)]
    counts = torch.unique_consecutive(labels[by_class], return_counts=True)[1]
    first = counts.cumsum(0) - counts
    # A sample's rank within its class. The lowest ranks stay, and keys break ties.
    rank = torch.empty_like(order)
    rank[by_class] = torch.arange(len(order), dtype=torch.int64, device="cpu") - first.repeat_interleave(
        counts
    )
    return order[torch.argsort(rank[order], stable=True)][:limit].sort().values


@dataclass(frozen=True, eq=False)
class Split:
    """Samples of the training or the validation data.

    Attributes:
        samples: each modality's samples, without modalities that have none.
        kinds: kinds of targets of the split's batches.
        targets: targets of the samples of all modalities, if classes are made of all training targets; else None.
    """

    samples: dict[str, Samples]
    kinds: set[Kind]
    targets: Tensor | None

    def with_classes(self, classes: Callable[[Tensor], Tensor]) -> dict[str, Samples]:
        """Return each modality's samples with class indices in place of targets."""
        return {name: replace(held, labels=classes(held.labels)) for name, held in self.samples.items()}


class Collector:
    """A collector of the pooled features of batches, by modality.

    Args:
        modalities: names of the modalities.
        chosen: options of the diagnosis.
        where: source of the samples, for messages.
        loss: loss whose targets the batches' labels are, where the options do not tell the classes.
        ignore_index: label of samples to skip.
        projections: by modality, the model's pooling of several rows for each sample; None where unknown.
    """

    def __init__(
        self,
        modalities: tuple[str, ...],
        chosen: Options,
        where: str,
        loss: Loss | None = None,
        ignore_index: int = -100,
        projections: Mapping[str, Projection | None] = MappingProxyType({}),
    ) -> None:
        self.where = where
        self._chosen = chosen
        self._reader = TargetReader(chosen.classes, loss or as_loss(None), where, ignore_index)
        self._projections = projections
        self._generator = torch.Generator().manual_seed(chosen.seed)
        self._targets = Reservoir(chosen.limit)
        self._reservoirs = {name: Reservoir(chosen.limit) for name in modalities}

    def add(self, features: Mapping[str, Tensor], labels: Any) -> None:
        """Add one batch; modalities absent from `features` are skipped.

        Raises:
            ValueError: if labels do not fit the loss or the rule of the classes, or are not one for each row of
                features.
            TypeError: if labels are not numbers.
        """
        targets, flags = self._reader.read(labels)
        keys = torch.rand(len(targets), generator=self._generator, dtype=torch.float64, device="cpu")
        counted = flags.nonzero()[:, 0]
        for name, z in features.items():
            projection = self._projections.get(name)
            try:
                samples_in(name, z, len(targets), frames=projection is not None)
            except ValueError as error:
                raise ValueError(f"{error} These came {self.where}.") from None
            vectors = pool_features(z.detach(), self._chosen.pool, projection, len(targets))
            if len(counted) < len(targets):
                vectors = vectors[counted.to(vectors.device)]
            if len(counted):
                self._reservoirs[name].add(vectors, targets[counted], keys[counted])
        if features and targets.dtype != torch.int64 and len(counted):
            no_features = torch.empty(len(counted), 0, dtype=torch.float32, device="cpu")
            self._targets.add(no_features, targets[counted], keys[counted])

    def split(self) -> Split:
        """Return the samples collected so far."""
        samples = {name: held.samples() for name, held in self._reservoirs.items() if len(held)}
        targets = self._targets.samples().labels if len(self._targets) else None
        return Split(samples, self._reader.kinds, targets)


# -- the sources of a split -----------------------------------------------------------------------------------------


def is_given(source: Any) -> TypeGuard[Features]:
    """Whether a source is features by modality with labels, not a loader."""
    return isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], Mapping)


def check_loader(role: str, loader: object) -> None:
    """Check that a loader can yield batches.

    Raises:
        TypeError: if `loader` is not iterable, or a class, string or tensor.
    """
    iterable = isinstance(loader, Iterable) or hasattr(loader, "__getitem__")
    if not iterable or isinstance(loader, (type, str, Tensor)):
        raise TypeError(
            f"{role} should be a loader that yields batches: (*inputs, labels), or mappings with 'labels'. "
            f"Found {shown(loader)}."
        )


def collect_samples(source: Source, split: str, monitor: ModalityMonitor | None, chosen: Options) -> Split:
    """Collect each modality's samples from a pass over a loader, or from given features.

    Raises:
        TypeError: for a loader without a monitor, and for a source that is neither a loader nor features.
        KeyError: for features of a modality that the monitor does not have.
        ValueError: for features that are not real numbers.
    """
    if is_given(source):
        features, labels = source
        modalities = tuple(features) if monitor is None else monitor.modalities
        unknown = features.keys() - set(modalities)
        if unknown:
            raise KeyError(
                f"{split} features should be given by modality {modalities}. Found {names_of(unknown)}."
            )
        tensors = {name: _numbers(f"the {split} features of {name!r}", z) for name, z in features.items()}
        collector = _collector(modalities, chosen, f"given with the {split} features", monitor)
        collector.add(tensors, labels)
        return collector.split()
    if monitor is None:
        raise TypeError(
            f"the {split} data should be (features by modality, labels) where no monitor is given. Found "
            f"{shown(source)}: pass `monitor=` to take the features from a pass over a loader."
        )
    check_loader(f"the {split} data", source)
    collector = _collector(
        monitor.modalities, chosen, f"from the {split} loader", monitor, monitor.features.projections
    )
    _collect(monitor, source, collector, split, chosen)
    return collector.split()


def _collector(
    modalities: tuple[str, ...],
    chosen: Options,
    where: str,
    monitor: ModalityMonitor | None,
    projections: Mapping[str, Projection | None] = MappingProxyType({}),
) -> Collector:
    """Build a collector that reads targets as those of the monitor's loss; of cross-entropy without a monitor."""
    if monitor is None:
        return Collector(modalities, chosen, where)
    ignore_index = monitor.labels.ignore_index
    return Collector(
        modalities, chosen, where, as_loss(monitor.loss, ignore_index), ignore_index, projections
    )


def _numbers(role: str, features: Any) -> Tensor:
    """Check given features and convert integers to float32."""
    z = to_tensor(role, features, "a tensor (N, D)")
    if z.is_complex() or z.dim() == 0:
        raise ValueError(
            f"{role} should be real numbers (N, D). Found shape {tuple(z.shape)}, dtype {z.dtype}."
        )
    return z if z.is_floating_point() else z.float()


# -- a pass over a loader --------------------------------------------------------------------------------------------


def _collect(
    monitor: ModalityMonitor, loader: Iterable[Any], collector: Collector, split: str, chosen: Options
) -> None:
    """Run the model over a loader in eval mode, add the encoders' features to `collector`, and restore all state.

    Raises:
        RuntimeError: if the monitor's hooks were removed.
        ImportError: if `progress` is True and tqdm is not installed.
    """
    if not monitor.hooks.active:
        raise RuntimeError("the monitor's hooks were removed. Build a new ModalityMonitor.")
    undo = Undo()
    with undo, undo:
        leave_undisturbed(undo, monitor.model, loader)
        undo.set(vars(monitor.hooks), "diagnosing", True)
        latest = _latest_features(undo, monitor)
        first = True
        for batch in _with_bar(loader, f"{split} features", chosen.progress, monitor):
            latest.clear()
            run = partial(run_batch, monitor.model, batch, chosen.forward)
            labels, first = (monitor.hooks.rehearse(run) if first else run()), False
            collector.add(_results(latest), labels)


def _results(held: Mapping[str, Callable[[], Tensor]]) -> dict[str, Tensor]:
    # Not within the `with` block, whose end Python 3.12 and 3.13 skip if a tracer raises inside a comprehension.
    return {name: result() for name, result in held.items()}


def _latest_features(undo: Undo, monitor: ModalityMonitor) -> dict[str, Callable[[], Tensor]]:
    """Return a dict that is updated with the features of each encoder's latest call, until `undo` restores."""
    latest: dict[str, Callable[[], Tensor]] = {}

    def tap(name: str, output: Any, current: Pass | None) -> None:
        if not in_backward():
            # Copied, because later modules may change the features in place.
            latest[name] = monitor.features.held(name, output)

    undo.note(partial(monitor.hooks.outputs.drop, tap))
    monitor.hooks.outputs.add(tap)
    return latest


def run_batch(model: nn.Module, batch: Any, forward: Forward | None) -> Any:
    """Run one batch through the model and return the batch's labels.

    Raises:
        TypeError: for a batch of an unknown form.
    """
    if forward is not None:
        answer = forward(model, batch)
        are_labels = isinstance(answer, Tensor) and answer.dim() == 1 and not answer.is_floating_point()
        if isinstance(answer, Mapping) and any(key in answer for key in _LABEL_KEYS):
            return _labels_of(answer)
        return answer if are_labels else _labels_of(batch)
    labels = _labels_of(batch)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Mapping):
        inputs = {key: value for key, value in batch.items() if key not in _LABEL_KEYS}
        _call_with_mapping(model, map_tensors(lambda x: x.to(device), inputs))
    else:
        values = [map_tensors(lambda x: x.to(device), value) for value in batch[:-1]]
        _refuse_arguments(model, values)
        model(*values)
    return labels


def _labels_of(batch: Any) -> Any:
    """Return a batch's labels: the last item of a tuple or list, or the value at "labels" or "label"."""
    if isinstance(batch, Mapping):
        for key in _LABEL_KEYS:
            if key in batch:
                return batch[key]
        form = f"a mapping with {sorted(map(str, batch))}"
    elif isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return batch[-1]
    else:
        form = type(batch).__name__
    raise TypeError(
        f"batches should be (*inputs, labels), or mappings with 'labels' or 'label'. Found {form}. Pass `forward=`: "
        "a function of (model, batch) that runs the model and returns the labels."
    )


def _call_with_mapping(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    try:
        inspect.signature(model.forward).bind(**inputs)
    except TypeError:  # a model that takes the whole batch as one argument
        _refuse_arguments(model, [inputs], sorted(map(str, inputs)))
        model(inputs)
    else:
        model(**inputs)


def _refuse_arguments(model: nn.Module, values: Sequence[Any], keys: Sequence[str] = ()) -> None:
    """Raise where a batch's inputs do not fit the signature of the model's forward."""
    try:
        inspect.signature(model.forward).bind(*values)
    except TypeError as error:
        raise TypeError(
            "batches should be (*inputs, labels), or mappings, with the inputs that the forward of "
            f"{type(model).__name__} takes. Found {list(keys) or len(values)}: {error}. Pass `forward=`: a function of "
            "(model, batch) that runs the model and returns the labels."
        ) from None
    except ValueError:  # no signature
        pass


def _with_bar(
    loader: Iterable[Any], what: str, progress: bool | None, monitor: ModalityMonitor
) -> Iterable[Any]:
    """Return the loader, with a progress bar where the pass is long."""
    if progress is False or rank_in(monitor.group) > 0:
        return loader
    try:
        from tqdm import tqdm
    except ImportError as error:
        if progress:
            raise ImportError(
                "a progress bar needs tqdm: pip install 'balanceopt[progress]', or progress=None"
            ) from error
        return loader
    if not (progress or sys.stderr.isatty()):
        return loader
    bar: Iterable[Any] = tqdm(loader, desc=what, delay=0 if progress else _LONG, leave=False)
    return bar


# -- state to restore ------------------------------------------------------------------------------------------------


def leave_undisturbed(undo: Undo, model: nn.Module, loader: Any) -> None:
    """Switch the model to eval mode without gradients, and record in `undo` how to restore all state.

    The state is each module's mode, attributes and buffers, the global random streams, and the generators of the loader
    and its samplers. Modes are restored module by module, so that a frozen BatchNorm stays frozen.
    """
    modules = list(model.modules())
    undo.note(partial(_reshard, modules))
    for buffer in model.buffers():
        if not is_lazy(buffer):  # restored in place, because compiled code may hold a buffer's address
            undo.note(partial(_restore_buffer, buffer, buffer.clone()))
    for generator in _generators(loader):
        undo.note(partial(generator.set_state, generator.get_state()))
    keep_random_states(undo, {p.device for p in model.parameters()})
    without_gradients(undo)
    State(undo, modules, thorough=True)
    evaluate(undo, modules)


def _generators(loader: Any) -> list[torch.Generator]:
    """Return the generators that iterating a DataLoader draws from."""
    sampler, batch_sampler = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    inner = (getattr(batch_sampler, "sampler", None), getattr(sampler, "sampler", None))
    generators = [getattr(holder, "generator", None) for holder in (loader, sampler, batch_sampler, *inner)]
    return list({id(g): g for g in generators if isinstance(g, torch.Generator)}.values())


def _restore_buffer(buffer: Tensor, before: Tensor) -> None:
    if not torch.equal(buffer, before):  # a needless write would break a graph that saved the buffer
        buffer.detach().copy_(before)


def _reshard(modules: Iterable[nn.Module]) -> None:
    """Reshard FSDP2's root module, which stays unsharded after a forward without backward."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule  # imported here, because the import is slow

    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()
