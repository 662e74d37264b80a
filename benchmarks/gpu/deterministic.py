"""A module for PLUGINS: asks PyTorch for deterministic algorithms."""

import torch

torch.use_deterministic_algorithms(True)
