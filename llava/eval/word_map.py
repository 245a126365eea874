"""Which word each visual token stands nearest to (the alignment loss, CoMP Sec. 2.3, read backwards).

T = visual tokens of one image, H = LLM width, V = vocabulary. The score is the alignment loss's own, between the
adapter's output and the LLM's word embeddings, the output ones where the two are not tied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from llava.model.auxiliary_losses.builder import build_auxiliary_loss


@dataclass(frozen=True)
class WordMap:
    """An image's grid of visual tokens; `words[row][column]` are its nearest words, best first, with their cosines."""

    rows: int
    columns: int
    words: list[list[list[tuple[str, float]]]]


def vocabulary(tokenizer: Any) -> tuple[list[int], list[str]]:
    """Ids and texts of the tokens that say something: with a letter or a digit, no markup, no part of a character."""
    special = set(tokenizer.all_special_ids)
    ids, texts = [], []
    for token, text in enumerate(tokenizer.batch_decode([[token] for token in range(len(tokenizer))])):
        text = text.strip()
        if token not in special and "\ufffd" not in text and any(letter.isalnum() for letter in text):
            ids.append(token)
            texts.append(text)
    return ids, texts


@torch.inference_mode()
def word_map(
    model: Any, image_processor: Any, image: Image.Image, words: tuple[list[int], list[str]], *, top: int = 5
) -> WordMap:
    """The nearest words of every visual token of `image`; `words` is `vocabulary(tokenizer)`."""
    ids, texts = words
    inputs = image_processor([image])
    grid = inputs["image_grid_thw"]
    tokens = model.get_model().encode_images(inputs["pixel_values"].to(model.device), grid.to(model.device))
    embeddings = model.get_output_embeddings().weight[torch.tensor(ids, device=tokens.device)]
    scores = build_auxiliary_loss("alignment").word_scores(tokens, embeddings)
    values, places = scores.topk(min(top, len(ids)), dim=1)
    nearest = [
        [(texts[place], value) for place, value in zip(some_places, some_values, strict=True)]
        for some_places, some_values in zip(places.tolist(), values.tolist(), strict=True)
    ]
    side = model.get_vision_tower().merge_size
    rows, columns, order = token_layout(grid[0].tolist(), model.get_model().mm_projector.merge, side)
    return WordMap(rows, columns, [[nearest[order[row][column]] for column in range(columns)] for row in range(rows)])


def token_layout(grid: list[int], merge: int, side: int) -> tuple[int, int, list[list[int]]]:
    """(t, rows, columns) in patches -> rows and columns of visual tokens, and which token lies at each place.

    `side` is a block's, in patches. A token is a whole block (merge = side²), then the order is raster; or a single
    patch (merge = 1), then patches come in block order: block by block, and row by row inside each.
    """
    _, rows, columns = grid
    if merge == side * side:
        rows, columns = rows // side, columns // side
        order = torch.arange(rows * columns).view(rows, columns)
    else:
        blocks = torch.arange(rows * columns).view(rows // side, columns // side, side, side)
        order = blocks.permute(0, 2, 1, 3).reshape(rows, columns)
    return rows, columns, order.tolist()
