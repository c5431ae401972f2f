"""Research on quality, apart from speed; `python -m benchmarks.research.NAME --help` explains each command.

`evaluation` and `experiments` measure configurations and ways to choose clips on the embedded model. `baselines` has
other methods for 4-bit weights. `clip_intervals` simulates the coverage of the clip optimizer's intervals.
"""
