"""Optimization: parameter groups, optimizers, learning rate schedule, weight averaging."""
