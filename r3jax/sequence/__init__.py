"""Layouts, the chat protocol, the tokenizer and the parsers of sampled text."""
