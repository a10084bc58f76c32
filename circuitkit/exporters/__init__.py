"""Circuits as files that other tools open; one file per format."""
