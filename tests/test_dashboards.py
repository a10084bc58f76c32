"""Dashboards against loops over every latent, text and token."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.dictionaries.sites import activations
from circuitkit.dictionaries.sparse_coder import SparseCoder
from circuitkit.errors import FormatError, OptionError
from circuitkit.exporters.feature_dashboards import read_dashboards, write_dashboards
from circuitkit.exporters.graph_json_schema import paired
from circuitkit.features import latent_passes
from circuitkit.features.dashboards import Dashboard, Example, Histogram, dashboards
from circuitkit.features.direct_logits import stream_vectors
from circuitkit.functional.text import visible
from circuitkit.models.base import load
from circuitkit.testing import tiny_model

TOKENS = torch.randint(0, 11, (9, 7), generator=torch.Generator().manual_seed(1))
LATENTS = (3, 0, 12, 15)


def dictionary(reads=("mlp-in", 1), writes=(("mlp-out", 1),), width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coder = SparseCoder(width, 16, width, n_out=len(writes)).double().requires_grad_(False)
    for p in coder.parameters():
        p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    coder.b_enc[15] = -1e6  # never active
    return Dictionary(coder, Site(*reads), tuple(Site(*site) for site in writes))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def boards(model):
    return dashboards(model, dictionary(), TOKENS, LATENTS, k=4, window=2, bins=5)


@pytest.fixture(scope="module")
def values(model):
    found = dictionary()
    return found.coder.encode(activations(model, found.read, TOKENS))


def test_top_examples_are_each_text_s_strongest_place(boards, values):
    for board, latent in zip(boards, LATENTS, strict=True):
        peaks = []
        for row in range(len(TOKENS)):
            acts = values[row, :, latent].tolist()
            if max(acts) > 0:
                peaks.append((max(acts), row, acts.index(max(acts))))
        peaks.sort(key=lambda peak: (-peak[0], peak[1]))
        assert board.latent == latent and [(e.row, e.position) for e in board.top] == [p[1:] for p in peaks[:4]]
        for example in board.top:
            start, end = max(0, example.position - 2), min(7, example.position + 3)
            assert example.tokens == tuple(TOKENS[example.row, start:end].tolist())
            assert example.activations == pytest.approx(values[example.row, start:end, latent].tolist())
            assert start + example.at == example.position and len(example.texts) == len(example.tokens)


def test_numbers_and_histogram(boards, values):
    for board, latent in zip(boards, LATENTS, strict=True):
        active = [a for row in values[..., latent].tolist() for a in row if a > 0]
        assert board.activation_frequency == len(active) / TOKENS.numel()
        assert (board.act_min, board.act_max) == ((min(active), max(active)) if active else (0.0, 0.0))
        assert sum(board.histogram.counts) == len(active) and len(board.histogram.edges) == 6
        if active:
            counts, edges = np.histogram(active, bins=5, range=(0, max(active)))
            assert board.histogram.counts == tuple(counts) and board.histogram.edges == pytest.approx(edges)


def test_a_latent_that_is_never_active(boards):
    board = boards[-1]
    assert (board.latent, board.activation_frequency, board.act_max, board.top) == (15, 0.0, 0.0, ())
    assert board.intervals == ()


def test_examples_of_intervals(model, boards, values):
    for board, latent in zip(boards[:3], LATENTS, strict=False):
        seen = set()
        for i, (name, examples) in enumerate(board.intervals):
            low, high = (board.act_max * share / 5 for share in (4 - i, 5 - i))
            assert name == f"{low:.3g} to {high:.3g}"
            inside = [row for row in range(9) if low < float(values[row, :, latent].max()) <= high]
            assert {e.row for e in examples} <= set(inside)
            assert len(examples) == min(len(inside), latent_passes.PER_INTERVAL)
            seen |= {e.row for e in examples}
        assert len(seen) == sum(len(examples) for _, examples in board.intervals)


def literal_effects(model, vector):
    """Effect on each logit, one at a time, by adding a small vector in front of the final norm with its scale held."""
    norm = model.wiring.final_norm
    weight = model.module.unembed.W_U.detach()
    out = []
    for t in range(weight.shape[1]):
        total = 0.0
        mean = sum(vector.tolist()) / len(vector) if norm.center else 0.0
        for i, x in enumerate(vector.tolist()):
            gain = 1.0 if norm.weight is None else float(norm.weight.detach()[i])
            total += (x - mean) * gain * float(weight[i, t])
        out.append(total)
    middle = sum(out) / len(out)
    return [x - middle for x in out]


@pytest.mark.parametrize("writes", [(("mlp-out", 1),), (("mlp-out", 0), ("mlp-out", 1))])
def test_logit_effects(writes):
    model = tiny_model()
    norm = model.wiring.final_norm
    if norm.weight is not None:
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 2, len(norm.weight)))
    found = dictionary(("mlp-in", writes[0][1]), writes)
    for board in dashboards(model, found, TOKENS, (3, 12)):
        wanted = literal_effects(model, found.coder.W_dec[:, board.latent].sum(0))
        order = sorted(range(len(wanted)), key=lambda t: -wanted[t])
        assert [text for text, _ in board.top_logits] == [f"{t} " for t in order[:10]]
        assert [value for _, value in board.top_logits] == pytest.approx([wanted[t] for t in order[:10]])
        assert [text for text, _ in board.bottom_logits] == [f"{t} " for t in reversed(order[-10:])]
        assert [value for _, value in board.bottom_logits] == pytest.approx([wanted[t] for t in reversed(order[-10:])])


def test_heads_go_through_their_output_map(model):
    found = dictionary(("z", 0), (("z", 0),))
    vectors = stream_vectors(model, found, torch.tensor([4]))
    W_O = model.module.blocks[0].attn.W_O
    assert torch.allclose(vectors[0], found.coder.W_dec[0, 4] @ W_O.flatten(0, 1))


def rounded(found):
    """Without the last digits, which matrix products of other sizes change."""
    if isinstance(found, float):
        return float(f"{found:.9g}")
    if isinstance(found, tuple):
        return tuple(map(rounded, found))
    return {key: rounded(part) for key, part in vars(found).items()} if hasattr(found, "__dict__") else found


@settings(max_examples=5, deadline=None)
@given(rows=st.integers(1, 9), seed=st.integers(0, 3))
def test_batches_change_nothing(model, rows, seed):
    whole = dashboards(model, dictionary(), TOKENS, LATENTS, seed=seed)
    budget = 12 * 16 * TOKENS.shape[1] * rows
    found = dashboards(model, dictionary(), TOKENS, LATENTS, seed=seed, budget=budget)
    assert rounded(found) == rounded(whole)
    one = dashboards(model, dictionary(), TOKENS, [LATENTS[1]], seed=seed, budget=1)
    assert rounded(one) == rounded((whole[1],))


def test_equal_activations_keep_the_earlier_text(model):
    same = TOKENS[:1].repeat(9, 1)
    for budget in (1, None):
        found = dashboards(model, dictionary(), same, (3,), k=3, budget=budget)[0]
        assert [e.row for e in found.top] == [0, 1, 2]


def test_one_token(model):
    found = dashboards(model, dictionary(), TOKENS[:1, :1], range(16), window=3)
    assert all(len(e.tokens) == 1 and e.at == 0 for board in found for e in board.top)


def test_recurrent_states():
    torch.manual_seed(0)
    model = load(torch.nn.GRU(2, 8, batch_first=True).double())
    found = dictionary(("state", 0, "l0.h"), (("state", 0, "l0.h"),))
    board = dashboards(model, found, torch.randn(4, 5, 2).double(), (3,))[0]
    assert board.site == "state.l0.h" and board.top_logits == () and board.top[0].tokens[0] == -1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latents": [16]}, "latent 16, expected 0 to 15"),
        ({"latents": [-1]}, "latent -1"),
        ({"k": 0}, "k = 0"),
        ({"bins": 0}, "bins = 0"),
        ({"window": -1}, "window = -1"),
        ({"tokens": TOKENS[:0]}, r"tokens \[0, 7\]"),
        ({"tokens": TOKENS[0]}, r"tokens \[7\]"),
        ({"dictionary": dictionary(width=5)}, "5 numbers"),
    ],
)
def test_bad_input(model, options, message):
    with pytest.raises(OptionError, match=message):
        dashboards(model, **{"dictionary": dictionary(), "tokens": TOKENS, **options})


def test_texts(model):
    found = dashboards(model, dictionary(), TOKENS, (3,), texts=[f"<{i}>" for i in range(11)])[0]
    example = found.top[0]
    assert example.texts == tuple(f"<{i}>" for i in example.tokens)


def test_files_come_back(boards, tmp_path):
    paths = write_dashboards(boards, tmp_path)
    assert sorted(p.name for p in paths) == sorted(f"{paired(1, latent)}.json" for latent in LATENTS)
    assert read_dashboards(tmp_path) == tuple(sorted(boards, key=lambda board: board.latent))
    data = json.loads(paths[0].read_text())
    assert {"index", "examples_quantiles", "top_logits", "bottom_logits", "act_min", "act_max", "quantile_values",
            "histogram", "activation_frequency"} <= set(data)  # fmt: skip
    for part in data["examples_quantiles"]:
        for example in part["examples"]:
            assert len(example["tokens"]) == len(example["tokens_acts_list"]) > example["train_token_ind"] >= 0
    # Without our own fields a file is still read.
    del data["circuitkit"]
    for part in data["examples_quantiles"]:
        for example in part["examples"]:
            del example["circuitkit"]
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / paths[0].name).write_text(json.dumps(data))
    other = read_dashboards(tmp_path / "foreign")[0]
    assert (other.latent, other.layer, other.act_max) == (boards[0].latent, 1, boards[0].act_max)
    assert other.histogram.counts == boards[0].histogram.counts and other.top[0].texts == boards[0].top[0].texts


NASTY = ["</script>", "a\x00b", "\ud800", "\u202eabc", 'say "hi"\\', "two\nlines", ""]


@pytest.mark.parametrize("text", NASTY)
def test_hostile_texts(text, tmp_path):
    example = Example((1,), (text,), (0.5,), 0, 0, 0)
    board = Dashboard(
        0, "mlp-in.0", 0, 0.5, 0.5, 0.5, (example, example), (("0 to 0.5", ()),), Histogram((0.0, 0.5), (1,)),
        ((text, 1.0),), (),
    )  # fmt: skip
    (path,) = write_dashboards([board], tmp_path)
    path.read_bytes().decode("ascii")
    shown = replace(example, texts=(visible(text),))
    assert read_dashboards(tmp_path)[0] == replace(board, top=(shown, shown), top_logits=((visible(text), 1.0),))
    found = json.loads(path.read_text())["examples_quantiles"][0]["examples"]
    assert [e["is_repeated_datapoint"] for e in found] == [False, True]
    assert text not in ("</script>",) or "</script>" not in board.plot().to_json()


def test_bad_files(boards, tmp_path):
    with pytest.raises(FormatError, match="folder of its own"):
        write_dashboards([boards[0], replace(boards[0], site="attn-out.1")], tmp_path)
    with pytest.raises(FormatError, match="has no dashboards"):
        read_dashboards(tmp_path)
    (path,) = write_dashboards(boards[:1], tmp_path)
    content = path.read_text()
    for bad in ("", content[:-20], "[]", "{}", content.replace('"index"', '"inde"'), content.replace("[0.0, ", "[")):
        path.write_text(bad)
        with pytest.raises(FormatError):
            read_dashboards(tmp_path)


def test_figure(boards):
    for board in boards:
        figure = board.plot()
        heights = [0 if n is None else n for n in figure.data[0].y]
        assert tuple(heights) == board.histogram.counts and len(figure.data[1].x) == 2 * min(10, 11)
        assert figure.layout.yaxis.title.text and figure.layout.xaxis2.title.text
        assert not any(math.isnan(x) for x in figure.data[1].x)
