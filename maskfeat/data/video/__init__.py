"""Video decoding, presentation timestamps and temporal sampling."""
