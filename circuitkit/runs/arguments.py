"""Arguments that several commands share, in the words of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]
BatchSize = Annotated[str, typer.Option(help="Examples at a time: a number, or auto.")]
Budget = Annotated[str | None, typer.Option(help="Memory that activations may take, such as 4GiB.")]
Progress = Annotated[bool, typer.Option(help="Show progress bars.")]
Seed = Annotated[int, typer.Option(help="Seed of the task, the random circuits and the bootstrap.")]
Kind = Literal["models", "tasks", "methods", "formats", "dictionaries"]
ModelName = Annotated[
    str, typer.Argument(help="A name from [bold]circuitkit list models[/], a local folder or a hub id.")
]
TaskName = Annotated[str, typer.Argument(help="A name from [bold]circuitkit list tasks[/].")]
Method = Annotated[str, typer.Option(help="A name from [bold]circuitkit list methods[/].")]
Metric = Annotated[str | None, typer.Option(help="A metric other than the task's own: logit-diff, prob-diff, kl, ...")]
Pairs = Annotated[int, typer.Option("--n", min=1, help="How many pairs the task draws.")]
Neurons = Annotated[
    int | None, typer.Option(min=1, help="Split every MLP into groups of that many neurons, each a node.")
]
Time = Annotated[
    str | None,
    typer.Option(help="Recurrent networks: collapsed, expanded, or windows of steps such as 0-4,4-12."),
]
Group = Annotated[
    Literal["unit", "gate", "layer", "direction"] | None, typer.Option(help="Recurrent networks: what a node is.")
]
Dictionaries = Annotated[
    list[str] | None,
    typer.Option(
        "--dictionary", help="Splice in a dictionary, or a set of them: a name, a folder, a release/id. Repeatable."
    ),
]
Latents = Annotated[
    int | None, typer.Option(min=1, help="Latents of each dictionary that become nodes, those of largest effect; 20.")
]
Edges = Annotated[
    int | None, typer.Option(min=1, help="How many edges the circuit may have; 100, or the method's own choice.")
]
Selection = Annotated[
    Literal["auto", "top", "grow", "own"],
    typer.Option(help="Strongest connected edges, best first from the logits, or what the method itself chose."),
]
Signed = Annotated[bool, typer.Option("--signed", help="Rank by signed score instead of magnitude.")]
RunFolder = Annotated[Path | None, typer.Option(help="Run folder; runs/MODEL-TASK-METHOD if not given.")]
CircuitPath = Annotated[Path, typer.Argument(help="A circuit.json, or the run folder that holds it.")]
