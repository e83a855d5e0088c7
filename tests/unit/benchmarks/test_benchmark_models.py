import pytest
import torch

from benchmarks.data import MultimodalData, Split
from benchmarks.models import MLP, ConvNet, MultimodalClassifier, classifier_for, encoder_for


def classifier(fusion: str = "concat") -> MultimodalClassifier:
    return MultimodalClassifier({"a": MLP(4, (8, 3)), "b": MLP(6, (5,))}, 2, fusion)  # type: ignore[arg-type]


def test_concat_is_one_linear_head_on_all_features() -> None:
    model, x, y = classifier(), torch.randn(7, 4), torch.randn(7, 6)
    features = torch.cat([model.encoders["a"](x), model.encoders["b"](y)], dim=1)
    assert torch.equal(model(x, y), model.head(features))


def test_sum_adds_each_modalitys_own_logits() -> None:
    model, x, y = classifier("sum"), torch.randn(7, 4), torch.randn(7, 6)
    assert isinstance(model.head, torch.nn.ModuleDict)
    own = [model.head[name](model.encoders[name](inputs)) for name, inputs in (("a", x), ("b", y))]
    assert torch.allclose(model(x, y), own[0] + own[1])


def test_inputs_and_fusion_are_checked() -> None:
    with pytest.raises(ValueError, match="zip"):
        classifier()(torch.randn(7, 4))
    with pytest.raises(ValueError, match=r"`fusion` should be .* Found 'mean'"):
        classifier("mean")


@pytest.mark.parametrize(
    ("shape", "kind"), [((1, 28, 28), ConvNet), ((1, 8, 8), MLP), ((1, 8, 5), MLP), ((76,), MLP)]
)
def test_encoder_follows_the_samples_shape(shape: tuple[int, ...], kind: type) -> None:
    encoder = encoder_for(shape)
    assert isinstance(encoder, kind)
    assert encoder(torch.randn(3, *shape)).shape == (3, encoder.out_features)


def test_classifier_for_takes_some_of_the_modalities() -> None:
    split = Split({"a": torch.randn(5, 4), "b": torch.randn(5, 1, 28, 28)}, torch.arange(5))
    data = MultimodalData("made", split, split, split, 5, {"a": "", "b": ""}, "", split.inputs)
    assert list(classifier_for(data).encoders) == ["a", "b"]
    assert classifier_for(data, ["b"])(split.inputs["b"]).shape == (5, 5)
