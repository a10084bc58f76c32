"""What both pages are made of: a template with parts, data that no browser takes for markup, and known scripts."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from circuitkit.schema import jsonable

_HERE = Path(__file__).parent


def filled(template: str, parts: Mapping[str, str]) -> str:
    """The template with its ``{{name}}`` replaced; what a part says is not looked through again.

    >>> filled("<b>{{a}}</b>{{b}}", {"a": "{{b}}", "b": "c"})
    '<b>{{b}}</b>c'
    """
    pieces = template.split("{{")
    out = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("}}")
        out += [parts[name], rest]
    return "".join(out)


def inert_json(data: Any) -> str:
    """JSON that cannot end a script block or be read as markup.

    >>> inert_json("</script>")
    '"\\\\u003c/script\\\\u003e"'
    """
    text = json.dumps(jsonable(data), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def source_hash(text: str) -> str:
    """A script or style as a content security policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def text_of(name: str) -> str:
    """A file of this folder."""
    return (_HERE / name).read_text(encoding="utf-8")
