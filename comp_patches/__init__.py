"""The method of CoMP: native-resolution vision towers (C-RoPE), a 2x2 adapter and an alignment loss.

The core needs torch, numpy, pillow and safetensors only; `llava_plugin` and `commands` are its bridges to a host.
"""
