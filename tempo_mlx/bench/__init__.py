"""The benchmark behind `tempo-mlx bench`: this package beside mlx-lm and transformers, on one machine.

It is part of the installed package, so that it runs where the command does; studies of quality are scripts in the
repository's benchmarks/. A measurement is a set of cases that take turns (timing.py) on contenders that hold the same
weights (contenders.py), a suite is a list of such measurements (steps.py, generation.py, processes.py), and results
become a table, JSON lines, plots and a page (results.py, plots.py, page.py).
"""
