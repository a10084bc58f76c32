"""Runs of the local replacement model in which some of its nodes are changed, many runs side by side.

At every site that a dictionary writes,

    y = y of the clean run + sum over its latents of (f - f of the clean run) W_dec + (x - x of the clean run) W_skip

so error and offset are those of the clean run, and a run without changes is the model's own. What differs between modes
is how a change x - x of the clean run gets from one site to the next:

    free          as in the model: its own blocks run, so patterns, norms and MLPs are computed anew
    frozen        by the frozen maps of `circuitkit.features.frozen`; latents and MLPs are computed anew
    constrained   the same, but latents and MLPs of the held layers stay as in the clean run, where nobody sets them

Constrained in all layers, everything that is read changes by exactly the direct effects of what is changed.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from contextlib import suppress
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.dictionaries.base import Site
from circuitkit.dictionaries.places import attention_output
from circuitkit.dictionaries.sparse_coder import SparseCoder
from circuitkit.errors import UnsupportedModel
from circuitkit.features.frozen import FrozenNorm
from circuitkit.features.inputs import soft_cap, unembedding
from circuitkit.features.local import Component, LocalModel, Stage, same_site
from circuitkit.features.passing import Changes, Clean, Parts, Passed, Passing, Rows, columns_of
from circuitkit.features.places import attention_sites, mlp_sites
from circuitkit.features.replace import ROUNDING
from circuitkit.functional.norms import at_least_float32
from circuitkit.models.hooked import Model
from circuitkit.models.hooks import Hook, hooked, keeper
from circuitkit.models.wiring import MlpParts, Port

MODES = ("free", "frozen", "constrained")


class Running:
    """A local replacement model that can be run with changes; see the module's text."""

    def __init__(self, model: Model, local: LocalModel) -> None:
        self.model, self.local = model, local
        dictionaries = {same_site(a.dictionary.read): a.dictionary for a in local.active}
        self.writers: dict[Site, list[tuple[Site, int]]] = {}
        for read, dictionary in dictionaries.items():
            for number, site in enumerate(dictionary.writes):
                self.writers.setdefault(same_site(site), []).append((read, number))
        like = local.values[local.final]
        self.coders = {site: _as(d.coder, like) for site, d in dictionaries.items()}
        self.parts = Parts(local, self.coders, self.writers)
        latents = {site: coder.encode(local.values[site]) for site, coder in self.coders.items()}
        self.clean = Clean(dict(local.values), latents)
        self._own: Clean | None = None
        self._ports: dict[Site, Port] = {}

    def run(self, changes: Changes, mode: str, *, held: Collection[int] = (), watch: Collection[Site] = ()) -> Passed:
        """Run with changes.

        Args:
            mode: one of `MODES`.
            held: layers that are held, of mode ``constrained``.
            watch: sites besides those of dictionaries where changes are kept.
        """
        watched = {*self.coders, self.local.final, *watch}
        if mode == "free":
            return self._free(changes, watched)
        passing = Passing(self.parts, changes, self.clean, set(held), watched)
        stream = self._linear(passing)
        return passing.passed(self.local.values[self.local.final] + stream)

    def logits(
        self, stream: Float[Tensor, "row pos d"], positions: Int[Tensor, " answer"], mode: str
    ) -> Float[Tensor, "row answer vocab"]:
        """Logits of streams after the last block; with the clean run's scale of the final norm unless free."""
        if mode == "free":
            dtype = next(self.model.module.parameters()).dtype
            return self.model.logits(stream.to(dtype), positions.expand(len(stream), -1)).to(stream)
        clean = self.local.values[self.local.final]
        weight, bias = (t.to(clean) for t in unembedding(self.model))
        norm, cap = self.model.wiring.final_norm, soft_cap(self.model)
        normed = clean if norm is None else norm(clean)
        moved = FrozenNorm.at(norm, clean).push(stream - clean)
        found = (normed + moved)[:, positions] @ weight + bias
        return found if cap is None else cap * torch.tanh(found / cap)

    @property
    def own(self) -> Clean:
        """The clean run as hooks on the model see it, at the sites that were needed so far."""
        return self.clean if self._own is None else self._own

    def bytes_per_row(self, mode: str) -> int:
        """Memory of one run, roughly."""
        x = self.local.values[self.local.final]
        wide = 3 * sum(coder.n_latents for coder in self.coders.values())
        wide += 4 * sum(v.shape[1] for v in self.local.values.values())
        if mode == "free":
            wide += 8 * (max(p.w_in.shape[1] for p in self.model.wiring.mlps) if self.model.wiring.mlps else 4 * len(x))
        return x.element_size() * (len(x) * wide + self.local.n_sources)

    # ------------------------------------------------------------------------------------------------- frozen maps

    def _linear(self, passing: Passing) -> Rows:
        x = self.local.values[self.local.final]
        stream = x.new_zeros(passing.changes.rows, *x.shape)
        for step in self.local.steps:
            if isinstance(step, Stage):
                stream = passing.at(step.site, stream)
            else:
                stream = stream + torch.stack([self._through(c, stream, passing) for c in step]).sum(0)
        return stream

    def _through(self, component: Component, x: Rows, passing: Passing) -> Rows:
        for stage in component:
            x = passing.at(stage.site, self._below(stage, x, passing))
        return x

    def _below(self, stage: Stage, x: Rows, passing: Passing) -> Rows:
        """The change at a stage that comes from the tensor below it."""
        site, value = stage.site, self.local.values[stage.site]
        if site.kind == "mlp-out" and (stage.cut or site not in self.writers) and site.layer not in passing.held:
            return self._mlp(site, x)
        if stage.before is None or (site.kind == "mlp-out" and site in self.writers and not stage.cut):
            return x.new_zeros(len(x), *value.shape)  # a transcoder's skip connection is added where it writes
        return stage.before.push(x)

    def _mlp(self, site: Site, change: Rows) -> Rows:
        """What an MLP adds when its input changes, with the scale of a norm behind it held."""
        parts = next((p for p in self.model.wiring.mlps if p.block == site.layer), None)
        if parts is None:
            raise UnsupportedModel(
                f"the inside of the MLP of layer {site.layer} of {self.model.name} is not known, so it cannot be "
                "computed between frozen parts; use mode 'free', or a transcoder there"
            )
        x = self.local.values[Site("mlp-in", site.layer)]
        clean = _mlp_output(parts, x)
        post = FrozenNorm.at(parts.post_norm, clean)
        made, want = post.push(clean[None])[0] + post.bias(clean), self.local.values[site]
        gap = float((made - want).abs().max() / want.abs().max().clamp(min=1e-6))
        if not gap <= ROUNDING.get(next(self.model.module.parameters()).dtype, 1e-3):
            raise UnsupportedModel(
                f"the MLP of layer {site.layer} of {self.model.name} is not what its parts give: relative gap {gap:.1e}"
            )
        return post.push(_mlp_output(parts, x + change) - clean)

    # ------------------------------------------------------------------------------------------------------- hooks

    def _free(self, changes: Changes, watched: set[Site]) -> Passed:
        sites = {*watched, *self.writers, *changes.tensors(), *self._written_by(changes)}
        if self._own is None or not sites <= set(self._own.values):
            self._own = self._own_run(sites)
        passing = Passing(self.parts, changes, self._own, set(), watched)
        hooks: list[Hook] = []
        for site in sorted(sites - {self.local.final}, key=self.local.ranks.__getitem__):
            hooks.append((self._port(site), partial(self._replaced, passing, site)))
        stream = self._forward(hooks, changes.rows)
        clean = self._own.values[self.local.final]
        return passing.passed(clean + passing.at(self.local.final, stream - clean))

    def _written_by(self, changes: Changes) -> Iterator[Site]:
        """Sites where sources other than latents write something new."""
        if changes.factors is None:
            return
        for site, stage in self.parts.stages.items():
            if any(bool(changes.factors[:, columns_of(w)].any()) for w in (*stage.inner, *stage.outer)):
                yield site

    def _replaced(self, passing: Passing, site: Site, y: Tensor) -> Tensor | None:
        clean = passing.clean.values[site]
        wide = at_least_float32(y).reshape(len(y), *clean.shape)
        new = passing.at(site, wide - clean)
        return None if site.kind == "mlp-in" else (clean + new).reshape(y.shape).to(y.dtype)

    def _own_run(self, sites: set[Site]) -> Clean:
        """The model's own tensors, as hooks see them."""
        seen: dict[Site, Tensor] = {}
        hooks: list[Hook] = [(self._port(s), keeper(seen, s)) for s in sites if s != self.local.final]
        with torch.no_grad():
            stream = self._forward(hooks, 1)
            values = {site: at_least_float32(y.reshape(1, y.shape[1], -1))[0] for site, y in seen.items()}
            values[self.local.final] = stream[0]
            latents = {site: coder.encode(values[site]) for site, coder in self.coders.items()}
        return Clean(values, latents)

    def _forward(self, hooks: list[Hook], rows: int) -> Float[Tensor, "row pos d"]:
        """The stream after the last block, of copies of the prompt under hooks."""
        last: list[Tensor] = []

        def stop(x: Tensor) -> None:
            last.append(at_least_float32(x))
            raise _Stop

        with self.model.quiet(), hooked([*hooks, (self.model.wiring.final, stop)]), suppress(_Stop):
            self.model._forward(self.model.module, self.local.tokens.expand(rows, -1))
        return last[0]

    def _port(self, site: Site) -> Port:
        if site not in self._ports:
            self._ports[site] = self._found(site)
        return self._ports[site]

    def _found(self, site: Site) -> Port:
        wiring, layer = self.model.wiring, site.layer
        if site.kind == "resid-pre":
            return Port(wiring.blocks[layer - 1]) if layer else wiring.write_sites[0].port
        mlp, attention = mlp_sites(wiring, layer), attention_sites(wiring, layer)
        if site.kind in ("mlp-in", "mlp-out"):
            assert mlp is not None
            return mlp[site.kind == "mlp-out"].port
        assert attention is not None
        return attention[1].port if site.kind == "z" else attention_output(self.model, attention[1])


class _Stop(Exception):
    """Raised by our own hook to end a forward pass early."""


def _mlp_output(parts: MlpParts, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """The MLP before a norm behind it."""

    def of(weight: Tensor, bias: Tensor | None) -> Tensor:
        y = x @ weight.to(x)
        return y if bias is None else y + bias.to(x)

    pre = of(parts.w_in, parts.b_in)
    hidden = parts.activation(pre) if parts.w_gate is None else parts.activation(of(parts.w_gate, parts.b_gate)) * pre
    out = hidden @ parts.w_out.to(x)
    return out if parts.b_out is None else out + parts.b_out.to(x)


def _as(coder: SparseCoder, like: Tensor) -> SparseCoder:
    """The coder in the dtype and on the device of a tensor."""
    if coder.W_enc.dtype == like.dtype and coder.W_enc.device == like.device:
        return coder
    return copy.deepcopy(coder).to(like)
