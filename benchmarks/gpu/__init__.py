"""One command that checks and measures everything on a GPU: tools/gpu_check.py."""
