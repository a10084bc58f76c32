"""The laws that a recurrent network must obey, tested by experiment when it is loaded.

1 stepper     the network run step by step gives the module's own outputs
2 rest        a second run gives the same: no state is carried over, nothing is drawn at random
3 edits       with every edge removed, the run equals the corrupt run
4 gradients   slopes at the pre-activations give the change of the outputs under a small change of the inputs
5 causality   a causal network's outputs do not depend on later inputs (whether what precedes it does is found out)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from circuitkit.errors import UnsupportedModel

if TYPE_CHECKING:
    from circuitkit.models.recurrent.model import RecurrentModel

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 0.1, torch.float16: 0.02}
STEPS = 7


def check_laws(model: RecurrentModel) -> None:
    """Test all laws.

    Raises:
        UnsupportedModel: naming the law and the gap.
    """
    try:
        with torch.no_grad(), model.quiet():
            _check(model)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedModel(
            f"{model.name} cannot be run step by step ({type(error).__name__}: {error}); its structure is not known"
        ) from error


def probe(model: RecurrentModel, seed: int, steps: int = STEPS) -> Tensor:
    """Three random inputs, without touching the global random state."""
    generator = torch.Generator().manual_seed(seed)
    if model.numbers is None:
        return torch.randint(model.d_vocab, (3, steps), generator=generator).to(model.device)
    dtype = next((p.dtype for p in model.module.parameters() if p.is_floating_point()), torch.float32)
    return torch.randn(3, steps, model.numbers, generator=generator).to(model.device, dtype)


def _check(model: RecurrentModel) -> None:
    steps = min(STEPS, model.n_ctx)
    clean, corrupt = (probe(model, seed, steps) for seed in (0, 1))
    runs = [model.record(side) for side in (clean, corrupt)]  # names the layer and step of what is not finite
    own = model.ends.forward(clean)
    again = model.ends.forward(clean)
    if not own.isfinite().all():
        raise UnsupportedModel(
            f"the outputs of {model.name} hold NaN or infinite values, the states of its recurrent layers do not: "
            "check the weights of what reads them"
        )
    if not torch.equal(own, again):
        raise UnsupportedModel(
            f"two runs of {model.name} on the same input differ by {float((own - again).abs().max()):.2g}: it carries "
            "its state over from one batch to the next, or drops out at random even in evaluation mode; "
            "reset the state in forward, and use nn.Dropout (not F.dropout with training=True)"
        )
    out = model.read_out(runs[0].inputs[1])
    out = out[:, -own.shape[1] :] if own.shape[1] == 1 else out
    _compare(model, "stepper", out, own)
    at = torch.arange(own.shape[1] if model.ends.positional else steps).expand(3, -1).to(model.device)
    at = torch.full_like(at[:, :1], steps - 1) if own.shape[1] == 1 else at
    nothing = torch.zeros(1, *model.graph.mask.shape, dtype=torch.bool)
    got = model.run_circuits(runs[0], runs[1].writes, nothing, at)[0]
    _compare(model, "edits", got, model.logits(runs[1].inputs[1], at))
    _check_gradients(model, runs[0].inputs[0], at)
    if model.causal and steps > 1:
        late = clean.clone()
        late[:, -1] = corrupt[:, -1]
        other = model.record(late)
        # What comes before the layers (a convolution, say) may look ahead; padding then changes answers.
        model.causal = torch.equal(other.inputs[0][:, :-1], runs[0].inputs[0][:, :-1])
        if model.causal:
            _compare(model, "causality", other.inputs[1][:, :-1], runs[0].inputs[1][:, :-1])


def _compare(model: RecurrentModel, law: str, got: Tensor, want: Tensor) -> None:
    if got.shape != want.shape:
        raise UnsupportedModel(
            f"{model.name} fails the law of {law}: it gives outputs {tuple(want.shape)}, its steps give "
            f"{tuple(got.shape)}"
        )
    dtype = next(model.module.parameters()).dtype
    gap = float((got - want).abs().max()) / max(1.0, float(want.abs().max()))
    if not gap <= TOLERANCE.get(dtype, 1e-6):
        raise UnsupportedModel(
            f"{model.name} fails the law of {law}: relative gap {gap:.2g}, allowed {TOLERANCE.get(dtype, 1e-6):.0e}. "
            "Results would be wrong, so it is refused; if it computes more than recurrent layers and a read-out, "
            "describe it as a cell (docs/cells.md)"
        )


def _check_gradients(model: RecurrentModel, x: Tensor, at: Tensor) -> None:
    """The input's slots see the gradient that autograd finds at the input itself."""
    if x.dtype in (torch.float16, torch.bfloat16):
        return
    from circuitkit.models.recurrent.parts import FEATURES, Weights
    from circuitkit.models.recurrent.stepper import run_network
    from circuitkit.models.recurrent.view import links_of

    def objective(logits: Tensor) -> Tensor:
        direction = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(0))
        return (logits * direction.to(logits)).sum()

    _, slopes = model.edge_slopes(model.record_of(x), x[None], at, objective)
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_(True)
        value = objective(model.logits(run_network(model.network, leaf)[FEATURES], at))
        want = torch.autograd.grad(value, leaf)[0]
    weights, got = Weights.of(model.network, x), torch.zeros_like(x)
    for block, stage, link in links_of(model.network):
        if link.source == model.network.input.name:
            slope = torch.cat([slopes[stage.slot(name)] for name in link.slots], -1)
            weight = weights.links[link]
            back = slope if weight is None else slope @ weight.T
            n = x.shape[1]
            if block.reverse:
                got[:, link.lag :] += back[:, : n - link.lag]
            else:
                got[:, : n - link.lag] += back[:, link.lag :]
    size = max(1e-6, float(want.abs().max()))
    _compare(model, "gradients", got / size, want / size)
