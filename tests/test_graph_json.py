"""Graph files against the published schema's rules, literal readers, and themselves."""

import contextlib
import json
import math
import subprocess
import sys
from dataclasses import replace

import jsonschema
import networkx as nx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.dictionaries.sparse_coder import SparseCoder
from circuitkit.errors import FormatError, OptionError
from circuitkit.exporters.feature_graphml import write_feature_graphml
from circuitkit.exporters.graph_json import View, stable_scan, write_graph_index, write_graph_json
from circuitkit.exporters.graph_json_read import graph_from_json, read_graph_json
from circuitkit.exporters.graph_json_schema import check_graph_json, paired, unpaired
from circuitkit.features.attribution import attribution_graph
from circuitkit.features.graph import FeatureGraph, FeatureNode
from circuitkit.features.targets import Direction
from circuitkit.functional.text import visible
from circuitkit.testing import tiny_model

# The rules of Neuronpedia's published schema (draft 7), stated anew.
TEXT, NUMBER, WHOLE, MAYBE = {"type": "string"}, {"type": "number"}, {"type": "integer"}, {"type": ["number", "null"]}
TEXTS = {"type": "array", "items": TEXT}


def record(required, **fields):
    return {"type": "object", "properties": fields, "required": required.split()}


RULES = record(
    "metadata qParams nodes links",
    metadata=record(
        "slug scan prompt_tokens prompt", slug=TEXT, scan=TEXT, prompt_tokens=TEXTS, prompt=TEXT, node_threshold=NUMBER,
        feature_details=record("", neuronpedia_source_set=TEXT),
        info=record("", generator=record("", name=TEXT, version=TEXT)),
    ),
    qParams=record("", pinnedIds=TEXTS, supernodes={"type": "array", "items": TEXTS}, linkType=TEXT, clickedId=TEXT,
                   sg_pos=TEXT, clerps={"type": "array", "items": TEXTS}),
    nodes={"type": "array", "items": record(
        "node_id feature layer ctx_idx feature_type jsNodeId clerp", node_id=TEXT,
        feature={"type": ["integer", "null"]}, layer={"type": ["string", "integer"]}, ctx_idx=WHOLE,
        feature_type=TEXT, jsNodeId=TEXT, clerp=TEXT, influence=MAYBE, activation=MAYBE)},
    links={"type": "array", "items": record("source target weight", source=TEXT, target=TEXT, weight=NUMBER)},
)  # fmt: skip
TYPES = {"cross layer transcoder", "lorsa", "mlp reconstruction error", "lorsa error", "embedding", "bias", "logit"}
NASTY = ["</script><img onerror=x>", "a\x00b", "\ud800", 'say "hi"\\', "two\nlines", "(p=", " (p=0.9) ", "", "ünï😀"]


def dictionary(reads, writes, layer, seed):
    generator = torch.Generator().manual_seed(seed)
    coder = SparseCoder(8, 16, 8).double().requires_grad_(False)
    for p in coder.parameters():
        p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.4)
    return Dictionary(coder, Site(reads, layer), (Site(writes, layer),))


def made(places, layers=2, **options):
    model = tiny_model(n_layers=layers)
    found = [dictionary(*place, layer, 9 * layer + i) for i, place in enumerate(places) for layer in range(layers)]
    return attribution_graph(model, found, torch.arange(5), **{"targets": [3, 7], **options})


def without_latents(graph):
    return graph.part(~graph.kind("latent"))


MLP, ATTENTION, HEADS = ("mlp-in", "mlp-out"), ("attn-out", "attn-out"), ("z", "z")
GRAPHS = {
    "transcoders": lambda: made([MLP]),
    "pruned": lambda: made([MLP]).prune(0.9),
    "one layer": lambda: made([MLP], layers=1),
    "attention": lambda: made([ATTENTION]),
    "attention, one layer": lambda: made([ATTENTION], layers=1),
    "side by side": lambda: made([HEADS, ATTENTION, MLP]),
    "errors only": lambda: without_latents(made([MLP], layers=1)),
    "directions": lambda: made([MLP], targets=[
        Direction(Site("resid-pre", 2), 4, torch.ones(8).double(), label="up", weight=2.0),
        Direction(Site("resid-pre", 2), 4, torch.arange(8).double(), label="(p=", weight=0.5)]),
}  # fmt: skip


@pytest.fixture(scope="module")
def graphs():
    return {name: make() for name, make in GRAPHS.items()}


every = pytest.mark.parametrize("name", GRAPHS)
ARGUMENTS = {"slug": "toy", "scan": "tiny", "prompt": "a b c d e", "prompt_tokens": list("abcde")}


def written(graph, folder, **options):
    path = write_graph_json(graph, folder / "toy.json", **{**ARGUMENTS, **options})
    return path, json.loads(path.read_text())


def same(one, other):
    assert one.nodes == other.nodes and one.model == other.model
    for name in ("targets", "effects", "totals", "weights", "tokens"):
        a, b = getattr(one, name), getattr(other, name)
        assert a.dtype == b.dtype and torch.equal(a, b), name


@every
def test_follows_the_published_schema(graphs, name, tmp_path):
    _, data = written(graphs[name], tmp_path, node_threshold=0.8, source_set="some-set")
    jsonschema.Draft7Validator(RULES).validate(data)
    check_graph_json(data)
    assert len(data["links"]) == graphs[name].n_edges and len(data["nodes"]) == len(graphs[name])
    assert {node["feature_type"] for node in data["nodes"]} <= TYPES
    assert data["metadata"]["schema_version"] == 1 and data["qParams"]["linkType"] == "both"


@every
def test_comes_back_number_for_number(graphs, name, tmp_path):
    path, _ = written(graphs[name], tmp_path)
    back = read_graph_json(path)
    same(graphs[name], back.graph)
    assert (back.slug, back.scan, back.prompt) == ("toy", "tiny", "a b c d e") and back.prompt_tokens == tuple("abcde")
    assert back.graph.replacement_score == pytest.approx(graphs[name].replacement_score, abs=1e-12, nan_ok=True)


def test_float32_comes_back(graphs, tmp_path):
    graph = graphs["transcoders"]
    graph = replace(graph, effects=graph.effects.float(), totals=graph.totals.float())
    same(graph, read_graph_json(written(graph, tmp_path)[0]).graph)


def neuronpedia(data):
    """The steps of the viewer's loader that throw or lose nodes, literally."""

    def layer(node):
        try:
            return float(node["layer"])
        except ValueError:
            return math.nan

    inner = [layer(node) for node in data["nodes"] if node["feature_type"] != "logit"]
    highest = max((x for x in inner if not math.isnan(x)), default=0)
    assert highest, "No layer found"
    features = {}
    for node in data["nodes"]:
        key = f"{node['layer']}_{node['feature']}_{node['ctx_idx']}"
        if "error" in node["feature_type"]:
            key += "_attn_err" if "lorsa" in node["feature_type"] else "_mlp_err"
        features.setdefault(key, []).append(node)
        if node["feature_type"] == "logit":
            assert 0 <= float(node["clerp"].split("(p=")[1].split(")")[0])
            assert layer(node) > highest
    return features


@every
def test_traps_of_viewers(graphs, name, tmp_path):
    _, data = written(graphs[name], tmp_path, target_tokens=dict.fromkeys((3, 7), ' "(p=x) '))
    assert all(len(nodes) == 1 for nodes in neuronpedia(data).values())
    for key in ("node_id", "jsNodeId"):
        assert len({node[key] for node in data["nodes"]}) == len(data["nodes"])
    errors = [node["node_id"] for node in data["nodes"] if "error" in node["feature_type"]]
    assert all("_error_" in node_id for node_id in errors)
    for node in data["nodes"]:
        if node["feature_type"] in ("cross layer transcoder", "lorsa"):
            row, index, position = map(int, node["node_id"].split("_"))
            assert unpaired(node["feature"]) == (row, index) and (str(row), position) == (
                node["layer"],
                node["ctx_idx"],
            )
            assert node["circuitkit"]["index"] == index


def node(name, kind, layer, site, position, index=None, stage=1):
    return FeatureNode(name, kind, layer, site, position, index, 0.5, stage)


CROWD = (
    # Two writes of one recurrent layer, several channels, start and bias, what came before, and an attention score.
    node("x0@0", "token", -1, "state.x", 0, stage=0), node("x1@0", "token", -1, "state.x", 0, stage=0),
    node("l0.bias", "bias", 0, "l0", None, stage=0), node("l0.h.start", "bias", 0, "state.l0.h", None, stage=0),
    node("l0.h.error@0", "error", 0, "state.l0.h", 0), node("l0.h.before@0", "error", 0, "state.l0.h", 0),
    node("l0.h.f5@0", "latent", 0, "state.l0.h", 0, 5), node("l0.c.f5@0", "latent", 0, "state.l0.c", 0, 5),
    node("l0.h5@0", "unit", 0, "state.l0.h", 0, 5), node("l0.c5@0", "unit", 0, "state.l0.c", 0, 5),
    node("l0.c5@1", "unit", 0, "state.l0.c", 1, 5, 2), node("a0.h1@1", "unit", 0, "z.0", 1, None, 2),
    node("m0.f5", "latent", 0, "mlp-in.0", None, 5),
    node("score.a1.h3[1,0]@1", "score", 1, "resid-pre.1", 1, 5, 9),
    node("up@1", "direction", 1, "resid-pre.1", 1, None, 9),
    node("logits.5@1", "logit", 1, "resid-pre.1", 1, 5, 9),
)  # fmt: skip


def crowd(nodes=CROWD, tokens=2):
    finals = [i for i, n in enumerate(nodes) if n.stage == 9]
    effects = torch.ones(len(finals), len(nodes)) * torch.tensor([n.stage < 9 for n in nodes])
    weights = torch.tensor([float(n.stage == 9) for n in nodes], dtype=torch.float64)
    return FeatureGraph(
        tuple(nodes), torch.tensor(finals), effects, effects.sum(1), weights, torch.arange(tokens),
        counts=torch.arange(len(nodes)),
    )  # fmt: skip


def test_all_kinds_side_by_side(tmp_path):
    graph = crowd()
    path, data = written(graph, tmp_path, prompt="a b", prompt_tokens=["a", "b"])
    jsonschema.Draft7Validator(RULES).validate(data)
    assert {n["feature_type"] for n in data["nodes"]} <= TYPES
    assert all(len(nodes) == 1 for nodes in neuronpedia(data).values())
    for n in data["nodes"]:
        if n["feature_type"] in ("cross layer transcoder", "lorsa"):
            row, index, _ = map(int, n["node_id"].split("_"))
            assert unpaired(n["feature"]) == (row, index) and n["feature"] < 2**53
    said = {n["circuitkit"]["kind"]: n["clerp"] for n in data["nodes"]}  # a logit's probability, others' weights
    assert said["logit"].endswith("(p=0.500)") and said["direction"].endswith("(p=1.000)")
    same_unit = [n["feature"] for n in data["nodes"] if n["circuitkit"]["name"].startswith("l0.c5@")]
    assert len(same_unit) == 2 and len(set(same_unit)) == 1
    back = read_graph_json(path).graph
    same(graph, back)
    assert torch.equal(back.counts, graph.counts)


def test_graphs_of_no_one_prompt(tmp_path):
    nodes = [replace(n, name=n.name.partition("@")[0], position=None) for n in CROWD]
    graph = crowd([n for i, n in enumerate(nodes) if n.name not in [m.name for m in nodes[:i]]], tokens=0)
    path, data = written(graph, tmp_path, prompt="", prompt_tokens=[])
    jsonschema.Draft7Validator(RULES).validate(data)
    back = read_graph_json(path)
    same(graph, back.graph)
    said = {n["circuitkit"]["kind"]: n["clerp"] for n in data["nodes"]}
    assert said["error"] == "Err: resid" and said["token"] == 'Emb: "x1"'
    assert data["metadata"]["prompt_tokens"] == ["any"] and back.prompt_tokens == ()


def test_unknown_kinds(tmp_path):
    with pytest.raises(FormatError, match=r"m9 is of kind 'wormhole', and a graph file holds token, .*, score"):
        written(crowd((*CROWD[:-1], node("m9", "wormhole", 0, "mlp-in.0", 0), CROWD[-1])), tmp_path,
                prompt="a b", prompt_tokens=["a", "b"])  # fmt: skip


@pytest.mark.parametrize(
    ("name", "rows"), [("one layer", {1}), ("transcoders", {0, 1}), ("side by side", set(range(6)))]
)
def test_rows(graphs, name, rows, tmp_path):
    _, data = written(graphs[name], tmp_path)
    features = [node for node in data["nodes"] if node["feature_type"] in ("cross layer transcoder", "lorsa")]
    assert {int(node["layer"]) for node in features} == rows


@given(st.integers(0, 200), st.integers(0, 2**22))
def test_pairing(layer, index):
    assert unpaired(paired(layer, index)) == (layer, index)
    assert paired(layer, index) == (layer + index) * (layer + index + 1) / 2 + index < 2**53


def test_influence_is_the_share_at_which_a_node_enters(graphs, tmp_path):
    graph = graphs["transcoders"]
    _, data = written(graph, tmp_path)
    found = graph.influence.tolist()
    for node, own in zip(data["nodes"], found, strict=True):
        if node["feature_type"] == "logit":
            assert node["influence"] is None
        elif found.count(own) == 1:
            assert node["influence"] == pytest.approx(sum(x for x in found if x >= own) / sum(found))
    # The slider at 0.8 hides what pruning of nodes would, but for the one on the boundary.
    shown = {n["circuitkit"]["name"] for n in data["nodes"] if n["influence"] is not None and n["influence"] <= 0.8}
    kept = {graph.nodes[i].name for i in graph.influence.argsort(descending=True)[: len(shown) + 1].tolist()}
    assert shown < kept and {node.name for node in graph.prune(0.8, 1).nodes if node.kind == "latent"} <= kept


def test_view_comes_back(graphs, tmp_path):
    graph = graphs["side by side"]
    latents = [node.name for node in graph.nodes if node.kind == "latent"]
    view = View(
        pins=(latents[0], latents[3], "input@2"),
        supernodes=(("pair", (latents[0], latents[1])), ("pair", (latents[2],))),
        labels={latents[0]: "plural", "logits.3@4": "the answer", "m1.error@2": "dark"},
        clicked=latents[3],
        places="0.1 0.2 0.3 0.4",
    )
    path, data = written(graph, tmp_path, view=view)
    jsonschema.Draft7Validator(RULES).validate(data)
    neuronpedia(data)
    back = read_graph_json(path)
    assert back.view == view
    assert data["qParams"]["pinnedIds"] == [back.ids[name] for name in view.pins]
    # Viewers save their state into qParams: a new name there wins.
    at = next(n for n in data["nodes"] if n["node_id"] == back.ids[latents[0]])
    data["qParams"]["clerps"] = [[f"{at['layer']}_{at['feature']}_{at['ctx_idx']}", "singular"]]
    data["qParams"]["pinnedIds"] += ["99_1_1"]
    again = graph_from_json(json.dumps(data)).view
    assert again.labels[latents[0]] == "singular" and again.pins == view.pins


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(label=st.sampled_from(NASTY) | st.text(max_size=20), token=st.sampled_from(NASTY) | st.text(max_size=20))
def test_hostile_labels(graphs, tmp_path, label, token):
    graph = graphs["one layer"]
    latent = next(node.name for node in graph.nodes if node.kind == "latent")
    view = View(supernodes=((label, (latent,)),), labels={latent: label, "logits.3@4": label})
    path, data = written(
        graph, tmp_path, prompt=token, prompt_tokens=[token] * 5, target_tokens={7: token}, scan=label or "x", view=view
    )
    path.read_bytes().decode("ascii")
    neuronpedia(data)
    back = read_graph_json(path)
    assert back.view.labels == {latent: visible(label), "logits.3@4": visible(label)}
    assert back.view.supernodes == ((visible(label), (latent,)),) and back.prompt_tokens == (visible(token),) * 5
    same(graph, back.graph)


def test_scan_names_are_the_same_in_every_process():
    code = "from circuitkit.exporters.graph_json import stable_scan; print(stable_scan(['a', 'b']))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == stable_scan(["a", "b"]) != stable_scan(["ab"])


def test_scan_of_several(graphs, tmp_path):
    _, data = written(graphs["one layer"], tmp_path, scan=["a", "b"])
    assert data["metadata"]["scan"] == stable_scan(["a", "b"]) and data["metadata"]["transcoder_list"] == ["a", "b"]


def test_index_of_a_folder(graphs, tmp_path):
    for slug in ("toy", "toy2"):
        write_graph_json(graphs["one layer"], tmp_path / f"{slug}.json", **{**ARGUMENTS, "slug": slug})
    for _ in range(2):
        index = json.loads(write_graph_index(tmp_path).read_text())
        assert [graph["slug"] for graph in index["graphs"]] == ["toy", "toy2"]
        assert index["graphs"][0]["prompt_tokens"] == list("abcde")
    (tmp_path / "toy.json").rename(tmp_path / "other.json")
    with pytest.raises(FormatError, match="name the file by its slug"):
        write_graph_index(tmp_path)
    (tmp_path / "other.json").write_bytes(b"\xff")
    with pytest.raises(FormatError, match="give a graph file"):
        write_graph_index(tmp_path)


def tracer_file():
    """A graph as circuit-tracer writes it; one latent at two positions shares a jsNodeId."""

    def node(node_id, feature, layer, ctx, type_, js, **more):
        return {
            "node_id": node_id,
            "feature": feature,
            "layer": layer,
            "ctx_idx": ctx,
            "feature_type": type_,
            "jsNodeId": js,
            "clerp": "",
            "token_prob": 0.0,
            "is_target_logit": False,
            "run_idx": 0,
            **more,
        }

    def feature(layer, index, ctx, value):
        return node(
            f"{layer}_{index}_{ctx}",
            paired(layer, index),
            str(layer),
            ctx,
            "cross layer transcoder",
            f"{layer}_{index}-0",
            activation=value,
        )

    nodes = [
        feature(1, 42, 1, 2.5), feature(0, 7, 0, 1.5), feature(0, 7, 1, 0.5),
        node("0_-1_1", -1, "0", 1, "mlp reconstruction error", "0_-1-1"),
        node("E_11_0", 0, "E", 0, "embedding", "E_11-0"), node("E_12_1", 1, "E", 1, "embedding", "E_12-1"),
        node("3_99_1", 99, "3", 1, "logit", "L_99-1", clerp='Output " x" (p=0.625)') | {"token_prob": 0.625},
    ]  # fmt: skip
    links = [("E_11_0", "0_7_0", 1.5), ("E_12_1", "0_7_1", 0.5), ("0_7_0", "1_42_1", 3.0), ("0_-1_1", "1_42_1", -1.0),
             ("1_42_1", "3_99_1", 4.0), ("E_11_0", "3_99_1", 0.25)]  # fmt: skip
    return {
        "metadata": {"slug": "s", "scan": "gemma-2-2b", "transcoder_list": [], "prompt_tokens": ["a", " b"],
                     "prompt": "a b", "node_threshold": 0.8, "schema_version": 1},
        "qParams": {"pinnedIds": ["1_42_1"], "supernodes": [["both", "0_7_0", "0_7_1"]], "linkType": "both",
                    "clickedId": "", "sg_pos": ""},
        "nodes": nodes,
        "links": [dict(zip(("source", "target", "weight"), link, strict=True)) for link in links],
    }  # fmt: skip


def test_reads_circuit_tracer():
    file = graph_from_json(json.dumps(tracer_file()))
    graph = file.graph
    assert graph.effect("m0.f7@0", "m1.f42@1") == 3.0 and graph.effect("m0.error@1", "m1.f42@1") == -1.0
    assert graph.tokens.tolist() == [11, 12] and graph.nodes[-1].name == "logits.99@1" and file.node_threshold == 0.8
    latent = graph.nodes[graph.node("m1.f42@1")]
    assert (latent.layer, latent.index, latent.value, latent.site) == (1, 42, 2.5, "mlp-in.1")
    assert file.view.pins == ("m1.f42@1",) and file.view.supernodes == (("both", ("m0.f7@0", "m0.f7@1")),)
    assert graph.totals[graph.targets.tolist().index(graph.node("m1.f42@1"))] == 2.5
    # By hand: the logit's inputs are 4 of 4.25 and 0.25 of 4.25; the latent's 3 of 4 and 1 of 4.
    share = 0.625 * 4 / 4.25
    assert graph.influence[graph.node("m0.error@1")].item() == pytest.approx(share / 4)
    assert graph.influence[graph.node("input@0")].item() == pytest.approx(share * 3 / 4 + 0.625 * 0.25 / 4.25)


def test_what_was_read_can_be_written(tmp_path):
    file = graph_from_json(json.dumps(tracer_file()))
    path = write_graph_json(file.graph, tmp_path / "s.json", slug=file.slug, scan=file.scan, prompt=file.prompt,
                            prompt_tokens=file.prompt_tokens, view=file.view)  # fmt: skip
    back = read_graph_json(path)
    same(file.graph, back.graph)
    assert back.view == file.view and back.ids["m1.f42@1"] == "1_42_1"


def test_feature_ids_of_files_with_other_node_ids():
    data = tracer_file()
    text = json.dumps(data).replace('"1_42_1"', '"feature A"')
    assert graph_from_json(text).graph.effect("m1.f42@1", "logits.99@1") == 4.0


def broken(change):
    data = tracer_file()
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("qParams"), "qParams: Field required"),
        (lambda d: d["nodes"][0].pop("clerp"), "nodes.0.clerp"),
        (lambda d: d["nodes"][0].update(feature="42"), "nodes.0.feature"),
        (lambda d: d["nodes"][0].update(layer="top"), "layer 'top'"),
        (lambda d: d["nodes"][0].update(ctx_idx=2), "position 2, expected 0 to 1"),
        (lambda d: d["nodes"][0].update(feature_type="wormhole"), "'wormhole'"),
        (lambda d: d["nodes"].append(dict(d["nodes"][0])), "'1_42_1' twice"),
        (lambda d: d["links"].append({"source": "E_11_0", "target": "7_7_7", "weight": 1.0}), "'7_7_7'"),
        (lambda d: d["links"].append(dict(d["links"][0])), "twice; keep one"),
        (lambda d: d["links"].append({"source": "1_42_1", "target": "0_7_0", "weight": 1.0}), "in a circle"),
        (lambda d: d["links"][0].update(weight=10**400), "weight"),
        (lambda d: d["links"][0].update(weight=None), "links.0.weight"),
        (lambda d: d["metadata"].update(circuitkit={"schema": "circuitkit.feature-graph/9"}), "newer circuitkit"),
        (
            lambda d: d["metadata"].update(circuitkit={"schema": "circuitkit.feature-graph/1", "tokens": [1]}),
            "2 tokens",
        ),
    ],
)
def test_broken_files(change, message):
    with pytest.raises(FormatError) as caught:
        graph_from_json(broken(change))
    assert message in str(caught.value)


def test_truncated_missing_and_other_files(graphs, tmp_path):
    path, _ = written(graphs["one layer"], tmp_path)
    content = path.read_bytes()
    for n in (0, 1, len(content) // 3, len(content) - 3):
        path.write_bytes(content[:n])
        with pytest.raises(FormatError, match="truncated"):
            read_graph_json(path)
    path.write_bytes(b"\xff\xfe\x00")
    for bad in (path, tmp_path / "none.json", tmp_path):
        with pytest.raises(FormatError, match="give a graph file"):
            read_graph_json(bad)
    for other in ("[]", "{}", '"x"', '{"a": NaN}', "[" * 9999):
        with pytest.raises(FormatError):
            graph_from_json(other)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data(), own=st.booleans())
def test_garbage_is_refused_or_read(graphs, tmp_path, data, own):
    """No other error than ours, whatever field of a file is replaced by whatever."""
    file = written(graphs["one layer"], tmp_path)[1] if own else tracer_file()
    values = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6) | st.just([])
    extra = [node["circuitkit"] for node in file["nodes"]] + [file["metadata"]["circuitkit"]] if own else []
    for _ in range(data.draw(st.integers(1, 3))):
        groups = [file["nodes"], file["links"], [file["metadata"], file["qParams"]], *([extra] if own else [])]
        place = data.draw(st.sampled_from(data.draw(st.sampled_from(groups))))
        place[data.draw(st.sampled_from(sorted(place)))] = data.draw(values)
    with contextlib.suppress(FormatError):
        graph_from_json(json.dumps(file).replace("Infinity", "1e999"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slug": "../x"}, "slug"),
        ({"slug": ""}, "slug"),
        ({"scan": ""}, "no scan"),
        ({"scan": []}, "no scan"),
        ({"prompt_tokens": ["a"]}, "1 texts of tokens for a graph of 5"),
        ({"node_threshold": 0.0}, "node_threshold"),
        ({"view": View(pins=("input@0",) * 201)}, "at most 200"),
        ({"view": View(pins=("m9.f1@1",))}, "no node 'm9.f1@1'"),
        ({"view": View(supernodes=(("a", ("nobody",)),))}, "no node 'nobody'"),
    ],
)
def test_options_that_do_not_fit(graphs, tmp_path, options, message):
    with pytest.raises(OptionError, match=message):
        written(graphs["one layer"], tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_graphs_that_no_viewer_takes(graphs, tmp_path):
    graph = graphs["one layer"]
    for bad, message in (
        (graph.part(graph.kind("token", "logit")), "tokens and targets only"),
        (replace(graph, effects=graph.effects / 0), "not finite"),
        (replace(graph, totals=graph.totals * math.nan), "not finite"),
        (replace(graph, nodes=(graph.nodes[0], *graph.nodes[:1], *graph.nodes[2:])), "one name or one place"),
    ):
        with pytest.raises(FormatError, match=message):
            written(bad, tmp_path)
    assert not list(tmp_path.iterdir())


@every
def test_graphml(graphs, name, tmp_path):
    graph = graphs[name]
    found = nx.read_graphml(write_feature_graphml(graph, tmp_path / "g.graphml"))
    names = nx.get_node_attributes(found, "label")
    assert (
        sorted(names.values()) == sorted(node.name for node in graph.nodes) and found.number_of_edges() == graph.n_edges
    )
    for source, target, data in list(found.edges(data=True))[:50]:
        assert data["effect"] == graph.effect(names[source], names[target]) and data["weight"] == abs(data["effect"])
