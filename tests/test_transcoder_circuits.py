"""Paths through transcoders against enumeration and autograd; weights and de-embeddings against loops."""

import math
from collections import defaultdict

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitkit as ck
from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.dictionaries.sparse_coder import ACTIVATIONS, SparseCoder
from circuitkit.errors import OptionError, UnsupportedModel
from circuitkit.features.deembedding import deembedding
from circuitkit.features.frozen import FrozenNorm
from circuitkit.features.hierarchical import total_effects
from circuitkit.features.methods import FEATURE_METHODS
from circuitkit.features.qk import qk_attribution
from circuitkit.features.replace import local_model
from circuitkit.features.targets import Direction, Latent, final_targets
from circuitkit.features.transcoder_circuits import path_target, transcoder_circuits
from circuitkit.features.transcoder_paths import PathSteps
from circuitkit.features.weight_graph import weight_graph
from circuitkit.functional.norms import Norm
from circuitkit.testing import tiny_model
from tests.families import build, every_family
from tests.oracles.attribution_rows import LiteralRows
from tests.oracles.paths import LiteralPaths

ALL = 10**6


def transcoders(d, layers, *, n=6, seed=0, clt=False, **options):
    """Random ones, some of whose latents are active."""
    generator, made = torch.Generator().manual_seed(seed), []
    for i in range(layers):
        coder = SparseCoder(d, n, d, n_out=layers - i if clt else 1, **options).double().requires_grad_(False)
        for p in coder.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * (0.4 if p.dim() > 1 else 0.1))
        writes = tuple(Site("mlp-out", j) for j in range(i, layers if clt else i + 1))
        made.append(Dictionary(coder, Site("mlp-in", i), writes))
    return made


def tokens_of(model, n=3, seed=0):
    return torch.randint(model.d_vocab, (n,), generator=torch.Generator().manual_seed(seed))


def with_roots(paths):
    """Contribution of each path by its names, tokens and positions as one root."""
    found = defaultdict(float)
    for path in paths:
        names = (*path.names[:-1], f"root@{path.hops[-1].source}") if path.hops[-1].ends else path.names
        found[names] += path.contribution
    return found


def assert_same_paths(found, wanted):
    wanted = {names: value for names, value in wanted.items() if value != 0}
    scale = max(map(abs, wanted.values()))
    assert set(found) == set(wanted)
    assert max(abs(found[names] - value) for names, value in wanted.items()) < 1e-9 * scale


def assert_all_paths(model, dictionaries, tokens, *, depth, target=3):
    """The wide search equals the enumeration."""
    circuit = transcoder_circuits(model, dictionaries, tokens, target=target, depth=depth, beam=ALL)
    start = start_of(model, dictionaries, tokens, target)
    assert_same_paths(with_roots(circuit.paths), dict(LiteralPaths(model, dictionaries, tokens).paths(*start, depth)))
    return circuit


def start_of(model, dictionaries, tokens, target):
    """Vector, position and height at which the enumeration begins: a logit."""
    reads = path_target(model, local_model(model, dictionaries, tokens), target)[1]
    return reads.vectors[0], int(reads.positions[0]), 2 * len(model.wiring.blocks)


MODELS = {
    "rms": {},
    "grouped": {"n_heads": 4, "d_head": 2, "n_key_value_heads": 2, "positional_embedding_type": "rotary",
                "rotary_dim": 2, "rotary_adjacent_pairs": True},
    "no norm": {"normalization_type": None, "act_fn": "relu"},
    "both ways": {"attention_dir": "bidirectional"},
}  # fmt: skip
KINDS = {
    "transcoders": {},
    "skip": {"skip": True},
    "cross-layer": {"clt": True},
    "gated": {"activation": "gated"},
    "top k": {"activation": "topk", "k": 2},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", MODELS)
def test_a_wide_search_finds_every_path(shape, kind):
    model = tiny_model(**MODELS[shape])
    assert_all_paths(model, transcoders(8, 2, n=4, **KINDS[kind]), tokens_of(model, 2), depth=5)


def in_float64(self, x):
    """A root-mean-square norm without the detour through float32 that transformers makes."""
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + getattr(self, "eps", getattr(self, "variance_epsilon", 0)))
    return y * (1 + self.weight if type(self).__name__.startswith("Gemma") else self.weight)


def family_model(family, monkeypatch, **changes):
    module = build(family, dtype=torch.float64, **changes)
    for kind in {type(m) for m in module.modules() if type(m).__name__.endswith("RMSNorm")}:
        monkeypatch.setattr(kind, "forward", in_float64)
    return ck.load(module)


@every_family
def test_a_wide_search_finds_every_path_in_every_family(family, monkeypatch):
    model = family_model(family, monkeypatch)
    dictionaries = transcoders(32, 2, n=8, skip=True, activation="topk", k=2)
    circuit = assert_all_paths(model, dictionaries, tokens_of(model), depth=2)
    assert any("position" in path.names[-1] for path in circuit.paths) == (family == "GPT2")


@pytest.fixture(scope="module")
def three():
    """Three layers, three tokens, and all paths to a logit."""
    model = tiny_model(n_layers=3, n_heads=2)
    dictionaries, tokens = transcoders(8, 3, n=4), tokens_of(tiny_model(), 3)
    return model, dictionaries, tokens, assert_all_paths(model, dictionaries, tokens, depth=7)


def test_all_paths_together_are_the_total_effects(three):
    model, dictionaries, tokens, circuit = three
    local = local_model(model, dictionaries, tokens)
    want = total_effects(local, [final_targets(model, local, [3])[0].reads])[0]
    sums = defaultdict(float)
    for path in circuit.paths:
        sums[path.names[-1]] += path.contribution
    steps = PathSteps(local)
    kinds = ("token", "position", "latent")
    columns = [i for g in local.nodes if g.kind in kinds for i in range(g.first, g.first + len(g))]
    names = [steps.hop(i, 0).node.name for i in columns]
    assert {name for name in sums if not name.startswith("a")} <= set(names)
    torch.testing.assert_close(
        torch.tensor([sums[n] for n in names], dtype=torch.float64), want[columns], rtol=1e-9, atol=1e-10
    )


def test_with_all_paths_nothing_is_pruned_and_roots_make_up_the_logit(three):
    model, _, tokens, circuit = three
    graph = circuit.graph
    target = graph.nodes[-1].name
    logits = model.module(tokens[None])[0, -1].detach()
    assert math.isclose(float(graph.totals[0]), float(logits[3] - logits.mean()), rel_tol=1e-9)
    roots = graph.kind("token", "position", "bias", "error")
    assert math.isclose(float(graph.effects[:, roots].sum()), float(graph.totals[0]), rel_tol=1e-9)
    pruned = torch.tensor([node.name.startswith("pruned.") for node in graph.nodes])
    assert int(pruned.sum()) == len(graph.targets)
    assert float(graph.effects[:, pruned].abs().max()) < 1e-9 * float(graph.effects.abs().max())
    assert target == "logits.3@2" and nx.is_directed_acyclic_graph(graph.to_networkx())


def test_paths_between_two_latents_make_up_autograds_derivative():
    """All ways from a latent of layer 0 to one of layer 2 that meet no latent in between."""
    model = tiny_model(n_layers=3)
    tokens, dictionaries = tokens_of(model, 3), transcoders(8, 3)
    local = local_model(model, dictionaries, tokens)
    nodes = next(a.nodes for a in local.active if a.dictionary.read.layer == 2)
    index = int(nodes.index[nodes.positions == 2][0])
    circuit = transcoder_circuits(
        model, dictionaries, tokens, target=Latent(Site("mlp-in", 2), 2, index), depth=4, beam=ALL,
    )  # fmt: skip
    engine = LiteralRows(model, dictionaries, tokens)
    row = (Site("mlp-in", 2), 2, engine.encoder(Site("mlp-in", 2), index))
    roots, _, latents = engine.row_parts(engine.gradients([row]), 0)
    found = defaultdict(float)
    for path in circuit.paths:
        if all(hop.node.kind == "unit" for hop in path.hops[:-1]):
            found[path.names[-1]] += path.contribution
    for p in range(3):
        root = found[f"input@{p}"] + found[f"position@{p}"]
        assert math.isclose(root, float(roots[p]), rel_tol=1e-8, abs_tol=1e-10)
        # Depth 4 is a root behind three heads, and no more lie below.
        for i, value in enumerate(latents[Site("mlp-in", 0)][p].tolist()):
            assert math.isclose(found.get(f"m0.f{i}@{p}", 0.0), value, rel_tol=1e-8, abs_tol=1e-10)


@given(
    activation=st.sampled_from(sorted(ACTIVATIONS)), seed=st.integers(0, 99), length=st.integers(1, 12),
    skip=st.booleans(), norm=st.sampled_from(["RMS", None]),
)  # fmt: skip
@settings(max_examples=10, deadline=None)
def test_every_list_adds_up(activation, seed, length, skip, norm):
    model = tiny_model(seed=seed, normalization_type=norm)
    k = {"k": 3} if activation in ("topk", "batchtopk") else {}
    dictionaries = transcoders(8, 2, seed=seed, activation=activation, skip=skip, **k)
    local = local_model(model, dictionaries, tokens_of(model, length, seed))
    steps = PathSteps(local)
    vectors = steps.start(path_target(model, local, None)[1])
    for _ in range(3):
        parts = steps.parts(vectors)
        torch.testing.assert_close(parts.flat.sum(1), vectors.totals, rtol=1e-9, atol=1e-9)
        row = (parts.flat[0].abs() * steps.choices).masked_fill(columns_that_end(steps), 0)
        if not bool(row.any()):
            break
        choice = int(row.argmax())
        vectors = steps.follow(vectors, 0, choice, parts.flat[0, choice])
        torch.testing.assert_close(vectors.totals[0], parts.flat[0, choice])


def columns_that_end(steps):
    ends = torch.zeros_like(steps.choices, dtype=torch.bool)
    for g in steps.local.nodes:
        ends[g.first : g.first + len(g)] = g.kind != "latent"
    return ends


@pytest.mark.parametrize("cap", [False, True])
def test_a_narrow_search_is_greedy(cap):
    model = tiny_model(**MODELS["grouped"], n_layers=3)  # rotary: a root is a token and nothing else
    dictionaries, tokens = transcoders(8, 3, n=12), tokens_of(model, 5)
    dictionaries[2].coder.W_dec.mul_(30)  # so that contributions exceed activations, and the cap matters
    activations = {}
    local = local_model(model, dictionaries, tokens)
    for a in local.active:
        for p, i, z in zip(a.nodes.positions.tolist(), a.nodes.index.tolist(), a.nodes.values.tolist(), strict=True):
            activations[f"m{a.dictionary.read.layer}.f{i}@{p}"] = z

    def rank(names, value):
        on_path = [activations[n] for n in names if n in activations]
        return min([abs(value), *on_path]) if cap else abs(value), abs(value)

    def no_first_position(hop):
        return hop.node.kind != "unit" or hop.source > 0

    start = start_of(model, dictionaries, tokens, 3)
    literal = LiteralPaths(model, dictionaries, tokens)
    for keep, by_name in ((None, lambda n: True), (no_first_position, lambda n: not n.endswith("<-0"))):
        circuit = transcoder_circuits(model, dictionaries, tokens, target=3, depth=4, beam=7, cap=cap, keep=keep)
        want = literal.greedy(*start, depth=4, beam=7, rank=rank, keep=by_name)
        got = [(tuple(n.replace("input", "root") for n in p.names), p.contribution) for p in circuit.paths]
        assert [names for names, _ in got] == [names for names, _ in want]
        torch.testing.assert_close([v for _, v in got], [v for _, v in want], rtol=1e-9, atol=1e-10)
        assert not any("<-0" in n for p in circuit.paths for n in p.names) or keep is None


def test_a_cap_ranks_down_what_exceeds_a_weak_latent():
    model = tiny_model()
    dictionaries = transcoders(8, 2, n=12)
    dictionaries[1].coder.W_dec.mul_(100)  # weakly active, strongly read
    tokens = tokens_of(model, 5)
    free, capped = (
        transcoder_circuits(model, dictionaries, tokens, target=3, cap=cap, beam=8) for cap in (False, True)
    )
    assert [p.names for p in free.paths] != [p.names for p in capped.paths]
    assert capped.graph.totals[0] == free.graph.totals[0]
    latent = next(hop.node for path in free.paths for hop in path.hops if hop.node.kind == "latent")
    target = Latent(Site("mlp-in", latent.layer), latent.position, latent.index)
    found = transcoder_circuits(model, dictionaries, tokens, target=target, cap=True)
    assert found.target.name == latent.name and all(0 < path.bound <= latent.value for path in found.paths)


def test_merged_paths_are_a_graph_whose_rows_add_up():
    model = tiny_model(n_layers=3)
    dictionaries, tokens = transcoders(8, 3, n=12), tokens_of(model, 6)
    circuit = transcoder_circuits(model, dictionaries, tokens, target=(3, 5), depth=4, beam=25)
    graph, target = circuit.graph, circuit.target.name
    assert target == "logits.3-5@5" == graph.nodes[-1].name
    logits = model.module(tokens[None])[0, -1].detach()
    assert math.isclose(float(graph.totals[0]), float(logits[3] - logits[5]), rel_tol=1e-9)
    names = [node.name for node in graph.nodes]
    assert len(set(names)) == len(names)
    flows = defaultdict(float)
    for path in circuit.paths:
        flows[path.names[-1], (target, *path.names)[-2]] += path.contribution
    for (source, parent), flow in flows.items():
        assert math.isclose(graph.effect(source, parent), flow, rel_tol=1e-9)
    parents = [graph.nodes[i].name for i in graph.targets.tolist()]
    for parent, total in zip(parents, graph.totals.tolist(), strict=True):
        kept = sum(flow for (_, p), flow in flows.items() if p == parent)
        rest = sum(graph.effect(f"{kind}.{parent}", parent) for kind in ("error", "bias", "pruned"))
        assert math.isclose(kept + rest, total, rel_tol=1e-9, abs_tol=1e-12)
        into = sum(flow for (source, _), flow in flows.items() if source == parent)
        assert parent == target or math.isclose(into, total, rel_tol=1e-9)
    stages = {node.name: node.stage for node in graph.nodes}
    assert all(stages[a] < stages[b] for a, b in graph.to_networkx().edges)
    assert len(graph.prune(0.8, 0.98)) < len(graph) and 0 < graph.replacement_score < 1


def test_errors_and_biases_of_a_parent_are_those_of_the_attribution_graph():
    """One step of the search and the attribution graph's row differ by what heads pass on, nothing else."""
    model = tiny_model()
    dictionaries, tokens = transcoders(8, 2)[1:], tokens_of(model, 1)  # one token: heads pass on all of it
    local = local_model(model, dictionaries, tokens)
    nodes = local.active[0].nodes
    target = Latent(Site("mlp-in", 1), 0, int(nodes.index[0]))
    circuit = transcoder_circuits(model, dictionaries, tokens, target=target, depth=9, beam=ALL)
    want = FEATURE_METHODS["attribution-graph"](model, dictionaries, tokens, targets=[target])
    name = circuit.target.name

    def summed(prefix):
        graph = circuit.graph
        return sum(float(graph.effects[:, i].sum()) for i, n in enumerate(graph.nodes) if n.name.startswith(prefix))

    assert math.isclose(summed("error."), want.effect("m0.error@0", name), rel_tol=1e-9)
    biases = sum(want.effect(n.name, name) for n in want.nodes if n.kind == "bias")
    assert math.isclose(summed("bias."), biases, rel_tol=1e-9, abs_tol=1e-12)
    assert math.isclose(summed("input"), want.effect("input@0", name), rel_tol=1e-9)


@pytest.mark.parametrize("center", [False, True])
def test_the_frozen_scale_is_the_papers_constant(center):
    """c_LN = (v . LN(x)) / (v . x), with gain, offset and centring folded into v as the paper's weights have them."""
    x, v = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = Norm(center, 1e-5)
    with_gain = Norm(center, 1e-5, weight=1 + x[0] / 4, bias=v[0])
    x_folded = x - x.mean(1, keepdim=True) if center else x
    paper = (v * plain(x)).sum(1, keepdim=True) / (v * x_folded).sum(1, keepdim=True)
    torch.testing.assert_close(FrozenNorm.at(plain, x).scale, paper, rtol=1e-9, atol=0)
    folded = with_gain.fold(v)
    paper = (v * (with_gain(x) - with_gain.bias)).sum(1, keepdim=True) / (folded * x).sum(1, keepdim=True)
    pulled = FrozenNorm.at(with_gain, x).pull_points(v, torch.arange(3))
    torch.testing.assert_close(pulled, paper * folded, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------------- weights


def literal_read(paths, layer, vector, through):
    """What a vector behind a layer's MLP norm reads, one matrix at a time: derivatives with scales at 1."""

    def unscaled(norm, v):
        if norm is None:
            return v
        y = v if norm.weight is None else v * (norm.weight + float(norm.unit_gain))
        return y - y.mean() if norm.center else y

    vector = unscaled(paths.mlps[layer].norm, vector)
    for at, h in reversed(through):
        heads, value = paths.heads[at], paths.values[at]
        behind = unscaled(heads.post_norm, vector)
        vector = unscaled(value.norm, value.weight[h // (heads.n // value.n)] @ (heads.weight[h] @ behind))
    return vector.detach()


def literal_weights(model, dictionaries, through, scales=None):
    found, paths = {}, LiteralPaths(model, [], torch.zeros(1, dtype=torch.long))
    for reader in dictionaries:
        if through and through[-1][0] > reader.read.layer:
            continue
        for j in range(reader.coder.n_latents):
            factor = 1 if reader.coder.r_mag is None else reader.coder.r_mag[j].exp()
            vector = literal_read(paths, reader.read.layer, factor * reader.coder.W_enc[:, j], through)
            for writer in dictionaries:
                sites = [n for n, site in enumerate(writer.writes)
                         if site.layer < (through[0][0] if through else reader.read.layer)]  # fmt: skip
                for i in range(writer.coder.n_latents) if sites and writer.read.layer < reader.read.layer else ():
                    scale = 1 if scales is None else float(scales[writer.read.layer][i])
                    weight = sum(float(writer.coder.W_dec[n, i] @ vector) for n in sites) * scale
                    found[f"m{writer.read.layer}.f{i}", f"m{reader.read.layer}.f{j}"] = weight
    return found


@pytest.mark.parametrize("through", [(), ((1, 2),), ((1, 0), (2, 3))])
@pytest.mark.parametrize(
    ("family", "kind"), [("tiny", "transcoders"), ("tiny", "gated"), ("GPT2", "cross-layer"), ("Gemma2", "transcoders")]
)
def test_weights_are_those_of_loops(kind, through, family, monkeypatch):
    monkeypatch.setattr("circuitkit.features.weight_graph.CHUNK", 15)
    model = tiny_model(**MODELS["grouped"], n_layers=3)
    if family != "tiny":
        model = family_model(family, monkeypatch, **{"n_layer" if family == "GPT2" else "num_hidden_layers": 3})
    dictionaries = transcoders(8 if family == "tiny" else 32, 3, n=5, **KINDS[kind])
    want = literal_weights(model, dictionaries, through)
    got = weight_graph(dictionaries, model=model, top=ALL, through=through)
    found = {(a, b): w for a, b, w in got.rows()}
    assert set(found) == set(want) and len(got) == len(found)
    torch.testing.assert_close([found[k] for k in want], list(want.values()), rtol=1e-9, atol=1e-12)
    few = weight_graph(dictionaries[::-1], model=model, top=2, through=through)
    for target in sorted({b for _, b in want})[::3]:
        best = sorted(((abs(w), a, w) for (a, b), w in want.items() if b == target), reverse=True)[:2]
        mine = few.into(int(target[1]), int(target[4:])).rows()
        assert [(a, round(w, 9)) for a, _, w in mine] == [(a, round(w, 9)) for _, a, w in best]
    assert [w for *_, w in got.top(3).rows()] == sorted((w for *_, w in got.rows()), key=abs, reverse=True)[:3]
    assert few.to_networkx().number_of_edges() == len(few)


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_prompts_weigh_connections_by_activity(reduce):
    model = tiny_model(n_layers=3)
    dictionaries = transcoders(8, 3)
    prompts = torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(5))
    latents = [LiteralPaths(model, dictionaries, p).mlp_in for p in prompts]
    scales = {}
    for d in dictionaries:
        z = torch.stack([d.coder.encode(x[d.read.layer]) for x in latents]).flatten(0, 1)
        scales[d.read.layer] = z.mean(0) if reduce == "mean" else z.max(0).values
    want = literal_weights(model, dictionaries, (), scales)
    got = weight_graph(dictionaries, model=model, top=ALL, prompts=prompts, reduce=reduce)
    found = {(a, b): w for a, b, w in got.rows()}
    torch.testing.assert_close([found[k] for k in want], list(want.values()), rtol=1e-9, atol=1e-12)


def test_a_contribution_is_an_activation_times_a_weight_times_a_scale():
    model = tiny_model(n_layers=2)
    dictionaries, tokens = transcoders(8, 2), tokens_of(model, 4)
    weights = weight_graph(dictionaries, model=model, top=ALL)
    local = local_model(model, dictionaries, tokens)
    scale = PathSteps(local).components[Site("mlp-in", 1)][0].before.scale
    nodes = local.active[1].nodes
    p, j = int(nodes.positions[-1]), int(nodes.index[-1])
    target = Latent(Site("mlp-in", 1), p, j)
    circuit = transcoder_circuits(model, dictionaries, tokens, target=target, depth=1, beam=ALL)
    c = {a: w for a, _, w in weights.into(1, j).rows()}
    seen = [path for path in circuit.paths if path.hops[0].node.kind == "latent"]
    assert seen
    for path in seen:
        node = path.hops[0].node
        assert math.isclose(path.contribution, node.value * c[f"m0.f{node.index}"] * float(scale[p]), rel_tol=1e-9)


@pytest.mark.parametrize("family", ["GPT2", "Llama", "Gemma2", "GPTJ"])
def test_deembeddings_are_those_of_loops(family, monkeypatch):
    model = family_model(family, monkeypatch)
    dictionary = transcoders(32, 2, n=3)[1]
    table = torch.stack([model.record(torch.tensor([[t]])).inputs[0][0, 0] for t in range(97)]).detach()
    if family == "GPT2":
        table = table - model.module.pos_embed.original_component.weight[0].detach()
    for through in ((), ((0, 3),), ((0, 1), (1, 2))):
        if family == "GPTJ" and through and through[-1][0] == 1:
            with pytest.raises(OptionError, match="MLP of layer 1 can read"):
                deembedding(model, dictionary, 2, through)
            continue
        paths = LiteralPaths(model, [], torch.zeros(1, dtype=torch.long))
        vector = literal_read(paths, 1, dictionary.coder.W_enc[:, 2], through)
        got = deembedding(model, dictionary, 2, through)
        torch.testing.assert_close(got.scores, table @ vector, rtol=1e-8, atol=1e-10)
        assert got.latent == "m1.f2" and got.top(1)[0][0] == int((table @ vector).argmax())


def test_a_planted_circuit_is_recovered_exactly():
    """Token 1 is carried by the one head to the next position, lights latent 0 below latent 1, which writes a logit."""
    d = 4
    model = tiny_model(n_layers=2, d_model=d, d_head=4, n_heads=1, d_vocab=3, normalization_type=None, act_fn="relu",
                       d_mlp=2)  # fmt: skip
    module = model.module
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
        module.embed.W_E[1, 0] = 1.0
        module.blocks[0].attn.W_V[0, 0, 0], module.blocks[0].attn.W_O[0, 0, 3] = 1.0, 4.0
        module.blocks[0].mlp.W_in[3, 0], module.blocks[0].mlp.W_out[0, 1] = 1.0, 2.0
        module.blocks[1].mlp.W_in[1, 1], module.blocks[1].mlp.W_out[1, 2] = 1.0, 3.0
        module.unembed.W_U[2, 2] = 1.0
    coders = [SparseCoder(d, 2, d).double().requires_grad_(False) for _ in range(2)]
    coders[0].W_enc[3, 0], coders[0].W_dec[0, 0, 1] = 1.0, 2.0
    coders[1].W_enc[1, 1], coders[1].W_dec[0, 1, 2] = 1.0, 3.0
    pair = [Dictionary(c, Site("mlp-in", i), (Site("mlp-out", i),)) for i, c in enumerate(coders)]
    circuit = transcoder_circuits(model, pair, torch.tensor([1, 0]), target=(2, 0), depth=5)
    (path,) = circuit.ended()  # the pattern is uniform: half of 4 from each of two positions
    assert path.names == ("m1.f1@1", "m0.f0@1", "a0.h0@1<-0", "input@0")
    assert path.contributions == (12.0,) * 4 and float(circuit.graph.totals[0]) == 12.0
    assert float(circuit.graph.effects[:, circuit.graph.kind("bias", "error")].abs().max()) == 0
    assert weight_graph(pair, model=model, top=1).top(1).rows() == [("m0.f0", "m1.f1", 2.0)]
    through = deembedding(model, pair[0], 0, through=((0, 0),))
    assert through.top(1) == [(1, "1", 4.0)] and not bool(deembedding(model, pair[0], 0).scores.any())


def test_on_the_story_model():
    model = ck.load("stories260k")
    dtype = next(model.module.parameters()).dtype
    dictionaries = [Dictionary(d.coder.to(dtype), d.read, d.writes)
                    for d in transcoders(64, 5, n=64, activation="topk", k=8)]  # fmt: skip
    batch = ck.task("gender-pronoun", model, n=2, seed=0).batches[0]
    pair = (int(batch.right.flatten()[0]), int(batch.wrong.flatten()[0]))
    circuit = FEATURE_METHODS["transcoder-circuits"](
        model, dictionaries, batch.clean[0], target=pair, depth=3, beam=20
    )  # fmt: skip
    logits = model.module(batch.clean[:1])
    logits = getattr(logits, "logits", logits)[0, -1].detach()
    assert math.isclose(float(circuit.graph.totals[0]), float(logits[pair[0]] - logits[pair[1]]), rel_tol=1e-3)
    assert len(circuit.paths) == 60 and "paths" in repr(circuit) and "<-" in str(circuit.paths[-1])
    text = "Once upon a time there was a girl"
    for graph in (
        transcoder_circuits(model, dictionaries, text, target=pair, beam=2).graph,
        qk_attribution(model, dictionaries, text, layer=1, head=0).graph,
    ):
        assert "".join(graph.texts).endswith(text) and len(graph.texts) == len(graph.tokens)
    named = transcoder_circuits(model, dictionaries, text, target=pair, beam=2).graph
    assert set(named.target_tokens) == set(pair) and " - " in named.label(len(named) - 1)
    found = deembedding(model, dictionaries[0], 3)
    assert "m0.f3" in repr(found) and all(isinstance(text, str) and text for _, text, _ in found.top(5))


def test_other_targets():
    model = tiny_model()
    dictionaries, tokens = transcoders(8, 2), tokens_of(model, 5)
    likeliest = transcoder_circuits(model, dictionaries, tokens)
    assert likeliest.target.index == int(model.module(tokens[None])[0, -1].argmax())
    vector = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for site, height in ((Site("resid-post", 0), 2), (Site("resid-pre", 2), 4), (Site("resid-pre", 0), 0)):
        circuit = transcoder_circuits(
            model, dictionaries, tokens, target=Direction(site, -2, vector, "probe"), depth=2, beam=ALL
        )
        assert circuit.target.name == "probe@3"
        want = dict(LiteralPaths(model, dictionaries, tokens).paths(vector, 3, height, 2))
        assert_same_paths(with_roots(circuit.paths), want)


def state(module):
    return [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()], [
        (p.requires_grad, p.grad is None) for p in module.parameters()
    ]


def sae(kind="mlp-out"):
    coder = transcoders(8, 1)[0].coder
    return [Dictionary(coder, Site(kind, 0), (Site(kind, 0),))]


SILENT = Latent(Site("mlp-in", 0), 0, 999)
BAD = {
    "an SAE": (sae, {}, "'attribution-graph'"),
    "an SAE of the stream": (lambda: sae("resid-pre"), {}, "expected transcoders"),
    "no dictionaries": (list, {}, "no dictionaries"),
    "no transcoder at the target's layer": (
        lambda: transcoders(8, 2)[:1], {"target": Latent(Site("mlp-in", 1), 0, 0)}, "no dictionary reads"),
    "a silent latent": (lambda: transcoders(8, 2), {"target": SILENT}, "not active"),
    "a token that is not there": (lambda: transcoders(8, 2), {"target": (3, 99)}, "token 99"),
    "a token against itself": (lambda: transcoders(8, 2), {"target": (3, 3)}, "two that differ"),
    "a target inside attention": (
        lambda: transcoders(8, 2), {"target": Direction(Site("z", 0), 0, torch.ones(8))}, "at the stream"),
    "no depth": (lambda: transcoders(8, 2), {"depth": 0}, "depth = 0"),
    "no beam": (lambda: transcoders(8, 2), {"beam": 0}, "beam = 0"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what):
    make, options, message = BAD[what]
    model = tiny_model()
    before = state(model.module)
    with pytest.raises(OptionError, match=message):
        transcoder_circuits(model, make(), tokens_of(model), **options)
    assert state(model.module) == before


def test_bad_weights():
    model, pair = tiny_model(), transcoders(8, 2)
    for options, message in (
        ({"top": 0}, "top = 0"), ({"reduce": "sum"}, "mean, max"), ({"through": ((0, 7),)}, "head 7"),
        ({"through": ((5, 0),)}, "layer 5"), ({"through": ((1, 0), (0, 0))}, "lowest first"),
        ({"prompts": torch.zeros(0, 3, dtype=torch.long)}, "shape"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=message):
            weight_graph(pair, model=model, **options)
    for dictionaries, message in (([], "no dictionaries"), (sae(), "expected a transcoder"), (pair[:1] * 2, "two")):
        with pytest.raises(OptionError, match=message):
            weight_graph(dictionaries, model=model)
    with pytest.raises(OptionError, match="latent 6"):
        deembedding(model, pair[0], 6)
    with pytest.raises(OptionError, match="MLP of layer 0 can read"):
        deembedding(model, pair[0], 0, ((1, 0),))
    with pytest.raises(UnsupportedModel):
        deembedding(ck.load("toys/parity_gru_s0"), pair[0], 0)
