"""Measured claims about ngeval's speed and memory: ``python -m benchmarks``."""
