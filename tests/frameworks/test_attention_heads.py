"""`attention_heads` on the models of transformers."""

from __future__ import annotations

from typing import Any

import pytest

import balanceopt as bo

transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.frameworks, pytest.mark.filterwarnings("ignore")]

SMALL = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 24}
PICTURE = {"image_size": 16, "patch_size": 8}
SPEECH = {
    "conv_dim": (4, 4),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
WORDS = {"vocab_size": 20}
MODELS: dict[str, dict[str, Any]] = {
    "Bert": {**SMALL, **WORDS},
    "Roberta": {**SMALL, **WORDS},
    "DistilBert": {"dim": 12, "n_layers": 2, "n_heads": 3, "hidden_dim": 24, **WORDS},
    "ViT": {**SMALL, **PICTURE},
    "CLIPVision": {**SMALL, **PICTURE},
    "AST": {**SMALL, "patch_size": 8, "max_length": 32, "num_mel_bins": 16},
    "Wav2Vec2": {**SMALL, **SPEECH},
    "T5": {"d_model": 12, "d_kv": 4, "num_heads": 3, "num_layers": 1, "d_ff": 24, **WORDS},
}


def build(name: str, **options: Any) -> Any:
    return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**options))


@pytest.mark.parametrize("name", MODELS)
def test_every_attention_is_found_with_its_output_projection(name):
    found = bo.attention_heads(build(name, **MODELS[name]))
    attentions = 3 if name == "T5" else 2  # encoder, decoder, cross-attention
    rows = [units for units in found.values() if units == bo.MaskUnits(3)]
    columns = [units for units in found.values() if units == bo.MaskUnits(3, dim=1)]
    assert (len(rows), len(columns), len(found)) == (3 * attentions, attentions, 4 * attentions)


def test_gpt2_whose_weights_are_transposed():
    found = bo.attention_heads(build("GPT2", n_embd=12, n_layer=1, n_head=3, **WORDS))
    assert list(found.values()) == [bo.MaskUnits(3, dim=1, parts=3), bo.MaskUnits(3, dim=0)]


def test_llama_with_fewer_heads_of_keys_and_values():
    options = {**SMALL, "num_hidden_layers": 1, "num_attention_heads": 6, "num_key_value_heads": 2, **WORDS}
    found = list(bo.attention_heads(build("Llama", **options)).values())
    assert found == [bo.MaskUnits(6), bo.MaskUnits(2), bo.MaskUnits(2), bo.MaskUnits(6, dim=1)]
