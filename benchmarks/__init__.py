"""Benchmarks: `make bench` measures on this machine and rewrites the tables of the docs from the result file."""
