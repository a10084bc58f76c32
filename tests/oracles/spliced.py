"""A transformer with transcoders in which every reader, latents and errors included, has its own copy of the stream.

    x_v = sum_u (1 - dial[u, v]) a_u + dial[u, v] a_u(corrupt)        + what no writer writes (biases)

As `tests.oracles.literal`, without rotary positions; every latent and every error is one reader and one writer.
"""

import math

import torch

from circuitkit.models.native import ACTIVATIONS
from tests.oracles.literal import norm


def spliced_run(module, tokens, corrupt, dial, transcoders, replaced=False):
    """Logits [pos, vocab] and writers' outputs [src, pos, d] of one example.

    Args:
        transcoders: by layer, a transcoder and the numbers of its latents that are nodes.
        replaced: whether the transcoder's output takes the place of the MLP's.
    """
    c = module.config
    writes = [module.embed.W_E[tokens] + module.pos_embed.W_pos[: len(tokens)]]
    constant = torch.zeros_like(writes[0])
    column = 0

    def stream(n):
        nonlocal column
        x = constant.clone()
        for u in range(n):
            other = writes[u] if corrupt is None else corrupt[u]
            x = x + (1 - dial[u, column]) * writes[u] + dial[u, column] * other
        column += 1
        return x

    for layer, block in enumerate(module.blocks):
        attn, seen = block.attn, len(writes)
        parts = {}
        for slot in "qkv":
            weight, bias = attn.projection(slot)
            parts[slot] = [norm(block.ln1, stream(seen)) @ weight[i] + bias[i] for i in range(c.n_heads)]
        for h in range(c.n_heads):
            q, k, v = (parts[slot][h] for slot in "qkv")
            scores = q @ k.T / math.sqrt(c.d_head) + torch.full((len(q), len(q)), -torch.inf).to(q).triu(1)
            writes.append(scores.softmax(-1) @ v @ attn.W_O[h])
        constant = constant + attn.b_O
        mlp, act, seen = block.mlp, ACTIVATIONS[c.act_fn], len(writes)

        def whole(x, mlp=mlp, act=act):
            return act(x @ mlp.W_in + mlp.b_in) @ mlp.W_out + mlp.b_out

        if layer not in transcoders:
            writes.append(whole(norm(block.ln2, stream(seen))))
            continue
        coder, chosen = transcoders[layer]
        for i in chosen:  # its own copy each
            x = norm(block.ln2, stream(seen))
            writes.append(coder.encode(x)[:, i, None] * coder.W_dec[0, i])
        x = norm(block.ln2, stream(seen))
        target = coder(x)[:, 0] if replaced else whole(x)
        writes.append(target - sum(coder.encode(x)[:, i, None] * coder.W_dec[0, i] for i in chosen))
    return norm(module.ln_final, stream(len(writes))) @ module.unembed.W_U + module.unembed.b_U, torch.stack(writes)
