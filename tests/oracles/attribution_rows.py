"""Rows of an attribution graph by autograd through the module itself, the way public engines compute them.

The prompt is copied; patterns, norm scales and gates are detached; whatever is written at a site is cut off there and
handed on as a leaf. One backward pass gives one row for each copy: the gradients at the leaves, contracted with what
was written. Nothing here knows of the sweep: values are read from the running module.
"""

import torch

from circuitkit.dictionaries.base import Site
from circuitkit.features.local import same_site
from circuitkit.models.hooks import hooked
from circuitkit.models.wiring import Port


class LiteralRows:
    """Forward once on copies of a prompt, then rows for any number of targets."""

    def __init__(self, model, dictionaries, tokens, *, copies=1, gates=()):
        self.model, self.wiring, self.copies = model, model.wiring, copies
        self.dictionaries = {same_site(d.read): d for d in dictionaries}
        self.written = {same_site(site) for d in dictionaries for site in d.writes}
        self.gates = set(gates)
        self.values, self.leaves, self.inputs, self.pre = {}, {}, {}, {}
        with torch.enable_grad(), model.quiet(), hooked(self._hooks()):
            model._forward(model.module, tokens.expand(copies, -1))

    def _hooks(self):
        nodes = self.wiring.graph.destination_nodes
        # Queries and keys that are constants make patterns that are.
        hooks = [(r.port, torch.Tensor.detach) for r in self.wiring.read_sites if nodes[r.first].slot in ("q", "k")]
        for i, block in enumerate(self.wiring.blocks):
            hooks.append((Port(block, "in"), self._at(("resid-pre", i))))
            post = getattr(block, "ln1_post", None)
            heads = next(w for w in self.wiring.write_sites if w.block == i and w.weight is not None)
            hooks.append((heads.port, self._at(("z", i))))
            hooks += self._norms(block, i, heads.post_norm)
            hooks.append((Port(block.attn if post is None else post), self._at(("attn-out", i))))
            if not hasattr(block, "mlp"):
                continue
            read = next(r for r in self.wiring.read_sites if r.block == i and r.weight is None)
            out = next(w for w in self.wiring.write_sites if w.block == i and w.weight is None)
            hooks.append((read.port, self._at(("mlp-in", i))))
            if i in self.gates:
                hooks += self._frozen_gates(self.wiring.mlps[i])
            hooks.append((out.port, self._at(("mlp-out", i), cut=i not in self.gates)))
        final = self.wiring.final
        hooks.append((final, self._at(("resid-pre", len(self.wiring.blocks)))))
        return hooks

    def _norms(self, block, i, post):
        read = {self.wiring.graph.destination_nodes[r.first].slot: r for r in self.wiring.read_sites if r.block == i}
        found = [(getattr(block, "ln1", None), read["q"].norm), (getattr(block, "ln1_post", None), post)]
        if hasattr(block, "mlp"):
            found.append((getattr(block, "ln2", None), read[None].norm))
        # A norm behind the MLP needs nothing: what it gives is cut off.
        hooks = []
        for module, norm in found:
            if module is None or norm is None:
                continue
            hooks.append((Port(module, "in"), self._keep_input(module)))
            hooks.append((Port(module), self._frozen_norm(module, norm)))
        return hooks

    def _keep_input(self, module):
        def keep(x):
            self.inputs[module] = x

        return keep

    def _frozen_norm(self, module, norm):
        def frozen(_y):
            x = self.inputs[module]
            y = norm.part(x * norm.statistics(x)[1].detach())
            return y if norm.bias is None else y + norm.bias

        return frozen

    def _frozen_gates(self, parts):
        def keep(x):
            self.pre[parts.block] = x

        def frozen(hidden):
            pre = self.pre[parts.block]
            return pre * (hidden / pre).detach()

        return [(parts.pre, keep), (parts.hidden, frozen)]

    def _at(self, key, cut=False):
        site = Site(*key)

        def hook(whole):
            x = self.values[site] = whole.reshape(*whole.shape[:2], -1)  # heads joined
            if site == Site("resid-pre", 0):
                x = self.values[site] = self.leaves["tokens"] = x.detach().clone().requires_grad_()
            if not cut and site not in self.written:
                return None if site.kind != "resid-pre" or site.layer else x
            leaf = x.detach().clone().requires_grad_()
            self.leaves[site] = leaf
            for d in self.dictionaries.values():
                if d.coder.W_skip is not None and d.writes[0] == site:
                    skipped = self.values[d.read] @ d.coder.W_skip
                    return leaf + skipped - skipped.detach()
            return leaf.reshape(whole.shape)

        return hook

    def gradients(self, targets):
        """Gradients at all leaves for at most as many targets as copies, each (site, position, vector)."""
        total = sum(self.values[site][b, p] @ v for b, (site, p, v) in enumerate(targets))
        found = torch.autograd.grad(total, list(self.leaves.values()), retain_graph=True, allow_unused=True)
        zeros = (torch.zeros_like(leaf) for leaf in self.leaves.values())
        return {
            site: (z if g is None else g)[: len(targets)] for site, g, z in zip(self.leaves, found, zeros, strict=True)
        }

    def latents(self, site):
        """Activations of the dictionary that reads a site, [pos, latent]."""
        return self.dictionaries[site].coder.encode(self.values[site][0].detach())

    def encoder(self, site, index):
        """A latent's vector in what its dictionary reads."""
        coder = self.dictionaries[site].coder
        vector = coder.W_enc[:, index]
        return vector if coder.r_mag is None else vector * coder.r_mag.exp()[index]

    def row_parts(self, gradients, row):
        """Effects of tokens (positions included) [pos], of errors {site: [pos]}, of latents {site: [pos, latent]}."""
        tokens = (gradients["tokens"][row] * self.leaves["tokens"][0].detach()).sum(-1)
        errors, latents = {}, {}
        for site, gradient in gradients.items():
            if site == "tokens":
                continue
            g = gradient[row]
            made = torch.zeros_like(g)
            for read, d in self.dictionaries.items():
                for number, to in enumerate(d.writes):
                    if same_site(to) != site:
                        continue
                    f = self.latents(read)
                    latents[read] = latents.get(read, 0) + f * (g @ d.coder.W_dec[number].T)
                    made = made + f @ d.coder.W_dec[number] + d.coder.b_dec[number]
                    if d.coder.W_skip is not None:
                        made = made + self.values[read][0].detach() @ d.coder.W_skip
            errors[site] = (g * (self.values[site][0].detach() - made)).sum(-1)
        return tokens, errors, latents
