"""Probes of frozen features: features are read once, and small classifiers are fitted to them."""
