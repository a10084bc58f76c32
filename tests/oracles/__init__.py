"""Slow literal versions of what the package computes fast; written to be read, not to be run often."""
