"""Measures the package against plain formulations of the same computations; tools/benchmark.py calls it.

The plain formulations stand in `benchmarks/`, beside this package in a checkout: only from there can it run.
"""
