"""Contextual decomposition with both parts carried side by side, one edge or one node and one example at a time.

Nothing is a difference from a recorded run unless the rule itself is a difference: linear maps are applied to beta and
to gamma, and what every writer writes must be the two of them together.
"""

import math

import torch

from circuitkit.models.native import ACTIVATIONS
from tests.oracles.literal import literal_run, literal_writes, rotate


class Pair:
    """A relevant part and the rest."""

    def __init__(self, beta, gamma):
        self.beta, self.gamma = beta, gamma

    @property
    def whole(self):
        return self.beta + self.gamma

    def __add__(self, other):
        return Pair(self.beta + other.beta, self.gamma + other.gamma)


def share(beta, gamma):
    total = beta.abs() + gamma.abs()
    return torch.where(total > 0, beta.abs() / torch.where(total > 0, total, 1), 0.0)


def linear(pair, weight, bias, shared):
    beta, gamma = pair.beta @ weight, pair.gamma @ weight
    part = share(beta, gamma) * bias if shared else 0 * bias
    return Pair(beta + part, gamma + bias - part)


def normed(module, pair):
    if not hasattr(module, "w"):
        return pair
    sigma = (pair.whole.pow(2).mean(-1, keepdim=True) + module.eps).sqrt()
    return Pair(pair.beta / sigma * module.w, pair.gamma / sigma * module.w)


def merged(pair, shared):
    if not shared:
        return pair
    beta, gamma = pair.beta.clone(), pair.gamma.clone()
    for index in (beta * gamma < 0).nonzero().tolist():
        i = tuple(index)
        b, g = beta[i].item(), gamma[i].item()
        beta[i], gamma[i] = (b + g, 0.0) if abs(b) >= abs(g) else (0.0, b + g)
    return Pair(beta, gamma)


def attend(q, k, v, config):
    if config.positional_embedding_type == "rotary":
        q, k = rotate(q, config.rotary_dim), rotate(k, config.rotary_dim)
    scores = q @ k.T / math.sqrt(config.d_head)
    if config.attention_dir == "causal":
        scores = scores + torch.full_like(scores, -torch.inf).triu(1)
    return scores.softmax(-1) @ v


def attention(q, k, v, config, shared):
    if shared:  # the pattern is that of the whole
        return Pair(*(attend(q.whole, k.whole, part, config) for part in (v.beta, v.gamma)))
    whole, gamma = attend(q.whole, k.whole, v.whole, config), attend(q.gamma, k.gamma, v.gamma, config)
    return Pair(whole - gamma, gamma)


def mlp_of(mlp, x, config, shared):
    act, none = ACTIVATIONS[config.act_fn], torch.zeros_like(mlp.b_in)
    if config.gated_mlp:
        gate, pre = (merged(linear(x, w, none, shared), shared) for w in (mlp.W_gate, mlp.W_in))
        whole, gamma = (act(g) * p + mlp.b_in for g, p in ((gate.whole, pre.whole), (gate.gamma, pre.gamma)))
    else:
        pre = merged(linear(x, mlp.W_in, mlp.b_in, shared), shared)
        whole, gamma = act(pre.whole), act(pre.gamma)
    return merged(linear(Pair(whole - gamma, gamma), mlp.W_out, mlp.b_out, shared), shared)


def literal_rest(model, clean, corrupt, *, edge=None, node=None, shared):
    """Logits of gamma [pos, vocab] when an edge (row, column), or a writer's row for all its readers, is relevant."""
    module, config, graph = model.module, model.module.config, model.graph
    writes = literal_writes(module, clean, graph)
    delta = (writes - literal_writes(module, corrupt, graph)).detach()
    nothing = torch.zeros_like(delta[0])
    x = Pair(nothing, writes[0])
    row = column = 0
    if node == 0:
        x = Pair(delta[0], writes[0] - delta[0])

    def read(ln, stream):
        nonlocal column
        if edge is not None and edge[1] == column:
            stream = Pair(delta[edge[0]], stream.whole - delta[edge[0]])
        column += 1
        return normed(ln, stream)

    def written(pair):
        """What one writer adds, which must be what the transformer's writer adds."""
        nonlocal row
        row += 1
        torch.testing.assert_close(pair.whole, writes[row])
        return Pair(delta[row], writes[row] - delta[row]) if node == row else pair

    for block in module.blocks:
        attn, parts = block.attn, {}
        for slot, n in (("q", config.n_heads), ("k", config.n_kv), ("v", config.n_kv)):
            weight, bias = attn.projection(slot)
            parts[slot] = [linear(read(block.ln1, x), weight[i], bias[i], shared) for i in range(n)]
        out, first = Pair(nothing, nothing), row
        for h in range(config.n_heads):
            g = h * config.n_kv // config.n_heads
            z = attention(parts["q"][h], parts["k"][g], parts["v"][g], config, shared)
            out = out + written(Pair(z.beta @ attn.W_O[h], z.gamma @ attn.W_O[h]))
        own = node is not None and first < node <= row  # set after the projection, so it takes no part of the bias
        x = x + linear(out, torch.eye(len(attn.b_O)).to(attn.b_O), attn.b_O, shared and not own)
        if hasattr(block, "mlp"):
            x = x + written(mlp_of(block.mlp, read(block.ln2, x), config, shared))
        x = merged(x, shared)
    if edge is not None and edge[1] == column:
        x = Pair(delta[edge[0]], x.whole - delta[edge[0]])
    last, clean_logits = normed(module.ln_final, x), literal_run(module, clean, None, torch.zeros(graph.mask.shape))[0]
    rest = last.gamma @ module.unembed.W_U + module.unembed.b_U
    torch.testing.assert_close(rest + last.beta @ module.unembed.W_U, clean_logits)
    return rest.detach()


def literal_contributions(model, task, cases, shared):
    """M(logits) - M(logits - beta) of each case (a dictionary with ``edge`` or ``node``), mean over examples."""
    total, n = torch.zeros(len(cases), dtype=torch.float64), 0
    with torch.no_grad():
        for batch in task.batches:
            for i in range(len(batch)):
                clean, corrupt = (side[i, : int(batch.lengths[i])] for side in (batch.clean, batch.corrupt))
                where, one = batch.positions[i], batch.rows(torch.tensor([i]))
                logits = literal_run(model.module, clean, None, torch.zeros(model.graph.mask.shape))[0]
                whole = task.metric(logits[where][None], one)
                for j, case in enumerate(cases):
                    rest = literal_rest(model, clean, corrupt, **case, shared=shared)
                    total[j] += (whole - task.metric(rest[where][None], one))[0]
                n += 1
    return total / n
