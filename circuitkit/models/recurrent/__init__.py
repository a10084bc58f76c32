"""Recurrent networks by the same words: units write to a stream, gates read it, and the stream runs through time."""
