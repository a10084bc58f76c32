"""Where a run came from: what was asked, and on which model, data and versions; kept in result.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from circuitkit.circuit import Circuit
from circuitkit.errors import FormatError, OptionError
from circuitkit.runs.files import load_result
from circuitkit.schema import jsonable, parse_json


class Manifest(BaseModel):
    """The provenance of a run.

    Args:
        model: what `circuitkit.load` was given, or the model's name.
        task: the task's name.
        task_options: its own options.
        neurons: how many neurons make a node, or None for whole MLPs.
        time: how a recurrent network's time was cut; None for a transformer.
        steps: how long its windows are together, or None.
        group: what its nodes are, or None for a transformer.
        dictionaries: names or paths of the dictionaries that were spliced in, where they were given so.
        n: pairs in the task.
        metric: the metric's name.
        method: the method's name.
        options: the method's own options, as used.
        selection: how edges were chosen.
        edges: how many were asked for.
        seed: seed of the task, the random circuits and the bootstrap.
        seconds: wall-clock time of each stage.
        versions: of Python and the packages.
        model_sha256: hash of the weights.
        data_sha256: hash of the pairs.
        dictionaries_sha256: hashes of the dictionaries' weights and sites.
        files: hashes of the other files of the run.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())

    model: str
    task: str
    task_options: dict[str, Any] = {}
    neurons: int | None = None
    time: str | None = None
    steps: int | None = None
    group: str | None = None
    dictionaries: tuple[str, ...] = ()
    n: int
    metric: str
    method: str
    options: dict[str, Any] = {}
    selection: str
    edges: int
    seed: int
    seconds: dict[str, float] = {}
    versions: dict[str, str] = {}
    model_sha256: str
    data_sha256: str
    dictionaries_sha256: tuple[str, ...] = ()
    files: dict[str, str] = {}


def manifest_of(circuit: Circuit, files: Mapping[str, str] | None = None) -> Manifest:
    """The manifest of a circuit that `circuitkit.find` returned, or of one that such a circuit was saved to.

    Raises:
        OptionError: if the circuit does not say where it came from.
    """
    try:
        return Manifest.model_validate({**jsonable(circuit.meta), "files": dict(files or {})})
    except ValidationError as error:
        missing = ", ".join(".".join(str(part) for part in problem["loc"]) for problem in error.errors())
        raise OptionError(
            f"this circuit does not say where it came from (missing or wrong: {missing}); "
            "make it with circuitkit.find, or name the model and the task"
        ) from error


def read_manifest(path: Path) -> Manifest:
    """The manifest in a result.json.

    Raises:
        FormatError: if it is not the result.json of a run, or was written by a newer circuitkit.
    """
    load_result(path)
    data = parse_json(path.read_text(encoding="utf-8"), str(path))
    try:
        return Manifest.model_validate(data.get("provenance", {}))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise FormatError(f"{path} is not the result.json of a run ({where}: {problem['msg'].lower()})") from error
