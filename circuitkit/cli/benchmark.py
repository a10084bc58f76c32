"""Commands that judge methods where the answer is known."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from circuitkit.runs import arguments as arg

WIDTH = 120

benchmark = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Judge methods where the answer is known.")


@benchmark.command("methods")
def methods(
    out: Annotated[Path, typer.Option(help="Folder of the tables, the figure and what each run measured.")] = Path(
        "runs/benchmark-methods"
    ),
    method: Annotated[list[str] | None, typer.Option(help="Only this method; may be given again.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Only this model; may be given again.")] = None,
    n: arg.Pairs = 32,
    seed: arg.Seed = 0,
    progress: arg.Progress = True,
    as_json: arg.Json = False,
) -> None:
    """Run every method on every model whose circuit is known; a stopped run goes on where it was."""
    from circuitkit.runs.benchmark import benchmark_methods, unexplained
    from circuitkit.runs.benchmark_table import overview_table

    found = benchmark_methods(out, methods=method, models=model, n=n, seed=seed, progress=progress)
    if as_json:
        sys.stdout.write(json.dumps(found.to_dict(), allow_nan=False) + "\n")
        return
    console = Console(highlight=False)
    # A table this wide is cut to pieces if it is folded; a narrow terminal folds its lines whole.
    Console(highlight=False, width=max(console.width, WIDTH)).print(overview_table(found))
    for loss in unexplained(found.cells):
        console.print(Text(f"loses to random, no reason given yet: {loss}"))
    console.print(Text(f"tables and figure in {out}"))
