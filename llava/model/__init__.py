"""LLaVA models: an LLM, a vision tower and a projector between them.

LLaVA's own names for them (`from llava.model import LlavaQwenForCausalLM`) are there; transformers is loaded when they
are asked for.
"""

import importlib
from typing import Any

_FAMILIES = {"llama": "LlavaLlama", "qwen": "LlavaQwen", "mistral": "LlavaMistral", "mixtral": "LlavaMixtral"}
_HOMES = {f"{name}{kind}": family for family, name in _FAMILIES.items() for kind in ("ForCausalLM", "Config")}
_HOMES["LlavaConfig"] = _HOMES.pop("LlavaLlamaConfig")  # the oldest has no LLM's name in it


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"llava.model.language_model.llava_{_HOMES[name]}"), name)
