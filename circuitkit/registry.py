"""Named things of one kind (methods, tasks, formats), found by the name a user types."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import TypeVar

from circuitkit.errors import UnknownName

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """Names to things; filled by decorators in the modules of one package, loaded on first use.

    >>> shapes: Registry[int] = Registry("shape")
    >>> _ = shapes.add("square")(4)
    >>> shapes["square"]
    4
    >>> shapes["sqare"]
    Traceback (most recent call last):
    circuitkit.errors.UnknownName: unknown shape 'sqare'; did you mean 'square'? Known: square

    Args:
        kind: what one entry is called, for messages; third parties add entries under ``circuitkit.<kind>s``.
        package: the package whose modules register entries when imported.
    """

    def __init__(self, kind: str, package: str | None = None) -> None:
        self.kind = kind
        self._package = package
        self._entries: dict[str, T] = {}
        self._loaded = package is None

    def add(self, name: str) -> Callable[[T], T]:
        """Register the decorated thing under ``name``; a second use of a name is refused."""

        def register(thing: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = thing
            return thing

        return register

    def __getitem__(self, name: str) -> T:
        self._load()
        if name not in self._entries:
            near = difflib.get_close_matches(str(name), self._entries, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            known = ", ".join(sorted(self._entries)) or "none"
            raise UnknownName(f"unknown {self.kind} {name!r}{hint} Known: {known}")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        self._load()
        return len(self._entries)

    def _load(self) -> None:
        if self._loaded:
            return
        assert self._package is not None
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")
        for entry in entry_points(group=f"circuitkit.{self.kind}s"):
            entry.load()
        # Last, so that loading which was broken off begins again; modules that are in memory do not run twice.
        self._loaded = True
