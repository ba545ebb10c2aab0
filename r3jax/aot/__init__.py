"""Compilation for TPUs that are not there: what fits, how long it takes, what it sends around."""
