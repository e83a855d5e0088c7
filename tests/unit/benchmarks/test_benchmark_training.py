from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.data import MultimodalData, Split
from benchmarks.experiment import compare, runs
from benchmarks.methods import METHODS, Context, Method, joint, plain
from benchmarks.models import MultimodalClassifier, classifier_for
from benchmarks.training import Recipe, batches, evaluate, fit, linear_probe, train_alone

RECIPE = Recipe(epochs=4, lr=0.05, batch_size=16)


def made_split(count: int) -> Split:
    labels = torch.arange(count) % 3
    signal = torch.nn.functional.one_hot(labels, 3) + 0.1 * torch.randn(count, 3)
    return Split({"signal": signal, "noise": torch.randn(count, 4)}, labels)


@pytest.fixture
def data() -> MultimodalData:
    train, val, test = (made_split(count) for count in (96, 32, 60))
    about = {"signal": "tells the class", "noise": "tells nothing"}
    return MultimodalData("made", train, val, test, 3, about, "made up", test.inputs)


def trained(data: MultimodalData, build: Callable[..., Method], **options: object) -> MultimodalClassifier:
    torch.manual_seed(0)
    model = classifier_for(data)
    fit(model, build, data, replace(RECIPE, **options))  # type: ignore[arg-type]
    return model


def weights(model: torch.nn.Module) -> Tensor:
    return torch.nn.utils.parameters_to_vector(model.parameters())


def test_watched_joint_training_is_plain_training_bit_for_bit(data: MultimodalData) -> None:
    assert torch.equal(weights(trained(data, joint)), weights(trained(data, plain)))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_repeats_and_leaves_no_hook(data: MultimodalData, name: str) -> None:
    model = trained(data, METHODS[name])
    assert torch.equal(weights(model), weights(trained(data, METHODS[name])))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_loop_calls_what_a_method_brings(data: MultimodalData) -> None:
    called: list[str] = []

    def build(model: MultimodalClassifier, context: Context) -> Method:
        def extra(labels: Tensor) -> Tensor:
            called.append("loss")
            return torch.zeros(())

        return replace(
            plain(model, context),
            losses=(extra,),
            epoch_ends=(lambda: called.append("epoch"),),
            removes=(lambda: called.append("removed"),),
        )

    trained(data, build, epochs=2)
    assert called == [*["loss"] * 6, "epoch", *["loss"] * 6, "epoch", "removed"]


def test_probe_and_alone_tell_a_clear_modality_from_noise(data: MultimodalData) -> None:
    for modality, low, high in (("signal", 95, 100), ("noise", 0, 60)):
        model = train_alone(data, modality, RECIPE)
        probe = linear_probe(model.encoders[modality], data, modality)
        assert low <= probe <= high
        assert probe == linear_probe(model.encoders[modality], data, modality)
        assert low <= evaluate(model, data.test) <= high


def test_batches_are_shuffled_by_the_seed(data: MultimodalData) -> None:
    first, again, other = (batches(data.train, ("noise",), 16, seed) for seed in (0, 0, 1))
    inputs, labels = next(iter(first))
    assert (inputs.shape, labels.shape, len(list(first))) == ((16, 4), (16,), 6)
    assert torch.equal(inputs, next(iter(again))[0])
    assert not torch.equal(inputs, next(iter(other))[0])


def test_batches_leave_the_global_stream_alone(data: MultimodalData) -> None:
    before = torch.get_rng_state()
    list(batches(data.train, ("noise",), 16, 0))
    assert torch.equal(before, torch.get_rng_state())


def test_compare_trains_everything_once_a_seed(data: MultimodalData) -> None:
    told: list[str] = []
    found = compare(lambda seed: data, METHODS, replace(RECIPE, epochs=1), (0, 1), told.append)
    assert len(told) == runs(data, METHODS, (0, 1))
    assert set(told) == {"signal alone", "noise alone", *METHODS}
    assert found.seeds == 2
    outcome = found.methods["OGM-GE"][1]
    assert set(outcome.probes) == {"signal", "noise"}
    assert {"ratio", "coefficient"} <= set(outcome.curves)
    assert len(outcome.curves["ratio"]["signal"]) == 6
    assert outcome.mean("ratio", "signal") > 1
