"""Frozen recurrences written out step by step for torch's cells, differentiated by autograd."""

from dataclasses import dataclass, field

import torch


@dataclass
class Literal:
    """Layers of an nn.RNN, nn.GRU or nn.LSTM, unrolled; gates and secants are those of the given input.

    After `run`, ``states[layer][t]`` is ``{"h": ..., "c": ...}``; every one of them is a function of ``x`` and of what
    was there before, in the graph of autograd.
    """

    module: torch.nn.Module
    x: torch.Tensor
    gates: list = field(default_factory=list)

    def __post_init__(self):
        self.kind = type(self.module).__name__
        self.states = self.run(self.x, free=True)

    def weights(self, layer):
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        return [getattr(self.module, f"{name}_l{layer}").detach() for name in names]

    def run(self, x, *, free=False, ablate=None, start=None):
        """All states; with ``ablate = (layer, t, name, unit)`` that number is set to 0 as soon as it is made."""
        n, states = self.module.hidden_size, []
        below = list(x)
        for layer in range(self.module.num_layers):
            before = {"h": x.new_zeros(n), "c": x.new_zeros(n)} if start is None else start[layer]
            made = []
            for t, x_t in enumerate(below):
                gates = self.free(layer, x_t, before) if free else self.gates[layer][t]
                if free:
                    self.gates.append([]) if len(self.gates) <= layer else None
                    self.gates[layer].append(gates)
                hit = ablate[2:] if ablate is not None and ablate[:2] == (layer, t) else None
                before = self.frozen(layer, gates, x_t, before, hit)
                made.append(before)
            states.append(made)
            below = [state["h"] for state in made]
        return states

    def free(self, layer, x, before):
        """What is multiplicative, in a free run."""
        W, U, b, d = self.weights(layer)
        if self.kind == "RNN":
            a = W @ x + b + U @ before["h"] + d
            act = torch.tanh if self.module.nonlinearity == "tanh" else torch.relu
            return {"c": act(a) / a}
        if self.kind == "GRU":
            (wr, wz, wn), (ur, uz, un) = (W @ x + b).chunk(3), (U @ before["h"] + d).chunk(3)
            r, z = torch.sigmoid(wr + ur), torch.sigmoid(wz + uz)
            a = wn + r * un
            return {"r": r, "z": z, "c": torch.tanh(a) / a}
        i, f, g, o = (W @ x + b + U @ before["h"] + d).chunk(4)
        i, f, o = torch.sigmoid(i), torch.sigmoid(f), torch.sigmoid(o)
        cell = f * before["c"] + i * torch.tanh(g)
        return {"i": i, "f": f, "o": o, "g": torch.tanh(g) / g, "h": torch.tanh(cell) / cell}

    def frozen(self, layer, gates, x, before, hit=None):
        """One step, linear in x and in what was before."""
        W, U, b, d = self.weights(layer)
        if self.kind == "RNN":
            out = {"h": gates["c"] * (W @ x + b + U @ before["h"] + d)}
        elif self.kind == "GRU":
            n, z = self.module.hidden_size, gates["z"]
            mine = (W @ x + b)[2 * n :] + gates["r"] * (U @ before["h"] + d)[2 * n :]
            out = {"h": (1 - z) * gates["c"] * mine + z * before["h"]}
        else:
            g = (W @ x + b + U @ before["h"] + d).chunk(4)[2]
            cell = gates["f"] * before["c"] + gates["i"] * gates["g"] * g
            cell = without(cell, hit, "c")
            return {"c": cell, "h": without(gates["o"] * gates["h"] * cell, hit, "h")}
        return {"h": without(out["h"], hit, "h")}


def without(x, hit, name):
    """A vector with one number set to 0."""
    if hit is None or hit[0] != name:
        return x
    keep = torch.ones_like(x)
    keep[hit[1]] = 0
    return x * keep
