"""Wiring of models whose parts carry TransformerLens's names: our small transformer, and HookedTransformer (3.9)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from circuitkit.errors import UnsupportedModel
from circuitkit.functional.norms import Norm
from circuitkit.models.hooked import Model
from circuitkit.models.native import ACTIVATIONS, NativeConfig, NativeTransformer
from circuitkit.models.wiring import MlpParts, Port, ReadSite, Wiring, WriteSite, transformer_graph


def native_model(
    config: dict[str, Any],
    weights: dict[str, Tensor],
    *,
    name: str,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    **about: Any,
) -> Model:
    """A `Model` from a HookedTransformerConfig as a dict and a state dict in that layout.

    Raises:
        UnsupportedModel: if the configuration is not covered, or weights are missing or of another shape.
    """
    module = NativeTransformer(NativeConfig.from_dict(config)).eval()
    buffers = ("mask", "IGNORE", "rotary_sin", "rotary_cos")
    weights = {k: v for k, v in weights.items() if not k.endswith(buffers)}
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise UnsupportedModel(f"the weights of {name} do not fit its configuration: {error}") from error
    module.to(device=device, dtype=dtype)
    c = module.config
    wiring = _wire(module, (c.n_layers, c.n_heads, c.n_kv, c.d_head), not c.attn_only, module.tail)
    return Model(module, wiring, forward=_call, name=name, d_vocab=c.d_vocab, n_ctx=c.n_ctx, **about)


def hooked_transformer_model(module: Any, *, name: str | None = None, **about: Any) -> Model:
    """A `Model` around a user's HookedTransformer; no flag of it is changed.

    Raises:
        UnsupportedModel: for parallel blocks, mixtures of experts or post-norms, which load better as a bridge.
    """
    c = module.cfg
    refused = {
        "parallel_attn_mlp": c.parallel_attn_mlp,
        "num_experts": c.num_experts,
        "use_normalization_before_and_after": getattr(c, "use_normalization_before_and_after", False),
    }
    for field, value in refused.items():
        if value:
            raise UnsupportedModel(
                f"a HookedTransformer with {field} = {value} is not wired; pass the Hugging Face module instead"
            )

    def tail(x: Tensor) -> Tensor:
        logits = module.unembed(module.ln_final(x)) if hasattr(module, "ln_final") else module.unembed(x)
        cap = c.output_logits_soft_cap
        return cap * torch.tanh(logits / cap) if cap and cap > 0 else logits

    n_kv = c.n_key_value_heads or c.n_heads
    wiring = _wire(module, (c.n_layers, c.n_heads, n_kv, c.d_head), not c.attn_only, tail)
    about.setdefault("tokenizer", module.tokenizer)
    return Model(module, wiring, forward=_call, name=name or c.model_name, d_vocab=c.d_vocab, n_ctx=c.n_ctx, **about)


def _call(module: nn.Module, tokens: Tensor) -> None:
    module(tokens)


def _wire(module: Any, sizes: tuple[int, int, int, int], has_mlp: bool, tail: Any) -> Wiring:
    n_layers, n_heads, n_kv, d_head = sizes
    graph = transformer_graph(n_layers, n_heads, n_kv, mlp=has_mlp)
    writes = [WriteSite(0, 1, -1, Port(module.blocks[0], "in"))]
    reads: list[ReadSite] = []
    for i, block in enumerate(module.blocks):
        attn, here = block.attn, Port(block, "in")
        norm = _norm(block.ln1)
        for slot, n in (("q", n_heads), ("k", n_kv), ("v", n_kv)):
            weight, bias = _projection(attn, slot, n != n_heads)
            first = reads[-1].columns.stop if reads else 0
            reads.append(ReadSite(first, n, i, Port(getattr(attn, f"hook_{slot}")), here, weight, bias, norm))
        writes.append(
            WriteSite(writes[-1].rows.stop, n_heads, i, Port(attn.hook_z), attn.W_O.view(n_heads, d_head, -1), attn.b_O)
        )
        if has_mlp:
            stream = Port(block.hook_resid_mid)
            reads.append(ReadSite(reads[-1].columns.stop, 1, i, Port(block.mlp, "in"), stream, norm=_norm(block.ln2)))
            writes.append(WriteSite(writes[-1].rows.stop, 1, i, Port(block.mlp)))
    final = Port(module.ln_final if hasattr(module, "ln_final") else module.unembed, "in")
    reads.append(ReadSite(reads[-1].columns.stop, 1, n_layers, final, final))
    patterns = tuple(Port(block.attn.hook_pattern) for block in module.blocks)
    normed = Port(module.ln_final) if hasattr(module, "ln_final") else None
    return Wiring(
        graph, tuple(module.blocks), tuple(writes), tuple(reads), tail, final, patterns,
        mlps=_mlps(module) if has_mlp else (), normed=normed,
        final_norm=None if normed is None else _norm(module.ln_final),
    )  # fmt: skip


def _mlps(module: Any) -> tuple[MlpParts, ...]:
    """The inside of each MLP, of our small transformer and of a HookedTransformer."""
    found: list[MlpParts] = []
    for i, mlp in enumerate(block.mlp for block in module.blocks):
        gated = hasattr(mlp, "W_gate")
        if hasattr(mlp, "hook_hidden"):
            ports = Port(mlp.hook_pre), Port(mlp.hook_gate) if gated else None, Port(mlp.hook_hidden)
            act = ACTIVATIONS[mlp.config.act_fn]
        elif mlp.cfg.act_fn in ("gelu_ln", "solu_ln"):
            return ()  # a norm inside the nonlinearity
        else:
            pre, gate = (mlp.hook_pre_linear, mlp.hook_pre) if gated else (mlp.hook_pre, None)
            ports = Port(pre), None if gate is None else Port(gate), Port(mlp.hook_post)
            act = mlp.act_fn
        # A gated MLP in this layout adds b_in after the product, so it is not in what the projection gives.
        bias, w_gate = (None, mlp.W_gate) if gated else (mlp.b_in, None)
        found.append(MlpParts(i, *ports, mlp.W_in, bias, w_gate, None, mlp.W_out, mlp.b_out, act))
    return tuple(found)


def _projection(attn: Any, slot: str, grouped: bool) -> tuple[Tensor, Tensor]:
    if hasattr(attn, "projection"):
        return attn.projection(slot)
    under = "_" if grouped else ""
    return getattr(attn, f"{under}W_{slot.upper()}"), getattr(attn, f"{under}b_{slot.upper()}")


def _norm(module: Any) -> Norm | None:
    """The norm as data; folded norms (``LayerNormPre``) have no parameters."""
    if isinstance(module, nn.Identity):
        return None
    center = type(module).__name__.startswith("LayerNorm")
    return Norm(center, float(module.eps), getattr(module, "w", None), getattr(module, "b", None))
