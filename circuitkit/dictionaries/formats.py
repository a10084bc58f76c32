"""Dictionaries from files and back: our own folder, SAELens, circuit-tracer, sparsify and dictionary_learning.

Our folder holds ``dictionary.safetensors`` (the coder's tensors by name) and ``dictionary.json`` (activation, sites,
model, card, and the hash of the tensors). Each file is written in one step; the hash tells a pair that was not written
together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save as to_safetensors

from circuitkit.atomic import write_atomic
from circuitkit.dictionaries import other_formats, sae_lens_format
from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.dictionaries.sae_lens_format import agreed
from circuitkit.dictionaries.weights import field_of, make_coder, read_json, read_tensors, sha256_of
from circuitkit.dictionaries.zoo import dictionary_folder, dictionary_sets
from circuitkit.errors import FormatError, OptionError

CONFIG, WEIGHTS = "dictionary.json", "dictionary.safetensors"
FORMATS = ("circuitkit", "sae-lens")
FIELDS: dict[str, tuple[type, ...]] = {
    "activation": (str,), "k": (int, type(None)), "subtract_b_dec": (bool,), "read": (str,), "writes": (list,),
    "model": (str,), "card": (dict,),
}  # fmt: skip


def load_dictionary(
    source: str | Path | Any, *, read: Site | None = None, writes: tuple[Site, ...] | Site | None = None
) -> Dictionary:
    """A dictionary that ships with circuitkit, or from a folder, a file, a SAELens release or a SAELens object.

    Args:
        source: a folder of circuitkit, SAELens, sparsify or dictionary_learning; a transcoder file or cross-layer
            folder of circuit-tracer (``read`` chooses the layer); where no such path exists a name of
            `circuitkit.dictionaries.zoo.dictionary_names` or ``"release/id"``; or an ``SAE`` object.
        read: where it reads. Needed where the file does not say; otherwise it must agree.
        writes: where it writes, likewise.

    Raises:
        FormatError: if the file is missing, truncated, damaged or of a kind that is not known.
        OptionError: if it belongs to another site than the one given, or the site is not known; or for a set.
        UnknownName: for a name of a model that dictionaries ship for, and none of these.

    >>> import tempfile, torch
    >>> from circuitkit.dictionaries.sparse_coder import SparseCoder
    >>> dictionary = Dictionary(SparseCoder(4, 8, 4), Site("resid-post", 1), (Site("resid-post", 1),))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     loaded = load_dictionary(save_dictionary(dictionary, folder))
    >>> str(loaded.read), loaded.kind, loaded.coder.n_latents
    ('resid-post.1', 'sae', 8)
    """
    where = (writes,) if isinstance(writes, Site) else writes
    if not isinstance(source, str | Path):
        if not hasattr(source, "state_dict") or not hasattr(source, "cfg"):
            raise OptionError(f"got a {type(source).__name__}, expected a path, 'release/id' or a SAELens object")
        return sae_lens_format.load_object(source, read, where)
    path = Path(source)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise FormatError(f"{path} is no .safetensors file; give the folder that the trainer wrote")
        return other_formats.load_circuit_tracer(path, read, where)
    if path.is_dir():
        return _load_folder(path, read, where)
    shipped = dictionary_folder(str(source)) if isinstance(source, str) else None
    if shipped is not None:
        if source in dictionary_sets():
            raise OptionError(f"{source} is a set of dictionaries; use load_dictionaries, or name one: {source}/0")
        return _load_folder(shipped, read, where)
    if isinstance(source, Path) or "/" not in source or source.startswith((".", "/", "~")):
        raise FormatError(f"{source} does not exist; give a folder, a file or 'release/id'")
    return sae_lens_format.load_pretrained(source, read, where)


def load_dictionaries(folder: str | Path) -> tuple[Dictionary, ...]:
    """All dictionaries of a folder, by layer: of a cross-layer transcoder, or in its subfolders and layer files.

    Args:
        folder: a folder, or a name of `circuitkit.dictionaries.zoo.dictionary_sets`, where no such path exists.

    Raises:
        FormatError: if there is none, or one cannot be read.
    """
    shipped = None if Path(folder).exists() else dictionary_folder(str(folder))
    folder = Path(folder) if shipped is None else shipped
    if next(folder.glob("W_enc_*.safetensors"), None):
        return other_formats.load_circuit_tracer_clt(folder, None)
    found = [path for path in folder.glob("*") if path.is_dir() or path.match("layer_*.safetensors")]
    out = [load_dictionary(path) for path in found]
    if not out:
        raise FormatError(f"{folder} holds no dictionaries; give a folder of such folders, or of layer files")
    return tuple(sorted(out, key=lambda one: (one.read.layer, str(one.read), str(one.writes))))


def save_dictionary(dictionary: Dictionary, folder: str | Path, format: str = "circuitkit") -> Path:
    """Write a dictionary as a folder, and return it.

    Args:
        format: ``"circuitkit"`` for any; ``"sae-lens"`` for a folder that ``SAE.load_from_disk`` loads.

    Raises:
        OptionError: for an unknown format, or a dictionary that SAELens has no architecture for.
        FormatError: if it cannot be written, or its weights are not finite.
    """
    if format not in FORMATS:
        raise OptionError(f"got format = {format!r}, expected one of {', '.join(FORMATS)}")
    for name, parameter in dictionary.coder.named_parameters():
        if not parameter.isfinite().all():
            raise FormatError(f"{name} holds NaN or infinite values; nothing was written")
    save = sae_lens_format.save_folder if format == "sae-lens" else _save_own
    return save(dictionary, Path(folder))


def _load_folder(folder: Path, read: Site | None, writes: tuple[Site, ...] | None) -> Dictionary:
    if (folder / CONFIG).exists():
        return _load_own(folder, read, writes)
    if (folder / sae_lens_format.CONFIG).exists() and (folder / "sae.safetensors").exists():
        return other_formats.load_sparsify(folder, read, writes)
    if (folder / sae_lens_format.CONFIG).exists():
        return sae_lens_format.load_folder(folder, read, writes)
    if (folder / "ae.pt").exists():
        return other_formats.load_dictionary_learning(folder, read, writes)
    if next(folder.glob("W_enc_*.safetensors"), None):
        if read is None:
            raise OptionError(
                f"{folder} has one dictionary for each layer; choose with read=, or use load_dictionaries"
            )
        (found,) = other_formats.load_circuit_tracer_clt(folder, read)
        if writes not in (None, found.writes):
            raise OptionError(f"{folder} writes {', '.join(map(str, found.writes))}; it belongs to other sites")
        return found
    if read is not None and (folder / f"layer_{read.layer}.safetensors").exists():
        return other_formats.load_circuit_tracer(folder / f"layer_{read.layer}.safetensors", read, writes)
    raise FormatError(f"{folder} holds no dictionary that is known; see docs/dictionaries.md for what is read")


def _load_own(folder: Path, read: Site | None, writes: tuple[Site, ...] | None) -> Dictionary:
    from circuitkit.schema import check_schema

    config, where = read_json(folder / CONFIG), str(folder)
    check_schema(config.get("schema"), "dictionary", where)
    for name, kinds in FIELDS.items():
        if type(field_of(config, name, where)) not in kinds:
            words = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise FormatError(f"{where}: {CONFIG} has {name} = {config[name]!r}, expected {words}; save it again")
    tensors = read_tensors(folder / WEIGHTS)
    if field_of(config, "weights_sha256", where) != sha256_of(folder / WEIGHTS):
        raise FormatError(f"{where}: {WEIGHTS} and {CONFIG} were not written together; save the dictionary again")
    coder = make_coder(
        tensors, where, activation=field_of(config, "activation", where), k=field_of(config, "k", where),
        subtract_b_dec=field_of(config, "subtract_b_dec", where),
    )  # fmt: skip
    reads = agreed(Site.parse(field_of(config, "read", where)), read, "reads", where)
    found = tuple(Site.parse(text) for text in field_of(config, "writes", where))
    if writes not in (None, found):
        raise OptionError(f"{where} writes {', '.join(map(str, found))}; it belongs to other sites")
    return Dictionary(coder, reads, found, config.get("model", ""), config.get("card", {}))


def _save_own(dictionary: Dictionary, folder: Path) -> Path:
    from circuitkit.schema import jsonable, schema_name

    coder = dictionary.coder
    tensors = {name: p.detach().cpu().contiguous().clone() for name, p in coder.named_parameters()}
    weights = write_atomic(folder / WEIGHTS, to_safetensors(tensors))
    config = {
        "schema": schema_name("dictionary"),
        "activation": coder.activation,
        "k": coder.k,
        "subtract_b_dec": coder.subtract_b_dec,
        "read": str(dictionary.read),
        "writes": [str(site) for site in dictionary.writes],
        "model": dictionary.model,
        "card": jsonable(dict(dictionary.card)),
        "weights_sha256": sha256_of(weights),
    }
    write_atomic(folder / CONFIG, json.dumps(config, indent=1))
    return folder
