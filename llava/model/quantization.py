"""The LLM in 8 or 4 bits by bitsandbytes, through transformers' own configuration."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

# Tower and adapter are small and stay as they are, and the losses read the head's weight itself.
KEPT_WHOLE = ["model.vision_tower", "model.mm_projector", "lm_head"]  # transformers wants whole names


def check_bitsandbytes(flag: str) -> None:
    """Refuse `flag` where bitsandbytes is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"{flag} needs bitsandbytes: pip install bitsandbytes. Or leave it out.")


def quantization_config(bits: int, dtype: torch.dtype, *, double_quant: bool = True, quant_type: str = "nf4") -> Any:
    """What `from_pretrained` needs; None at 16 bits.

    Args:
        dtype: of the computation and of what is kept whole.
    """
    if bits == 16:
        return None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        llm_int8_skip_modules=KEPT_WHOLE,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_type=quant_type,
    )
