"""Analytic costs of an iteration, and the chips they are held against."""
