"""How fast metaframe is, against hand-written code and against the libraries of the field.

`python -m benchmarks` runs the quick ones; every module below is one command with `--help`.
Results (a table on screen, JSON and a plot) go to `runs/benchmarks/`.
"""
