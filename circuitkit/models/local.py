"""What one block's own nonlinearity makes of edited reads, exactly; nothing behind what it writes is computed.

    change(u -> v) = w(clean) - w(clean, with v's copy of the stream x_v replaced by x_v - (a_u(clean) - a_u(corrupt)))

w is what the writers that v feeds hand on: a head's z, an MLP's output. Heads are independent given their queries, keys
and values, so one pass of a block edits the same slot of all its heads at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.errors import UnsupportedModel
from circuitkit.functional.attribution import edge_scores, pull_back
from circuitkit.functional.norms import at_least_float32
from circuitkit.models.hooked import Model, Run
from circuitkit.models.hooks import Hook, keeper
from circuitkit.models.wiring import Port, ReadSite, WriteSite


def inner_sites(model: Model) -> Iterator[tuple[ReadSite, WriteSite]]:
    """Every read site inside a block that some writer reaches, with the write site that it feeds."""
    wiring = model.wiring
    for site in wiring.read_sites:
        fed = [w for w in wiring.write_sites if wiring.graph.feeds[site.columns, w.rows].any()]
        if fed and wiring.writes_before(site):
            yield site, fed[0]


def moved_writes(
    model: Model, run: Run, site: ReadSite, written: WriteSite, delta: Float[Tensor, "edit batch pos d"]
) -> Float[Tensor, "edit batch pos node width"]:
    """What the readers of a site change in what they feed when all of them read the stream minus ``delta``."""
    shape = (len(delta) + 1, run.batch)
    streams: dict[Port, Tensor] = {}

    def edit(y: Tensor) -> Tensor:
        x = at_least_float32(streams[site.stream]).unflatten(0, shape)
        made = _read_together(site, torch.cat((x[:1], x[1:] - delta)))
        return (y + (made - made[:1]).reshape(y.shape)).to(y.dtype)

    hooks: list[Hook] = [(site.stream, keeper(streams, site.stream)), (site.port, edit)]
    # The unedited run is the first copy of the same pass, so that both round alike.
    w = _written(model, run, site.block, written, hooks, len(delta) + 1)
    return w[:1] - w[1:]


def replaced_reads(
    model: Model, run: Run, site: ReadSite, written: WriteSite, values: Float[Tensor, "edit batch pos node width"]
) -> Float[Tensor, "edit batch pos node width"]:
    """What changes in what a site's readers feed when they make ``values`` of the stream: other queries, say."""

    def edit(y: Tensor) -> Tensor:
        return torch.cat((y[: run.batch], values.reshape(-1, *y.shape[1:]).to(y.dtype)))

    w = _written(model, run, site.block, written, [(site.port, edit)], len(values) + 1)
    return w[:1] - w[1:]


def _written(
    model: Model, run: Run, block: int, written: WriteSite, hooks: Sequence[Hook], copies: int
) -> Float[Tensor, "copy batch pos node width"]:
    """What passes a write site when a block sees several copies of a run, which the hooks tell apart."""
    rows = torch.arange(run.batch, device=run.inputs[0].device).repeat(copies)
    w = model.replay_block(run, block, run.inputs[block][rows], rows, hooks, written.port)
    return at_least_float32(w).reshape(copies, run.batch, w.shape[1], written.n, -1)


def _read_together(site: ReadSite, stream: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch all"]:
    """What all readers of a site make of one and the same stream, side by side; the norm is taken once."""
    normed = stream if site.norm is None else site.norm(stream)
    if site.weight is None:
        return normed
    y = normed @ site.weight.to(normed.dtype).transpose(0, 1).flatten(1)
    return y if site.bias is None else y + site.bias.to(y.dtype).flatten()


def local_scores(
    model: Model,
    run: Run,
    site: ReadSite,
    written: WriteSite,
    slopes: Float[Tensor, "step batch pos node width"],
    delta: Float[Tensor, "src batch pos d"],
    at_once: int,
) -> Float[Tensor, "step batch src dst"]:
    """Scores of all edges into a site: the exact change of what its readers feed, times what that change is worth.

    Args:
        slopes: gradients of the metric at what is written, several kinds at once if need be.
        delta: clean minus corrupt writes, of all writers.
        at_once: how many writers are tried in one pass of the block.
    """
    delta = delta[: model.wiring.writes_before(site)]
    feeds = model.graph.feeds[site.columns, written.rows].to(delta)
    slopes = at_least_float32(slopes)
    parts = []
    for some in delta.split(at_once):
        change = moved_writes(model, run, site, written, some)
        worth = torch.einsum("ebtnw,sbtnw->sben", change, slopes)
        # An edit by nothing changes nothing, although rounding may differ between the rows of a pass.
        worth = worth * (some != 0).flatten(2).any(-1).T[None, :, :, None]
        parts.append(worth @ feeds.T)
    return torch.cat(parts, 2)


def linear_scores(
    model: Model,
    site: ReadSite,
    output: Tensor,
    stream: Float[Tensor, "batch pos d"],
    slope: Tensor,
    delta: Float[Tensor, "src batch pos d"],
) -> Float[Tensor, "batch src dst"]:
    """First-order scores of all edges into a site, from the gradient at what its readers made of the stream."""
    delta = delta[: model.wiring.writes_before(site)]
    y, g = (t.reshape(1, *stream.shape[:2], site.n, -1) for t in (output, slope))
    gradient = delta.new_empty(site.n, *delta.shape[1:])
    pull_back(g, y, stream[None], site.weight, site.bias, site.norm, gradient)
    return edge_scores(delta, gradient)


def check_heads_are_independent(model: Model, run: Run) -> None:
    """Test by experiment, on the first reader of every site, that readers change only the writers that they feed.

    Raises:
        UnsupportedModel: if not, as where a norm runs over the queries of all heads together.
    """
    one = run.rows(slice(0, 1))
    for site, written in inner_sites(model):
        if int(model.graph.feeds[site.columns, written.rows].sum(0).max()) > 1:
            raise UnsupportedModel(
                f"in layer {site.block} of {model.name}, several heads feed one writer "
                f"({model.graph.sources[written.first]}), so they cannot be edited together; use 'exact', 'eap' or "
                "'eap-ig'"
            )
        others = ~model.graph.feeds[site.first, written.rows].to(run.inputs[0].device)

        def edit(y: Tensor, n: int = site.n) -> Tensor:
            # A factor, not noise: a norm of each head by itself takes it away, a norm of all of them does not.
            nodes = y.reshape(*y.shape[:2], n, -1).clone()
            nodes[1, :, 0] *= 16
            return nodes.reshape(y.shape)

        w = _written(model, one, site.block, written, [(site.port, edit)], 2)
        change = (w[0] - w[1]).abs().amax((0, 1, 3))
        if float((change * others).max()) > 1e-2 * float(w.abs().max()):
            raise UnsupportedModel(
                f"in layer {site.block} of {model.name}, what one head makes of its input "
                f"({model.graph.destinations[site.first]}) changes what other heads write, so they cannot be edited "
                "together; use 'exact', 'eap' or 'eap-ig'"
            )
