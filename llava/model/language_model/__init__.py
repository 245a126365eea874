"""The LLM families. A checkpoint's `model_type` picks the class, never a file or folder name."""

from transformers import AutoConfig, AutoModelForCausalLM

from llava.model.language_model.llava_gemma import LlavaGemmaForCausalLM
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM
from llava.model.language_model.llava_qwen import LlavaQwenForCausalLM
from llava.model.language_model.llava_qwen3 import LlavaQwen3ForCausalLM

# A bare LLM's model_type -> its LLaVA class, whose config writes a model_type of its own.
OF_BARE_LLMS = {
    "gemma": LlavaGemmaForCausalLM,
    "llama": LlavaLlamaForCausalLM,
    "mistral": LlavaMistralForCausalLM,
    "qwen2": LlavaQwenForCausalLM,
    "qwen3": LlavaQwen3ForCausalLM,
}
LLAVA_MODELS = OF_BARE_LLMS | {model.config_class.model_type: model for model in OF_BARE_LLMS.values()}

for model in OF_BARE_LLMS.values():
    AutoConfig.register(model.config_class.model_type, model.config_class)
    AutoModelForCausalLM.register(model.config_class, model)
