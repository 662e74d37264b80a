"""Masked feature prediction: MaskFeat pre-training, fine-tuning and testing in PyTorch."""
