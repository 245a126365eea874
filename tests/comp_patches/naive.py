"""The method written out patch by patch with Python loops: what the vectorised code must equal.

Nothing here is shared with the package: order, coordinates, angles and interpolation are written a second time.
"""

import cmath
import math

import numpy as np
import torch
from torch.nn import functional as F


def block_order(rows: int, cols: int, merge_size: int) -> list[tuple[int, int]]:
    """(y, x) of every patch: blocks row by row, and within a block row by row."""
    order = []
    for block_y in range(0, rows, merge_size):
        for block_x in range(0, cols, merge_size):
            for y in range(block_y, block_y + merge_size):
                for x in range(block_x, block_x + merge_size):
                    order.append((y, x))
    return order


def patches_of(pixels: np.ndarray, patch_size: int, merge_size: int) -> np.ndarray:
    """(height, width, 3) -> (P, 3*p*p): each patch sliced out on its own, channel first."""
    rows, cols = pixels.shape[0] // patch_size, pixels.shape[1] // patch_size
    patches = []
    for y, x in block_order(rows, cols, merge_size):
        patch = pixels[y * patch_size : (y + 1) * patch_size, x * patch_size : (x + 1) * patch_size]
        patches.append(patch.transpose(2, 0, 1).reshape(-1))
    return np.stack(patches)


def position_map(table: torch.Tensor, rows: int, cols: int, mode: str = "bilinear", antialias: bool = False):
    """(R, C, D) learned table -> (rows, cols, D) by PyTorch's own interpolation."""
    if antialias and cols == 1 and rows > 1:  # PyTorch 2.13 mixes up the rows of a single column; a row it gets right
        return position_map(table.transpose(0, 1), cols, rows, mode, antialias).transpose(0, 1)
    resized = F.interpolate(
        table.permute(2, 0, 1)[None], size=(rows, cols), mode=mode, align_corners=False, antialias=antialias
    )
    return resized[0].permute(1, 2, 0)


def rotate(
    vector: torch.Tensor, y: int, x: int, theta: float = 10000.0, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """One head's vector (d,): channels c and c + d/2 are a complex number; the first d/4 turn by y, the rest by x.

    Frequency, position and their product are each rounded to `dtype`.
    """
    d = len(vector)
    turns = []
    for c in range(d // 2):
        j, position = (c, y) if c < d // 4 else (c - d // 4, x)
        frequency = torch.tensor(theta ** (-2 * j / (d / 2)), dtype=dtype)
        turns.append(cmath.exp(1j * (torch.tensor(position, dtype=dtype) * frequency).item()))
    turned = torch.complex(vector[: d // 2], vector[d // 2 :]) * torch.tensor(turns, dtype=torch.complex64)
    return torch.cat((turned.real, turned.imag))


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(n, h, d) -> (n, h, d), one image, softmax written out."""
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[-1])
    return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), value)


def tower(model, pixel_values: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """One image through a packed transformer's own weights, with this module's order, embedding and rotation."""
    config = model.config
    order = block_order(rows, cols, config.merge_size)
    angle_dtype = torch.bfloat16 if config.rope_dtype == "bfloat16" else torch.float64
    states = F.linear(pixel_values, model.patch_embedding.weight, model.patch_embedding.bias)
    table = model.position_embedding.weight.reshape(*config.position_grid, -1)
    position = position_map(table, rows, cols)
    states = states + torch.stack([position[y, x] for y, x in order])
    for layer in model.layers:
        query, key, value = (
            part.reshape(len(order), config.num_attention_heads, -1)
            for part in layer.attention.qkv(layer.norm1(states)).chunk(3, dim=-1)
        )
        if config.use_rope:
            query, key = (
                torch.stack(
                    [
                        torch.stack([rotate(head, *at, config.rope_theta, angle_dtype) for head in heads])
                        for heads, at in zip(part, order, strict=True)
                    ]
                )
                for part in (query, key)
            )
        states = states + layer.attention.proj(attention(query, key, value).reshape(len(order), -1))
        hidden = F.gelu(layer.mlp.fc1(layer.norm2(states)), approximate="tanh")
        states = states + layer.mlp.fc2(hidden)
    return states


def sinkhorn_targets(scores: np.ndarray, prior: np.ndarray, epsilon: float, iterations: int, row_strength: float = 1.0):
    """Eq. 9 with plain exponents in the widest float there is: u = (p / Kv)^r, v = (1/B) / K^T u. Returns (B, V)."""
    kernel = np.exp(scores.astype(np.longdouble).T / epsilon)  # (V, B)
    prior = prior.astype(np.longdouble) / prior.sum()
    words, samples = kernel.shape
    u, v = np.ones(words, dtype=np.longdouble), np.ones(samples, dtype=np.longdouble)
    for _ in range(iterations):
        u = (prior / (kernel @ v)) ** row_strength
        u[prior == 0] = 0
        v = (1 / samples) / (kernel.T @ u)
    plan = u[:, None] * kernel * v
    return (plan / plan.sum(axis=0)).T.astype(np.float64)


def prior_softmax_targets(scores: np.ndarray, prior: np.ndarray, epsilon: float, iterations: int, temperature: float):
    """The release's rule with plain exponents: q = exp(s / eps) * softmax(p / T)^iterations, per sample."""
    shares = np.exp(prior.astype(np.longdouble) / temperature)
    shares[prior == 0] = 0
    shares /= shares.sum()
    mass = np.exp(scores.astype(np.longdouble) / epsilon) * shares**iterations
    return (mass / mass.sum(axis=1, keepdims=True)).astype(np.float64)


def alignment(visual, text, words, prior, targets_of, temperature: float = 0.005) -> float:
    """The whole loss in the widest float there is, from un-normalised features; `targets_of` maps scores to targets."""
    visual, text, words = (array.astype(np.longdouble) for array in (visual, text, words))
    visual, text, words = (
        array / np.linalg.norm(array.astype(np.float64), axis=1)[:, None] for array in (visual, text, words)
    )
    target = targets_of(text @ words.T)
    predicted = np.exp(visual @ words.T / temperature)
    predicted[:, prior == 0] = 0
    predicted /= predicted.sum(axis=1, keepdims=True)
    used = prior > 0
    return float(-(target[:, used] * np.log(predicted[:, used])).sum(axis=1).mean())
