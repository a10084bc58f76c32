"""The main job in one call: score every edge, choose a circuit, measure what it does."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Literal, get_args

from torch import Tensor

from circuitkit.circuit import Circuit
from circuitkit.errors import OptionError
from circuitkit.evaluation.faithfulness import evaluate
from circuitkit.methods.base import METHODS, Plan, checked_options, edge_methods, score
from circuitkit.models.base import load
from circuitkit.models.hooked import Model
from circuitkit.models.neurons import group_size
from circuitkit.models.views import view_in
from circuitkit.runs.provenance import data_sha256, dictionary_sha256, model_sha256, versions
from circuitkit.scores import Scores
from circuitkit.tasks.base import Batch, Task, make

Selection = Literal["auto", "top", "grow", "own"]
EDGES = 100  # how many edges a circuit has if neither the user nor the method says
SHOWN_STEPS = 24  # of an input of numbers, on the page


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
    if METHODS[method].level != "edge":
        family = METHODS[method].families[0] if isinstance(model, str) else model.family
        raise OptionError(
            f"{method} scores components, not edges, so it gives no circuit; use circuitkit.score, or one of "
            + ", ".join(edge_methods(family))
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
        **view_in(model.graph),
        "task": task.name,
        "n": len(task),
        "metric": task.metric.name,
        "method": scores.method,
        "options": dict(scores.options),
        "signed": scores.signed,
        "d_model": model.width,
        "versions": versions(),
        "model_sha256": model_sha256(model.module),
        "data_sha256": data_sha256(task),
        "dictionaries_sha256": [dictionary_sha256(one.dictionary) for one in getattr(model, "splices", ())],
        "example": _example(model, task.batches[0]),
    }


def _example(model: Model, batch: Batch) -> dict[str, str]:
    """The first pair of a task as text, for the page that shows the circuit."""
    row = batch.rows(slice(0, 1))
    length = int(row.lengths[0])
    said = {
        name: _input_text(model, values[0, :length])
        for name, values in (("clean", row.clean), ("corrupt", row.corrupt))
    }
    for name, values in (("right", row.right), ("wrong", row.wrong)):
        said[name] = _answer_text(model, [i for i in values.flatten().tolist() if i >= 0])
    if row.target is not None:
        said["target"] = _numbers(row.target[0])
    return said


def _input_text(model: Model, values: Tensor) -> str:
    return _numbers(values) if values.is_floating_point() else _text(model, values.tolist())


def _answer_text(model: Model, ids: list[int]) -> str:
    """Answers as text; a recurrent network's answers may be classes of their own, which its tokenizer does not know."""
    own = getattr(model, "d_vocab_out", None) not in (None, model.d_vocab)
    return _spelled(model.card.get("output_symbols"), ids) if own else _text(model, ids)


def _text(model: Model, ids: list[int]) -> str:
    return _spelled(model.card.get("symbols"), ids) if model.tokenizer is None else str(model.tokenizer.decode(ids))


def _spelled(symbols: list[str] | None, ids: list[int]) -> str:
    """Ids as the symbols of a card, without spaces if these are single characters; as numbers if it has none."""
    if symbols is None:
        return " ".join(map(str, ids))
    characters = sum(len(symbol) <= 1 for symbol in symbols) > len(symbols) / 2
    return ("" if characters else " ").join(symbols[i] for i in ids)


def _numbers(values: Tensor) -> str:
    """Numbers at each step, several in brackets; of a long input every k-th step, counted from the first."""
    rows = values.flatten(1)
    every = -(-len(rows) // SHOWN_STEPS)
    steps = [" ".join(f"{value:.3g}" for value in step) for step in rows[::every].tolist()]
    text = " ".join(steps) if rows.shape[1] == 1 else " ".join(f"[{step}]" for step in steps)
    return text if every == 1 else f"{text} (one in {every} of {len(rows)} steps)"
