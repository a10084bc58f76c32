"""What was measured beyond one circuit's faithfulness: frozen data with a figure each, written as JSON and read back.

The functions that fill them are in `circuitkit.evaluation`; metric values are means over examples throughout.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Self

if TYPE_CHECKING:
    from pathlib import Path

    import plotly.graph_objects as go


class Measure:
    """A frozen dataclass that JSON can hold."""

    kind: ClassVar[str]

    def to_json(self) -> str:
        """The text of a file; `from_json` gives an equal object back."""
        from circuitkit.schema import jsonable, schema_name, to_json

        return to_json({"schema": schema_name(self.kind), **jsonable(asdict(self))})  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, text: str, where: str = "the text") -> Self:
        """What `to_json` wrote; ``where`` names the file in messages.

        Raises:
            FormatError: for anything else.
        """
        from pydantic import TypeAdapter, ValidationError

        from circuitkit.errors import FormatError
        from circuitkit.schema import check_schema, parse_json

        data = parse_json(text, where)
        if not isinstance(data, dict):
            raise FormatError(f"{where} holds a JSON {type(data).__name__}, expected an object; give the right file")
        check_schema(data.pop("schema", None), cls.kind, where)
        names = {item.name for item in fields(cls)}  # type: ignore[arg-type]
        if unknown := sorted(set(data) - names):
            raise FormatError(f"{where} has unknown fields: {', '.join(unknown)[:200]}; remove them")
        try:
            # By way of JSON text, where a list is the strict form of a tuple.
            return TypeAdapter(cls).validate_json(json.dumps(data), strict=True)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(part) for part in problem["loc"]) or "top level"
            raise FormatError(f"{where} does not fit: {place}: {problem['msg']}; measure again") from error

    def save(self, path: str | Path) -> None:
        """Write the JSON file, atomically."""
        from circuitkit.atomic import write_atomic

        write_atomic(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote. Raises FormatError for any other file."""
        from pathlib import Path

        from circuitkit.errors import FormatError

        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FormatError(f"could not read {path} ({error}); give a file that .save wrote") from error
        return cls.from_json(text, str(path))


@dataclass(frozen=True)
class Knockout:
    """A circuit and the whole model, both without some components.

    Args:
        removed: names of the writers whose outgoing edges carry their corrupt value.
        how: ``nothing`` (no knock-out), ``random``, ``layer`` or ``greedy``.
        circuit: metric of the circuit without them.
        model: metric of the model without them.
    """

    removed: tuple[str, ...]
    how: str
    circuit: float
    model: float

    @property
    def incompleteness(self) -> float:
        """|circuit - model|: 0 if the circuit has all that the model falls back on."""
        return abs(self.circuit - self.model)


@dataclass(frozen=True)
class Completeness(Measure):
    """Whether a circuit behaves as the model does under the same knock-outs.

    Args:
        task: the task's name.
        metric: the metric's name.
        corrupt_value: what removed edges carry.
        clean: metric of the whole model.
        corrupt: metric with every edge removed.
        circuit: metric of the circuit.
        knockouts: what was removed and what was left.
        n_edges: edges in the circuit.
        n_examples: examples measured.
        seed: seed of the random sets.
    """

    kind: ClassVar[str] = "completeness"
    task: str
    metric: str
    corrupt_value: str
    clean: float
    corrupt: float
    circuit: float
    knockouts: tuple[Knockout, ...]
    n_edges: int
    n_examples: int
    seed: int = 0

    @property
    def worst(self) -> Knockout:
        """The knock-out under which circuit and model differ most."""
        return max(self.knockouts, key=lambda knockout: knockout.incompleteness)

    def mean(self, how: str) -> float:
        """Mean |circuit - model| over the knock-outs of one kind."""
        found = [knockout.incompleteness for knockout in self.knockouts if knockout.how == how]
        return sum(found) / len(found)

    def plot(self) -> go.Figure:
        """Circuit against model, one point per knock-out; a complete circuit's lie on the diagonal."""
        from circuitkit.figures.knockouts import completeness_scatter

        return completeness_scatter(self)


@dataclass(frozen=True)
class Contribution:
    """What one part of a circuit changes.

    Args:
        name: of the component or edge.
        score: the largest change of the metric that removing it makes, over the sets tried.
        alone: the change if nothing else is removed.
        without: the set of other parts whose removal shows the largest change.
    """

    name: str
    score: float
    alone: float
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Minimality(Measure):
    """Whether every part of a circuit is needed.

    Args:
        task: the task's name.
        metric: the metric's name.
        corrupt_value: what removed edges carry.
        level: ``nodes`` or ``edges``.
        clean: metric of the whole model.
        corrupt: metric with every edge removed.
        circuit: metric of the circuit.
        contributions: one per component or edge, largest first.
        n_edges: edges in the circuit.
        n_examples: examples measured.
        seed: seed of the random sets.
    """

    kind: ClassVar[str] = "minimality"
    task: str
    metric: str
    corrupt_value: str
    level: str
    clean: float
    corrupt: float
    circuit: float
    contributions: tuple[Contribution, ...]
    n_edges: int
    n_examples: int
    seed: int = 0

    def redundant(self, share: float = 0.01) -> tuple[str, ...]:
        """Parts that change the metric by less than a share of clean - corrupt, whatever else is removed."""
        least = share * abs(self.clean - self.corrupt)
        return tuple(part.name for part in self.contributions if part.score < least)

    def plot(self) -> go.Figure:
        """A bar per part, with its change when it is removed alone."""
        from circuitkit.figures.knockouts import minimality_bars

        return minimality_bars(self)


@dataclass(frozen=True)
class HypothesisTest(Measure):
    """A test of one property that a circuit ought to have.

    Args:
        name: ``equivalence``, ``independence`` or ``minimality``.
        null: the hypothesis that is tested; a circuit ought to obey it.
        statistic: what was observed.
        p_value: chance of something as extreme if the hypothesis holds (corrected for how many tests were made).
        alpha: level of the test.
        sentence: the outcome in words.
        n: examples.
        details: further numbers.
        offenders: parts of the circuit that break the hypothesis.
    """

    kind: ClassVar[str] = "test"
    name: str
    null: str
    statistic: float
    p_value: float
    alpha: float
    sentence: str
    n: int
    details: Mapping[str, float] | None = None
    offenders: tuple[str, ...] = ()

    @property
    def rejected(self) -> bool:
        """Whether the circuit lacks the property, at the test's level."""
        return self.p_value <= self.alpha
