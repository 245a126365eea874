"""LLaVA over Mixtral."""

from transformers import MixtralConfig, MixtralForCausalLM, MixtralModel

from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaMixtralConfig(MixtralConfig):
    model_type = "llava_mixtral"


class LlavaMixtralModel(LlavaMetaModel, MixtralModel):
    config_class = LlavaMixtralConfig


class LlavaMixtralForCausalLM(LlavaMetaForCausalLM, MixtralForCausalLM):
    config_class = LlavaMixtralConfig
    backbone_class = LlavaMixtralModel
