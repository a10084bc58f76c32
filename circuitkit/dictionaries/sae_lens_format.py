"""SAELens folders (``cfg.json`` and ``sae_weights.safetensors``) and objects of that library, both ways.

architecture                        ours
standard, topk, jumprelu, gated     relu, topk, jumprelu, gated; batchtopk and matryoshka are saved as jumprelu
transcoder, jumprelu_transcoder     relu, jumprelu, two sites
skip_transcoder, jumprelu_skip_...  the same with W_skip, which is stored transposed
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors

from circuitkit.atomic import write_atomic
from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.dictionaries.hook_names import hook_of_site, site_of_hook
from circuitkit.dictionaries.sparse_coder import SparseCoder
from circuitkit.dictionaries.weights import Tensors, field_of, make_coder, need, read_json, read_tensors, sha256_of
from circuitkit.errors import FormatError, OptionError

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ACTIVATION_OF = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
# A training checkpoint of these holds no inference weights; `save_inference_model` writes them as jumprelu.
TRAINING_ONLY = ("batchtopk", "matryoshka_batchtopk")


def load_folder(folder: Path, read: Site | None, writes: tuple[Site, ...] | None) -> Dictionary:
    """A dictionary from a SAELens folder."""
    config = read_json(folder / CONFIG)
    tensors = read_tensors(folder / WEIGHTS)
    expected = (config.get("metadata") or {}).get("weights_sha256")
    if expected is not None and expected != sha256_of(folder / WEIGHTS):
        raise FormatError(f"{folder}: weights and {CONFIG} were not written together; save the dictionary again")
    version = config.get("sae_lens_version") or (config.get("metadata") or {}).get("sae_lens_version")
    if not version or str(version).partition(".")[0] < "6":
        from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting

        config = handle_config_defaulting(config)
    return from_config(config, tensors, str(folder), read, writes)


def load_object(sae: Any, read: Site | None, writes: tuple[Site, ...] | None) -> Dictionary:
    """A dictionary from an object of SAELens, whose weights are copied."""
    tensors = {name: tensor.detach() for name, tensor in sae.state_dict().items()}
    return from_config(sae.cfg.to_dict(), tensors, f"the {type(sae).__name__}", read, writes)


def load_pretrained(name: str, read: Site | None, writes: tuple[Site, ...] | None) -> Dictionary:
    """A dictionary of a release that SAELens knows. Raises FormatError if it cannot be had."""
    from sae_lens import SAE

    release, _, identity = name.partition("/")
    try:
        sae = SAE.from_pretrained(release, identity)
    except Exception as error:
        raise FormatError(
            f"{name!r} is no folder or file here, and SAELens could not load it as release/id "
            f"({type(error).__name__}: {str(error)[:200]}); check the name and the network"
        ) from error
    return load_object(sae, read, writes)


def from_config(
    config: Mapping[str, Any], tensors: Tensors, where: str, read: Site | None, writes: tuple[Site, ...] | None
) -> Dictionary:
    """A dictionary from a SAELens configuration and state dict."""
    architecture = str(field_of(config, "architecture", where))
    if architecture in TRAINING_ONLY:
        raise FormatError(
            f"{where} is a training checkpoint ({architecture}); save it with save_inference_model, as jumprelu"
        )
    if architecture not in ACTIVATION_OF:
        raise FormatError(f"{where} has architecture {architecture!r}, expected one of {', '.join(ACTIVATION_OF)}")
    normalize = config.get("normalize_activations", "none")
    if normalize not in ("none", None):
        raise FormatError(
            f"{where} has normalize_activations = {normalize!r}: its input is rescaled by numbers that are not in the "
            "weights; fold them first (fold_activation_norm_scaling_factor) and save it again"
        )
    metadata = config.get("metadata") or {}
    reads, written = _sites(config, metadata, where, read, writes)
    k = int(config["k"]) if architecture == "topk" else None
    subtract = bool(config.get("apply_b_dec_to_input", True)) and "transcoder" not in architecture
    coder = make_coder(
        _own_names(tensors, config, where), where, activation=ACTIVATION_OF[architecture], k=k, subtract_b_dec=subtract
    )
    for name, size in (("d_in", coder.d_in), ("d_sae", coder.n_latents), ("d_out", coder.d_out)):
        if config.get(name) not in (None, size):
            raise FormatError(f"{where}: the configuration says {name} = {config[name]}, the weights say {size}")
    card = {name: value for name, value in metadata.items() if value is not None and name not in _WRITTEN}
    return Dictionary(coder, reads, written, str(metadata.get("model_name") or ""), card)


def _sites(
    config: Mapping[str, Any],
    metadata: Mapping[str, Any],
    where: str,
    read: Site | None,
    writes: tuple[Site, ...] | None,
) -> tuple[Site, tuple[Site, ...]]:
    hook, out = metadata.get("hook_name"), metadata.get("hook_name_out")
    if metadata.get("hook_head_index") is not None and read is None:
        raise FormatError(f"{where} was trained on one head of {hook}; that is no site of its own")
    found = None if hook is None or (read is not None and not _is_known(str(hook))) else site_of_hook(str(hook), where)
    reads = agreed(found, read, "reads", where)
    if "transcoder" not in str(config["architecture"]):
        return reads, (agreed(reads, writes[0] if writes else None, "writes", where),)
    other = None if out is None or (writes and not _is_known(str(out))) else site_of_hook(str(out), where)
    return reads, (agreed(other, writes[0] if writes else None, "writes", where),)


def _is_known(hook: str) -> bool:
    try:
        site_of_hook(hook, "")
    except FormatError:
        return False
    return True


def agreed(found: Site | None, given: Site | None, verb: str, where: str) -> Site:
    """The site that a file names, or the one that the user gave; both if they are the same.

    Raises:
        OptionError: if they differ, or there is neither.
    """
    if found is None and given is None:
        word = "read=Site(kind, layer)" if verb == "reads" else "writes=(Site(kind, layer),)"
        raise OptionError(f"{where} does not say which site it {verb}; give it with {word}")
    if found is not None and given is not None and found != given:
        raise OptionError(f"{where} {verb} {found}, and {given} was asked for; it belongs to another site")
    site = given or found
    assert site is not None
    return site


def _own_names(tensors: Tensors, config: Mapping[str, Any], where: str) -> Tensors:
    own = {name: need(tensors, name, where) for name in ("W_enc", "W_dec", "b_dec")}
    if config["architecture"] == "gated":
        own["b_enc"] = need(tensors, "b_gate", where)
        own |= {name: need(tensors, name, where) for name in ("r_mag", "b_mag")}
    else:
        own["b_enc"] = need(tensors, "b_enc", where)
    if "jumprelu" in config["architecture"]:
        own["threshold"] = need(tensors, "threshold", where)
    if "skip" in config["architecture"]:
        own["W_skip"] = need(tensors, "W_skip", where).T
    if config.get("rescale_acts_by_decoder_norm"):
        norm = own["W_dec"].norm(dim=-1)
        own |= {"W_enc": own["W_enc"] * norm, "b_enc": own["b_enc"] * norm, "W_dec": own["W_dec"] / norm[:, None]}
    return own | {"W_dec": own["W_dec"][None], "b_dec": own["b_dec"][None]}


_WRITTEN = ("model_name", "hook_name", "hook_name_out", "weights_sha256", "sae_lens_version",
            "sae_lens_training_version")  # fmt: skip


def save_folder(dictionary: Dictionary, folder: Path) -> Path:
    """Write a folder that SAELens loads. Raises OptionError for what it has no architecture for."""
    from circuitkit.schema import jsonable

    coder, architecture = dictionary.coder, _architecture(dictionary)
    tensors = {name: p.detach().cpu() for name, p in coder.named_parameters()}
    tensors |= {"W_dec": tensors["W_dec"][0], "b_dec": tensors["b_dec"][0]}
    if "W_skip" in tensors:
        tensors["W_skip"] = tensors["W_skip"].T
    if coder.activation == "gated":
        tensors["b_gate"] = tensors.pop("b_enc")
    weights = write_atomic(folder / WEIGHTS, to_safetensors({n: t.contiguous().clone() for n, t in tensors.items()}))
    hooks = {"hook_name": hook_of_site(dictionary.read)}
    if "transcoder" in architecture:
        hooks["hook_name_out"] = hook_of_site(dictionary.writes[0])
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": coder.d_in,
        "d_sae": coder.n_latents,
        "dtype": str(coder.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": coder.subtract_b_dec,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if dictionary.read.kind == "z" else "none",
    }
    if "transcoder" in architecture:
        config["d_out"] = coder.d_out
    if architecture == "topk":
        config |= {"k": coder.k, "rescale_acts_by_decoder_norm": False}
    about = {"model_name": dictionary.model or None, "sae_lens_version": "6.0.0", "weights_sha256": sha256_of(weights)}
    config["metadata"] = {**jsonable(dict(dictionary.card)), **hooks, **about}
    write_atomic(folder / CONFIG, json.dumps(config, indent=1))
    return folder


def _architecture(dictionary: Dictionary) -> str:
    coder: SparseCoder = dictionary.coder
    if coder.n_out > 1:
        raise OptionError("SAELens has no cross-layer transcoders; save it with format='circuitkit'")
    if coder.W_enc.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise OptionError(f"got weights of {coder.W_enc.dtype}, expected a floating-point type that SAELens knows")
    jump = coder.activation in ("jumprelu", "batchtopk")
    if dictionary.kind == "sae" and coder.W_skip is None:
        return {"relu": "standard", "topk": "topk", "gated": "gated"}.get(coder.activation, "jumprelu")
    if coder.activation in ("topk", "gated"):
        raise OptionError(f"SAELens has no {coder.activation} transcoder; save it with format='circuitkit'")
    return "jumprelu_" * jump + "skip_" * (coder.W_skip is not None) + "transcoder"
