"""Masked feature prediction: MaskFeat and MFM pre-training, fine-tuning and testing in PyTorch."""

__version__ = "0.1.0"
