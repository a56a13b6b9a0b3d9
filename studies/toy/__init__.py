"""Least squares with two parameters and two samples, drawn by `python -m studies toy`."""
