"""A circuit, and what it does without some more of its edges: only what changes is computed.

    x_v' = x_v + sum over removed u of (corrupt a_u - a_u) + sum over kept u of (a_u' - a_u)

Unprimed values are those of the circuit in hand, which are held. A change spreads from readers to writers and along
kept edges only, and only to what still leads to the logits; all else, whole blocks of a small circuit, stays as it was.
The answers are those of `circuitkit.models.circuits.run_circuits`.

Edges are removed from the logits backwards: what the writer of a removed edge reads must still be as in the clean run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitkit.functional.norms import at_least_float32
from circuitkit.models.hooked import Model, Run
from circuitkit.models.hooks import Hook, keeper
from circuitkit.models.parts import Part, answers, find_parts, leads_on, tied_feeds, written
from circuitkit.models.sweep import record_streams
from circuitkit.models.wiring import Port, ReadSite
from circuitkit.shapes import EdgeMask, Tokens


class Removals:
    """The circuit in hand, on one batch: at first the whole model.

    Args:
        model: the model.
        tokens: the clean inputs.
        positions: where logits are read.
        corrupt: from the clean run to what each write site carries along a removed edge.
    """

    def __init__(
        self,
        model: Model,
        tokens: Tokens,
        positions: Int[Tensor, "batch answer"],
        corrupt: Callable[[Run], tuple[Tensor, ...]],
    ) -> None:
        wiring = model.wiring
        self.model, self.positions = model, positions
        self.keep, self.feeds = wiring.graph.mask.cpu().clone(), tied_feeds(wiring)
        self.private: dict[int, Tensor] = {}  # streams of readers that no longer read their site's
        with torch.no_grad(), model.quiet():
            self.run, self.streams = record_streams(model, tokens)
            self.corrupt = corrupt(self.run)
            self.gaps = wiring.expand_difference(self.corrupt, self.run.writes)
            self.written = [at_least_float32(w).clone() for w in self.run.writes]
            self.last = at_least_float32(answers(self.run.inputs[-1], positions))
            self.reads = self._clean_reads()
            self.parts = find_parts(model, self.run, self.reads, self.written)
        self._aim()

    def _clean_reads(self) -> dict[ReadSite, Float[Tensor, "batch pos node width"]]:
        """What every reader makes of the stream in the clean run."""
        seen: dict[Port, Tensor] = {}
        sites = [site for site in self.model.wiring.read_sites if site.block < len(self.model.wiring.blocks)]
        rows = torch.arange(self.run.batch, device=self.gaps.device)
        hooks: list[Hook] = [(site.port, keeper(seen, site.port)) for site in sites]
        self.model.replay(self.run, 0, self.run.inputs[0], rows, hooks)
        return {s: seen[s.port].reshape(*seen[s.port].shape[:2], s.n, -1).clone() for s in sites}

    def _aim(self) -> None:
        """What still matters: readers that lead to the logits, edges into them, and writers heard at all positions.

        What an MLP writes is needed at the answers only, unless attention reads it, at once or through other MLPs.
        """
        self.alive = leads_on(self.keep, self.feeds)
        self.hears = self.keep & self.alive & self.feeds.any(1)
        self.heard = self.hears.any(1)
        self.wide = torch.zeros(len(self.keep), dtype=torch.bool)
        for part in reversed(self.parts):
            if part.pointwise is None or self.wide[part.written.rows].any():
                self.wide |= self.hears[:, list(part.columns)].any(1)
        self._most = max((int(self.alive[list(part.columns)].sum()) for part in self.parts), default=0)

    def bytes_per_circuit(self, columns: Sequence[int]) -> float:
        """A rough count of what one circuit takes that differs in edges into these readers."""
        nodes = self.model.graph
        first = min(nodes.destination_nodes[v].stage for v in columns)
        later = sum(nodes.source_nodes[u].stage >= first for u in self.heard.nonzero().flatten().tolist())
        return 4.0 * self.gaps[0].numel() * (later + 3 * self._most + 8)

    def logits(
        self, keep: Bool[Tensor, "circuit src dst"], columns: Sequence[int]
    ) -> Float[Tensor, "circuit batch answer vocab"]:
        """Logits of circuits that have lost more edges into some readers, all of one stage.

        Args:
            keep: what is left of the circuit in hand.
            columns: the readers.
        """
        with torch.no_grad(), self.model.quiet():
            x = _Change(self, keep, columns).spread().to(self.run.inputs[-1].dtype)
            at = torch.arange(x.shape[2], device=x.device).expand(len(x) * self.run.batch, -1)
            return self.model.logits(x.flatten(0, 1), at).unflatten(0, x.shape[:2])

    def settle(self, keep: EdgeMask, columns: Sequence[int]) -> None:
        """Make the circuit without some more edges into these readers the one in hand."""
        with torch.no_grad(), self.model.quiet():
            _Change(self, keep[None], columns, settle=True).spread()
        self.keep = keep.clone()
        self._aim()


@dataclass(frozen=True, eq=False)
class _States:
    """What readers of one part read in some circuits; circuits that agree on a reader share its state.

    Args:
        readers: columns of the readers that read something else than in the circuit in hand.
        owner: which of these readers each state belongs to, in order.
        streams: what is read in each state.
        which: the state of each reader in each circuit.
    """

    readers: list[int]
    owner: Int[Tensor, " state"]
    streams: Float[Tensor, "state batch pos d"]
    which: Int[Tensor, "reader circuit"]

    def made(self, site: ReadSite) -> Iterator[tuple[int, int, int, Tensor]]:
        """For each reader of a site its place here, its node, its first state and what it makes of its states."""
        mine = [i for i, v in enumerate(self.readers) if site.first <= v < site.columns.stop]
        if not mine:
            return
        states = ((self.owner >= mine[0]) & (self.owner <= mine[-1])).nonzero().flatten()
        nodes = torch.tensor(self.readers)[self.owner[states]] - site.first
        some = self.streams[int(states[0]) : int(states[-1]) + 1]
        values = site.read(some, nodes.to(some.device))  # type: ignore[arg-type]
        for i in mine:
            own = (self.owner[states] == i).nonzero().flatten()
            first, stop = int(own[0]), int(own[-1]) + 1
            yield i, self.readers[i] - site.first, first + int(states[0]), values[first:stop]


class _Change:
    """Some circuits next to the one in hand: what has changed so far, while the parts are gone through."""

    def __init__(self, base: Removals, keep: Tensor, columns: Sequence[int], settle: bool = False) -> None:
        self.base, self.n, self.settle = base, len(keep), settle
        lost = base.keep[:, columns] & ~keep[:, :, columns] & base.alive[columns]
        losing = lost.any(1).any(0).nonzero().flatten().tolist()
        self.lost = {columns[i]: lost[:, :, i] for i in losing}
        # Writers, how they differ [writer, circuit, batch, pos, d], and whether only at the answers.
        self.moved: list[tuple[Tensor, Tensor, bool]] = []
        self.last = base.last.repeat(self.n, 1, 1, 1)

    def spread(self) -> Float[Tensor, "circuit batch answer d"]:
        """Go through all parts; returns the final stream at the answer positions."""
        base, final = self.base, self.base.model.wiring.read_sites[-1].first
        for part in base.parts:
            if (states := self._states(part)) is not None:
                self._through(part, states)
        if final in self.lost:
            gaps = answers(base.gaps, base.positions)
            self.last += torch.einsum("cu,ubad->cbad", self.lost[final].to(gaps), gaps)
        if self.settle:
            base.last = self.last[0]
        return self.last

    def _brief(self, part: Part) -> bool:
        """Whether a part is needed at the answers only."""
        return part.pointwise is not None and not self.settle and not bool(self.base.wide[part.written.rows].any())

    def _at(self, x: Float[Tensor, "*case batch pos d"], brief: bool) -> Tensor:
        """All of a tensor, or only what it is at the answers."""
        return answers(x, self.base.positions) if brief else x

    def _states(self, part: Part) -> _States | None:
        """What the readers of a part read where that changes; None if it does not."""
        base, brief = self.base, self._brief(part)
        if readers := [v for v in part.columns if v in self.lost]:
            found = [self.lost[v].unique(dim=0, return_inverse=True) for v in readers]
            counts = torch.tensor([len(states) for states, _ in found])
            weight = torch.cat([states for states, _ in found])
            used = weight.any(0).nonzero().flatten()
            gaps = self._at(base.gaps[used.to(base.gaps.device)], brief)
            shift = (weight[:, used].to(gaps) @ gaps.flatten(1)).unflatten(1, gaps.shape[1:])
            which = torch.stack([inverse for _, inverse in found]) + (counts.cumsum(0) - counts)[:, None]
        elif not self.moved:
            return None
        else:
            columns = torch.tensor(list(part.columns))
            hears = [base.hears[writers][:, columns] for writers, _, _ in self.moved]
            columns = columns[torch.cat(hears).any(0)]
            if len(columns) == 0:
                return None
            readers = columns.tolist()
            like = self._at(base.gaps[0], brief)
            shift = like.new_zeros(len(readers) * self.n, *like.shape)
            for writers, change, short in self.moved:
                weight = base.hears[writers][:, columns].T
                if weight.any():
                    change = self._at(change, brief and not short)
                    shift.view(len(readers), -1).addmm_(weight.to(change), change.flatten(1))
            counts = torch.full((len(readers),), self.n)
            which = torch.arange(len(readers) * self.n).reshape(-1, self.n)
        owner = torch.arange(len(readers)).repeat_interleave(counts)
        now = torch.stack([base.private.get(v, base.streams[part.columns[v].stream]) for v in readers])
        streams = shift + self._at(at_least_float32(now), brief)[owner.to(now.device)]
        if self.settle:
            base.private.update(zip(readers, streams, strict=True))
        return _States(readers, owner, streams, which)

    def _through(self, part: Part, states: _States) -> None:
        """Take in how a part's writers change with what its readers read."""
        base, site, size = self.base, part.written, part.size(part.written)
        far, near = base.heard[site.rows].tolist(), base.keep[site.rows, -1].tolist()
        short = not self.settle and not bool(base.wide[site.rows].any())
        if part.pointwise is not None:
            case_of, change = {0: states.which[0]}, self._pointwise(part, part.pointwise, states)
        else:
            case_of, change = self._replayed(part, states)
            change = self._at(change.flatten(3), short).unflatten(3, change.shape[3:])
        group_of = _group_of(case_of, len(change))
        for member in range(size):
            nodes, values = group_of * size + member, change[:, :, :, member]
            if groups := [g for g in case_of if far[g * size + member]]:
                writes = written(site, nodes, values)
                cases = torch.stack([case_of[g] for g in groups]).to(writes.device)
                self.moved.append((site.first + torch.tensor(groups) * size + member, writes[cases], short))
            if groups := [g for g in case_of if near[g * size + member]]:
                writes = written(site, nodes, self._at(values, not short))
                for g in groups:
                    self.last += writes[case_of[g].to(writes.device)]

    def _pointwise(
        self, part: Part, known: Callable[[Tensor], Tensor], states: _States
    ) -> Float[Tensor, "case batch pos 1 d"]:
        """The change of a part that acts on each position by itself."""
        base, read = self.base, part.reads[0]
        now = self._at(at_least_float32(base.reads[read][:, :, 0]), self._brief(part))
        y = read.read(states.streams[None])[0]
        if self.settle:
            base.reads[read] = y[0][:, :, None]
        return (known(y) - known(now))[:, :, :, None]

    def _replayed(
        self, part: Part, states: _States
    ) -> tuple[dict[int, Tensor], Float[Tensor, "case batch pos member width"]]:
        """The change of each group of nodes in each case that occurs, and the case of every circuit, by group."""
        base, found = self.base, dict[int, list[tuple[ReadSite, int, int, int, Tensor]]]()
        for read in part.reads:
            for i, node, first, values in states.made(read):
                group, member = divmod(node, part.size(read))
                found.setdefault(group, []).append((read, i, member, first, values))
        case_of, fill, count = dict[int, Tensor](), [], 0
        for group, readers in found.items():
            which, inverse = states.which[[i for _, i, *_ in readers]].unique(dim=1, return_inverse=True)
            case_of[group] = count + inverse
            fill += [
                (read, slice(count, count + which.shape[1]), member, values[(rows - first).to(values.device)])
                for (read, _, member, first, values), rows in zip(readers, which, strict=True)
            ]
            count += which.shape[1]
        groups = _group_of(case_of, count).to(base.gaps.device)
        made = {read: _grouped(base.reads[read], part.groups)[groups] for read in part.reads}
        for read, cases, member, values in fill:
            made[read][cases, :, :, member] = values.to(made[read].dtype)
        seen = part.packed(base.model, base.run, made)
        change = seen - _grouped(base.written[part.place], part.groups)[groups]
        if self.settle:
            _grouped(base.written[part.place], part.groups)[groups] = seen
            for read in part.reads:
                _grouped(base.reads[read], part.groups)[groups] = made[read]
        return case_of, change


def _group_of(case_of: dict[int, Int[Tensor, " circuit"]], cases: int) -> Int[Tensor, " case"]:
    """The group that each case belongs to."""
    groups = torch.zeros(cases, dtype=torch.long)
    for group, mine in case_of.items():
        groups[mine] = group
    return groups


def _grouped(
    values: Float[Tensor, "batch pos node width"], groups: int
) -> Float[Tensor, "group batch pos member width"]:
    """A view with groups of nodes first."""
    return values.unflatten(2, (groups, -1)).movedim(2, 0)
