"""What a model makes of one image: the pixels it sees, its tower's features, the words nearest to its visual tokens.

P = patches and T = visual tokens of the image, D = tower width, H = LLM width, V = vocabulary. A token's score with a
word is the alignment loss's own (CoMP Sec. 2.3), between the adapter's output and the LLM's word embeddings, the output
ones where the two are not tied.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from llava.model.auxiliary_losses.builder import build_auxiliary_loss

# Dark to light through violet and orange; evenly spaced in lightness, so that it also reads in grey.
HEAT = ((13, 8, 60), (84, 20, 122), (176, 42, 119), (236, 99, 84), (253, 176, 108), (252, 253, 191))
TOKENS_AT_A_TIME = 256  # of whose scores with the whole vocabulary there is a copy or two: 160 MB each at V = 151 936


@dataclass(frozen=True)
class WordMap:
    """An image's grid of visual tokens; `words[row][column]` are its nearest words, best first, with their cosines.

    `cosines[row][column]` is the token's cosine with the word that was asked for, if one was.
    """

    rows: int
    columns: int
    words: list[list[list[tuple[str, float]]]]
    cosines: list[list[float]] | None = None


@dataclass(frozen=True)
class Inspection:
    """An image through a model's eyes: the pixels it saw, its features' colours (a pixel per patch), its words."""

    seen: Image.Image
    colours: Image.Image
    words: WordMap


def inspect_image(
    model: Any,
    image_processor: Any,
    image: Image.Image,
    words: tuple[list[int], list[str]],
    *,
    top: int = 5,
    word: str | None = None,
) -> Inspection:
    """All that this module knows about an image; arguments as `word_map` has them."""
    return Inspection(
        seen=as_seen(image, image_processor),
        colours=principal_colours(model, image_processor, image),
        words=word_map(model, image_processor, image, words, top=top, word=word),
    )


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
    model: Any,
    image_processor: Any,
    image: Image.Image,
    words: tuple[list[int], list[str]],
    *,
    top: int = 5,
    word: str | None = None,
) -> WordMap:
    """The nearest words of every visual token of `image`, and its cosine with `word`.

    `words` is `vocabulary(tokenizer)`. Of tokens that say the same, alone and after a space, the nearest counts.
    """
    ids, texts = words
    place_of = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    if word is not None:
        check_known(word, list(place_of))
    inputs = image_processor([image])
    grid = inputs["image_grid_thw"]
    tokens = model.get_model().encode_images(inputs["pixel_values"].to(model.device), grid.to(model.device))
    embeddings = model.get_output_embeddings().weight
    ids, places = (torch.tensor(numbers, device=tokens.device) for numbers in (ids, [place_of[text] for text in texts]))
    word_scores = build_auxiliary_loss("alignment").word_scores
    nearest, cosines = [], []
    for some_tokens in tokens.split(TOKENS_AT_A_TIME):
        scores = word_scores(some_tokens, embeddings)[:, ids]
        by_word = scores.new_full((len(scores), len(place_of)), -torch.inf)
        by_word.scatter_reduce_(1, places.expand_as(scores), scores, "amax")
        nearest += _named(by_word.topk(min(top, len(place_of)), dim=1), list(place_of))
        if word is not None:
            cosines += by_word[:, place_of[word]].tolist()
    side = model.get_vision_tower().merge_size
    rows, columns, order = token_layout(grid[0].tolist(), model.get_model().mm_projector.merge, side)

    def in_place(values: list) -> list[list]:
        return [[values[token] for token in line] for line in order]

    return WordMap(rows, columns, in_place(nearest), None if word is None else in_place(cosines))


def check_known(word: str, known: list[str]) -> None:
    """Refuse a word that no token says."""
    if word not in known:
        nearest = ", ".join(difflib.get_close_matches(word, known, n=5))
        raise ValueError(
            f"word {word!r} is no single token of the vocabulary, so it has no embedding of its own. "
            + (f"Near it are: {nearest}." if nearest else "Nothing is near it.")
        )


def _named(best: torch.return_types.topk, texts: list[str]) -> list[list[tuple[str, float]]]:
    """Values and places of the best -> for each token its (word, cosine), best first."""
    return [
        [(texts[place], value) for place, value in zip(places, values, strict=True)]
        for places, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


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


def as_seen(image: Image.Image, processor: Any) -> Image.Image:
    """The pixels that went into the model, put together again: resized, squashed if it was trained so, on white."""
    inputs = processor([image])
    rows, columns, order = token_layout(inputs["image_grid_thw"][0].tolist(), 1, processor.merge_size)
    side = processor.patch_size
    patches = inputs["pixel_values"][torch.tensor(order)].view(rows, columns, 3, side, side)
    pixels = patches.permute(0, 3, 1, 4, 2).reshape(rows * side, columns * side, 3)
    pixels = pixels * torch.tensor(processor.image_std) + torch.tensor(processor.image_mean)
    return Image.fromarray((pixels * 255).round().clamp(0, 255).to(torch.uint8).numpy())


@torch.inference_mode()
def principal_colours(model: Any, image_processor: Any, image: Image.Image) -> Image.Image:
    """The tower's features as colours, a pixel per patch: their first three principal components as red, green, blue.

    Each component is stretched to the range of its middle 98 %, so that one outlier does not make the rest grey.
    """
    inputs = image_processor([image])
    grid = inputs["image_grid_thw"]
    tower = model.get_vision_tower()
    dtype = next(tower.parameters()).dtype
    features = tower(inputs["pixel_values"].to(model.device, dtype), grid.to(model.device)).float().cpu()
    rows, columns, order = token_layout(grid[0].tolist(), 1, tower.merge_size)
    centred = features - features.mean(dim=0)
    _, directions = torch.linalg.eigh(centred.T @ centred)
    first = directions[:, -3:].flip(1)  # the largest come last
    components = centred @ (first * first.sum(dim=0).sign())  # an eigenvector's sign is open
    low, high = components.quantile(0.01, dim=0), components.quantile(0.99, dim=0)
    colours = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    pixels = (colours * 255).round().to(torch.uint8)[torch.tensor(order)]
    return Image.fromarray(pixels.view(rows, columns, 3).numpy())


def heat_colour(value: float, low: float, high: float) -> tuple[int, int, int]:
    """`value`'s place between `low` and `high` as a colour; the darkest where both are the same."""
    place = (value - low) / (high - low) * (len(HEAT) - 1) if high > low else 0.0
    first = min(int(place), len(HEAT) - 2)
    share = place - first
    return tuple(round((1 - share) * a + share * b) for a, b in zip(HEAT[first], HEAT[first + 1], strict=True))
