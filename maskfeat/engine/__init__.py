"""The run: one Trainer, evaluation, resuming, metrics log."""
