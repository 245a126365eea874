"""The auxiliary-loss registry: objectives beside next-token prediction that see visual tokens and text features.

T = visual tokens of a micro-batch, S = samples, H = LLM width, V = vocabulary. A loss is a module called as

    loss(visual_tokens (T, H), visual_sample (T,), text_features (S, H), text_valid (S,) bool,
         word_embeddings (V, H), num_samples=S) -> dict[str, Tensor]

The value under the loss's own name enters the total; every other is detached and only logged: a pair (2,), a total and
what to divide it by, which are each summed over micro-batches and processes first. `NAME_sample_share` is such a pair:
how many samples the loss `NAME` is a mean of, of how many; by it a mean over held-out data is weighted. A loss that
compares tokens with words also offers how, for the report's map of words:

    loss.word_scores(visual_tokens (T, H), word_embeddings (V, H)) -> (T, V)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from llava.registry import Registry

AUXILIARY_LOSSES: Registry[Callable[..., nn.Module]] = Registry("auxiliary loss", "llava.auxiliary_losses")


def build_auxiliary_loss(name: str, **options: Any) -> nn.Module:
    """The loss registered as `name`, made with its own options."""
    return AUXILIARY_LOSSES.get(name)(**options)
