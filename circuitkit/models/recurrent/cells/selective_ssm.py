"""A selective state space layer, as in Mamba (Gu and Dao 2023, arXiv:2312.00752), with that paper's parameter names.

x, z = in_proj(input)                             z is a slot of the gate, x a write
u(t) = silu(sum_k w_k x(t-k) + b)                 a slot per tap of the causal depthwise convolution
dt, B, C = x_proj(u)                              dt of low rank, a write
delta = softplus(dt_proj(dt))                     A = -exp(A_log)
h(t) = exp(delta A) h(t-1) + delta u B            [channel, state]; one writer per channel
g(t) = (C h(t) + D u) * silu(z)
y(t) = out_proj(g)
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from circuitkit.models.recurrent.cells.base import Described, Place, cell
from circuitkit.models.recurrent.cells.inputs import constant, input_links, linear_block, outer, rows_times
from circuitkit.models.recurrent.parts import Block, Link, See, Slot, Stage, Write


class SelectiveSSM(nn.Module):
    """A selective state space layer; the recurrence is a plain loop.

    Args:
        input_size: numbers read, and given, at each step.
        inner_size: channels.
        state_size: numbers of state per channel.
        dt_rank: rank of what sets the step sizes.
        taps: width of the convolution, in steps.

    >>> SelectiveSSM(3, inner_size=4, state_size=2)(torch.zeros(2, 5, 3)).shape
    torch.Size([2, 5, 3])
    """

    def __init__(self, input_size: int, inner_size: int, state_size: int = 16, dt_rank: int = 1, taps: int = 4):
        super().__init__()
        self.input_size, self.inner_size, self.state_size = input_size, inner_size, state_size
        self.dt_rank, self.taps = dt_rank, taps
        self.in_proj = nn.Linear(input_size, 2 * inner_size, bias=False)
        self.conv1d = nn.Conv1d(inner_size, inner_size, taps, groups=inner_size, padding=taps - 1)
        self.x_proj = nn.Linear(inner_size, dt_rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(dt_rank, inner_size)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, state_size + 1)).repeat(inner_size, 1))
        self.D = nn.Parameter(torch.ones(inner_size))
        self.out_proj = nn.Linear(inner_size, input_size, bias=False)

    def forward(self, inputs: Float[Tensor, "batch step input"]) -> Float[Tensor, "batch step input"]:
        """Outputs at every step, from a state of zeros."""
        x, z = self.in_proj(inputs).chunk(2, -1)
        u = silu(self.conv1d(x.mT)[..., : inputs.shape[1]].mT)
        dt, B, C = self.x_proj(u).split((self.dt_rank, self.state_size, self.state_size), -1)
        delta, A = softplus(self.dt_proj(dt)), -torch.exp(self.A_log)
        h = x.new_zeros(len(x), self.inner_size, self.state_size)
        outputs = []
        for t in range(inputs.shape[1]):
            h = torch.exp(delta[:, t, :, None] * A) * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None, :]
            outputs.append((h * C[:, t, None, :]).sum(-1) + self.D * u[:, t])
        return self.out_proj(torch.stack(outputs, 1) * silu(z))  # type: ignore[no-any-return]


def _convolve(module: SelectiveSSM, name: str, pre: Mapping[str, Tensor], see: See) -> dict[str, Tensor]:
    # torch's convolution is a correlation: its last weight belongs to the step itself.
    weight = constant(module.conv1d.weight[:, 0].flip(1), pre["tap0"])
    total = constant(module.conv1d.bias, pre["tap0"])  # type: ignore[arg-type]
    for lag in range(module.taps):
        total = total + weight[:, lag] * pre[f"tap{lag}"]
    return {name: see("u", silu(see("conv", total)))}


def _recur(module: SelectiveSSM, name: str, pre: Mapping[str, Tensor], see: See) -> dict[str, Tensor]:
    delta = see("delta", softplus(pre["delta"]))
    A = constant(-torch.exp(module.A_log), delta)
    a_bar = see("a_bar", torch.exp(delta[..., None] * A).flatten(-2))
    kept, new = see("kept", a_bar * pre["carry"]), see("new", outer(delta * pre["value"], pre["B"]))
    return {name: see("h", kept + new)}


def _gate(module: SelectiveSSM, name: str, pre: Mapping[str, Tensor], see: See) -> dict[str, Tensor]:
    read = see("read", rows_times(pre["memory"], pre["C"]))
    gate = see("gate", silu(pre["z"]))
    return {name: see("g", (read + constant(module.D, read) * pre["skip"]) * gate)}


def _convolution(module: SelectiveSSM, x: Write, u: Write) -> Stage:
    taps = tuple(f"tap{lag}" for lag in range(module.taps))
    return Stage(
        tuple(Slot(tap, u.n, feeds=(u.name,)) for tap in taps),
        (u,),
        tuple(Link(x.name, (tap,), lag=lag) for lag, tap in enumerate(taps)),
        partial(_convolve, module, u.name),
        (*(f"{tap}_pre" for tap in taps), "conv", "u"),
    )


def _recurrence(module: SelectiveSSM, u: Write, dt: Write, h: Write) -> Stage:
    rank, d = module.dt_rank, module.state_size
    return Stage(
        (
            Slot("delta", h.n, feeds=(h.name,), bias=lambda: module.dt_proj.bias),
            Slot("B", d, feeds_all=(h.name,)),
            Slot("value", h.n, feeds=(h.name,)),
            Slot("carry", h.n, d, feeds=(h.name,)),
        ),
        (h,),
        (
            Link(dt.name, ("delta",), lambda: module.dt_proj.weight),
            Link(u.name, ("B",), lambda: module.x_proj.weight[rank : rank + d]),
            Link(u.name, ("value",)),
            Link(h.name, ("carry",), lag=1),
        ),
        partial(_recur, module, h.name),
        ("delta_pre", "B_pre", "value_pre", "carry_pre", "delta", "a_bar", "kept", "new", "h"),
    )


def _reading(module: SelectiveSSM, place: Place, u: Write, h: Write, g: Write) -> Stage:
    rank, d, n = module.dt_rank, module.state_size, module.inner_size
    return Stage(
        (
            Slot("memory", n, d, feeds=(g.name,)),
            Slot("C", d, feeds_all=(g.name,)),
            Slot("skip", n, feeds=(g.name,)),
            Slot("z", n, feeds=(g.name,)),
        ),
        (g,),
        (
            Link(h.name, ("memory",)),
            Link(u.name, ("C",), lambda: module.x_proj.weight[rank + d :]),
            Link(u.name, ("skip",)),
            *input_links(place, ("z",), lambda: module.in_proj.weight[n:]),
        ),
        partial(_gate, module, g.name),
        ("memory_pre", "C_pre", "skip_pre", "z_pre", "read", "gate", "g"),
    )


@cell(SelectiveSSM, example=lambda: SelectiveSSM(3, inner_size=4, state_size=2, dt_rank=2))
def selective_ssm(module: SelectiveSSM, place: Place) -> Described:
    """Six blocks: in-projection, convolution, step sizes, recurrence, gated read-out, out-projection."""
    n, stem = module.inner_size, place.stem()
    u, h, g = Write(f"{stem}.u", n), Write(f"{stem}.h", n, module.state_size), Write(f"{stem}.g", n)
    inward = linear_block(place, "x", input_links(place, ("x_in",), lambda: module.in_proj.weight[:n]), n)
    low = Link(u.name, ("dt_in",), lambda: module.x_proj.weight[: module.dt_rank])
    sizes = linear_block(place, "dt", (low,), module.dt_rank)
    out = linear_block(place, "y", (Link(g.name, ("y_in",), lambda: module.out_proj.weight),), module.input_size)
    blocks = (
        inward,
        Block(place.layer, (_convolution(module, inward.writes[0], u),), stem=stem),
        sizes,
        Block(place.layer, (_recurrence(module, u, sizes.writes[0], h),), stem=stem),
        Block(place.layer, (_reading(module, place, u, h, g),), stem=stem),
        out,
    )
    return Described(blocks, (out.writes[0].name,))
