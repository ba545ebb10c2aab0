"""Analytic costs of an iteration, and the peak figures of TPUs to compare them with."""
