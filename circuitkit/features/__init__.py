"""Graphs of dictionary features: the local replacement model of one prompt, swept layer by layer."""
