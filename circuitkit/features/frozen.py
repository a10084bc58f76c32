"""The linear maps that are left of a transformer's parts when what makes them nonlinear is held at one run's values.

    norm        y = weight * P x / sigma                     sigma of this run; P removes the mean (layer norm)
    attention   z_p = sum over q of A[p, q] y_q W_V          pattern A of this run
    output      w = post-norm(z W_O)
    skip        w = y W_skip
    gates       w = post-norm((c * (y W_in)) W_out)          c = hidden / pre of this run, neuron by neuron

Constants (biases) are not here: they are writes of their own. Every map goes both ways: ``push`` takes vectors at its
input to its output, ``pull`` takes gradients at its output to its input, its transpose. Rows are independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.functional.norms import Norm

Rows = Float[Tensor, "row pos _"]
Points = Float[Tensor, "row _"]
Positions = Int[Tensor, " row"]


class FrozenMap(Protocol):
    """A linear map over positions and width."""

    def pull(self, g: Rows) -> Rows:
        """Gradients at the input, from gradients at the output."""

    def pull_points(self, g: Points, positions: Positions, n: int) -> Points | Rows:
        """The same of rows that are zero but at one position each: such rows again, or all of the first n positions."""

    def push(self, x: Rows) -> Rows:
        """Vectors at the output, from vectors at the input."""


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """A norm with the scale of one run; nothing at all if there is no norm.

    Args:
        norm: its gain and offset, or None.
        scale: 1 / sigma at each position.
    """

    norm: Norm | None
    scale: Float[Tensor, "pos 1"] | None

    @classmethod
    def at(cls, norm: Norm | None, x: Float[Tensor, "pos d"]) -> FrozenNorm:
        """The norm as it acts on a run's values."""
        return cls(norm, None if norm is None else norm.statistics(x)[1])

    def pull(self, g: Rows) -> Rows:
        """Gradients at the input; ``g`` may hold the first positions only."""
        if self.norm is None or self.scale is None:
            return g
        return self.norm.fold(g) * self.scale[: g.shape[1]]

    def pull_points(self, g: Points, positions: Positions, n: int = 0) -> Points:
        """Gradients at the input of rows with one position each."""
        return g if self.norm is None or self.scale is None else self.norm.fold(g) * self.scale[positions]

    def push(self, x: Rows) -> Rows:
        """What addends of the input add to the output."""
        if self.norm is None or self.scale is None:
            return x
        return self.norm.part(x * self.scale[: x.shape[1]])

    def bias(self, like: Float[Tensor, "pos d"]) -> Float[Tensor, "pos d"]:
        """The norm's own offset at every position."""
        if self.norm is None or self.norm.bias is None:
            return torch.zeros_like(like)
        return self.norm.bias.to(like).expand_as(like)


@dataclass(frozen=True, eq=False)
class FrozenAttention:
    """From the stream to what heads gather, joined: norm, value map and pattern.

    Args:
        norm: before the value map.
        value: each key/value head's map.
        pattern: how much each query takes from each key.
    """

    norm: FrozenNorm
    value: Float[Tensor, "kv d d_head"]
    pattern: Float[Tensor, "head pos pos"]

    def pull(self, g: Rows) -> Rows:
        """Gradients at the stream, from gradients at what heads gather."""
        n, (kv, _, width) = g.shape[1], self.value.shape
        by_head = g.unflatten(-1, (-1, width)).permute(2, 1, 0, 3).flatten(2)
        values = torch.bmm(self.pattern[:, :n, :n].transpose(1, 2), by_head)
        return self.norm.pull(_joined(values.unflatten(0, (kv, -1)).sum(1), len(g), self.value.transpose(1, 2)))

    def pull_points(self, g: Points, positions: Positions, n: int) -> Rows:
        """Gradients at the stream of rows with one position each: heads spread them, each by its pattern."""
        kv, _, width = self.value.shape
        by_group = g.unflatten(-1, (kv, -1, width))
        at_stream = torch.einsum("rgme,gde->rgmd", by_group, self.value).flatten(1, 2)
        patterns = self.pattern[:, positions, :n].permute(1, 2, 0)
        return self.norm.pull(torch.bmm(patterns, at_stream))

    def push(self, x: Rows) -> Rows:
        """What addends of the stream add to what heads gather."""
        n, (kv, d, width) = x.shape[1], self.value.shape
        values = (self.norm.push(x) @ self.value.transpose(0, 1).reshape(d, kv * width)).unflatten(-1, (kv, width))
        by_head = values.permute(2, 1, 0, 3).flatten(2).repeat_interleave(len(self.pattern) // kv, 0)
        gathered = torch.bmm(self.pattern[:, :n, :n], by_head)
        return gathered.unflatten(-1, (len(x), width)).permute(2, 1, 0, 3).flatten(2)


def gathered(
    pattern: Float[Tensor, "head pos pos"], values: Float[Tensor, "pos all"], kv: int
) -> Float[Tensor, "pos z"]:
    """What heads gather of constants, joined."""
    each = values.unflatten(-1, (kv, -1)).repeat_interleave(len(pattern) // kv, 1)
    return torch.einsum("hqk,khe->qhe", pattern, each).flatten(1)


@dataclass(frozen=True, eq=False)
class BlockAttention:
    """The same for several prompts of equal length, one after the other, each of which sees itself only.

    Args:
        norm: before the value map.
        value: each key/value head's map.
        pattern: of each prompt.
    """

    norm: FrozenNorm
    value: Float[Tensor, "kv d d_head"]
    pattern: Float[Tensor, "prompt head pos pos"]

    def pull(self, g: Rows) -> Rows:
        """Gradients at the stream, from gradients at what heads gather."""
        rows, (prompts, heads, n, _), (kv, _, width) = len(g), self.pattern.shape, self.value.shape
        by_head = g.reshape(rows, prompts, n, heads, width).permute(1, 3, 2, 0, 4).reshape(prompts * heads, n, -1)
        values = torch.bmm(self.pattern.flatten(0, 1).transpose(1, 2), by_head)
        grouped = values.view(prompts, kv, -1, n, rows * width).sum(2).transpose(0, 1).flatten(1, 2)
        return self.norm.pull(_joined(grouped, rows, self.value.transpose(1, 2)))

    def pull_points(self, g: Points, positions: Positions, n: int) -> Rows:
        """Gradients at the stream of rows with one position in each prompt; points of a row follow one another."""
        (prompts, _, length, _), (kv, _, width) = self.pattern.shape, self.value.shape
        by_group = g.unflatten(-1, (kv, -1, width))
        at_stream = torch.einsum("rgme,gde->rgmd", by_group, self.value).flatten(1, 2)
        patterns = self.pattern[positions // length, :, positions % length].transpose(1, 2)
        return self.norm.pull(torch.bmm(patterns, at_stream).reshape(-1, prompts * length, self.value.shape[1]))

    def push(self, x: Rows) -> Rows:
        """What addends of the stream add to what heads gather."""
        length = self.pattern.shape[-1]
        parts = self.norm.push(x).split(length, 1)
        plain = (FrozenAttention(FrozenNorm(None, None), self.value, pattern) for pattern in self.pattern)
        return torch.cat([attention.push(part) for attention, part in zip(plain, parts, strict=True)], 1)


def _joined(values: Tensor, rows: int, weight: Float[Tensor, "kv d_head d"]) -> Rows:
    """Sum over heads of values times each head's map, with one product."""
    together = values.unflatten(-1, (rows, -1)).permute(2, 1, 0, 3).flatten(2)
    return together @ weight.flatten(0, 1)


@dataclass(frozen=True, eq=False)
class FrozenLinear:
    """Linear maps one after the other, with factors at each position between them and a norm after them.

    Args:
        weights: the maps.
        factors: what the output of each map but the last is multiplied by.
        post_norm: after the last map.
    """

    weights: tuple[Float[Tensor, "_ _"], ...]
    factors: tuple[Float[Tensor, "pos _"], ...] = ()
    post_norm: FrozenNorm = FrozenNorm(None, None)

    def pull(self, g: Rows) -> Rows:
        """Gradients at the input."""
        g = self.post_norm.pull(g)
        for i, weight in reversed(list(enumerate(self.weights))):
            g = (g if i >= len(self.factors) else g * self.factors[i][: g.shape[1]]) @ weight.T
        return g

    def pull_points(self, g: Points, positions: Positions, n: int = 0) -> Points:
        """Gradients at the input of rows with one position each."""
        g = self.post_norm.pull_points(g, positions)
        for i, weight in reversed(list(enumerate(self.weights))):
            g = (g if i >= len(self.factors) else g * self.factors[i][positions]) @ weight.T
        return g

    def push(self, x: Rows) -> Rows:
        """What addends of the input add to the output."""
        for i, weight in enumerate(self.weights):
            x = x @ weight
            x = x if i >= len(self.factors) else x * self.factors[i][: x.shape[1]]
        return self.post_norm.push(x)


@dataclass(frozen=True, eq=False)
class Parallel:
    """Maps with one input and one output, added up: the skip connections of several transcoders."""

    maps: Sequence[FrozenMap]

    def pull(self, g: Rows) -> Rows:
        """Gradients at the input."""
        return torch.stack([m.pull(g) for m in self.maps]).sum(0)

    def pull_points(self, g: Points, positions: Positions, n: int) -> Points | Rows:
        """Gradients at the input of rows with one position each."""
        return torch.stack([m.pull_points(g, positions, n) for m in self.maps]).sum(0)

    def push(self, x: Rows) -> Rows:
        """What addends of the input add to the output."""
        return torch.stack([m.push(x) for m in self.maps]).sum(0)
