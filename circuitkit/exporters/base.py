"""Circuits as files: the registry of formats, and `export`, which picks one by the file's name and writes in one step.

An exporter is a function ``circuit -> text or bytes``; it touches no file, so none can leave half of one behind.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from circuitkit.atomic import write_atomic
from circuitkit.circuit import Circuit
from circuitkit.errors import FormatError
from circuitkit.features.graph import FeatureGraph
from circuitkit.registry import Registry

Exporter = Callable[[Circuit], str | bytes]

EXPORTERS: Registry[Exporter] = Registry("format", "circuitkit.exporters")
SUFFIXES: dict[str, str] = {}


def exporter(name: str, *suffixes: str) -> Callable[[Exporter], Exporter]:
    """Register a function under the name that users type and the file endings it answers to (default: its name)."""

    def register(function: Exporter) -> Exporter:
        EXPORTERS.add(name)(function)
        for suffix in suffixes or (name,):
            SUFFIXES[f".{suffix}"] = name
        return function

    return register


def export(circuit: Circuit | FeatureGraph, path: str | Path, *, format: str | None = None) -> Path:
    """Write a circuit for another tool; the format follows from the end of the file's name, the longest match first.

    A feature graph is written by `circuitkit.exporters.feature_graph.export_feature_graph`.

    Raises:
        UnknownName: if ``format`` is not registered.
        FormatError: if the ending belongs to no format, the circuit does not fit it, or the file cannot be written.

    >>> import tempfile
    >>> from circuitkit.graph import chain_graph
    >>> circuit = Circuit.from_edges(chain_graph(1), ["input->m0", "m0->logits"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export(circuit, Path(folder) / "chain.graphml").name
    'chain.graphml'
    """
    if isinstance(circuit, FeatureGraph):
        from circuitkit.exporters.feature_graph import export_feature_graph

        return export_feature_graph(circuit, path, format=format)
    write = EXPORTERS[format or format_of(path)]
    return write_atomic(path, write(circuit))


def format_of(path: str | Path) -> str:
    """The name of the format that a file's ending stands for.

    Raises:
        FormatError: if it stands for none; the message lists the endings.

    >>> format_of("ioi.eap-ig.json"), format_of("ioi.circuit.json")
    ('eap-ig', 'json')
    """
    len(EXPORTERS)  # loads the formats, which fills the table of endings
    name = Path(path).name.lower()
    fitting = [suffix for suffix in SUFFIXES if name.endswith(suffix)]
    if not fitting:
        raise FormatError(
            f"no format for {Path(path).name!r}; name the file with one of {', '.join(sorted(SUFFIXES))}, "
            f"or give format= one of {', '.join(EXPORTERS)}"
        )
    return SUFFIXES[max(fitting, key=len)]
