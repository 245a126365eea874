"""Native-resolution arithmetic: image size -> rows and columns of patches. Integers in, integers out; no torch.

A *patch* is a square of `patch_size` pixels, a *visual token* a block of `merge_size` x `merge_size` patches: what the
LLM sees. Bounds count visual tokens. Processor, length estimate and packing all ask here, so they cannot disagree.
"""

import math

# The release resizes every image to within these bounds before it applies the recipe's (`two_step_resize`).
FIRST_STEP_MIN_VISTOKEN = 4
FIRST_STEP_MAX_VISTOKEN = 16384


def native_grid(
    width: int,
    height: int,
    *,
    patch_size: int,
    merge_size: int = 2,
    min_num_vistoken: int,
    max_num_vistoken: int,
) -> tuple[int, int]:
    """Rows and columns of patches for an image, aspect ratio kept as closely as whole blocks allow.

    Each side goes to the nearest multiple of a block (ties to even, at least one block). Over the budget, the original
    sides are divided by the root that meets it and rounded down; under the minimum, enlarged and rounded up. Then the
    bounds win over the aspect ratio: extreme shapes have their long side cut.

    Args:
        width: pixels.
        height: pixels.
        min_num_vistoken: fewest visual tokens, inclusive.
        max_num_vistoken: most visual tokens, inclusive.

    Returns:
        (rows, cols) in patches, both multiples of `merge_size`.
    """
    _check(width, height, patch_size, merge_size, min_num_vistoken, max_num_vistoken)
    block = patch_size * merge_size  # pixels
    # The roots are taken in pixels and in this order of operations, so that rounding is transformers' to the last bit.
    rows, cols = max(1, round(height / block)), max(1, round(width / block))
    if rows * cols > max_num_vistoken:
        shrink = math.sqrt((height * width) / (max_num_vistoken * block**2))
        rows = max(1, math.floor(height / shrink / block))
        cols = max(1, math.floor(width / shrink / block))
    elif rows * cols < min_num_vistoken:
        enlarge = math.sqrt((min_num_vistoken * block**2) / (height * width))
        rows = math.ceil(height * enlarge / block)
        cols = math.ceil(width * enlarge / block)
    rows, cols = _within_bounds(rows, cols, min_num_vistoken, max_num_vistoken, tall=height > width)
    return rows * merge_size, cols * merge_size


def two_step_grids(
    width: int,
    height: int,
    *,
    patch_size: int,
    merge_size: int = 2,
    min_num_vistoken: int,
    max_num_vistoken: int,
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The release's path: a first resize within 4...16 384 tokens, then the recipe's bounds on the *rounded* size.

    Returns:
        The (rows, cols) of both resizes; the second is the image's grid, and for one photo in 8 not `native_grid`'s.
    """
    first = native_grid(
        width,
        height,
        patch_size=patch_size,
        merge_size=merge_size,
        min_num_vistoken=FIRST_STEP_MIN_VISTOKEN,
        max_num_vistoken=FIRST_STEP_MAX_VISTOKEN,
    )
    second = native_grid(
        first[1] * patch_size,
        first[0] * patch_size,
        patch_size=patch_size,
        merge_size=merge_size,
        min_num_vistoken=min_num_vistoken,
        max_num_vistoken=max_num_vistoken,
    )
    return first, second


def num_tokens(rows: int, cols: int, merge_size: int = 2) -> int:
    """Visual tokens of a grid of patches."""
    return (rows // merge_size) * (cols // merge_size)


def _within_bounds(rows: int, cols: int, low: int, high: int, *, tall: bool) -> tuple[int, int]:
    """Move the long side (in blocks) into [low, high]; give up rows of the short side only where no long side fits.

    Of equal sides, the long one is the image's: `tall` says that it is the height.
    """
    short, long = min(rows, cols), max(rows, cols)
    short = min(short, high)
    while not low <= short * long <= high:
        fewest, most = -(-low // short), high // short
        if fewest <= most:
            long = min(max(long, fewest), most)
        else:
            short -= 1  # at short = 1 every number in [low, high] is a legal long side, so this ends
    return (long, short) if rows > cols or (rows == cols and tall) else (short, long)


def _check(width: int, height: int, patch_size: int, merge_size: int, low: int, high: int) -> None:
    if width < 1 or height < 1:
        raise ValueError(f"An image of {width}x{height} pixels has no grid: both sides must be at least 1.")
    if patch_size < 1 or merge_size < 1:
        raise ValueError(f"patch_size={patch_size} and merge_size={merge_size} must both be at least 1.")
    if not 1 <= low <= high:
        raise ValueError(
            f"min_num_vistoken={low} and max_num_vistoken={high} leave no legal grid: "
            "--min_num_vistoken must be at least 1 and at most --max_num_vistoken."
        )
