"""Sparse dictionaries: from a site's activations to latents and back, and where they are read and written."""
