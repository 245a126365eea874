"""Cosines between a few features and a whole vocabulary, without a copy of the vocabulary.

R = rows of features, H = width, V = vocabulary. W (V, H) may be of any float dtype; everything is computed in the
features' own. No product here is seen by autograd: who needs gradients multiplies back with `weighted_sum_of_words`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Rows of W at a time: few enough that a chunk is in the caches for norm and product, or for widening and product.
ROWS_AT_A_TIME = 2048
# A shorter row has no direction: its cosines are 0, where a division would give a gradient of 1 / length.
SHORTEST = 1e-12
# Where PyTorch keeps whether products may run in TF32, and what means no. Before 2.9 the setting has an older name; in
# later ones, to use both is an error. (Not asked for with hasattr: 2.1 answers with an AssertionError.)
TF32_SETTING, NO_TF32 = (
    ("fp32_precision", "ieee") if hasattr(torch.backends, "fp32_precision") else ("allow_tf32", False)
)


@contextmanager
def full_float32() -> Iterator[None]:
    """Matrix products inside are in float32 where a training allows TF32 (--tf32), too: its 10 bits do not suffice."""
    matmul = torch.backends.cuda.matmul
    before = getattr(matmul, TF32_SETTING)
    setattr(matmul, TF32_SETTING, NO_TF32)
    try:
        yield
    finally:
        setattr(matmul, TF32_SETTING, before)


def unit_rows(rows: Tensor) -> Tensor:
    """(R, H) divided by their lengths, float32 or wider; a row of zeros stays one and gets a gradient of zeros."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return rows * inverse_lengths(rows)[:, None]


def inverse_lengths(rows: Tensor) -> Tensor:
    """(R, H) -> (R,): 1 / |row|, and 0 of a row of zeros."""
    lengths = torch.linalg.vector_norm(rows, dim=-1)
    return torch.where(lengths > SHORTEST, 1 / lengths.clamp(min=SHORTEST), 0.0)


@torch.no_grad()
@full_float32()
def cosine_scores(features: Tensor, word_embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of normalised features (R, H) by one pass over W.

    Returns:
        The cosines (R, V), and 1 / |W_i| (V,), which made them such: 0 for a row of zeros, whose scores are 0.
    """
    scores = features.new_empty(len(features), len(word_embeddings))
    inverse_norms = features.new_empty(len(word_embeddings))
    products = features.new_empty(ROWS_AT_A_TIME, len(features))
    for rows, words in _chunks(word_embeddings, features.dtype):
        inverse_norms[rows] = inverse_lengths(words)
        # W's side first is the faster product on a CPU; written with out= it keeps its dtype under autocast.
        chunk = torch.mm(words, features.T, out=products[: len(words)])
        torch.mul(chunk.T, inverse_norms[rows], out=scores[:, rows])
    return scores, inverse_norms


@torch.no_grad()
@full_float32()
def weighted_sum_of_words(weights: Tensor, word_embeddings: Tensor) -> Tensor:
    """(R, V) -> (R, H): sum_i weights[:, i] W_i."""
    total = weights.new_zeros(word_embeddings.shape[1], len(weights))
    for rows, words in _chunks(word_embeddings, weights.dtype):
        total.addmm_(words.T, weights[:, rows].T)
    return total.T


def _chunks(word_embeddings: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(word_embeddings), ROWS_AT_A_TIME):
        rows = slice(start, start + ROWS_AT_A_TIME)
        yield rows, word_embeddings[rows].to(dtype)
