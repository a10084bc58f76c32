"""The registry of cells: from a recurrent module to its blocks. A user's own cell is one file with one decorator."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from torch import Tensor, nn

from circuitkit.errors import UnsupportedModel
from circuitkit.models.recurrent.parts import Block, Write


@dataclass(frozen=True, eq=False)
class Place:
    """Where a cell stands in a network.

    Args:
        stem: what its nodes' names begin with (``l0``); a cell of several layers counts on with `layer`.
        layer: 0-based number of its first layer.
        sources: the writes that it reads as its input, joined in this order.
        start: fetches the vectors before the first step that the user's code passes in, without the axis of examples;
            None if it passes none.
    """

    layer: int
    sources: tuple[Write, ...]
    start: Callable[[], Any] | None = None

    def stem(self, offset: int = 0) -> str:
        """What the names in one of its layers begin with."""
        return f"l{self.layer + offset}"

    @property
    def size(self) -> int:
        """Numbers that it reads at each step."""
        return sum(write.size for write in self.sources)


@dataclass(frozen=True, eq=False)
class Described:
    """What a module is made of.

    Args:
        blocks: in order of computation.
        features: names of the writes that are its output at each step, joined in this order.
        n_layers: how many layers the names use up.
    """

    blocks: tuple[Block, ...]
    features: tuple[str, ...]
    n_layers: int = 1


Describe = Callable[[Any, Place], Described]


@dataclass(frozen=True, eq=False)
class Cell:
    """How to describe modules of one type.

    Args:
        type: the class of module.
        describe: ``(module, place) -> Described``.
        example: a small random module, for the laws that run over every registered cell.
        once: whether the module computes one step per call, as ``nn.GRUCell`` does.
    """

    type: type[nn.Module]
    describe: Describe
    example: Callable[[], nn.Module]
    once: bool = False


_CELLS: dict[type[nn.Module], Cell] = {}
_FOUND: list[bool] = []


def cell(
    kind: type[nn.Module], *, example: Callable[[], nn.Module], once: bool = False
) -> Callable[[Describe], Describe]:
    """Register how a type of recurrent module is described.

    A sequence module is called with ``x [batch, step, size]`` (or time first, if it has ``batch_first = False``) and
    returns the outputs at every step, or a tuple that begins with them.
    """

    def register(describe: Describe) -> Describe:
        _CELLS[kind] = Cell(kind, describe, example, once)
        return describe

    return register


def cells() -> dict[type[nn.Module], Cell]:
    """All cells: our own files, and what other packages register under the entry point ``circuitkit.cells``."""
    if not _FOUND:
        _FOUND.append(True)
        import circuitkit.models.recurrent.cells as package

        for found in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{found.name}")
        for point in entry_points(group="circuitkit.cells"):
            point.load()
    return _CELLS


def cell_of(module: nn.Module) -> Cell | None:
    """The cell that describes a module, by its exact type: a subclass may compute something else."""
    return cells().get(type(module))


def refuse(module: nn.Module, why: str) -> UnsupportedModel:
    """The error for a module that cannot be described."""
    return UnsupportedModel(f"{type(module).__name__}: {why}")


def part(tensor: Callable[[], Tensor], rows: slice) -> Callable[[], Tensor]:
    """Some rows of a weight, fetched when they are needed."""
    return lambda: tensor()[rows]
