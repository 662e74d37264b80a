"""Samples that lie together in large files, and are read there: tar archives and parquet files."""
