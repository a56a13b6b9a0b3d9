"""A model at fixed θ as a pure function of its trainable parameters, with checks and sharding."""
