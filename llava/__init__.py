"""LLaVA-NeXT's module paths and names over current transformers: the host that CoMP's towers and losses plug into.

Importing this package imports nothing heavy; take what is needed from its modules.
"""
