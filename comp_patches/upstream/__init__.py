"""Gives a checkout of LLaVA-NeXT, or of haotian-liu/LLaVA, the method: `python -m comp_patches.upstream apply PATH`.

`hooks` is what runs over there, in the environment that upstream pins; the rest runs here and needs Python alone.
"""
