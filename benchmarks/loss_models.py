"""Small models of public families with random weights, each with a loss and made data, for `benchmarks.loss_pairs`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.extras import need

SAMPLES = 6
WORDS = 40
_IMAGE = WORDS - 1
_WIDE = {"initializer_range": 0.4}  # scores of the default weights are all alike
_SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    **_WIDE,
}
_PICTURE = {"image_size": 16, "patch_size": 8}
_UNDROPPED = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass
class Case:
    """A model, a loss and a batch.

    Attributes:
        model: the model.
        encoders: each modality's encoder.
        head: the monitor's `head`.
        inputs: the model's keyword arguments.
        train: makes the loss of the model's output.
        target: what the loss compares with the prediction, `(B, ...)`, each label at the position that predicts it.
        criterion: the monitor's `loss`; None for cross-entropy.
        scores: kind of uni-modal prediction: "split", "per-head" or "zero-out".
        source: where the targets come from.
        features: by modality, the feature tensor in an encoder's output, for "split" and "per-head".
        tokens: whether a prediction's classes are last.
        options: further options of the monitor.
    """

    model: nn.Module
    encoders: dict[str, nn.Module]
    head: Any
    inputs: dict[str, Any]
    train: Callable[[Any], Tensor]
    target: Tensor
    criterion: Any = None
    scores: str = "zero-out"
    source: str = "loss"
    features: dict[str, Callable[[Any], Tensor]] = field(default_factory=dict)
    tokens: bool = False
    options: dict[str, Any] = field(default_factory=dict)


# -- models written here -------------------------------------------------------------------------------------------


def _same(output: Tensor) -> Tensor:
    return output


def _first_token(output: Any) -> Tensor:
    return output.last_hidden_state[:, 0]


def _last_state(output: Any) -> Tensor:
    return output[1][0][-1] if isinstance(output[1], tuple) else output[1][-1]


def _averaged(output: Any) -> Tensor:
    return output.last_hidden_state.mean(1)


def _pooled(output: Any) -> Tensor:
    return output.pooler_output.flatten(1)


class Fusion(nn.Module):
    """Encoders, and a head over a tensor picked from each one's output."""

    def __init__(
        self, encoders: Mapping[str, nn.Module], picks: Mapping[str, Callable[[Any], Tensor]], head: nn.Module
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(dict(encoders))
        self.picks = dict(picks)
        self.head = head

    def encoded(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        outputs = {
            name: encoder(**inputs[name]) if isinstance(inputs[name], dict) else encoder(inputs[name])
            for name, encoder in self.encoders.items()
        }
        return [self.picks.get(name, _same)(output) for name, output in outputs.items()]

    def forward(self, **inputs: Any) -> Tensor:
        return self.head(torch.cat(self.encoded(inputs), 1))


class Late(Fusion):
    """A head for each modality, whose outputs are added up."""

    def forward(self, **inputs: Any) -> Tensor:
        heads: Any = self.head
        return torch.stack(
            [heads[m](z) for m, z in zip(self.encoders, self.encoded(inputs), strict=True)]
        ).sum(0)


class Gate(nn.Module):
    """The first half of the features opens the second one."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.gate, self.drop, self.out = (
            nn.Linear(width, width),
            nn.Dropout(0.3),
            nn.Linear(width, outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return self.out(self.drop(self.gate(a).sigmoid() * b.tanh()))


class Dense(Fusion):
    """Maps of both modalities, a head at a quarter of the resolution, and its output upsampled."""

    def forward(self, **inputs: Any) -> Tensor:
        small = self.head(torch.cat(self.encoded(inputs), 1))
        return F.interpolate(small, scale_factor=4, mode="bilinear")


class Signals(nn.Module):
    """Two layers of convolutions over a picture or a signal, averaged."""

    def __init__(self, channels: int, width: int, *, dims: int = 2) -> None:
        super().__init__()
        conv: Any = nn.Conv2d if dims == 2 else nn.Conv1d
        norm: Any = nn.BatchNorm2d if dims == 2 else nn.BatchNorm1d
        self.body = nn.Sequential(
            conv(channels, 8, 3, 2), norm(8), nn.ReLU(), conv(8, width, 3, 2), nn.Flatten(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean(2)


def _mlp(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, outputs))


# -- models of Transformers ----------------------------------------------------------------------------------------


def _bert() -> nn.Module:
    t = need("transformers")
    return t.BertModel(t.BertConfig(vocab_size=WORDS, **_SMALL, **_UNDROPPED))


def _vit() -> nn.Module:
    t = need("transformers")
    return t.ViTModel(t.ViTConfig(**_SMALL, **_PICTURE, **_UNDROPPED))


def _resnet() -> nn.Module:
    t = need("transformers")
    return t.ResNetModel(
        t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    )


def _wav2vec2() -> nn.Module:
    t = need("transformers")
    config = t.Wav2Vec2Config(
        **_SMALL,
        conv_dim=(8, 8),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
        layerdrop=0.0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        feat_proj_dropout=0.0,
        final_dropout=0.0,
    )
    return t.Wav2Vec2Model(config)


def llava(words: int = WORDS) -> nn.Module:
    """Build a LLaVA with four image tokens, of id `words - 1`."""
    t = need("transformers")
    text = {**_SMALL, "hidden_size": 24, "num_key_value_heads": 2}
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**_SMALL, **_PICTURE),
        text_config=t.LlamaConfig(vocab_size=words, **text),
        image_token_index=words - 1,
        vision_feature_layer=-1,
        image_seq_length=4,
    )
    return t.LlavaForConditionalGeneration(config)


def _inside(model: Any) -> Any:
    # Older versions of transformers have the parts in the model itself.
    return getattr(model, "model", model)


def llava_encoders(model: Any) -> dict[str, nn.Module]:
    return {"image": _inside(model).vision_tower, "text": model.get_input_embeddings()}


def _ids(length: int) -> Tensor:
    return torch.randint(5, 20, (SAMPLES, length))


def _pictures(channels: int = 3, size: int = 16) -> Tensor:
    return torch.randn(SAMPLES, channels, size, size)


def _own_loss(output: Any) -> Tensor:
    return output.loss


def _shifted(labels: Tensor) -> Tensor:
    """Return the label that each position predicts, -100 for the last one."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)


def _some(labels: Tensor, prompt: int) -> Tensor:
    """Ignore the prompt, and the end of every second sample as padding."""
    labels = labels.clone()
    labels[:, :prompt] = -100
    labels[::2, -2:] = -100
    return labels


def _llava(*, own: bool) -> Case:
    model: Any = llava()
    ids = torch.cat([torch.full((SAMPLES, 4), _IMAGE), _ids(8)], 1)
    labels = _some(ids, 6)
    mask = torch.ones_like(ids)
    mask[::2, -2:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": _pictures()}

    def written(output: Any) -> Tensor:
        return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    return Case(
        model,
        llava_encoders(model),
        model.get_output_embeddings(),
        {**inputs, "labels": labels} if own else inputs,
        _own_loss if own else written,
        _shifted(labels),
        source="model" if own else "gradient",
        tokens=True,
    )


def _llava_projector() -> Case:
    """Build stage 1 of LLaVA's training: a frozen tower, whose projector is the encoder."""
    case = _llava(own=True)
    model = _inside(case.model)
    model.vision_tower.requires_grad_(False)
    case.encoders["image"] = model.multi_modal_projector
    return case


def _blip2() -> Case:
    t = need("transformers")
    text = {
        "model_type": "opt",
        "vocab_size": WORDS,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_dim": 32,
        "word_embed_proj_dim": 16,
        "max_position_embeddings": 32,
        "dropout": 0.0,
        "init_std": 0.4,
        "tie_word_embeddings": False,
    }
    config = t.Blip2Config(
        vision_config={**_SMALL, **_PICTURE},
        qformer_config={"vocab_size": WORDS, **_SMALL, **_UNDROPPED, "encoder_hidden_size": 16},
        text_config=text,
        num_query_tokens=4,
        image_token_index=_IMAGE,
    )
    model = t.Blip2ForConditionalGeneration(config)
    ids = torch.cat([torch.full((SAMPLES, 4), _IMAGE), _ids(8)], 1)
    labels = _some(ids, 6)
    words = model.language_model
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": _pictures()}
    return Case(
        model,
        {"image": model.vision_model, "text": words.get_input_embeddings()},
        words.get_output_embeddings(),
        {**inputs, "labels": labels},
        _own_loss,
        _shifted(labels),
        source="model",
        tokens=True,
    )


def _blip() -> Case:
    t = need("transformers")
    text = {**_SMALL, **_UNDROPPED, "encoder_hidden_size": 16, "bos_token_id": 1, "sep_token_id": 2}
    config = t.BlipConfig(
        text_config={"vocab_size": WORDS, **text, "max_position_embeddings": 16},
        vision_config={**_SMALL, **_PICTURE},
        projection_dim=12,
    )
    model = t.BlipForConditionalGeneration(config)
    ids = _ids(8)
    labels = _some(ids, 2)
    encoders = {"image": model.vision_model, "text": model.text_decoder.bert.embeddings}
    inputs = {"input_ids": ids, "pixel_values": _pictures(), "labels": labels}
    head = model.text_decoder.cls
    return Case(model, encoders, head, inputs, _own_loss, _shifted(labels), source="model", tokens=True)


def _whisper() -> Case:
    t = need("transformers")
    config = t.WhisperConfig(
        vocab_size=WORDS,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=10,
        max_target_positions=16,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        init_std=0.4,
        tie_word_embeddings=False,
        begin_suppress_tokens=None,
    )
    model = t.WhisperForConditionalGeneration(config)
    labels = _some(_ids(7), 0)
    inputs = {"input_features": torch.randn(SAMPLES, 8, 20), "labels": labels}
    encoders = {"audio": model.model.encoder, "text": model.model.decoder.embed_tokens}
    return Case(model, encoders, model.proj_out, inputs, _own_loss, labels, source="model", tokens=True)


def _vision_encoder_decoder() -> Case:
    t = need("transformers")
    decoder = t.BertConfig(
        vocab_size=WORDS, **_SMALL, **_UNDROPPED, is_decoder=True, add_cross_attention=True
    )
    encoder = t.ViTConfig(**_SMALL, **_PICTURE, **_UNDROPPED)
    config = t.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    config.tie_word_embeddings = False
    model = t.VisionEncoderDecoderModel(config)
    labels = _some(_ids(7), 0)
    inputs = {"pixel_values": _pictures(), "labels": labels}
    encoders = {"image": model.encoder, "text": model.decoder.bert.embeddings}
    return Case(model, encoders, model.decoder.cls, inputs, _own_loss, labels, source="model", tokens=True)


def _vilt() -> Case:
    t = need("transformers")
    config = t.ViltConfig(
        vocab_size=WORDS, **_SMALL, **_PICTURE, **_UNDROPPED, num_labels=5, max_position_embeddings=16
    )
    model = t.ViltForQuestionAnswering(config)
    labels = (torch.rand(SAMPLES, 5) < 0.4).float()
    inputs = {"input_ids": _ids(8), "pixel_values": _pictures(), "labels": labels}
    embeddings = model.vilt.embeddings
    encoders = {"text": embeddings.text_embeddings, "image": embeddings.patch_embeddings}
    return Case(
        model, encoders, model.classifier, inputs, _own_loss, labels, nn.BCEWithLogitsLoss(), source="model"
    )


class ClipHead(nn.Module):
    """CLIP's normalised embeddings of both modalities, concatenated, and a linear layer."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        t = need("transformers")
        words = {"vocab_size": 50, "max_position_embeddings": 16, "eos_token_id": 49}
        small = {**_SMALL, "initializer_factor": 3.0}
        config = t.CLIPConfig(
            text_config={**small, **words}, vision_config={**small, **_PICTURE}, projection_dim=12
        )
        self.clip = t.CLIPModel(config)
        self.head = nn.Linear(24, outputs)

    def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
        features = (
            self.clip.get_text_features(input_ids=ids),
            self.clip.get_image_features(pixel_values=pixels),
        )
        # Older versions of transformers return the pooled features themselves.
        text, image = (getattr(output, "pooler_output", output) for output in features)
        return self.head(torch.cat([F.normalize(text, dim=-1), F.normalize(image, dim=-1)], 1) * 4)


def _clip() -> Case:
    model = ClipHead(4)
    encoders = {"text": model.clip.text_model, "image": model.clip.vision_model}
    y = (torch.rand(SAMPLES, 4) < 0.4).float()
    criterion = nn.BCEWithLogitsLoss()
    inputs = {"ids": _ids(8), "pixels": _pictures()}
    return Case(
        model,
        encoders,
        model.head,
        inputs,
        lambda out: F.binary_cross_entropy_with_logits(out, y),
        y,
        criterion,
        source="gradient",
    )


# -- pairs with models written here --------------------------------------------------------------------------------


def _called(
    model: Fusion, inputs: dict[str, Any], criterion: Any, target: Tensor, scores: str, **options: Any
) -> Case:
    """Build a case whose loop calls the criterion that the monitor watches."""
    head = dict(model.head.items()) if scores == "per-head" else model.head  # type: ignore[operator]
    return Case(
        model,
        dict(model.encoders.items()),
        options.pop("head", head),
        inputs,
        lambda out: criterion(out, target),
        target,
        criterion,
        scores,
        features=model.picks,
        **options,
    )


def _text_and_picture(outputs: int, criterion: Any, target: Tensor) -> Case:
    picks = {"text": _first_token, "image": _first_token}
    model = Fusion({"text": _bert(), "image": _vit()}, picks, nn.Linear(32, outputs))
    inputs = {"text": {"input_ids": _ids(8)}, "image": {"pixel_values": _pictures()}}
    return _called(model, inputs, criterion, target, "split")


def _weighted() -> Case:
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.5, 2.0]), label_smoothing=0.1)
    return _text_and_picture(4, criterion, torch.randint(4, (SAMPLES,)))


def _soft() -> Case:
    return _text_and_picture(4, nn.CrossEntropyLoss(), torch.rand(SAMPLES, 4).softmax(1))


def _genres() -> Case:
    picks = {"text": _first_token, "poster": _pooled}
    model = Fusion({"text": _bert(), "poster": _resnet()}, picks, nn.Linear(32, 7))
    y = (torch.rand(SAMPLES, 7) < 0.3).float()
    inputs = {"text": {"input_ids": _ids(8)}, "poster": {"pixel_values": _pictures(size=32)}}
    criterion = nn.BCEWithLogitsLoss(pos_weight=torch.linspace(1, 4, 7))
    return _called(model, inputs, criterion, y, "split")


def sentiment(head: nn.Module | None = None) -> Fusion:
    """Build a model of text (BERT), audio (wav2vec 2.0) and vision (LSTM over frames), one number out."""
    picks = {"text": _first_token, "audio": _averaged, "vision": _last_state}
    encoders = {"text": _bert(), "audio": _wav2vec2(), "vision": nn.LSTM(5, 8, batch_first=True)}
    return Fusion(encoders, picks, head or nn.Linear(40, 1))


def _sentiment(*, linear: bool) -> Case:
    model = sentiment(None if linear else _mlp(40, 1))
    inputs = {
        "text": {"input_ids": _ids(8)},
        "audio": {"input_values": torch.randn(SAMPLES, 400)},
        "vision": torch.randn(SAMPLES, 6, 5),
    }
    y = 0.5 + 2 * torch.randn(SAMPLES, 1)
    return _called(model, inputs, nn.MSELoss(), y, "split" if linear else "zero-out")


def _sequence_and_picture(head: nn.Module, kind: type[Fusion] = Fusion, *, gru: bool = False) -> Any:
    encoders = {"sensor": (nn.GRU if gru else nn.LSTM)(5, 8, batch_first=True), "image": Signals(3, 8)}
    inputs = {"sensor": torch.randn(SAMPLES, 7, 5), "image": _pictures()}
    return kind(encoders, {"sensor": _last_state}, head), inputs


def _steering() -> Case:
    model, inputs = _sequence_and_picture(nn.Linear(16, 2))
    return _called(model, inputs, nn.L1Loss(), 1 + 2 * torch.randn(SAMPLES, 2), "split")


def _late_regression() -> Case:
    heads = nn.ModuleDict({m: nn.Linear(8, 2) for m in ("sensor", "image")})
    model, inputs = _sequence_and_picture(heads, Late, gru=True)
    return _called(model, inputs, nn.HuberLoss(delta=0.7), torch.randn(SAMPLES, 2), "per-head")


def _late_classes() -> Case:
    heads = nn.ModuleDict({m: nn.Linear(8, 5) for m in ("sensor", "image")})
    model, inputs = _sequence_and_picture(heads, Late, gru=True)
    return _called(model, inputs, nn.CrossEntropyLoss(), torch.randint(5, (SAMPLES,)), "per-head")


def _quantile() -> Case:
    model, inputs = _sequence_and_picture(_mlp(16, 1), gru=True)
    y = torch.randn(SAMPLES, 1)

    def pinball(prediction: Tensor, target: Tensor) -> Tensor:
        error = target - prediction
        return torch.maximum(0.9 * error, -0.1 * error).mean(1)

    case = _called(model, inputs, pinball, y, "zero-out", source="observe")
    case.train = lambda out: pinball(out, y).mean()
    return case


def rgbd(outputs: int) -> Dense:
    """Build a model of colour and depth with a head before upsampling."""
    encoders = {
        "rgb": nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Tanh(), nn.Conv2d(8, 8, 1)),
        "depth": nn.Sequential(nn.Conv2d(1, 8, 4, 4), nn.Tanh(), nn.Conv2d(8, 8, 1)),
    }
    return Dense(encoders, {}, nn.Conv2d(16, outputs, 1))


def _segmentation() -> Case:
    model, y = rgbd(5), torch.randint(5, (SAMPLES, 16, 16))
    y[:, :, :3] = 255
    y[1, 4:] = 255
    criterion = nn.CrossEntropyLoss(ignore_index=255)
    return _called(model, {"rgb": _pictures(), "depth": _pictures(1)}, criterion, y, "zero-out", head=model)


def _heights() -> Case:
    model = rgbd(1)
    y = 0.3 + torch.randn(SAMPLES, 1, 16, 16)
    inputs = {"rgb": _pictures(), "depth": _pictures(1)}
    return _called(model, inputs, nn.SmoothL1Loss(beta=0.5), y, "zero-out", head=model)


def _frames() -> Case:
    encoders = {"audio": nn.Conv1d(6, 8, 3, padding=1), "video": nn.Conv1d(9, 8, 1)}
    head = nn.Sequential(nn.ReLU(), nn.Conv1d(16, 5, 1))
    y = torch.randint(5, (SAMPLES, 11))
    y[2, 3:] = -100
    inputs = {"audio": torch.randn(SAMPLES, 6, 11), "video": torch.randn(SAMPLES, 9, 11)}
    return _called(Fusion(encoders, {}, head), inputs, nn.CrossEntropyLoss(), y, "zero-out")


def _click() -> Case:
    model = Fusion(
        {"image": _resnet(), "table": nn.Sequential(nn.Linear(6, 16), nn.Tanh())},
        {"image": _pooled},
        Gate(16, 1),
    )
    y = (torch.rand(SAMPLES, 1) < 0.5).float()
    inputs = {"image": {"pixel_values": _pictures(size=32)}, "table": torch.randn(SAMPLES, 6)}
    case = _called(model, inputs, nn.BCEWithLogitsLoss(), y, "zero-out", source="gradient")
    case.train = lambda out: F.binary_cross_entropy_with_logits(out, y)
    return case


# Cases by model and loss.
PAIRS: dict[tuple[str, str], Callable[[], Case]] = {
    ("LLaVA", "its own, shifted inside"): lambda: _llava(own=True),
    ("LLaVA", "F.cross_entropy, shifted in the loop"): lambda: _llava(own=False),
    ("LLaVA, projector as encoder", "its own, shifted inside"): _llava_projector,
    ("BLIP-2", "its own, shifted inside"): _blip2,
    ("BLIP captioning", "its own, shifted inside, smoothed"): _blip,
    ("Whisper", "its own"): _whisper,
    ("ViT + BERT decoder (VisionEncoderDecoder)", "its own"): _vision_encoder_decoder,
    ("ViLT, embeddings as encoders", "its own, several labels"): _vilt,
    ("CLIP's towers + linear head", "F.binary_cross_entropy_with_logits"): _clip,
    ("BERT + ViT, concatenated", "CrossEntropyLoss(weight, label_smoothing)"): _weighted,
    ("BERT + ViT, concatenated", "CrossEntropyLoss, soft labels"): _soft,
    ("BERT + ResNet, concatenated (film genres)", "BCEWithLogitsLoss(pos_weight)"): _genres,
    ("BERT + wav2vec 2.0 + LSTM, concatenated", "MSELoss"): lambda: _sentiment(linear=True),
    ("BERT + wav2vec 2.0 + LSTM, MLP", "MSELoss"): lambda: _sentiment(linear=False),
    ("LSTM + CNN, concatenated", "L1Loss, two outputs"): _steering,
    ("GRU + CNN, a head each", "HuberLoss, two outputs"): _late_regression,
    ("GRU + CNN, a head each", "CrossEntropyLoss"): _late_classes,
    ("GRU + CNN, MLP", "a function (pinball)"): _quantile,
    ("RGB-D, head before upsampling, head=model", "CrossEntropyLoss(ignore_index)"): _segmentation,
    ("RGB-D, head before upsampling, head=model", "SmoothL1Loss"): _heights,
    ("convolutions over time", "CrossEntropyLoss, (B, C, T)"): _frames,
    ("ResNet + table, gated", "F.binary_cross_entropy_with_logits, one logit"): _click,
}
