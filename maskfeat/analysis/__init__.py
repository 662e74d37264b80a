"""Analysis after training: probes of frozen features, images of predictions, line charts."""
