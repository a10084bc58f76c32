"""The command that explains one prompt by the latents of dictionaries."""

from __future__ import annotations

import json
import re
import sys
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from circuitkit.runs import arguments as arg

if TYPE_CHECKING:
    from circuitkit.models.hooked import Model

Targets = Annotated[
    list[str] | None,
    typer.Option("--target", help="A token to explain, as text or id; the likeliest ones if none is named."),
]
Contrast = Annotated[
    tuple[str, str] | None, typer.Option(help="Explain why the first token rather than the second, as texts.")
]


def graph(
    context: typer.Context,
    model: arg.ModelName,
    prompt: Annotated[str, typer.Argument(help="A text; token ids for a model without tokenizer.")],
    dictionaries: arg.Dictionaries = None,
    method: Annotated[str, typer.Option(help="attribution-graph, transcoder-circuits or qk-attribution.")] = (
        "attribution-graph"
    ),
    target: Targets = None,
    contrast: Contrast = None,
    nodes: Annotated[float, typer.Option(help="Share of the influence that nodes are to carry.")] = 0.8,
    edges: Annotated[float, typer.Option(help="The same of edges.")] = 0.98,
    test: Annotated[bool, typer.Option(help="Ablate, and measure what the graph says.")] = True,
    out: Annotated[Path | None, typer.Option(help="Folder; runs/MODEL-METHOD-PROMPT if not given.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of random circuits and random edges.")] = 0,
    as_json: arg.Json = False,
) -> None:
    """Explain one prompt: which tokens and latents led to the next token, as a graph that ablations have tested.

    Options of the method follow, as in --max-features 500; see them with [bold]circuitkit help METHOD[/].
    """
    from circuitkit.errors import OptionError
    from circuitkit.features.methods import FEATURE_METHODS
    from circuitkit.models.base import load
    from circuitkit.runs.feature_run import explain, write_feature_run
    from circuitkit.runs.options import options_of, read_options
    from circuitkit.runs.report import graph_table
    from circuitkit.runs.request import read_dictionaries
    from circuitkit.runs.store import GRAPH_FILES, check_target

    known = options_of(FEATURE_METHODS[method])
    options: dict[str, Any] = read_options(context.args, known, f"method {method}")
    missing = [
        option.flag for option in known.values() if option.default is Parameter.empty and option.name not in options
    ]
    if missing:
        raise OptionError(f"{method} needs {' and '.join(missing)}; see: circuitkit help {method}")
    wanted = [*(target or []), *([contrast] if contrast else [])]
    if wanted and not known.keys() & {"target", "targets"}:
        raise OptionError(f"got --target or --contrast, and {method} explains what its own options name")
    if "target" in known and len(wanted) > 1:
        raise OptionError(f"got {len(wanted)} targets, and {method} explains one; name one")
    slug = "-".join(re.findall(r"\w+", prompt.lower(), flags=re.ASCII)[:5])[:40]
    folder = check_target(out or Path("runs", f"{Path(model).name}-{method}-{slug}".rstrip("-")), GRAPH_FILES)
    loaded, given = load(model), read_dictionaries(dictionaries or ())
    if wanted:
        options |= targets_of(loaded, prompt, wanted, one="target" in known)
    run = explain(
        loaded, given, prompt, method=method, nodes=nodes, edges=edges, test=test, seed=seed, **options
    )  # fmt: skip
    write_feature_run(folder, run, dictionaries=list(dictionaries or ()))
    if as_json:
        sys.stdout.write(json.dumps({"run": str(folder), **run.report()}, allow_nan=False) + "\n")
    else:
        Console(highlight=False).print(graph_table(run, folder))


def targets_of(model: Model, prompt: str, wanted: list[Any], one: bool) -> dict[str, Any]:
    """What is to be explained, as the method takes it: targets, or one token or pair of tokens by id."""
    from circuitkit.features.contrast import Contrast as TwoTokens
    from circuitkit.features.texts import Text
    from circuitkit.runs.feature_run import read_prompt

    typed = [TwoTokens(*map(_token, w)) if isinstance(w, tuple) else _token(w) for w in wanted]  # type: ignore[arg-type]
    found = Text.of(model, read_prompt(model, prompt)).targets(typed) or []
    if not one:
        return {"targets": found}
    (only,) = found
    return {"target": (only.right, only.wrong) if isinstance(only, TwoTokens) else only}


def _token(text: str) -> int | str:
    """A token's id if it is typed as a number, else its text."""
    return int(text) if text.isdecimal() else text
