"""What a user asked for by name: model, task, method and their options, read before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from circuitkit.circuit import Circuit
from circuitkit.dictionaries.base import Dictionary
from circuitkit.dictionaries.named import named_dictionaries
from circuitkit.dictionaries.respliced import spliced_like
from circuitkit.dictionaries.splice import splice
from circuitkit.errors import OptionError, UnsupportedModel
from circuitkit.evaluation.faithfulness import evaluate
from circuitkit.features.methods import FEATURE_METHODS
from circuitkit.functional.metrics import METRICS
from circuitkit.methods.base import METHODS, Plan, score
from circuitkit.methods.sparse_feature_circuits import strongest_of_each
from circuitkit.models.base import load
from circuitkit.models.hooked import Model
from circuitkit.models.neurons import split_like
from circuitkit.models.views import check_recurrent, read_time, viewed_like, with_view
from circuitkit.models.zoo import zoo_name, zoo_names
from circuitkit.result import NodeScores, Result
from circuitkit.runs.manifest import manifest_of
from circuitkit.runs.options import options_of, read_options
from circuitkit.runs.pipeline import find
from circuitkit.runs.provenance import data_sha256, dictionary_sha256, model_sha256
from circuitkit.runs.store import CIRCUIT, feature_graph_file
from circuitkit.scores import Scores
from circuitkit.tasks.base import TASKS, Task, make

REPEATED = ("model", "task", "n", "seed", "metric", "task_options", "dictionaries")
LATENTS = 20  # nodes of each dictionary, if the user does not say
CHOICE_STEPS = 2  # of the path along which latents are compared; more cost more and choose nearly the same


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
        dictionaries: names or paths of dictionaries to splice in.
        latents: of each of them, how many latents become nodes: those with the largest effects on the task.
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
    dictionaries: Sequence[str] = ()
    latents: int = LATENTS

    @classmethod
    def read(cls, typed: Sequence[str], *, task: str, method: str, metric: str | None, **asked: Any) -> Request:
        """A request with the options typed for the method or the task; what both have is the method's.

        Raises:
            UnknownName: for a method, task or metric that is not registered.
            OptionError: for an option that neither takes.
        """
        if method in FEATURE_METHODS:
            raise OptionError(f"{method} explains one prompt, not a task; use: circuitkit graph MODEL PROMPT")
        of_method, of_task = options_of(METHODS[method]), options_of(TASKS[task])
        values = read_options(typed, of_task | of_method, f"method {method} with task {task}")
        ours = {name: value for name, value in values.items() if name in of_method}
        theirs = {name: value for name, value in values.items() if name not in of_method}
        if metric is not None:
            METRICS[metric]
        if asked.get("time") is not None:
            read_time(asked["time"])
        if asked.get("latents") is not None and not asked.get("dictionaries"):
            raise OptionError("got --latents without --dictionary: whose? See circuitkit list dictionaries")
        asked = {name: value for name, value in asked.items() if value is not None}
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
        task = task.with_metric(self.metric) if self.metric else task
        return self._viewed(model, task), task

    def spliced(self, model: Model, task: Task, progress: bool = True) -> Model:
        """The model with the dictionaries asked for, each with the latents that matter most on the task.

        All are chosen on the model as it is, so that their order makes no difference.
        """
        corrupt_value = self.options.get("corrupt_value", "counterfactual")
        found = read_dictionaries(self.dictionaries)
        if not found:
            return model
        options: dict[str, Any] = {"steps": CHOICE_STEPS, "corrupt_value": corrupt_value, "progress": progress}
        chosen = strongest_of_each(model, task, found, self.latents, **options)
        for one, latents in zip(found, chosen, strict=True):
            model = splice(model, one, latents=latents)
        return model

    def _viewed(self, model: Model, task: Task) -> Model:
        """The model in the view asked for; its steps and the steps that are read are the task's."""
        longest = max(batch.clean.shape[1] for batch in task.batches)
        answers = sorted({int(i) for batch in task.batches for i in batch.positions.unique()})
        steps = longest if self.time == "expanded" else None
        return with_view(model, self.time, steps=steps, group=self.group, read_at=answers)

    def score(self, **settings: Any) -> Scores | NodeScores:
        """`circuitkit.score` for this request."""
        model, task = self.prepare()
        model = self.spliced(model, task, settings.get("progress", True))
        return score(model, task, method=self.method, seed=self.seed, **settings, **self.options)

    def find(self, **settings: Any) -> Circuit:
        """`circuitkit.find` for this request; the circuit remembers what was asked, to be repeated."""
        model, task = self.prepare()
        model = self.spliced(model, task, settings.get("progress", True))
        circuit = find(model, task, method=self.method, seed=self.seed, **settings, **self.options)
        asked = {"model": self.model, "task": self.task, "task_options": self.task_options}
        asked |= {"dictionaries": self.dictionaries}
        return replace(circuit, meta={**circuit.meta, **asked})


def read_dictionaries(names: Sequence[str]) -> list[Dictionary]:
    """The dictionaries of several names or paths; one name may stand for a set."""
    return [one for name in names for one in named_dictionaries(name)]


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
    dictionaries: Sequence[str] | None = None,
    **settings: Any,
) -> tuple[Result, str]:
    """Measure a saved circuit again, and say in what the data or the model differ from when it was found.

    Raises:
        OptionError: if the circuit does not say where it came from and no model or task is named.
        GraphError: if the model's graph is not the circuit's.
    """
    if feature_graph_file(Path(path).parent if Path(path).name == CIRCUIT else path):
        raise OptionError(f"{path} belongs to a feature graph, which was tested when it was made; see its report.json")
    circuit = Circuit.load(path)
    if "model" not in circuit.meta and (model is None or task is None):
        raise OptionError(f"{path} does not say which model and task it is for; give --model and --task")
    made = manifest_of(circuit) if "model" in circuit.meta else None
    known = {} if made is None else made.model_dump(include=set(REPEATED))
    if task not in (None, known.get("task")):
        known = {name: known[name] for name in ("model", "n", "seed", "dictionaries") if name in known}
    asked: dict[str, Any] = {"model": model, "task": task, "n": n, "seed": seed, "metric": metric}
    asked |= {"dictionaries": dictionaries}
    request = Request(**{**known, **{name: value for name, value in asked.items() if value is not None}})
    loaded, behaviour = request.prepare()
    loaded = (viewed_like if loaded.family == "recurrent" else split_like)(loaded, circuit.graph)
    spliced = read_dictionaries(request.dictionaries)
    loaded = spliced_like(loaded, spliced, circuit.graph)
    result = evaluate(loaded, behaviour, circuit, seed=request.seed, **settings)
    notes = []
    if made and model_sha256(loaded.module) != made.model_sha256:
        notes.append("the weights are not those that the circuit was found on")
    if made and data_sha256(behaviour) != made.data_sha256:
        notes.append("the pairs or the metric are not those that the circuit was found on")
    if made and sorted(map(dictionary_sha256, spliced)) != sorted(made.dictionaries_sha256):
        notes.append("the dictionaries are not those that the circuit was found on")
    return result, "; ".join(notes)
