"""Interventions on features: direct effects of the graph, literal runs by hooks, and the model left as it was."""

import pytest
import torch

import circuitkit as ck
from circuitkit.dictionaries.base import Site
from circuitkit.dictionaries.sparse_coder import ACTIVATIONS
from circuitkit.dictionaries.splice import splice
from circuitkit.errors import GraphError, OptionError
from circuitkit.features.attribution import STEMS, attribution_graph
from circuitkit.features.interventions import FeatureIntervention, intervene, passes
from circuitkit.features.replace import local_model
from circuitkit.features.running import MODES, Running
from circuitkit.features.targets import final_targets
from circuitkit.models.interventions import Intervention
from circuitkit.testing import tiny_model
from tests.families import build
from tests.test_attribution_graphs import MODELS, SETS, in_float64, saes, tokens_of, transcoders


def change(node, value=0.0, how="set", **options):
    return FeatureIntervention(node, value, how, **options)


def logits_of(model, tokens):
    with torch.no_grad(), model.quiet():
        out = model.module(tokens[None])
    return (out if isinstance(out, torch.Tensor) else out.logits)[0]


def assert_constrained_is_the_graph(model, dictionaries, tokens, frozen_mlps=False):
    """Every source set to zero, one run each, moves every target by the graph's direct effect."""
    graph = attribution_graph(model, dictionaries, tokens, targets=[3, 5], frozen_mlps=frozen_mlps)
    running = Running(model, local_model(model, dictionaries, tokens, frozen_mlps=frozen_mlps))
    finals = final_targets(model, running.local, [3, 5])
    targets = {f"logits.{f.index}@{len(tokens) - 1}": f.reads for f in finals}
    for a in running.local.active:
        stem = STEMS[a.reads.site.kind].format(a.reads.site.layer)
        for i, (p, n) in enumerate(zip(a.nodes.positions.tolist(), a.nodes.index.tolist(), strict=True)):
            targets[f"{stem}.f{n}@{p}"] = a.reads.take(torch.tensor([i]))
    sources = [node.name for node in graph.nodes if node.kind != "logit"]
    found = list(passes(running, [[change(name)] for name in sources], "constrained"))
    with torch.no_grad():
        names = [graph.nodes[t].name for t in graph.targets.tolist()]
        moved = torch.stack([torch.cat([p.moved(targets[name]) for p in found])[:, 0] for name in names])
    torch.testing.assert_close(-moved, graph.effects[:, : len(sources)], rtol=1e-9, atol=1e-9)
    assert float(graph.effects.abs().max()) > 1e-2
    want = logits_of(model, tokens)
    for mode in MODES:
        got = intervene(model, dictionaries, tokens, [[], []], mode=mode).logits
        torch.testing.assert_close(got, want.expand(2, -1, -1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("what", SETS)
def test_constrained_in_all_layers_is_the_graph(what):
    model = tiny_model(**MODELS["grouped"])
    assert_constrained_is_the_graph(model, SETS[what](8), tokens_of(model, 5))


@pytest.mark.parametrize("shape", ["rms", "no norm", "both ways"])
def test_it_is_for_every_shape(shape):
    model = tiny_model(**MODELS[shape])
    assert_constrained_is_the_graph(model, SETS["everything"](8), tokens_of(model, 5))
    assert_constrained_is_the_graph(model, saes(8, "attn-out", 1), tokens_of(model, 5), frozen_mlps=True)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_it_is_for_every_activation(activation):
    model, k = tiny_model(), {"k": 5} if activation in ("topk", "batchtopk") else {}
    assert_constrained_is_the_graph(model, transcoders(8, activation=activation, **k), tokens_of(model, 4))


@pytest.mark.parametrize("family", ["GPT2", "GPTJ", "Llama", "Gemma2", "Gemma3", "Phi"])
def test_it_is_in_every_kind_of_block(family, monkeypatch):
    module = build(family, dtype=torch.float64)
    for kind in {type(m) for m in module.modules() if type(m).__name__.endswith("RMSNorm")}:
        monkeypatch.setattr(kind, "forward", in_float64)
    model = ck.load(module)
    for dictionaries in (
        saes(32, "attn-out", n=6) + transcoders(32, skip=True, n=6),
        saes(32, "z", n=6) + saes(32, "mlp-out", 1, n=6) + saes(32, "resid-post", 1, n=6),
    ):
        assert_constrained_is_the_graph(model, dictionaries, tokens_of(model, 4))


def test_a_spliced_model_constrained_says_the_same():
    model = tiny_model(**MODELS["rms"])
    dictionaries, tokens = transcoders(8), tokens_of(model, 6)
    spliced = splice(splice(model, dictionaries[0]), dictionaries[1])
    before = spliced.intervene([], tokens[None])
    after = spliced.intervene([Intervention("m0.f3", 2.5, "add", 2)], tokens[None], constrained=[0, 1])
    run = intervene(model, dictionaries, tokens, [[], [change("m0.f3@2", 2.5, "add")]], mode="constrained")
    torch.testing.assert_close((run.logits[1] - run.logits[0]), (after.logits - before.logits)[0], rtol=1e-9, atol=1e-9)
    got = run.pre_activation("m1.f4")
    want = torch.cat([before.read("m1.f4"), after.read("m1.f4")])[..., 0]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert float((got[1] - got[0]).abs().max()) > 1e-2


def test_frozen_parts_are_those_of_a_model_whose_patterns_and_norms_are_held():
    model = tiny_model(n_layers=3, n_heads=2, d_head=4)
    tokens = tokens_of(model, 6)
    for node, value, how in (("a1.h1", 0.0, "set"), ("m1", 0.5, "scale"), ("a2.h0", 2.0, "add")):
        for frozen, mode in ((True, "frozen"), (False, "free")):
            want = model.intervene([Intervention(node, value, how)], tokens[None], frozen=frozen).logits[0]
            # The dictionary lies below, so MLPs without one are what reacts.
            got = intervene(model, transcoders(8, 1), tokens, [[change(node, value, how)]], mode=mode).logits[0]
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_frozen_parts_hold_norms_behind_components(monkeypatch):
    module = build("Gemma2", dtype=torch.float64)
    for kind in {type(m) for m in module.modules() if type(m).__name__.endswith("RMSNorm")}:
        monkeypatch.setattr(kind, "forward", in_float64)
    model = ck.load(module)
    tokens = tokens_of(model, 5)
    want = model.intervene([Intervention("a1.h1", 0.0)], tokens[None], frozen=True).logits[0]
    got = intervene(model, transcoders(32, 1, n=8), tokens, [[change("a1.h1")]], mode="frozen").logits[0]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", MODES[:2])
def test_the_error_of_an_mlp_without_a_dictionary_is_all_that_it_writes_now(mode):
    model, above = tiny_model(), change("m0.f3@1", 3.0)
    tokens = tokens_of(model, 5)
    runs = [[above, change("m1.error@3", 0.5)], [above, change("m1", 0.5, "scale", positions=3)], [above]]
    logits = intervene(model, transcoders(8, 1), tokens, runs, mode=mode).logits
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-10, atol=1e-12)
    assert float((logits[0] - logits[2]).abs().max()) > 1e-4


def test_attention_as_a_whole_can_be_removed():
    model = tiny_model()
    tokens = tokens_of(model, 6)
    handle = model.module.blocks[1].attn.register_forward_hook(lambda _m, _a, y: torch.zeros_like(y))
    want = logits_of(model, tokens)
    handle.remove()
    got = intervene(model, transcoders(8, 1), tokens, [[change("a1")]]).logits[0]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def literal(model, dictionaries, tokens, latents):
    """Logits with hooks of our own on the module: every dictionary recomputed from what it reads now."""
    kept, edits = {}, {}

    def at(i, dictionary, clean):
        coder, own = dictionary.coder, dictionary.read == dictionary.writes[0]

        def hook(_module, args, y):
            x = y if own else args[0]
            f = coder.encode(x)
            if clean:
                kept[i] = (f, y)
                return y
            for p, n, value in edits.get(i, ()):
                f[:, p, n] = value
            return kept[i][1] + (f - kept[i][0]) @ coder.W_dec[0]

        return hook

    def run(clean):
        handles = []
        for i, d in enumerate(dictionaries):
            block = model.module.blocks[d.read.layer]
            module = block.mlp if d.read.kind == "mlp-in" else block
            handles.append(module.register_forward_hook(at(i, d, clean)))
        out = logits_of(model, tokens)
        for handle in handles:
            handle.remove()
        return out

    run(clean=True)
    for i, p, n, value in latents:
        edits.setdefault(i, []).append((p, n, value))
    return run(clean=False)


def test_free_runs_are_literal_ones():
    model = tiny_model(n_layers=3)
    tokens = tokens_of(model)
    dictionaries = [*transcoders(8, 3), *saes(8, "resid-post", 1)]
    latents = [(0, 2, 5, 3.0), (1, 4, 1, 0.0), (3, 1, 2, 2.0)]
    ours = [change("m0.f5@2", 3.0), change("m1.f1@4"), change("r1.f2@1", 2.0)]
    got = intervene(model, dictionaries, tokens, [ours, ours[:1], []])
    torch.testing.assert_close(got.logits[0], literal(model, dictionaries, tokens, latents), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.logits[1], literal(model, dictionaries, tokens, latents[:1]), rtol=1e-9, atol=1e-9)
    assert float((got.logits[0] - got.logits[2]).abs().max()) > 1e-2


def test_where_no_pattern_and_no_scale_can_move_free_is_frozen():
    model = tiny_model(normalization_type=None, act_fn="relu")
    tokens = tokens_of(model, 1)
    for what in ("cross-layer", "the first stream", "MLP outputs", "heads' z"):
        dictionaries = SETS[what](8)
        stem = STEMS[dictionaries[0].read.kind].format(0)
        several = [[change(f"{stem}.f{i}@0", 2.0)] for i in range(5)] + [[change("input@0", 0.5)], [change("a0", 0.0)]]
        free, frozen = (intervene(model, dictionaries, tokens, several, mode=m).logits for m in MODES[:2])
        torch.testing.assert_close(free, frozen, rtol=1e-9, atol=1e-9)
        assert float((free[0] - free[-1]).abs().max()) > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_rows_are_independent_of_each_other_and_of_the_budget(mode):
    model, dictionaries = tiny_model(), SETS["everything"](8)
    tokens = tokens_of(model, 5)
    several = [
        [change("m0.f3@2", 1.5, "add"), change("a0.f1", 2.0, "scale")], [], [change("m1.error@3", 0.5, "scale")],
        [change("input@1")], [change("a1.h1", torch.arange(4.0), positions=[0, -1])], [change("r1.error@2")],
    ]  # fmt: skip
    together = intervene(model, dictionaries, tokens, several, mode=mode)
    for row, one in enumerate(several):
        alone = intervene(model, dictionaries, tokens, [one], mode=mode).logits[0]
        torch.testing.assert_close(together.logits[row], alone, rtol=1e-10, atol=1e-12)
        if mode != "constrained":  # there no direct effect passes the stream's dictionary
            assert (row == 1) != (float((alone - together.logits[1]).abs().max()) > 1e-4)
    small = intervene(model, dictionaries, tokens, several, mode=mode, budget=1)
    torch.testing.assert_close(small.logits, together.logits, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(small.latents[Site("mlp-in", 1)], together.latents[Site("mlp-in", 1)])


def test_values_are_set_scaled_and_added_to_in_order():
    model, tokens = tiny_model(), tokens_of(tiny_model(), 5)
    clean = intervene(model, transcoders(8), tokens, [[]]).activation("m0.f3")[0]
    scaled, several_values = change("m0.f3", 2.0, "scale", positions=slice(1, 3)), torch.tensor([7.0, 8.0])
    several = [[scaled], [change("m0.f3@4", 1.0), change("m0.f3@4", 2.0, "add")],
               [change("m0.f3", several_values, positions=[0, -2])]]  # fmt: skip
    got = intervene(model, transcoders(8), tokens, several).activation("m0.f3")
    want = clean.repeat(3, 1)
    want[0, 1:3] *= 2
    want[1, 4] = 3.0
    want[2, [0, 3]] = torch.tensor([7.0, 8.0], dtype=want.dtype)
    torch.testing.assert_close(got, want)


def test_layers_that_are_not_held_react():
    model = tiny_model(n_layers=3)
    dictionaries, tokens = transcoders(8, 3), tokens_of(model)
    runs = [[], [change("m0.f5@2", 4.0)]]
    run = intervene(model, dictionaries, tokens, runs, mode="constrained", held=[0, 1])
    one, two = (run.latents[Site("mlp-in", i)] for i in (1, 2))
    assert torch.equal(one[0], one[1]) and not torch.equal(two[0], two[1])
    torch.testing.assert_close(two, dictionaries[2].coder.encode(run.reads[Site("mlp-in", 2)]))
    whole = intervene(model, dictionaries, tokens, runs, mode="constrained")
    assert float((whole.logits[1] - run.logits[1]).abs().max()) > 1e-4
    none = intervene(model, dictionaries, tokens, runs, mode="constrained", held=[])
    torch.testing.assert_close(none.logits, intervene(model, dictionaries, tokens, runs, mode="frozen").logits)


def test_narrow_models_run_as_they_are():
    model = ck.load(build("Llama", dtype=torch.bfloat16))
    dictionaries, tokens = transcoders(32, n=8, dtype=torch.float32), tokens_of(model, 5)
    run = intervene(model, dictionaries, tokens, [[], [change("m0.f1@1", 5.0)]])
    assert torch.equal(run.logits[0], logits_of(model, tokens).float())
    assert float((run.logits[1] - run.logits[0]).abs().max()) > 1e-2


@pytest.mark.parametrize("mode", MODES[:2])
def test_everything_is_left_as_found(mode):
    model, tokens = tiny_model(), tokens_of(tiny_model(), 5)
    module, dictionaries = model.module.train(), SETS["everything"](8)
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    state = torch.get_rng_state()
    weights = [p.clone() for d in dictionaries for p in d.coder.parameters()]
    intervene(model, dictionaries, tokens, [[change("a0.f1@2", 3.0)]], mode=mode)
    with pytest.raises(RuntimeError):  # raised inside the run
        intervene(model, dictionaries, tokens, [[change("a0", torch.ones(5))]], mode=mode)
    assert module.training and all(p.requires_grad and p.grad is None for p in module.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert torch.equal(torch.get_rng_state(), state)
    after = [p for d in dictionaries for p in d.coder.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(weights, after, strict=True))


@pytest.mark.parametrize(
    ("node", "options", "error", "words"),
    [
        ("m0.f99@1", {}, GraphError, "has 16"), ("m7.f1@1", {}, GraphError, "m0.f0@0"),
        ("x", {}, GraphError, "no node"), ("m0.f1@9", {}, OptionError, "5 tokens"),
        ("m0.f1@x", {}, GraphError, "no position"),
        ("a1.h7", {}, GraphError, "a1.h7"), ("a9", {}, GraphError, "a9"), ("m0.h1", {}, GraphError, "m0.h1"),
        ("m0.bias", {}, OptionError, "all layers held"), ("m0.f1@1", {"mode": "hard"}, OptionError, "free"),
        ("m0.f1@1", {"held": [0]}, OptionError, "constrained"),
        ("m0.f1@1", {"mode": "constrained", "held": [5]}, OptionError, "0 to 1"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused(node, options, error, words):
    model = tiny_model()
    with pytest.raises(error, match=words):
        intervene(model, transcoders(8), tokens_of(model, 5), [[change(node)]], **options)


def test_values_that_make_no_sense_are_refused():
    for options, words in (({"value": float("nan")}, "NaN"), ({"how": "times"}, "set"), ({"positions": 2}, "its own")):
        with pytest.raises(OptionError, match=words):
            change("m0.f1@1", **options)
    with pytest.raises(OptionError, match="no interventions"):
        intervene(tiny_model(), transcoders(8), tokens_of(tiny_model(), 5), [])
