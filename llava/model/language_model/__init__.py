"""The LLM families. A checkpoint's `model_type` picks the class, never a file or folder name."""

from llava.model.language_model.llava_qwen import LlavaQwenForCausalLM

# A bare LLM's model_type, or the one that its LLaVA form writes -> the LLaVA class.
LLAVA_MODELS = {
    "qwen2": LlavaQwenForCausalLM,
    "llava_qwen": LlavaQwenForCausalLM,
}
