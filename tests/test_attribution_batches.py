"""Attribution graphs of several prompts at once equal those one by one; prompts and targets as texts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitkit as ck
from circuitkit.dictionaries.base import Site
from circuitkit.errors import OptionError
from circuitkit.features import together
from circuitkit.features.attribution import attribution_graph, attribution_graphs
from circuitkit.features.contrast import Contrast
from circuitkit.features.local import same_site
from circuitkit.features.pack import pack
from circuitkit.features.replace import local_models
from circuitkit.features.targets import AttentionScore, Direction
from circuitkit.testing import tiny_model
from tests.test_attribution_graphs import MODELS, SETS, saes, tokens_of, transcoders

LENGTHS = (7, 6, 7, 3, 12)


@pytest.fixture(autouse=True)
def whatever_the_length(monkeypatch):
    """Limits are chosen for speed; sums must be right beyond them too."""
    monkeypatch.setattr(together, "SWEPT", 100)
    monkeypatch.setattr(together, "LEAST", 2)
    monkeypatch.setattr(together, "SHORTEST", 0.0)


def assert_same(got, want):
    assert got.nodes == want.nodes or [n.name for n in got.nodes] == [n.name for n in want.nodes]
    assert [n.stage for n in got.nodes] == [n.stage for n in want.nodes]
    assert torch.equal(got.targets, want.targets) and torch.equal(got.tokens, want.tokens)
    for name in ("effects", "totals", "weights"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-9, atol=1e-11)


def prompts_of(model, lengths=LENGTHS):
    return [tokens_of(model, n, seed) for seed, n in enumerate(lengths)]


def assert_batch_is_one_by_one(model, dictionaries, prompts, targets=None, **options):
    got = attribution_graphs(model, dictionaries, prompts, targets=targets, progress=False, **options)
    assert len(got) == len(prompts)
    for i, (tokens, graph) in enumerate(zip(prompts, got, strict=True)):
        want = attribution_graph(model, dictionaries, tokens, targets=targets and targets[i], **options)
        assert_same(graph, want)


@pytest.mark.parametrize("what", SETS)
def test_a_batch_equals_one_by_one(what):
    model = tiny_model(n_heads=4, d_head=2, n_key_value_heads=2)
    assert_batch_is_one_by_one(model, SETS[what](8), prompts_of(model))


@pytest.mark.parametrize("shape", MODELS)
def test_of_every_shape(shape):
    model = tiny_model(**MODELS[shape])
    width = model.module.config.n_heads * model.module.config.d_head
    assert_batch_is_one_by_one(model, SETS["everything"](8, width), prompts_of(model))


def test_with_frozen_gates_and_with_latents_silenced():
    model = tiny_model()
    assert_batch_is_one_by_one(model, saes(8, "attn-out"), prompts_of(model), frozen_mlps=True)
    assert_batch_is_one_by_one(model, transcoders(8), prompts_of(model), hierarchical=True, tau=0.02)


def test_capped_graphs_choose_the_same_latents():
    model = tiny_model()
    assert_batch_is_one_by_one(model, transcoders(8), prompts_of(model), max_features=9)


def test_a_small_budget_changes_nothing():
    model = tiny_model()
    prompts = prompts_of(model, (3, 2))
    whole = attribution_graphs(model, SETS["everything"](8), prompts, progress=False)
    for budget in (1, 100_000):
        cut = attribution_graphs(model, SETS["everything"](8), prompts, progress=False, budget=budget)
        for a, b in zip(cut, whole, strict=True):
            assert_same(a, b)


def test_each_prompt_has_targets_of_its_own():
    model = tiny_model()
    vector = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    targets = [
        [3], None, [AttentionScore(1, 0, -1, 2), 4], [Direction(Site("mlp-out", 0), 1, vector), Contrast(2, 5)],
        [Contrast(1, 2), 6],
    ]  # fmt: skip
    assert_batch_is_one_by_one(model, transcoders(8), prompts_of(model), targets)


def test_the_order_of_prompts_changes_nothing():
    model = tiny_model()
    prompts = prompts_of(model)
    forth = attribution_graphs(model, transcoders(8), prompts, progress=False)
    back = attribution_graphs(model, transcoders(8), prompts[::-1], progress=False)
    for a, b in zip(forth, back[::-1], strict=True):
        assert_same(a, b)


def test_maps_of_a_pack_are_those_of_its_prompts():
    """Down and up, every map of the pack, each block by itself."""
    model, n = tiny_model(n_heads=4, d_head=2, n_key_value_heads=2), 6
    locals_ = local_models(model, SETS["skip transcoders"](8) + saes(8, "attn-out"), prompts_of(model, (6, 6)))
    packed = pack(locals_, n).local
    generator = torch.Generator().manual_seed(0)
    for whole, *parts in zip(packed.stages(), *(local.stages() for local in locals_), strict=True):
        if whole.before is None:
            continue
        below = 8  # the stream's width, and that of z here
        width = locals_[0].values[same_site(whole.site)].shape[1]
        g = torch.randn(3, 2 * n, width, dtype=torch.float64, generator=generator)
        x = torch.randn(3, 2 * n, below, dtype=torch.float64, generator=generator)
        for way, y in (("pull", g), ("push", x)):
            want = torch.cat([getattr(p.before, way)(half) for p, half in zip(parts, y.split(n, 1), strict=True)], 1)
            torch.testing.assert_close(getattr(whole.before, way)(y), want, rtol=1e-10, atol=1e-12)


@given(lengths=st.lists(st.integers(1, 300), max_size=40), keys=st.data())
@settings(max_examples=40, deadline=None)
def test_buckets_hold_every_prompt_once_and_not_too_many(lengths, keys):
    marks = [keys.draw(st.integers(0, 1)) for _ in lengths]
    made = together.buckets(lengths, marks)
    assert sorted(i for some in made for i in some) == list(range(len(lengths)))
    for some in made:
        assert len({marks[i] for i in some}) == 1
        assert len(some) == 1 or len(some) * max(lengths[i] for i in some) <= together.TOGETHER


def test_long_prompts_run_together_and_are_swept_one_by_one(monkeypatch):
    monkeypatch.setattr(together, "SWEPT", 4)
    model = tiny_model()
    assert_batch_is_one_by_one(model, transcoders(8), prompts_of(model, (6, 6, 3)))


def test_bad_input():
    model = tiny_model()
    assert attribution_graphs(model, transcoders(8), [], progress=False) == []
    with pytest.raises(OptionError, match="1 prompts and 2"):
        attribution_graphs(model, transcoders(8), prompts_of(model, (3, 3)), targets=[[1]], progress=False)
    with pytest.raises(OptionError, match="one prompt of 1 to"):
        attribution_graphs(model, transcoders(8), [tokens_of(model, 3), torch.zeros(0, dtype=torch.long)])
    with pytest.raises(OptionError, match="no tokenizer; give token ids"):
        attribution_graph(model, transcoders(8), "Once")
    with pytest.raises(OptionError, match="no tokenizer; give token ids"):
        attribution_graph(model, transcoders(8), tokens_of(model, 3), targets=[" cat"])


@pytest.fixture(scope="module")
def stories():
    model = ck.load("stories260k")
    dtype = next(model.module.parameters()).dtype
    return model, transcoders(64, 5, dtype=dtype, activation="topk", k=4)


def test_texts_are_read_by_the_models_tokenizer(stories):
    model, dictionaries = stories
    text = "Once upon a time there was a"
    graph = attribution_graph(model, dictionaries, text, targets=[" b", Contrast(" b", " m")])
    ids = model.tokenizer(text)["input_ids"]
    assert graph.tokens.tolist() == ids and len(graph.texts) == len(ids)
    assert "".join(graph.texts[1:]).strip() == text
    logits = model.module(torch.tensor([ids]))[0, -1].detach()
    first, second = (graph.nodes[int(i)] for i in graph.targets[:2])
    assert first.kind == "logit" and second.kind == "direction"
    right, wrong = first.index, int(second.name.partition("@")[0].rpartition("-")[2])
    assert model.tokenizer.convert_ids_to_tokens([right, wrong]) == ["▁b", "▁m"]
    assert math.isclose(float(graph.totals[1]), float(logits[right] - logits[wrong]), rel_tol=1e-4)
    same = attribution_graph(model, dictionaries, torch.tensor(ids), targets=[right, Contrast(right, wrong)])
    assert torch.equal(same.effects, graph.effects) and same.nodes == graph.nodes and same.texts == graph.texts
    plain = attribution_graph(model, dictionaries, torch.tensor(ids), targets=[right, wrong])
    torch.testing.assert_close(graph.effects[1, : plain.effects.shape[1] - 2],
                               (plain.effects[0] - plain.effects[1])[:-2], rtol=1e-3, atol=1e-4)  # fmt: skip


def test_a_text_of_several_tokens_is_refused_with_what_it_was_split_into(stories):
    model, dictionaries = stories
    for target in (" elephant", Contrast(" elephant", " b")):
        with pytest.raises(OptionError, match=r"elephant.* one token.*▁"):
            attribution_graph(model, dictionaries, "Once upon a time", targets=[target])
