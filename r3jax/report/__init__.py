"""Tables, plots and HTML pages of evaluations, comparisons, runs and galleries."""
