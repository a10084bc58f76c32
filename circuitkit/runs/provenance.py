"""On exactly which model, data and versions a run was made."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from circuitkit.dictionaries.base import Dictionary
from circuitkit.tasks.base import Task

PACKAGES = ("circuitkit-discovery", "torch", "transformer-lens", "transformers", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a number can depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if "circuitkit-discovery" not in found:
        from circuitkit import __version__

        found["circuitkit-discovery"] = __version__
    return found


def model_sha256(module: nn.Module) -> str:
    """Hash of the set of weights that are in memory: type, shape and bytes, whatever a wrapper calls them."""
    # Wrappers differ in whether they add a bias of zeros, so weights that are all zero do not count.
    weights = [weight for weight in module.parameters() if not weight.is_meta and bool(weight.any())]
    digests = sorted({_sha256([("weight", weight)]) for weight in weights})
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def dictionary_sha256(dictionary: Dictionary) -> str:
    """Hash of a dictionary's weights, kind and sites."""
    coder = dictionary.coder
    about = f"{coder.activation} {coder.k} {coder.subtract_b_dec} {dictionary.read} {dictionary.writes}"
    return _sha256([("about", about), *sorted(coder.state_dict().items())])


def data_sha256(task: Task) -> str:
    """Hash of every tensor of a task's batches, and of its metric's name.

    The reference logits are left out: a method fills them in, they are not the user's data. So are spans that a task
    does not have.
    """
    named: list[tuple[str, Any]] = [("metric", task.metric.name)]
    for i, batch in enumerate(task.batches):
        left_out = {"reference"} | ({"spans"} if batch.spans is None else set())
        named += [(f"{i}.{field}", value) for field, value in sorted(vars(batch).items()) if field not in left_out]
    return _sha256(named)


def _sha256(named: Iterable[tuple[str, Any]]) -> str:
    digest = hashlib.sha256()
    for name, value in named:
        digest.update(name.encode())
        if isinstance(value, Tensor) and not value.is_meta:
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, str):
            digest.update(value.encode())
    return digest.hexdigest()
