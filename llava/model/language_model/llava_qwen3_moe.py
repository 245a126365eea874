"""LLaVA over Qwen3-MoE."""

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Qwen3MoeModel

from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaQwen3MoeConfig(Qwen3MoeConfig):
    model_type = "llava_qwen3_moe"


class LlavaQwen3MoeModel(LlavaMetaModel, Qwen3MoeModel):
    config_class = LlavaQwen3MoeConfig


class LlavaQwen3MoeForCausalLM(LlavaMetaForCausalLM, Qwen3MoeForCausalLM):
    config_class = LlavaQwen3MoeConfig
    backbone_class = LlavaQwen3MoeModel
