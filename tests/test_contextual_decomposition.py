"""Contextual decomposition against both parts carried side by side, and on every family against frozen norms."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitkit as ck
from circuitkit.errors import OptionError, UnsupportedModel
from circuitkit.functional.metrics import METRICS, Metric
from circuitkit.models.decomposition import Decomposition, inner_wiring, record_whole
from circuitkit.models.hooks import hooked, keeper
from circuitkit.models.wiring import Port
from tests.families import build, every_family
from tests.laws.test_method_laws import assert_close
from tests.oracles.decomposition import literal_contributions
from tests.oracles.literal import literal_exact
from tests.toys import SHAPES, random_model, random_task

EDGES, NODES = "contextual-decomposition", "contextual-decomposition-nodes"
RULES = pytest.mark.parametrize("rules", ["difference", "authors"])


def scores(model, task, name=EDGES, **options):
    return ck.score(model, task, name, progress=False, **options).values.double()


@RULES
@given(shape=SHAPES, seed=st.integers(0, 99))
@settings(max_examples=6, deadline=None)
def test_edges_equal_both_parts_carried_side_by_side(rules, shape, seed):
    model = random_model(shape)
    lengths = torch.tensor([4, 3]) if model.causal else None
    task = random_task(model, n=2, length=4, lengths=lengths, seed=seed)
    edges = model.graph.mask.nonzero()
    some = edges[torch.randperm(len(edges), generator=torch.Generator().manual_seed(seed))[:12]]
    want = literal_contributions(model, task, [{"edge": tuple(e)} for e in some.tolist()], rules == "authors")
    assert_close(scores(model, task, rules=rules)[some[:, 0], some[:, 1]], want)


@RULES
@given(shape=SHAPES)
@settings(max_examples=5, deadline=None)
def test_nodes_equal_both_parts_carried_side_by_side(rules, shape):
    model = random_model(shape)
    task = random_task(model, n=2, length=4)
    cases = [{"node": row} for row in range(len(model.graph.sources))]
    got = ck.score(model, task, NODES, rules=rules, progress=False)
    assert got.rows == model.graph.sources and got.columns == ("all",)
    assert_close(got.values[:, 0], literal_contributions(model, task, cases, rules == "authors"))


@pytest.mark.parametrize("gated", [False, True])
def test_without_norms_edges_are_patched_edges_and_nodes_are_patched_nodes(gated):
    model = random_model(norm=None, gated=gated, position="rotary", heads=(4, 2))
    task = random_task(model)
    assert_close(scores(model, task), scores(model, task, "exact"))
    patched = scores(model, task, "activation-patching", site="head", per_position=False).flatten()
    heads = [i for i, node in enumerate(model.graph.source_nodes) if node.kind == "head"]
    assert_close(scores(model, task, NODES)[heads, 0], patched)


def test_norms_keep_their_scale():
    """An edge whose only effect is on the scale of a norm brings nothing."""
    model = random_model(n_layers=1, attn_only=True)
    model.module.unembed.W_U.data[0] = 0
    model.module.blocks[0].attn.W_O.data[:] = 0
    model.module.blocks[0].attn.W_O.data[..., 0] = 1  # what heads write is seen by the norm alone
    row, column = model.graph.edge("a0.h0->logits")
    task = random_task(model)
    assert abs(float(scores(model, task)[row, column])) < 1e-7 < abs(float(scores(model, task, "exact")[row, column]))


@given(seed=st.integers(0, 99), layers=st.integers(1, 3))
@settings(max_examples=4, deadline=None)
def test_on_linear_models_a_node_brings_the_sum_of_its_edges(seed, layers):
    model = random_model(linear=True, seed=seed, n_layers=layers)
    task = random_task(model, seed=seed)
    assert_close(scores(model, task, NODES)[:, 0], literal_exact(model, task).sum(1))


def test_the_authors_rules_leave_queries_and_keys_alone():
    model = random_model()
    values = scores(model, random_task(model), rules="authors")
    slots = [node.slot in ("q", "k") for node in model.graph.destination_nodes]
    assert torch.count_nonzero(values[:, slots]) == 0 and torch.count_nonzero(values) > 0


def prepared(model, n=2):
    batch = random_task(model, n=n, length=5).batches[0]
    runs = [model.record(side) for side in (batch.clean, batch.corrupt)]
    whole = record_whole(model, inner_wiring(model), runs[0])
    return batch, runs, whole, model.wiring.expand_difference(runs[0].writes, runs[1].writes)


def norms_of(bridge):
    names = ("ln1", "ln1_post", "ln2", "ln2_post")
    return [
        *(m for b in bridge.blocks for m in (getattr(b, n, None) for n in names) if m is not None), bridge.ln_final,
    ]  # fmt: skip


def frozen(norm, seen):
    """What a norm makes of its input with the scale that it had in the clean run."""
    inner = norm.original_component
    center = type(inner).__name__ == "LayerNorm"
    eps = getattr(inner, "eps", None) or getattr(inner, "variance_epsilon", None)
    gain = inner.weight + (1 if "Gemma" in type(inner).__name__ else 0)

    def apply(_y):
        clean, x = seen["clean", norm], seen["now", norm]
        middle = clean - clean.mean(-1, keepdim=True) if center else clean
        gap = x - clean
        gap = gap - gap.mean(-1, keepdim=True) if center else gap
        return seen["out", norm] + gain * gap * (middle.pow(2).mean(-1, keepdim=True) + eps).rsqrt()

    return apply


@every_family
@pytest.mark.parametrize("source", ["input", "m0"])
@torch.no_grad()
def test_the_two_parts_add_up_at_every_site(family, source):
    """The rest, run by the model itself with its norms' scales held, plus the relevant part is the clean activation."""
    model = ck.load(build(family, seed=3))
    batch, runs, whole, delta = prepared(model)
    row, rows, seen = model.graph.sources.index(source), torch.arange(len(batch)), {}
    norms = norms_of(model.module)
    keep = [(Port(m, "in"), keeper(seen, ("clean", m))) for m in norms]
    keep += [(Port(m), keeper(seen, ("out", m))) for m in norms]
    clean_port = {}
    keep += [(port, keeper(clean_port, port)) for port in whole.seen]
    with hooked(keep):
        model.module(batch.clean)
    hold = [(Port(m, "in"), keeper(seen, ("now", m))) for m in norms if ("clean", m) in seen]
    hold += [(Port(m), frozen(m, seen)) for m in norms if ("clean", m) in seen]
    start, edits = (runs[1] if source == "input" else runs[0]).inputs[0], []
    if source != "input":
        site = next(s for s in model.wiring.write_sites if s.first == row)
        hold = [hook for hook in hold if hook[0].module is not getattr(model.module.blocks[0], "ln2_post", None)]
        edits = [(site.port, lambda y: runs[1].writes[model.wiring.write_sites.index(site)].flatten(2))]
    rest, betas = {}, {}
    hooks = [*hold, *edits, *((port, keeper(rest, port)) for port in whole.seen)]
    with hooked([hook for hook in hold if hook[0].module is norms[-1]]):
        last = model.replay(runs[0], 0, start, rows, [h for h in hooks if h[0].module is not norms[-1]])
        positions = batch.lengths[:, None] - 1
        seen["clean", norms[-1]], seen["out", norms[-1]] = (
            seen[k, norms[-1]][rows[:, None], positions] for k in ("clean", "out")
        )
        want = model.logits(last, positions)
    parts = Decomposition(whole, shared=False, watch=betas.__setitem__)
    got = parts.from_writer(row, delta[row : row + 1], positions)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    assert not torch.allclose(want, model.logits(runs[0].inputs[-1], positions))
    inner = [site.port for site in (*whole.wiring.read_sites[:-1], *whole.wiring.write_sites[1:])]
    reached = [port for port in inner if port in betas]
    assert len(reached) >= (len(inner) if source == "input" else len(inner) // 2 - 1)
    for port in reached:
        both = betas[port][0] + rest[port].flatten(2)
        clean = clean_port[port].flatten(2)
        torch.testing.assert_close(both, clean, rtol=1e-4, atol=1e-5 * max(1.0, float(clean.abs().max())))


@every_family
@torch.no_grad()
def test_by_the_authors_rules_nothing_is_left_when_everything_is_relevant(family):
    """All biases follow, whatever the norms and gates: what is left of the logits is the unembedding's bias alone.

    In double precision where norms have biases: a coordinate near zero is all rounding, and takes a share of them.
    """
    layer_norms = family in ("GPT2", "GPTJ", "GPTNeoX", "Phi")
    model = ck.load(build(family, seed=3, dtype=torch.float64 if layer_norms else torch.float32))
    batch, runs, whole, _ = prepared(model)
    betas = {}
    positions = batch.lengths[:, None] - 1
    parts = Decomposition(whole, shared=True, watch=betas.__setitem__)
    rest = parts.from_writer(0, runs[0].inputs[0][None], positions)[0]
    bias = getattr(model.module.unembed.original_component, "bias", None)
    want = torch.zeros_like(rest) if bias is None else bias.expand_as(rest)
    size = float(model.logits(runs[0].inputs[-1], positions).abs().max())
    torch.testing.assert_close(rest, want, rtol=0, atol=1e-4 * size)
    for port, beta in betas.items():
        torch.testing.assert_close(beta[0], whole.seen[port], rtol=1e-3, atol=1e-4)


@every_family
@RULES
def test_every_family_scores_and_one_example_at_a_time_agrees(family, rules):
    model = ck.load(build(family))
    task = random_task(model, n=3)
    values = scores(model, task, rules=rules)
    size = float(values.abs().max())
    torch.testing.assert_close(scores(model, task, rules=rules, batch_size=1), values, rtol=1e-3, atol=1e-4 * size)
    if rules == "difference":
        exact, mask = scores(model, task, "exact"), model.graph.mask
        assert float(torch.corrcoef(torch.stack([values[mask], exact[mask]]))[0, 1]) > 0.5


def test_neurons_and_unknown_insides_are_decomposed_too():
    """A finer wiring changes no node that both have; an MLP whose inside is not known is one function."""
    model = random_model(gated=True)
    task = random_task(model)
    split = model.split_mlps(5)
    common = [i for i, node in enumerate(split.graph.source_nodes) if node.kind != "neuron"]
    whole = [i for i, node in enumerate(model.graph.source_nodes) if node.kind != "mlp"]
    for rules in ("difference", "authors"):
        assert_close(scores(split, task, NODES, rules=rules)[common], scores(model, task, NODES, rules=rules)[whole])
    readers = [i for i, node in enumerate(split.graph.destination_nodes) if node.kind != "neuron"]
    same = [i for i, node in enumerate(model.graph.destination_nodes) if node.kind != "mlp"]
    assert_close(scores(split, task)[common][:, readers], scores(model, task)[whole][:, same])
    blind = random_model(gated=True)
    blind.wiring = replace(blind.wiring, mlps=())
    assert_close(scores(blind, task), scores(model, task))


def test_metrics_without_a_gradient_and_other_corrupt_values():
    model = random_model(n_layers=1)
    task = random_task(model)
    assert scores(model, task.with_metric("accuracy")).isfinite().all()
    assert scores(model, task.with_metric("kl")).min() >= -1e-6
    for value in ("mean", "zero"):
        assert not torch.allclose(scores(model, task, corrupt_value=value), scores(model, task))


def test_what_is_not_understood_is_refused():
    model = random_model()
    task = random_task(model)
    for name in (EDGES, NODES):
        with pytest.raises(OptionError, match="rules"):
            scores(model, task, name, rules="mine")
        with pytest.raises(OptionError, match="corrupt_value"):
            scores(model, task, name, corrupt_value="noise")
    broken = random_model()
    parts = broken.wiring.mlps
    broken.wiring = replace(broken.wiring, mlps=(replace(parts[0], activation=torch.sin), *parts[1:]))
    with pytest.raises(UnsupportedModel, match="law of neurons"):
        scores(broken, task)


def test_identical_pairs_bring_nothing_and_the_metric_scales_node_scores():
    model = random_model()
    assert torch.count_nonzero(scores(model, random_task(model, same=True), NODES)) == 0
    task, base = random_task(model), METRICS["logit-diff"]
    double = replace(task, metric=Metric("double", lambda x, b: 2 * base.function(x, b), base.needs))
    assert_close(scores(model, double, NODES), 2 * scores(model, task, NODES))


def test_bfloat16():
    model = ck.load(build("Gemma2", dtype=torch.bfloat16))
    wide = ck.load(build("Gemma2", dtype=torch.bfloat16).float())
    task = random_task(model, n=2)
    got, want = (scores(m, task)[m.graph.mask] for m in (model, wide))
    assert float(torch.corrcoef(torch.stack([got, want]))[0, 1]) > 0.8
