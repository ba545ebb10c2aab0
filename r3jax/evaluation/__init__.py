"""Evaluation of a model on held-out prompts (docs/algorithm.md#evaluation).

`evaluate.Evaluation.run` draws samples, `sample_log` stores them, `summary.summarize` computes
their numbers. Nothing here formats numbers for people: that is `r3jax.report`.
"""
