"""Checkpoints: write, verify and prune files, read untrusted ones, and fit weights to a model."""
