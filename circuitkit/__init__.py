"""circuitkit: from a trained network and a behaviour to a verified circuit.

Names are loaded on first use, so that ``import circuitkit`` costs milliseconds and imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from circuitkit.circuit import Circuit
    from circuitkit.dictionaries.formats import load_dictionary
    from circuitkit.dictionaries.splice import splice
    from circuitkit.errors import CircuitKitError
    from circuitkit.evaluation.completeness import completeness
    from circuitkit.evaluation.controls import controls
    from circuitkit.evaluation.faithfulness import evaluate
    from circuitkit.evaluation.hypothesis_tests import equivalence_test, independence_test, minimality_test
    from circuitkit.evaluation.minimality import minimality
    from circuitkit.evaluation.overlap import overlap
    from circuitkit.evaluation.stability import stability
    from circuitkit.exporters.base import export
    from circuitkit.features.attribution import attribution_graph
    from circuitkit.graph import Graph
    from circuitkit.methods.base import score
    from circuitkit.models.base import load
    from circuitkit.models.hooked import Model
    from circuitkit.result import NodeScores, Result
    from circuitkit.runs.pipeline import find
    from circuitkit.scores import Scores
    from circuitkit.tasks.base import Batch, Task
    from circuitkit.tasks.base import make as task

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Circuit",
    "CircuitKitError",
    "Graph",
    "Model",
    "NodeScores",
    "Result",
    "Scores",
    "Task",
    "__version__",
    "attribution_graph",
    "completeness",
    "controls",
    "equivalence_test",
    "evaluate",
    "export",
    "find",
    "independence_test",
    "load",
    "load_dictionary",
    "minimality",
    "minimality_test",
    "overlap",
    "score",
    "splice",
    "stability",
    "task",
]

_HOMES = {
    "Batch": "circuitkit.tasks.base",
    "Circuit": "circuitkit.circuit",
    "CircuitKitError": "circuitkit.errors",
    "Graph": "circuitkit.graph",
    "Model": "circuitkit.models.hooked",
    "NodeScores": "circuitkit.result",
    "Result": "circuitkit.result",
    "Scores": "circuitkit.scores",
    "Task": "circuitkit.tasks.base",
    "attribution_graph": "circuitkit.features.attribution",
    "completeness": "circuitkit.evaluation.completeness",
    "controls": "circuitkit.evaluation.controls",
    "equivalence_test": "circuitkit.evaluation.hypothesis_tests",
    "evaluate": "circuitkit.evaluation.faithfulness",
    "export": "circuitkit.exporters.base",
    "find": "circuitkit.runs.pipeline",
    "independence_test": "circuitkit.evaluation.hypothesis_tests",
    "load": "circuitkit.models.base",
    "load_dictionary": "circuitkit.dictionaries.formats",
    "minimality": "circuitkit.evaluation.minimality",
    "minimality_test": "circuitkit.evaluation.hypothesis_tests",
    "overlap": "circuitkit.evaluation.overlap",
    "score": "circuitkit.methods.base",
    "splice": "circuitkit.dictionaries.splice",
    "stability": "circuitkit.evaluation.stability",
    "task": "circuitkit.tasks.base:make",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'circuitkit' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    value = getattr(importlib.import_module(module), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
