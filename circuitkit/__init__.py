"""circuitkit: from a trained network and a behaviour to a verified circuit.

Names are loaded on first use, so that ``import circuitkit`` costs milliseconds and imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from circuitkit.circuit import Circuit
    from circuitkit.dictionaries.formats import load_dictionaries, load_dictionary
    from circuitkit.dictionaries.splice import splice
    from circuitkit.errors import CircuitKitError
    from circuitkit.evaluation.completeness import completeness
    from circuitkit.evaluation.controls import controls
    from circuitkit.evaluation.faithfulness import evaluate
    from circuitkit.evaluation.feature_faithfulness import circuit_faithfulness
    from circuitkit.evaluation.feature_graphs import verify
    from circuitkit.evaluation.hypothesis_tests import equivalence_test, independence_test, minimality_test
    from circuitkit.evaluation.minimality import minimality
    from circuitkit.evaluation.overlap import overlap
    from circuitkit.evaluation.stability import stability
    from circuitkit.exporters.base import export
    from circuitkit.features.attribution import attribution_graph, attribution_graphs
    from circuitkit.features.dashboards import dashboards
    from circuitkit.features.qk import qk_attribution
    from circuitkit.features.transcoder_circuits import transcoder_circuits
    from circuitkit.graph import Graph
    from circuitkit.methods.base import score
    from circuitkit.models.base import load
    from circuitkit.models.hooked import Model
    from circuitkit.models.sampling import sample
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
    "attribution_graphs",
    "circuit_faithfulness",
    "completeness",
    "controls",
    "dashboards",
    "equivalence_test",
    "evaluate",
    "export",
    "find",
    "independence_test",
    "load",
    "load_dictionaries",
    "load_dictionary",
    "minimality",
    "minimality_test",
    "overlap",
    "qk_attribution",
    "sample",
    "score",
    "splice",
    "stability",
    "task",
    "transcoder_circuits",
    "verify",
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
    "attribution_graphs": "circuitkit.features.attribution",
    "circuit_faithfulness": "circuitkit.evaluation.feature_faithfulness",
    "completeness": "circuitkit.evaluation.completeness",
    "controls": "circuitkit.evaluation.controls",
    "dashboards": "circuitkit.features.dashboards",
    "equivalence_test": "circuitkit.evaluation.hypothesis_tests",
    "evaluate": "circuitkit.evaluation.faithfulness",
    "export": "circuitkit.exporters.base",
    "find": "circuitkit.runs.pipeline",
    "independence_test": "circuitkit.evaluation.hypothesis_tests",
    "load": "circuitkit.models.base",
    "load_dictionaries": "circuitkit.dictionaries.formats",
    "load_dictionary": "circuitkit.dictionaries.formats",
    "minimality": "circuitkit.evaluation.minimality",
    "minimality_test": "circuitkit.evaluation.hypothesis_tests",
    "overlap": "circuitkit.evaluation.overlap",
    "qk_attribution": "circuitkit.features.qk",
    "sample": "circuitkit.models.sampling",
    "score": "circuitkit.methods.base",
    "splice": "circuitkit.dictionaries.splice",
    "stability": "circuitkit.evaluation.stability",
    "task": "circuitkit.tasks.base:make",
    "transcoder_circuits": "circuitkit.features.transcoder_circuits",
    "verify": "circuitkit.evaluation.feature_graphs",
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
