"""A small transformer of our own, for weights kept in TransformerLens's layout (compiled and toy models).

Parameter names are TransformerLens's (``blocks.0.attn.W_Q`` [head, d, d_head], ...), so a state dict loads as it is,
with any version of that library installed or none. Every tensor that wiring needs passes through a named identity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuitkit.errors import UnsupportedModel

ACTIVATIONS = {"relu": torch.relu, "silu": nn.functional.silu, "gelu": nn.functional.gelu}


@dataclass(frozen=True)
class NativeConfig:
    """The fields of a HookedTransformerConfig that the small transformer honours; anything else is refused."""

    n_layers: int
    d_model: int
    d_head: int
    n_heads: int
    n_ctx: int
    d_vocab: int
    d_vocab_out: int = -1
    d_mlp: int = 0
    act_fn: str = "relu"
    attn_only: bool = False
    gated_mlp: bool = False
    normalization_type: str | None = None
    eps: float = 1e-5
    final_rms: bool = False
    attention_dir: str = "causal"
    positional_embedding_type: str = "standard"
    rotary_dim: int = 0
    rotary_adjacent_pairs: bool = False
    n_key_value_heads: int | None = None
    default_prepend_bos: bool = True

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> NativeConfig:
        """The configuration, or UnsupportedModel naming a field or value that the small transformer does not have."""
        unknown = sorted(set(data) - set(cls.__dataclass_fields__))
        if unknown:
            raise UnsupportedModel(f"configuration fields {unknown} are not supported by the native transformer")
        config = cls(**data)
        checks = {
            "normalization_type": config.normalization_type in (None, "RMS"),
            "positional_embedding_type": config.positional_embedding_type in ("standard", "rotary"),
            "act_fn": config.act_fn in ACTIVATIONS,
            "rotary_adjacent_pairs": config.rotary_adjacent_pairs or config.positional_embedding_type != "rotary",
        }
        for field, good in checks.items():
            if not good:
                raise UnsupportedModel(
                    f"{field} = {getattr(config, field)!r} is not supported by the native transformer"
                )
        return config

    @property
    def n_kv(self) -> int:
        """Number of key/value heads."""
        return self.n_key_value_heads or self.n_heads


class Attention(nn.Module):
    """Attention with separate q, k, v and z, as identities that can be hooked."""

    def __init__(self, config: NativeConfig) -> None:
        super().__init__()
        h, g, d, e = config.n_heads, config.n_kv, config.d_model, config.d_head
        kv = "_" if g != h else ""
        self._kv_names = {slot: f"{kv}W_{slot}" for slot in "KV"} | {f"b{slot}": f"{kv}b_{slot}" for slot in "KV"}
        self.W_Q, self.b_Q = nn.Parameter(torch.zeros(h, d, e)), nn.Parameter(torch.zeros(h, e))
        for slot in "KV":
            self.register_parameter(self._kv_names[slot], nn.Parameter(torch.zeros(g, d, e)))
            self.register_parameter(self._kv_names[f"b{slot}"], nn.Parameter(torch.zeros(g, e)))
        self.W_O, self.b_O = nn.Parameter(torch.zeros(h, e, d)), nn.Parameter(torch.zeros(d))
        self.hook_q, self.hook_k, self.hook_v = nn.Identity(), nn.Identity(), nn.Identity()
        self.hook_pattern, self.hook_z = nn.Identity(), nn.Identity()
        self.config = config

    def projection(self, slot: str) -> tuple[Tensor, Tensor]:
        """Weight and bias of one slot, per (key/value) head."""
        if slot == "q":
            return self.W_Q, self.b_Q
        return getattr(self, self._kv_names[slot.upper()]), getattr(self, self._kv_names["b" + slot.upper()])

    def forward(self, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        """What all heads together add to the stream."""
        config = self.config
        q, k, v = (
            hook(torch.einsum("btd,hde->bthe", x, w) + b)
            for hook, (w, b) in zip((self.hook_q, self.hook_k, self.hook_v), map(self.projection, "qkv"), strict=True)
        )
        if config.positional_embedding_type == "rotary":
            q, k = (_rotate(t, config.rotary_dim) for t in (q, k))
        group = config.n_heads // config.n_kv
        k, v = (t.repeat_interleave(group, dim=2) for t in (k, v))
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / math.sqrt(config.d_head)
        if config.attention_dir == "causal":
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        z = self.hook_z(torch.einsum("bhqk,bkhe->bqhe", self.hook_pattern(scores.softmax(-1)), v))
        return torch.einsum("bthe,hed->btd", z, self.W_O) + self.b_O


def _rotate(x: Float[Tensor, "batch pos head d_head"], rotary_dim: int) -> Float[Tensor, "batch pos head d_head"]:
    """Rotary positions on adjacent pairs (the layout of the source model, before any permutation)."""
    half = torch.arange(0, rotary_dim, 2, dtype=torch.float64)
    angle = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-half / rotary_dim)
    cos, sin = (f(angle)[:, None, :].to(x) for f in (torch.cos, torch.sin))
    even, odd = x[..., 0:rotary_dim:2], x[..., 1:rotary_dim:2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
    return torch.cat((turned, x[..., rotary_dim:]), -1)


class MLP(nn.Module):
    """One hidden layer, gated or not."""

    def __init__(self, config: NativeConfig) -> None:
        super().__init__()
        d, m = config.d_model, config.d_mlp
        self.W_in, self.b_in = nn.Parameter(torch.zeros(d, m)), nn.Parameter(torch.zeros(m))
        if config.gated_mlp:
            self.W_gate = nn.Parameter(torch.zeros(d, m))
        self.W_out, self.b_out = nn.Parameter(torch.zeros(m, d)), nn.Parameter(torch.zeros(d))
        self.hook_in, self.hook_out = nn.Identity(), nn.Identity()
        self.hook_pre, self.hook_gate, self.hook_hidden = nn.Identity(), nn.Identity(), nn.Identity()
        self.config = config

    def forward(self, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        """What the layer adds to the stream."""
        x = self.hook_in(x)
        act = ACTIVATIONS[self.config.act_fn]
        if self.config.gated_mlp:
            hidden = act(self.hook_gate(x @ self.W_gate)) * self.hook_pre(x @ self.W_in) + self.b_in
        else:
            hidden = act(self.hook_pre(x @ self.W_in + self.b_in))
        return self.hook_out(self.hook_hidden(hidden) @ self.W_out + self.b_out)


class RMSNorm(nn.Module):
    """Root-mean-square norm with TransformerLens's parameter name."""

    def __init__(self, config: NativeConfig) -> None:
        super().__init__()
        self.w, self.eps = nn.Parameter(torch.ones(config.d_model)), config.eps

    def forward(self, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        """The normalised input."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.w


class Block(nn.Module):
    """Attention, then an MLP unless the model has none."""

    def __init__(self, config: NativeConfig) -> None:
        super().__init__()
        norm = RMSNorm if config.normalization_type == "RMS" else lambda _config: nn.Identity()
        self.ln1, self.attn = norm(config), Attention(config)
        if not config.attn_only:
            self.ln2, self.mlp = norm(config), MLP(config)
        self.hook_resid_mid = nn.Identity()

    def forward(self, x: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos d"]:
        """The stream after this block."""
        x = self.hook_resid_mid(x + self.attn(self.ln1(x)))
        return x + self.mlp(self.ln2(x)) if hasattr(self, "mlp") else x


class NativeTransformer(nn.Module):
    """Tokens to logits."""

    def __init__(self, config: NativeConfig) -> None:
        super().__init__()
        self.config = config
        self.embed, self.pos_embed, self.unembed = nn.Module(), nn.Module(), nn.Module()
        self.embed.W_E = nn.Parameter(torch.zeros(config.d_vocab, config.d_model))
        if config.positional_embedding_type == "standard":
            self.pos_embed.W_pos = nn.Parameter(torch.zeros(config.n_ctx, config.d_model))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        final = config.final_rms or config.normalization_type == "RMS"
        self.ln_final = RMSNorm(config) if final else nn.Identity()
        out = config.d_vocab if config.d_vocab_out < 0 else config.d_vocab_out
        self.unembed.W_U = nn.Parameter(torch.zeros(config.d_model, out))
        self.unembed.b_U = nn.Parameter(torch.zeros(out))

    def tail(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch vocab"]:
        """Logits from the stream after the last block."""
        return self.ln_final(x) @ self.unembed.get_parameter("W_U") + self.unembed.get_parameter("b_U")

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        """Logits at every position."""
        x = self.embed.get_parameter("W_E")[tokens]
        if self.config.positional_embedding_type == "standard":
            x = x + self.pos_embed.get_parameter("W_pos")[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.tail(x)
