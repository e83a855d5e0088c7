"""What is dropped of which outputs: structures, dimensions, frames, presence, rescaling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import balanceopt as bo
from balanceopt.prediction._drop import rescale_factors, sample_kept
from tests.dropping import dropping, fused, inputs_of, kept, step, warm
from tests.models import NAMES, Concat, ConcatOfWrapped, Signal, Tokens, Wrapped, linear, mlp, watch
from tests.training import answering, backward, class_zero, small_model


def sent_by(model, modality="audio", number=1):
    """What the encoder's output has become when its caller gets it."""
    encoder, position = model.encoders[modality], list(model.encoders).index(modality)
    return encoder(class_zero(model, number)[0][position])


@pytest.mark.parametrize("wrapping", ["tuple", "list", "dict", "namedtuple", "dataclass", "pooled"])
def test_structured_outputs_keep_their_form(wrapping):
    model, _ = warm(model=ConcatOfWrapped(wrapping), q_base=1)
    output = sent_by(model)
    assert type(output) is type(model.encoders["audio"].wrap(torch.ones(1, 4)))
    assert not model.unwrap(output).any()


def test_every_floating_tensor_is_dropped_and_nothing_else():
    def wrap(z):
        return {
            "z": z,
            "tokens": z.unsqueeze(1),
            "mask": torch.ones(len(z), 2, dtype=torch.bool),
            "loss": z.mean(),
        }

    class Model(Concat):
        def fuse(self, features):
            return super().fuse([f["z"] for f in features])

    model, _ = warm(model=Model(encoder=lambda n, d: Wrapped(mlp(n, d), wrap)), q_base=1)
    output = sent_by(model)
    assert not output["z"].any()
    assert not output["tokens"].any()
    assert output["mask"].all()
    assert output["loss"] != 0


@pytest.mark.parametrize(
    ("encoder", "between"), [(Signal, lambda z: z.mean(2)), (Tokens, lambda z: z.mean(1))]
)
def test_maps_and_tokens_are_dropped_whole(encoder, between):
    model, _ = warm(model=Concat(encoder=encoder, between=between), q_base=1)
    assert kept(fused(model)).tolist() == [[False] * 8, [True] * 8]
    assert not sent_by(model).any()


def test_an_encoder_with_the_samples_along_another_dimension_is_refused():
    class Recurrent(Concat):
        def encode(self, *inputs):
            return [
                encoder(x.unsqueeze(0))[0][0]
                for encoder, x in zip(self.encoders.values(), inputs, strict=True)
            ]

    monitor = watch(Recurrent(encoder=nn.LSTM), select=dict.fromkeys(NAMES[:2], lambda output: output[0][0]))
    with pytest.raises(ValueError, match=r"encoder of 'audio', a LSTM with batch_first=False"):
        bo.OPM(monitor)
    assert not monitor.hooks.transforms
    assert not monitor._scorer.buffers


def test_rows_that_do_not_fit_the_samples_are_refused():
    class Recurrent(Concat):
        def fuse(self, features):
            return super().fuse([z for z, _ in features])

    model = Recurrent(encoder=lambda n, d: Wrapped(mlp(n, d), lambda z: (z, torch.ones(3, len(z), 2))))
    with pytest.raises(ValueError, match=r"each of the 8 samples along dimension 0. Found shape \(3, 8, 2\)"):
        warm(model=model)  # in the first forward, not when the first sample is dropped


def test_an_output_without_tensors_is_refused():
    model: Any = Concat(encoder=lambda n, d: Wrapped(mlp(n, d), lambda z: z))
    modulator = bo.OPM(watch(model, select={"audio": lambda o: o.z, "visual": lambda o: o}))

    class Opaque:
        def __init__(self, z):
            self.z = z

    model.encoders["audio"].wrap = Opaque
    with pytest.raises(TypeError, match="encoder of 'audio' should return a tensor of features"):
        model.encoders["audio"](class_zero(model)[0][0])
    assert modulator.stats()["dropping"] == 0


class Frames(nn.Module):
    """Three frames of a clip, one after the other: `(3 B, D)`."""

    def __init__(self, inputs, width):
        super().__init__()
        self.net = linear(inputs, width)

    def forward(self, x):
        return self.net(x).repeat_interleave(3, 0) + torch.arange(3.0).repeat(len(x)).unsqueeze(1)


class Clips(Concat):
    """As published audio-visual models: the picture's encoder sees frames, averaged only after it."""

    def __init__(self, frames_first):
        super().__init__()
        self.encoders["visual"] = Frames(6, 4)
        self.frames_first = frames_first

    def encode(self, *inputs):
        order = ["visual", "audio"] if self.frames_first else ["audio", "visual"]
        found = {name: self.encoders[name](inputs[self.names.index(name)]) for name in order}
        return [found["audio"], found["visual"].unflatten(0, (-1, 3)).mean(1)]


@pytest.mark.parametrize("frames_first", [False, True])
def test_all_frames_of_a_sample_go_together(frames_first):
    model, modulator = warm((0.2, 0.8), model=Clips(frames_first), seed=5)
    frames = []
    model.encoders["visual"].register_forward_hook(lambda module, args, output: frames.append(output))
    mask = kept(fused(model))
    assert 0 < mask[1].sum() < 8
    assert torch.equal(frames[0].any(1), mask[1].repeat_interleave(3))
    assert modulator.state_dict()["repeats"] == {"audio": 1, "visual": 3}


def test_a_smaller_last_batch_is_no_matter():
    model, _ = warm((0.2, 0.8), model=Clips(True))
    fused(model)
    inputs = [x[:3] for x in class_zero(model, 2)[0]]
    assert kept(fused(model, inputs=inputs)).shape == (2, 3)


def test_samples_without_the_weak_modality_keep_the_other():
    model, modulator = warm(q_base=1)
    fused(model)
    assert modulator.monitor.hooks.latest is not None
    modulator.monitor.hooks.latest.closed = True  # as a step of an optimizer does
    has_visual = torch.arange(8) < 5
    modulator.monitor.observe(torch.zeros(8, dtype=torch.long), present={"visual": has_visual})
    assert torch.equal(kept(fused(model))[0], ~has_visual)


def test_an_empty_batch_passes():
    model, _ = warm()
    assert fused(model, inputs=[x[:0] for x in class_zero(model)[0]]).shape == (0, 8)


def test_features_that_are_not_finite_are_zero_when_dropped():
    model, _ = warm(q_base=1)
    inputs = class_zero(model)[0]
    inputs[0] = inputs[0] * torch.inf
    assert not fused(model, inputs=inputs)[:, :4].any()


def rescaled(rescale: Any, widths=4, **options):
    model, modulator = warm(model=small_model(width=widths), rescale=rescale, **options)
    inputs, _ = class_zero(model, 1)
    with torch.no_grad():
        z = model.encode(*inputs)
    with inputs_of(model.head) as seen:
        model(*inputs)
    return seen[0].split(model.widths, 1), z, modulator.q


def test_official_rescaling_divides_all_features():
    x, z, q = rescaled("official", widths=(2, 6))
    theta = 2 * q[0] / 8
    held = (x[0] != 0).any(1)
    assert 0 < held.sum() < 8
    torch.testing.assert_close(x[0][held], z[0][held] / (1 - theta))
    torch.testing.assert_close(x[1], z[1] / (1 - theta))


def test_rescaling_acts_on_the_gradient_too():
    grads = []
    kinds: list[Any] = ["none", "official"]
    for rescale in kinds:
        model, modulator = warm(model=small_model(encoder=linear), rescale=rescale)
        inputs, _ = class_zero(model, 1)
        with torch.enable_grad():
            features = model.encode(*inputs)
        features[1].sum().backward()
        grads.append(model.get_parameter("encoders.visual.weight").grad)
    torch.testing.assert_close(grads[1], grads[0] / (1 - modulator.q.mean()))


def test_nothing_is_divided_by_zero():
    everything = torch.ones(2)
    factors = rescale_factors(everything, "official")
    assert factors is not None
    assert factors.tolist() == [1, 1]
    assert rescale_factors(everything, "none") is None


def test_widths_without_a_linear_head_are_those_of_the_features():
    model, modulator = dropping(model=Concat(encoder=Signal, between=lambda z: z.mean(2)), rescale="official")
    model.encoders["audio"](class_zero(model)[0][0])
    assert modulator.state_dict()["widths"] == {"audio": 4}


def test_an_encoder_called_twice_drops_the_same_samples():
    class Twice(Concat):
        def encode(self, *inputs):
            self.both = [self.encoders["audio"](inputs[0]) for _ in range(2)]
            return [self.both[1], self.encoders["visual"](inputs[1])]

    model, _ = warm(model=Twice())
    model(*class_zero(model)[0])
    assert torch.equal(*model.both)
    assert not model.both[0].all()


def test_a_sample_that_would_lose_all_keeps_what_is_dropped_least():
    generator = torch.Generator().manual_seed(0)
    kept_by = sample_kept(torch.tensor([1.0, 0.9, 1.0]), 500, generator)
    assert kept_by.any(0).all()
    assert kept_by[1].all()
    assert not kept_by[0].any()


def test_a_user_function_gets_clean_features():
    seen = []

    def scores(features):
        seen.append(features)
        return answering(0.8, 0.2)(features)

    model = small_model()
    modulator = bo.OPM(watch(model, scores=scores), q_base=1, seed=0)
    for number in range(2):
        backward(model, class_zero(model, number))
    assert modulator.stats()["dropping"] == 1
    assert all(z.all() for features in seen for z in features.values())


def test_one_sample_more_or_less_is_drawn_alike():
    model, _ = warm()
    step(model, size=5)
    assert kept(fused(model)).shape == (2, 8)


class Recurrent(Concat):
    """The picture's encoder is torch's own recurrent layer, whose last state goes into the fusion."""

    def __init__(self, kind, wrapped=False):
        super().__init__()
        layer = kind(6, 4, batch_first=True)
        self.encoders["visual"] = Wrapped(layer, lambda output: output) if wrapped else layer

    def encode(self, *inputs):
        output = self.encoders["visual"](inputs[1].unsqueeze(1).expand(-1, 3, -1))
        state = output[1][0] if isinstance(output[1], tuple) else output[1]
        return [self.encoders["audio"](inputs[0]), state[-1]]


@pytest.mark.parametrize("samples", [8, 1])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_states_of_recurrent_layers_lose_the_same_samples(kind, samples):
    model, _ = warm((0.2, 0.8), model=Recurrent(kind), q_base=1)
    shown: list[Any] = []
    model.encoders["visual"].register_forward_hook(lambda module, args, output: shown.append(output))
    inputs = [x[:samples] for x in class_zero(model)[0]]
    mask = kept(fused(model, inputs=inputs))[1]
    output, states = shown[0]
    for state in states if isinstance(states, tuple) else (states,):
        assert state.shape == (1, samples, 4)
        assert torch.equal(state[0].any(1), mask)
    assert torch.equal(output.flatten(1).any(1), mask)


def test_states_from_a_module_around_a_recurrent_layer_are_refused_in_the_first_forward():
    with pytest.raises(ValueError, match=r"encoder of 'visual' returns.*Found shape \(1, 8, 4\)"):
        warm(model=Recurrent(nn.GRU, wrapped=True))


class Lacking(Concat):
    """The sound's encoder runs on every other sample."""

    def __init__(self, first):
        super().__init__()
        self.first = first

    def encode(self, *inputs):
        found, has = {}, torch.arange(len(inputs[0])) % 2 == 0
        for name in (self.first, *(n for n in self.names if n != self.first)):
            x = inputs[self.names.index(name)]
            found[name] = self.encoders[name](x[has] if name == "audio" else x)
        padded = torch.zeros_like(found["visual"]).index_put((has,), found["audio"])
        return [padded, found["visual"]]


@pytest.mark.parametrize("first", NAMES[:2])
@pytest.mark.parametrize("told", [False, True])
def test_an_encoder_on_some_samples_is_refused_or_given_them_by_present(first, told):
    model = Lacking(first)
    monitor = watch(model)
    modulator = bo.OPM(monitor, seed=0)
    modulator.load_state_dict(modulator.state_dict() | {"q": torch.tensor([1.0, 0.5])})
    inputs = class_zero(model)[0]
    if not told:
        with pytest.raises(ValueError, match=r"encoder of '\w+' returns should have.*samples.*present="):
            model(*inputs)
        return
    shown: list[Tensor] = []
    model.encoders["audio"].register_forward_hook(lambda module, args, output: shown.append(output))
    has = torch.arange(8) % 2 == 0
    monitor.observe(torch.zeros(8, dtype=torch.long), present={"audio": has})
    mask = kept(fused(model, inputs=inputs))
    assert mask[1][~has].all()  # who has nothing else keeps it
    assert torch.equal(shown[0].any(1), mask[0][has])
    assert mask.any(0).all()
