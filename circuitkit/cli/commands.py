"""Commands that find, measure, export and show circuits, and how a command ends.

torch takes seconds to import, so everything that needs it is imported inside the command that does.
"""

from __future__ import annotations

import json
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from circuitkit.cli.benchmark import benchmark
from circuitkit.cli.graph import graph
from circuitkit.errors import CircuitKitError
from circuitkit.runs import arguments as arg

USER_ERROR, STOPPED = 2, 130

app = typer.Typer(
    name="circuitkit",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

app.add_typer(benchmark, name="benchmark")

# What is left over belongs to the method or the task, whose options are known only once they are loaded.
OPEN = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command("graph", context_settings=OPEN)(graph)


def _print_version(wanted: bool) -> None:
    if wanted:
        from circuitkit import __version__

        _out(__version__)
        raise typer.Exit


@app.callback()
def circuitkit(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """From a trained network and a behaviour to a verified circuit."""


@app.command("list")
def list_names(
    kind: Annotated[arg.Kind, typer.Argument(help="What to list.")],
    options: Annotated[bool, typer.Option("--options", help="Show what each takes.")] = False,
    as_json: arg.Json = False,
) -> None:
    """The names that the other commands take."""
    from circuitkit.runs.catalogue import catalogue, option_lines
    from circuitkit.runs.report import names_table

    entries = catalogue(kind)
    if as_json:
        _json({kind: {name: {**e.facts(), "options": option_lines(e.thing)} for name, e in entries.items()}})
        return
    rows: list[tuple[str, ...]] = []
    headings = ("name", *(["for"] if kind == "methods" else []), "what it is")
    for name, entry in entries.items():
        takes = [", ".join(entry.families)] if kind == "methods" else []
        rows.append((name, *takes, entry.line))
        rows += [("", *("" for _ in takes), line) for line in option_lines(entry.thing)] if options else []
    _out(names_table(rows, headings))


@app.command("help")
def help_on(name: Annotated[str, typer.Argument(help="A method or a task.")]) -> None:
    """What a method or a task does, and its options."""
    from circuitkit.runs.catalogue import option_lines, page

    thing, text = page(name)
    lines = option_lines(thing) or ["none of its own"]
    sys.stdout.write("\n".join([text, "", "Options", *(f"  {line}" for line in lines), ""]))


@app.command(context_settings=OPEN)
def find(
    context: typer.Context,
    model: arg.ModelName,
    task: arg.TaskName,
    method: arg.Method = "eap-ig",
    edges: arg.Edges = None,
    selection: arg.Selection = "auto",
    signed: arg.Signed = False,
    out: arg.RunFolder = None,
    metric: arg.Metric = None,
    n: arg.Pairs = 64,
    neurons: arg.Neurons = None,
    time: arg.Time = None,
    group: arg.Group = None,
    dictionaries: arg.Dictionaries = None,
    latents: arg.Latents = None,
    seed: arg.Seed = 0,
    batch_size: arg.BatchSize = "auto",
    budget: arg.Budget = None,
    progress: arg.Progress = True,
    as_json: arg.Json = False,
) -> None:
    """Score every edge, keep the best, measure what they do, and write a run folder.

    Options of the method or the task follow, as in --steps 10; see them with [bold]circuitkit help METHOD[/].
    """
    from circuitkit.runs.report import circuit_table
    from circuitkit.runs.request import Request, read_settings
    from circuitkit.runs.store import check_target, load_run, write_run

    asked: dict[str, Any] = {"model": model, "neurons": neurons, "time": time, "group": group, "n": n, "seed": seed}
    asked |= {"dictionaries": dictionaries, "latents": latents}
    request = Request.read(context.args, task=task, method=method, metric=metric, **asked)
    settings = read_settings(batch_size, budget, progress)
    folder = check_target(out or Path("runs", "-".join((Path(model).name, task, method))))
    circuit = request.find(edges=edges, selection=selection, absolute=not signed, **settings)
    write_run(folder, circuit)
    if as_json:
        run = load_run(folder)
        _json({"run": str(folder), **run.manifest.model_dump(), "result": run.result})
    else:
        _out(circuit_table(circuit, folder))


@app.command(context_settings=OPEN)
def score(
    context: typer.Context,
    model: arg.ModelName,
    task: arg.TaskName,
    out: Annotated[Path, typer.Option(help="The file to write: safetensors for edges, CSV for nodes.")],
    method: arg.Method = "eap-ig",
    metric: arg.Metric = None,
    n: arg.Pairs = 64,
    neurons: arg.Neurons = None,
    time: arg.Time = None,
    group: arg.Group = None,
    dictionaries: arg.Dictionaries = None,
    latents: arg.Latents = None,
    seed: arg.Seed = 0,
    batch_size: arg.BatchSize = "auto",
    budget: arg.Budget = None,
    progress: arg.Progress = True,
    as_json: arg.Json = False,
) -> None:
    """Score every edge (or node) and write the scores only."""
    from circuitkit.runs.report import score_table
    from circuitkit.runs.request import Request, read_settings
    from circuitkit.runs.store import check_file, write_scores
    from circuitkit.schema import jsonable

    asked: dict[str, Any] = {"model": model, "neurons": neurons, "time": time, "group": group, "n": n, "seed": seed}
    asked |= {"dictionaries": dictionaries, "latents": latents}
    request = Request.read(context.args, task=task, method=method, metric=metric, **asked)
    settings = read_settings(batch_size, budget, progress)
    check_file(out)
    scores = request.score(**settings)
    write_scores(out, scores)
    if as_json:
        _json({"scores": str(out), "method": scores.method, "options": jsonable(scores.options)})
    else:
        _out(score_table(scores))
        _out(Text(f"all scores in {out}"))


@app.command("eval")
def evaluate(
    circuit: arg.CircuitPath,
    model: Annotated[str | None, typer.Option(help="Another model with the same graph.")] = None,
    task: Annotated[str | None, typer.Option(help="Another task.")] = None,
    metric: arg.Metric = None,
    n: Annotated[int | None, typer.Option("--n", min=1, help="How many pairs the task draws.")] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed: new pairs, new random circuits.")] = None,
    dictionaries: arg.Dictionaries = None,
    batch_size: arg.BatchSize = "auto",
    budget: arg.Budget = None,
    progress: arg.Progress = True,
    as_json: arg.Json = False,
) -> None:
    """Measure a saved circuit again, on its own task or another."""
    from circuitkit.runs.report import result_table
    from circuitkit.runs.request import evaluate_again, read_settings
    from circuitkit.runs.store import circuit_file
    from circuitkit.schema import result_to_dict

    settings = read_settings(batch_size, budget, progress)
    path = circuit_file(circuit)
    asked: dict[str, Any] = {"model": model, "task": task, "metric": metric, "n": n, "seed": seed}
    result, note = evaluate_again(path, dictionaries=dictionaries, **asked, **settings)
    if as_json:
        _json({"circuit": str(path), "note": note, "result": {**result_to_dict(result), "verdict": result.verdict}})
    else:
        _out(result_table(result, f"{path} on {result.task}"))
        _out(Text(f"note: {note}" if note else "the same weights and the same pairs as when it was found"))


@app.command()
def export(
    circuit: arg.CircuitPath,
    out: Annotated[Path, typer.Argument(help="The file to write; its suffix names the format.")],
    format: Annotated[str | None, typer.Option(help="A name from [bold]circuitkit list formats[/].")] = None,
) -> None:
    """Write a circuit, or a feature graph, in another program's format."""
    from circuitkit.circuit import Circuit
    from circuitkit.exporters.base import export as export_circuit
    from circuitkit.exporters.feature_graph import export_graph_file
    from circuitkit.runs.store import circuit_file, feature_graph_file

    if graph := feature_graph_file(circuit):
        export_graph_file(graph, out, format=format)
    else:
        export_circuit(Circuit.load(circuit_file(circuit)), out, format=format)
    _out(Text(f"wrote {out}"))


@app.command()
def view(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Open it in the browser.")] = True,
) -> None:
    """Say where the page of a run lies, and open it."""
    from circuitkit.runs.store import page_of

    page = page_of(run)
    # Unwrapped and alone on its line, so that a terminal or a script can pick it up.
    sys.stdout.write(f"{page}\n")
    if open_page and sys.stdout.isatty():
        import webbrowser

        webbrowser.open(page.as_uri())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for an error of the user's, 130 for Ctrl-C."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in typed
    typed = [word for word in typed if word != "--debug"]
    try:
        if arguments is None:
            # A terminated run unwinds like an interrupted one, so that its temporary folder goes.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        # Not app(...): that turns Ctrl-C into a number, and what was kept would go unsaid.
        command = typer.main.get_command(app)
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            with command.make_context("circuitkit", typed) as context:
                command.invoke(context)
        return 0
    except typer.Exit as done:
        return done.exit_code
    except (KeyboardInterrupt, typer.Abort) as stopped:
        return _stopped(stopped)
    except Exception as error:
        message = _in_one_line(error)
        if debug or message is None:
            raise
        Console(stderr=True, highlight=False, soft_wrap=True).print(Text(f"circuitkit: {message}"))
        return USER_ERROR


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    """Say a warning in one line; whose line of code it came from is nothing to a reader of a terminal."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text(f"warning: {' '.join(str(message).split())}"))


def _stopped(error: BaseException) -> int:
    """Say what a stopped command left behind: what was kept of it, or that nothing is there."""
    said = "; ".join(getattr(error, "__notes__", [])) or "nothing half-done was written"
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text(f"circuitkit: stopped; {said}"))
    return STOPPED


def _in_one_line(error: Exception) -> str | None:
    """The message of an error that a user can cause, or None for a fault of ours."""
    if isinstance(error, CircuitKitError):
        return " ".join(str(error).split())
    if isinstance(error, OSError):
        return f"{error.filename or 'file'}: {error.strerror or error}"
    # typer's own usage errors, known by what they can do: the classes moved between its versions.
    if hasattr(error, "format_message"):
        return f"{error.format_message().replace('Value error, ', '')} See: circuitkit --help"
    return None


def _out(what: Any) -> None:
    Console(highlight=False).print(what)


def _json(data: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(data, allow_nan=False) + "\n")
