"""The literal transformer with a dial for every edge at every position, and a switch for every query, key and value.

    x_v(p)   = sum_u (1 - dial[p, u, v]) a_u(p) + dial[p, u, v] a_u(corrupt)(p)
    z_h(p)   = attention of head h at p alone, with the queries, keys and values that are switched off for p corrupt

One example, one head, one query at a time; only the weights of a `NativeTransformer` are shared with what it judges.
"""

import math

import torch

from circuitkit.models.native import ACTIVATIONS
from tests.oracles.literal import norm, rotate


def literal_position_run(module, tokens, *, corrupt=None, reads=None, dial=None, off=None, push=None):
    """Logits [pos, vocab]; writers' outputs [src, pos, d]; reads {(layer, slot, node): [pos, d_head]}; heads' outputs.

    Args:
        corrupt: what each writer carries along an edge whose dial is 1.
        reads: the corrupt queries, keys and values, as this function returns them.
        dial: [pos, src, dst].
        off: ``(slot, row of the head, key position, query position) -> bool``; of a query the two positions are equal.
        push: {(layer, head): [pos, d_head]}, added to what heads make of their values.
    """
    c, made, z_of = module.config, {}, {}
    x0 = module.embed.W_E[tokens]
    if c.positional_embedding_type == "standard":
        x0 = x0 + module.pos_embed.W_pos[: len(tokens)]
    writes, constant, column = [x0], torch.zeros_like(x0), 0

    def stream(n):
        nonlocal column
        x = constant.clone()
        for u in range(n):
            x = x + writes[u]
            if dial is not None:
                x = x + dial[:, u, column, None] * (corrupt[u] - writes[u])
        column += 1
        return x

    for layer, block in enumerate(module.blocks):
        attn, seen = block.attn, len(writes)
        for slot, n in (("q", c.n_heads), ("k", c.n_kv), ("v", c.n_kv)):
            weight, bias = attn.projection(slot)
            for i in range(n):
                made[layer, slot, i] = norm(block.ln1, stream(seen)) @ weight[i] + bias[i]
        for h in range(c.n_heads):
            row, group = len(writes), h * c.n_kv // c.n_heads
            out = []
            for p in range(len(tokens)):
                parts = {}
                for slot, node in (("q", h), ("k", group), ("v", group)):
                    y = made[layer, slot, node].clone()
                    for j in range(len(tokens)):
                        if off is not None and off(slot, row, j, j if slot == "q" else p):
                            y[j] = reads[layer, slot, node][j]
                    parts[slot] = rotate(y, c.rotary_dim) if slot in "qk" and c.rotary_dim else y
                last = p + 1 if c.attention_dir == "causal" else len(tokens)
                scores = parts["q"][p] @ parts["k"][:last].T / math.sqrt(c.d_head)
                out.append(scores.softmax(-1) @ parts["v"][:last])
            z_of[layer, h] = torch.stack(out) if push is None else torch.stack(out) + push[layer, h]
            writes.append(z_of[layer, h] @ attn.W_O[h])
        constant = constant + attn.b_O
        if hasattr(block, "mlp"):
            mlp, x = block.mlp, norm(block.ln2, stream(len(writes)))
            act = ACTIVATIONS[c.act_fn]
            hidden = act(x @ mlp.W_gate) * (x @ mlp.W_in) + mlp.b_in if c.gated_mlp else act(x @ mlp.W_in + mlp.b_in)
            writes.append(hidden @ mlp.W_out + mlp.b_out)
    logits = norm(module.ln_final, stream(len(writes))) @ module.unembed.W_U + module.unembed.b_U
    return logits, torch.stack(writes), made, z_of


def metric_of(task, batch, i, logits):
    return task.metric(logits[batch.positions[i]][None], batch.rows(torch.tensor([i])))[0]


def literal_position_gradient(model, task, batch, i):
    """Minus the derivative of the metric with respect to every dial of one example: [pos, src, dst]."""
    module, tokens = model.module, batch.clean[i, : int(batch.lengths[i])]
    corrupt = literal_position_run(module, batch.corrupt[i, : len(tokens)])[1].detach()
    dial = torch.zeros(len(tokens), *model.graph.mask.shape, dtype=corrupt.dtype, requires_grad=True)
    logits = literal_position_run(module, tokens, corrupt=corrupt, dial=dial)[0]
    return -torch.autograd.grad(metric_of(task, batch, i, logits), dial)[0]


def literal_inside(model, task, batch, i, slot, row, keys, queries):
    """What the corrupt queries, keys or values at some positions are worth in one head's output at others."""
    module, tokens = model.module, batch.clean[i, : int(batch.lengths[i])]
    reads = literal_position_run(module, batch.corrupt[i, : len(tokens)])[2]
    clean = literal_position_run(module, tokens)[3]
    push = {key: torch.zeros_like(z).requires_grad_() for key, z in clean.items()}
    value = metric_of(task, batch, i, literal_position_run(module, tokens, push=push)[0])
    node = model.graph.source_nodes[row]
    where = node.layer, node.index
    slope = torch.autograd.grad(value, push[where])[0]

    def off(a_slot, a_row, j, p):
        return a_slot == slot and a_row == row and j in keys and p in queries

    edited = literal_position_run(module, tokens, reads=reads, off=off)[3]
    return sum(float(((clean[where][p] - edited[where][p]) @ slope[p]).detach()) for p in queries)


def literal_position_circuit(model, task, layout, kept, batch, i):
    """The metric of one example with every possible edge outside ``kept`` (names) cut."""
    module, length = model.module, int(batch.lengths[i])
    spans = [layout.spans[s] for s in batch.spans[i, :length].tolist()]
    _, corrupt, reads, _ = literal_position_run(module, batch.corrupt[i, :length])
    sources, destinations = model.graph.sources, model.graph.destinations
    possible = set(layout.names)
    cut = possible - set(kept)
    dial = torch.zeros(length, *model.graph.mask.shape, dtype=corrupt.dtype)
    for p, span in enumerate(spans):
        for u, source in enumerate(sources):
            for v, destination in enumerate(destinations):
                dial[p, u, v] = f"{source}@{span}->{destination}@{span}" in cut

    def off(slot, row, j, p):
        owner = next(
            name for v, name in enumerate(destinations)
            if model.graph.feeds[v, row] and model.graph.destination_nodes[v].slot == slot
        )  # fmt: skip
        return f"{owner}@{spans[j]}->{sources[row]}@{spans[p]}" in cut

    logits = literal_position_run(module, batch.clean[i, :length], corrupt=corrupt, reads=reads, dial=dial, off=off)[0]
    return float(metric_of(task, batch, i, logits).detach())
