"""What is learned from a batch. Each objective wraps a backbone and returns a loss; the training loop knows no more."""
