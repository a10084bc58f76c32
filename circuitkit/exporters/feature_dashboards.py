"""Feature dashboards as the JSON that viewers of attribution graphs fetch: one file per feature id.

The id pairs layer and latent as in `circuitkit.exporters.graph_json`. Fields that the format lacks are under
``circuitkit``, and bring a dashboard back number for number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from circuitkit.atomic import write_atomic
from circuitkit.errors import FormatError
from circuitkit.exporters.graph_json_schema import paired, text_of, unpaired
from circuitkit.features.dashboards import Dashboard, Example, Histogram
from circuitkit.functional.text import visible
from circuitkit.schema import parse_json, to_json

_Finite = Annotated[float, Field(allow_inf_nan=False)]
_TOP = "Top activations"


class _Open(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class _OwnExample(_Open):
    ids: list[int]
    row: int
    position: int


class _Example(_Open):
    tokens: list[str]
    tokens_acts_list: list[_Finite]
    train_token_ind: int
    circuitkit: _OwnExample | None = None


class _Examples(_Open):
    quantile_name: str
    examples: list[_Example]


class _Own(_Open):
    site: str
    layer: int
    edges: list[_Finite]
    top_effects: list[_Finite]
    bottom_effects: list[_Finite]


class _File(_Open):
    index: int
    examples_quantiles: list[_Examples]
    top_logits: list[str] = []
    bottom_logits: list[str] = []
    act_min: _Finite = 0.0
    act_max: _Finite = 0.0
    histogram: list[int] = []
    activation_frequency: _Finite = 0.0
    circuitkit: _Own | None = None


def write_dashboards(boards: Iterable[Dashboard], folder: str | Path) -> tuple[Path, ...]:
    """Write ``<id>.json`` for each dashboard into a folder; returns the paths.

    Characters that files cannot hold are made visible.

    Raises:
        FormatError: if two dashboards have one id (dictionaries of one layer belong in folders of their own), or a file
            cannot be written.
    """
    named: dict[int, Dashboard] = {}
    for board in boards:
        number = paired(board.layer, board.latent)
        if (other := named.get(number)) is not None:
            raise FormatError(
                f"latent {board.latent} of {board.site} and that of {other.site} have one id in these files; "
                "write each dictionary to a folder of its own"
            )
        named[number] = board
    return tuple(write_atomic(Path(folder) / f"{number}.json", to_json(_content(b))) for number, b in named.items())


def read_dashboards(folder: str | Path) -> tuple[Dashboard, ...]:
    """All dashboards of a folder, by layer and latent.

    Raises:
        FormatError: if a file ``<id>.json`` is no dashboard, or there is none.
    """
    paths = [path for path in sorted(Path(folder).glob("*.json")) if path.stem.isdigit()]
    if not paths:
        raise FormatError(f"{folder} has no dashboards; give a folder that write_dashboards wrote")
    return tuple(sorted((_read(path) for path in paths), key=lambda board: (board.layer, board.latent)))


def _content(board: Dashboard) -> dict[str, Any]:
    lists = [(_TOP, board.top), *board.intervals]
    return {
        "index": board.latent,
        "examples_quantiles": [{"quantile_name": name, "examples": _examples(found)} for name, found in lists],
        "top_logits": [visible(text) for text, _ in board.top_logits],
        "bottom_logits": [visible(text) for text, _ in board.bottom_logits],
        "act_min": board.act_min,
        "act_max": board.act_max,
        "quantile_values": [board.act_max * (1 - i / len(board.intervals)) for i in range(len(board.intervals))],
        "histogram": list(board.histogram.counts),
        "activation_frequency": board.activation_frequency,
        "circuitkit": {
            "site": board.site,
            "layer": board.layer,
            "edges": list(board.histogram.edges),
            "top_effects": [value for _, value in board.top_logits],
            "bottom_effects": [value for _, value in board.bottom_logits],
        },
    }


def _examples(found: Sequence[Example]) -> list[dict[str, Any]]:
    seen, out = set[tuple[tuple[str, ...], int]](), list[dict[str, Any]]()
    for example in found:
        key = (example.texts, example.at)
        out.append(
            {
                "tokens": [visible(text) for text in example.texts],
                "tokens_acts_list": list(example.activations),
                "train_token_ind": example.at,
                "is_repeated_datapoint": key in seen,
                "circuitkit": {"ids": list(example.tokens), "row": example.row, "position": example.position},
            }
        )
        seen.add(key)
    return out


def _read(path: Path) -> Dashboard:
    try:
        file = _File.model_validate(parse_json(text_of(path), str(path)))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, problem["loc"]))
        raise FormatError(f"{path} is no dashboard: {place}: {problem['msg']}; write it again") from error
    own, lists = file.circuitkit, [(e.quantile_name, tuple(map(_example, e.examples))) for e in file.examples_quantiles]
    top = next((found for name, found in lists if name == _TOP), lists[0][1] if lists else ())
    layer = unpaired(int(path.stem))[0] if own is None else own.layer
    counts = tuple(file.histogram)
    edges = [i * file.act_max / max(1, len(counts)) for i in range(len(counts) + 1)] if own is None else own.edges
    return Dashboard(
        latent=file.index, site=f"mlp-in.{layer}" if own is None else own.site, layer=layer,
        activation_frequency=file.activation_frequency, act_min=file.act_min, act_max=file.act_max,
        top=top, intervals=tuple((name, found) for name, found in lists if name != _TOP),
        histogram=Histogram(tuple(edges), counts),
        top_logits=_effects(file.top_logits, None if own is None else own.top_effects, path),
        bottom_logits=_effects(file.bottom_logits, None if own is None else own.bottom_effects, path),
    )  # fmt: skip


def _example(found: _Example) -> Example:
    own, n = found.circuitkit, len(found.tokens)
    if len(found.tokens_acts_list) != n or not 0 <= found.train_token_ind < n or (own and len(own.ids) != n):
        raise FormatError(f"an example has {n} tokens and {len(found.tokens_acts_list)} activations; write it again")
    return Example(
        (-1,) * n if own is None else tuple(own.ids), tuple(found.tokens), tuple(found.tokens_acts_list),
        found.train_token_ind, -1 if own is None else own.row, -1 if own is None else own.position,
    )  # fmt: skip


def _effects(texts: list[str], values: list[float] | None, path: Path) -> tuple[tuple[str, float], ...]:
    values = [0.0] * len(texts) if values is None else values
    if len(values) != len(texts):
        raise FormatError(f"{path} has {len(texts)} tokens and {len(values)} effects on them; write it again")
    return tuple(zip(texts, values, strict=True))
