"""Layouts, caches, prompts and tokenizers."""
