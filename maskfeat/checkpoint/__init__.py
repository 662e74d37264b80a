"""Checkpoints: writing and verifying files, reading untrusted ones, fitting weights to a model."""
