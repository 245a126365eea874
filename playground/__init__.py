"""The embedded default: data that the project draws for itself, and the small models that it starts from."""
