"""From a model, dictionaries and a prompt to the local replacement model: one forward pass, then its own in float32.

The model's pass gives attention patterns, MLP outputs and the first stream. Everything else (values, norm scales, error
vectors, latents) is computed again from the wiring in float32 or better, so that the sums are exact whatever the
model's dtype; streams that come out elsewhere than the model's refuse the model by layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.dictionaries.sparse_coder import SparseCoder
from circuitkit.errors import OptionError, UnsupportedModel
from circuitkit.features.affine import in_dtype_of, slopes
from circuitkit.features.frozen import FrozenAttention, FrozenLinear, FrozenMap, FrozenNorm, Parallel, gathered
from circuitkit.features.gates import frozen_gates
from circuitkit.features.inputs import position_vectors
from circuitkit.features.local import Active, Component, LocalModel, Nodes, Reads, Stage, Step, Writes, owner, same_site
from circuitkit.features.places import attention_sites, check_dictionaries, check_model, check_prompts, mlp_sites
from circuitkit.functional.norms import at_least_float32
from circuitkit.models.hooked import Model, Run
from circuitkit.models.hooks import Hook, hooked, keeper

# How far a stream may lie from the model's own, relative to its largest entry.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.05}


@torch.no_grad()
def local_model(
    model: Model, dictionaries: Sequence[Dictionary], tokens: Int[Tensor, " pos"], *, frozen_mlps: bool = False
) -> LocalModel:
    """The local replacement model of one prompt.

    Args:
        model: a transformer whose attention patterns can be reached.
        dictionaries: in their places.
        tokens: one prompt.
        frozen_mlps: let MLPs that no dictionary writes for pass on what they read, each neuron with the ratio of what
            it gives to its pre-activation held fixed; without it the output of such an MLP is one error node.

    Raises:
        OptionError: if a dictionary does not fit, no latent is active, or the prompt is empty or too long.
        UnsupportedModel: if the model cannot be taken apart, or an activation is not finite.
    """
    return local_models(model, dictionaries, [tokens], frozen_mlps=frozen_mlps)[0]


@torch.no_grad()
def local_models(
    model: Model, dictionaries: Sequence[Dictionary], prompts: Sequence[Int[Tensor, " _"]], *, frozen_mlps: bool = False
) -> list[LocalModel]:
    """Those of several prompts, from one pass of the model, shorter ones filled up; see `local_model`."""
    check_model(model)
    check_dictionaries(model, dictionaries)
    check_prompts(model, prompts)
    patterns: dict[int, Tensor] = {}
    hooks: list[Hook] = [(port, keeper(patterns, i)) for i, port in enumerate(model.wiring.patterns)]
    with model.quiet(), hooked(hooks):
        run = model.record(pad_sequence(list(prompts), batch_first=True))
    if len({len(tokens) for tokens in prompts}) > 1 and not _causal(patterns):  # what fills up would be seen
        return [local_model(model, dictionaries, tokens, frozen_mlps=frozen_mlps) for tokens in prompts]
    found = []
    for i, tokens in enumerate(prompts):
        n = len(tokens)
        inputs, writes = (tuple(x[i : i + 1, :n] for x in parts) for parts in (run.inputs, run.writes))
        logits = model.logits(inputs[-1], torch.arange(n, device=model.device)[None])[0]
        own = {layer: pattern[i : i + 1, :, :n, :n] for layer, pattern in patterns.items()}
        parts = Run(1, (), inputs, writes)
        found.append(_Builder(model, dictionaries, tokens.to(model.device), parts, own, frozen_mlps).build(logits))
    return found


class _Builder:
    """The pass from the input to the final stream, and what it leaves at every site."""

    def __init__(
        self,
        model: Model,
        dictionaries: Sequence[Dictionary],
        tokens: Tensor,
        run: Run,
        patterns: dict[int, Tensor],
        frozen_mlps: bool,
    ) -> None:
        self.model, self.wiring, self.tokens = model, model.wiring, tokens
        self.run, self.patterns, self.frozen_mlps = run, patterns, frozen_mlps
        self.dictionaries = {same_site(d.read): d for d in dictionaries}
        self.writers: dict[Site, list[Dictionary]] = {}
        for d in dictionaries:
            for site in d.writes:
                self.writers.setdefault(same_site(site), []).append(d)
        self.coders: dict[Site, SparseCoder] = {}
        self.values: dict[Site, Tensor] = {}
        self.active: dict[Site, Active] = {}
        self.nodes: list[Nodes] = []
        self.columns = 0
        self.at_each = torch.arange(len(tokens), device=tokens.device)

    def build(self, logits: Tensor) -> LocalModel:
        """All steps, from the first to the last."""
        x = at_least_float32(self.run.inputs[0])[0]
        steps: list[Step] = []
        for layer in range(len(self.wiring.blocks)):
            steps.append(self._stream(x, layer))
            after, attention = self._attention(x, layer)
            parallel = self._reads_the_same(layer)
            added, mlp = self._mlp(x if parallel else after, layer)
            components = [c for c in (attention, mlp) if c]
            steps += [tuple(components)] if parallel else [(c,) for c in components]
            x = after + added
            self._check_stream(x, layer)
        steps.append(self._stream(x, len(self.wiring.blocks)))
        active = tuple(self.active.values())
        if not any(len(a.nodes) for a in active):
            raise OptionError(
                f"none of the dictionaries has an active latent on the prompt of {len(self.tokens)} tokens that begins "
                f"with {self.tokens[:8].tolist()}; are they trained on this model, at "
                f"{', '.join(str(site) for site in self.dictionaries)}?"
            )
        causal = _causal(self.patterns)
        return LocalModel(self.tokens, tuple(steps), tuple(self.nodes), active, self.values, logits, causal)

    # ------------------------------------------------------------------------------------------------ sources

    def _new(self, kind: str, site: Site, positions: Tensor, index: Tensor, values: Tensor) -> Nodes:
        nodes = Nodes(kind, site, self.columns, positions, index, values)
        self.nodes.append(nodes)
        self.columns += len(nodes)
        return nodes

    def _one_each(self, kind: str, site: Site, vectors: Tensor, index: Tensor | None = None) -> Writes:
        none = torch.full_like(self.at_each, -1)
        ones = vectors.new_ones(len(vectors))
        nodes = self._new(kind, site, self.at_each, none if index is None else index, ones)
        return Writes(nodes.first, self.at_each, vectors)

    def _bias(self, site: Site, vectors: Tensor) -> tuple[Writes, ...]:
        """Constants, in the column of their component."""
        component = owner(site)
        found = next((n for n in self.nodes if n.kind == "bias" and n.site == component), None)
        if found is None:
            none = self.at_each[:1] * 0 - 1
            found = self._new("bias", component, none, none, vectors.new_ones(1))
        return (Writes(found.first, self.at_each, vectors, shared=True),) if bool(vectors.any()) else ()

    def _encode(self, site: Site, value: Tensor) -> None:
        """The active latents of the dictionary that reads a site, if there is one."""
        self.values[site] = value
        dictionary = self.dictionaries.get(site)
        if dictionary is None:
            return
        coder = self.coders[site] = in_dtype_of(dictionary.coder, value)
        latents = coder.encode(value)
        if not bool(torch.isfinite(latents).all()):
            raise OptionError(
                f"the dictionary at {dictionary.read} gives latents that are not finite; check its weights"
            )
        positions, index = latents.nonzero(as_tuple=True)
        activations = latents[positions, index]
        nodes = self._new("latent", dictionary.read, positions, index, activations)
        vectors, constants = slopes(coder, index)
        self.active[site] = Active(dictionary, nodes, Reads(site, positions, vectors, constants, activations))

    def _decoded(self, site: Site, value: Tensor) -> tuple[Writes, ...]:
        """Latents, offsets and error that make up a tensor; nothing if no dictionary writes it."""
        made, parts = torch.zeros_like(value), list[Writes]()
        offset = torch.zeros_like(value)
        for dictionary in self.writers[site]:
            read = same_site(dictionary.read)
            coder, nodes = self.coders[read], self.active[read].nodes
            number = [same_site(w) for w in dictionary.writes].index(site)
            vectors = coder.W_dec[number][nodes.index] * nodes.values[:, None]
            parts.append(Writes(nodes.first, nodes.positions, vectors))
            made = made.index_add(0, nodes.positions, vectors)
            offset = offset + coder.b_dec[number]
            made = made if coder.W_skip is None else made + self.values[read] @ coder.W_skip
        error = self._one_each("error", site, value - made - offset)
        return (*parts, error, *self._bias(site, offset))

    # ------------------------------------------------------------------------------------------------- parts

    def _stream(self, x: Tensor, layer: int) -> Stage:
        site = Site("resid-pre", layer)
        inner = self._inputs(site, x) if layer == 0 else ()
        self._encode(site, x)
        if site in self.writers:
            # What dictionaries read here is what was written before; what they write is passed on.
            return Stage(site, None, cut=True, outer=self._decoded(site, x), inner=inner)
        if layer == len(self.wiring.blocks):
            self._bias(site, torch.zeros_like(x))
        return Stage(site, None, inner=inner)

    def _inputs(self, site: Site, x: Tensor) -> tuple[Writes, ...]:
        at_positions = position_vectors(self.model, self.tokens, x)
        token = self._one_each("token", site, x - at_positions, self.tokens)
        return (token, self._one_each("position", site, at_positions)) if bool(at_positions.any()) else (token,)

    def _attention(self, x: Tensor, layer: int) -> tuple[Tensor, Component]:
        found = attention_sites(self.wiring, layer)
        if found is None:
            return x, ()
        read, heads = found
        assert read.weight is not None and heads.weight is not None
        norm = FrozenNorm.at(read.norm, x)
        pattern = at_least_float32(self.patterns[layer])[0].to(x)
        mix = FrozenAttention(norm, read.weight.detach().to(x), pattern)
        constant = norm.bias(x)
        at_values = constant @ mix.value.transpose(0, 1).flatten(1)
        at_values = at_values if read.bias is None else at_values + read.bias.to(x).flatten()
        z_bias = gathered(pattern, at_values, read.n)
        z = mix.push(x[None])[0] + z_bias
        weight = heads.weight.detach().to(x).flatten(0, 1)
        made = z @ weight if heads.bias is None else z @ weight + heads.bias.to(x)
        post = FrozenNorm.at(heads.post_norm, made)
        out_bias = post.bias(x) + (0 if heads.bias is None else post.push(heads.bias.to(x).expand_as(x)[None])[0])
        written = post.push(made[None])[0] + post.bias(x)
        stages = (
            self._stage(Site("z", layer), mix, z, z_bias),
            self._stage(Site("attn-out", layer), FrozenLinear((weight,), (), post), written, out_bias),
        )
        return x + written, stages

    def _stage(self, site: Site, before: FrozenMap | None, value: Tensor, constant: Tensor) -> Stage:
        """A stage inside a component whose whole tensor a dictionary may stand for."""
        self._encode(site, value)
        outer = self._decoded(site, value) if site in self.writers else ()
        return Stage(site, before, bool(outer), outer, self._bias(site, constant))

    def _mlp(self, x: Tensor, layer: int) -> tuple[Tensor | int, Component]:
        found = mlp_sites(self.wiring, layer)
        if found is None:
            return 0, ()
        read, written = found
        norm = FrozenNorm.at(read.norm, x)
        normed = norm.push(x[None])[0] + norm.bias(x)
        first, last = Site("mlp-in", layer), Site("mlp-out", layer)
        self._encode(first, normed)
        below = Stage(first, norm, inner=self._bias(first, norm.bias(x)))
        number = self.wiring.write_sites.index(written)
        out = at_least_float32(self.run.writes[number])[0, :, 0].to(x)
        writers = self.writers.get(last, [])
        if last in self.dictionaries or (self.frozen_mlps and not writers):
            gates, constant = self._gates(layer, normed, out)
            return out, (below, self._stage(last, gates, out, constant))
        self.values[last] = out
        if not writers:
            error = self._one_each("error", last, out)
            return out, (below, Stage(last, None, inner=(error,)))
        skips = [self.coders[same_site(d.read)].W_skip for d in writers]
        maps = [FrozenLinear((skip,)) for skip in skips if skip is not None]
        return out, (below, Stage(last, Parallel(maps) if maps else None, inner=self._decoded(last, out)))

    def _gates(self, layer: int, x: Tensor, out: Tensor) -> tuple[FrozenLinear, Tensor]:
        parts = next((p for p in self.wiring.mlps if p.block == layer), None)
        if parts is None:
            raise UnsupportedModel(
                f"the inside of the MLP of layer {layer} of {self.model.name} is not known, so its gates cannot be "
                "frozen; use a transcoder there instead of an SAE, or frozen_mlps=False"
            )
        gates, constant, made = frozen_gates(parts, x)
        gap = float((made - out).abs().max() / out.abs().max().clamp(min=1e-6))
        self._refuse(gap, f"the MLP of layer {layer}")
        return gates, constant + out - made

    # ------------------------------------------------------------------------------------------------- checks

    def _reads_the_same(self, layer: int) -> bool:
        """Whether the MLP reads the stream that attention reads."""
        mlp, attention = mlp_sites(self.wiring, layer), attention_sites(self.wiring, layer)
        return mlp is not None and attention is not None and self.wiring.writes_before(mlp[0]) <= attention[1].first

    def _check_stream(self, x: Tensor, layer: int) -> None:
        want = at_least_float32(self.run.inputs[layer + 1])[0]
        self._refuse(
            float((x - want).abs().max() / want.abs().max().clamp(min=1e-6)), f"the stream after layer {layer}"
        )

    def _refuse(self, gap: float, what: str) -> None:
        allowed = ROUNDING.get(self.run.inputs[0].dtype, 1e-3)
        if not gap <= allowed:
            raise UnsupportedModel(
                f"{what} of {self.model.name} is not what its patterns, maps and norms give: relative gap {gap:.1e}, "
                f"expected at most {allowed:.0e}; the layer does something that the wiring does not say"
            )


def _causal(patterns: Mapping[int, Tensor]) -> bool:
    return not any(bool(pattern.triu(1).any()) for pattern in patterns.values())
