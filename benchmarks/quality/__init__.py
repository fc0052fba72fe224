"""How good and how different are the texts of every decoder? `python -m benchmarks.quality --help`."""
