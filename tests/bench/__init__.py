"""Benchmarks: `python -m tests.bench`. Programs, never timed tests; each module is one family."""
