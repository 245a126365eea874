"""LLaVA over Gemma."""

from transformers import GemmaConfig, GemmaForCausalLM, GemmaModel

from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaGemmaConfig(GemmaConfig):
    model_type = "llava_gemma"


class LlavaGemmaModel(LlavaMetaModel, GemmaModel):
    config_class = LlavaGemmaConfig


class LlavaGemmaForCausalLM(LlavaMetaForCausalLM, GemmaForCausalLM):
    config_class = LlavaGemmaConfig
    backbone_class = LlavaGemmaModel
