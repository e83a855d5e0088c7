"""diagnose: the question which encoder is unbalanced, for anyone."""

from __future__ import annotations

from balanceopt._pooling import Pool
from balanceopt.distributed import Group
from balanceopt.monitor import ModalityMonitor
from balanceopt.relearn._diagnosis import Diagnosis
from balanceopt.relearn._purities import Normalize, diagnose_samples, options
from balanceopt.relearn._sources import Source, is_given, samples_of
from balanceopt.relearn._undisturbed import Forward


def diagnose(
    train: Source,
    val: Source,
    *,
    monitor: ModalityMonitor | None = None,
    lam: float = 3.0,
    normalize: Normalize = "minmax",
    forward: Forward | None = None,
    num_classes: int | None = None,
    max_samples: int = 50_000,
    equal_counts: bool = False,
    pool: Pool = "auto",
    n_init: int = 1,
    seed: int | None = None,
    group: Group = None,
    progress: bool | None = None,
) -> Diagnosis:
    r"""Compare how well each modality's features separate the classes on training and on held-out samples.

    $$g^m = |P_D^m - P_V^m|$$

    with the purities P of k-means clusters, as many as classes. Nothing is changed: a loader is run through the model
    in eval mode, and modes, buffers and random streams are as before.

    Args:
        train: a loader, or `({modality: features (N, D)}, labels (N,))`.
        val: the same of held-out samples.
        monitor: watches the model; needed for loaders. `head=None` is enough.
        lam: of the strength that re-learning would use.
        normalize: `"minmax"` or `"none"`.
        forward: function of (model, batch) that runs the model and returns the labels, for other batches.
        num_classes: number of clusters; None for as many as there are different labels.
        max_samples: most samples a modality to keep of each split, over all ranks.
        equal_counts: cluster only as many training samples as there are for validation.
        pool: makes vectors of features with more dimensions.
        n_init: starts of k-means, the best of which counts.
        seed: of k-means; None for `torch.initial_seed()` of the first rank.
        group: whose ranks hold a part of the samples each; the monitor's where one is given.
        progress: show a progress bar (tqdm).

    Returns:
        A `Diagnosis`; `print` it for a table.

    Raises:
        ValueError: if there are no samples, of one class, or with labels that are not integers.
        TypeError: for loaders without a monitor.

    Example:
        >>> import torch
        >>> labels = torch.arange(40) % 2
        >>> sharp, blurred = labels[:, None] * 9.0, torch.randn(40, 1, generator=torch.Generator().manual_seed(0))
        >>> train, val = ({"a": sharp, "b": blurred}, labels), ({"a": blurred, "b": blurred}, labels)
        >>> found = diagnose(train, val, seed=0)
        >>> found.largest_gap, found.train_purity["a"], found.gap["b"]
        ('a', 1.0, 0.0)

    Reference:
        Wei et al., Diagnosing and Re-learning for Balanced Multimodal Learning, ECCV 2024, Eq. 1-5.
    """
    chosen = options(
        seed,
        group if monitor is None else monitor.group,
        lam=lam,
        normalize=normalize,
        n_init=n_init,
        num_classes=num_classes,
        max_samples=max_samples,
        equal_counts=equal_counts,
        pool=pool,
    )
    samples = [
        samples_of(source, split, monitor, chosen, forward, progress)
        for source, split in ((train, "training"), (val, "validation"))
    ]
    names = dict.fromkeys(name for source in (train, val) if is_given(source) for name in source[0])
    modalities = tuple(names) if monitor is None else monitor.modalities
    return diagnose_samples(modalities, samples[0], samples[1], chosen)
