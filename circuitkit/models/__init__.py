"""Trained networks, wired: what writes, what reads, and how to record, edit and replay them."""
