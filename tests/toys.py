"""Tiny random models and tasks, made in milliseconds, for laws and oracles."""

from dataclasses import replace

from hypothesis import strategies as st

from circuitkit.testing import tiny_model, tiny_task

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


def random_model(shape=None, *, linear=False, **changes):
    """A tiny random transformer; ``linear`` makes every path from an edge to the logits linear."""
    shape = {
        "n_layers": 2, "heads": (2, 2), "norm": "RMS", "position": "standard", "attn_only": False, "gated": False,
        "causal": True, "seed": 0, "scale": 0.6,
    } | (shape or {}) | changes  # fmt: skip
    if linear:
        shape |= {"norm": None, "attn_only": True, "position": "standard"}
    heads, kv = shape["heads"]
    rotary = shape["position"] == "rotary"
    model = tiny_model(
        seed=shape["seed"], scale=shape["scale"], n_layers=shape["n_layers"], n_heads=heads,
        n_key_value_heads=kv if kv != heads else None, attn_only=shape["attn_only"], gated_mlp=shape["gated"],
        normalization_type=shape["norm"], attention_dir="causal" if shape["causal"] else "bidirectional",
        positional_embedding_type=shape["position"], rotary_dim=4 if rotary else 0, rotary_adjacent_pairs=rotary,
    )  # fmt: skip
    if linear:
        for block in model.module.blocks:  # uniform attention: no query or key
            for name, parameter in block.attn.named_parameters():
                if name.lstrip("_") in ("W_Q", "W_K", "b_Q", "b_K"):
                    parameter.data.zero_()
    return model


def random_task(model, *, metric="logit-diff", same=False, **options):
    """Random pairs, right and wrong answers; ``same`` makes both sides of every pair equal."""
    task = tiny_task(model, metric=metric, **options)
    if same:
        task = replace(task, batches=tuple(replace(b, corrupt=b.clean) for b in task.batches))
    return task
