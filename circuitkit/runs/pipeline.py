"""The main job in one call: score every edge, choose a circuit, measure what it does."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Literal, get_args

from circuitkit.circuit import Circuit
from circuitkit.errors import OptionError
from circuitkit.evaluation.faithfulness import evaluate
from circuitkit.methods.base import METHODS, Plan, checked_options, edge_methods, score
from circuitkit.models.base import load
from circuitkit.models.hooked import Model
from circuitkit.models.neurons import group_size
from circuitkit.runs.provenance import data_sha256, model_sha256, versions
from circuitkit.scores import Scores
from circuitkit.tasks.base import Batch, Task, make

Selection = Literal["auto", "top", "grow", "own"]
EDGES = 100  # how many edges a circuit has if neither the user nor the method says


def find(
    model: Model | str,
    task: Task | str,
    *,
    method: str = "eap-ig",
    edges: int | None = None,
    selection: Selection = "auto",
    absolute: bool = True,
    batch_size: int | Literal["auto"] = "auto",
    budget: int | str | None = None,
    progress: bool = True,
    seed: int = 0,
    **options: Any,
) -> Circuit:
    """The circuit of a behaviour, with its scores, its measured faithfulness and where it came from.

    Args:
        model: a loaded model, or whatever `circuitkit.load` takes.
        task: a task, or the name of one.
        method: how edges are scored.
        edges: how many edges the circuit may have; by default what the method itself chose, or 100.
        selection: ``top`` takes the strongest connected edges, ``grow`` adds the best from the logits on, ``own`` takes
            what the method chose; ``auto`` is what fits the method.
        absolute: rank edges by magnitude (True), or only by how much they support the behaviour (False).
        batch_size: examples at a time.
        budget: memory that activations may take, in bytes or as text such as ``"4GiB"``.
        progress: show progress bars.
        seed: seed of the task (where it is given by name), of the random circuits and of the bootstrap.
        options: the method's own options.

    Raises:
        UnknownName: for a method or task that is not registered.
        OptionError: for an option out of range.
    """
    if selection not in get_args(Selection):
        raise OptionError(f"got selection {selection!r}, expected one of {', '.join(get_args(Selection))}")
    if selection == "own" and edges is not None:
        raise OptionError("selection 'own' takes the edges that the method chose; leave out edges, or use 'top'")
    # What can be refused is refused before a model is loaded.
    checked_options(method, METHODS[method], options)
    if method not in edge_methods():
        raise OptionError(
            f"{method} scores components, not edges, so it gives no circuit; use circuitkit.score, or one of "
            + ", ".join(edge_methods())
        )
    Plan.of(batch_size, budget, progress, seed)
    model = load(model) if isinstance(model, str) else model
    task = make(task, model, seed=seed) if isinstance(task, str) else task
    # With positions there are more edges than the model's graph has; how many, the task's spans say.
    if edges is not None and (edges < 1 or (edges > model.graph.n_edges and not METHODS[method].positions)):
        raise OptionError(
            f"got edges = {edges}, expected 1 to {model.graph.n_edges:,}: {model.name} has no more possible edges"
        )
    common: dict[str, Any] = {"batch_size": batch_size, "budget": budget, "progress": progress, "seed": seed}
    began = time.perf_counter()
    scores = score(model, task, method=method, **common, **options)
    scored = time.perf_counter()
    selection, circuit = _cut(scores, edges, selection, absolute)
    result = evaluate(model, task, circuit, **common)
    ended = time.perf_counter()
    meta = {
        **_where_from(model, task, scores),
        "selection": selection if absolute else f"{selection}, signed",
        "edges": len(circuit) if edges is None else edges,
        "seed": seed,
        "seconds": {"score": round(scored - began, 3), "evaluate": round(ended - scored, 3)},
    }
    return replace(circuit, scores=scores, result=result, meta=meta)


def _cut(scores: Scores, edges: int | None, selection: Selection, absolute: bool) -> tuple[Selection, Circuit]:
    """The circuit, and which way it was cut."""
    if selection == "auto":
        own = scores.selected is not None and edges is None
        selection = "own" if own else "top" if scores.comparable else "grow"
    if selection == "own":
        return selection, scores.own()
    edges = min(EDGES, scores.graph.n_edges) if edges is None else edges
    cut = scores.grow if selection == "grow" else scores.top
    return selection, cut(edges, absolute=absolute)


def _where_from(model: Model, task: Task, scores: Scores) -> dict[str, Any]:
    return {
        "model": model.name,
        "neurons": group_size(model.graph),
        "task": task.name,
        "n": len(task),
        "metric": task.metric.name,
        "method": scores.method,
        "options": dict(scores.options),
        "signed": scores.signed,
        "d_model": model.wiring.width,
        "versions": versions(),
        "model_sha256": model_sha256(model.module),
        "data_sha256": data_sha256(task),
        "example": _example(model, task.batches[0]),
    }


def _example(model: Model, batch: Batch) -> dict[str, str]:
    """The first pair of a task as text, for the page that shows the circuit."""
    row = batch.rows(slice(0, 1))
    length = int(row.lengths[0])
    ids = {
        "clean": row.clean[0, :length],
        "corrupt": row.corrupt[0, :length],
        "right": row.right.flatten(),
        "wrong": row.wrong.flatten(),
    }
    return {name: _text(model, [i for i in values.tolist() if i >= 0]) for name, values in ids.items()}


def _text(model: Model, ids: list[int]) -> str:
    return " ".join(map(str, ids)) if model.tokenizer is None else str(model.tokenizer.decode(ids))
