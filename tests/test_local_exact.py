"""Local-exact scores against a literal oracle, against brute force in other families, and against exact patching."""

import pytest
import torch
from hypothesis import given, settings

import circuitkit as ck
from circuitkit.errors import MetricError, UnsupportedModel
from circuitkit.models.hooks import hooked, keeper
from circuitkit.models.local import check_heads_are_independent
from tests.families import build
from tests.oracles.local import literal_local_exact
from tests.toys import SHAPES, random_model, random_task


def scores(model, task, name="local-exact", **options):
    return ck.score(model, task, name, progress=False, **options)


def agreement(got, want):
    """Pearson and Spearman correlation."""
    pairs = [(got, want), (got.argsort().argsort(), want.argsort().argsort())]
    return [float(torch.corrcoef(torch.stack(pair).double())[0, 1]) for pair in pairs]


def queries_and_keys(graph):
    return graph.mask & torch.tensor([node.slot in ("q", "k") for node in graph.destination_nodes])


@given(shape=SHAPES)
@settings(max_examples=6, deadline=None)
def test_scores_equal_a_literal_recomputation(shape):
    model = random_model(shape, n_layers=min(shape["n_layers"], 2))
    task = random_task(model, n=2, length=4)
    want = literal_local_exact(model, task)
    torch.testing.assert_close(
        scores(model, task).values.double(), want, rtol=1e-6, atol=1e-6 * float(want.abs().max())
    )


def test_padded_examples_equal_a_literal_recomputation():
    model = random_model(heads=(4, 2), gated=True, position="rotary")
    task = random_task(model, n=3, lengths=torch.tensor([6, 3, 4]))
    want = literal_local_exact(model, task)
    torch.testing.assert_close(
        scores(model, task).values.double(), want, rtol=1e-6, atol=1e-6 * float(want.abs().max())
    )


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_scores_are_exact_where_nothing_nonlinear_follows_the_head(heads):
    """One layer, no norm before the logits: softmax attention is the only nonlinearity, and it is run."""
    model = random_model(n_layers=1, attn_only=True, norm=None, heads=heads)
    task = random_task(model)
    got, want = scores(model, task).values, scores(model, task, "exact").values
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(scores(model, task, "eap").values, want, rtol=0.1, atol=1e-3)


def test_an_mlp_with_nothing_behind_it_is_exact():
    model = random_model(n_layers=1, norm=None)
    task = random_task(model)
    column = model.graph.destinations.index("m0")
    got, want = (scores(model, task, name).values[:, column] for name in ("local-exact", "exact"))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_saturated_attention_is_scored_better_than_by_a_gradient(seed):
    """Queries of a random model made so large that most attention is all on one position."""
    model = random_model(n_layers=2, attn_only=True, norm=None, heads=(4, 4), seed=seed)
    for block in model.module.blocks:
        block.attn.W_Q.data *= 100
    task = random_task(model, n=8)
    seen = {}
    with hooked([(port, keeper(seen, port)) for port in model.wiring.patterns]), torch.no_grad():
        model.module(task.batches[0].clean)
    assert all(float(pattern.amax(-1).median()) > 0.95 for pattern in seen.values())
    exact = scores(model, task, "exact").values
    for part in (model.graph.mask, queries_and_keys(model.graph)):
        ours, linear = (
            agreement(scores(model, task, name).values[part], exact[part]) for name in ("local-exact", "eap")
        )
        assert ours[0] > linear[0] + 0.1 and ours[1] > linear[1] + 0.1


def test_scores_of_a_trained_model_are_closer_to_exact_patching_than_a_gradient():
    """The figures of docs/methods/local-exact.md, on fewer examples."""
    model = ck.load("stories260k")
    task = ck.task("gender-pronoun", model, n=2, seed=0)
    exact = scores(model, task, "exact").values
    ours, linear = (scores(model, task, name).values for name in ("local-exact", "eap"))
    for part in (model.graph.mask, queries_and_keys(model.graph)):
        better, worse = agreement(ours[part], exact[part]), agreement(linear[part], exact[part])
        assert better[0] > worse[0] and better[1] > worse[1]
    assert agreement(ours[part], exact[part])[0] > 0.95


def by_hand(model, batch, metric, site, node, src):
    """M(clean) - M(one reader patched), everything behind what it feeds linear; one reader, hooks and autograd only."""
    graph, wiring = model.graph, model.wiring
    runs = model.record(batch.clean), model.record(batch.corrupt)
    delta = wiring.expand_difference(runs[0].writes, runs[1].writes)[src]
    writers = graph.feeds[site.first + node].nonzero().flatten().tolist()
    written = next(w for w in wiring.write_sites if w.first <= writers[0] < w.rows.stop)
    rows = torch.arange(len(batch))
    seen = {}

    def patch(y):
        made = site.read((seen["x"] - delta)[None], slice(node, node + 1))[0]
        out = y.reshape(*y.shape[:2], site.n, -1).clone()
        out[:, :, node] = made
        return out.reshape(y.shape)

    keep = (written.port, keeper(seen, "w"))
    model.replay(runs[0], 0, runs[0].inputs[0], rows, [keep])
    clean = seen["w"]
    model.replay(runs[0], 0, runs[0].inputs[0], rows, [(site.stream, keeper(seen, "x")), (site.port, patch), keep])
    change = seen["w"] - clean
    t = torch.zeros((), requires_grad=True)
    with torch.enable_grad():
        last = model.replay(runs[0], 0, runs[0].inputs[0], rows, [(written.port, lambda w: w + t * change)])
        value = metric(model.logits(last, batch.positions), batch).mean()
        return -float(torch.autograd.grad(value, t)[0])


@pytest.mark.parametrize("family", ["GPT2", "GPTJ", "Llama", "Gemma2", "Qwen3"])
def test_random_edges_of_other_families_equal_one_patched_reader_at_a_time(family):
    model = ck.load(build(family))
    task = random_task(model, n=2, length=5)
    got, batch = scores(model, task).values, task.batches[0]
    inner = model.wiring.read_sites[:-1]
    generator = torch.Generator().manual_seed(0)
    want = torch.zeros_like(got)
    picked = []
    for site in inner:
        node = int(torch.randint(site.n, (1,), generator=generator))
        src = int(torch.randint(model.wiring.writes_before(site), (1,), generator=generator))
        with torch.no_grad(), model.quiet():
            want[src, site.first + node] = by_hand(model, batch, task.metric, site, node, src)
        picked.append((src, site.first + node))
    rows, columns = torch.tensor(picked).T
    size = float(want.abs().max())
    torch.testing.assert_close(got[rows, columns], want[rows, columns], rtol=1e-3, atol=2e-4 * size)


def test_bfloat16_gives_finite_scores_near_those_of_float32():
    got, want = (
        scores(ck.load(build("Llama", dtype=dtype)), random_task(ck.load(build("Llama")), n=2)).values
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert agreement(got.flatten(), want.flatten())[0] > 0.9


def test_metrics_without_a_gradient_at_the_clean_run_are_refused():
    model = random_model()
    task = random_task(model)
    with pytest.raises(MetricError, match=r"no useful gradient; .* 'exact'"):
        scores(model, task.with_metric("accuracy"))
    with pytest.raises(MetricError, match="at the clean run is zero"):
        scores(model, task.with_metric("kl"))


def test_a_squared_error_of_zero_at_the_clean_run_is_refused():
    model = ck.load("tracr/frac_prevs")
    task = ck.task("tracr", model, n=4)
    with pytest.raises(MetricError, match="flat there"):
        scores(model, task)


def test_heads_that_depend_on_each_other_are_refused():
    """A norm over the queries of all heads together lets one head's query change what the others write."""
    model = random_model(heads=(4, 4), norm=None)
    run = model.record(random_task(model).batches[0].clean)
    check_heads_are_independent(model, run)

    class JointNorm(torch.nn.Module):
        def forward(self, q):
            return q / q.square().mean((-2, -1), keepdim=True).sqrt()

    # The port stays where it was, before the norm.
    attn = model.module.blocks[1].attn
    attn.hook_q = torch.nn.Sequential(attn.hook_q, JointNorm())
    with pytest.raises(UnsupportedModel, match=r"layer 1 .*a1.h0<q>.* changes what other heads write"):
        scores(model, random_task(model))
