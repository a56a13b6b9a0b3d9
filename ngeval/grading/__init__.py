"""Updates in, rows out: γ and what belongs beside it, for whole updates, layers and samples."""
