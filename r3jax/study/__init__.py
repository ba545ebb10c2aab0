"""Studies: runs that differ in a few keys, and what they say about the paper's claims."""
