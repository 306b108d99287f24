"""Benchmarks a stranger can run; each is a module: `python -m benchmarks.step`."""
