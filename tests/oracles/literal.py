"""A transformer in which every reader has its own copy of the stream and every edge its own dial.

    x_v = sum_u (1 - dial[u, v]) a_u + dial[u, v] a_u(corrupt)        + what no writer writes (biases)

One dial at 1 is exact edge patching; all dials outside a circuit at 1 run the circuit; minus the derivative with
respect to the dials at 0 is edge attribution patching. No batching over edges, no factored writers, no replay, no
hooks: only the weights of a `NativeTransformer` are shared with what it judges. One example at a time.
"""

import math

import torch

from circuitkit.models.native import ACTIVATIONS


def literal_run(module, tokens, corrupt, dial, start=None):
    """Logits [pos, vocab] and writers' outputs [src, pos, d] of one example.

    Where the dials have more columns than a graph of whole MLPs has, every MLP is groups of neurons, each a reader.

    Args:
        tokens: [pos] token ids.
        corrupt: what each writer carries along an edge whose dial is 1, [src, pos, d], or None.
        dial: [src, dst] between 0 and 1.
        start: the input's write, if not that of the tokens.
    """
    c = module.config
    x0 = module.embed.W_E[tokens]
    if c.positional_embedding_type == "standard":
        x0 = x0 + module.pos_embed.W_pos[: len(tokens)]
    writes = [x0 if start is None else start]
    constant = torch.zeros_like(x0)
    column = 0
    with_mlp = [block for block in module.blocks if hasattr(block, "mlp")]
    heads = c.n_layers * (c.n_heads + 2 * c.n_kv)
    per_mlp = (dial.shape[1] - 1 - heads) // len(with_mlp) if with_mlp else 0

    def stream(n):
        """What the next reader reads, given that it sees the first n writers."""
        nonlocal column
        x = constant.clone()
        for u in range(n):
            other = writes[u] if corrupt is None else corrupt[u]
            x = x + (1 - dial[u, column]) * writes[u] + dial[u, column] * other
        column += 1
        return x

    for block in module.blocks:
        attn, seen = block.attn, len(writes)
        parts = {}
        for slot, n in (("q", c.n_heads), ("k", c.n_kv), ("v", c.n_kv)):
            weight, bias = attn.projection(slot)
            parts[slot] = [norm(block.ln1, stream(seen)) @ weight[i] + bias[i] for i in range(n)]
        for h in range(c.n_heads):
            g = h * c.n_kv // c.n_heads
            q, k, v = parts["q"][h], parts["k"][g], parts["v"][g]
            if c.positional_embedding_type == "rotary":
                q, k = rotate(q, c.rotary_dim), rotate(k, c.rotary_dim)
            scores = q @ k.T / math.sqrt(c.d_head)
            if c.attention_dir == "causal":
                scores = scores + torch.full_like(scores, -torch.inf).triu(1)
            writes.append(scores.softmax(-1) @ v @ attn.W_O[h])
        constant = constant + attn.b_O
        if hasattr(block, "mlp"):
            mlp = block.mlp
            if per_mlp > 1:
                neurons(mlp, block.ln2, c, per_mlp // 2 if c.gated_mlp else per_mlp, stream, writes)
                constant = constant + mlp.b_out
                continue
            x = norm(block.ln2, stream(len(writes)))
            act = ACTIVATIONS[c.act_fn]
            hidden = act(x @ mlp.W_gate) * (x @ mlp.W_in) + mlp.b_in if c.gated_mlp else act(x @ mlp.W_in + mlp.b_in)
            writes.append(hidden @ mlp.W_out + mlp.b_out)
    logits = norm(module.ln_final, stream(len(writes))) @ module.unembed.W_U + module.unembed.b_U
    return logits, torch.stack(writes)


def neurons(mlp, ln, c, n, stream, writes):
    """One group of neurons after the other: what each reads from its own copies, and what it writes."""
    seen, act, width = len(writes), ACTIVATIONS[c.act_fn], len(mlp.W_out) // n
    spans = [slice(g * width, (g + 1) * width) for g in range(n)]
    first = [norm(ln, stream(seen)) for _ in spans]
    second = [norm(ln, stream(seen)) for _ in spans] if c.gated_mlp else first
    for span, a, b in zip(spans, first, second, strict=True):
        if c.gated_mlp:
            hidden = act(a @ mlp.W_gate[:, span]) * (b @ mlp.W_in[:, span]) + mlp.b_in[span]
        else:
            hidden = act(a @ mlp.W_in[:, span] + mlp.b_in[span])
        writes.append(hidden @ mlp.W_out[span])


def norm(module, x):
    if not hasattr(module, "w"):
        return x
    return x / (x.pow(2).mean(-1, keepdim=True) + module.eps).sqrt() * module.w


def rotate(x, rotary_dim):
    out = x.clone()
    for i in range(rotary_dim // 2):
        angle = torch.arange(len(x), dtype=torch.float64) / 10000 ** (2 * i / rotary_dim)
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        out[:, 2 * i] = x[:, 2 * i] * cos - x[:, 2 * i + 1] * sin
        out[:, 2 * i + 1] = x[:, 2 * i] * sin + x[:, 2 * i + 1] * cos
    return out


def literal_metric(module, task, batch, i, corrupt, dial, start=None):
    """The metric of example i of a batch (one number)."""
    length = int(batch.lengths[i])
    logits, _ = literal_run(module, batch.clean[i, :length], corrupt, dial, start)
    return task.metric(logits[batch.positions[i]][None], batch.rows(torch.tensor([i])))[0]


def literal_writes(module, tokens, graph):
    return literal_run(module, tokens, None, torch.zeros(graph.mask.shape, dtype=module.embed.W_E.dtype))[1].detach()


def literal_exact(model, task):
    """M(clean) - M(one edge corrupt), one edge and one example at a time: mean over examples."""
    module, graph = model.module, model.graph
    total, n = torch.zeros(graph.mask.shape, dtype=torch.float64), 0
    with torch.no_grad():
        for batch in task.batches:
            for i in range(len(batch)):
                length = int(batch.lengths[i])
                corrupt = literal_writes(module, batch.corrupt[i, :length], graph)
                dial = torch.zeros(graph.mask.shape, dtype=corrupt.dtype)
                clean = literal_metric(module, task, batch, i, corrupt, dial)
                for u, v in graph.mask.nonzero().tolist():
                    dial[u, v] = 1
                    total[u, v] += clean - literal_metric(module, task, batch, i, corrupt, dial)
                    dial[u, v] = 0
                n += 1
    return total / n


def literal_gradient(model, task, alphas, weights):
    """Edge attribution with the gradient averaged along the input path, by autograd on private copies."""
    module, graph = model.module, model.graph
    total, n = torch.zeros(graph.mask.shape, dtype=torch.float64), 0
    for batch in task.batches:
        for i in range(len(batch)):
            length = int(batch.lengths[i])
            clean = literal_writes(module, batch.clean[i, :length], graph)
            corrupt = literal_writes(module, batch.corrupt[i, :length], graph)
            for alpha, weight in zip(alphas, weights, strict=True):
                start = corrupt[0] + alpha * (clean[0] - corrupt[0])
                writes = literal_run(
                    module, batch.clean[i, :length], None, torch.zeros(graph.mask.shape).to(clean), start
                )[1]
                dial = torch.zeros(graph.mask.shape, dtype=clean.dtype, requires_grad=True)
                # Turning a dial adds (corrupt - clean) of the end-to-end difference, whatever the point of the path.
                carried = writes.detach() + corrupt - clean
                value = literal_metric(module, task, batch, i, carried, dial, start)
                total -= weight * torch.autograd.grad(value, dial)[0]
            n += 1
    return total / n


def literal_circuit(model, task, keep):
    """The metric of each example with every edge outside ``keep`` corrupt."""
    module, graph, out = model.module, model.graph, []
    with torch.no_grad():
        for batch in task.batches:
            for i in range(len(batch)):
                length = int(batch.lengths[i])
                corrupt = literal_writes(module, batch.corrupt[i, :length], graph)
                dial = (graph.mask & ~keep).to(corrupt.dtype)
                out.append(literal_metric(module, task, batch, i, corrupt, dial))
    return torch.stack(out)
