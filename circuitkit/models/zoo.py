"""Small trained and compiled models that ship with circuitkit; each folder under ``data/`` names source and licence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from circuitkit.errors import FormatError, UnknownName
from circuitkit.models.hooked import Model
from circuitkit.models.recurrent.zoo import load_recurrent, recurrent_names
from circuitkit.resources import resource

FOLDERS = {
    "induction": "induction_2layer_attn_only",
    "modadd": "modadd_clock_pizza",
    "tracr": "tracr_compiled",
}
SHORT = {"induction/trained": "induction/trained", "induction/damaged_control": "induction/damaged"}


def zoo_names() -> tuple[str, ...]:
    """Names that `load` accepts without a network: ``stories260k``, ``induction/trained``, ``tracr/hist``, ..."""
    names = ["stories260k", "stories260k-tl"]
    for short, folder in FOLDERS.items():
        found = sorted(path.stem for path in resource(folder).glob("*.safetensors"))
        names += [SHORT.get(f"{short}/{stem}", f"{short}/{stem}") for stem in found]
    return (*names, *recurrent_names())


def zoo_name(name: str) -> str | None:
    """The zoo's own name for what a user typed (``hist`` and ``tracr_compiled/hist`` are ``tracr/hist``), or None."""
    for short, folder in FOLDERS.items():
        name = name.replace(f"{folder}/", f"{short}/")
    name = SHORT.get(name, name)
    names = zoo_names()
    if name in names:
        return name
    ends = [full for full in names if full.endswith(f"/{name}")]
    return ends[0] if len(ends) == 1 else None


def load_zoo(name: str, **options: Any) -> Model:
    """Load a zoo model by its full name; ``device`` and ``dtype`` as for `load`. Raises UnknownName for any other."""
    if name == "stories260k":
        from circuitkit.models.pretrained import load_pretrained

        return load_pretrained(
            str(resource("stories260k", "hf")),
            name=name,
            card=_card(resource("stories260k", "stories260k.json")),
            **options,
        )
    if name not in zoo_names():
        raise UnknownName(f"{name!r} is not in the zoo; it has {', '.join(zoo_names())}")
    if name in recurrent_names():
        return load_recurrent(name, **options)
    if name == "stories260k-tl":
        weights, card = (
            resource("stories260k", "hooked_transformer.safetensors"),
            resource("stories260k", "stories260k.json"),
        )
        return _native(name, weights, card, tokenizer=_tokenizer(resource("stories260k", "hf")), **options)
    short, stem = name.split("/")
    stem = {v: k for k, v in SHORT.items()}.get(name, name).split("/")[1]
    weights = resource(FOLDERS[short], f"{stem}.safetensors")
    return _native(name, weights, weights.with_suffix(".json"), **options)


def _native(name: str, weights: Path, card_path: Path, **options: Any) -> Model:
    from safetensors.torch import load_file

    from circuitkit.models.tl_layout import native_model

    card = _card(card_path)
    return native_model(card["hooked_transformer_config"], load_file(weights), name=name, card=card, **options)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def _card(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise FormatError(f"the model card {path.name} cannot be read: {error}") from error
