"""LLaVA models: an LLM, a vision tower and a projector between them."""
