"""Models from a local Hugging Face folder or the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from circuitkit.errors import UnsupportedModel
from circuitkit.models.hooked import Model
from circuitkit.models.transformer import module_model


def load_pretrained(
    source: str,
    *,
    name: str | None = None,
    revision: str | None = None,
    dtype: Any = None,
    device: str | torch.device | None = None,
    **about: Any,
) -> Model:
    """A `Model` from a local Hugging Face folder or a hub id; weights are read from safetensors only.

    Raises:
        UnsupportedModel: if the folder or id cannot be loaded, with the reason.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local = Path(source).is_dir()
    try:
        with _no_bar_for(local):
            module = AutoModelForCausalLM.from_pretrained(
                source,
                revision=revision,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=local,
                trust_remote_code=False,
                attn_implementation="eager",
            )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        kind = "folder" if local else "zoo name, folder or hub id"
        raise UnsupportedModel(
            f"the {kind} {source!r} could not be loaded as a causal language model: {reason}"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, local_files_only=local)
    except (OSError, ValueError, ImportError):
        tokenizer = None
    about.setdefault("tokenizer", tokenizer)
    return module_model(module.eval().to(device), name=name or Path(source).name, copy_structure=False, **about)


@contextmanager
def _no_bar_for(local: bool) -> Iterator[None]:
    """Reading a local folder is a matter of moments; transformers shows a bar all the same."""
    from transformers.utils import logging

    quiet_please = local and logging.is_progress_bar_enabled()
    if quiet_please:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if quiet_please:
            logging.enable_progress_bar()
