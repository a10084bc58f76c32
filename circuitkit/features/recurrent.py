"""Attribution graphs of recurrent networks: which inputs, through which units or latents, made an output or a state.

    vanilla   h_t = c (W x_t + U h_{t-1} + b)                            c = act(a) / a, of each unit and step
    GRU       h_t = (1 - z) n_t + z h_{t-1},   n_t = c (W x_t + b + r (U h_{t-1} + b'))
    LSTM      cell_t = f cell_{t-1} + i c_g (W x_t + U h_{t-1} + b),   h_t = o c_h cell_t

Gates and secants are held at this run's values, as attention patterns and norm scales are in a transformer. Then every
state is a sum over what was there before, the run itself is reproduced, and each row of effects adds up to its target:
to 1e-4 of the larger of the total and the row's largest effect, or the graph is refused.

Wrong where gates decide: effects through a gate's own pre-activation are not in the graph, so an input that opens a
gate and adds nothing seems to do nothing. What has been overwritten is not gone either: it stands there beside a larger
effect of the other sign. Wrong for what-if questions where a unit is saturated: the secant says which share of a unit
came from where, not what a change does.
Cost: one run, then one sweep over time for each chunk of targets (`circuitkit.features.recurrent_sweep`).
Reference: none for recurrent networks; for transformers Ameisen et al. 2025, "Circuit tracing"
(transformer-circuits.pub).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.dictionaries.base import Dictionary
from circuitkit.errors import OptionError, UnsupportedModel
from circuitkit.features.explore import BUDGET, MOST_ENTRIES, TOLERANCE
from circuitkit.features.graph import FeatureGraph, FeatureNode
from circuitkit.features.recurrent_local import FrozenRecurrence, frozen_recurrence
from circuitkit.features.recurrent_nodes import Placed, coders_of, placed
from circuitkit.features.recurrent_sweep import Effects, Rows, sweep
from circuitkit.features.recurrent_targets import Final, RecurrentTarget, final_targets
from circuitkit.models.recurrent.model import RecurrentModel


@torch.no_grad()
def recurrent_attribution_graph(
    model: RecurrentModel,
    dictionaries: Sequence[Dictionary],
    inputs: Tensor,
    *,
    targets: Sequence[RecurrentTarget] | None = None,
    max_features: int | None = None,
    window: int | None = None,
    budget: int | str | None = None,
) -> FeatureGraph:
    """The attribution graph of one input of a recurrent network.

    Without dictionaries every unit of every layer is a node at every step. With some, their latents and errors are, and
    all other units pass on what they read.

    Args:
        model: a recurrent network; attributed in float64.
        dictionaries: SAEs on states (`Site("state", 0, "l0.h")`), or none.
        inputs: token ids ``[step]`` or numbers ``[step, size]``.
        targets: outputs at the last step (whole numbers), `Output`s at other steps, `Direction`s, or `Latent`s (of a
            write without a dictionary: units); None for the last step's outputs.
        max_features: how many units or latents get a row: about as many at every step, those of most total effect on
            the targets; None for all.
        window: how many steps are taken apart, up to the last target's; None for all.
        budget: memory that one sweep may take, in bytes or as text such as ``"4GiB"``; 512 MiB if None.

    Raises:
        OptionError: if dictionaries, inputs, targets or options do not fit.
        TaskError: for inputs that the model cannot read.
        UnsupportedModel: if a layer is not linear with its gates held, or a row does not add up to its target.

    >>> import circuitkit as ck
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> graph = recurrent_attribution_graph(ck.load(nn.GRU(2, 3, batch_first=True)), [], torch.randn(4, 2))
    >>> bool(graph.remainder.abs().max() < 1e-5), graph.nodes[-1].name
    (True, 'logits.2@3')
    """
    from circuitkit.methods.plan import parse_bytes

    if getattr(model, "family", "") != "recurrent":
        raise UnsupportedModel(f"{model.name} is {model.family}; use circuitkit.features.attribution.attribution_graph")
    coders = coders_of(model, dictionaries)
    for name, given in (("max_features", max_features), ("window", window)):
        if given is not None and given < 1:
            raise OptionError(f"got {name} = {given}, expected at least 1, or None for all")
    local = frozen_recurrence(model, inputs)
    finals = final_targets(local, targets, coders)
    first, last = _span(local, finals, window)
    made = placed(local, coders, first, last)
    own = [_own(made, final) for final in finals]
    if len(set(found := [row for row in own if row is not None])) < len(found):
        raise OptionError("got the same unit or latent twice as a target; name each once")
    outside = [final for final, row in zip(finals, own, strict=True) if row is None]
    rows = _chosen(local, made, finals, own, max_features, last)
    rows += [_numbered(final.rows, len(made.nodes) + i) for i, final in enumerate(outside)]
    effects, numbers, totals = _effects(local, made, rows, last, parse_bytes(budget) or BUDGET, len(outside))
    nodes = (*made.nodes, *(_final_node(local, final) for final in outside))
    weights = effects.new_zeros(len(nodes), dtype=torch.float64)
    beyond = iter(range(len(made.nodes), len(nodes)))
    for final, row in zip(finals, own, strict=True):
        weights[next(beyond) if row is None else row] = final.weight
    tokens = torch.arange(local.steps) if model.numbers is not None else inputs.cpu()
    graph = FeatureGraph(nodes, numbers, effects, totals, weights, tokens, model.name)
    # A unit without a row of its own would be an end that nothing explains.
    kept = ~graph.kind("latent", "unit")
    kept[numbers] = True
    return graph if bool(kept.all()) else graph.part(kept)


def _span(local: FrozenRecurrence, finals: Sequence[Final], window: int | None) -> tuple[int, int]:
    """First and last step that the graph is about."""
    if not local.network.causal:
        if window is not None:
            raise OptionError(
                f"{local.model.name} reads later steps too, so it has no window; leave window out, or cut the input"
            )
        return 0, local.steps - 1
    last = max(final.step for final in finals)
    return (0 if window is None else max(0, last + 1 - window)), last


def _own(made: Placed, final: Final) -> int | None:
    """The node that a target is, or None for a target beside all nodes."""
    if final.kind != "latent":
        return None
    for number, node in enumerate(made.nodes):
        if node.kind in ("latent", "unit") and (node.site, node.position, node.index) == (
            final.site, final.step, final.index,
        ):  # fmt: skip
            return number
    raise OptionError(
        f"{final.name} is no node of this graph: not active at that step, or there is no such unit or latent"
    )


def _numbered(rows: Rows, number: int) -> Rows:
    return replace(rows, nodes=torch.tensor([number], device=rows.values.device))


def _chosen(
    local: FrozenRecurrence,
    made: Placed,
    finals: Sequence[Final],
    own: Sequence[int | None],
    most: int | None,
    last: int,
) -> list[Rows]:
    """Rows of units and latents: targets among them, and all others or those of most total effect."""
    always = torch.tensor([row for row in own if row is not None], dtype=torch.long, device=local.like.device)
    if most is None:
        return list(made.rows)
    reads = [final.rows if row is None else _row_of(made, row) for final, row in zip(finals, own, strict=True)]
    found = total_rows(local, made, reads, last)
    weights = found.new_tensor([final.weight for final in finals])
    worth = (found.abs() * weights[:, None]).sum(0)
    columns = torch.cat([rows.nodes for rows in made.rows])
    columns = columns[~torch.isin(columns, always)]
    best = columns[_alike_at_all_steps(made, columns, worth[columns])[:most]]
    keep = torch.cat((best, always))
    return [part for rows in made.rows if len(part := _some(rows, torch.isin(rows.nodes, keep)))]


def _alike_at_all_steps(made: Placed, columns: Tensor, worth: Tensor) -> Tensor:
    """The best of every step, then the second best of every step, and so on: a chain breaks where a step has none."""
    ranked = worth.argsort(descending=True, stable=True)
    met, place = dict[int | None, int](), list[int]()
    for column in columns[ranked].tolist():
        step = made.nodes[column].position
        met[step] = place_here = met.get(step, 0) + 1
        place.append(place_here)
    return ranked[torch.tensor(place, dtype=torch.long).argsort(stable=True)]


def _some(rows: Rows, which: Tensor) -> Rows:
    return Rows(
        rows.write, rows.step, rows.vectors[which], rows.constants[which], rows.values[which], rows.nodes[which]
    )


def _row_of(made: Placed, number: int) -> Rows:
    rows = next(rows for rows in made.rows if bool((rows.nodes == number).any()))
    return _some(rows, rows.nodes == number)


def in_order(local: FrozenRecurrence, rows: Sequence[Rows]) -> list[int]:
    """The order in which a sweep meets targets: read-outs, then from the last stage to the first."""

    def key(i: int) -> int:
        return -local.last_stage if rows[i].parts else -local.stage_of(rows[i].write, rows[i].step)

    return sorted(range(len(rows)), key=key)


def total_rows(local: FrozenRecurrence, made: Placed, rows: Sequence[Rows], last: int) -> Effects:
    """Effects through all frozen paths, in the order of ``rows``."""
    order = in_order(local, rows)
    found = sweep(local, replace(made.standing, cut=frozenset()), [rows[i] for i in order], last)
    sizes = [len(rows[i]) for i in order]
    parts = dict(zip(order, found.split(sizes), strict=True))
    return torch.cat([parts[i] for i in range(len(rows))])


def _effects(
    local: FrozenRecurrence, made: Placed, rows: Sequence[Rows], last: int, budget: int, extra: int
) -> tuple[Effects, Tensor, Float[Tensor, " target"]]:
    """All rows, chunk by chunk, each tested."""
    ordered = [rows[i] for i in in_order(local, rows)]
    total, columns = sum(len(r) for r in ordered), len(made.nodes) + extra
    if total * columns > MOST_ENTRIES:
        raise OptionError(
            f"got {total:,} targets and {columns:,} sources, whose matrix of effects would have more than "
            f"{MOST_ENTRIES:,} entries; use window, max_features or a dictionary"
        )
    out, done = local.like.new_zeros(total, columns), 0
    for chunk in _chunks(local, made, ordered, budget):
        n = sum(len(r) for r in chunk)
        out[done : done + n, : len(made.nodes)] = sweep(local, made.standing, chunk, last)
        done += n
    numbers = torch.cat([r.nodes for r in ordered])
    totals = torch.cat([r.values for r in ordered])
    check_sums(ordered, out, totals)
    return out, numbers, totals


def _chunks(local: FrozenRecurrence, made: Placed, rows: Sequence[Rows], budget: int) -> list[list[Rows]]:
    """Groups that go together: as many rows as the budget allows, few steps where nodes stop everything."""
    width = sum(write.size for write in local.network.writes)
    width += max(sum(s.size for stage in block.stages for s in stage.slots) for block in local.network.blocks)
    each = local.like.element_size() * (2 * width * (local.steps + 2 * local.lag) + len(made.nodes))
    most = max(1, budget // each)
    stops = len(made.standing.cut) + 1 >= len(local.order)
    chunks, held = list[list[Rows]](), 0
    for group in (part for r in rows for part in r.split(most)):
        apart = stops and chunks and chunks[-1][-1].parts and not group.parts
        if not chunks or held + len(group) > most or apart or (stops and _far(chunks[-1][0], group)):
            chunks.append([])
            held = 0
        chunks[-1].append(group)
        held += len(group)
    return chunks


def _far(a: Rows, b: Rows) -> bool:
    """Whether two targets are too far apart to go together where a sweep ends a step behind its last one."""
    return not a.parts and not b.parts and abs(a.step - b.step) > 3


def check_sums(rows: Sequence[Rows], effects: Effects, totals: Float[Tensor, " target"]) -> None:
    """Whether every row adds up to its target. Raises UnsupportedModel naming one that does not."""
    # A few rows at a time: the matrix is what fills the memory.
    largest = torch.cat([some.abs().amax(1).double() for some in effects.split(256)])
    gap = (torch.cat([some.double().sum(1) for some in effects.split(256)]) - totals.double()).abs()
    gap = gap / torch.maximum(totals.double().abs(), largest).clamp(min=1e-30)
    worst = int(gap.argmax())
    if not float(gap[worst]) <= TOLERANCE:
        group = next(
            r for r, end in zip(rows, torch.tensor([len(r) for r in rows]).cumsum(0), strict=True) if worst < end
        )
        raise UnsupportedModel(
            f"the effects on a target at {group.write or 'the read-out'}, step {group.step}, add up to "
            f"{float(effects[worst].double().sum()):.6g}, and it is {float(totals[worst]):.6g}: relative gap "
            f"{float(gap[worst]):.1e}, expected at most {TOLERANCE:.0e}; load the model in float32 or float64"
        )


def _final_node(local: FrozenRecurrence, final: Final) -> FeatureNode:
    """Outputs stand behind everything; a direction where its write is computed, beside that write's nodes."""
    if final.site == "logits":
        stage, layer = local.last_stage, local.network.readout.layer
    else:
        name = final.site.removeprefix("state.")
        stage, layer = local.stage_of(name, final.step), local.block_of(name).layer
    return FeatureNode(final.name, final.kind, layer, final.site, final.step, final.index, final.shown, stage)
