"""What a user asked for by name: model, task, method and their options, read before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitkit.circuit import Circuit, Result, Scores
from circuitkit.errors import OptionError
from circuitkit.methods.base import METHODS
from circuitkit.runs.manifest import manifest_of
from circuitkit.runs.options import options_of, read_options
from circuitkit.tasks.base import TASKS, Task, make

if TYPE_CHECKING:
    from circuitkit.models.base import Model


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
    """

    model: str
    task: str
    n: int = 64
    seed: int = 0
    task_options: dict[str, Any] = field(default_factory=dict)
    method: str = "eap-ig"
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, model: str, task: str, method: str, n: int, seed: int, arguments: Sequence[str]) -> Request:
        """A request with the options that were typed for the method or the task; the method is asked first.

        Raises:
            UnknownName: for a method or task that is not registered.
            OptionError: for an option that neither takes.
        """
        of_method, of_task = options_of(METHODS[method]), options_of(TASKS[task])
        values = read_options(arguments, of_task | of_method, f"method {method} with task {task}")
        ours = {name: value for name, value in values.items() if name in of_method}
        theirs = {name: value for name, value in values.items() if name not in of_method}
        return cls(model, task, n, seed, theirs, method, ours)

    def prepare(self) -> tuple[Model, Task]:
        """Load the model and make the task."""
        from circuitkit.models.base import load

        model = load(self.model)
        return model, make(self.task, model, n=self.n, seed=self.seed, **self.task_options)

    def score(self, **settings: Any) -> Scores:
        """`circuitkit.score` for this request."""
        from circuitkit.methods.base import score

        model, task = self.prepare()
        return score(model, task, method=self.method, seed=self.seed, **settings, **self.options)

    def find(self, **settings: Any) -> Circuit:
        """`circuitkit.find` for this request; the circuit remembers what was asked, to be repeated."""
        from circuitkit.runs.pipeline import find

        model, task = self.prepare()
        circuit = find(model, task, method=self.method, seed=self.seed, **settings, **self.options)
        asked = {"model": self.model, "task": self.task, "task_options": self.task_options}
        return replace(circuit, meta={**circuit.meta, **asked})


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
    from circuitkit.evaluation.faithfulness import evaluate
    from circuitkit.runs.provenance import data_sha256, model_sha256

    circuit = Circuit.load(path)
    if "model" not in circuit.meta and (model is None or task is None):
        raise OptionError(f"{path} does not say which model and task it is for; give --model and --task")
    made = manifest_of(circuit) if "model" in circuit.meta else None
    request = Request(
        model or made.model,
        task or made.task,
        n or (made.n if made else 64),
        seed if seed is not None else (made.seed if made else 0),
        made.task_options if made and task in (None, made.task) else {},
    )
    loaded, behaviour = request.prepare()
    behaviour = behaviour.with_metric(metric) if metric else behaviour
    result = evaluate(loaded, behaviour, circuit, seed=request.seed, **settings)
    notes = []
    if made and model_sha256(loaded.module) != made.model_sha256:
        notes.append("the weights are not those that the circuit was found on")
    if made and data_sha256(behaviour) != made.data_sha256:
        notes.append("the pairs or the metric are not those that the circuit was found on")
    return result, "; ".join(notes)
