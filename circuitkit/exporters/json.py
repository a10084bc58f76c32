"""circuitkit's own circuit file: the only format that holds everything and is read back exactly."""

from __future__ import annotations

from circuitkit.circuit import Circuit
from circuitkit.exporters.base import exporter
from circuitkit.schema import circuit_to_json


@exporter("json")
def json(circuit: Circuit) -> str:
    """circuitkit's own circuit file, the same as `Circuit.save`; `Circuit.load` reads it back exactly."""
    return circuit_to_json(circuit)
