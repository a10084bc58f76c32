"""Dictionaries that other trainers wrote: circuit-tracer, sparsify and dictionary_learning.

circuit-tracer        ``layer_3.safetensors``: W_enc and W_skip transposed; ``W_enc_3`` and ``W_dec_3`` of a CLT
sparsify              ``cfg.json`` and ``sae.safetensors``: a linear layer's encoder, top k
dictionary_learning   ``config.json`` and ``ae.pt``: read as tensors only, never as a pickle
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.dictionaries.hook_names import site_of_hook
from circuitkit.dictionaries.sae_lens_format import agreed
from circuitkit.dictionaries.sparse_coder import SparseCoder
from circuitkit.dictionaries.weights import (
    Tensors,
    field_of,
    make_coder,
    need,
    read_json,
    read_pickled_tensors,
    read_tensors,
)
from circuitkit.errors import FormatError, OptionError

Writes = tuple[Site, ...] | None


def load_circuit_tracer(path: Path, read: Site | None, writes: Writes) -> Dictionary:
    """One transcoder of circuit-tracer, ``layer_<n>.safetensors``; sites from ``config.yaml`` beside it."""
    tensors, where = read_tensors(path), str(path)
    match = re.search(r"(\d+)", path.stem)
    config = _yaml(path.parent)
    if match is None and (read is None or not writes):
        raise OptionError(
            f"{path.name} does not say its layer; give read=Site('mlp-in', n), writes=(Site('mlp-out', n),)"
        )
    layer = int(match[1]) if match else -1
    reads = _traced_site(config, "feature_input_hook", "mlp-in", layer, read, "reads", where)
    written = _traced_site(
        config, "feature_output_hook", "mlp-out", layer, writes[0] if writes else None, "writes", where
    )
    own: Tensors = {name: need(tensors, name, where) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    own |= {"W_enc": _transposed(own["W_enc"], own["b_enc"], where), "W_dec": own["W_dec"][None]}
    own["b_dec"] = own["b_dec"][None]
    if "W_skip" in tensors:
        own["W_skip"] = tensors["W_skip"].T
    threshold = tensors.get("activation_function.threshold", tensors.get("threshold"))
    k = int(tensors["k"]) if "k" in tensors else None
    if threshold is not None:
        own["threshold"] = threshold.reshape(-1).expand(len(own["b_enc"]))
    activation = "topk" if k is not None else "relu" if threshold is None else "jumprelu"
    coder = make_coder(own, where, activation=activation, k=k)
    return Dictionary(coder, reads, (written,), str(config.get("model_name") or ""))


def load_circuit_tracer_clt(folder: Path, read: Site | None) -> tuple[Dictionary, ...]:
    """The layers of a cross-layer transcoder of circuit-tracer, or the one that reads ``read``.

    A layer's ``b_dec`` is added once to that layer's output, so it belongs to the dictionary that reads that layer.
    """
    n = len(list(folder.glob("W_enc_*.safetensors")))
    config = _yaml(folder)
    out = []
    for i in range(n):
        where = f"{folder}, layer {i}"
        if read is not None and read.layer != i:
            continue
        reads = _traced_site(config, "feature_input_hook", "mlp-in", i, read, "reads", where)
        tensors = read_tensors(folder / f"W_enc_{i}.safetensors") | read_tensors(folder / f"W_dec_{i}.safetensors")
        own = {name: need(tensors, f"{name}_{i}", where) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
        if own["W_dec"].dim() != 3 or own["W_dec"].shape[1] != n - i:
            raise FormatError(f"{where}: W_dec is {list(own['W_dec'].shape)}, expected {n - i} layers to be written")
        own |= {"W_enc": _transposed(own["W_enc"], own["b_enc"], where), "W_dec": own["W_dec"].transpose(0, 1)}
        own["b_dec"] = torch.cat((own["b_dec"][None], own["b_dec"].new_zeros(n - i - 1, len(own["b_dec"]))))
        if f"threshold_{i}" in tensors:
            own["threshold"] = tensors[f"threshold_{i}"].reshape(-1)
        coder = make_coder(own, where, activation="jumprelu" if "threshold" in own else "relu")
        written = tuple(
            _traced_site(config, "feature_output_hook", "mlp-out", j, None, "writes", where) for j in range(i, n)
        )
        out.append(Dictionary(coder, reads, written, str(config.get("model_name") or "")))
    if not out:
        raise OptionError(f"{folder} has layers 0 to {n - 1}, and {read} was asked for")
    return tuple(out)


def _transposed(encoder: Tensor, bias: Tensor, where: str) -> Tensor:
    if encoder.dim() != 2 or encoder.shape[0] != len(bias):
        raise FormatError(
            f"{where}: W_enc is {list(encoder.shape)}, expected [{len(bias)}, d_in] as circuit-tracer has it"
        )
    return encoder.T


def _traced_site(
    config: dict[str, Any], field: str, kind: str, layer: int, given: Site | None, verb: str, where: str
) -> Site:
    hook = config.get(field)
    if given is not None and (hook is None or layer < 0):
        return agreed(Site(given.kind, layer) if layer >= 0 else None, given, verb, where)
    if hook is None:
        return Site(kind, layer)
    try:
        found = site_of_hook(f"blocks.{layer}.{hook}", where)
    except FormatError:
        if given is None:
            raise
        return given
    return agreed(found, given, verb, where)


def _yaml(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    if not path.exists():
        return {}
    import yaml

    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise FormatError(f"{path} cannot be read ({type(error).__name__}); copy or download it again") from error
    return found if isinstance(found, dict) else {}


def load_sparsify(folder: Path, read: Site | None, writes: Writes) -> Dictionary:
    """A sparse coder of sparsify; its folder's name is the hook point (``layers.3.mlp``, ``h.3``)."""
    config, tensors, where = read_json(folder / "cfg.json"), read_tensors(folder / "sae.safetensors"), str(folder)
    if config.get("activation", "topk") != "topk":
        raise FormatError(f"{where} has activation = {config['activation']!r}, expected 'topk'")
    transcode = bool(config.get("transcode", False))
    match = re.fullmatch(r"(?:.*\.)?(?:layers|h)[._](\d+)(\.mlp|\.attn|\.self_attn)?", folder.name)
    part = (match[2] or "")[1:] if match else ""
    out_kind = {"mlp": "mlp-out", "attn": "attn-out", "self_attn": "attn-out"}.get(part, "resid-post")
    in_kind = {"mlp": "mlp-in", "": "resid-pre"}.get(part) if transcode else out_kind
    layer = int(match[1]) if match else -1
    found = None if match is None or in_kind is None else Site(in_kind, layer)
    reads = agreed(found, read, "reads", where)
    written = agreed(Site(out_kind, layer) if match else (None if transcode else reads), writes[0] if writes else None,
                     "writes", where)  # fmt: skip
    own = {
        "W_enc": need(tensors, "encoder.weight", where).T,
        "b_enc": need(tensors, "encoder.bias", where),
        "W_dec": need(tensors, "W_dec", where)[None],
        "b_dec": need(tensors, "b_dec", where)[None],
    }
    if "W_skip" in tensors:
        own["W_skip"] = tensors["W_skip"].T
    k = int(field_of(config, "k", where))
    return Dictionary(make_coder(own, where, activation="topk", k=k, subtract_b_dec=not transcode), reads, (written,))


_SUBMODULES = {"resid_post": "resid-post", "mlp_out": "mlp-out", "attn_out": "attn-out"}


def load_dictionary_learning(folder: Path, read: Site | None, writes: Writes) -> Dictionary:
    """A dictionary of dictionary_learning: ReLU, gated, top k, batch top k (Matryoshka too) or JumpReLU."""
    where, config = str(folder), read_json(folder / "config.json").get("trainer", {})
    tensors = read_pickled_tensors(folder / "ae.pt")
    kind, layer = str(config.get("dict_class", "")), config.get("layer")
    name = str(config.get("submodule_name") or "")
    stem = next((stem for stem in _SUBMODULES if name.startswith(stem)), None)
    found = None if layer is None or stem is None else Site(_SUBMODULES[stem], int(layer))
    site = agreed(found, read, "reads", where)
    written = agreed(site, writes[0] if writes else None, "writes", where)
    coder = _learned_coder(kind, tensors, where, config)
    return Dictionary(coder, site, (written,), str(config.get("lm_name") or ""))


def _learned_coder(kind: str, tensors: Tensors, where: str, config: dict[str, Any]) -> SparseCoder:
    def first(*names: str) -> Tensor:
        return next((tensors[name] for name in names if name in tensors), torch.empty(0))

    own = {
        "W_enc": tensors["W_enc"] if "W_enc" in tensors else need(tensors, "encoder.weight", where).T,
        "W_dec": (tensors["W_dec"] if "W_dec" in tensors else need(tensors, "decoder.weight", where).T)[None],
        "b_enc": first("b_enc", "encoder.bias", "gate_bias"),
        "b_dec": first("b_dec", "bias", "decoder_bias", "decoder.bias")[None],
    }
    if kind in ("AutoEncoder", "AutoEncoderNew"):
        return make_coder(own, where, activation="relu", subtract_b_dec=kind == "AutoEncoder")
    if kind == "GatedAutoEncoder":
        own |= {"r_mag": need(tensors, "r_mag", where), "b_mag": need(tensors, "mag_bias", where)}
        return make_coder(own, where, activation="gated", subtract_b_dec=True)
    if kind == "AutoEncoderTopK":
        k = int(tensors["k"]) if "k" in tensors else int(field_of(config, "k", where))
        return make_coder(own, where, activation="topk", k=k, subtract_b_dec=True)
    if kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        own["threshold"] = need(tensors, "threshold", where).reshape(-1).expand(len(own["b_enc"]))
        subtract = kind != "JumpReluAutoEncoder" or bool(config.get("apply_b_dec_to_input", False))
        return make_coder(own, where, activation="jumprelu", subtract_b_dec=subtract)
    raise FormatError(f"{where} has dict_class = {kind!r}, which is not known; see docs/dictionaries.md")
