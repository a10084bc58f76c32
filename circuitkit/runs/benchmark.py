"""The benchmark of methods: every method on every model whose circuit is known, each in a process of its own.

A process of its own makes peak memory mean something, and a crash costs one cell. Every cell is written when it is
done, so a stopped benchmark goes on where it was; a cell is measured again if its question, the method's file or
the judge's changed.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import multiprocessing
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tqdm.std import tqdm

from circuitkit.atomic import write_atomic
from circuitkit.errors import FormatError, OptionError
from circuitkit.evaluation.ground_truth import RANDOM, Cell, judge
from circuitkit.evaluation.losses import losses
from circuitkit.evaluation.truths import TRUTHS, GroundTruth
from circuitkit.methods.base import METHODS, edge_methods
from circuitkit.runs.provenance import versions

CELLS, TABLE = "cells", "methods.json"


@dataclass(frozen=True)
class Benchmark:
    """All cells, and where they were measured."""

    cells: tuple[Cell, ...]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the losses to random."""
        return {
            "about": self.about,
            "cells": [cell.to_dict() for cell in self.cells],
            "losses": [asdict(loss) for loss in losses(self.cells)],
        }

    @classmethod
    def load(cls, path: str | Path) -> Benchmark:
        """Read what `benchmark_methods` wrote. Raises FormatError for any other file."""
        try:
            data = json.loads(Path(path).read_text())
            return cls(tuple(Cell(**cell) for cell in data["cells"]), data["about"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{path} is no table of a benchmark of methods ({error}); run it again") from error


def benchmark_methods(
    folder: str | Path,
    *,
    methods: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
    n: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Benchmark:
    """Run methods (default: all that score edges) on models whose circuit is known (default: all).

    ``random`` stands beside the methods always. The folder gets the cells, ``methods.json``, ``methods.md`` and
    ``methods.html``.

    Raises:
        UnknownName: for a method or a model that is not there.
        OptionError: for a method that does not score edges, or n below 1.
    """
    from circuitkit.runs.benchmark_table import write_tables

    pairs = _pairs(methods, models)
    if n < 1:
        raise OptionError(f"got n = {n}, expected at least one pair")
    cells = []
    with tqdm(total=len(pairs), desc="methods x models", disable=not progress, leave=False) as bar:
        for method, model in pairs:
            bar.set_postfix_str(f"{method} on {model}", refresh=True)
            cells.append(_cell(Path(folder) / CELLS, method, model, n, seed))
            bar.update()
    about = {"n": n, "seed": seed, "versions": versions(), "threads": torch.get_num_threads(), "device": "cpu"}
    found = Benchmark(tuple(cells), about)
    write_atomic(Path(folder) / TABLE, json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n")
    write_tables(folder, found)
    return found


def _pairs(methods: Sequence[str] | None, models: Sequence[str] | None) -> list[tuple[str, str]]:
    known = edge_methods()
    for name in methods or ():
        if name not in known and METHODS[name] is not None:
            raise OptionError(f"{name} scores components, not edges; give one of {', '.join(known)}")
    for name in models or ():
        TRUTHS[name]
    chosen = dict.fromkeys((RANDOM, *(methods or known)))
    return [(method, model) for model in dict.fromkeys(models or TRUTHS) for method in chosen]


def _cell(folder: Path, method: str, model: str, n: int, seed: int) -> Cell:
    """The cell as written by an earlier run, or measured now."""
    asked = {"method": method, "model": model, "n": n, "seed": seed, "code": _code(method)}
    path = folder / model / f"{method}.json"
    try:
        written = json.loads(path.read_text())
        if written["asked"] == asked:
            return Cell(**written["cell"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # missing, or written by another version: measured again
    cell, sound = _in_a_fresh_process(method, model, n, seed)
    if sound:
        write_atomic(path, json.dumps({"asked": asked, "cell": cell.to_dict()}, indent=1, allow_nan=False) + "\n")
    return cell


def _code(method: str) -> str:
    """Hash of the files that define a method, what is known and how it is judged."""
    files = [inspect.getfile(judge), inspect.getfile(GroundTruth)]
    files += [] if method == RANDOM else [inspect.getfile(inspect.unwrap(METHODS[method]))]
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


def _in_a_fresh_process(method: str, model: str, n: int, seed: int) -> tuple[Cell, bool]:
    """The cell, and whether it is sound: a crash or a fault of ours is shown in the table, but not kept."""
    context = _context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, method, model, n, seed), daemon=True)
    process.start()
    sender.close()
    try:
        answer = receiver.recv()
        process.join(timeout=10)
    except EOFError:
        process.join()
        answer = f"its process ended with code {process.exitcode}; out of memory is the usual cause"
    finally:
        process.terminate()
        process.join()
        receiver.close()
    if isinstance(answer, Cell):
        return answer, True
    return Cell(method, model, n, seed, refused=f"failed: {answer}"), False


def _send(sender: Connection, method: str, model: str, n: int, seed: int) -> None:
    try:
        sender.send(judge(method, model, n=n, seed=seed))
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")


def _context() -> Any:
    """Fresh processes that need not import everything again, where the system can do that."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["circuitkit.runs.benchmark"])
    return context


def unexplained(cells: Iterable[Cell]) -> list[str]:
    """Losses to random for which no reason is given, as ``method on model: what``."""
    return [f"{loss.method} on {loss.model}: {loss.what}" for loss in losses(cells) if loss.reason is None]
