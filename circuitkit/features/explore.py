"""Which rows of an attribution graph are computed, in what order and how many at a time, and the test of their sums."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitkit.errors import OptionError, UnsupportedModel
from circuitkit.features.local import LocalModel, Reads, same_site
from circuitkit.features.sweep import Effects, in_order, prefer_push, pull, push
from circuitkit.functional.influence import influence

TOLERANCE = 1e-4
CHUNKS, FEWEST = 8, 32  # of all rows; rows in each
ROUNDS = 8  # in which a capped graph is explored
BUDGET = 2**29  # bytes of one sweep, where none are given
MOST_ENTRIES = 1_000_000_000  # of the matrix of effects, which grows with the square of the prompt's length


@dataclass(frozen=True, eq=False)
class Table:
    """All possible targets: latents, and what else is to be explained; rows of every sweep in this order.

    Args:
        reads: one group for each site, from the top down.
        numbers: of each target: a latent's column, or beyond all columns.
    """

    reads: tuple[Reads, ...]
    numbers: Int[Tensor, " target"]

    @classmethod
    def of(cls, local: LocalModel, finals: Sequence[Reads]) -> Table:
        """Latents of the local model, and more targets behind them."""
        groups: dict[object, list[tuple[Reads, Tensor]]] = {}
        for a in local.active:
            columns = a.nodes.first + torch.arange(len(a.nodes), device=local.tokens.device)
            groups.setdefault(a.reads.site, []).append((a.reads, columns))
        for i, reads in enumerate(finals):
            number = torch.tensor([local.n_sources + i], device=local.tokens.device)
            groups.setdefault(reads.site, []).append((reads, number))
        joined = {site: _joined([reads for reads, _ in found]) for site, found in groups.items()}
        order = in_order(local, list(joined.values()))
        return cls(tuple(order), torch.cat([n for reads in order for _, n in groups[reads.site]]))

    @property
    def positions(self) -> Int[Tensor, " target"]:
        """Of every target."""
        return torch.cat([self.numbers[:0], *(reads.positions for reads in self.reads)])

    def take(self, rows: Bool[Tensor, " target"]) -> Table:
        """Some of the targets, in the same order."""
        parts = rows.split([len(reads) for reads in self.reads])
        taken = (reads.take(part.nonzero().flatten()) for reads, part in zip(self.reads, parts, strict=True))
        return Table(tuple(reads for reads in taken if len(reads)), self.numbers[rows])


def _joined(reads: list[Reads]) -> Reads:
    if len(reads) == 1:  # no copy of what may be gigabytes
        return reads[0]
    parts = zip(*((r.positions, r.vectors, r.constants, r.values) for r in reads), strict=True)
    return Reads(reads[0].site, *(torch.cat(part) for part in parts))


@dataclass(frozen=True, eq=False)
class Explored:
    """Rows of an attribution graph.

    Args:
        numbers: of each target.
        effects: of every source on it, own constants in the column of the component's biases.
        totals: what the target came to in the run; the sum of its row.
    """

    numbers: Int[Tensor, " target"]
    effects: Effects
    totals: Float[Tensor, " target"]


def rows_of(local: LocalModel, table: Table, budget: int | None = None, out: Effects | None = None) -> Explored:
    """Rows of some targets, in chunks that fit a budget, each row tested.

    Args:
        local: the local replacement model.
        table: the targets.
        budget: bytes that one sweep may take.
        out: where rows go, zeros, one column for each source or more; made if None.

    Raises:
        UnsupportedModel: if a row does not add up to its target.
    """
    n = len(table.numbers)
    # Not all at once even where they fit: what lies behind a chunk's last position is left out.
    at_once = min(rows_at_once(local, budget), max(FEWEST, -(-n // CHUNKS)))
    order = table.positions.argsort(stable=True)  # so that a chunk's last position is not far behind its others
    like = local.values[local.final]
    effects = _matrix(local, n, local.n_sources) if out is None else out
    totals = like.new_zeros(n)
    for some in order.split(at_once) if n else ():
        rows = some.sort().values
        mask = torch.zeros(n, dtype=torch.bool, device=rows.device)
        mask[rows] = True
        chunk = table.take(mask)
        effects[rows, : local.n_sources] = _sweep(local, chunk)
        totals[rows] = torch.cat([reads.values for reads in chunk.reads])
    check_sums(local, table, effects, totals)
    return Explored(table.numbers, effects, totals)


def _matrix(local: LocalModel, rows: int, columns: int) -> Effects:
    if rows * columns > MOST_ENTRIES:
        raise OptionError(
            f"got {rows} targets and {columns} sources, whose matrix of effects would have more than {MOST_ENTRIES:,} "
            "entries; say how many latents may have a row with max_features"
        )
    return local.values[local.final].new_zeros(rows, columns)


def _sweep(local: LocalModel, table: Table) -> Effects:
    found = push(local, table.reads) if prefer_push(local, table.reads) else pull(local, table.reads)
    add_constants(local, table, found, torch.arange(len(found), device=found.device))
    return found


def add_constants(local: LocalModel, table: Table, effects: Effects, rows: Int[Tensor, " target"]) -> None:
    """Add the targets' own constants in the columns of their components' biases; each target has one of the rows."""
    parts = rows.split([len(reads) for reads in table.reads])
    for reads, some in zip(table.reads, parts, strict=True):
        if bool(reads.constants.any()):
            effects[some, local.bias_column(reads.site)] += reads.constants


def rows_at_once(local: LocalModel, budget: int | None) -> int:
    """How many targets one sweep takes: each needs the stream at all positions, and its row."""
    x = local.values[local.final]
    widest = max(v.shape[1] for v in local.values.values())
    each = x.element_size() * (2 * len(x) * widest + 2 * local.n_sources)
    return max(1, (budget or BUDGET) // each)


def check_sums(local: LocalModel, table: Table, effects: Effects, totals: Tensor) -> None:
    """Whether every row adds up to its target. Raises UnsupportedModel with both numbers of the worst."""
    sums = torch.cat([some.double().sum(1) for some in effects.split(256)])
    largest = torch.cat([some.abs().amax(1) for some in effects.split(256)]).double()
    gap = (sums - totals.double()).abs() / torch.maximum(totals.double().abs(), largest).clamp(min=1e-30)
    worst = int(gap.argmax()) if len(gap) else 0
    if len(gap) and not float(gap[worst]) <= TOLERANCE:
        first = 0
        for reads in table.reads:
            if worst < first + len(reads):
                break
            first += len(reads)
        raise UnsupportedModel(
            f"the direct effects on a target at {reads.site}, position {int(reads.positions[worst - first])}, add up "
            f"to {float(sums[worst]):.6g}, and its pre-activation is {float(totals[worst]):.6g}: relative gap "
            f"{float(gap[worst]):.1e}, expected at most {TOLERANCE:.0e}; load the model in float32 or float64"
        )


def explore(
    local: LocalModel,
    finals: Sequence[Reads],
    numbers: Sequence[int],
    weights: Float[Tensor, " final"],
    *,
    most: int | None,
    only: Bool[Tensor, " source"] | None = None,
    budget: int | None = None,
) -> Explored:
    """Rows of the final targets, and of all latents below them or of those with most influence.

    Args:
        finals: what the graph explains; a latent among them has its own row already.
        numbers: of each of these: a latent's column, or beyond all columns.
        weights: what each counts in influence.
        most: how many latents; None for all.
        only: which columns may be explored; None for all.
        budget: bytes that one sweep may take.
    """
    asking = exploration(local, finals, numbers, weights, most=most, only=only)
    request = next(asking)
    while True:
        try:
            request = asking.send(rows_of(local, request[0], budget, request[1]))
        except StopIteration as done:
            found: Explored = done.value
            return found


Request = tuple[Table, Effects]


def exploration(
    local: LocalModel,
    finals: Sequence[Reads],
    numbers: Sequence[int],
    weights: Float[Tensor, " final"],
    *,
    most: int | None,
    only: Bool[Tensor, " source"] | None = None,
) -> Generator[Request, Explored, Explored]:
    """`explore` as a conversation: yields targets and where their rows go, takes the rows, and returns them all."""
    extra = [reads for reads, number in zip(finals, numbers, strict=True) if number >= local.n_sources]
    table = Table.of(local, extra)
    final = torch.isin(table.numbers, torch.tensor(list(numbers), device=table.numbers.device))
    wanted = _below(local, table, finals)
    if only is not None:
        wanted &= torch.cat((only, only.new_ones(len(extra))))[table.numbers]
    wanted &= ~final
    n_final, most = int(final.sum()), min(int(wanted.sum()), len(wanted) if most is None else most)
    effects = _matrix(local, n_final + most, local.n_sources + len(extra))
    found = [(yield table.take(final), effects[:n_final])]
    stages, worth = column_stages(local, len(extra)), effects.new_zeros(effects.shape[1])
    worth[torch.tensor(list(numbers), device=worth.device)] = weights.to(worth)
    done, rounds = n_final, 1 if most == int(wanted.sum()) else ROUNDS
    for left in reversed(range(rounds)):
        # A share of what is left, those of most influence as far as it is known by now.
        count = -(-(len(effects) - done) // (left + 1))
        chosen = wanted
        if rounds > 1:
            reach = influence(effects[:done], torch.cat([part.numbers for part in found]), stages, worth)
            rank = reach[table.numbers].masked_fill(~wanted, -1).argsort(descending=True, stable=True)
            chosen = torch.zeros_like(wanted)
            chosen[rank[:count]] = True
        found.append((yield table.take(chosen), effects[done : done + count]))
        wanted, done = wanted & ~chosen, done + count
    return Explored(torch.cat([part.numbers for part in found]), effects, torch.cat([part.totals for part in found]))


def _below(local: LocalModel, table: Table, finals: Sequence[Reads]) -> Bool[Tensor, " target"]:
    """Targets from which one of the final ones can be reached: at an earlier site, at no later position."""
    highest = max(local.ranks[reads.site] for reads in finals)
    last = max(int(reads.positions.max()) for reads in finals) if local.causal else len(local.tokens)
    return torch.cat([(r.positions <= last) & (local.ranks[r.site] < highest) for r in table.reads])


def column_stages(local: LocalModel, extra: int = 0) -> Int[Tensor, " node"]:
    """Order of computation of every source, and of further targets behind them all.

    Latents stand where they are read; whatever reads nothing stands before everything else.
    """
    parts = [
        torch.full_like(nodes.positions, 1 + local.ranks[same_site(nodes.site)] if nodes.kind == "latent" else 0)
        for nodes in local.nodes
    ]
    last = torch.full((extra,), 2 + len(local.ranks), device=local.tokens.device)
    return torch.cat((*parts, last)).long()
