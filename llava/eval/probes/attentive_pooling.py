"""Attentive pooling: one learned query looks at all patches of a frozen tower. B = images, T = patches, D = width."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

HEAD_WIDTH = 64


class AttentivePoolingProbe(nn.Module):
    """LayerNorm, cross-attention of one query, a linear classifier.

    The paper says "an attention pooling layer on top of the frozen features" and no more. The norm makes towers
    comparable whose features are given before their last norm (SigLIP's) and after it.
    """

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        heads = next(count for count in range(max(1, width // HEAD_WIDTH), 0, -1) if width % count == 0)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.query = nn.Parameter(torch.randn(width) * 0.02)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """(B, T, D), (B,) -> the mean cross-entropy."""
        return functional.cross_entropy(self.logits(features), labels)

    def logits(self, features: Tensor) -> Tensor:
        """(B, T, D) -> (B, classes)."""
        features = self.norm(features)
        query = self.query.expand(len(features), 1, -1)
        pooled, _ = self.attention(query, features, features, need_weights=False)
        return self.classifier(pooled[:, 0])
