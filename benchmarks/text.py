"""Frozen pre-trained features of short texts, from weights that come with a package."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.extras import file_of, need


def embed(texts: Sequence[str]) -> np.ndarray:
    """Features `(N, 256)` of N texts: the mean of WordLlama's vectors of their tokens.

    WordLlama (github.com/dleemiller/WordLlama, MIT) trained these vectors, which begin as those of large language
    models, as a sentence encoder. Its files are read here, since version 0.4.0 looks for its tokenizer where it is not.

    Raises:
        ImportError: without wordllama (extra `evidence`).
    """
    weights = file_of("wordllama", "weights/l2_supercat_256.safetensors")
    tokens = file_of("wordllama", "tokenizers/l2_supercat_tokenizer_config.json")
    vectors = need("safetensors.numpy").load_file(weights)["embedding.weight"]
    tokenizer = need("tokenizers").Tokenizer.from_file(str(tokens))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return mean_of_tokens([x.ids for x in encoded], vectors)


def mean_of_tokens(ids: Sequence[Sequence[int]], vectors: np.ndarray) -> np.ndarray:
    """Mean of the `vectors` (V, D) of each text's tokens, in float32 `(N, D)`; zeros for a text without tokens."""
    means = np.zeros((len(ids), vectors.shape[1]), dtype=np.float32)
    for mean, tokens in zip(means, ids, strict=True):
        if tokens:
            mean[:] = vectors[list(tokens)].astype(np.float32).mean(axis=0)
    return means
