"""Small transformers with weights set by hand, whose effects are known without running anything clever.

The stream has a place each for what queries, keys and values are made of, and one that the logits read: the metric
(logit of token 0 minus logit of token 1) is the number on that place at the last position.
"""

import torch

from circuitkit.models.native import NativeConfig, NativeTransformer
from circuitkit.models.tl_layout import native_model
from circuitkit.tasks.base import Task

QUERY, KEY, VALUE, OUT, HIDDEN = range(5)
# token: its query, key and value
TOKENS = {"A": (0, 1, 1), "B": (0, -1, -1), "ask A": (1, 0, 0), "ask B": (-1, 0, 0)}


def blank(n_layers=2, n_heads=1, d_mlp=1):
    """All weights zero but the embedding and the unembedding; fill in, then `finished`."""
    config = {
        "n_layers": n_layers, "d_model": 5, "d_head": 1, "n_heads": n_heads, "n_ctx": 4, "d_vocab": len(TOKENS),
        "d_mlp": d_mlp, "act_fn": "relu",
    }  # fmt: skip
    weights = NativeTransformer(NativeConfig.from_dict(config)).state_dict()
    weights = {name: torch.zeros(w.shape, dtype=torch.float64) for name, w in weights.items()}
    weights["embed.W_E"][:, :3] = torch.tensor(list(TOKENS.values()))
    weights["unembed.W_U"][OUT, 0] = 1.0
    return config, weights


def finished(config, weights):
    model = native_model(config, weights, name="planted", dtype=torch.float64)
    model.check()
    return model


def pairs(clean, corrupt):
    """A task of one pair of token names."""
    names = list(TOKENS)
    rows = (torch.tensor([[names.index(t) for t in side]]) for side in (clean, corrupt))
    return Task.from_tokens(*rows, torch.tensor([0]), torch.tensor([1]))


def looking_head(weights, layer=0, head=0, *, sharpness=20.0, out=OUT, gain=1.0):
    """A head that copies the value of the token asked for; the softmax is as good as a step."""
    weights[f"blocks.{layer}.attn.W_Q"][head, QUERY, 0] = sharpness
    weights[f"blocks.{layer}.attn.W_K"][head, KEY, 0] = 1.0
    weights[f"blocks.{layer}.attn.W_V"][head, VALUE, 0] = 1.0
    weights[f"blocks.{layer}.attn.W_O"][head, 0, out] = gain


def saturated(n_layers=2):
    """Clean: the head reads +1; with another query, or with its keys swapped, -1."""
    config, weights = blank(n_layers)
    looking_head(weights)
    return finished(config, weights)


def cancelling():
    """A head writes x to the logits and layer 1 takes relu(x) away again: no slope at x = 1, but -1 at x = -1."""
    config, weights = blank(2)
    looking_head(weights)
    weights["blocks.1.mlp.W_in"][OUT, 0] = 1.0
    weights["blocks.1.mlp.W_out"][0, OUT] = -1.0
    return finished(config, weights)


def dead_relu(gain=5.0):
    """Heads 0 to 2 reach the logits a little; head 3 only through a unit that is off at the clean input."""
    config, weights = blank(2, n_heads=4)
    for head, strength in enumerate((0.1, 0.2, 0.3)):
        looking_head(weights, head=head, gain=strength)
    looking_head(weights, head=3, out=HIDDEN)
    weights["blocks.1.mlp.W_in"][HIDDEN, 0] = -1.0
    weights["blocks.1.mlp.b_in"][0] = -0.5
    weights["blocks.1.mlp.W_out"][0, OUT] = -gain
    return finished(config, weights)
