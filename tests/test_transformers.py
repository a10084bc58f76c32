"""Hugging Face models of every family: wiring, scores against brute force, and refusal of what is wired wrongly."""

import copy
from dataclasses import replace

import pytest
import torch

import circuitkit as ck
from circuitkit.errors import UnknownName, UnsupportedModel
from circuitkit.evaluation.faithfulness import circuit_metrics
from circuitkit.methods.base import corrupt_writes
from circuitkit.methods.plan import Plan
from tests.families import build, every_family
from tests.toys import random_task


@every_family
def test_wiring_obeys_every_law_and_scores_follow(family):
    module = build(family)
    tokens = torch.arange(12).reshape(2, 6)
    before = module(tokens).logits
    model = ck.load(module)
    assert model.causal
    task = random_task(model, n=3)
    eap, exact = (ck.score(model, task, name, progress=False).values for name in ("eap", "exact"))
    together = torch.stack([eap[model.graph.mask], exact[model.graph.mask]])
    assert float(torch.corrcoef(together)[0, 1]) > 0.5
    assert torch.equal(module(tokens).logits, before)


@every_family
def test_exact_equals_running_the_circuit_without_that_edge(family):
    """Two independent paths through the code: one edge as a row of a batch, and a circuit that lacks one edge."""
    model = ck.load(build(family))
    task = random_task(model, n=2)
    exact = ck.score(model, task, "exact", progress=False).values
    edges = model.graph.mask.nonzero()[:: max(1, model.graph.n_edges // 12)]
    keep = torch.ones(len(edges), *model.graph.mask.shape, dtype=torch.bool)
    keep[torch.arange(len(edges)), edges[:, 0], edges[:, 1]] = False
    clean, values = circuit_metrics(model, task, keep, plan=Plan(progress=False), corrupt_value="counterfactual")
    want = (clean - values).mean(1).float()
    torch.testing.assert_close(exact[edges[:, 0], edges[:, 1]], want, rtol=1e-3, atol=2e-5)


@every_family
def test_one_example_at_a_time_and_repeated_rows_agree(family):
    """Block arguments that carry the batch (masks, positions) must follow their rows, also when pos equals batch."""
    model = ck.load(build(family))
    task = random_task(model, n=6, length=6)
    whole = ck.score(model, task, "eap-ig", steps=2, progress=False)
    single = ck.score(model, task, "eap-ig", steps=2, batch_size=1, progress=False)
    scale = float(whole.values.abs().max())
    torch.testing.assert_close(whole.values, single.values, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Gemma2"])
def test_bfloat16_models_score_in_float32(family):
    narrow = ck.load(build(family, dtype=torch.bfloat16))
    wide = ck.load(build(family, dtype=torch.bfloat16).float())
    task = random_task(narrow, n=4)
    got, want = (ck.score(m, task, "eap-ig", progress=False).values for m in (narrow, wide))
    assert got.dtype == torch.float32
    mask = narrow.graph.mask
    assert float(torch.corrcoef(torch.stack([got[mask], want[mask]]))[0, 1]) > 0.97


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 1}, {"num_attention_heads": 2, "num_key_value_heads": 1}])
def test_one_layer_and_one_key_value_head(changes):
    model = ck.load(build("Llama", **changes))
    scores = ck.score(model, random_task(model, n=1), "eap", progress=False)
    assert scores.values.abs().sum() > 0


def test_grouped_query_readers_belong_to_key_value_heads():
    graph = ck.load(build("Llama")).graph
    assert "a1.kv1<k>" in graph.destinations and "a1.h3<k>" not in graph.destinations
    fed = graph.feeds[graph.destinations.index("a1.kv1<v>")].nonzero().flatten()
    assert [graph.sources[i] for i in fed] == ["a1.h2", "a1.h3"]


def test_parallel_blocks_have_no_edge_from_heads_to_their_own_mlp():
    for family, edge in (("Phi", False), ("GPTNeoX", False), ("GPT2", True)):
        graph = ck.load(build(family)).graph
        assert bool(graph.mask[graph.sources.index("a1.h0"), graph.destinations.index("m1")]) is edge


def test_the_users_module_keeps_its_structure_weights_and_hooks():
    module = build("GPT2").train()
    calls = []
    module.transformer.h[0].register_forward_hook(lambda *_: calls.append(1))
    keys, classes = list(module.state_dict()), [type(m) for m in module.modules()]
    model = ck.load(module)
    ck.score(model, random_task(model, n=2), "eap", progress=False)
    assert list(module.state_dict()) == keys and [type(m) for m in module.modules()] == classes
    assert module.training and all(p.requires_grad and p.grad is None for p in module.parameters())
    assert next(model.module.parameters()).data_ptr() == next(module.parameters()).data_ptr(), "weights are shared"
    assert calls


def test_a_bridge_is_accepted_as_it_is():
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    module = build("Llama")
    bridge = build_bridge_from_module(copy.deepcopy(module), "LlamaForCausalLM", hf_config=module.config)
    ours, theirs = ck.load(bridge), ck.load(module)
    task = random_task(ours, n=2)
    a, b = (ck.score(m, task, "eap", progress=False).values for m in (ours, theirs))
    torch.testing.assert_close(a, b)


def test_a_folder_is_loaded_with_its_tokenizer(tmp_path):
    from circuitkit.resources import resource

    module = build("Llama")
    module.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(resource("stories260k", "hf", name).read_text())
    model = ck.load(str(tmp_path))
    assert model.tokenizer is not None and model.name == tmp_path.name
    tokens = torch.arange(5)[None]
    torch.testing.assert_close(model.module(tokens), module(tokens).logits)


def test_names_that_cannot_be_loaded_say_why(tmp_path):
    with pytest.raises(UnknownName, match="did you mean 'tracr/hist'"):
        ck.load("tracr/hits")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match="could not be loaded"):
        ck.load(str(tmp_path))
    with pytest.raises(UnsupportedModel, match="got a Linear"):
        ck.load(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedModel, match="got a int"):
        ck.load(3)


def test_nan_weights_are_refused_naming_the_block():
    module = build("GPT2")
    module.transformer.h[1].mlp.c_fc.weight.data[0, 0] = torch.nan
    with pytest.raises(UnsupportedModel, match=r"leaving the last block holds NaN"):
        ck.load(module, check=False).check()


def break_site(model, kind, index, **changes):
    sites = list(getattr(model.wiring, kind))
    sites[index] = replace(sites[index], **changes)
    model.wiring = replace(model.wiring, **{kind: tuple(sites)})


@pytest.mark.parametrize("family", ["GPT2", "Llama", "Gemma2"])
def test_a_planted_fault_in_the_wiring_fails_the_law_that_it_breaks(family):
    model = ck.load(build(family))
    wiring = model.wiring
    reads, writes = wiring.read_sites, wiring.write_sites

    def expect(law, kind, index, **changes):
        break_site(model, kind, index, **changes)
        with pytest.raises(UnsupportedModel, match=law):
            model.check()
        model.wiring = wiring

    expect("projections at layer 0", "read_sites", 0, norm=replace(reads[0].norm, eps=10.0))
    expect("projections at layer 1", "read_sites", 4, weight=reads[4].weight.flip(0))
    expect("writes at layer", "write_sites", 1, weight=writes[1].weight.flip(0))
    expect("writes at layer", "write_sites", 2, port=writes[4].port)
    model.wiring = replace(wiring, tail=lambda x: wiring.tail(x) * 1.01)
    with pytest.raises(UnsupportedModel, match="law of replay"):
        model.check()


def test_a_planted_fault_in_the_pull_back_fails_the_law_of_gradients(monkeypatch):
    from circuitkit.functional.norms import Norm

    model = ck.load(build("GPT2"))
    monkeypatch.setattr(Norm, "fold", lambda self, g: g)
    with pytest.raises(UnsupportedModel, match="law of gradients"):
        model.check()


@pytest.mark.parametrize("family", ["Gemma2", "Gemma3", "GPT2"])
@pytest.mark.parametrize("value", ["mean", "position-mean"])
def test_mean_values_are_means_of_what_is_written(family, value):
    """Also behind a post-norm, where the write is not linear in the heads' output."""
    model = ck.load(build(family, seed=2))
    task = random_task(model, n=4, lengths=torch.tensor([6, 4, 6, 5]))
    batch = task.batches[0]
    run = model.record(batch.clean)
    carried = corrupt_writes(model, task, Plan(progress=False), value)(run)
    for site, written, mean in zip(model.wiring.write_sites, run.writes, carried, strict=True):
        writes, got = site.expand(written), site.expand(mean)
        rows = [writes[:, i, : int(n)] for i, n in enumerate(batch.lengths)]
        if value == "mean":
            want = torch.cat(rows, 1).mean(1)[:, None].expand_as(got[:, 0])
        else:
            want = torch.stack([torch.stack([r[:, p] for r in rows if p < r.shape[1]]).mean(0) for p in range(6)], 1)
        torch.testing.assert_close(got[:, 0], want, rtol=1e-4, atol=1e-5)


def test_architectures_that_cannot_be_wired_are_refused_by_name():
    import transformers

    opt = transformers.OPTConfig(
        vocab_size=50, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, word_embed_proj_dim=32,
    )  # fmt: skip
    bloom = transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4)
    for config, name in ((opt, "OPTForCausalLM"), (bloom, "BloomForCausalLM")):
        with torch.random.fork_rng():
            module = getattr(transformers, name)(config).eval()
        with pytest.raises(UnsupportedModel):
            ck.load(module)
