"""The command line. Every command parses, calls the public function, and says what was written."""

from circuitkit.cli.commands import app, main

__all__ = ["app", "main"]
