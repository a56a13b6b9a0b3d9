"""Optimizers as methods: the step that a ``torch.optim.Optimizer`` would take now."""
