"""LLaVA over Qwen2 and Qwen2.5 (one architecture)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaQwenConfig(Qwen2Config):
    model_type = "llava_qwen"


class LlavaQwenModel(LlavaMetaModel, Qwen2Model):
    config_class = LlavaQwenConfig


class LlavaQwenForCausalLM(LlavaMetaForCausalLM, Qwen2ForCausalLM):
    """Qwen2 that reads images. With `cu_seqlens` the forward is a packed one (`llava_arch.packed_forward`)."""

    config_class = LlavaQwenConfig

    def __init__(self, config: LlavaQwenConfig):
        super(Qwen2ForCausalLM, self).__init__(config)  # past its own __init__, which would build a second backbone
        self.model = LlavaQwenModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.init_auxiliary_losses()
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        cu_seqlens: Sequence[int] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ):
        if cu_seqlens is None:
            return super().forward(input_ids=input_ids, **kwargs)
        return self.packed_forward(input_ids, cu_seqlens=cu_seqlens, num_items_in_batch=num_items_in_batch, **kwargs)


AutoConfig.register("llava_qwen", LlavaQwenConfig)
AutoModelForCausalLM.register(LlavaQwenConfig, LlavaQwenForCausalLM)
