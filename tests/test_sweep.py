"""Circuits computed only where it matters give what running the whole of each gives, and really skip the rest."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitkit as ck
from circuitkit.models.circuits import run_circuits
from circuitkit.models.skipping import without_products
from circuitkit.models.sweep import record_streams, start_sweep, to_compute
from tests.families import build, every_family
from tests.toys import SHAPES, random_model, random_task

few = settings(max_examples=10, deadline=None)
SHARES = (0.0, 0.03, 0.1, 0.3, 0.5, 0.9, 0.98, 1.0)


def masks(graph, shares=SHARES, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.stack([torch.rand(graph.mask.shape, generator=draw) < share for share in shares]) & graph.mask


def both(model, keep, batch, corrupt=None):
    """Logits by the sweep and by running every circuit whole."""
    with torch.no_grad(), model.quiet():
        run, streams = record_streams(model, batch.clean)
        other = model.record(batch.corrupt).writes if corrupt is None else corrupt(run)
        want = run_circuits(model, run, other, keep, batch.positions)
        return start_sweep(model, run, streams, other).logits(keep, batch.positions), want


@given(shape=SHAPES, seed=st.integers(0, 99))
@few
def test_the_sweep_gives_what_whole_runs_give(shape, seed):
    model = random_model(shape)
    batch = random_task(model, n=2).batches[0]
    got, want = both(model, masks(model.graph, seed=seed), batch)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


@every_family
def test_every_family_with_and_without_skipped_products(family, monkeypatch):
    model = ck.load(build(family))
    batch = random_task(model, n=2).batches[0]
    keep = masks(model.graph)
    for worth in (0, 1e18):
        monkeypatch.setattr("circuitkit.models.sweep.WORTH_SKIPPING", worth)
        got, want = both(model, keep, batch)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    half = both(model, keep[3:], batch, lambda run: tuple(w / 2 for w in run.writes))
    torch.testing.assert_close(*half, rtol=1e-3, atol=1e-4)


def test_narrow_models_agree_to_their_rounding():
    model = ck.load(build("Llama", dtype=torch.bfloat16))
    got, want = both(model, masks(model.graph, (0.1, 0.5, 0.9)), random_task(model, n=2).batches[0])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


def test_what_must_be_computed_by_hand():
    """Two attention-only layers of one head: input, a0.h0, a1.h0 and the logits."""
    model = random_model(heads=(1, 1), attn_only=True)
    edges = (
        ["input->a0.h0<v>", "a0.h0->a1.h0<k>", "a1.h0->logits"],  # both heads, on other inputs than in the clean run
        ["input->a0.h0<v>", "a0.h0->a1.h0<k>"],  # no way to the logits
        ["a1.h0->logits"],
        list(model.graph.edge_names()),  # the clean run itself
    )
    computed, clean = to_compute(model, torch.stack([model.graph.edge_mask(names) for names in edges]))
    assert computed.tolist() == [[False, True, True], [False] * 3, [False, False, True], [False] * 3]
    assert clean.tolist() == [[True, False, False], [False] * 3, [False] * 3, [True, True, True]]


def test_blocks_that_no_circuit_needs_are_not_run():
    model = random_model(n_layers=3, heads=(2, 2))
    batch = random_task(model, n=2).batches[0]
    only_last = model.graph.edge_mask(["input->m2", "m2->logits"])[None]
    nothing, everything = torch.zeros_like(only_last), model.graph.mask[None]
    with torch.no_grad(), model.quiet():
        run, streams = record_streams(model, batch.clean)
        sweep = start_sweep(model, run, streams, model.record(batch.corrupt).writes)
        for keep, ran in ((nothing, []), (only_last, [2]), (everything, [])):
            calls = []
            handles = [
                block.register_forward_pre_hook(lambda *_, i=i, calls=calls: calls.append(i))
                for i, block in enumerate(model.wiring.blocks)
            ]
            sweep.logits(keep, batch.positions)
            for handle in handles:
                handle.remove()
            assert calls == ran


def test_the_whole_model_is_the_clean_run_to_the_bit():
    model = ck.load("stories260k")
    batch = ck.task("gender-pronoun", model, n=4).batches[0]
    got, _ = both(model, model.graph.mask[None], batch)
    with torch.no_grad():
        assert torch.equal(got[0], model.logits(model.record(batch.clean).inputs[-1], batch.positions))


def test_only_whole_projections_are_left_out():
    fused, other = torch.nn.Linear(4, 6, bias=False), torch.nn.Linear(4, 6, bias=False)
    x = torch.ones(2, 4)
    halves = fused.weight[:3], fused.weight[3:]
    with without_products(halves):
        assert not fused(x).any() and not torch.nn.functional.linear(x, halves[0]).any()
        assert other(x).any()
    with without_products(halves[:1]):  # the rest of the tensor may be read by something else
        assert fused(x)[:, 3:].any() and torch.nn.functional.linear(x, halves[1]).any()
    assert fused(x).any()


@pytest.mark.parametrize("name", ["GPT2", "Llama"])
def test_products_really_are_left_out(name, monkeypatch):
    """Otherwise the saving would be a claim: queries, keys, values and the heads' outputs of both layers."""
    monkeypatch.setattr("circuitkit.models.sweep.WORTH_SKIPPING", 0)
    model, seen = ck.load(build(name)), []
    original = without_products.__torch_function__

    def watched(self, func, types, args=(), kwargs=None):
        out = original(self, func, types, args, kwargs)
        if func in (torch.nn.functional.linear, torch.addmm) and not out.any():
            seen.append(func)
        return out

    monkeypatch.setattr(without_products, "__torch_function__", watched)
    keep = model.graph.mask.clone()
    keep[model.graph.edge("input->a0.h0<q>")] = False
    both(model, keep[None], random_task(model, n=2).batches[0])
    assert len(seen) == 8
