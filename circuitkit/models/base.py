"""`load`: whatever a user has, as a checked `Model`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from circuitkit.errors import OptionError, UnknownName, UnsupportedModel
from circuitkit.models.hooked import Model
from circuitkit.models.views import with_view


def load(
    what: str | nn.Module,
    *,
    check: bool = True,
    neurons: int | None = None,
    time: str | Sequence[tuple[int, int]] | None = None,
    steps: int | None = None,
    group: str | None = None,
    **options: Any,
) -> Model:
    """Load a model and test its wiring by experiment.

    Args:
        what: a zoo name, a local Hugging Face folder, a hub id, a causal language model of transformers, a
            TransformerBridge, or a HookedTransformer. A module of yours is never changed.
        check: whether to run the load laws (a few passes over five tokens).
        neurons: split every MLP into groups of that many neurons, each a node; None keeps MLPs whole.
        time: of a recurrent network: ``"collapsed"`` (the default), ``"expanded"``, or windows of steps as
            ``"0-4,4-12"`` or ``[(0, 4), (4, 12)]``.
        steps: how long inputs are, for ``time="expanded"``.
        group: what a node of a recurrent network is: ``"unit"`` (the default), ``"gate"``, ``"layer"`` or
            ``"direction"``.
        options: for a name, folder or hub id ``device`` and ``dtype``, and ``revision`` for a hub id; for a module
            ``tokenizer`` and ``name``. Move a module of yours to its device before you load it.

    Raises:
        OptionError: for an option that does not apply.
        GraphError: if windows or groups do not fit the network.
        UnknownName: for a name that is nearly one of the zoo's.
        UnsupportedModel: if it cannot be loaded, or its wiring fails a law: results would be wrong.

    >>> load("induction/trained")
    Model(induction/trained: 3 writers, 7 readers, 12 edges)
    """
    allowed = ("device", "dtype", "revision", "name", "tokenizer") if isinstance(what, str) else ("name", "tokenizer")
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        known = ", ".join(("check", "neurons", "time", "steps", "group", *allowed))
        raise OptionError(f"load has no option {unknown[0]!r} here; its options are {known}")
    model = _load_name(what, options) if isinstance(what, str) else _load_module(what, options)
    if check:
        model.check()
    if neurons is None:
        return with_view(model, time, steps=steps, group=group)
    if model.family != "transformer":
        raise OptionError(
            f"neurons splits the MLPs of transformers, and {model.name} is {model.family}; use group='unit'"
        )
    model = with_view(model, time, steps=steps, group=group)
    from circuitkit.models.neurons import split_mlps

    return split_mlps(model, neurons, check=check)


def _load_name(what: str, options: dict[str, Any]) -> Model:
    from circuitkit.models.zoo import load_zoo, zoo_name, zoo_names

    name = zoo_name(what)
    if name is not None:
        return load_zoo(name, **{k: v for k, v in options.items() if k in ("device", "dtype")})
    near = difflib.get_close_matches(what, zoo_names(), n=1, cutoff=0.8)
    if near and not Path(what).exists():
        raise UnknownName(f"unknown model {what!r}; did you mean {near[0]!r}? The zoo has {', '.join(zoo_names())}")
    from circuitkit.models.pretrained import load_pretrained

    return load_pretrained(what, **options)


def _load_module(what: nn.Module, options: dict[str, Any]) -> Model:
    if not isinstance(what, nn.Module):
        raise UnsupportedModel(f"got a {type(what).__name__}, expected a name, a folder, a hub id or a module")
    # By class name, so that neither library is imported to find out that it is not needed.
    kinds = {base.__name__ for base in type(what).__mro__}
    if "HookedTransformer" in kinds:
        from circuitkit.models.tl_layout import hooked_transformer_model

        return hooked_transformer_model(what, **options)
    if "TransformerBridge" in kinds:
        from circuitkit.models.transformer import bridge_model

        return bridge_model(what, **options)
    from circuitkit.models.recurrent.watch import recurrent_layers
    from circuitkit.models.recurrent.wrap import recurrent_model

    if recurrent_layers(what):
        return recurrent_model(what, **options)
    from circuitkit.models.transformer import module_model

    return module_model(what, **options)
