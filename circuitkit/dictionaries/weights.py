"""Tensors of a dictionary file, checked before they become a coder: whole, finite and of shapes that fit together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from circuitkit.dictionaries.sparse_coder import SparseCoder
from circuitkit.errors import FormatError, OptionError

Tensors = dict[str, Tensor]


def read_tensors(path: Path) -> Tensors:
    """All tensors of a safetensors file. Raises FormatError if it is missing, truncated or not one."""
    try:
        with safe_open(str(path), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"{path} is missing, truncated or no safetensors file ({error}); copy or download it again"
        ) from error


def read_pickled_tensors(path: Path) -> Tensors:
    """Tensors of a ``.pt`` file, of which nothing is executed. Raises FormatError if it holds anything else."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FormatError(
            f"{path} is missing, truncated, or holds more than tensors ({type(error).__name__})"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise FormatError(f"{path} is not a state dict of tensors; expected one that dictionary_learning saved")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file. Raises FormatError for anything else."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} is missing, truncated or not JSON ({error}); copy or download it again") from error
    if not isinstance(found, dict):
        raise FormatError(f"{path} holds a JSON {type(found).__name__}, expected an object")
    return found


def sha256_of(path: Path) -> str:
    """The hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def need(tensors: Mapping[str, Tensor], name: str, where: str) -> Tensor:
    """One tensor by name. Raises FormatError if there is none."""
    if name not in tensors:
        raise FormatError(f"{where} has no tensor {name!r}; it has {', '.join(sorted(tensors))[:200]}")
    return tensors[name]


def field_of(config: Mapping[str, Any], name: str, where: str) -> Any:
    """One field by name. Raises FormatError if there is none."""
    if name not in config:
        raise FormatError(f"{where} has no field {name!r}; it is not a whole configuration")
    return config[name]


def make_coder(
    tensors: Mapping[str, Tensor], where: str, *, activation: str, k: int | None = None, subtract_b_dec: bool = False
) -> SparseCoder:
    """A coder from tensors by its own names, frozen.

    Args:
        tensors: ``W_enc`` ``[d_in, latent]``, ``W_dec`` ``[out, latent, d_out]``, ``b_enc``, ``b_dec``
            ``[out, d_out]``, and whatever else the activation has.
        where: the file, for messages.
        activation: as for `SparseCoder`.
        k: as for `SparseCoder`.
        subtract_b_dec: as for `SparseCoder`.

    Raises:
        FormatError: if a tensor is missing, unknown, not finite, or of a shape that does not fit.
    """
    encoder, decoder = need(tensors, "W_enc", where), need(tensors, "W_dec", where)
    if encoder.dim() != 2 or decoder.dim() != 3:
        raise FormatError(f"{where}: W_enc is {list(encoder.shape)} and W_dec {list(decoder.shape)}; no sparse coder")
    try:
        coder = SparseCoder(
            encoder.shape[0], encoder.shape[1], decoder.shape[2], n_out=len(decoder), activation=activation, k=k,
            skip="W_skip" in tensors, subtract_b_dec=subtract_b_dec,
        )  # fmt: skip
    except OptionError as error:
        raise FormatError(f"{where}: {error}") from error
    expected = dict(coder.named_parameters())
    unknown = sorted(set(tensors) - set(expected))
    if unknown:
        raise FormatError(f"{where} has the tensor {unknown[0]!r}, which a {activation} coder does not have")
    for name, parameter in expected.items():
        tensor = need(tensors, name, where)
        if tensor.shape != parameter.shape:
            raise FormatError(f"{where}: {name} is {list(tensor.shape)}, expected {list(parameter.shape)}")
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise FormatError(f"{where}: {name} holds NaN, infinite or whole numbers; the weights are damaged")
        setattr(coder, name, nn.Parameter(tensor.contiguous().clone(), requires_grad=False))
    return coder
