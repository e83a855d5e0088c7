"""The plain training loop that every method shares, and what is measured after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import balanceopt as bo
from benchmarks.data import MultimodalData, Split
from benchmarks.methods import Build, Context, Method, plain
from benchmarks.models import MultimodalClassifier, classifier_for
from benchmarks.tasks import accuracy


@dataclass(frozen=True)
class Recipe:
    """How to train: SGD whose learning rate falls to a tenth after 70 % of the epochs."""

    epochs: int = 25
    lr: float = 0.1
    momentum: float = 0.9
    batch_size: int = 64

    @property
    def decay_epoch(self) -> int:
        """Epoch after which the learning rate falls."""
        return max(1, round(0.7 * self.epochs))


# For the digits the learning rate is the one of 0.01, 0.02, 0.05, 0.1 with the best validation accuracy of the joint
# model over five seeds (97.7, 98.3, 98.6, 98.3 %).
RECIPES = {
    "digits": Recipe(epochs=40, lr=0.05),
    "av_digits": Recipe(epochs=25, lr=0.1),
    "mfeat": Recipe(epochs=25, lr=0.1),
    # As chosen for joint training in the evidence.
    "watch": Recipe(epochs=12, lr=0.3),
    "films": Recipe(epochs=30, lr=0.03),
    "segments": Recipe(epochs=25, lr=0.3),
}


def fit(
    model: MultimodalClassifier,
    build: Build,
    data: MultimodalData,
    recipe: Recipe,
    *,
    seed: int = 0,
    on_epoch: Callable[[], object] = lambda: None,
    on_end: Callable[[Method], object] = lambda method: None,
) -> bo.Recorder | None:
    """Train `model` in place with one method; returns what the method recorded.

    Batches depend on the seed and not on the method, so runs of one seed can be compared in pairs.

    Args:
        model: to train.
        build: makes the method.
        data: to train on.
        recipe: how to train.
        seed: of batches and method.
        on_epoch: called after each epoch.
        on_end: called with the method after the training, before its hooks are removed.
    """
    modalities = tuple(model.encoders)
    loader = batches(data.train, modalities, recipe.batch_size, seed)
    val_loader = batches(data.val, modalities, recipe.batch_size, seed)
    criterion = data.task.make_loss()
    loss = None if data.task.has_classes else criterion
    context = Context(
        loader, val_loader, data.num_classes, recipe.lr, recipe.momentum, seed, recipe.epochs, loss, criterion
    )
    method = build(model, context)
    loop(model, method, loader, recipe.epochs, recipe.decay_epoch, on_epoch, criterion, on_end)
    return method.recorder


def loop(
    model: nn.Module,
    method: Method,
    loader: Iterable[Sequence[Tensor]],
    epochs: int,
    decay_epoch: int | None,
    on_epoch: Callable[[], object] = lambda: None,
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    on_end: Callable[[Method], object] = lambda method: None,
) -> None:
    """The user's loop: batches `(*inputs, labels)`, a learning rate that falls to a tenth after `decay_epoch`."""
    milestones = [] if decay_epoch is None else [decay_epoch]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(method.optimizer, milestones, gamma=0.1)
    try:
        for _ in range(epochs):
            model.train()
            for *inputs, labels in loader:
                method.optimizer.zero_grad()
                loss = method.share * criterion(model(*inputs), labels)
                for extra in method.losses:
                    loss = loss + extra(labels)
                loss.backward()
                method.optimizer.step()
            scheduler.step()
            for act in method.epoch_ends:
                act()
            on_epoch()
        on_end(method)
    finally:
        for remove in method.removes:
            remove()


def train_alone(
    data: MultimodalData,
    modality: str,
    recipe: Recipe,
    *,
    seed: int = 0,
    on_epoch: Callable[[], object] = lambda: None,
) -> MultimodalClassifier:
    """The same encoder with a linear head of its own, trained on one modality by the same recipe."""
    torch.manual_seed(seed)
    model = classifier_for(data, [modality])
    fit(model, plain, data, recipe, seed=seed, on_epoch=on_epoch)
    return model


def evaluate(model: MultimodalClassifier, split: Split) -> float:
    """Accuracy in percent."""
    model.eval()
    with torch.no_grad():
        return accuracy(model(*(split.inputs[name] for name in model.encoders)), split.labels)


def linear_probe(encoder: nn.Module, data: MultimodalData, modality: str) -> float:
    """Test metric of a linear model on the frozen encoder's features: what the encoder knows.

    Raises:
        ImportError: without scikit-learn (extra `demo`).
    """
    seen, unseen = (_features(encoder, split.inputs[modality]) for split in (data.train, data.test))
    return data.task.probe((seen, data.train.labels.numpy()), (unseen, data.test.labels.numpy()))


def batches(
    split: Split, modalities: tuple[str, ...], batch_size: int, seed: int
) -> DataLoader[tuple[Tensor, ...]]:
    """Shuffled batches `(*inputs, labels)`, cut from the tensors at once; a rest of a batch is left out."""
    dataset = TensorDataset(*(split.inputs[name] for name in modalities), split.labels)
    generator = torch.Generator().manual_seed(seed)
    shuffled = RandomSampler(dataset, generator=generator)
    whole = BatchSampler(shuffled, batch_size, drop_last=len(split) >= batch_size)
    return DataLoader(dataset, sampler=whole, batch_size=None, generator=generator)


def _features(encoder: nn.Module, inputs: Tensor) -> np.ndarray:
    encoder.eval()
    with torch.no_grad():
        features: np.ndarray = encoder(inputs).double().numpy()
    return features
