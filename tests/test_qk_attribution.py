"""Attention scores by pairs against the model's own scores and the literal formula; edges split by heads."""

import functools
import math
from dataclasses import replace

import pandas.testing
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.gptj import modeling_gptj

import circuitkit as ck
from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.dictionaries.sites import activations
from circuitkit.dictionaries.sparse_coder import SparseCoder
from circuitkit.errors import OptionError, UnsupportedModel
from circuitkit.features.attribution import attribution_graph
from circuitkit.features.explore import Table
from circuitkit.features.frozen import FrozenAttention
from circuitkit.features.head_loadings import head_loadings
from circuitkit.features.local import Stage
from circuitkit.features.methods import FEATURE_METHODS
from circuitkit.features.qk import qk_attribution
from circuitkit.features.replace import local_model
from circuitkit.features.score_probe import _Softmax
from circuitkit.features.scores import frozen_score
from circuitkit.features.sweep import pull
from circuitkit.features.targets import AttentionScore, Latent, final_targets, with_places
from circuitkit.models.hooks import hooked
from circuitkit.models.native import _rotate
from circuitkit.models.wiring import Port
from circuitkit.testing import tiny_model
from tests.families import build, every_family
from tests.test_attribution_graphs import (
    MODELS,
    SETS,
    at,
    in_float64,
    random_coder,
    saes,
    state,
    tokens_of,
    transcoders,
)


@pytest.fixture
def softmax_inputs(monkeypatch):
    """Everything that a softmax of four axes is given, in order of calls."""
    seen = []

    softmax = torch.Tensor.softmax  # that of ``torch.nn.functional`` calls it

    @functools.wraps(softmax)
    def spied(x, *args, **kwargs):
        if x.dim() == 4:
            seen.append(x.detach().clone())
        return softmax(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "softmax", spied)
    return seen


def own_scores(model, tokens, seen, hooks=()):
    """What each layer's softmax is given in a run of the model, [layer, head, query, key], before a soft cap."""
    seen.clear()
    with torch.no_grad(), hooked(hooks):
        model._forward(model.module, tokens[None])
    found = torch.stack([x[0, ..., : len(tokens)] for x in seen])
    cap = getattr(
        getattr(getattr(model.module, "original_model", None), "config", None), "attn_logit_softcapping", None
    )
    return found if cap is None else torch.where(found.abs() < cap, cap * torch.atanh(found / cap), found)


class WideTorch:
    """torch, but for the name of a dtype."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def in_double(monkeypatch, family):
    """A model that computes in float64 throughout: norms and GPT-J's scores would go through float32."""
    module = build(family, dtype=torch.float64)
    for kind in {type(m) for m in module.modules() if type(m).__name__.endswith("RMSNorm")}:
        monkeypatch.setattr(kind, "forward", in_float64)
    monkeypatch.setattr(modeling_gptj, "torch", WideTorch())
    return ck.load(module)


@every_family
def test_scores_are_those_of_the_model_in_every_family(family, monkeypatch, softmax_inputs):
    model = in_double(monkeypatch, family)
    tokens, dictionaries = tokens_of(model, 5), saes(32, "attn-out", n=8) + transcoders(32, skip=True, n=8)
    own = own_scores(model, tokens, softmax_inputs)
    local = local_model(model, dictionaries, tokens)
    for layer, head, query, key in ((0, 0, 4, 2), (0, 3, 0, 0), (1, 1, 3, 3), (1, 2, 4, 1)):
        score = frozen_score(model, local, layer, head, query, key)
        want = float(own[layer, head, query, key])
        assert abs(score.product - want) <= 1e-9 * float(own[layer, head, query, : query + 1].abs().max())
        x = local.values[Site("resid-pre", layer)]
        for read in (score.query, score.key):
            torch.testing.assert_close(x[read.position] @ read.weight.T + read.constant, read.value)
    found = qk_attribution(model, dictionaries, tokens, layer=1, head=2, query=4, key=1)
    for total in (found.pairs.sum(), found.by_query.sum(), found.by_key.sum()):
        assert abs(float(total) - want) <= 1e-9 * float(found.pairs.abs().max())
    assert found.score.soft_cap == (50.0 if family == "Gemma2" else None)


@every_family
def test_the_form_is_the_models_for_any_query_and_key(family, monkeypatch, softmax_inputs):
    model = in_double(monkeypatch, family)
    tokens = tokens_of(model, 5)
    local = local_model(model, transcoders(32, n=8), tokens)
    score = frozen_score(model, local, 1, 2, 4, 1)
    reads = {model.graph.destination_nodes[s.first].slot: s for s in model.wiring.read_sites if s.block == 1}
    block, vectors, hooks = model.wiring.blocks[1], {}, []
    for i, slot in enumerate("qk"):
        vectors[slot] = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        norm = getattr(block.attn, f"{slot}_norm", None)
        port = reads[slot].port if norm is None else Port(norm)
        hooks.append((port, lambda y, v=vectors[slot]: v.repeat(y.shape[-1] // 8).expand_as(y)))
    want = float(own_scores(model, tokens, softmax_inputs, hooks)[1, 2, 4, 1])
    assert math.isclose(float(vectors["q"] @ score.form @ vectors["k"]), want, rel_tol=1e-9, abs_tol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("shape", ["rms", "grouped", "no norm"])
def test_pairs_are_products_of_what_was_written(shape):
    """With attention and MLP below behind dictionaries, only what is written at the two positions is there."""
    model, tokens = tiny_model(**MODELS[shape]), tokens_of(tiny_model())
    dictionaries = SETS["attention and transcoders"](8)
    found = qk_attribution(model, dictionaries, tokens, layer=1, head=1, query=5, key=2)
    local = local_model(model, dictionaries, tokens)
    config, block = model.module.config, model.module.blocks[1].attn
    x = local.values[Site("resid-pre", 1)]
    norm = next(r for r in model.wiring.read_sites if r.block == 1).norm
    scale = torch.ones(len(x)) if norm is None else torch.rsqrt(x.square().mean(1) + norm.eps)
    gain = 1 if norm is None else norm.weight
    W = {"q": block.projection("q")[0][1], "k": block.projection("k")[0][1 * config.n_kv // config.n_heads]}

    def turned(vector, slot, position):
        y = torch.zeros(1, len(x), 1, config.d_head, dtype=torch.float64)
        y[0, position, 0] = (vector * scale[position] * gain) @ W[slot]
        y = _rotate(y, config.rotary_dim) if config.positional_embedding_type == "rotary" else y
        return y[0, position, 0]

    written = {}
    for stage in (
        s for s in local.stages() if s.site.layer == 0 and s.site.kind in ("resid-pre", "attn-out", "mlp-out")
    ):
        for writes in (*stage.outer, *stage.inner):
            for i, (position, vector) in enumerate(zip(writes.positions.tolist(), writes.vectors, strict=True)):
                if not writes.shared:
                    written[writes.first + i] = position, vector
    columns = {node.name: i for i, node in enumerate(attribution_names(local))}
    checked = 0
    for i, a in enumerate(found.nodes):
        for j, b in enumerate(found.nodes):
            if a.kind == "bias" or b.kind == "bias":
                continue
            (p, u), (k, v) = written[columns[a.name]], written[columns[b.name]]
            want = turned(u, "q", 5) @ turned(v, "k", 2) / math.sqrt(config.d_head) if (p, k) == (5, 2) else 0.0
            assert math.isclose(float(found.pairs[i, j]), float(want), rel_tol=1e-9, abs_tol=1e-12)
            checked += want != 0
    assert checked > 50


def attribution_names(local):
    from circuitkit.features.attribution import named

    return [node for group in local.nodes for node in named(group, [0] * local.n_sources)]


@torch.no_grad()
def test_what_attention_moved_counts_for_where_it_came_from():
    model, tokens = tiny_model(), tokens_of(tiny_model())
    found = qk_attribution(model, transcoders(8), tokens, layer=1, head=0, query=6, key=4)
    local = local_model(model, transcoders(8), tokens)
    module, names = model.module, [node.name for node in found.nodes]
    first, second = module.blocks[0], module.blocks[1]
    x0, x1 = (local.values[Site("resid-pre", i)] for i in range(2))
    s0, s1 = (torch.rsqrt(x.square().mean(1) + 1e-5) for x in (x0, x1))
    stage = next(s for s in local.stages() if isinstance(s.before, FrozenAttention) and s.site.layer == 0)

    def at_position(token, position):
        e = module.embed.W_E[tokens[token]]
        moved = [stage.before.pattern[h, position, token] * (e * s0[token] * first.ln1.w) @ first.attn.W_V[h]
                 @ first.attn.W_O[h] for h in range(2)]  # fmt: skip
        return (sum(moved) + (e if token == position else 0)) * s1[position] * second.ln1.w

    for i in range(7):
        for j in range(5):
            q, k = at_position(i, 6) @ second.attn.W_Q[0], at_position(j, 4) @ second.attn.W_K[0]
            got = found.pairs[names.index(f"input@{i}"), names.index(f"input@{j}")]
            assert math.isclose(float(got), float(q @ k / 2), rel_tol=1e-9, abs_tol=1e-12)


@given(seed=st.integers(0, 99), length=st.integers(1, 10), what=st.sampled_from(sorted(SETS)))
@settings(max_examples=12, deadline=None)
def test_pairs_add_up_and_the_strongest_come_first(seed, length, what):
    model = tiny_model(seed=seed, n_layers=2)
    tokens = tokens_of(model, length, seed)
    found = qk_attribution(model, SETS[what](8), tokens, layer=1, head=seed % 2)
    largest = float(found.pairs.abs().max())
    assert abs(float(found.pairs.sum()) - found.score.product) <= 1e-9 * largest
    torch.testing.assert_close(found.by_query, found.pairs.sum(1))
    torch.testing.assert_close(found.by_key, found.pairs.sum(0))
    assert math.isclose(abs(found.top(1)[0].weight), largest)
    frame = found.to_pandas(10**6)
    assert len(frame) == int(found.pairs.count_nonzero()) and frame["weight"].abs().is_monotonic_decreasing
    assert math.isclose(frame["weight"].sum(), found.score.product, rel_tol=1e-6, abs_tol=1e-9 * largest)
    assert float(found.graph.remainder.abs().max()) <= 1e-9 * largest


def test_pairs_looked_through_in_pieces_are_the_same(monkeypatch):
    model = tiny_model()
    found = qk_attribution(model, SETS["everything"](8), tokens_of(model), layer=1, head=0)
    whole = found.to_pandas(30)
    monkeypatch.setattr("circuitkit.features.qk.AT_ONCE", 40)
    pandas.testing.assert_frame_equal(found.to_pandas(30), whole)


def test_the_most_attended_key_and_the_slope():
    model, tokens = tiny_model(), tokens_of(tiny_model())
    found = qk_attribution(model, transcoders(8), tokens, layer=1, head=0)
    patterns = []
    with torch.no_grad(), hooked([(model.wiring.patterns[1], lambda y: patterns.append(y[0, 0, 6]))]):
        model._forward(model.module, tokens[None])
    scores = patterns[0].log().requires_grad_()
    assert (found.score.query.position, found.score.key.position) == (6, int(scores.argmax()))
    (gradient,) = torch.autograd.grad(scores.softmax(0)[found.score.key.position], scores)
    assert math.isclose(found.slope, float(gradient[found.score.key.position]), rel_tol=1e-9)
    capped = replace(found, score=replace(found.score, soft_cap=2.0))
    product = torch.tensor(found.score.product, dtype=torch.float64, requires_grad=True)
    (of_cap,) = torch.autograd.grad(2 * torch.tanh(product / 2), product)
    assert math.isclose(capped.slope, found.slope * float(of_cap), rel_tol=1e-5)


def test_what_is_added_to_scores_belongs_to_no_pair(monkeypatch):
    """As ALiBi does: a penalty by distance."""
    model, tokens = tiny_model(), tokens_of(tiny_model())
    plain = qk_attribution(model, transcoders(8), tokens, layer=0, head=1, query=5, key=2)
    attn, at_each = model.module.blocks[0].attn, torch.arange(7, dtype=torch.float64)

    def far_is_less(x):
        slots = zip((attn.hook_q, attn.hook_k, attn.hook_v), map(attn.projection, "qkv"), strict=True)
        q, k, v = (hook(torch.einsum("btd,hde->bthe", x, w) + b) for hook, (w, b) in slots)
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / 2 - 0.5 * (at_each[:, None] - at_each)
        pattern = attn.hook_pattern(scores.masked_fill(scores.new_ones(7, 7).triu(1) > 0, -math.inf).softmax(-1))
        return (
            torch.einsum("bthe,hed->btd", attn.hook_z(torch.einsum("bhqk,bkhe->bqhe", pattern, v)), attn.W_O) + attn.b_O
        )

    monkeypatch.setattr(attn, "forward", far_is_less)
    found = qk_attribution(model, transcoders(8), tokens, layer=0, head=1, query=5, key=2)
    assert found.score.offset == -1.5 and plain.score.offset == 0
    torch.testing.assert_close(found.pairs, plain.pairs)
    assert found.score.attention != plain.score.attention


def test_two_layouts_of_one_model_agree():
    names = ("stories260k", "stories260k-tl")  # rotary positions on halves, and on adjacent pairs
    dictionaries = [replace(d, model="") for d in transcoders(64, 5, dtype=torch.float32, activation="topk", k=8)]
    one, other = (qk_attribution(ck.load(name), dictionaries, torch.arange(1, 16), layer=3, head=6) for name in names)
    assert math.isclose(one.score.product, other.score.product, rel_tol=1e-4)
    assert [node.name for node in one.nodes] == [node.name for node in other.nodes]
    gap = (one.pairs - other.pairs).abs().max() / one.pairs.abs().max()
    assert float(gap) < 1e-3


# ------------------------------------------------------------------------------------------------ scores as targets


@pytest.mark.parametrize("what", SETS)
def test_scores_as_targets(what):
    model, tokens = tiny_model(), tokens_of(tiny_model())
    dictionaries = SETS[what](8)
    found = qk_attribution(model, dictionaries, tokens, layer=1, head=1, query=5, key=2)
    targets = [AttentionScore(1, 1, 5, 2), AttentionScore(1, 1, 5, 0)]
    graph = attribution_graph(model, dictionaries, tokens, targets=targets)
    assert [node.kind for node in graph.nodes[-4:]] == ["score"] * 4 and len(graph._numbers) == len(graph)
    for side, weights in (("<q>@5", found.by_query), ("<k>@2", found.by_key)):
        name = f"score.a1.h1[5,2]{side}"
        row = int((graph.targets == graph.node(name)).nonzero())
        assert math.isclose(float(graph.totals[row]), found.score.product, rel_tol=1e-9)
        own = {node.name: float(w) for node, w in zip(found.nodes, weights, strict=True)}
        for i, node in enumerate(graph.nodes):
            assert math.isclose(float(graph.effects[row, i]), own.get(node.name, 0.0), abs_tol=1e-9)
        drawn = graph.to_networkx()
        assert drawn.out_degree(name) == 0 and drawn.in_degree(name) > 3
    assert float(graph.remainder.abs().max()) < 1e-9 and graph.prune().replacement_score > 0


def test_latents_of_the_stream_that_attention_reads_are_in_the_row():
    model, tokens = tiny_model(), tokens_of(tiny_model())
    graph = attribution_graph(model, saes(8, "resid-pre")[1:], tokens, targets=[AttentionScore(1, 0, 5, 2)])
    assert {node.kind for node in graph.nodes if graph.effect(node.name, "score.a1.h0[5,2]<k>@2")} <= {
        "latent", "error", "bias"}  # fmt: skip
    assert any(graph.effect(n.name, "score.a1.h0[5,2]<k>@2") for n in graph.nodes if n.name.startswith("r1.f"))


def test_hierarchical_and_capped_graphs_of_scores():
    model, tokens = tiny_model(), tokens_of(tiny_model())
    target = [AttentionScore(1, 0)]
    whole = attribution_graph(model, transcoders(8), tokens, targets=target)
    fewer = attribution_graph(model, transcoders(8), tokens, targets=target, hierarchical=True, tau=0.3)
    capped = attribution_graph(model, transcoders(8), tokens, targets=target, max_features=3)
    assert 0 < int(fewer.kind("latent").sum()) < int(whole.kind("latent").sum())
    assert int(capped.kind("latent").sum()) == 3


# ------------------------------------------------------------------------------------------------- heads on edges


def with_heads(local, kept):
    """The frozen model with the patterns of all other heads set to zero."""

    def own(stage):
        if not isinstance(stage.before, FrozenAttention):
            return stage
        mask = torch.tensor([(stage.site.layer, h) in kept for h in range(len(stage.before.pattern))])
        return replace(stage, before=replace(stage.before, pattern=stage.before.pattern * mask[:, None, None]))

    steps = (s if isinstance(s, Stage) else tuple(tuple(map(own, component)) for component in s) for s in local.steps)
    return replace(local, steps=tuple(steps))


@pytest.mark.parametrize("what", SETS)
@pytest.mark.parametrize("shape", ["rms", "grouped", "both ways"])
def test_parts_of_edges_are_what_is_left_when_heads_are_silenced(what, shape):
    model, tokens = tiny_model(**MODELS[shape]), tokens_of(tiny_model())
    config = model.module.config
    dictionaries = SETS[what](8, config.n_heads * config.d_head)
    targets = [3, AttentionScore(1, 1, 5, 2)]
    graph = attribution_graph(model, dictionaries, tokens, targets=targets)
    found = head_loadings(model, dictionaries, graph, targets=targets)
    assert len(found) == graph.n_edges
    torch.testing.assert_close(found.direct + found.only.sum(1) + found.remainder, found.effects)
    local = with_places(local_model(model, dictionaries, tokens), targets)
    finals = final_targets(model, local, targets)
    table = Table.of(local, [final.reads for final in finals])
    constants = torch.cat([r.constants for r in table.reads])
    biases = torch.cat([torch.full((len(r),), local.bias_column(r.site)) for r in table.reads])
    columns = {node.name: i for i, node in enumerate(attribution_names(local))}
    columns |= {node.name: local.n_sources + i for i, node in enumerate(graph.nodes[-3:])}
    row_of = {number: i for i, number in enumerate(table.numbers.tolist())}
    rows = torch.tensor([row_of[columns[name]] for name in found.targets])
    sources = torch.tensor([columns[name] for name in found.sources])
    none = pull(with_heads(local, set()), table.reads)[rows, sources]
    torch.testing.assert_close(found.direct, none + constants[rows] * (biases[rows] == sources), rtol=1e-9, atol=1e-10)
    heads = [(layer, head) for layer in range(config.n_layers) for head in range(config.n_heads)]
    assert found.heads == tuple(f"a{layer}.h{head}" for layer, head in heads)
    for i, head in enumerate(heads):
        one = pull(with_heads(local, {head}), table.reads)[rows, sources]
        torch.testing.assert_close(found.only[:, i], one - none, rtol=1e-9, atol=1e-10)


def test_loadings_of_a_pruned_graph_as_a_table():
    model, tokens = tiny_model(), tokens_of(tiny_model())
    dictionaries = transcoders(8)
    first = attribution_graph(model, dictionaries, tokens)
    latent = next(node for node in first.nodes if node.name.startswith("m1.f"))
    targets = [3, Latent(Site("mlp-in", 1), latent.position, latent.index)]
    graph = attribution_graph(model, dictionaries, tokens, targets=targets).prune(0.5, 0.8)
    frame = head_loadings(model, dictionaries, graph, targets=targets).to_pandas()
    assert len(frame) == graph.n_edges and frame["effect"].abs().is_monotonic_decreasing
    assert list(frame.columns) == ["source", "target", "effect", "direct", "a0.h0", "a0.h1", "a1.h0", "a1.h1",
                                   "remainder"]  # fmt: skip
    for row in frame.itertuples():
        assert math.isclose(row.effect, graph.effect(row.source, row.target), rel_tol=1e-9)
    with pytest.raises(OptionError, match="pass what the graph was made with"):
        head_loadings(model, dictionaries, graph, targets=[4])
    with pytest.raises(OptionError, match="pass what the graph was made with"):
        head_loadings(tiny_model(seed=1), dictionaries, graph, targets=targets)


# ------------------------------------------------------------------------------------- He et al.'s tracing, for real


def letters_before(model, generator):
    """Latents of layer 0's attention output: latent t is the mean of what is written behind letter t."""
    tokens = torch.randint(26, (2000, 8), generator=generator)
    site = Site("attn-out", 0)
    written, before = activations(model, site, tokens)[:, 1:].flatten(0, 1), tokens[:, :-1].flatten()
    coder = SparseCoder(64, 26, 64, activation="topk", k=1, subtract_b_dec=True).requires_grad_(False)
    coder.b_dec[0] = written.mean(0)
    means = torch.stack([written[before == letter].mean(0) for letter in range(26)]) - coder.b_dec[0]
    coder.W_dec[0] = torch.nn.functional.normalize(means, dim=1)
    coder.W_enc.copy_(coder.W_dec[0].T)
    return Dictionary(coder, site, (site,), model.name)


def test_an_induction_score_is_traced_to_the_previous_token_head():
    model, generator = ck.load("induction/trained"), torch.Generator().manual_seed(0)
    dictionary = letters_before(model, generator)
    shares = []
    for _ in range(20):
        letters = torch.randperm(26, generator=generator)[:7]
        place = int(torch.randint(6, (1,), generator=generator))
        letter = int(letters[place])
        tokens = torch.cat((letters, letters[place : place + 1]))
        found = qk_attribution(model, [dictionary], tokens, layer=1, head=0, key=place + 1)
        top = found.top(1)[0]
        assert (top.query.name, top.key.name) == ("input@7", f"a0.f{letter}@{place + 1}")
        shares.append(top.weight / found.score.product)
    assert 0.7 < sum(shares) / len(shares) < 1.3
    target = AttentionScore(1, 0, key=place + 1)
    graph = attribution_graph(model, [dictionary], tokens, targets=[target])
    key = f"score.a1.h0[7,{place + 1}]<k>@{place + 1}"
    into = {node.name: graph.effect(node.name, key) for node in graph.nodes}
    assert max(into, key=into.get) == f"a0.f{letter}@{place + 1}"
    into = {node.name: graph.effect(node.name, f"a0.f{letter}@{place + 1}") for node in graph.nodes}
    assert max(into, key=into.get) == f"input@{place}"
    loadings = head_loadings(model, [dictionary], graph, targets=[target]).to_pandas()
    edge = loadings[(loadings.source == f"input@{place}") & (loadings.target == f"a0.f{letter}@{place + 1}")].iloc[0]
    assert math.isclose(edge["a0.h0"], edge["effect"], rel_tol=1e-4)


# ---------------------------------------------------------------------------------------------------------- manners


def test_bfloat16_models_are_attributed_in_float32():
    wide, narrow = (tiny_model(dtype=dtype, scale=0.3) for dtype in (torch.float32, torch.bfloat16))
    dictionaries = [at("mlp-in", 0, random_coder(8, dtype=torch.float32), [Site("mlp-out", 0)])]
    one, other = (qk_attribution(m, dictionaries, tokens_of(m), layer=1, head=0, key=2) for m in (wide, narrow))
    assert other.queries.dtype == torch.float32
    assert abs(float(other.by_query.sum()) - other.score.product) <= 1e-4 * float(other.by_query.abs().max())
    assert abs(one.score.product - other.score.product) < 0.05 * float(one.pairs.abs().max())


def test_the_model_is_left_as_found_also_after_an_error():
    model, tokens = tiny_model(), tokens_of(tiny_model())
    before = state(model.module)
    qk_attribution(model, transcoders(8), tokens, layer=1, head=0)
    with pytest.raises(OptionError):
        qk_attribution(model, transcoders(8), tokens, layer=1, head=0, query=2, key=3)
    assert state(model.module) == before


def test_by_name_and_drawn():
    model, tokens = tiny_model(), tokens_of(tiny_model())
    found = FEATURE_METHODS["qk-attribution"](model, transcoders(8), tokens, layer=1, head=0)
    figure = found.plot(6)
    assert figure.data[0].z.size >= 6 and "a1.h0" in figure.layout.title.text
    assert figure.layout.xaxis.title.text and figure.layout.yaxis.title.text
    assert abs(figure.data[0].z).max() == pytest.approx(abs(found.top(1)[0].weight))
    assert found.graph.nodes[-1].kind == "score" and "a1.h0" in repr(found)


BAD = {
    "a layer that is not there": ({"layer": 2, "head": 0}, "layers 0 to 1"),
    "a head that is not there": ({"layer": 1, "head": 2}, "2 heads"),
    "a query that is not there": ({"layer": 1, "head": 0, "query": 7}, "query = 7"),
    "a key that is not there": ({"layer": 1, "head": 0, "key": -8}, "key = -8"),
    "a key that comes later": ({"layer": 1, "head": 0, "query": 2, "key": 3}, "does not see"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what):
    model = tiny_model()
    options, message = BAD[what]
    with pytest.raises(OptionError, match=message):
        qk_attribution(model, transcoders(8), tokens_of(model), **options)
    with pytest.raises(OptionError, match=message):
        attribution_graph(model, transcoders(8), tokens_of(model), targets=[AttentionScore(**options)])
    with pytest.raises(OptionError, match="n = 0"):
        qk_attribution(model, transcoders(8), tokens_of(model), layer=1, head=0).top(0)


def test_keys_outside_a_window_are_refused():
    model = ck.load(build("Mistral", dtype=torch.float64))
    local = local_model(model, transcoders(32, n=8, dtype=torch.float64), tokens_of(model, 8))
    frozen_score(model, local, 1, 0, 7, 5)
    with pytest.raises(OptionError, match="does not see"):
        frozen_score(model, local, 1, 0, 7, 1)


def test_attention_that_is_not_a_product_of_its_query_and_key_is_refused(monkeypatch):
    model, tokens = tiny_model(), tokens_of(tiny_model())
    local = local_model(model, transcoders(8), tokens)
    monkeypatch.setattr(model.module.blocks[1].attn.hook_q, "forward", lambda y: y.square())
    with pytest.raises(UnsupportedModel, match="the q of layer 1"):
        frozen_score(model, local, 1, 0)
    monkeypatch.undo()
    monkeypatch.setattr(torch.Tensor, "softmax", lambda s, dim: (e := (0.5 * s).exp()) / e.sum(dim, keepdim=True))
    with pytest.raises(UnsupportedModel, match="without a softmax"):
        frozen_score(model, local, 1, 0)
    assert _Softmax().seen is None
