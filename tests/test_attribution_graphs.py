"""Attribution graphs against autograd through the module, and the laws of a linear graph."""

import math
from dataclasses import replace

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitkit as ck
from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.dictionaries.sparse_coder import ACTIVATIONS, SparseCoder
from circuitkit.errors import OptionError, UnsupportedModel
from circuitkit.features.attribution import attribution_graph
from circuitkit.features.explore import Table, rows_of
from circuitkit.features.hierarchical import total_effects
from circuitkit.features.local import same_site
from circuitkit.features.replace import local_model
from circuitkit.features.sweep import in_order, pull, push
from circuitkit.features.targets import Direction, Latent, final_targets
from circuitkit.testing import tiny_model
from tests.families import build, every_family
from tests.oracles.attribution_rows import LiteralRows


def random_coder(d, *, n=16, seed=0, dtype=torch.float64, **options):
    """A coder with random weights, about half of whose latents are active."""
    generator = torch.Generator().manual_seed(seed)
    coder = SparseCoder(d, n, options.pop("d_out", d), **options).to(dtype).requires_grad_(False)
    for p in coder.parameters():
        p.copy_(torch.randn(p.shape, generator=generator, dtype=dtype) * (0.4 if p.dim() > 1 else 0.1))
    return coder


def at(kind, layer, coder, writes=None):
    """A dictionary that reads a site and writes some."""
    return Dictionary(coder, Site(kind, layer), tuple(writes or [Site(kind, layer)]))


def transcoders(d, layers=2, dtype=torch.float64, **options):
    return [
        at("mlp-in", i, random_coder(d, seed=i, dtype=dtype, **options), [Site("mlp-out", i)]) for i in range(layers)
    ]


def clts(d, layers=2):
    def one(i):
        return random_coder(d, seed=10 + i, n_out=layers - i)

    return [at("mlp-in", i, one(i), [Site("mlp-out", j) for j in range(i, layers)]) for i in range(layers)]


def saes(d, kind, layers=2, **options):
    return [at(kind, i, random_coder(d, seed=20 + i, **options)) for i in range(layers)]


# What to build a graph of, by name, for a stream of width d and z of the same width.
SETS = {
    "transcoders": lambda d, z=8: transcoders(d),
    "skip transcoders": lambda d, z=8: transcoders(d, skip=True),
    "cross-layer": lambda d, z=8: clts(d),
    "attention and transcoders": lambda d, z=8: saes(d, "attn-out", subtract_b_dec=True) + transcoders(d),
    "heads' z": lambda d, z=8: saes(z, "z") + transcoders(d),
    "MLP outputs": lambda d, z=8: saes(d, "mlp-out"),
    "the stream": lambda d, z=8: saes(d, "resid-post", 1) + transcoders(d),
    "the first stream": lambda d, z=8: saes(d, "resid-pre", 1) + clts(d),
    "everything": lambda d, z=8: (
        saes(d, "attn-out") + saes(d, "resid-pre")[1:] + saes(z, "z", 1) + transcoders(d, skip=True)),
}  # fmt: skip
MODELS = {
    "rms": {"n_heads": 2, "d_head": 4},
    "grouped": {"n_heads": 4, "d_head": 2, "n_key_value_heads": 2, "positional_embedding_type": "rotary",
                "rotary_dim": 2, "rotary_adjacent_pairs": True},
    "no norm": {"normalization_type": None, "act_fn": "relu"},
    "wide heads": {"n_heads": 2, "d_head": 6, "gated_mlp": True},
    "both ways": {"attention_dir": "bidirectional", "n_layers": 3},
}  # fmt: skip


def tokens_of(model, n=7, seed=0):
    return torch.randint(model.d_vocab, (n,), generator=torch.Generator().manual_seed(seed))


def rows_and_values(local):
    """All latents' rows, as `rows_of` makes them, with what they should add up to."""
    table = Table.of(local, [])
    return table, rows_of(local, table)


def literal_effects(model, dictionaries, tokens, local, table):
    """The same rows from the literal engine, columns as in the local model; biases stay zero."""
    gates = {d.read.layer for d in dictionaries if d.read.kind == "mlp-out"}
    engine = LiteralRows(model, dictionaries, tokens, copies=4, gates=gates)
    # The oracle's own encoder vectors, by the number that the table gives the latent.
    by_number = {}
    for nodes in local.nodes:
        if nodes.kind == "latent":
            for i in range(len(nodes)):
                site = same_site(nodes.site)
                by_number[nodes.first + i] = (site, int(nodes.positions[i]), engine.encoder(site, int(nodes.index[i])))
    rows = [by_number[number] for number in table.numbers.tolist()]
    out = torch.zeros(len(rows), local.n_sources, dtype=local.values[local.final].dtype)
    for start in range(0, len(rows), 4):
        gradients = engine.gradients(rows[start : start + 4])
        for r in range(len(rows[start : start + 4])):
            tokens_, errors, latents = engine.row_parts(gradients, r)
            for nodes in local.nodes:
                columns = slice(nodes.first, nodes.first + len(nodes))
                if nodes.kind == "token":
                    out[start + r, columns] = tokens_
                elif nodes.kind == "error":
                    out[start + r, columns] = errors[nodes.site]
                elif nodes.kind == "latent":
                    found = latents[same_site(nodes.site)]
                    out[start + r, columns] = found[nodes.positions, nodes.index]
    return out


def with_positions_in_tokens(local, effects):
    """Effects with those of positions added to the tokens', and without biases, as the literal engine has them."""
    out = effects.clone()
    by_kind = {}
    for nodes in local.nodes:
        by_kind.setdefault(nodes.kind, []).append(slice(nodes.first, nodes.first + len(nodes)))
    for columns in by_kind.get("position", []):
        out[:, by_kind["token"][0]] += out[:, columns]
        out[:, columns] = 0
    for columns in by_kind["bias"]:
        out[:, columns] = 0
    return out


def assert_same_as_literal(model, dictionaries, tokens, tolerance=1e-9):
    local = local_model(model, dictionaries, tokens)
    table, found = rows_and_values(local)
    want = literal_effects(model, dictionaries, tokens, local, table)
    got = with_positions_in_tokens(local, found.effects)
    scale = float(want.abs().max())
    assert scale > 0 and float((got - want).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("what", SETS)
@pytest.mark.parametrize("shape", MODELS)
def test_the_sweep_equals_autograd(what, shape):
    model = tiny_model(**MODELS[shape])
    if shape == "wide heads":  # this layout adds the bias behind the product, where no gate can hold it
        for block in model.module.blocks:
            block.mlp.b_in.data.zero_()
    width = model.module.config.n_heads * model.module.config.d_head
    assert_same_as_literal(model, SETS[what](8, width), tokens_of(model))


def in_float64(self, x):
    """A root-mean-square norm without the detour through float32 that transformers makes."""
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + getattr(self, "eps", getattr(self, "variance_epsilon", 0)))
    return y * (1 + self.weight if type(self).__name__.startswith("Gemma") else self.weight)


@every_family
def test_the_sweep_equals_autograd_in_every_family(family, monkeypatch):
    module = build(family, dtype=torch.float64)
    for kind in {type(m) for m in module.modules() if type(m).__name__.endswith("RMSNorm")}:
        monkeypatch.setattr(kind, "forward", in_float64)
    model = ck.load(module)
    dictionaries = saes(32, "attn-out", n=8) + transcoders(32, skip=True, n=8)
    assert_same_as_literal(model, dictionaries, tokens_of(model, 5))
    graph = attribution_graph(model, dictionaries, tokens_of(model, 5))  # logits as well, under a soft cap or not
    assert float(graph.remainder.abs().max()) <= 1e-9 * float(graph.totals.abs().max())
    assert ("position@3" in graph._numbers) == (family == "GPT2")


@pytest.mark.parametrize("what", SETS)
def test_push_equals_pull_and_rows_add_up(what):
    model = tiny_model(n_heads=4, d_head=2, n_key_value_heads=2)
    local = local_model(model, SETS[what](8), tokens_of(model))
    reads = in_order(local, [a.reads for a in local.active])
    down, up = pull(local, reads), push(local, reads, at_once=17)
    torch.testing.assert_close(down, up, rtol=1e-10, atol=1e-12)
    values, constants = (torch.cat([getattr(r, k) for r in reads]) for k in ("values", "constants"))
    torch.testing.assert_close(down.sum(1) + constants, values, rtol=1e-9, atol=1e-10)


@given(activation=st.sampled_from(sorted(ACTIVATIONS)), seed=st.integers(0, 99), length=st.integers(1, 12))
@settings(max_examples=8, deadline=None)
def test_rows_add_up_for_every_activation(activation, seed, length):
    model = tiny_model(seed=seed)
    k = {"k": 5} if activation in ("topk", "batchtopk") else {}
    dictionaries = transcoders(8, activation=activation, **k)
    graph = attribution_graph(model, dictionaries, tokens_of(model, length, seed))
    assert float(graph.remainder.abs().max()) <= 1e-9 * float(graph.totals.abs().max())


def test_every_totals_is_what_the_model_computes():
    model = tiny_model()
    tokens = tokens_of(model)
    graph = attribution_graph(model, transcoders(8), tokens, targets=[2, 5])
    logits = model.module(tokens[None])[0, -1].detach()
    for row, number in enumerate(graph.targets.tolist()):
        node = graph.nodes[number]
        want = float(logits[node.index] - logits.mean()) if node.kind == "logit" else node.value
        assert math.isclose(float(graph.effects[row].sum()), want, rel_tol=1e-9)


def test_chunks_change_nothing():
    model = tiny_model()
    local = local_model(model, SETS["everything"](8), tokens_of(model))
    table = Table.of(local, [])
    whole = rows_of(local, table).effects
    for budget in (1, 200_000):
        torch.testing.assert_close(rows_of(local, table, budget).effects, whole, rtol=1e-10, atol=1e-12)


def test_leaves_explain_the_target_through_all_paths_when_nothing_is_silenced():
    model = tiny_model()
    for what in SETS:
        local = local_model(model, SETS[what](8), tokens_of(model))
        reads = final_targets(model, local, [3])[0].reads
        effects = total_effects(local, [reads], 0.0)[0]
        leaf = torch.cat([torch.full((len(n),), n.kind != "latent") for n in local.nodes])
        assert math.isclose(float(effects[leaf].sum()), float(reads.values), rel_tol=1e-9)


def test_through_all_paths_equals_the_sum_over_paths_of_direct_effects():
    model = tiny_model()
    dictionaries = SETS["attention and transcoders"](8)
    graph = attribution_graph(model, dictionaries, tokens_of(model), targets=[3])
    local = local_model(model, dictionaries, tokens_of(model))
    want = total_effects(local, [final_targets(model, local, [3])[0].reads])[0]
    n = len(graph.nodes)
    direct = torch.zeros(n, n, dtype=torch.float64)
    values = torch.tensor([node.value if node.kind == "latent" else 1.0 for node in graph.nodes], dtype=torch.float64)
    direct[graph.targets] = graph.effects / values[graph.targets][:, None]
    direct[-1] *= values[-1]
    paths = torch.linalg.inv(torch.eye(n, dtype=torch.float64) - direct) - torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(paths[-1, :-1], want, rtol=1e-9, atol=1e-10)


def test_hierarchical_keeps_what_passes_the_threshold():
    model, tokens = tiny_model(), tokens_of(tiny_model())
    dictionaries = transcoders(8)
    whole = attribution_graph(model, dictionaries, tokens, targets=[3])
    sizes = []
    for tau in (0.0, 0.01, 0.05, 0.5):
        graph = attribution_graph(model, dictionaries, tokens, targets=[3], hierarchical=True, tau=tau)
        sizes.append(int(graph.kind("latent").sum()))
        for node in graph.nodes:
            assert node.name in whole._numbers
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3]


def test_a_planted_circuit_is_recovered_exactly():
    """Token 1 lights latent 0 of layer 0, which lights latent 1 of layer 1, which writes token 2's logit."""
    d = 4
    model = tiny_model(n_layers=2, d_model=d, d_head=4, n_heads=1, d_vocab=3, normalization_type=None, act_fn="relu",
                       d_mlp=2)  # fmt: skip
    module = model.module
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
        module.embed.W_E[1, 0] = 1.0
        module.blocks[0].mlp.W_in[0, 0], module.blocks[0].mlp.W_out[0, 1] = 1.0, 2.0
        module.blocks[1].mlp.W_in[1, 1], module.blocks[1].mlp.W_out[1, 2] = 1.0, 3.0
        module.unembed.W_U[2, 2] = 1.0
    coders = [SparseCoder(d, 2, d).double().requires_grad_(False) for _ in range(2)]
    coders[0].W_enc[0, 0], coders[0].W_dec[0, 0, 1] = 1.0, 2.0
    coders[1].W_enc[1, 1], coders[1].W_dec[0, 1, 2] = 1.0, 3.0
    dictionaries = [at("mlp-in", i, c, [Site("mlp-out", i)]) for i, c in enumerate(coders)]
    graph = attribution_graph(model, dictionaries, torch.tensor([0, 1]), targets=[2])
    edges = {(a, b): round(w, 9) for a, b, w in graph.to_networkx().edges(data="weight")}
    assert edges == {
        ("input@1", "m0.f0@1"): 1.0,
        ("m0.f0@1", "m1.f1@1"): 2.0,
        ("m1.f1@1", "logits.2@1"): 4.0,  # 6, less the mean of the logits: 6 * 2 / 3
    }
    assert graph.replacement_score == graph.completeness_score == 1.0
    pruned = graph.prune()
    assert {node.name for node in pruned.nodes} == {"input@0", "input@1", "m0.f0@1", "m1.f1@1", "logits.2@1"}


def test_influence_is_that_of_powers_and_pruning_keeps_its_word():
    model = tiny_model()
    graph = attribution_graph(model, SETS["attention and transcoders"](8), tokens_of(model))
    n = len(graph)
    shares = torch.zeros(n, n, dtype=torch.float64)
    shares[graph.targets] = graph.effects.abs() / graph.effects.abs().sum(1, keepdim=True)
    total = torch.linalg.inv(torch.eye(n, dtype=torch.float64) - shares) - torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(graph.influence, graph.weights @ total, rtol=1e-9, atol=1e-12)
    pruned = graph.prune(0.8, 0.98)
    assert 0 < len(pruned) < len(graph) and pruned.n_edges < graph.n_edges
    drawn = pruned.to_networkx()
    assert nx.is_directed_acyclic_graph(drawn) and set(drawn) == {node.name for node in pruned.nodes}
    for node in pruned.nodes:
        if node.kind == "latent":
            assert drawn.in_degree(node.name) and drawn.out_degree(node.name)
        if node.kind in ("error", "bias", "position"):
            assert drawn.out_degree(node.name)
    everything = graph.prune(1.0, 1.0)  # all that has any influence
    assert math.isclose(float(everything.influence.sum()), float(graph.influence.sum()))
    assert math.isclose(everything.replacement_score, graph.replacement_score)
    assert 0 < graph.replacement_score < 1 and 0 < graph.completeness_score < 1
    torch.testing.assert_close(pruned.effects.sum(1) + pruned.remainder, pruned.totals)


def test_a_cap_keeps_the_influential_latents_and_says_what_it_dropped():
    model, tokens = tiny_model(), tokens_of(tiny_model())
    dictionaries = transcoders(8)
    whole = attribution_graph(model, dictionaries, tokens)
    capped = attribution_graph(model, dictionaries, tokens, max_features=20)
    assert int(capped.kind("latent").sum()) == 20 and float(capped.remainder.abs().max()) > 0
    kept = capped.kind("latent")
    of_kept = sum(
        float(whole.influence[whole.node(node.name)]) for node, k in zip(capped.nodes, kept, strict=True) if k
    )
    assert of_kept > 0.5 * float(whole.influence[whole.kind("latent")].sum())
    for name in ("m1.bias", capped.nodes[-1].name):
        assert name in whole._numbers
    assert capped.effect("input@6", capped.nodes[-1].name) == whole.effect("input@6", capped.nodes[-1].name)


def test_other_targets():
    model, tokens = tiny_model(), tokens_of(tiny_model())
    dictionaries = SETS["attention and transcoders"](8)
    vector = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for site in (Site("mlp-in", 1), Site("mlp-out", 0), Site("attn-out", 1), Site("z", 1), Site("resid-post", 1)):
        graph = attribution_graph(model, dictionaries, tokens, targets=[Direction(site, -2, vector, "probe")])
        assert graph.nodes[-1].name == "probe@5" and float(graph.remainder.abs().max()) < 1e-9
        assert all(node.position is None or node.position <= 5 or node.kind in ("token", "position", "error")
                   for node in graph.nodes)  # fmt: skip
    whole = attribution_graph(model, dictionaries, tokens)
    name = next(node.name for node in whole.nodes if node.name.startswith("m1.f") and node.position == 4)
    index = whole.nodes[whole.node(name)].index
    graph = attribution_graph(model, dictionaries, tokens, targets=[Latent(Site("mlp-in", 1), 4, index)])
    assert float(graph.weights[graph.node(name)]) == 1 and "logits" not in " ".join(node.name for node in graph.nodes)
    row = int((graph.targets == graph.node(name)).nonzero())
    same = {node.name: whole.effect(node.name, name) for node in graph.nodes}
    assert all(math.isclose(float(graph.effects[row, i]), same[node.name], abs_tol=1e-12)
               for i, node in enumerate(graph.nodes))  # fmt: skip


def test_bfloat16_models_are_attributed_in_float32():
    model = tiny_model(dtype=torch.float32, scale=0.3)
    dictionaries = transcoders(8, dtype=torch.float32)
    tokens = tokens_of(model)
    wide = attribution_graph(model, dictionaries, tokens, targets=[3])
    narrow_model = tiny_model(dtype=torch.bfloat16, scale=0.3)
    narrow = attribution_graph(narrow_model, dictionaries, tokens, targets=[3])
    assert narrow.effects.dtype == torch.float32
    assert float(narrow.remainder.abs().max()) <= 1e-4 * float(narrow.totals.abs().max())
    assert next(narrow_model.module.parameters()).dtype == torch.bfloat16
    names = [node.name for node in wide.nodes if node.name in narrow._numbers]
    target = wide.nodes[-1].name
    a, b = (torch.tensor([g.effect(n, target) for n in names]) for g in (wide, narrow))
    assert float((a - b).norm() / a.norm()) < 0.05


def test_frozen_mlps_pass_on_what_they_read():
    model, tokens = tiny_model(), tokens_of(tiny_model())
    dictionaries = saes(8, "attn-out")
    opaque = attribution_graph(model, dictionaries, tokens, targets=[3])
    open_ = attribution_graph(model, dictionaries, tokens, targets=[3], frozen_mlps=True)
    assert any(node.name.startswith("m0.error") for node in opaque.nodes)
    assert not any(node.name.startswith("m0.error") for node in open_.nodes)
    assert float(open_.remainder.abs().max()) < 1e-9


def test_on_the_models_that_ship():
    for name, d, layers in (("stories260k", 64, 5), ("modadd_clock_pizza/modelB_clock_standard_attention", 128, 1)):
        model = ck.load(name)
        dtype = next(model.module.parameters()).dtype
        dictionaries = transcoders(d, layers, dtype=dtype, activation="topk", k=4)
        tokens = tokens_of(model, min(20, model.n_ctx))
        graph = attribution_graph(model, dictionaries, tokens)
        largest = torch.maximum(graph.totals.abs(), graph.effects.abs().amax(1))
        assert float((graph.remainder.abs() / largest).max()) < 1e-4


def state(module):
    return [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()], [
        (p.requires_grad, p.grad is None) for p in module.parameters()
    ]


def test_the_model_is_left_as_found_also_after_an_error():
    model, tokens = tiny_model(), tokens_of(tiny_model())
    before = state(model.module)
    attribution_graph(model, transcoders(8), tokens)
    silent = SparseCoder(8, 4, 8).double()
    with pytest.raises(OptionError):
        attribution_graph(model, [at("mlp-in", 0, silent, [Site("mlp-out", 0)])], tokens)
    assert state(model.module) == before


BAD = {
    "no dictionaries": (lambda: [], {}, "no dictionaries"),
    "no such layer": (lambda: [at("mlp-in", 7, random_coder(8), [Site("mlp-out", 7)])], {}, "layers 0 to 1"),
    "another width": (lambda: [at("mlp-in", 0, random_coder(16), [Site("mlp-out", 0)])], {}, "16 numbers"),
    "a site of no kind known here": (lambda: [at("mlp-in", 0, random_coder(8))], {}, "mlp-in"),
    "another model's": (
        lambda: [Dictionary(random_coder(8), Site("mlp-in", 0), (Site("mlp-out", 0),), model="gpt2")], {}, "gpt2"),
    "twice the same place": (lambda: transcoders(8, 1) * 2, {}, "two dictionaries"),
    "an SAE where a transcoder writes": (lambda: transcoders(8, 1) + saes(8, "mlp-out", 1), {}, "leave one"),
    "a dead dictionary": (
        lambda: [at("mlp-in", 0, SparseCoder(8, 4, 8).double(), [Site("mlp-out", 0)])], {}, "active latent"),
    "a token that is not there": (lambda: transcoders(8), {"targets": [99]}, "token 99"),
    "a latent that is silent": (lambda: transcoders(8), {"targets": [Latent(Site("mlp-in", 0), 0, 999)]}, "not active"),
    "a direction of another width": (
        lambda: transcoders(8), {"targets": [Direction(Site("mlp-in", 0), 0, torch.ones(3))]}, "shape"),
    "a position that is not there": (
        lambda: transcoders(8), {"targets": [Direction(Site("mlp-in", 0), 9, torch.ones(8))]}, "position 9"),
    "no targets": (lambda: transcoders(8), {"targets": []}, "no targets"),
    "no features": (lambda: transcoders(8), {"max_features": 0}, "max_features"),
    "a negative threshold": (lambda: transcoders(8), {"hierarchical": True, "tau": -1.0}, "tau"),
    "a budget that is none": (lambda: transcoders(8), {"budget": "much"}, "budget"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what):
    make, options, message = BAD[what]
    with pytest.raises(OptionError, match=message):
        attribution_graph(tiny_model(), make(), tokens_of(tiny_model()), **options)


def test_logits_behind_a_dictionary_of_the_last_stream_are_refused():
    last = [at("resid-post", 1, random_coder(8))]
    with pytest.raises(OptionError, match="stands for the last stream"):
        attribution_graph(tiny_model(), last, tokens_of(tiny_model()), targets=[3])
    index = int(local_model(tiny_model(), last, tokens_of(tiny_model())).active[0].nodes.index[-1])
    graph = attribution_graph(tiny_model(), last, tokens_of(tiny_model()), targets=[Latent(last[0].read, -1, index)])
    assert float(graph.remainder.abs().max()) < 1e-9


def test_prompts_that_do_not_fit():
    model = tiny_model()
    for tokens in (torch.zeros(13, dtype=torch.long), torch.zeros(0, dtype=torch.long)):
        with pytest.raises(OptionError, match="1 to 12 tokens"):
            attribution_graph(model, transcoders(8), tokens)
    for share in (0.0, 1.5):
        with pytest.raises(OptionError, match="share"):
            attribution_graph(model, transcoders(8), tokens_of(model)).prune(share)


def test_activations_that_are_not_finite():
    model, tokens = tiny_model(), tokens_of(tiny_model())
    dictionaries = transcoders(8)
    dictionaries[1].coder.W_enc[0, 0] = float("nan")
    with pytest.raises(OptionError, match=r"mlp-in\.1"):
        attribution_graph(model, dictionaries, tokens)
    model.module.blocks[0].mlp.W_out.data[0, 0] = float("nan")
    with pytest.raises(UnsupportedModel, match="block 0"):
        attribution_graph(model, transcoders(8), tokens)


def test_models_that_cannot_be_taken_apart():
    model = tiny_model()
    with pytest.raises(UnsupportedModel, match="neurons"):
        attribution_graph(model.split_mlps(5), transcoders(8), tokens_of(model))
    model.wiring = replace(model.wiring, patterns=())
    with pytest.raises(UnsupportedModel, match="patterns"):
        attribution_graph(model, transcoders(8), tokens_of(model))
    with pytest.raises(OptionError, match="it is recurrent and has"):
        attribution_graph(ck.load("toys/parity_gru_s0"), transcoders(8), torch.ones(3, 1))
