"""What a user asked for by name: model, task, method and their options, read before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from circuitkit.circuit import Circuit
from circuitkit.errors import OptionError, UnsupportedModel
from circuitkit.evaluation.faithfulness import evaluate
from circuitkit.functional.metrics import METRICS
from circuitkit.methods.base import METHODS, Plan, score
from circuitkit.models.base import load
from circuitkit.models.hooked import Model
from circuitkit.models.neurons import split_like
from circuitkit.models.views import check_recurrent, read_time, viewed_like, with_view
from circuitkit.models.zoo import zoo_name, zoo_names
from circuitkit.result import NodeScores, Result
from circuitkit.runs.manifest import manifest_of
from circuitkit.runs.options import options_of, read_options
from circuitkit.runs.pipeline import find
from circuitkit.runs.provenance import data_sha256, model_sha256
from circuitkit.scores import Scores
from circuitkit.tasks.base import TASKS, Task, make


@dataclass(frozen=True)
class Request:
    """A model and a behaviour by name.

    Args:
        model: what `circuitkit.load` takes, as text.
        task: a registered task.
        n: how many pairs the task draws.
        seed: seed of the task, and of whatever is random afterwards.
        task_options: the task's own options.
        method: a registered method.
        options: the method's own options.
        metric: a metric other than the task's own, or None.
        neurons: how many neurons make a node, or None for whole MLPs.
        time: how a recurrent network's time is cut, as text; None for collapsed.
        group: what a node of a recurrent network is; None for units.
    """

    model: str
    task: str
    n: int = 64
    seed: int = 0
    task_options: dict[str, Any] = field(default_factory=dict)
    method: str = "eap-ig"
    options: dict[str, Any] = field(default_factory=dict)
    metric: str | None = None
    neurons: int | None = None
    time: str | None = None
    group: str | None = None

    @classmethod
    def read(cls, typed: Sequence[str], *, task: str, method: str, metric: str | None, **asked: Any) -> Request:
        """A request with the options typed for the method or the task; what both have is the method's.

        Raises:
            UnknownName: for a method, task or metric that is not registered.
            OptionError: for an option that neither takes.
        """
        of_method, of_task = options_of(METHODS[method]), options_of(TASKS[task])
        values = read_options(typed, of_task | of_method, f"method {method} with task {task}")
        ours = {name: value for name, value in values.items() if name in of_method}
        theirs = {name: value for name, value in values.items() if name not in of_method}
        if metric is not None:
            METRICS[metric]
        if asked.get("time") is not None:
            read_time(asked["time"])
        return cls(task=task, method=method, metric=metric, task_options=theirs, options=ours, **asked)

    def prepare(self) -> tuple[Model, Task]:
        """Load the model and make the task."""
        if zoo_name(self.model):
            # A bar over the few tensors of a zoo model says nothing; one over a download does.
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        try:
            model = load(self.model, neurons=self.neurons)
        except UnsupportedModel as error:
            near = get_close_matches(self.model, zoo_names(), n=1, cutoff=0.7)
            raise UnsupportedModel(f"{error} Did you mean {near[0]!r}?" if near else str(error)) from error
        if self.time or self.group:
            check_recurrent(model, "time" if self.time else "group")
        task = make(self.task, model, n=self.n, seed=self.seed, **self.task_options)
        model = self._viewed(model, task)
        return model, task.with_metric(self.metric) if self.metric else task

    def _viewed(self, model: Model, task: Task) -> Model:
        """The model in the view asked for; its steps and the steps that are read are the task's."""
        longest = max(batch.clean.shape[1] for batch in task.batches)
        answers = sorted({int(i) for batch in task.batches for i in batch.positions.unique()})
        steps = longest if self.time == "expanded" else None
        return with_view(model, self.time, steps=steps, group=self.group, read_at=answers)

    def score(self, **settings: Any) -> Scores | NodeScores:
        """`circuitkit.score` for this request."""
        model, task = self.prepare()
        return score(model, task, method=self.method, seed=self.seed, **settings, **self.options)

    def find(self, **settings: Any) -> Circuit:
        """`circuitkit.find` for this request; the circuit remembers what was asked, to be repeated."""
        model, task = self.prepare()
        circuit = find(model, task, method=self.method, seed=self.seed, **settings, **self.options)
        asked = {"model": self.model, "task": self.task, "task_options": self.task_options}
        return replace(circuit, meta={**circuit.meta, **asked})


def read_settings(batch_size: str, budget: str | None, progress: bool) -> dict[str, Any]:
    """How the work is to be cut, as typed: checked before anything is loaded. Raises OptionError."""
    size: int | str = int(batch_size) if batch_size.isdecimal() else batch_size
    Plan.of(size, budget, progress, 0)
    return {"batch_size": size, "budget": budget, "progress": progress}


def evaluate_again(
    path: str | Path,
    *,
    model: str | None = None,
    task: str | None = None,
    metric: str | None = None,
    n: int | None = None,
    seed: int | None = None,
    **settings: Any,
) -> tuple[Result, str]:
    """Measure a saved circuit again, and say in what the data or the model differ from when it was found.

    Raises:
        OptionError: if the circuit does not say where it came from and no model or task is named.
        GraphError: if the model's graph is not the circuit's.
    """
    circuit = Circuit.load(path)
    if "model" not in circuit.meta and (model is None or task is None):
        raise OptionError(f"{path} does not say which model and task it is for; give --model and --task")
    made = manifest_of(circuit) if "model" in circuit.meta else None
    known = {} if made is None else made.model_dump(include={"model", "task", "n", "seed", "metric", "task_options"})
    if task not in (None, known.get("task")):
        known = {name: known[name] for name in ("model", "n", "seed") if name in known}
    asked = {"model": model, "task": task, "n": n, "seed": seed, "metric": metric}
    request = Request(**{**known, **{name: value for name, value in asked.items() if value is not None}})
    loaded, behaviour = request.prepare()
    loaded = (viewed_like if loaded.family == "recurrent" else split_like)(loaded, circuit.graph)
    result = evaluate(loaded, behaviour, circuit, seed=request.seed, **settings)
    notes = []
    if made and model_sha256(loaded.module) != made.model_sha256:
        notes.append("the weights are not those that the circuit was found on")
    if made and data_sha256(behaviour) != made.data_sha256:
        notes.append("the pairs or the metric are not those that the circuit was found on")
    return result, "; ".join(notes)
