"""Evaluation of a model on held-out prompts: the R3 loop at inference, and what is read off it (R3.md section 9)."""
