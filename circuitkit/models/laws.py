"""The laws that a wiring must obey, tested by experiment on a few tokens when a model is loaded.

1 replay        blocks replayed from any layer give the module's own logits
2 writes        differences of writes add up to the difference of every stream that is read
3 projections   what readers make of the stream equals what the module computed
4 gradients     pulled-back gradients equal autograd's on a run in which every reader has its own copy of the stream
5 edits         with every edge removed, the run equals the corrupt run

A sixth is tested when MLPs are split into neurons:

6 neurons       hidden = act(gate) * pre, neuron by neuron, and hidden W_out + b_out is what the MLP writes
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from circuitkit.errors import UnsupportedModel
from circuitkit.functional.norms import at_least_float32
from circuitkit.models.circuits import run_circuits
from circuitkit.models.edits import reader_gradients
from circuitkit.models.hooked import Model, Run
from circuitkit.models.hooks import Hook, keeper
from circuitkit.models.transformer import probe_tokens
from circuitkit.models.wiring import MlpParts, Port, ReadSite

# Hugging Face's norms and softmax compute in float32 whatever the weights' dtype, hence 1e-5 in float64.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}


def check_laws(model: Model) -> None:
    """Test all laws, and find out whether the model is causal.

    Raises:
        UnsupportedModel: naming the law, the place and the relative gap.
    """
    try:
        with torch.no_grad(), model.quiet():
            _check(model)
    except (RuntimeError, TypeError) as error:
        raise UnsupportedModel(
            f"the blocks of {model.name} cannot be replayed ({type(error).__name__}: {error}); its wiring is not known"
        ) from error


def _check(model: Model) -> None:
    length = min(5, model.n_ctx)
    clean = probe_tokens(model.d_vocab, model.module)[:, :length]
    corrupt = probe_tokens(model.d_vocab, model.module, seed=1)[:, :length]
    runs = model.record(clean), model.record(corrupt)
    positions = torch.arange(length, device=clean.device).expand(len(clean), -1)
    own = _own_logits(model, clean)
    _check_replay(model, runs[0], own, positions)
    _check_writes(model, runs)
    _check_projections(model, runs[0])
    _check_gradients(model, runs[0], positions)
    _check_edits(model, runs, positions)
    model.causal = _is_causal(model, runs[0])


def _compare(law: str, place: str, got: Tensor, want: Tensor) -> None:
    limit = TOLERANCE[min((got.dtype, want.dtype), key=lambda d: d.itemsize)]
    got, want = at_least_float32(got.detach()), at_least_float32(want.detach())
    size = float(want.abs().max())
    gap = float((got - want).abs().max()) / (size if size > 1e-9 else 1.0)
    if not gap <= limit:
        raise UnsupportedModel(
            f"the wiring fails the law of {law} at {place}: relative gap {gap:.2g}, allowed {limit:.0e}. "
            "Results would be wrong, so the model is refused; please report its architecture"
        )


def _own_logits(model: Model, tokens: Tensor) -> Tensor:
    with model.quiet():
        out = model.module(tokens)
    return out if isinstance(out, Tensor) else out.logits


def _check_replay(model: Model, run: Run, own: Tensor, positions: Tensor) -> None:
    # Rows out of order and repeated: arguments that carry the batch must follow.
    rows = torch.tensor([2, 0, 0, 1], device=own.device)[: run.batch + 1] % run.batch
    for start in {0, len(model.wiring.blocks) - 1}:
        last = model.replay(run, start, run.inputs[start][rows], rows)
        _compare("replay", f"layer {start}", model.logits(last, positions[rows]), own[rows].to(last.dtype))


def _streams(model: Model, run: Run) -> dict[Port, Tensor]:
    seen: dict[Port, Tensor] = {}
    ports = {p for s in model.wiring.read_sites[:-1] for p in (s.port, s.stream)}
    hooks: list[Hook] = [(port, keeper(seen, port)) for port in ports]
    last = model.replay(run, 0, run.inputs[0], torch.arange(run.batch, device=run.inputs[0].device), hooks)
    final = model.wiring.read_sites[-1]
    return seen | {final.stream: last, final.port: last}


def _check_writes(model: Model, runs: tuple[Run, Run]) -> None:
    wiring = model.wiring
    delta = wiring.expand_difference(runs[0].writes, runs[1].writes)
    streams = [_streams(model, run) for run in runs]
    for site in wiring.read_sites:
        want = at_least_float32(streams[0][site.stream]) - at_least_float32(streams[1][site.stream])
        got = delta[model.graph.mask[:, site.first].to(delta.device)].sum(0)
        _compare("writes", _place(model, site), got.to(streams[0][site.stream].dtype), want)


def _check_projections(model: Model, run: Run) -> None:
    streams = _streams(model, run)
    for site in model.wiring.read_sites[:-1]:
        got = site.read(at_least_float32(streams[site.stream])[None].expand(site.n, -1, -1, -1))
        want = streams[site.port]
        _compare("projections", _place(model, site), got.movedim(0, 2).reshape(want.shape).to(want.dtype), want)


def _check_gradients(model: Model, run: Run, positions: Tensor) -> None:
    if next(model.module.parameters()).dtype in (torch.float16, torch.bfloat16):
        return  # rounding of narrow dtypes is larger than the differences that this law looks for

    def objective(logits: Tensor) -> Tensor:
        direction = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(0))
        return (logits * direction.to(logits)).sum()

    _, groups = reader_gradients(model, run, run.inputs[0][None], positions, objective)
    pulled = dict(_per_site(model, groups))
    for site in model.wiring.read_sites:
        want = split_reader_gradient(model, run, site, positions, objective)
        _compare("gradients", _place(model, site), pulled[site], want)


def _per_site(model: Model, groups) -> list[tuple[ReadSite, Tensor]]:  # type: ignore[no-untyped-def]
    found = []
    for columns, gradient in groups:
        for site in model.wiring.read_sites:
            if columns.start <= site.first < columns.stop:
                found.append((site, gradient[site.first - columns.start :][: site.n].clone()))
    return found


def split_reader_gradient(model: Model, run: Run, site: ReadSite, positions: Tensor, objective) -> Tensor:  # type: ignore[no-untyped-def]
    """The literal gradient: give every reader of a site its own copy of the stream and let autograd differentiate."""
    rows = torch.arange(run.batch, device=run.inputs[0].device)
    streams: dict[Port, Tensor] = {}
    x = run.inputs[0]
    copies = torch.zeros(site.n, *x.shape, device=x.device, dtype=at_least_float32(x).dtype, requires_grad=True)

    def split(y: Tensor) -> Tensor:
        private = at_least_float32(streams[site.stream]) + copies
        return site.read(private).movedim(0, 2).reshape(y.shape).to(y.dtype)

    with model.quiet(), torch.enable_grad():
        if site.block == len(model.wiring.blocks):
            last = model.replay(run, 0, x, rows) + copies[0].to(x.dtype)
        else:
            hooks: list[Hook] = [
                (site.stream, keeper(streams, site.stream)),
                (site.port, split),
            ]
            last = model.replay(run, 0, x, rows, hooks)
        return torch.autograd.grad(objective(model.logits(last, positions)), copies)[0]


def _check_edits(model: Model, runs: tuple[Run, Run], positions: Tensor) -> None:
    nothing = torch.zeros(1, *model.graph.mask.shape, dtype=torch.bool)
    got = run_circuits(model, runs[0], runs[1].writes, nothing, positions)[0]
    with torch.no_grad():
        want = model.logits(runs[1].inputs[-1], positions)
    dtype = next(model.module.parameters()).dtype
    _compare("edits", "the logits", got.to(dtype), want.to(dtype))


def check_mlps(model: Model, parts: Sequence[MlpParts]) -> None:
    """Test that MLPs are made of the parts that the wiring names: law 6.

    Raises:
        UnsupportedModel: naming the layer and the gap.
    """
    try:
        with torch.no_grad(), model.quiet():
            _check_mlps(model, parts)
    except (RuntimeError, TypeError) as error:
        raise UnsupportedModel(
            f"the MLPs of {model.name} are not made of the parts that its wiring names: {type(error).__name__}: {error}"
        ) from error


def _check_mlps(model: Model, parts: Sequence[MlpParts]) -> None:
    tokens = probe_tokens(model.d_vocab, model.module)[:, : min(5, model.n_ctx)]
    run = model.record(tokens)
    written = {s.block: s.port for s in model.wiring.write_sites}  # the last of a block is its MLP's
    ports = [p for mlp in parts for p in (mlp.pre, mlp.gate, mlp.hidden, written[mlp.block]) if p is not None]
    seen: dict[Port, Tensor] = {}
    hooks: list[Hook] = [(port, keeper(seen, port)) for port in ports]
    model.replay(run, 0, run.inputs[0], torch.arange(run.batch, device=tokens.device), hooks)
    missing = [mlp.block for mlp in parts if not {mlp.pre, mlp.hidden} <= seen.keys()]
    if missing:
        raise UnsupportedModel(f"the MLP of layer {missing[0]} does not use the parts that it seems to have")
    for mlp in parts:
        pre, hidden = seen[mlp.pre], seen[mlp.hidden]
        made = mlp.activation(pre) if mlp.gate is None else mlp.activation(seen[mlp.gate]) * pre
        # A constant of each neuron (a bias behind the product) is no part of any edge.
        got, want = (x - x[:1, :1] for x in (made, hidden))
        _compare("neurons", f"layer {mlp.block}, the hidden neurons", got, want)
        out = at_least_float32(hidden) @ at_least_float32(mlp.w_out)
        out = out if mlp.b_out is None else out + mlp.b_out
        out = out if mlp.post_norm is None else mlp.post_norm(out)
        want = seen[written[mlp.block]]
        _compare("neurons", f"layer {mlp.block}, what the MLP writes", out.to(want.dtype), want)


def _is_causal(model: Model, run: Run) -> bool:
    """Whether no position depends on a later one, tried on random streams: tokens may happen not to show it."""
    like = run.inputs[0]
    x = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)
    changed = x.clone()
    changed[:, -1] = -x[:, -1]
    rows = torch.arange(run.batch, device=x.device)
    a, b = (model.replay(run, 0, start, rows)[:, :-1] for start in (x, changed))
    return bool((a - b).abs().max() <= 1e-4 * a.abs().max()) if a.shape[1] else True


def _place(model: Model, site: ReadSite) -> str:
    return f"layer {site.block}, {model.graph.destinations[site.first]}"
