"""LLaVA over Qwen1.5-MoE and Qwen2-MoE (one architecture)."""

from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM, Qwen2MoeModel

from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaQwenMoeConfig(Qwen2MoeConfig):
    model_type = "llava_qwen_moe"


class LlavaQwenMoeModel(LlavaMetaModel, Qwen2MoeModel):
    config_class = LlavaQwenMoeConfig


class LlavaQwenMoeForCausalLM(LlavaMetaForCausalLM, Qwen2MoeForCausalLM):
    config_class = LlavaQwenMoeConfig
    backbone_class = LlavaQwenMoeModel
