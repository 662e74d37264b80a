"""Video: decoding, presentation timestamps, temporal sampling."""
