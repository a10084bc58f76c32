"""All paths into a target by recursion over single numbers, one head, source position and latent at a time.

Norms are pulled back by autograd with their scale detached; values come from the running module. Nothing here knows of
the local replacement model or of the path search.
"""

import torch

from circuitkit.dictionaries.base import Site
from circuitkit.dictionaries.sites import activations
from circuitkit.models.hooks import hooked, keeper


def frozen(norm, v, x):
    """d (v . norm(x)) / dx with the scale held at its value."""
    if norm is None:
        return v.detach()
    x = x.detach().clone().requires_grad_()
    centred = x - x.mean() if norm.center else x
    y = centred / (centred.square().mean() + norm.eps).sqrt().detach()
    y = y if norm.weight is None else y * (norm.weight + float(norm.unit_gain))
    return torch.autograd.grad(y @ v, x)[0]


class LiteralPaths:
    """One prompt; `parts` takes one vector apart, `paths` all of them, down to the tokens or a depth."""

    def __init__(self, model, dictionaries, tokens):
        self.wiring, self.dictionaries = model.wiring, dictionaries
        nodes, writers = self.wiring.graph.destination_nodes, self.wiring.graph.source_nodes
        layers = range(len(self.wiring.blocks))
        patterns = {}
        with hooked([(port, keeper(patterns, i)) for i, port in enumerate(self.wiring.patterns)]):
            self.streams = [x[0].detach() for x in model.record(tokens[None]).inputs]
        self.patterns = {i: p[0].detach() for i, p in patterns.items()}
        self.values = [next(r for r in self.wiring.read_sites if r.block == i and nodes[r.first].slot == "v")
                       for i in layers]  # fmt: skip
        self.heads = [next(w for w in self.wiring.write_sites if w.block == i and writers[w.first].kind == "head")
                      for i in layers]  # fmt: skip
        self.mlps = [next(r for r in self.wiring.read_sites if r.block == i and nodes[r.first].kind == "mlp")
                     for i in layers]  # fmt: skip

        def at(kind):
            return [activations(model, Site(kind, i), tokens[None])[0].detach() for i in layers]

        z, out, self.mlp_in = at("z"), at("attn-out"), at("mlp-in")
        self.raw = [z[i] @ w.weight.flatten(0, 1) + (0 if w.bias is None else w.bias) for i, w in enumerate(self.heads)]
        self.parallel = [self.wiring.writes_before(m) <= w.first for m, w in zip(self.mlps, self.heads, strict=True)]
        self.mid = [self.streams[i] + (0 if self.parallel[i] else out[i]) for i in layers]

    def parts(self, v, p, height):
        """(name, contribution, vector left, position, height) of each source; the stream at height 2 l enters block l,
        at 2 l + 1 it enters the MLP of that block."""
        yield f"root@{p}", float(v @ self.streams[0][p]), None, p, 0
        for layer in range((height + 1) // 2):
            yield from self._heads(v, p, layer)
        for dictionary in self.dictionaries:
            yield from self._latents(v, p, height // 2, dictionary)

    def _heads(self, v, p, layer):
        heads, value = self.heads[layer], self.values[layer]
        behind = frozen(heads.post_norm, v, self.raw[layer][p])
        for h in range(heads.n):
            for q in range(len(self.streams[0])):
                weight = float(self.patterns[layer][h, p, q])
                if weight == 0:
                    continue
                x = self.streams[layer][q]
                read = value.weight[h // (heads.n // value.n)] @ (heads.weight[h] @ behind)
                left = weight * frozen(value.norm, read, x)
                yield f"a{layer}.h{h}@{p}<-{q}", float(left @ x), left, q, 2 * layer

    def _latents(self, v, p, below, dictionary):
        """Of one dictionary, as written by MLPs below a layer."""
        layer, coder = dictionary.read.layer, dictionary.coder
        numbers = [n for n, site in enumerate(dictionary.writes) if site.layer < below]
        if not numbers:
            return
        norm, x, height = self.mlps[layer].norm, self.mid[layer][p], 2 * layer + (not self.parallel[layer])
        latents = coder.encode(self.mlp_in[layer][p])
        for i in latents.nonzero().flatten().tolist():
            slope = sum(float(coder.W_dec[n, i] @ v) for n in numbers)
            factor = 1 if coder.r_mag is None else float(coder.r_mag[i].exp())
            left = frozen(norm, slope * factor * coder.W_enc[:, i], x)
            yield f"m{layer}.f{i}@{p}", slope * float(latents[i]), left, p, height
        if coder.W_skip is not None:
            left = frozen(norm, coder.W_skip @ v, x)
            yield f"m{layer}.skip@{p}", float(left @ x), left, p, height

    def paths(self, v, p, height, depth):
        """Names and contribution of every path of at most so many steps."""
        for name, contribution, left, q, below in self.parts(v, p, height) if depth else ():
            yield (name,), contribution
            if left is not None:
                for names, value in self.paths(left, q, below, depth - 1):
                    yield (name, *names), value

    def greedy(self, v, p, height, *, depth, beam, rank, keep=lambda name: True):
        """The paths of a search with a beam, round by round."""
        kept, going = [], [((), v, p, height)]
        for _ in range(depth):
            found = [
                ((*names, name), value, left, q, below)
                for names, v, p, height in going
                for name, value, left, q, below in self.parts(v, p, height)
                if keep(name)
            ]
            found = sorted(found, key=lambda one: rank(one[0], one[1]), reverse=True)[:beam]
            kept += [(names, value) for names, value, *_ in found]
            going = [(names, *rest) for names, _, *rest in found if rest[0] is not None]
        return kept
