"""Tiny random models and tasks, made in milliseconds, for laws and oracles."""

from dataclasses import replace

import torch
from hypothesis import strategies as st

from circuitkit.models.native import NativeConfig
from circuitkit.models.tl_layout import native_model
from circuitkit.tasks.base import Task

SHAPES = st.fixed_dictionaries(
    {
        "n_layers": st.integers(1, 3),
        "heads": st.sampled_from([(1, 1), (2, 2), (4, 2), (2, 1)]),
        "norm": st.sampled_from([None, "RMS"]),
        "position": st.sampled_from(["standard", "rotary"]),
        "attn_only": st.booleans(),
        "gated": st.booleans(),
        "causal": st.booleans(),
        "seed": st.integers(0, 999),
    }
)


def random_model(shape=None, *, linear=False, dtype=torch.float64, **changes):
    """A native transformer with random weights; ``linear`` makes every path from an edge to the logits linear."""
    shape = {
        "n_layers": 2, "heads": (2, 2), "norm": "RMS", "position": "standard", "attn_only": False, "gated": False,
        "causal": True, "seed": 0, "scale": 0.6,
    } | (shape or {}) | changes  # fmt: skip
    if linear:
        shape |= {"norm": None, "attn_only": True, "position": "standard"}
    heads, kv = shape["heads"]
    config = {
        "n_layers": shape["n_layers"], "d_model": 8, "d_head": 4, "n_heads": heads, "n_ctx": 12, "d_vocab": 11,
        "d_mlp": 10, "act_fn": "silu", "attn_only": shape["attn_only"], "gated_mlp": shape["gated"],
        "normalization_type": shape["norm"], "attention_dir": "causal" if shape["causal"] else "bidirectional",
        "positional_embedding_type": shape["position"], "rotary_dim": 4 if shape["position"] == "rotary" else 0,
        "rotary_adjacent_pairs": shape["position"] == "rotary", "n_key_value_heads": kv if kv != heads else None,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(shape["seed"])
    from circuitkit.models.native import NativeTransformer

    blank = NativeTransformer(NativeConfig.from_dict(config)).state_dict()
    weights = {
        k: torch.randn(v.shape, generator=generator) * (shape["scale"] if v.dim() > 1 else 0.1)
        for k, v in blank.items()
    }
    for name in weights:
        if name.endswith((".w",)):
            weights[name] = 1 + 0.2 * weights[name]
        if linear and name.endswith(("W_Q", "W_K", "b_Q", "b_K", "_W_K", "_b_K")):
            weights[name] = torch.zeros_like(weights[name])
    model = native_model(config, weights, name="random")
    model.module.to(dtype)
    model.check()
    return model


def random_task(model, *, n=4, length=6, seed=0, metric="logit-diff", same=False, lengths=None):
    """Random pairs, right and wrong answers."""
    generator = torch.Generator().manual_seed(seed)
    clean, corrupt = torch.randint(model.d_vocab, (2, n, length), generator=generator)
    right = torch.randint(model.d_vocab, (n,), generator=generator)
    wrong = (right + torch.randint(1, model.d_vocab, (n,), generator=generator)) % model.d_vocab
    task = Task.from_tokens(clean, corrupt, right, wrong, lengths=lengths, metric=metric)
    if same:
        task = replace(task, batches=tuple(replace(b, corrupt=b.clean) for b in task.batches))
    return task
