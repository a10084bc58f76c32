"""What a user names on a command line: one dictionary, or a set of them under one name."""

from __future__ import annotations

from pathlib import Path

from circuitkit.dictionaries.base import Dictionary
from circuitkit.dictionaries.formats import load_dictionaries, load_dictionary
from circuitkit.dictionaries.zoo import dictionary_sets

SINGLE = ("dictionary.json", "cfg.json", "config.json", "ae.pt")


def named_dictionaries(name: str) -> tuple[Dictionary, ...]:
    """The dictionaries of a path or name: a set that ships, or a folder of several, gives all of them, by layer.

    Raises:
        FormatError: if there is none, or one cannot be read.
    """
    folder = Path(name)
    several = folder.is_dir() and not any((folder / file).exists() for file in SINGLE)
    if several or (not folder.exists() and name in dictionary_sets()):
        return load_dictionaries(name)
    return (load_dictionary(name),)
