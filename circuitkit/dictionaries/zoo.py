"""Small trained dictionaries that ship with circuitkit, by name: ``<zoo model>/<set>/<layer>``.

How they were trained and what they were measured to do is in each card, in ``data/dictionaries/README.md`` and in
docs/dictionaries.md; `benchmarks/train_dictionaries.py` trains them again.
"""

from __future__ import annotations

from pathlib import Path

from circuitkit.errors import UnknownName
from circuitkit.resources import resource

FOLDER = "dictionaries"
FILE = "dictionary.json"


def dictionary_names() -> tuple[str, ...]:
    """Names that `load_dictionary` accepts without a network: ``stories260k/transcoders/2``, ...

    >>> "stories260k/transcoders/2" in dictionary_names()
    True
    """
    root = resource(FOLDER)
    return tuple(sorted(path.parent.relative_to(root).as_posix() for path in root.rglob(FILE)))


def dictionary_sets() -> tuple[str, ...]:
    """Names that `load_dictionaries` accepts: all layers of one kind.

    >>> "stories260k/transcoders" in dictionary_sets()
    True
    """
    return tuple(dict.fromkeys(name.rpartition("/")[0] for name in dictionary_names()))


def dictionary_folder(name: str) -> Path | None:
    """The folder of a dictionary or set that ships with circuitkit; None for a name that is nothing like theirs.

    Raises:
        UnknownName: for a name that begins with a model's that dictionaries ship for, and is none of theirs.
    """
    sets = dictionary_sets()
    if name in (*sets, *dictionary_names()):
        return resource(FOLDER, *name.split("/"))
    if name.partition("/")[0] in {one.partition("/")[0] for one in sets}:
        raise UnknownName(
            f"no dictionary {name!r} ships with circuitkit; sets are {', '.join(sets)}, each by layer: /0"
        )
    return None
