"""Checkpoints × batches as units: what is computed for each, by which processes, and where to."""
