"""Cosines between a few features and a whole vocabulary, without a copy of the vocabulary.

R = rows of features, H = width, V = vocabulary.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Rows of W that are held in the features' dtype at a time where W is stored in a narrower one: 29 MB at H = 896.
ROWS_AT_A_TIME = 8192


def cosine_scores(features: Tensor, fixed: Tensor, word_embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of two sets of normalised features from one pass over W.

    Args:
        features: (R, H) normalised; gets gradients.
        fixed: (S, H) normalised; gets none.
        word_embeddings: W (V, H), any float dtype; gets none. A zero row scores 0.

    Returns:
        (R, V) and (S, V) in the features' dtype.
    """
    return _CosineScores.apply(features, fixed, word_embeddings.detach())


class _CosineScores(torch.autograd.Function):
    """Autograd would keep, in the backward pass, W in the features' dtype; this keeps W itself and its row norms."""

    @staticmethod
    def forward(ctx, features: Tensor, fixed: Tensor, word_embeddings: Tensor) -> tuple[Tensor, Tensor]:
        stacked = torch.cat((features, fixed))
        scores = stacked.new_empty(stacked.shape[0], word_embeddings.shape[0])
        inverse_norms = stacked.new_empty(word_embeddings.shape[0])
        for rows in _chunks(word_embeddings, stacked.dtype):
            words = word_embeddings[rows].to(stacked.dtype)
            norms = torch.linalg.vector_norm(words, dim=-1)
            inverse_norms[rows] = torch.where(norms > 0, 1 / norms, 0.0)
            scores[:, rows] = (stacked @ words.T) * inverse_norms[rows]
        ctx.save_for_backward(word_embeddings, inverse_norms)
        of_features, of_fixed = scores.split((features.shape[0], fixed.shape[0]))
        of_features, of_fixed = of_features.clone(), of_fixed.clone()
        ctx.mark_non_differentiable(of_fixed)
        return of_features, of_fixed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_scores: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        word_embeddings, inverse_norms = ctx.saved_tensors
        grad_features = grad_scores.new_zeros(grad_scores.shape[0], word_embeddings.shape[1])
        for rows in _chunks(word_embeddings, grad_scores.dtype):
            scaled = grad_scores[:, rows] * inverse_norms[rows]
            grad_features.addmm_(scaled, word_embeddings[rows].to(grad_scores.dtype))
        return grad_features, None, None


def _chunks(word_embeddings: Tensor, dtype: torch.dtype) -> list[slice]:
    num_rows = word_embeddings.shape[0]
    step = num_rows if word_embeddings.dtype == dtype else ROWS_AT_A_TIME
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]
