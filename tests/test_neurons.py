"""MLPs as groups of neurons: the same module with a finer wiring."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitkit as ck
from circuitkit.drawing import draw
from circuitkit.errors import FormatError, OptionError, UnsupportedModel
from circuitkit.evaluation.faithfulness import circuit_metrics
from circuitkit.methods.plan import Plan
from circuitkit.models.neurons import group_size, split_like
from tests.families import build, every_family
from tests.laws.test_method_laws import assert_close
from tests.oracles.literal import literal_circuit, literal_exact, literal_gradient
from tests.toys import random_model, random_task

SHAPES = st.fixed_dictionaries(
    {
        "n_layers": st.integers(1, 2),
        "heads": st.sampled_from([(1, 1), (2, 1)]),
        "norm": st.sampled_from([None, "RMS"]),
        "gated": st.booleans(),
        "causal": st.booleans(),
        "seed": st.integers(0, 999),
    }
)


def of_layer(nodes, layer, kinds=("mlp", "neuron")):
    return [i for i, node in enumerate(nodes) if node.layer == layer and node.kind in kinds]


def scores(model, task, method, **options):
    return ck.score(model, task, method, progress=False, **options).values.double()


@every_family
def test_the_laws_hold_and_neurons_add_up_to_their_mlp(family):
    whole = ck.load(build(family))
    split = whole.split_mlps(group=16)  # checks every law
    task = random_task(whole, n=2)
    for method, options in (("eap", {}), ("eap-ig", {"steps": 2}), ("clean-corrupted", {})):
        fine, coarse = scores(split, task, method, **options), scores(whole, task, method, **options)
        size = float(coarse.abs().max())
        for layer in range(2):
            rows, row = of_layer(split.graph.source_nodes, layer), of_layer(whole.graph.source_nodes, layer)
            columns, column = (of_layer(m.graph.destination_nodes, layer) for m in (split, whole))
            assert len(row) == len(column) == 1 and len(rows) > 1
            assert float(fine[rows].sum()) == pytest.approx(float(coarse[row].sum()), abs=2e-6 * size)
            assert float(fine[:, columns].sum()) == pytest.approx(float(coarse[:, column].sum()), abs=2e-6 * size)
        others = [i for i, node in enumerate(split.graph.source_nodes) if node.kind != "neuron"]
        same = [i for i, node in enumerate(split.graph.destination_nodes) if node.kind != "neuron"]
        rest = [i for i, node in enumerate(whole.graph.source_nodes) if node.kind != "mlp"]
        readers = [i for i, node in enumerate(whole.graph.destination_nodes) if node.kind != "mlp"]
        torch.testing.assert_close(
            fine[others][:, same], coarse[rest][:, readers], rtol=1e-4, atol=1e-5 * size
        )  # edges without an MLP are what they were


@every_family
def test_exact_equals_running_the_circuit_without_that_edge(family):
    model = ck.load(build(family)).split_mlps(group=16)
    task = random_task(model, n=2)
    exact = ck.score(model, task, "exact", progress=False).values
    edges = model.graph.mask.nonzero()[:: max(1, model.graph.n_edges // 12)]
    keep = torch.ones(len(edges), *model.graph.mask.shape, dtype=torch.bool)
    keep[torch.arange(len(edges)), edges[:, 0], edges[:, 1]] = False
    clean, values = circuit_metrics(model, task, keep, plan=Plan(progress=False), corrupt_value="counterfactual")
    want = (clean - values).mean(1).float()
    torch.testing.assert_close(exact[edges[:, 0], edges[:, 1]], want, rtol=1e-3, atol=2e-5)


@given(shape=SHAPES, group=st.sampled_from([2, 5]))
@settings(max_examples=8, deadline=None)
def test_neurons_are_patched_and_differentiated_as_a_literal_transformer_does(shape, group):
    model = random_model(shape).split_mlps(group)
    task = random_task(model, n=1, length=4)
    assert_close(scores(model, task, "exact"), literal_exact(model, task))
    assert_close(scores(model, task, "eap"), literal_gradient(model, task, [1.0], [1.0]))
    keep = torch.rand(model.graph.mask.shape, generator=torch.Generator().manual_seed(shape["seed"])) < 0.5
    keep &= model.graph.mask
    got = circuit_metrics(model, task, keep[None], plan=Plan(progress=False), corrupt_value="counterfactual")[1][0]
    assert_close(got, literal_circuit(model, task, keep))


def test_one_group_without_a_gate_is_the_whole_mlp():
    model = random_model(gated=False)
    task = random_task(model)
    split = model.split_mlps(group=10)
    assert split.graph.sources[3] == "m0.n0-9" and split.graph.n_edges == model.graph.n_edges
    for method in ("eap", "exact"):
        assert_close(scores(split, task, method), scores(model, task, method))


def test_names_kinds_stages_and_what_feeds_what():
    whole = random_model(gated=True)
    graph = whole.split_mlps(group=5, layers=[1]).graph
    assert graph.sources == ("input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1.n0-4", "m1.n5-9")
    assert graph.destinations[-5:] == ("m1.n0-4<gate>", "m1.n5-9<gate>", "m1.n0-4<up>", "m1.n5-9<up>", "logits")
    gate, up = whole.split_mlps(group=5, layers=[1]).wiring.read_sites[-3:-1]
    parts = whole.wiring.mlps[1]
    assert (gate.port, up.port) == (parts.gate, parts.pre) and (gate.first, up.first) == (13, 15)
    single = whole.split_mlps(layers=[1]).graph
    assert single.sources[-1] == "m1.n9" and single.destinations[-2] == "m1.n9<up>"
    fed = graph.feeds[graph.destinations.index("m1.n5-9<up>")].nonzero().flatten().tolist()
    assert [graph.sources[i] for i in fed] == ["m1.n5-9"]
    graph.edge("a1.h0->m1.n0-4<gate>")
    for row, column in graph.mask.nonzero().tolist():
        assert graph.source_nodes[row].stage < graph.destination_nodes[column].stage
    assert ck.Graph.from_dict(graph.to_dict()).same_as(graph)
    assert group_size(graph) == 5 and group_size(single) == 1 and group_size(whole.graph) is None
    assert split_like(whole, graph).graph.same_as(graph) and split_like(whole, whole.graph) is whole


def test_what_cannot_be_split_is_refused_and_says_what_to_do():
    model = random_model()
    with pytest.raises(OptionError, match="groups of 3 neurons, expected a divisor of 10: 1, 2, 5, 10"):
        model.split_mlps(3)
    for group in (0, True, 2.5, "2"):
        with pytest.raises(OptionError, match="expected a divisor"):
            model.split_mlps(group)
    for layers in ([2], [-1], []):
        with pytest.raises(OptionError, match="expected some of 0, 1"):
            model.split_mlps(2, layers)
    with pytest.raises(OptionError, match="already split"):
        model.split_mlps(2).split_mlps(1)
    with pytest.raises(OptionError, match="expected some of 1"):
        model.split_mlps(2, [0]).split_mlps(1, [0])
    with pytest.raises(UnsupportedModel, match="no MLPs"):
        random_model(attn_only=True).split_mlps()
    unknown = copy.copy(model)
    unknown.wiring = replace(model.wiring, mlps=())
    with pytest.raises(UnsupportedModel, match="inside of the MLPs of random is not known"):
        unknown.split_mlps()


def planted(model, **changes):
    broken = copy.copy(model)
    parts = model.wiring.mlps
    broken.wiring = replace(model.wiring, mlps=(parts[0], replace(parts[1], **changes)))
    return broken


@pytest.mark.parametrize("family", ["GPT2", "Llama", "Gemma2"])
def test_an_inside_that_is_not_as_described_refuses_the_split_but_not_the_model(family):
    model = ck.load(build(family))
    parts = model.wiring.mlps
    faults = [
        ({"activation": torch.relu}, "law of neurons at layer 1, the hidden"),
        ({"w_out": parts[1].w_out.flip(0)}, "law of neurons at layer 1, what the MLP writes"),
        ({"w_in": parts[1].w_in.flip(1)}, "law of projections at layer 1, m1.n"),
        ({"hidden": parts[0].hidden}, "law of neurons at layer 1"),
    ]
    if family == "Gemma2":
        faults.append(({"post_norm": None}, "law of neurons at layer 1, what the MLP writes"))
    for changes, law in faults:
        broken = planted(model, **changes)
        broken.check()
        with pytest.raises(UnsupportedModel, match=law):
            broken.split_mlps(16)
        broken.split_mlps(16, layers=[0])


def test_a_mixture_of_experts_is_not_split():
    """Its MLP is wired whole if it is wired at all; its experts are no neurons of one layer."""
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, num_local_experts=2, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = transformers.MixtralForCausalLM(config).eval()
    model = ck.load(module)
    with pytest.raises(UnsupportedModel, match="inside of the MLPs"):
        model.split_mlps()


def test_bfloat16_and_the_users_module():
    module = build("Llama", dtype=torch.bfloat16).train()
    model = ck.load(module, neurons=16)
    assert scores(model, random_task(model, n=1), "eap").abs().sum() > 0
    assert module.training and all(p.requires_grad and p.grad is None for p in module.parameters())
    assert model.causal


def test_hooked_transformers_are_split():
    lens = pytest.importorskip("transformer_lens")
    if not hasattr(lens, "HookedTransformerConfig"):
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    for gated in (False, True):
        config = lens.HookedTransformerConfig(
            n_layers=2, d_model=16, n_heads=2, d_head=8, n_ctx=16, d_vocab=20, act_fn="silu", seed=0,
            normalization_type="RMS", gated_mlp=gated,
        )  # fmt: skip
        with torch.random.fork_rng():
            module = lens.HookedTransformer(config)
            for parameter in module.parameters():
                parameter.data += 0.2 * torch.randn_like(parameter)
        whole = ck.load(module)
        split = whole.split_mlps(8)
        task = random_task(whole, n=2)
        rows = of_layer(split.graph.source_nodes, 0)
        got, want = scores(split, task, "eap")[rows].sum(), scores(whole, task, "eap")[3].sum()
        assert float(got) == pytest.approx(float(want), rel=1e-4)


def test_circuits_of_neurons_are_found_drawn_kept_and_measured_again(tmp_path):
    model = ck.load("stories260k", neurons=43)
    task = ck.task("gender-pronoun", model, n=4, seed=0)
    circuit = ck.score(model, task, "eap", progress=False).top(60)
    result = ck.evaluate(model, task, circuit, curve=False, progress=False)
    assert result.faithfulness is not None and result.n_possible == 3381
    drawing = draw(circuit)
    assert any(box.kind == "neuron" for box in drawing.boxes)
    assert len({(box.x, box.y) for box in drawing.boxes}) == len(drawing.boxes), "no box hides another"
    assert any(box.name == "m3.n0-42" for box in drawing.boxes) and not any("<" in box.name for box in drawing.boxes)
    circuit.save(tmp_path / "c.circuit.json")
    again = ck.Circuit.load(tmp_path / "c.circuit.json")
    assert again.edge_names() == circuit.edge_names() and again.graph.same_as(model.graph)
    ck.export(circuit, tmp_path / "c.graphml")
    with pytest.raises(FormatError, match="kind neuron"):
        ck.export(circuit, tmp_path / "c.json", format="eap-ig")
    with pytest.raises(ck.CircuitKitError, match="graph"):
        ck.evaluate(ck.load("stories260k"), task, circuit, progress=False)


def test_a_run_on_the_command_line_remembers_its_neurons(tmp_path):
    from circuitkit.cli import main
    from circuitkit.runs.request import evaluate_again

    command = ["find", "tracr/hist", "tracr", "--method", "exact", "--neurons", "7", "--n", "8", "--edges", "8"]
    assert main([*command, "--out", str(tmp_path / "run"), "--no-progress"]) == 0
    result, notes = evaluate_again(tmp_path / "run" / "circuit.json", progress=False)
    assert notes == "" and result.n_possible == ck.load("tracr/hist", neurons=7).graph.n_edges
    assert ck.Circuit.load(tmp_path / "run" / "circuit.json").meta["neurons"] == 7


def test_activation_patching_reaches_neurons():
    model = random_model().split_mlps(5)
    task = random_task(model)
    found = ck.score(model, task, "activation-patching", site="neuron", per_position=False, progress=False)
    assert found.rows == ("L0", "L1") and found.columns == ("N0", "N1")
    with pytest.raises(OptionError, match="has no neuron"):
        ck.score(random_model(), task, "activation-patching", site="neuron", progress=False)


def test_single_neurons_of_a_small_model_take_seconds():
    model = ck.load("stories260k", neurons=1)
    assert len(model.graph.sources) == 901 and model.graph.n_edges == 664_461
    task = ck.task("gender-pronoun", model, n=4, seed=0)
    whole = scores(ck.load("stories260k"), task, "eap")
    single = ck.score(model, task, "eap", progress=False)
    rows = of_layer(model.graph.source_nodes, 3)
    assert float(single.values[rows].double().sum()) == pytest.approx(float(whole[36].sum()), rel=1e-4)
    assert single.provenance["seconds"] < 20
