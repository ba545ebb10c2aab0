"""The embedded world of coloured shapes."""
