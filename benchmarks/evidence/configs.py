"""The papers' settings by name: data, model, training and method, for whoever has the data and a GPU.

Where a paper and its published code differ, the paper's setting is taken and the code's is said in `about`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks.models import ConvNet, MultimodalClassifier
from benchmarks.originals import ClipData, av_mnist, cmu_mosi, crema_d, kinetics_sounds, ucf101
from benchmarks.resnet import ResNet18
from benchmarks.transformer import BottleneckClassifier, PatchEncoder, SequenceEncoder

# From a first sample's inputs by modality and the number of classes to a model.
MakeModel = Callable[[Mapping[str, Tensor], int], nn.Module]


@dataclass(frozen=True)
class Config:
    """A paper's setting.

    Args:
        about: where it is from, and what differs.
        load: data of (folder, seed).
        model: makes it.
        methods: row -> options of `benchmarks.evidence.building`.
        lr: of SGD, momentum 0.9.
        epochs: of the training.
        batch_size: samples in a step.
        decay_epoch: after it the learning rate is a tenth; None for never.
        weight_decay: L2 penalty.
        options: of all rows.
    """

    about: str
    load: Callable[[Path, int], ClipData]
    model: MakeModel
    methods: Mapping[str, Mapping[str, Any]]
    lr: float = 1e-3
    epochs: int = 100
    batch_size: int = 64
    decay_epoch: int | None = 70
    weight_decay: float = 1e-4
    options: Mapping[str, Any] = field(default_factory=dict)

    def rows(self, modalities: tuple[str, ...]) -> dict[str, tuple[str | None, dict[str, Any]]]:
        """Row -> the only modality it trains (None for all) and its options."""
        shared = {"lr": self.lr, "epochs": self.epochs, "weight_decay": self.weight_decay, **self.options}
        alone = {f"{m} alone": (m, shared) for m in modalities}
        methods = {**_COMPARED, **self.methods}
        return {"joint": (None, shared), **alone, **{n: (None, {**shared, **o}) for n, o in methods.items()}}


def resnets(inputs: Mapping[str, Tensor], num_classes: int) -> nn.Module:
    """A ResNet-18 from scratch for each modality, concatenated, and a linear head: the papers' usual model."""
    return MultimodalClassifier({m: ResNet18(x.shape[0]) for m, x in inputs.items()}, num_classes)


def bottlenecks(inputs: Mapping[str, Tensor], num_classes: int) -> nn.Module:
    """Transformers that meet in bottleneck tokens, much smaller than the original."""
    return BottleneckClassifier({m: PatchEncoder(tuple(x.shape)) for m, x in inputs.items()}, num_classes)


def sequences(inputs: Mapping[str, Tensor], num_classes: int) -> nn.Module:
    """Transformers over time, concatenated, and a linear head."""
    encoders = {m: SequenceEncoder(x.shape[1], length=x.shape[0]) for m, x in inputs.items()}
    return MultimodalClassifier(encoders, num_classes)


def convolutions(inputs: Mapping[str, Tensor], num_classes: int) -> nn.Module:
    """Three convolutions for each modality, concatenated, and a linear head."""
    encoders = {m: ConvNet(x.shape[0], (16, 32, 64)) for m, x in inputs.items()}
    return MultimodalClassifier(encoders, num_classes)


# What a practitioner would try first.
_COMPARED: dict[str, dict[str, Any]] = {
    "fixed modality dropout": {"dropout_p": 0.3},
    "uni-modal losses": {"unimodal_heads": "own", "unimodal_weight": 1.0},
}
_OGM = {
    "OGM": {"ogm_alpha": 0.8, "ogm_noise": False, "ogm_epochs": (0, 50)},
    "OGM-GE": {"ogm_alpha": 0.8, "ogm_noise": True, "ogm_epochs": (0, 50)},
}
_OPM = {
    "OPM": {"opm_q_base": 0.5},
    "OGM + OPM": {"opm_q_base": 0.5, "ogm_alpha": 0.8, "ogm_noise": False},
}
_AMSS = {
    "AMSS": {"amss_scale": "none", "amss_temperature": 0.2},
    'AMSS+ "unbiased"': {"amss_scale": "unbiased", "amss_temperature": 0.2},
}


def _relearning(lam: float, every: int) -> dict[str, dict[str, Any]]:
    alone = {"relearn_lam": lam, "relearn_every": every}
    return {
        "re-learning": alone,
        "re-learning + uni-modal losses": {**alone, **_COMPARED["uni-modal losses"]},
    }


CONFIGS: dict[str, Config] = {
    "crema-d-ogm": Config(
        "OGM-GE (CVPR 2022), its CREMA-D script: one frame a clip, modulated in epochs 0 to 50.",
        crema_d, resnets, _OGM,
    ),
    "crema-d-opm": Config(
        "OPM (TPAMI 2024) on CREMA-D, three frames; options of its training script.",
        partial(crema_d, frames=3), resnets, _OPM,
    ),
    "crema-d-amss": Config(
        "AMSS (TPAMI 2024): learning rate 1e-2, 80 epochs, falling after 60.",
        crema_d, resnets, _AMSS, lr=1e-2, epochs=80, decay_epoch=60,
    ),
    "crema-d-relearn": Config(
        "Diagnosing & Re-learning (ECCV 2024): every 20 epochs, lam 3; the paper's learning rate (its code: 2e-3).",
        crema_d, resnets, _relearning(3.0, 20), epochs=90, decay_epoch=None,
    ),
    "crema-d-mbt-relearn": Config(
        "The same with a transformer of the kind of MBT, much smaller than the original and from scratch.",
        crema_d, bottlenecks, _relearning(3.0, 20), epochs=90, decay_epoch=None,
    ),
    "kinetics-sounds-opm": Config(
        "OPM (TPAMI 2024) on Kinetics-Sounds: batch 32, SGD as its table says (its code: AdamW 5e-5).",
        kinetics_sounds, resnets, _OPM, batch_size=32,
    ),
    "kinetics-sounds-relearn": Config(
        "Diagnosing & Re-learning (ECCV 2024): every 20 epochs, lam 7.",
        kinetics_sounds, resnets, _relearning(7.0, 20), epochs=90, decay_epoch=None,
    ),
    "ucf-101-relearn": Config(
        "Diagnosing & Re-learning (ECCV 2024): every 20 epochs, lam 7. The paper starts from ImageNet's weights, this "
        "from scratch: its accuracies can't be reached.",
        ucf101, resnets, _relearning(7.0, 20), epochs=90, decay_epoch=None,
    ),
    "cmu-mosi-relearn": Config(
        "Diagnosing & Re-learning (ECCV 2024): every 5 epochs, lam 8; small transformers, 30 epochs (ours).",
        cmu_mosi, sequences, _relearning(8.0, 5), epochs=30, decay_epoch=None, lr=1e-2,
    ),
    "av-mnist-ogm": Config(
        "AV-MNIST with small convolutions; options of OGM-GE's script, 25 epochs at learning rate 1e-2 (ours).",
        av_mnist, convolutions, _OGM, lr=1e-2, epochs=25, decay_epoch=18,
    ),
}  # fmt: skip
