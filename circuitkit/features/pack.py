"""Local replacement models of several prompts side by side, so that one sweep serves them all.

    attention pattern of the pack = diag(A_1, A_2, ..., A_P)

A block sees itself only, so one row carries a target of every prompt at once: what it gives in the columns of prompt i
is the effect on the target in prompt i. Shorter prompts are filled up with positions at which nothing is written and
nothing is read. Nothing of the size (P n) x (P n) is made: attention goes block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from circuitkit.dictionaries.base import Site
from circuitkit.features.frozen import BlockAttention, FrozenAttention, FrozenLinear, FrozenMap, FrozenNorm, Parallel
from circuitkit.features.local import LocalModel, Nodes, Reads, Stage, Step, Writes
from circuitkit.features.sweep import Effects, pull

Group = tuple[str, Site]


def sweep_together(
    locals_: Sequence[LocalModel],
    reads: Sequence[Sequence[Reads]],
    outs: Sequence[Effects],
    rows: Sequence[Int[Tensor, " target"]],
) -> None:
    """Effects of all sources on targets of several prompts, from one sweep; own constants of targets are not in them.

    Args:
        locals_: local replacement models of one model and one set of dictionaries.
        reads: targets in each, in the order of `circuitkit.features.sweep.in_order`.
        outs: where the rows of each go, zeros, one column for each source or more.
        rows: which ones they are there.
    """
    last = max((int(r.positions.max()) for group in reads for r in group if len(r)), default=0)
    causal = all(local.causal for local in locals_)
    n = last + 1 if causal else max(len(local.tokens) for local in locals_)
    packed = pack(locals_, n)
    joined, found = _pack_reads(packed.local, reads, n)
    effects = pull(packed.local, joined)
    for (columns, own), mine, out, which in zip(packed.columns, found, outs, rows, strict=True):
        out[which[:, None], own] = effects[mine[:, None], columns]


@dataclass(frozen=True, eq=False)
class Packed:
    """Several local models as one.

    Args:
        local: the pack.
        columns: for each prompt, its columns in the pack, and the same in its own local model.
    """

    local: LocalModel
    columns: tuple[tuple[Int[Tensor, " source"], Int[Tensor, " source"]], ...]


def pack(locals_: Sequence[LocalModel], n: int) -> Packed:
    """The first ``n`` positions of several prompts, one after the other."""
    groups: dict[Group, list[Nodes | None]] = {}
    for i, local in enumerate(locals_):
        for nodes in local.nodes:
            groups.setdefault((nodes.kind, nodes.site), [None] * len(locals_))[i] = nodes
    first, firsts, packed = 0, dict[Group, int](), list[Nodes]()
    columns: list[list[tuple[Tensor, Tensor]]] = [[] for _ in locals_]
    for key, members in groups.items():
        firsts[key] = start = first
        for i, member in enumerate(members):
            # Positions never fall (and are -1 for a bias), so that what is left stands first.
            count = 0 if member is None else int((member.positions < n).sum())
            if member is not None and count:
                at = torch.arange(count, device=member.positions.device)
                columns[i].append((first + at, member.first + at))
                first += count
        blank = torch.zeros(first - start, dtype=torch.long, device=locals_[0].tokens.device)
        packed.append(Nodes(*key, start, blank, blank, blank.to(locals_[0].logits)))
    packer = _Packer(locals_, n, firsts)
    steps = tuple(packer.step(parts) for parts in zip(*(local.steps for local in locals_), strict=True))
    values = {site: x.new_zeros(()).expand(len(locals_) * n, x.shape[1]) for site, x in locals_[0].values.items()}
    tokens = locals_[0].tokens.new_zeros(len(locals_) * n)
    local = LocalModel(tokens, steps, tuple(packed), (), values, locals_[0].logits, False, len(locals_))
    return Packed(local, tuple((torch.cat([a for a, _ in c]), torch.cat([b for _, b in c])) for c in columns))


@dataclass(frozen=True, eq=False)
class _Packer:
    locals_: Sequence[LocalModel]
    n: int
    firsts: dict[Group, int]

    @cached_property
    def keys(self) -> list[dict[int, Group]]:
        """The group of each first column; a group without nodes shares its number with the next one."""
        return [{x.first: (x.kind, x.site) for x in local.nodes if len(x)} for local in self.locals_]

    def step(self, parts: Sequence[Step]) -> Step:
        if isinstance(parts[0], Stage):
            return self.stage(cast(Sequence[Stage], parts))
        components = zip(*cast(Sequence[Sequence[Sequence[Stage]]], parts), strict=True)
        return tuple(tuple(self.stage(stages) for stages in zip(*c, strict=True)) for c in components)

    def stage(self, stages: Sequence[Stage]) -> Stage:
        before = None if stages[0].before is None else _joined([s.before for s in stages if s.before], self.n)
        outer, inner = self.writes([s.outer for s in stages]), self.writes([s.inner for s in stages])
        return Stage(stages[0].site, before, stages[0].cut, outer, inner)

    def writes(self, of_each: Sequence[Sequence[Writes]]) -> tuple[Writes, ...]:
        groups: dict[Group, list[Writes | None]] = {}
        for i, (keys, writes) in enumerate(zip(self.keys, of_each, strict=True)):
            for w in writes:
                if len(w.positions):
                    groups.setdefault(keys[w.first], [None] * len(of_each))[i] = w
        return tuple(self._write(self.firsts[key], members) for key, members in groups.items())

    def _write(self, first: int, members: Sequence[Writes | None]) -> Writes:
        some = next(w for w in members if w is not None)
        if some.shared:
            blank = some.vectors.new_zeros(self.n, some.vectors.shape[1])
            vectors = torch.cat([blank if w is None else _fit(w.vectors, self.n) for w in members])
            positions = torch.arange(len(vectors), device=vectors.device)
            return Writes(first, positions, vectors, shared=True, prompts=len(members))
        cut = [(i, w, w.before(self.n)) for i, w in enumerate(members) if w is not None]
        positions = torch.cat([w.positions[:count] + i * self.n for i, w, count in cut])
        return Writes(first, positions, torch.cat([w.vectors[:count] for _, w, count in cut]))


def _fit(x: Float[Tensor, "pos d"], n: int) -> Float[Tensor, "n d"]:
    """The first n positions, zeros behind the last."""
    return pad(x[:n], (0, 0, 0, max(0, n - len(x))))


def _joined(maps: Sequence[Any], n: int) -> FrozenMap:
    return _JOIN[type(maps[0])](maps, n)


def _norm(norms: Sequence[FrozenNorm], n: int) -> FrozenNorm:
    scales = [_fit(norm.scale, n) for norm in norms if norm.scale is not None]
    return FrozenNorm(norms[0].norm, torch.cat(scales) if scales else None)


def _attention(maps: Sequence[FrozenAttention], n: int) -> BlockAttention:
    def fit(x: Tensor) -> Tensor:
        rest = max(0, n - x.shape[-1])
        return pad(x[:, :n, :n], (0, rest, 0, rest))

    return BlockAttention(_norm([m.norm for m in maps], n), maps[0].value, torch.stack([fit(m.pattern) for m in maps]))


def _linear(maps: Sequence[FrozenLinear], n: int) -> FrozenLinear:
    factors = tuple(torch.cat([_fit(x, n) for x in each]) for each in zip(*(m.factors for m in maps), strict=True))
    return FrozenLinear(maps[0].weights, factors, _norm([m.post_norm for m in maps], n))


def _parallel(maps: Sequence[Parallel], n: int) -> Parallel:
    return Parallel([_joined(each, n) for each in zip(*(m.maps for m in maps), strict=True)])


_JOIN: dict[type, Callable[[Any, int], FrozenMap]] = {
    FrozenNorm: _norm, FrozenAttention: _attention, FrozenLinear: _linear, Parallel: _parallel,
}  # fmt: skip


def _pack_reads(
    packed: LocalModel, reads: Sequence[Sequence[Reads]], n: int
) -> tuple[list[Reads], list[Int[Tensor, " target"]]]:
    """Targets of the pack, one of each prompt in every row, and the rows of each prompt's own targets.

    Where a prompt has fewer targets at a site than another, rows are filled up with vectors of zeros.
    """
    sites = sorted({r.site for group in reads for r in group}, key=lambda site: -packed.ranks[site])
    by_site = [{r.site: r for r in group} for group in reads]
    joined, total = list[Reads](), 0
    rows: list[list[Tensor]] = [[packed.tokens[:0]] for _ in reads]
    for site in sites:
        here = [group.get(site) for group in by_site]
        like = next(r for r in here if r is not None)
        count = max(len(r) for r in here if r is not None)
        vectors = like.vectors.new_zeros(count, len(reads), like.vectors.shape[1])
        positions = (torch.arange(len(reads), device=like.positions.device) * n).repeat(count, 1)
        for i, r in enumerate(here):
            if r is not None:
                vectors[: len(r), i] = r.vectors
                positions[: len(r), i] += r.positions
                rows[i].append(total + torch.arange(len(r), device=positions.device))
        blank = vectors.new_zeros(count * len(reads))
        joined.append(Reads(site, positions.flatten(), vectors.flatten(0, 1), blank, blank))
        total += count
    return joined, [torch.cat(parts) for parts in rows]
