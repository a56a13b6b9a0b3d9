"""Checkpoints × batches as units.

What is computed for each, by which processes, into which file.
"""
