"""FAdam as a plain torch optimizer, and the checks of an optimizer's settings and state."""
