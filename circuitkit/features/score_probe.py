"""Experiments on one block: what its softmax is given when queries and keys are set by hand.

A norm of queries or keys (Qwen3, Gemma-3) belongs to what is read, so values are set behind it. How a model lays them
out there is found by comparing with the wiring's own queries and keys, which also tests these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from circuitkit.dictionaries.base import Site
from circuitkit.errors import UnsupportedModel
from circuitkit.features.frozen import FrozenNorm
from circuitkit.features.local import LocalModel
from circuitkit.features.replace import ROUNDING
from circuitkit.functional.norms import Norm, at_least_float32
from circuitkit.models.attention import Attention
from circuitkit.models.hooks import Hook, keeper
from circuitkit.models.wiring import Port, ReadSite

if TYPE_CHECKING:
    from circuitkit.models.hooked import Model, Run

AT_ONCE = 16  # copies of the prompt in one experiment


class Probe:
    """The block of one head, run again with other queries and keys.

    Args:
        model: the model that the local one was made from.
        local: its local replacement model of the prompt.
        attention: of the block.
        head: number of the query head.

    Raises:
        UnsupportedModel: if no softmax is seen, or queries and keys are not what the wiring says.
    """

    def __init__(self, model: Model, local: LocalModel, attention: Attention, head: int) -> None:
        self.model, self.local, self.attention, self.head = model, local, attention, head
        self.sites = dict(zip("qk", attention.reads[:2], strict=True))
        self.heads = {"q": head, "k": attention.owner(model, 1)[head]}
        self.run: Run = model.record(local.tokens[None])
        self.ends = {slot: End.of(model, local, self.sites[slot], slot) for slot in "qk"}
        seen: dict[str, Tensor] = {}
        hooks: list[Hook] = [(end.port, keeper(seen, slot)) for slot, end in self.ends.items()]
        scores, pattern = self.pass_through(1, hooks)
        self.scores, self.pattern = scores[0, head].detach(), at_least_float32(pattern)[0, head].detach()
        self.heads_first = {slot: self.ends[slot].heads_first(model, seen[slot], slot) for slot in "qk"}

    def pass_through(self, copies: int, hooks: list[Hook]) -> tuple[Tensor, Tensor]:
        """What the softmax is given and what it gives."""
        run, layer = self.run, self.attention.block
        rows = torch.zeros(copies, dtype=torch.long, device=run.inputs[0].device)
        softmax = _Softmax()
        with softmax:
            pattern = self.model.replay_block(
                run, layer, run.inputs[layer][rows], rows, hooks, self.model.wiring.patterns[layer]
            )
        if softmax.seen is None or softmax.seen.shape[:3] != pattern.shape[:3]:
            raise UnsupportedModel(
                f"layer {layer} of {self.model.name} makes its attention pattern without a softmax over keys that can "
                "be seen; load the model with eager attention"
            )
        return softmax.seen, pattern

    def form(self, query: int, key: int) -> tuple[Float[Tensor, "d_head d_head"], float]:
        """F at two positions, and the score where the query is zero."""
        width = self.ends["k"].values.shape[-1]
        columns = []
        with torch.enable_grad():
            for units in torch.eye(width, device=self.local.tokens.device).split(AT_ONCE):
                leaf: dict[int, Tensor] = {}
                hooks: list[Hook] = [
                    (self.ends["q"].port, self._zero_query(query, leaf)),
                    (self.ends["k"].port, self._unit_keys(key, units)),
                ]
                scores = self.pass_through(len(units), hooks)[0][:, self.head, query, key]
                (gradient,) = torch.autograd.grad(scores.sum(), leaf[0])
                columns.append(gradient[:, query, self.heads["q"]])
        form = at_least_float32(torch.cat(columns)).T.to(self.ends["q"].values)
        return form, float(scores[0].detach())

    def _zero_query(self, position: int, leaf: dict[int, Tensor]) -> Callable[[Tensor], Tensor]:
        def edit(y: Tensor) -> Tensor:
            z = self._arranged("q", y.detach()).clone()
            z[:, position, self.heads["q"]] = 0
            leaf[0] = z.requires_grad_()
            return self._arranged("q", z, like=y)

        return edit

    def _unit_keys(self, position: int, units: Tensor) -> Callable[[Tensor], Tensor]:
        def edit(y: Tensor) -> Tensor:
            z = self._arranged("k", y.detach()).clone()
            z[:, position, self.heads["k"]] = units.to(z)
            return self._arranged("k", z, like=y)

        return edit

    def _arranged(self, slot: str, y: Tensor, like: Tensor | None = None) -> Tensor:
        """[batch, pos, head, width], or from there back to the shape of ``like``."""
        if like is not None:
            return (y.transpose(1, 2) if self.heads_first[slot] else y).reshape(like.shape)
        if self.heads_first[slot]:
            return y.transpose(1, 2)
        return y.reshape(len(y), len(self.local.tokens), self.sites[slot].n, -1)


@dataclass(frozen=True, eq=False)
class End:
    """Queries or keys of one layer as they go into rotation and product, behind their norm if they have one.

    Args:
        site: where they are read.
        port: where the running module has them.
        norm: between stream and projection, with this run's scale.
        inner: their own norm, or None.
        values: what they are in the run.
        scale: 1 / sigma of their own norm, or None.
    """

    site: ReadSite
    port: Port
    norm: FrozenNorm
    inner: Norm | None
    values: Float[Tensor, "pos node width"]
    scale: Float[Tensor, "pos node 1"] | None

    @classmethod
    def of(cls, model: Model, local: LocalModel, site: ReadSite, slot: str) -> End:
        """Those of a slot, ``q`` or ``k``. Raises UnsupportedModel for a norm that is not of each head by itself."""
        x = local.values[Site("resid-pre", site.block)]
        frozen, inner, port = FrozenNorm.at(site.norm, x), None, site.port
        plain = site.read(x[None].expand(site.n, *x.shape)).movedim(0, 1)
        module: nn.Module | None = getattr(getattr(model.wiring.blocks[site.block], "attn", None), f"{slot}_norm", None)
        found = [(norm, at) for norm, at in model.wiring.inner_norms if at.module is module]
        if found:
            inner, port = found[0]
            if inner is None or (inner.weight is not None and len(inner.weight) != plain.shape[-1]):
                raise UnsupportedModel(
                    f"layer {site.block} of {model.name} has a norm of all its {slot} together, or one of no known "
                    "form, so scores cannot be taken apart"
                )
        scale = None if inner is None else inner.statistics(plain)[1]
        return cls(site, port, frozen, inner, plain if inner is None else inner(plain), scale)

    def heads_first(self, model: Model, seen: Tensor, slot: str) -> bool:
        """How the model lays queries or keys out here. Raises UnsupportedModel if they are not these."""
        seen, own = at_least_float32(seen)[0].to(self.values), self.values
        allowed = ROUNDING.get(next(model.module.parameters()).dtype, 1e-3) * float(own.abs().max())
        for first, want in ((False, own), (True, own.transpose(0, 1))):
            fits = seen.shape == want.shape if first else seen.numel() == want.numel()
            if fits and float((seen.reshape(want.shape) - want).abs().max()) <= allowed:
                return first
        raise UnsupportedModel(
            f"the {slot} of layer {self.site.block} of {model.name} are not its norm and maps of the stream, so scores "
            "cannot be taken apart"
        )

    def read(self, head: int, position: int) -> tuple[Float[Tensor, "d_head d"], Float[Tensor, " d_head"]]:
        """A head's query or key at one position as a map of the stream there, and what biases add."""
        assert self.site.weight is not None
        values = self.values[position, head]
        unit = torch.eye(len(values), device=values.device, dtype=values.dtype)
        rows, constant = unit, self._offset(position, head)
        if self.inner is not None and self.scale is not None:
            rows = self.inner.fold(unit) * self.scale[position, head]
        rows = rows @ self.site.weight[head].detach().to(values).T
        at = torch.full((len(rows),), position, device=rows.device)
        return self.norm.pull_points(rows, at), constant

    def _offset(self, position: int, head: int) -> Tensor:
        """The query or key where the stream adds nothing, scales as in the run."""
        like, weight = self.values[position, head], self.site.weight
        assert weight is not None
        made = torch.zeros_like(like)
        if self.norm.norm is not None and self.norm.norm.bias is not None:
            made = made + self.norm.norm.bias.detach().to(like) @ weight[head].detach().to(like)
        if self.site.bias is not None:
            made = made + self.site.bias[head].detach().to(like)
        if self.inner is None or self.scale is None:
            return made
        made = self.inner.part(made * self.scale[position, head])
        return made if self.inner.bias is None else made + self.inner.bias.detach().to(like)


class _Softmax(TorchFunctionMode):
    """Keeps what the last softmax was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "softmax":
            self.seen = args[0] if args else kwargs["input"]
        return func(*args, **kwargs)
