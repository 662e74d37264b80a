"""Demonstrations: the quickstart, evidence suites, synthetic data and CIFAR-10; not needed for training."""
