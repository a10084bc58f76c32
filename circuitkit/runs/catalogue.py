"""What can be named on the command line, with one line on each."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from circuitkit.errors import UnknownName
from circuitkit.runs.options import description, options_of

ONE_PROMPT = ("a prompt and dictionaries",)  # what the methods of `circuitkit graph` are for


@dataclass(frozen=True)
class Entry:
    """A registered name.

    Args:
        line: what it is, in one line.
        thing: the registered function, or None for a model.
        families: for a method, the kinds of models that it understands.
    """

    line: str
    thing: Callable[..., Any] | None = None
    families: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """What is known, as plain data."""
        return {"line": self.line} | ({"families": list(self.families)} if self.families else {})


def catalogue(kind: str) -> dict[str, Entry]:
    """The names of one kind: ``models``, ``tasks``, ``methods``, ``formats`` or ``dictionaries``."""
    if kind == "dictionaries":
        from circuitkit.dictionaries.zoo import dictionary_sets

        return {name: Entry(_set_line(name)) for name in dictionary_sets()}
    if kind == "models":
        from circuitkit.models.zoo import zoo_names

        return {name: Entry(_model_line(name)) for name in zoo_names()}
    return {
        name: Entry(_first_line(thing), thing, getattr(thing, "families", ONE_PROMPT if kind == "methods" else ()))
        for name, thing in _registry(kind).items()
    }


def page(name: str) -> tuple[Callable[..., Any], str]:
    """A method or a task, and everything its file says about it, under the line that a list of names has.

    Raises:
        UnknownName: if neither has that name.
    """
    methods, tasks = _registry("methods"), _registry("tasks")
    if name not in methods and name not in tasks:
        near = get_close_matches(name, [*methods, *tasks], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise UnknownName(
            f"unknown method or task {name!r}{hint} Known: {', '.join(methods)}; tasks: {', '.join(tasks)}"
        )
    thing = methods[name] if name in methods else tasks[name]
    own = inspect.getdoc(thing) or ""
    parts = (_first_line(thing), sys.modules[thing.__module__].__doc__ or "", description(own).partition("\n")[2])
    return thing, "\n\n".join((name, *(inspect.cleandoc(part) for part in parts if part.strip())))


def option_lines(thing: Callable[..., Any] | None) -> list[str]:
    """The options of a method or task, one line each."""
    if thing is None:
        return []
    lines = []
    for option in (one for one in options_of(thing).values() if one.can_be_typed):
        default = "required" if option.default is inspect.Parameter.empty else f"default {option.default}"
        meaning = f": {option.meaning}" if option.meaning else ""
        lines.append(f"{option.flag}  {option.expects} ({default}){meaning}")
    return lines


def _registry(kind: str) -> Mapping[str, Any]:
    if kind == "methods":
        from circuitkit.features.methods import FEATURE_METHODS
        from circuitkit.methods.base import METHODS

        return {**METHODS, **FEATURE_METHODS}
    if kind == "tasks":
        from circuitkit.tasks.base import TASKS

        return TASKS
    from circuitkit.exporters.base import EXPORTERS

    return EXPORTERS


def _first_line(thing: Any) -> str:
    text = inspect.getdoc(thing) or sys.modules[thing.__module__].__doc__ or ""
    return text.strip().splitlines()[0] if text.strip() else ""


def _set_line(name: str) -> str:
    from circuitkit.dictionaries.formats import load_dictionaries

    found = load_dictionaries(name)
    latents = " + ".join(str(one.coder.n_latents) for one in found)
    kind = {"sae": "SAE", "clt": "cross-layer transcoder"}.get(found[0].kind, found[0].kind.replace("-", " "))
    return f"{kind}, {found[0].read.kind} to {found[0].writes[0].kind}, {latents} latents"


def _model_line(name: str) -> str:
    from circuitkit.models.recurrent.zoo import line, recurrent_names

    if name in recurrent_names():
        return line(name)
    family = name.partition("/")[0].partition("-")[0]
    return {
        "stories260k": "5-layer story model by Andrej Karpathy, trained on TinyStories",
        "induction": "2-layer attention-only model with an induction head",
        "modadd": "adds two numbers modulo 59",
        "tracr": "a compiled program whose circuit is known exactly",
    }.get(family, "")
