"""Checks of a data set before it is trained on: what it holds, and what is wrong with it."""
