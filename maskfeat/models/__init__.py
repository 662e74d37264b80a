"""Backbones behind one protocol. Never imports objectives."""
