"""Before and after training: checks and preparation of data, probes, features, predictions, images, export."""
