"""What a circuit does without some more edges, computed from what changes only, against whole runs of circuits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitkit as ck
from circuitkit.methods.search import stages
from circuitkit.models.circuits import run_circuits
from circuitkit.models.parts import leads_on, tied_feeds
from circuitkit.models.removals import Removals
from tests.families import build, every_family
from tests.toys import SHAPES, random_model, random_task


def check(model, task, *, kept=0.6, seed=0, rtol=1e-9, corrupt=None):
    """Go down the stages; in each compare some random removals with whole runs, then settle on one of them."""
    draw = torch.Generator().manual_seed(seed)
    batch = task.batches[0]
    held = Removals(model, batch.clean, batch.positions, corrupt or (lambda run: model.record(batch.corrupt).writes))
    keep = model.graph.mask.clone()
    for columns in stages(model.graph):
        more = keep.repeat(4, 1, 1)
        # The second circuit loses the same edges into half of the readers: these share what they read.
        more[:, :, columns] &= torch.rand(more[:, :, columns].shape, generator=draw) < kept
        half = columns[: len(columns) // 2]
        more[1, :, half] = more[0, :, half]
        more[3] = keep
        with torch.no_grad():
            want = run_circuits(model, held.run, held.corrupt, more, batch.positions)
        got = held.logits(more, columns)
        torch.testing.assert_close(got, want, rtol=rtol, atol=rtol * float(want.abs().max()))
        keep = more[0]
        held.settle(keep, columns)
    return held


@given(shape=SHAPES, seed=st.integers(0, 99), kept=st.sampled_from([0.1, 0.5, 0.9]))
@settings(max_examples=12, deadline=None)
def test_changes_are_those_of_whole_runs(shape, seed, kept):
    model = random_model(shape)
    lengths = torch.tensor([6, 3, 5]) if model.causal else None
    check(model, random_task(model, n=3, lengths=lengths), kept=kept, seed=seed)


@every_family
def test_changes_are_those_of_whole_runs_in_every_family(family):
    model = ck.load(build(family))
    held = check(model, random_task(model, n=2), rtol=1e-4)
    attention, mlp = held.parts[:2]
    assert 0 < int(held.keep.sum()) < model.graph.n_edges
    assert mlp.pointwise is not None, "the MLP's inside is known, so it is computed without its block"
    tied = family.startswith("Gemma")
    assert (attention.groups > 1) != tied, "heads are alike, unless a norm of their sum ties them"


def test_changes_are_those_of_whole_runs_with_neurons_as_nodes():
    for gated in (False, True):
        model = random_model(gated=gated).split_mlps(group=5)
        check(model, random_task(model, n=2))


@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_any_value_can_be_carried(scale):
    model = random_model(heads=(4, 2))
    check(model, random_task(model, n=2), corrupt=lambda run: tuple(scale * w for w in run.writes))


def test_narrow_numbers_stay_narrow_and_close():
    model = ck.load(build("Llama", dtype=torch.bfloat16))
    check(model, random_task(model, n=2), rtol=0.05)


def test_heads_that_are_not_alike_are_not_mixed_up():
    model = random_model(heads=(4, 4), n_layers=1)
    bias = torch.arange(4.0, dtype=torch.float64)[:, None, None] * torch.ones(6, 6).tril(-1)
    model.module.blocks[0].attn.hook_pattern.register_forward_hook(
        lambda _module, _args, pattern: (pattern * bias.exp()) / (pattern * bias.exp()).sum(-1, keepdim=True)
    )
    held = check(model, random_task(model, n=2))
    assert held.parts[0].groups == 1


@pytest.mark.parametrize("last", ["m1->logits", "m1->a2.h0<v>"])
def test_mlps_behind_each_other_are_followed_at_the_answers_or_wherever_attention_looks(last):
    model = random_model(n_layers=3, heads=(2, 2), gated=True)
    task = random_task(model, n=3, lengths=torch.tensor([6, 3, 5]))
    batch, graph = task.batches[0], model.graph
    chain = ["input->m0", "m0->m1", last, "a2.h0->logits"]
    held = Removals(model, batch.clean, batch.positions, lambda run: model.record(batch.corrupt).writes)
    keep = graph.mask.clone()
    for columns in stages(graph):
        less = keep.clone()
        less[:, columns] &= graph.edge_mask(chain)[:, columns]
        without = torch.stack((keep, less))
        with torch.no_grad():
            want = run_circuits(model, held.run, held.corrupt, without, batch.positions)
        torch.testing.assert_close(held.logits(without, columns), want, rtol=1e-9, atol=1e-9)
        keep = less
        held.settle(keep, columns)
    rows = [graph.sources.index(name) for name in ("m0", "m1")]
    assert held.wide[rows].tolist() == [last != "m1->logits"] * 2


def test_only_what_leads_to_the_logits_is_followed():
    graph = random_model(n_layers=2, heads=(2, 2)).graph
    keep = graph.edge_mask(["a1.h0->logits", "a0.h1->a1.h0<k>", "input->a0.h1<v>", "input->a0.h0<v>"])
    alive = leads_on(keep, graph.feeds)
    names = {name for name, leads in zip(graph.destinations, alive.tolist(), strict=True) if leads}
    heads = {f"{head}<{slot}>" for head in ("a1.h0", "a0.h1") for slot in "qkv"}
    assert names == heads | {"logits"}


def test_heads_before_a_shared_norm_lead_wherever_one_of_them_does():
    model = ck.load(build("Gemma2"))
    feeds = tied_feeds(model.wiring)
    reader = model.graph.destinations.index("a0.h0<q>")
    fed = {name for name, is_fed in zip(model.graph.sources, feeds[reader].tolist(), strict=True) if is_fed}
    assert fed == {f"a0.h{i}" for i in range(4)}
    assert torch.equal(tied_feeds(random_model().wiring), random_model().graph.feeds)


def test_the_model_is_left_as_found():
    model = random_model()
    model.module.train()
    task = random_task(model, n=2)
    before = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.module.modules()]
    held = check(model, task)
    after = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.module.modules()]
    assert before == after
    assert all(p.requires_grad for p in model.module.parameters()) and not held.last.requires_grad
