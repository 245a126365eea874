"""The LLM families. A checkpoint's `model_type` picks the class, never a file or folder name."""

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from llava.model.language_model.llava_gemma import LlavaGemmaForCausalLM
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM
from llava.model.language_model.llava_mixtral import LlavaMixtralForCausalLM
from llava.model.language_model.llava_qwen import LlavaQwenForCausalLM
from llava.model.language_model.llava_qwen3 import LlavaQwen3ForCausalLM
from llava.model.language_model.llava_qwen3_moe import LlavaQwen3MoeForCausalLM
from llava.model.language_model.llava_qwen_moe import LlavaQwenMoeForCausalLM

# A bare LLM's model_type -> its LLaVA class, whose config writes a model_type of its own.
OF_BARE_LLMS = {
    "gemma": LlavaGemmaForCausalLM,
    "llama": LlavaLlamaForCausalLM,
    "mistral": LlavaMistralForCausalLM,
    "mixtral": LlavaMixtralForCausalLM,
    "qwen2": LlavaQwenForCausalLM,
    "qwen2_moe": LlavaQwenMoeForCausalLM,
    "qwen3": LlavaQwen3ForCausalLM,
    "qwen3_moe": LlavaQwen3MoeForCausalLM,
}
LLAVA_MODELS = OF_BARE_LLMS | {model.config_class.model_type: model for model in OF_BARE_LLMS.values()}

for bare_type, model in OF_BARE_LLMS.items():
    AutoConfig.register(model.config_class.model_type, model.config_class)
    AutoModelForCausalLM.register(model.config_class, model)
    layout = get_checkpoint_conversion_mapping(bare_type)  # files hold each expert apart, models all in one tensor
    if layout is not None:
        register_checkpoint_conversion_mapping(model.config_class.model_type, layout, overwrite=True)
