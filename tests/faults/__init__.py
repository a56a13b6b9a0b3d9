"""Faults on purpose: runs that are killed, starved and misled, and what is lost by it."""
