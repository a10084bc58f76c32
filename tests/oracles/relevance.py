"""Relevance patching by the book: a literal transformer that detaches what the rules hold fixed.

As `tests.oracles.literal`, with a dial per edge and every reader's own stream; only the backward pass differs. One
example at a time, on a `NativeTransformer`, and (for norms that it has not) on modules of transformers themselves.
"""

import math

import torch

from circuitkit.models.native import ACTIVATIONS
from tests.oracles.literal import literal_writes, rotate


def ruled_norm(module, x, frozen):
    if not hasattr(module, "w"):
        return x
    scale = 1 / (x.pow(2).mean(-1, keepdim=True) + module.eps).sqrt()
    return x * (scale.detach() if frozen else scale) * module.w


def ruled_act(act, x, straight):
    return x * (act(x) / x).detach() if straight else act(x)


def halved(x, half):
    return x / 2 + x.detach() / 2 if half else x


def ruled_run(module, tokens, corrupt, dial, *, norm, activation, half, pattern):
    """Logits [pos, vocab] of one example; dials and rules as in the docstring of `literal_run`."""
    c = module.config
    x0 = module.embed.W_E[tokens]
    if c.positional_embedding_type == "standard":
        x0 = x0 + module.pos_embed.W_pos[: len(tokens)]
    writes, constant, columns = [x0], torch.zeros_like(x0), iter(range(dial.shape[1]))

    def stream(n):
        v = next(columns)
        return constant + sum((1 - dial[u, v]) * writes[u] + dial[u, v] * corrupt[u] for u in range(n))

    for block in module.blocks:
        seen, parts = len(writes), {}
        for slot, n in (("q", c.n_heads), ("k", c.n_kv), ("v", c.n_kv)):
            w, b = block.attn.projection(slot)
            parts[slot] = [ruled_norm(block.ln1, stream(seen), norm) @ w[i] + b[i] for i in range(n)]
        for h in range(c.n_heads):
            g = h * c.n_kv // c.n_heads
            q, k, v = parts["q"][h], parts["k"][g], parts["v"][g]
            if c.positional_embedding_type == "rotary":
                q, k = rotate(q, c.rotary_dim), rotate(k, c.rotary_dim)
            scores = q @ k.T / math.sqrt(c.d_head)
            if c.attention_dir == "causal":
                scores = scores + torch.full_like(scores, -torch.inf).triu(1)
            weights = scores.softmax(-1)
            writes.append((weights.detach() if pattern else weights) @ v @ block.attn.W_O[h])
        constant = constant + block.attn.b_O
        if hasattr(block, "mlp"):
            mlp, x, act = block.mlp, ruled_norm(block.ln2, stream(len(writes)), norm), ACTIVATIONS[c.act_fn]
            if c.gated_mlp:
                hidden = halved(ruled_act(act, x @ mlp.W_gate, activation) * (x @ mlp.W_in), half) + mlp.b_in
            else:
                hidden = ruled_act(act, x @ mlp.W_in + mlp.b_in, activation)
            writes.append(hidden @ mlp.W_out + mlp.b_out)
    return ruled_norm(module.ln_final, stream(len(writes)), norm) @ module.unembed.W_U + module.unembed.b_U


def literal_relevance(model, task, **rules):
    """Minus the derivative of the metric with respect to the dials, by the rules: mean over examples."""
    module, graph = model.module, model.graph
    total, n = torch.zeros(graph.mask.shape, dtype=torch.float64), 0
    for batch in task.batches:
        for i in range(len(batch)):
            length = int(batch.lengths[i])
            corrupt = literal_writes(module, batch.corrupt[i, :length], graph)
            dial = torch.zeros(graph.mask.shape, dtype=corrupt.dtype, requires_grad=True)
            logits = ruled_run(module, batch.clean[i, :length], corrupt, dial, **rules)
            value = task.metric(logits[batch.positions[i]][None], batch.rows(torch.tensor([i])))[0]
            total -= torch.autograd.grad(value, dial)[0]
            n += 1
    return total / n


def ruled_input_gradient(module, layers, tokens, objective):
    """Gradient at the stream before the first layer of a transformers module whose parts are replaced by ruled ones."""
    seen = {}

    def frozen(norm):
        gain = 1 + norm.weight if "Gemma" in type(norm).__name__ else norm.weight
        eps = getattr(norm, "eps", None) or norm.variance_epsilon
        return lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps).detach() * gain

    for part in module.modules():
        if type(part).__name__.endswith("RMSNorm"):
            part.forward = frozen(part)
        if hasattr(part, "act_fn"):
            act = part.act_fn
            part._modules.pop("act_fn", None)
            part.act_fn = lambda x, act=act: ruled_act(act, x, True)
            part.down_proj.register_forward_pre_hook(lambda _m, args: (halved(args[0], True),))

    def leaf(_module, args, kwargs):
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        seen["x"] = x.detach().requires_grad_(True)
        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": seen["x"]}
        return (seen["x"], *args[1:]), kwargs

    layers[0].register_forward_pre_hook(leaf, with_kwargs=True)
    value = objective(module(tokens, use_cache=False).logits)
    return torch.autograd.grad(value, seen["x"])[0]
