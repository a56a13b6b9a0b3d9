"""Result files against a second computation of some of their rows."""
