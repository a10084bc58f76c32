"""A function's keyword-only arguments as command-line options.

A method is ``(model, task, *, plan, <options>)`` and a task ``(model, *, n, seed, <options>)``: what they take
beyond the arguments that every verb has *is* the list of options; no option is declared twice.
"""

from __future__ import annotations

import difflib
import inspect
import re
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from circuitkit.errors import OptionError

TYPED = (int, float, str, bool, Path, Any, inspect.Parameter.empty)
# What the verbs themselves take: never an option of one method or task.
COMMON = frozenset({"plan", "n", "seed", "batch_size", "budget", "progress"})


@dataclass(frozen=True)
class Option:
    """One keyword-only argument.

    Args:
        name: the argument's name; typed with ``--`` and dashes.
        kind: its annotation.
        default: its default, or `inspect.Parameter.empty`.
        meaning: what the function's docstring says of it, or nothing.
    """

    name: str
    kind: Any
    default: Any
    meaning: str = ""

    @property
    def flag(self) -> str:
        """What a user types."""
        return "--" + self.name.replace("_", "-")

    @property
    def can_be_typed(self) -> bool:
        """Whether a user can give it as text; what only Python can give (a function) is left out of help."""
        kinds = get_args(self.kind) if _is_union(self.kind) else (self.kind,)
        return any(kind in TYPED or get_origin(kind) is Literal for kind in kinds)

    @property
    def expects(self) -> str:
        """What a user may give, in words."""
        kinds = get_args(self.kind) if _is_union(self.kind) else (self.kind,)
        return " or ".join(
            _in_words(kind) for kind in kinds if kind not in (types.NoneType, Any, inspect.Parameter.empty)
        )


def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """The options of a method or task, by argument name.

    >>> def eap_ig(model, task, *, plan=None, steps: int = 5, rule: str = "midpoint"): ...
    >>> [option.flag for option in options_of(eap_ig).values()]
    ['--steps', '--rule']
    """
    try:
        signature = inspect.signature(function, eval_str=True)
    except NameError:
        signature = inspect.signature(function)
    meanings = _meanings(inspect.getdoc(function) or "")
    return {
        name: Option(name, parameter.annotation, parameter.default, meanings.get(name, ""))
        for name, parameter in signature.parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in COMMON
    }


def description(text: str) -> str:
    """A docstring without its sections of arguments, results and errors.

    >>> description("Cut a circuit.\\n\\nAll at once.\\n\\nArgs:\\n    tau: where.")
    'Cut a circuit.\\n\\nAll at once.'
    """
    return re.split(r"^(?:Args|Returns|Raises|>>> .*):?$", text, maxsplit=1, flags=re.MULTILINE)[0].strip()


def _meanings(text: str) -> dict[str, str]:
    """What the Args section of a docstring says of each argument, in one line."""
    section = re.search(r"^Args:\n((?:[ ]{4}.*\n?|\n(?=[ ]{4}))*)", text, flags=re.MULTILINE)
    entries = re.split(r"^ {4}(\w+): ", section[1], flags=re.MULTILINE)[1:] if section else []
    return {name: " ".join(said.split()) for name, said in zip(entries[::2], entries[1::2], strict=True)}


def read_options(arguments: Sequence[str], known: dict[str, Option], whose: str) -> dict[str, Any]:
    """What a user typed: ``--name value``, ``--name=value``, ``--flag`` and ``--no-flag``.

    Raises:
        OptionError: for an unknown option (naming the nearest), a missing value or one of the wrong kind.

    >>> known = {"steps": Option("steps", int, 5), "fold": Option("fold", bool, True)}
    >>> read_options(["--steps", "3", "--no-fold"], known, "the method")
    {'steps': 3, 'fold': False}
    """
    values: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise OptionError(f"unexpected argument {word!r}; options are written --name value")
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        off = name.removeprefix("no_")
        if name not in known and off in known and known[off].kind is bool and not equals:
            values[off] = False
        elif name not in known:
            raise OptionError(_unknown(word.partition("=")[0], known, whose))
        elif known[name].kind is bool and not equals:
            values[name] = True
        else:
            if not equals:
                if not rest:
                    raise OptionError(f"option {known[name].flag} needs a value: {known[name].expects}")
                text = rest.pop(0)
            values[name] = _convert(text, known[name])
    return values


def _unknown(flag: str, known: dict[str, Option], whose: str) -> str:
    flags = [option.flag for option in known.values()]
    near = difflib.get_close_matches(flag, flags, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    return f"{whose} has no option {flag}{hint} Options: {', '.join(flags) or 'none'}"


def _convert(text: str, option: Option) -> Any:
    kinds = get_args(option.kind) if _is_union(option.kind) else (option.kind,)
    if types.NoneType in kinds and text.lower() == "none":
        return None
    # Words before numbers, and numbers before free text: "auto" | int | str reads 7 as a number.
    for kind in sorted(kinds, key=_readiness):
        try:
            return _as_kind(text, kind)
        except (ValueError, KeyError):
            continue
    raise OptionError(f"option {option.flag} got {text!r}, expected {option.expects}")


def _as_kind(text: str, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        for choice in get_args(kind):
            if text == str(choice):
                return choice
        raise ValueError(text)
    if kind is bool:
        return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
    if kind in (int, float, Path):
        return kind(text)
    if kind in (str, Any, inspect.Parameter.empty):
        return text
    raise ValueError(text)


def _readiness(kind: Any) -> int:
    if get_origin(kind) is Literal:
        return 0
    return {bool: 1, int: 2, float: 3}.get(kind, 4)


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " | ".join(str(choice) for choice in get_args(kind))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
    return words.get(kind, getattr(kind, "__name__", str(kind)))
