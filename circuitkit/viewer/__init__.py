"""A circuit as one self-contained page."""
