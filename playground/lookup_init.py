"""Initial weights with which a tiny LLM looks things up from the first step.

Finding what followed an earlier occurrence of a token takes two attention layers that fit each other: one that tells
every token what stood before it, one that searches for a token by that. A large model finds this during training; the
embedded LLM had not after 40 000 texts. So the first layer starts with heads that look a fixed number of tokens back,
the last two with heads that match the current token with what such a head wrote, and copy. Everything is trained on.
"""

import math

import torch
from transformers import Qwen2ForCausalLM

_SHIFTS = (1, 2, 3, 5)  # tokens back, one per head of the first layer
_PEAK = 8.0  # logit of the fixed distance, before the others' random ones
_WRITE = 0.2  # of a head's output: about as large as an embedding
_MATCH = 2.0  # of queries and keys that compare tokens
_EMBEDDING_STD = 0.1


@torch.no_grad()
def wire_for_lookup(model: Qwen2ForCausalLM) -> None:
    """Sets the attention weights of a 4-layer model with as many heads as `_SHIFTS`, in place."""
    config = model.config
    width, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    first, second, *last = (layer.self_attn for layer in model.model.layers)
    model.model.embed_tokens.weight.normal_(std=_EMBEDDING_STD)
    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(0, head, 2) / head)
    for number, shift in enumerate(_SHIFTS):
        rows = slice(number * head, (number + 1) * head)
        reads, writes = _directions(width, head), _directions(width, head)
        _look_back(first, rows, shift, frequencies)
        first.v_proj.weight[rows], first.o_proj.weight[:, rows] = reads, _WRITE * writes.T
        same = _directions(width, head)
        _match_and_copy(second, rows, same, same)
        for attention in last:
            _match_and_copy(attention, rows, reads, writes)


def _directions(width: int, head: int) -> torch.Tensor:
    """(head, width) orthonormal rows."""
    return torch.linalg.qr(torch.randn(width, head))[0].T


def _look_back(attention: torch.nn.Module, rows: slice, shift: int, frequencies: torch.Tensor) -> None:
    """Biases whose rotary product is largest `shift` tokens back, whatever the tokens are."""
    head = 2 * len(frequencies)
    key = torch.cat([torch.ones(head // 2), torch.zeros(head // 2)]) * math.sqrt(_PEAK * 2 / math.sqrt(head))
    angle = -shift * frequencies
    query = torch.cat([key[: head // 2] * angle.cos(), key[: head // 2] * angle.sin()])
    for projection, bias in ((attention.q_proj, query), (attention.k_proj, key)):
        projection.weight[rows] *= 0.1
        projection.bias[rows] = bias


def _match_and_copy(attention: torch.nn.Module, rows: slice, query: torch.Tensor, key: torch.Tensor) -> None:
    """A head that compares what `query` and `key` read, and writes a part of what it finds back unchanged."""
    copy = _directions(query.shape[1], query.shape[0])
    attention.q_proj.weight[rows], attention.k_proj.weight[rows] = _MATCH * query, _MATCH * key
    attention.v_proj.weight[rows], attention.o_proj.weight[:, rows] = copy, _WRITE * copy.T
