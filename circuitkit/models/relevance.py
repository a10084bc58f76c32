"""Relevance rules: the forward pass as it is, another backward pass.

    norm         y = x_hat(x) w + b            the scale 1 / sigma counts as a constant
    activation   act(x)                        as x * c, with c = act(x) / x a constant
    half         act(gate) * up                each factor gets half of its gradient
    pattern      attention pattern             a constant

Each rule is a hook that replaces a value y by y.detach() + f - f.detach(): the same number, with the gradient of f.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.errors import OptionError
from circuitkit.functional.norms import Norm, at_least_float32
from circuitkit.models.edits import Objective, reader_gradients
from circuitkit.models.hooked import Model, Run
from circuitkit.models.hooks import Hook, hooked, keeper
from circuitkit.models.wiring import MlpParts, Port, ReadSite

Seen = dict[Any, Tensor]


@dataclass(frozen=True)
class Rules:
    """Which rules are on."""

    norm: bool
    activation: bool
    half: bool
    pattern: bool

    def check(self, model: Model) -> None:
        """Refuse a rule that has nothing known to work on. Raises OptionError naming the rule."""
        wiring, kinds = model.wiring, {node.kind for node in model.graph.source_nodes}
        unknown = []
        if not wiring.mlps and kinds & {"mlp", "neuron"}:
            inside = "the inside of its MLPs is not known"
            unknown += [("activation_rule", inside)] * self.activation + [("half_rule", inside)] * self.half
        if self.pattern and not wiring.patterns and "head" in kinds:
            unknown.append(("freeze_pattern", "its attention patterns cannot be reached"))
        if self.norm and any(norm is None for norm, _ in wiring.inner_norms):
            unknown.append(("norm_rule", "a norm inside its blocks is of no known form"))
        for option, why in unknown:
            raise OptionError(f"{option} cannot be applied to {model.name}: {why}; set {option}=False")


def relevance_gradients(
    model: Model,
    run: Run,
    x: Float[Tensor, "step batch pos d"],
    positions: Int[Tensor, "batch answer"],
    objective: Objective,
    *,
    rules: Rules,
) -> tuple[tuple[Tensor, ...], Iterator[tuple[slice, Float[Tensor, "node batch pos d"]]]]:
    """As `reader_gradients`, by the rules instead of the derivative. Raises OptionError for an unknown final norm."""
    seen: Seen = {}
    before, watch = rule_hooks(model, rules, seen)
    with hooked(final_hooks(model, seen) if rules.norm else []):
        return reader_gradients(model, run, x, positions, objective, before, frozen_norms=rules.norm, watch=watch)


def rule_hooks(model: Model, rules: Rules, seen: Seen) -> tuple[list[Hook], list[Hook]]:
    """Hooks that apply the rules inside the blocks, and hooks that only look, to be attached after all others."""
    wiring, before, watch = model.wiring, list[Hook](), list[Hook]()
    if rules.norm:
        sites = [s for s in wiring.read_sites if s.block < len(wiring.blocks) and s.norm is not None]
        before += [(port, keeper(seen, port)) for port in dict.fromkeys(site.stream for site in sites)]
        before += [(site.port, partial(_read_by_rule, site, seen)) for site in sites]
        before += [hook for norm, port in wiring.inner_norms for hook in _norm_hooks(norm, port, seen)]
    if rules.activation or rules.half:
        for parts in wiring.mlps:
            watch += [(port, keeper(seen, port)) for port in (parts.pre, parts.gate) if port is not None]
            before.append((parts.hidden, partial(_hidden_by_rule, parts, rules, seen)))
    if rules.pattern:
        before += [(port, torch.Tensor.detach) for port in wiring.patterns]
    return before, watch


def final_hooks(model: Model, seen: Seen) -> list[Hook]:
    """The norm before the unembedding, which runs after the replay."""
    wiring = model.wiring
    if wiring.normed is None:
        return []
    return _norm_hooks(wiring.final_norm, wiring.normed, seen)


def _norm_hooks(norm: Norm | None, port: Port, seen: Seen) -> list[Hook]:
    return [(Port(port.module, "in"), keeper(seen, port)), (port, partial(_normed_by_rule, norm, port, seen))]


def _normed_by_rule(norm: Norm | None, port: Port, seen: Seen, y: Tensor) -> Tensor | None:
    x = seen.pop(port)
    if norm is not None:
        return _as_if(y, _frozen(norm, x))
    if x is y or torch.equal(x, y):  # a model without a norm has an identity in its place
        return None
    raise OptionError("norm_rule cannot be applied: the final norm is of no known form; set norm_rule=False")


def _read_by_rule(site: ReadSite, seen: Seen, y: Tensor) -> Tensor:
    assert site.norm is not None
    normed = _frozen(site.norm, seen[site.stream])
    if site.weight is not None:
        weight = site.weight.to(normed.dtype)
        normed = torch.einsum("bpd,ndw->bpnw", normed, weight).reshape(y.shape)
    return _as_if(y, normed)


def _frozen(norm: Norm, x: Tensor) -> Tensor:
    """What the norm gives up to a constant, with the scale held fixed."""
    x = at_least_float32(x)
    return norm.part(x * norm.statistics(x)[1].detach())


def _hidden_by_rule(parts: MlpParts, rules: Rules, seen: Seen, hidden: Tensor) -> Tensor:
    up = at_least_float32(seen.pop(parts.pre))
    if parts.gate is None:
        return _as_if(hidden, _activated(parts.activation, up)) if rules.activation else hidden
    gate = at_least_float32(seen.pop(parts.gate))
    opened = _activated(parts.activation, gate) if rules.activation else parts.activation(gate)
    return _as_if(hidden, opened * up * (0.5 if rules.half else 1.0))


def _activated(activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """x * (act(x) / x), the factor a constant; nothing passes where x is 0."""
    factor = torch.where(x == 0, 0.0, activation(x) / torch.where(x == 0, 1.0, x))
    return x * factor.detach()


def _as_if(y: Tensor, f: Tensor) -> Tensor:
    """The value of y with the gradient of f."""
    return y.detach() + (f - f.detach()).to(y.dtype)
