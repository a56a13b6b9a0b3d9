"""A model, a batch and a likelihood: J and Jᵀ as products, the exact Fisher, γ of one direction."""
