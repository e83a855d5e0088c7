"""Diagnosis: how well each modality's features separate the classes, on training and validation samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

_COLUMNS = ("modality", "train purity", "val purity", "gap", "strength", "samples (train + val)")


@dataclass(frozen=True)
class Diagnosis:
    r"""How far each modality's encoder has learned its training samples beyond what carries over to others.

    The features of training and of validation samples are clustered apart, into as many clusters as classes. Their
    purities \(P_D\) and \(P_V\) give the gap and the strength of re-initialisation,

    $$g = |P_D - P_V|, \qquad \alpha = \tanh(\lambda g)$$

    An encoder with a large gap has fitted what does not carry over (the modality that training leaned on); one whose
    purities are both low has learned little, or has little to say.

    Attributes:
        train_purity: by modality, in (0, 1]; nan where skipped.
        val_purity: the same of the validation samples.
        gap: by modality, in [0, 1); nan where skipped.
        strength: by modality, in [0, 1); 0 where skipped.
        train_count: samples clustered, over all ranks.
        val_count: the same of the validation samples.
        num_classes: C, also the number of clusters.
        skipped: why, for modalities without a diagnosis.
        epoch: when it was made, for one that a scheduler made.

    Example:
        >>> print(Diagnosis({"a": 0.9}, {"a": 0.8}, {"a": 0.1}, {"a": 0.29}, {"a": 90}, {"a": 9}, num_classes=3))
        modality  train purity  val purity     gap  strength  samples (train + val)
        a               0.9000      0.8000  0.1000    0.2900                 90 + 9

    Reference:
        Wei et al., Diagnosing and Re-learning for Balanced Multimodal Learning, ECCV 2024, Eq. 3-5.
    """

    train_purity: dict[str, float]
    val_purity: dict[str, float]
    gap: dict[str, float]
    strength: dict[str, float]
    train_count: dict[str, int]
    val_count: dict[str, int]
    num_classes: int
    skipped: dict[str, str] = field(default_factory=dict)
    epoch: int | None = None

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names, in the order of the encoders."""
        return tuple(self.gap)

    @property
    def largest_gap(self) -> str | None:
        """The modality whose encoder is furthest ahead of what carries over; None if all were skipped."""
        known = [name for name in self.gap if name not in self.skipped]
        return max(known, key=lambda name: self.gap[name]) if known else None

    def __str__(self) -> str:
        rows = [_COLUMNS, *(self._row(name) for name in self.gap)]
        widths = [max(len(row[i]) for row in rows if len(row) > 2) for i in range(len(_COLUMNS))]
        widths[0] = max(len(row[0]) for row in rows)
        lines = []
        for row in rows:
            cells = [row[0].ljust(widths[0]), *row[1:]]
            if len(row) > 2:
                cells[1:] = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join(cells))
        if len(self.gap) > 1 and self.largest_gap is not None:
            lines.append(f"largest gap: {self.largest_gap}")
        return "\n".join(lines)

    def _row(self, name: str) -> tuple[str, ...]:
        if name in self.skipped:
            return (name, f"skipped: {self.skipped[name]}")
        values = (self.train_purity, self.val_purity, self.gap, self.strength)
        counts = f"{self.train_count[name]} + {self.val_count[name]}"
        return (name, *(f"{value[name]:.4f}" for value in values), counts)


def assemble(
    modalities: Sequence[str],
    purities: Mapping[str, tuple[float, float]],
    counts: Mapping[str, tuple[int, int]],
    skipped: Mapping[str, str],
    strength: Callable[[float], float],
    num_classes: int,
) -> Diagnosis:
    """The diagnosis of these purities `(train, validation)`; `strength` is a function of the gap."""
    nan = float("nan")
    train, val = ({name: purities.get(name, (nan, nan))[side] for name in modalities} for side in (0, 1))
    gap = {name: abs(train[name] - val[name]) for name in modalities}
    return Diagnosis(
        train_purity=train,
        val_purity=val,
        gap=gap,
        strength={name: strength(gap[name]) if name in purities else 0.0 for name in modalities},
        train_count={name: counts[name][0] for name in modalities},
        val_count={name: counts[name][1] for name in modalities},
        num_classes=num_classes,
        skipped={name: skipped[name] for name in modalities if name in skipped},
    )
