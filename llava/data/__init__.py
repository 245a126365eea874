"""Records of conversations with images, made into packed tensors. Knows no model: it is handed an image processor."""
