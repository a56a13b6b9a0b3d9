"""Inputs that try to break ngeval: two engines, four targets, one oracle; see ``README.md``."""
