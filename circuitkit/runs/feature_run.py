"""A feature graph of one prompt in one call: made, pruned, tested by ablations, and kept as files.

graph.json    the pruned graph, for circuitkit and for viewers
graph.html    the page to open
report.json   analytic and measured scores, what was asked, versions and hashes
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from circuitkit.atomic import write_atomic
from circuitkit.dictionaries.base import Dictionary
from circuitkit.errors import OptionError
from circuitkit.evaluation.feature_faithfulness import circuit_faithfulness
from circuitkit.evaluation.feature_graphs import Checked, Verification, verify
from circuitkit.evaluation.feature_shares import FeatureFaithfulness
from circuitkit.features.graph import FeatureGraph
from circuitkit.features.methods import FEATURE_METHODS
from circuitkit.features.qk import QkAttribution
from circuitkit.features.transcoder_circuits import TranscoderCircuit
from circuitkit.methods.base import checked_options
from circuitkit.models.hooked import Model
from circuitkit.runs.provenance import dictionary_sha256, model_sha256, versions
from circuitkit.runs.store import GRAPH, GRAPH_FILES, GRAPH_PAGE, REPORT, fresh_folder
from circuitkit.schema import jsonable, to_json
from circuitkit.tasks.text import encode

TESTED = "attribution-graph"  # graphs whose edges are direct effects, so that ablations can test them


@dataclass(frozen=True, eq=False)
class FeatureRun:
    """A feature graph and what it was measured to be worth.

    Args:
        found: what the method gave.
        graph: its graph, pruned.
        whole: nodes and edges before pruning.
        faithfulness: of the graph as a circuit, next to random circuits; None if it was not tested.
        verification: its edges against ablations; None if it was not tested.
        meta: what was asked, versions and hashes.
    """

    found: Any
    graph: FeatureGraph
    whole: tuple[int, int]
    faithfulness: FeatureFaithfulness | None
    verification: Verification | None
    meta: dict[str, Any]

    def strongest(self, most: int = 5) -> list[str]:
        """The largest pairs of an attention score, or the largest paths; a graph alone has none."""
        if isinstance(self.found, QkAttribution):
            return [f"{pair.weight:+.4g}  {pair.query.name} x {pair.key.name}" for pair in self.found.top(most)]
        return [str(path) for path in self.found.paths[:most]] if isinstance(self.found, TranscoderCircuit) else []

    def report(self) -> dict[str, Any]:
        """All scores as plain data; what is undefined is null."""
        graph, kept = self.graph, self.faithfulness
        out: dict[str, Any] = {
            "nodes": len(graph), "edges": graph.n_edges, "nodes_before": self.whole[0], "edges_before": self.whole[1],
            "replacement_score": _finite(graph.replacement_score),
            "completeness_score": _finite(graph.completeness_score),
        }  # fmt: skip
        if kept is not None:
            out |= {
                "faithfulness": kept.faithfulness, "completeness": kept.completeness,
                "random_faithfulness": list(kept.random_faithfulness), "verdict": kept.verdict,
                "ablated": kept.ablated, "errors": kept.errors, "mode": kept.mode,
            }  # fmt: skip
        if self.verification is not None:
            parts = ("edges", "random_edges", "paths", "nodes")
            out["predicted_against_measured"] = {part: _agreement(getattr(self.verification, part)) for part in parts}
        if lines := self.strongest():
            out["strongest"] = lines
        return out | {"provenance": jsonable(self.meta)}


def explain(
    model: Model,
    dictionaries: Sequence[Dictionary],
    prompt: str,
    *,
    method: str = TESTED,
    nodes: float = 0.8,
    edges: float = 0.98,
    test: bool = True,
    seed: int = 0,
    **options: Any,
) -> FeatureRun:
    """Explain one prompt by a registered method, prune the graph, and test it.

    Args:
        model: a transformer, or for untested graphs a recurrent network.
        dictionaries: in their places.
        prompt: a text; for a model without tokenizer token ids, as ``"3 1 4"``.
        method: of `circuitkit.features.methods.FEATURE_METHODS`.
        nodes: share of influence that is kept.
        edges: the same of edges.
        test: whether to ablate: what a graph says of direct effects is then measured, and the circuit judged.
        seed: of random circuits and random edges.
        options: the method's own.

    Raises:
        UnknownName: if no method has that name.
        OptionError: if prompt, dictionaries or options do not fit.
    """
    options = checked_options(method, FEATURE_METHODS[method], options)  # type: ignore[arg-type]
    began = time.perf_counter()
    found = FEATURE_METHODS[method](model, dictionaries, read_prompt(model, prompt), **options)
    whole = found if isinstance(found, FeatureGraph) else found.graph
    pruned = whole.prune(nodes, edges) if method == TESTED else whole
    made = time.perf_counter()
    tested = test and method == TESTED and model.family == "transformer"
    held = {"frozen_mlps": options.get("frozen_mlps", False), "seed": seed}
    faithful = circuit_faithfulness(model, dictionaries, pruned, errors="kept", **held) if tested else None
    verified = verify(model, dictionaries, pruned, **held) if tested else None
    meta = {
        "model": model.name, "prompt": prompt, "method": method, "options": options,
        "pruning": {"nodes": nodes, "edges": edges}, "seed": seed,
        "seconds": {"graph": round(made - began, 3), "test": round(time.perf_counter() - made, 3)},
        "versions": versions(), "model_sha256": model_sha256(model.module),
        "dictionaries_sha256": [dictionary_sha256(one) for one in dictionaries],
    }  # fmt: skip
    return FeatureRun(found, pruned, (len(whole), whole.n_edges), faithful, verified, meta)


def read_prompt(model: Model, prompt: str) -> Int[Tensor, " pos"]:
    """The token ids of a prompt. Raises OptionError for a text where there is no tokenizer."""
    if model.tokenizer is not None:
        return torch.tensor(encode(model, [prompt])[0])
    words = prompt.replace(",", " ").split()
    if not words or not all(word.isdecimal() for word in words):
        raise OptionError(f"got the prompt {prompt!r}, and {model.name} has no tokenizer; give token ids as '3 1 4'")
    return torch.tensor([int(word) for word in words])


def write_feature_run(path: str | Path, run: FeatureRun, **asked: Any) -> Path:
    """Write the files of a run as a folder, complete or not at all; an older run there is replaced.

    Args:
        asked: what else the report is to remember.

    Raises:
        OptionError: if the folder cannot be used.
    """
    with fresh_folder(path, GRAPH_FILES) as fresh:
        run.graph.save(fresh / GRAPH)
        run.graph.to_html(fresh / GRAPH_PAGE)
        report = run.report()
        report["provenance"] |= jsonable(asked)
        write_atomic(fresh / REPORT, to_json(report))
    return Path(path)


def _agreement(part: Checked) -> dict[str, Any]:
    return {
        mode: {"spearman": _finite(part.spearman(mode)), "r2": _finite(part.r_squared(mode)), "n": len(part)}
        for mode in part.measured
    }


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
