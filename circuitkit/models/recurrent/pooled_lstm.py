"""Two LSTMs and a read-out that pools over all steps: the architecture of textgenrnn (Woolf 2017).

    u(t)   = [embedding(t), h1(t), h2(t)]
    p(t)   = softmax over steps of  w . u(t)
    output = W sum over t of p(t) u(t) + b            one output for the window; every step shows the same

It is no chain (the pooling reads three layers), so its `Network` is written out here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuitkit.models.recurrent.cells.base import Place
from circuitkit.models.recurrent.cells.lstm import lstm
from circuitkit.models.recurrent.parts import Block, Link, Network, See, Slot, Stage, Write


class PooledLSTM(nn.Module):
    """An embedding, two LSTMs, attention pooling over the window, a linear read-out.

    Args:
        n_tokens: size of the vocabulary.
        width: numbers of the embedding.
        hidden: units of each LSTM.

    >>> PooledLSTM(5, width=2, hidden=3)(torch.zeros(1, 4, dtype=torch.long)).shape
    torch.Size([1, 4, 5])
    """

    def __init__(self, n_tokens: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_tokens, width)
        self.rnn1 = nn.LSTM(width, hidden, batch_first=True)
        self.rnn2 = nn.LSTM(hidden, hidden, batch_first=True)
        self.attention = nn.Linear(width + 2 * hidden, 1, bias=False)
        self.readout = nn.Linear(width + 2 * hidden, n_tokens)

    def forward(self, ids: Int[Tensor, "batch step"]) -> Float[Tensor, "batch step out"]:
        """Logits of the token that follows the window, the same at every step."""
        x = self.embedding(ids)
        first, _ = self.rnn1(x)
        second, _ = self.rnn2(first)
        every = torch.cat((x, first, second), -1)
        pooled = (self.attention(every).softmax(1) * every).sum(1, keepdim=True)
        return self.readout(pooled).expand(-1, ids.shape[1], -1)  # type: ignore[no-any-return]


def pooled_network(module: PooledLSTM) -> Network:
    """The layers as data: two LSTMs, and a pooling that sees all steps at once.

    The pooling reads each of its sources twice: a ``score``, one number per step, and the values it mixes. It writes
    ``x``, ``first`` and ``second``: a unit's number follows, and ``h1`` and 8 would be the name of ``h`` and 18.
    """
    x = Write("input", 1, module.embedding.embedding_dim, kind="input")
    first = lstm(module.rnn1, Place(0, (x,)))
    h1 = _named(first.blocks, first.features[0])
    second = lstm(module.rnn2, Place(1, (h1,)))
    h2 = _named(second.blocks, second.features[0])
    pool = _pooling(module, 2, {"x": x, "first": h1, "second": h2})
    return Network(x, (*first.blocks, *second.blocks, pool), tuple(write.name for write in pool.writes))


def _named(blocks: tuple[Block, ...], name: str) -> Write:
    return next(write for block in blocks for write in block.writes if write.name == name)


def _pooling(module: PooledLSTM, layer: int, sources: Mapping[str, Write]) -> Block:
    stem, first = f"l{layer}", 0
    writes = {key: Write(f"{stem}.{key}", w.n, w.width) for key, w in sources.items()}
    links: list[Link] = []
    for key, source in sources.items():
        columns = slice(first, first + source.size)
        links += [
            Link(source.name, ("score",), _columns(module, columns)),
            Link(source.name, (f"value_{key}",)),
        ]
        first += source.size
    slots = (
        Slot("score", 1, feeds_all=tuple(write.name for write in writes.values())),
        *(Slot(f"value_{key}", w.n, w.width, feeds=(w.name,)) for key, w in writes.items()),
    )
    sites = ("weight", *writes)
    step = partial(_pool, {key: write.name for key, write in writes.items()})
    return Block(layer, (Stage(slots, tuple(writes.values()), tuple(links), step, sites),), across=True, stem=stem)


def _columns(module: PooledLSTM, columns: slice) -> Callable[[], Tensor]:
    return lambda: module.attention.weight[:, columns]


def _pool(names: Mapping[str, str], pre: Mapping[str, Tensor], see: See) -> dict[str, Tensor]:
    weight = see("weight", pre["score"].softmax(-2))
    made = {}
    for key, name in names.items():
        value = pre[f"value_{key}"]
        made[name] = see(key, (weight * value).sum(-2, keepdim=True).expand_as(value))
    return made
