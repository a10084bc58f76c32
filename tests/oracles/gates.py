"""How the metric moves when a gate on one node closes, by autograd on a plain forward pass with one hook.

a_n  becomes  m a_n(clean) + (1 - m) a_n(corrupt);  the derivative is taken at m = 1, one node and example at a time.
"""

import torch


def part(block, site):
    """The module whose output is the activation, in our small transformer."""
    return {
        "head": block.attn.hook_z, "q": block.attn.hook_q, "k": block.attn.hook_k, "v": block.attn.hook_v,
        "pattern": block.attn.hook_pattern, "mlp": getattr(block, "mlp", None),
    }[site]  # fmt: skip


def hooked_run(module, tokens, at, hook):
    handle = at.register_forward_hook(hook)
    try:
        return module(tokens)
    finally:
        handle.remove()


def gate_slopes(model, task, site, nodes):
    """dM/dm of every example, layer and node: [example, layer, node]."""
    found = []
    for batch in task.batches:
        for i in range(len(batch)):
            length = int(batch.lengths[i])
            found.append(
                torch.stack(
                    [
                        torch.stack([one_gate(model, task, batch, i, length, block, site, n) for n in range(nodes)])
                        for block in model.module.blocks
                    ]
                )
            )
    return torch.stack(found)


def one_gate(model, task, batch, i, length, block, site, node):
    at, seen = part(block, site), {}
    with torch.no_grad():
        hooked_run(model.module, batch.corrupt[i : i + 1, :length], at, lambda _m, _a, y: seen.update(y=y))
    gate = torch.ones((), dtype=seen["y"].dtype, requires_grad=True)

    def close(_module, _args, y):
        axis = {"mlp": None, "pattern": 1}.get(site, 2)
        mixed = gate * y + (1 - gate) * seen["y"]
        if axis is None:
            return mixed
        chosen = torch.zeros(y.shape[axis], dtype=torch.bool)
        chosen[node] = True
        return torch.where(chosen.reshape([-1 if a == axis else 1 for a in range(y.dim())]), mixed, y)

    with torch.enable_grad():
        logits = hooked_run(model.module, batch.clean[i : i + 1, :length], at, close)
        value = task.metric(logits[0][batch.positions[i]][None], batch.rows(torch.tensor([i])))[0]
        return torch.autograd.grad(value, gate)[0]
