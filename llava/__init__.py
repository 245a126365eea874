"""LLaVA-NeXT's module paths and names over current transformers: the host that CoMP's towers and losses plug into.

Importing this package imports nothing heavy; take what is needed from its modules.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """LLaVA's one name at the top."""
    if name != "LlavaLlamaForCausalLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llava.model import LlavaLlamaForCausalLM

    return LlavaLlamaForCausalLM
