"""Whether an option's value is of the kind that the method's signature names, checked before anything runs.

A method checks ranges; this checks kinds, for all methods alike: no True for a number of steps, no NaN for a threshold,
no word that is not among the choices. ``None`` is taken where the signature allows it.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin

from circuitkit.errors import OptionError


def check_kinds(method: str, function: Callable[..., Any], options: dict[str, Any]) -> None:
    """Refuse values of the wrong kind.

    Raises:
        OptionError: naming the option, what was got and what is expected.

    >>> def cut(model, task, *, plan, tau: float = 0.01, order: Literal["up", "down"] = "up"): ...
    >>> check_kinds("cut", cut, {"tau": 0.1, "order": "down"})
    >>> check_kinds("cut", cut, {"tau": float("nan")})
    Traceback (most recent call last):
    circuitkit.errors.OptionError: cut: got tau = nan, expected a number
    """
    try:
        parameters = inspect.signature(function, eval_str=True).parameters
    except NameError:  # an annotation that is imported for type checking only
        return
    for name, value in options.items():
        kind = parameters[name].annotation
        kinds = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
        if not any(_is(value, one) for one in kinds):
            expected = " or ".join(filter(None, (_in_words(one) for one in kinds)))
            raise OptionError(f"{method}: got {name} = {value!r}, expected {expected}")


def _is(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
    if kind is int:
        return type(value) is int
    if kind is float:
        return type(value) in (int, float) and not math.isnan(value)
    if kind in (bool, str, types.NoneType):
        return type(value) is kind
    return True  # kinds that only the method knows


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(repr(choice) for choice in get_args(kind))
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "text", types.NoneType: "None"}
    return words.get(kind, getattr(kind, "__name__", str(kind)))
