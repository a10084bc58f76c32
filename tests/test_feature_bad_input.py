"""Mistakes that are easily made with dictionaries and feature graphs: each is named, none gives a plausible graph."""

import json
import warnings

import pytest
import torch

import circuitkit as ck
from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.dictionaries.formats import load_dictionary, save_dictionary
from circuitkit.dictionaries.sites import check_fits
from circuitkit.dictionaries.sparse_coder import SparseCoder
from circuitkit.errors import CircuitKitError, FormatError, OptionError
from circuitkit.evaluation.feature_graphs import verify
from circuitkit.evaluation.feature_shares import FeatureFaithfulness
from circuitkit.features.attribution import attribution_graph
from circuitkit.features.contrast import Contrast
from circuitkit.features.head_loadings import head_loadings
from circuitkit.features.merge import merge
from circuitkit.features.targets import Direction
from circuitkit.models.interventions import Intervention
from circuitkit.registry import Registry
from circuitkit.testing import tiny_model
from tests.families import build

LAST = Site("resid-pre", 2)


def transcoder(layer=0, d=8, model=""):
    coder, generator = SparseCoder(d, 16, d).double(), torch.Generator().manual_seed(layer)
    for parameter in coder.requires_grad_(False).parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3)
    return Dictionary(coder, Site("mlp-in", layer), (Site("mlp-out", layer),), model=model)


def direction(**options):
    return Direction(LAST, -1, options.pop("vector", torch.ones(8).double()), **options)


BAD = {
    "one token twice": ({"targets": [3, 3]}, "twice as a target"),
    "one contrast twice": ({"targets": [Contrast(3, 4), Contrast(3, 4)]}, "twice as a target"),
    "two directions of one name": ({"targets": [direction(), direction(weight=2.0)]}, "label of its own"),
    "a token against itself": ({"targets": [Contrast(3, 3)]}, "with itself"),
    "a direction of zeros": ({"targets": [direction(vector=torch.zeros(8).double())]}, "zero or not finite"),
    "a bool": ({"targets": [True]}, "a token id"),
    "a tensor": ({"targets": [torch.tensor(3)]}, "a token id"),
    "half a feature": ({"max_features": 2.5}, "max_features = 2.5"),
    "no number": ({"tau": float("nan")}, "tau = nan"),
    "an id beyond the vocabulary": ({"tokens": torch.tensor([1, 10**6])}, "token ids from 1 to 1000000"),
    "a negative id": ({"tokens": torch.tensor([1, -1])}, "token ids from -1"),
    "ids that are no whole numbers": ({"tokens": torch.tensor([1.0, 2.0])}, "expected token ids"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_easy_mistakes_are_named(what):
    options, words = BAD[what]
    tokens = options.get("tokens", torch.arange(5))
    rest = {name: value for name, value in options.items() if name != "tokens"}
    with pytest.raises(OptionError, match=words):
        attribution_graph(tiny_model(), [transcoder()], tokens, **rest)


def test_directions_with_labels_of_their_own_are_two_nodes():
    one, other = direction(label="a"), direction(label="b", vector=torch.eye(8).double()[0])
    graph = attribution_graph(tiny_model(), [transcoder()], torch.arange(5), targets=[one, other])
    assert graph.effect("input@0", "a@4") != graph.effect("input@0", "b@4")


def test_weights_that_are_not_finite_are_the_dictionary_s_fault():
    bad = transcoder()
    bad.coder.W_dec[0, 0, 0] = float("nan")
    for call in (
        lambda: attribution_graph(tiny_model(), [bad], torch.arange(5)),
        lambda: ck.splice(tiny_model(), bad, latents=[0]),
    ):
        with pytest.raises(OptionError, match="NaN or infinite values in W_dec"):
            call()


def test_merged_graphs_cannot_be_tested_on_a_prompt():
    model = tiny_model()
    merged = merge([attribution_graph(model, [transcoder()], torch.arange(n), targets=[3]) for n in (4, 5)])
    for call in (verify, head_loadings):
        with pytest.raises(OptionError, match="merged from several prompts"):
            call(model, [transcoder()], merged)


FIELDS = {
    "subtract_b_dec": "no", "k": "48", "read": 3, "writes": "mlp-out.2", "model": 5, "card": [], "activation": None,
}  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_fields_of_the_wrong_type_are_refused(field, tmp_path):
    save_dictionary(transcoder(), tmp_path)
    config = json.loads((tmp_path / "dictionary.json").read_text())
    (tmp_path / "dictionary.json").write_text(json.dumps(config | {field: FIELDS[field]}))
    with pytest.raises(FormatError, match=f"{field} ="):
        load_dictionary(tmp_path)


def test_sites_that_are_none():
    for text in ("state.lx", "state.", "mlp-in.two", "mlp-in"):
        with pytest.raises(OptionError, match="got site"):
            Site.parse(text)


def test_a_module_of_no_name_is_taken_with_a_warning():
    module = build("Llama", vocab_size=97)
    named = transcoder(d=32, model="stories260k")
    with pytest.warns(UserWarning, match="cannot be told"):
        check_fits(named, ck.load(module))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_fits(named, ck.load(build("Llama", vocab_size=97), name="stories260k"))


def test_a_metric_that_ablation_does_not_reliably_change_gives_no_verdict_in_favour():
    def found(gaps):
        zeros = (0.0,) * len(gaps)
        circuit = tuple(0.8 * gap for gap in gaps)
        return FeatureFaithfulness(
            tuple(gaps), zeros, circuit, zeros, (zeros, zeros), (5,) * len(gaps), (50,) * len(gaps), 0.5, 0.5, "free",
            "kept", "zero", 0,
        )  # fmt: skip

    assert found([1.0] * 8).better_than_chance
    noisy = found([3.0, -2.0, 1.0, -1.5, 2.0, -1.0, 0.5, -0.5])
    assert sum(noisy.clean) > sum(noisy.nothing)
    assert not noisy.better_than_chance and "there is no behaviour" in noisy.verdict


def test_positions_of_an_intervention():
    for positions in (2.5, "all", True):
        with pytest.raises(OptionError, match="got positions"):
            Intervention("m0", 1.0, positions=positions)


def test_loading_that_was_broken_off_begins_again(monkeypatch):
    import circuitkit.registry as home

    registry, calls = Registry("method", "circuitkit.methods"), []

    def stopped(name):
        calls.append(name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(name)

    real = home.importlib.import_module
    monkeypatch.setattr(home.importlib, "import_module", stopped)
    with pytest.raises(KeyboardInterrupt):
        len(registry)
    assert len(calls) == 3
    len(registry)
    assert len(calls) > 10


def test_errors_are_ours():
    with pytest.raises(CircuitKitError):
        attribution_graph(tiny_model(), [transcoder()], torch.zeros(0, dtype=torch.long))
