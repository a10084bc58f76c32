"""What a model does under edits: gradients at every reader and any port, single edges, the inside of one block.

All start from a recorded run and replay only the blocks that an edit can reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitkit.errors import MetricError
from circuitkit.functional.attribution import pull_back
from circuitkit.functional.norms import at_least_float32
from circuitkit.models.hooked import Model, Run
from circuitkit.models.hooks import Hook, keeper
from circuitkit.models.wiring import Port, ReadSite
from circuitkit.shapes import Logits

Objective = Callable[[Logits], Float[Tensor, ""]]


def reader_gradients(
    model: Model,
    run: Run,
    x: Float[Tensor, "step batch pos d"],
    positions: Int[Tensor, "batch answer"],
    objective: Objective,
    rules: Sequence[Hook] = (),
    *,
    frozen_norms: bool = False,
    watch: Sequence[Hook] = (),
) -> tuple[tuple[Tensor, ...], Iterator[tuple[slice, Float[Tensor, "node batch pos d"]]]]:
    """Gradient of an objective at every reader's private copy of the stream, summed over steps, block by block.

    Args:
        run: a run of inputs of the same lengths, whose calls are repeated.
        x: the stream before the first block at each step (one step: the clean input; several: a path).
        positions: where logits are read.
        objective: from logits ``[step * batch, answer, vocab]`` to one number.
        rules: hooks that change how gradients flow (not what is computed), attached before all others.
        frozen_norms: treat the scale of the readers' norms as a constant.
        watch: hooks that only look, attached after all others, so that they see the readers' own copies.

    Returns:
        what the writers wrote at the last step; and, from the last block to the first, columns of the edge matrix with
        the gradients of those readers (in one buffer: used before the next is asked for).

    Raises:
        MetricError: if the objective does not depend on the logits.
    """
    steps, batch = x.shape[:2]
    rows = torch.arange(batch, device=x.device).repeat(steps)
    seen: dict[Port, Tensor] = {}
    written: dict[int, Tensor] = {0: x.flatten(0, 1)}
    sites = [site for site in model.wiring.read_sites if site.block < len(model.wiring.blocks)]
    start = x.flatten(0, 1).detach().requires_grad_(True)
    with model.quiet(), torch.enable_grad():
        hooks: list[Hook] = [*rules]
        hooks += [(port, keeper(seen, port)) for port in dict.fromkeys(site.stream for site in sites)]
        hooks += [(site.port, own_copy(seen, site.port)) for site in sites]
        hooks += [(s.port, keeper(written, i)) for i, s in enumerate(model.wiring.write_sites) if s.block >= 0]
        last = model.replay(run, 0, start, rows, [*hooks, *watch])
        value = objective(model.logits(last, positions.repeat(steps, 1)))
        if not value.requires_grad:
            raise MetricError("the metric does not depend on the logits, so it has no gradient")
        wanted = [*(seen[site.port] for site in sites), last]
        gradients = torch.autograd.grad(value, wanted, allow_unused=True)
    final = model.wiring.read_sites[-1]
    found = {site: (seen[site.port], seen[site.stream]) for site in sites} | {final: (last, last)}
    slopes = dict(zip(found, gradients, strict=True))
    writes = tuple(
        site.kept(written[i].detach()[-batch:].reshape(batch, x.shape[2], site.n, -1))
        for i, site in enumerate(model.wiring.write_sites)
    )
    return writes, pulled(found, slopes, (steps, batch, x.shape[2]), frozen_norms)


def pulled(
    found: dict[ReadSite, tuple[Tensor, Tensor]],
    slopes: Mapping[ReadSite, Tensor | None],
    shape: tuple[int, int, int],
    frozen_norms: bool,
) -> Iterator[tuple[slice, Float[Tensor, "node batch pos d"]]]:
    """Gradients at the readers' private copies of the stream, summed over steps, from those at their projections.

    Args:
        found: what each site's readers made of the stream, and the stream, ``[step * batch, pos, ...]``.
        slopes: the gradient at each site's tensor; None where nothing depends on it.
        shape: steps, batch and positions.
        frozen_norms: treat the scale of the readers' norms as a constant.
    """
    groups = list(_same_stream(list(found)[::-1]))
    most = max(group[-1].columns.stop - group[0].first for group in groups)
    like = found[groups[0][0]][1]
    buffer = like.new_empty(most, *shape[1:], like.shape[-1], dtype=at_least_float32(like[:0]).dtype)
    for group in groups:
        first = group[0].first
        pulled = buffer[: group[-1].columns.stop - first]
        for site in group:
            y, stream = (t.detach().reshape(*shape, -1) for t in found[site])
            gradient = slopes[site]
            slope = torch.zeros_like(y) if gradient is None else gradient.reshape(y.shape)
            slope, y = (t.unflatten(-1, (site.n, -1)) for t in (slope, y))
            mine = pulled[site.first - first :][: site.n]
            pull_back(slope, y, stream, site.weight, site.bias, site.norm, mine, frozen=frozen_norms)
        yield slice(first, group[-1].columns.stop), pulled


def gradients_at(
    model: Model,
    run: Run,
    x: Float[Tensor, "row pos d"],
    positions: Int[Tensor, "batch answer"],
    objective: Objective,
    ports: Sequence[Port],
    rules: Sequence[Hook] = (),
) -> list[tuple[Tensor, Tensor]]:
    """What passes some ports, and the gradient of an objective there, in one forward and one backward pass.

    Args:
        run: a run of inputs of the same lengths, whose calls are repeated.
        x: the stream before the first block.
        positions: where logits are read.
        objective: from logits ``[row, answer, vocab]`` to one number.
        ports: where; `Wiring.final` stands for the stream after the last block.
        rules: hooks that change how gradients flow.

    Returns:
        for each port the tensor and the gradient of its own copy, zero where the objective does not depend on it.

    Raises:
        MetricError: if the objective does not depend on the logits.
    """
    rows = torch.arange(len(x), device=x.device) % run.batch
    seen: dict[Port, Tensor] = {}
    with model.quiet(), torch.enable_grad():
        inner = [port for port in ports if port is not model.wiring.final]
        hooks: list[Hook] = [*rules, *((port, own_copy(seen, port)) for port in inner)]
        last = model.replay(run, 0, x.detach().requires_grad_(True), rows, hooks)
        seen[model.wiring.final] = last
        value = objective(model.logits(last, positions[rows]))
        if not value.requires_grad:
            raise MetricError("the metric does not depend on the logits, so it has no gradient")
        wanted = [seen[port] for port in ports]
        gradients = torch.autograd.grad(value, wanted, allow_unused=True)
    return [
        (tensor.detach(), torch.zeros_like(tensor) if slope is None else slope)
        for tensor, slope in zip(wanted, gradients, strict=True)
    ]


def _same_stream(sites: list[ReadSite]) -> Iterator[list[ReadSite]]:
    """Consecutive sites that read the same stream, so that their readers share one product; in order of columns."""
    for _, group in groupby(sites, key=lambda site: (site.block, id(site.stream.module))):
        yield sorted(group, key=lambda site: site.first)


def own_copy(seen: dict[Port, Tensor], port: Port) -> Callable[[Tensor], Tensor]:
    """Without a norm, or where parts share one, readers are handed the very same tensor; a view tells them apart."""

    def copy(x: Tensor) -> Tensor:
        seen[port] = x.view_as(x)
        return seen[port]

    return copy


@torch.no_grad()
def patch_edges(
    model: Model,
    run: Run,
    delta: Float[Tensor, "src batch pos d"],
    site: ReadSite,
    edges: Sequence[tuple[int, int]],
    positions: Int[Tensor, "batch answer"],
) -> tuple[Float[Tensor, "edge batch answer vocab"], Bool[Tensor, "edge batch"]]:
    """Logits with one edge corrupt at a time, for edges into readers of one site, on the batch axis.

    Args:
        run: the clean run.
        delta: clean minus corrupt writes of every writer.
        site: the site of the readers.
        edges: (row, column) pairs sorted by column.

    Returns:
        the logits, and where the edit changed what the reader made of its input at all; where it did not, the run is
        the clean one, although rounding may differ between batches of different size.
    """
    batch, n = run.batch, len(edges)
    src = torch.tensor([u for u, _ in edges], device=delta.device)
    rows = torch.arange(batch, device=delta.device).repeat(n)
    x = run.inputs[site.block].repeat(n, 1, 1)
    if site.block == len(model.wiring.blocks):
        last = at_least_float32(x) - delta[src].flatten(0, 1)
        logits = model.logits(last.to(x.dtype), positions.repeat(n, 1)).unflatten(0, (n, batch))
        return logits, (delta[src] != 0).flatten(2).any(-1)
    changed = torch.zeros(n, batch, dtype=torch.bool, device=x.device)
    streams: dict[Port, Tensor] = {}
    columns = torch.tensor([v - site.first for _, v in edges])

    def edit(y: Tensor) -> Tensor:
        out = y.clone().reshape(n * batch, y.shape[1], site.n, -1)
        stream = at_least_float32(streams[site.stream]).unflatten(0, (n, batch))
        for node in columns.unique().tolist():
            first, stop = _span(columns, node)
            private, mine = stream[first:stop], slice(node, node + 1)
            old = site.read(private[None], mine)[0]
            new = site.read((private - delta[src[first:stop]])[None], mine)[0]
            changed[first:stop] = (new != old).flatten(2).any(-1)
            out[first * batch : stop * batch, :, node] += (new - old).flatten(0, 1).to(out.dtype)
        return out.reshape(y.shape)

    hooks: list[Hook] = [(site.stream, keeper(streams, site.stream)), (site.port, edit)]
    last = model.replay(run, site.block, x, rows, hooks)
    return model.logits(last, positions.repeat(n, 1)).unflatten(0, (n, batch)), changed


def _span(sorted_values: Tensor, value: int) -> tuple[int, int]:
    where = (sorted_values == value).nonzero()
    return int(where[0]), int(where[-1]) + 1


def edge_chunks(model: Model, site: ReadSite, size: int) -> list[list[tuple[int, int]]]:
    """The possible edges into a site's readers, reader by reader, in groups of at most ``size``."""
    pairs = model.graph.mask[:, site.columns].T.nonzero().tolist()
    edges = [(src, dst + site.first) for dst, src in pairs]
    return [edges[i : i + size] for i in range(0, len(edges), size)]
