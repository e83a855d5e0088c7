"""The papers' models, and whole configurations on made files."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import balanceopt as bo
from benchmarks import accuracy
from benchmarks.evidence import paper
from benchmarks.evidence.configs import CONFIGS, bottlenecks, convolutions, resnets, sequences
from benchmarks.evidence.results import Results
from benchmarks.models import MultimodalClassifier
from benchmarks.originals import av_mnist, cmu_mosi, crema_d, kinetics_sounds, ucf101
from benchmarks.resnet import ResNet18
from benchmarks.transformer import BottleneckClassifier, PatchEncoder

PICTURES = {"audio": torch.randn(1, 40, 50), "visual": torch.randn(3, 2, 32, 32)}


def test_resnet18_has_the_original_number_of_weights():
    # 11,689,512 with its classifier of 512 x 1000 + 1000.
    assert sum(p.numel() for p in ResNet18().parameters()) == 11_689_512 - 513_000


def test_resnet18_averages_over_frames():
    model = ResNet18(3, width=8).eval()
    clip = torch.randn(2, 3, 4, 32, 32)
    frames = torch.stack([model(clip[:, :, t]) for t in range(4)]).mean(dim=0)
    assert model(clip).shape == (2, 64)
    torch.testing.assert_close(model(clip), frames)


@pytest.mark.parametrize("make", [resnets, bottlenecks, convolutions])
def test_models_take_the_data_as_they_are(make):
    inputs = {
        "audio": PICTURES["audio"],
        "visual": PICTURES["visual"][:, 0] if make is convolutions else PICTURES["visual"],
    }
    model = make(inputs, 6).eval()
    with torch.no_grad():
        assert model(*(torch.stack([x, x]) for x in inputs.values())).shape == (2, 6)


def test_sequences():
    inputs = {"text": torch.randn(10, 12), "audio": torch.randn(10, 5)}
    assert sequences(inputs, 2)(*(x[None] for x in inputs.values())).shape == (1, 2)


def test_modalities_meet_in_the_bottleneck_and_nowhere_else():
    encoders = {m: PatchEncoder((1, 16, 16), width=32, patch=8, layers=1) for m in ("a", "b")}
    one = BottleneckClassifier(encoders, 3, layers=1).eval()
    two = BottleneckClassifier(encoders, 3, layers=2).eval()
    a, b, other = torch.randn(3, 1, 1, 16, 16)
    for model, meets in ((one, False), (two, True)):
        model.head.weight.data[:, 32:] = 0  # only what has become of a
        assert torch.allclose(model(a, b), model(a, other), atol=1e-6) != meets


def test_the_monitor_scores_the_bottleneck_model():
    encoders = {m: PatchEncoder((1, 16, 16), width=32, patch=8, layers=1) for m in ("a", "b")}
    model = BottleneckClassifier(encoders, 3)
    monitor = bo.ModalityMonitor(model, dict(model.encoders.items()), head=model.head)
    optimizer = bo.ModulatedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), monitor)
    for _ in range(2):
        optimizer.zero_grad()
        logits = model(*torch.randn(2, 8, 1, 16, 16))
        torch.nn.functional.cross_entropy(logits, torch.arange(8) % 3).backward()
        optimizer.step()
    assert optimizer.stats()["modulated"] == 2


@pytest.fixture
def tiny(monkeypatch):
    """The configurations of one epoch with narrow models."""

    def narrow(inputs, num_classes):
        return MultimodalClassifier(
            {m: ResNet18(x.shape[0], width=4) for m, x in inputs.items()}, num_classes
        )

    for name, config in CONFIGS.items():
        model = narrow if config.model is resnets else config.model
        monkeypatch.setitem(CONFIGS, name, replace(config, model=model, epochs=1, batch_size=8))


@pytest.mark.parametrize(
    ("name", "load", "root"),
    [
        ("crema-d-ogm", crema_d, "crema_root"),
        ("crema-d-mbt-relearn", crema_d, "crema_root"),
        ("kinetics-sounds-opm", kinetics_sounds, "kinetics_root"),
        ("ucf-101-relearn", ucf101, "ucf_root"),
    ],
)
def test_the_last_row_of(name, load, root, request, tmp_path, tiny, monkeypatch):
    # Pictures of the full size take time.
    config = replace(CONFIGS[name], load=lambda folder, seed: load(folder, seed, size=32))
    monkeypatch.setitem(CONFIGS, name, config)
    row = [*config.methods][-1]
    folder = request.getfixturevalue(root)
    text = paper.reproduce(name, folder, Results(tmp_path / "r.jsonl"), seeds=[0], rows=[row], workers=0)
    assert text.splitlines()[-1].startswith(f"| {row} | ")


def test_every_row_of_av_mnist_and_where_it_goes_on(av_mnist_root, tmp_path, tiny, capsys):
    command = [
        "--config",
        "av-mnist-ogm",
        "--data",
        str(av_mnist_root),
        "--seeds",
        "1",
        "--out",
        str(tmp_path / "o"),
    ]
    command += ["--jobs", "1"]
    accuracy.main(command)
    first = capsys.readouterr().out
    config = CONFIGS["av-mnist-ogm"]
    lines = (tmp_path / "o" / "av-mnist-ogm.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == list(
        config.rows(av_mnist(av_mnist_root).modalities)
    )
    accuracy.main(command)
    assert capsys.readouterr().out == first
    assert len((tmp_path / "o" / "av-mnist-ogm.jsonl").read_text().splitlines()) == len(lines)


def test_every_row_of_cmu_mosi(mosi_root, tmp_path, tiny):
    text = paper.reproduce("cmu-mosi-relearn", mosi_root, Results(tmp_path / "r.jsonl"), seeds=[0], workers=0)
    for row in CONFIGS["cmu-mosi-relearn"].rows(cmu_mosi(mosi_root).modalities):
        assert f"\n| {row} |" in text


def test_missing_data_and_rows_are_told(tmp_path, mosi_root, capsys):
    for arguments, message in (
        (["--config", "crema-d-ogm"], "--config needs --data"),
        (["--config", "crema-d-ogm", "--data", str(tmp_path)], "there should be"),
        (
            ["--config", "cmu-mosi-relearn", "--data", str(mosi_root), "--rows", "OGX"],
            "`--rows` should be among",
        ),
    ):
        with pytest.raises(SystemExit):
            accuracy.main(arguments)
        assert message in capsys.readouterr().err
