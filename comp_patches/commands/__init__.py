"""Commands of the method, run as `python -m comp_patches.NAME`; they may import a host and transformers."""
