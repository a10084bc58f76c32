"""Transformers through TransformerLens's bridge, which names the parts of Hugging Face models.

What the bridge does not say (which norm precedes a read, whether attention and MLP run in parallel, whether a gain is
stored as weight or 1 + weight) is found by experiment on a few tokens, then tested again by the load laws.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from circuitkit.errors import UnsupportedModel
from circuitkit.functional.norms import Norm, at_least_float32
from circuitkit.models.hooked import Model
from circuitkit.models.hooks import Hook, hooked, keeper, quiet
from circuitkit.models.wiring import MlpParts, Port, ReadSite, Wiring, WriteSite, transformer_graph


def module_model(module: nn.Module, *, name: str | None = None, copy_structure: bool = True, **about: Any) -> Model:
    """A `Model` around a causal language model of transformers that is already in memory.

    The bridge renames submodules in place, so it gets a copy of the module tree that shares every weight with yours.

    Raises:
        UnsupportedModel: if it is not a transformers model that the bridge knows.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "model_type"):
        raise UnsupportedModel(
            f"got a {type(module).__name__}, expected a causal language model of transformers, a TransformerBridge, a "
            "HookedTransformer, a zoo name, a folder or a hub id"
        )
    if copy_structure:
        shared = {id(t): t for t in (*module.parameters(), *module.buffers())}
        module = copy.deepcopy(module, shared)
        module.config._attn_implementation = "eager"  # type: ignore[union-attr]
    try:
        bridge = build_bridge_from_module(module, type(module).__name__, hf_config=module.config)
    except Exception as error:
        raise UnsupportedModel(f"TransformerLens has no bridge for {type(module).__name__}: {error}") from error
    return bridge_model(bridge, name=name or type(module).__name__, **about)


def bridge_model(bridge: Any, *, name: str | None = None, **about: Any) -> Model:
    """A `Model` around a TransformerBridge.

    Raises:
        UnsupportedModel: if a layer has no separate q, k and v, or a part cannot be reproduced from what it reads.
    """
    cfg = bridge.cfg
    if not hasattr(bridge, "blocks") or not hasattr(bridge, "unembed"):
        raise UnsupportedModel(f"{cfg.architecture} is not a decoder with one list of blocks; only those are wired")
    for i, block in enumerate(bridge.blocks):
        missing = [part for part in "qkvo" if not hasattr(getattr(block, "attn", None), part)]
        if missing or not hasattr(block, "mlp"):
            raise UnsupportedModel(
                f"layer {i} of {cfg.architecture} has no separate {', '.join(missing) or 'mlp'}; "
                "only attention and MLP blocks are wired"
            )
    try:
        wiring = _wire(bridge)
    except (KeyError, RuntimeError, AttributeError, TypeError) as error:
        raise UnsupportedModel(
            f"{cfg.architecture} has parts that could not be found or do not fit ({type(error).__name__}: {error}); "
            "its wiring is not known"
        ) from error
    about.setdefault("tokenizer", getattr(bridge, "tokenizer", None))
    return Model(
        bridge, wiring, forward=_call, name=name or cfg.model_name or cfg.architecture,
        d_vocab=int(bridge.unembed.original_component.weight.shape[0]), n_ctx=int(cfg.n_ctx), **about,
    )  # fmt: skip


def _call(bridge: nn.Module, tokens: Tensor) -> None:
    bridge(tokens, use_cache=False, return_type="logits")


def _wire(bridge: Any) -> Wiring:
    cfg, n_layers = bridge.cfg, len(bridge.blocks)
    n_heads, d_head = int(cfg.n_heads), int(cfg.d_head)
    n_kv = int(getattr(cfg, "n_key_value_heads", None) or n_heads)
    seen = _probe(bridge)
    reads: list[ReadSite] = []
    writes = [WriteSite(0, 1, -1, Port(bridge.blocks[0], "in"))]
    parallel = [_is_parallel(block, seen) for block in bridge.blocks]
    if len(set(parallel)) > 1:
        raise UnsupportedModel("some layers run attention and MLP in parallel and some do not; that is not wired")
    for i, block in enumerate(bridge.blocks):
        here = Port(block, "in")
        for slot, n in (("q", n_heads), ("k", n_kv), ("v", n_kv)):
            linear = getattr(block.attn, slot)
            weight, bias = _per_head(linear.original_component, n, d_head, i, slot)
            norm = _norm_before(block, seen, seen[here.module], seen[linear.hook_in], i, slot)
            first = reads[-1].columns.stop if reads else 0
            reads.append(ReadSite(first, n, i, Port(linear.hook_out), here, weight, bias, norm))
        out = _out_projection(block.attn.o.original_component, n_heads, d_head)
        post = _find_norm(block.ln1_post, seen, i) if hasattr(block, "ln1_post") else None
        writes.append(WriteSite(writes[-1].rows.stop, n_heads, i, Port(block.attn.o.hook_in), *out, post))
        stream, norm = _mlp_input(block, seen, parallel[i], i)
        reads.append(ReadSite(reads[-1].columns.stop, 1, i, Port(block.mlp.hook_in), stream, norm=norm))
        written = block.ln2_post if hasattr(block, "ln2_post") else block.mlp
        writes.append(WriteSite(writes[-1].rows.stop, 1, i, Port(written.hook_out)))
    final = Port(bridge.ln_final.hook_in)
    reads.append(ReadSite(reads[-1].columns.stop, 1, n_layers, final, final))
    graph = transformer_graph(n_layers, n_heads, n_kv, parallel=parallel[0])
    patterns = tuple(Port(b.attn.hook_pattern) for b in bridge.blocks if hasattr(b.attn, "hook_pattern"))
    return Wiring(
        graph, tuple(bridge.blocks), tuple(writes), tuple(reads), _tail(bridge), final, patterns,
        mlps=_mlps(bridge, seen), final_norm=_find_norm(bridge.ln_final, seen, n_layers, required=False),
        normed=Port(bridge.ln_final), inner_norms=_inner_norms(bridge, seen),
    )  # fmt: skip


def _inner_norms(bridge: Any, seen: dict[nn.Module, Tensor]) -> tuple[tuple[Norm | None, Port], ...]:
    """Norms after attention and MLP, and of queries and keys."""
    found: list[tuple[Norm | None, Port]] = []
    for i, block in enumerate(bridge.blocks):
        parts = ((block, "ln1_post"), (block, "ln2_post"), (block.attn, "q_norm"), (block.attn, "k_norm"))
        for module in (getattr(*part, None) for part in parts):
            if module is not None:
                found.append((_find_norm(module, seen, i, required=False), Port(module)))
    return tuple(found)


def _mlps(bridge: Any, seen: dict[nn.Module, Tensor]) -> tuple[MlpParts, ...]:
    """The inside of each MLP; () if a block's has other parts than two or three projections (a mixture of experts)."""
    found: list[MlpParts] = []
    for i, block in enumerate(bridge.blocks):
        up, down, gate = (getattr(block.mlp, name, None) for name in ("in", "out", "gate"))
        inner = block.mlp.original_component
        act = next((getattr(inner, n) for n in ("act", "act_fn", "activation_fn") if hasattr(inner, n)), None)
        if up is None or down is None or act is None:
            return ()
        into, out = up.original_component, down.original_component
        gated = None if gate is None else gate.original_component
        post = _find_norm(block.ln2_post, seen, i) if hasattr(block, "ln2_post") else None
        found.append(
            MlpParts(
                i, Port(up.hook_out), None if gate is None else Port(gate.hook_out), Port(down.hook_in),
                _matrix(into), into.bias, None if gated is None else _matrix(gated),
                None if gated is None else gated.bias, _matrix(out), out.bias, act, post,
            )
        )  # fmt: skip
    return tuple(found)


def _tail(bridge: Any) -> Callable[[Tensor], Tensor]:
    config = getattr(bridge.original_model, "config", None)
    cap = getattr(config, "final_logit_softcapping", None)

    def tail(x: Tensor) -> Tensor:
        logits = bridge.unembed(bridge.ln_final(x))
        return cap * torch.tanh(logits / cap) if cap else logits

    return tail


@torch.no_grad()
def _probe(bridge: Any) -> dict[nn.Module, Tensor]:
    """What passes every hook point (and enters every block) on a few tokens."""
    seen: dict[nn.Module, Tensor] = {}

    hooks: list[Hook] = [(Port(block, "in"), keeper(seen, block)) for block in bridge.blocks]
    for module in bridge.modules():
        if type(module).__name__ == "HookPoint":
            hooks.append((Port(module), keeper(seen, module)))
    with quiet(bridge), hooked(hooks):
        _call(bridge, probe_tokens(int(bridge.unembed.original_component.weight.shape[0]), bridge))
    return seen


def probe_tokens(d_vocab: int, module: nn.Module, *, seed: int = 0) -> Tensor:
    """Three rows of five token ids for experiments at load, without touching the global random state."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(d_vocab, (3, 5), generator=generator).to(next(module.parameters()).device)


def _per_head(linear: nn.Module, n: int, width: int, layer: int, slot: str) -> tuple[Tensor, Tensor | None]:
    weight, bias = _matrix(linear), getattr(linear, "bias", None)
    if weight.shape[1] != n * width:
        raise UnsupportedModel(
            f"layer {layer}: {slot} is {weight.shape[1]} wide, expected {n} heads of {width}; head counts differ"
        )
    per_head = weight.unflatten(1, (n, width)).transpose(0, 1)
    return per_head, None if bias is None else bias.unflatten(0, (n, width))


def _out_projection(linear: nn.Module, n: int, width: int) -> tuple[Tensor, Tensor | None]:
    return _matrix(linear).unflatten(0, (n, width)), getattr(linear, "bias", None)


def _matrix(linear: Any) -> Tensor:
    """Weight as [in, out], without a copy; GPT-2's Conv1D already stores it so."""
    return linear.weight if type(linear).__name__ == "Conv1D" else linear.weight.T


def _mlp_input(block: Any, seen: dict[nn.Module, Tensor], parallel: bool, layer: int) -> tuple[Port, Norm | None]:
    if parallel:
        here = Port(block, "in")
    else:
        has_norm = getattr(block, "ln2", None) is not None and block.ln2.hook_in in seen
        here = Port(block.ln2.hook_in if has_norm else block.mlp.hook_in)
    return here, _norm_before(block, seen, seen[here.module], seen[block.mlp.hook_in], layer, "mlp")


def _is_parallel(block: Any, seen: dict[nn.Module, Tensor]) -> bool:
    """Whether the MLP reads the same stream as attention."""
    norms = [n for n in (getattr(block, "ln2", None), getattr(block, "ln1", None)) if n is not None]
    want = seen[block.mlp.hook_in]
    for module in norms:
        norm = _find_norm(module, seen, -1, required=False)
        if norm is not None and _close(norm(seen[block]), want):
            return True
    return False


def _norm_before(
    block: Any, seen: dict[nn.Module, Tensor], x: Tensor, want: Tensor, layer: int, what: str
) -> Norm | None:
    """The norm that turns the stream into what a part was given; None if it reads the stream itself."""
    if _close(x, want):
        return None
    for name in ("ln1", "ln2"):
        module = getattr(block, name, None)
        norm = None if module is None else _find_norm(module, seen, layer, required=False)
        if norm is not None and _close(norm(x), want):
            return norm
    raise UnsupportedModel(f"layer {layer}: no norm of the block turns the stream into what {what} reads")


def _find_norm(bridge_norm: Any, seen: dict[nn.Module, Tensor], layer: int, *, required: bool = True) -> Norm | None:
    """A norm module as data: the form that reproduces what the module does."""
    inner = bridge_norm.original_component
    eps = next((float(getattr(inner, n)) for n in ("eps", "variance_epsilon", "epsilon") if hasattr(inner, n)), 1e-6)
    weight, bias = getattr(inner, "weight", None), getattr(inner, "bias", None)
    x = next((seen[p] for p in (getattr(bridge_norm, "hook_in", None),) if p in seen), None)
    x = next(iter(seen.values())) if x is None else x
    with torch.no_grad():
        want = inner(x)
    for center, unit in ((True, False), (False, False), (False, True)):
        norm = Norm(center, eps, weight, bias, unit)
        if _close(norm(x), want):
            return norm
    if required:
        raise UnsupportedModel(
            f"layer {layer}: {type(inner).__name__} is neither a layer norm nor a root-mean-square norm"
        )
    return None


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding of the narrower dtype, relative to the largest entry."""
    if a.shape != b.shape:
        return False
    tolerance = 1e-4 if min(a.dtype.itemsize, b.dtype.itemsize) >= 4 else 3e-2
    a, b = at_least_float32(a), at_least_float32(b)
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-6))
