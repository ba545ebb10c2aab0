"""The reward server and what it scores with."""
