"""Image-text contrast as SigLIP does it, for the pre-training of the tower.

Letters: B images, T texts, L tokens, P patches, D width.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerBase, SiglipVisionConfig, SiglipVisionModel


def tower_config() -> SiglipVisionConfig:
    """The tower's architecture: SigLIP's, 8×8 patches of 16 px, 0.9 M parameters without the pooling head."""
    return SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=128,
        patch_size=16,
    )


@torch.no_grad()
def see_strokes(filters: nn.Parameter) -> None:
    """Patch filters (D, 3, p, p) that do not see the mean: pictures are mostly white, and strokes are what counts."""
    filters.sub_(filters.mean(dim=(2, 3), keepdim=True)).mul_(3)


class TextTower(nn.Module):
    """Short texts to one vector each: token and position embedding, two encoder layers, mean over tokens."""

    def __init__(self, vocabulary: int, width: int, max_tokens: int = 96):
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(max_tokens, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.project = nn.Linear(width, width)
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(T, L) ids and their bool mask of real tokens -> (T, D)."""
        hidden = self.token(input_ids) + self.position[: input_ids.shape[1]]
        hidden = self.layers(hidden, src_key_padding_mask=~mask)
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return self.project((hidden * weight).sum(1) / weight.sum(1))


class Contrast(nn.Module):
    """A SigLIP tower, a text tower and the scale and bias of the sigmoid loss."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: SiglipVisionConfig | None = None):
        super().__init__()
        config = config or tower_config()
        self.tokenizer = tokenizer
        self.vision = SiglipVisionModel(config)
        self.text = TextTower(len(tokenizer), config.hidden_size)
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        self.bias = nn.Parameter(torch.tensor(-6.0))
        see_strokes(self.vision.embeddings.patch_embedding.weight)

    def image_vectors(self, pixel_values: torch.Tensor, order: torch.Tensor | None = None, parts: int = 1):
        """(B, 3, S, S) -> (B·parts, D) unit vectors; the head pools each of `parts` groups of patches apart.

        Args:
            order: (P,) patch numbers sorted by group; None keeps the row-major order.
        """
        hidden = self.vision(pixel_values=pixel_values).last_hidden_state
        if order is not None:
            hidden = hidden[:, order]
        return F.normalize(self.vision.head(hidden.reshape(-1, hidden.shape[1] // parts, hidden.shape[2])), dim=-1)

    def text_vectors(self, texts: list[str]) -> torch.Tensor:
        """T texts -> (T, D) unit vectors."""
        ids = self.tokenizer(texts, padding=True, return_tensors="pt")
        return F.normalize(self.text(ids["input_ids"], ids["attention_mask"].bool()), dim=-1)

    def logits(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """(B, D) and (T, D) unit vectors -> (B, T)."""
        return self.log_scale.exp() * images @ texts.T + self.bias


def sigmoid_loss(logits: torch.Tensor, holds: torch.Tensor) -> torch.Tensor:
    """SigLIP's loss: every (image, text) pair is one yes/no question.

    Args:
        logits: (B, T).
        holds: (B, T) bool, whether the text is true of the image.
    """
    signs = holds.to(logits.dtype) * 2 - 1
    return -F.logsigmoid(signs * logits).sum(1).mean()
