"""The dictionaries that ship: each loads, does what its card says, and works with what is made for it."""

import importlib.util
from pathlib import Path

import pytest
import torch

import circuitkit as ck
from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.dictionaries.formats import load_dictionaries, load_dictionary, save_dictionary
from circuitkit.dictionaries.measures import recovered
from circuitkit.dictionaries.sites import activations_at, check_fits
from circuitkit.dictionaries.sparse_coder import SparseCoder
from circuitkit.dictionaries.stand_in import recovered_together, standing_in
from circuitkit.dictionaries.zoo import dictionary_names, dictionary_sets
from circuitkit.errors import OptionError, UnknownName
from circuitkit.features.attribution import attribution_graph
from circuitkit.models.hooks import hooked
from circuitkit.models.sampling import sample

ROOT = Path(__file__).parent.parent
CLOCK = "modadd/modelB_clock_standard_attention"
STORY = "stories260k"
SCORES = {STORY: "gender-pronoun", CLOCK: "modular-addition"}
FEW = 16  # stories on which the lead is measured again
# The place of a cross-layer transcoder is all layers at once: single sites are more than is asked of it. The lead is
# more than is asked of any.
SHORT_OF_IT = {
    ("stories260k/skip-transcoders/2", "lead"),
    ("stories260k/clt/0", "task"),
    ("stories260k/clt/1", "lead"),  # 0.906 on all 64 stories
    ("stories260k/clt/2", "lead"),
    ("stories260k/clt/4", "task"),
}

each = pytest.mark.parametrize("name", dictionary_names())
each_set = pytest.mark.parametrize("name", dictionary_sets())


def benchmark():
    spec = importlib.util.spec_from_file_location("recipes", ROOT / "benchmarks" / "train_dictionaries.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RECIPES = benchmark()


@pytest.fixture(scope="module")
def models():
    return {name: ck.load(name, check=False) for name in SCORES}


@pytest.fixture(scope="module")
def told(models):
    """The stories that the cards' numbers were measured on, sampled again."""
    begin = torch.full((RECIPES.HELD_OUT, 1), models[STORY].tokenizer.bos_token_id)
    return sample(models[STORY], begin, RECIPES.LENGTH - 1, seed=RECIPES.HELD_OUT_SEED)


@pytest.fixture(scope="module")
def acts(models, told):
    """Activations on what the cards' numbers were measured on."""
    texts = {STORY: told, CLOCK: RECIPES.pairs(models[CLOCK]).held_out}
    kinds = ("mlp-in", "mlp-out", "attn-out")
    return {name: RECIPES.recorded(models[name], text, kinds) for name, text in texts.items()}


class LogitDifferences:
    """Logit differences with nothing, zeros or dictionaries in some places; the first two are measured once."""

    def __init__(self, models, told):
        n = {STORY: RECIPES.PAIRS, CLOCK: 59**2}
        self.score = {name: [RECIPES.of_task(model, SCORES[name], n[name])] for name, model in models.items()}
        self.score[STORY].append(RECIPES.lead(models[STORY], told[:FEW]))
        self.known = {}

    def recovered(self, model, dictionaries):
        """The task's, and of the story model the lead's."""
        places = model.name, frozenset(site for d in dictionaries for site in d.writes)
        for key, chosen, silent in ((model.name, [], False), (places, dictionaries, True), (None, dictionaries, False)):
            if key is None or key not in self.known:
                with standing_in(model, chosen, silent=silent):
                    self.known[key] = torch.tensor([score() for score in self.score[model.name]])
        clean, zero, share = self.known[model.name], self.known[places], self.known[None]
        return ((share - zero) / (clean - zero)).tolist()


@pytest.fixture(scope="module")
def scores(models, told):
    return LogitDifferences(models, told)


def model_of(name, models):
    return next(model for start, model in models.items() if name.startswith(start))


def test_what_the_script_trains_is_what_ships():
    assert set(dictionary_sets()) == set(RECIPES.SETS)
    for name, one in RECIPES.SETS.items():
        layers = one.layers or (range(5) if one.model == STORY else range(1))
        assert [f"{name}/{i}" for i in layers] == [each for each in dictionary_names() if each.startswith(f"{name}/")]
    size = sum(path.stat().st_size for path in (ROOT / "data" / "dictionaries").rglob("*") if path.is_file())
    assert size < 10e6


@each
def test_each_loads_fits_and_carries_its_recipe(name, models):
    dictionary, model = load_dictionary(name), model_of(name, models)
    check_fits(dictionary, model)
    assert dictionary.model == model.name and dictionary.read.layer == int(name.rpartition("/")[2])
    assert all(p.isfinite().all() and not p.requires_grad for p in dictionary.coder.parameters())
    card, one = dictionary.card, RECIPES.SETS[name.rpartition("/")[0]]
    recipe = one.recipe_of(dictionary.read.layer)
    assert card["recipe"]["steps"] == recipe.steps and card["recipe"]["k"] == recipe.k == dictionary.coder.k
    assert dictionary.coder.n_latents == recipe.n_latents and "MIT" in card["licence"] and card["made_by"]


@each_set
def test_fvu_and_l0_are_those_of_the_card(name, models, acts):
    dictionaries, seen = load_dictionaries(name), acts[model_of(name, models).name]
    for d in dictionaries:
        quality = RECIPES.measured_at_site(d, RECIPES.at_site(dictionaries, d.writes[0]), seen)
        for number, tolerance in {"fvu": 1e-3, "l0": 1e-3, "dead": 1e-2}.items():
            told = d.card["measured"][number]
            assert quality[number] == pytest.approx(told, rel=tolerance, abs=tolerance), (d.read, number)


@each_set
def test_logit_difference_recovered(name, models, scores):
    """Each in its place at least 0.9, of the task and of the lead; and all layers at once what the card says."""
    model, dictionaries = model_of(name, models), load_dictionaries(name)
    for d in dictionaries:
        shares = scores.recovered(model, RECIPES.at_site(dictionaries, d.writes[0]))
        assert shares[0] == pytest.approx(d.card["measured"]["recovered"][SCORES[model.name]], abs=5e-3), d.read
        for what, share in zip(("task", "lead"), shares, strict=False):
            assert share >= 0.9 or (f"{name}/{d.read.layer}", what) in SHORT_OF_IT, (d.read, what, share)
    said = dictionaries[0].card["all_layers_recovered"][SCORES[model.name]]
    together = scores.recovered(model, dictionaries)[0]
    assert together == pytest.approx(said, abs=5e-3)
    assert together >= 0.9 or not RECIPES.SETS[name].together


@each
def test_splicing_keeps_the_model_exactly(name, models):
    model, dictionary = model_of(name, models), load_dictionary(name)
    if dictionary.kind == "clt":
        with pytest.raises(OptionError, match="cross-layer"):
            ck.splice(model, dictionary)
        return
    tokens = torch.tensor([[1, 2]]) if model.name == CLOCK else torch.tensor([[1, 403, 407, 261]])
    spliced = ck.splice(model, dictionary, tokens=tokens)
    assert sum(node.kind == "latent" for node in spliced.graph.source_nodes) > 1
    with torch.no_grad():
        plain = model.module(tokens)
        with spliced.quiet():
            torch.testing.assert_close(spliced.module(tokens), plain, atol=1e-4, rtol=1e-4)


@each_set
def test_attribution_graphs_add_up(name, models):
    model, dictionaries = model_of(name, models), load_dictionaries(name)
    tokens = torch.tensor([3, 5]) if model.name == CLOCK else torch.tensor([1, 403, 407, 261, 378])
    graph = attribution_graph(model, dictionaries, tokens, max_features=64)
    assert any(node.kind == "latent" for node in graph.nodes)
    # Each row was tested to 1e-4 when it was made; this says that there is one for the logits.
    assert any(node.kind == "logit" for node in graph.nodes) and graph.effects.isfinite().all()


def test_a_folder_of_the_users_goes_first(tmp_path, monkeypatch):
    own = Dictionary(SparseCoder(4, 8, 4), Site("mlp-out", 0), (Site("mlp-out", 0),))
    monkeypatch.chdir(tmp_path)
    save_dictionary(own, f"{STORY}/transcoders/2")
    assert load_dictionary(f"{STORY}/transcoders/2").coder.n_latents == 8
    assert len(load_dictionaries(f"{STORY}/transcoders")) == 1
    assert load_dictionary(f"{STORY}/transcoders/1").coder.n_latents > 8


def test_bad_names():
    with pytest.raises(UnknownName, match="stories260k/transcoders"):
        load_dictionary("stories260k/transcoder/2")
    with pytest.raises(UnknownName, match="stories260k/transcoders"):
        load_dictionaries("stories260k/transcoder")
    with pytest.raises(OptionError, match="load_dictionaries"):
        load_dictionary("stories260k/transcoders")


# ------------------------------------------------------------------------------------- dictionaries that stand in


def test_standing_in_is_the_literal_replacement(models):
    model, d = models[STORY], load_dictionary(f"{STORY}/transcoders/2")
    tokens = torch.tensor([[1, 403, 407, 261, 378]])
    (site,) = (s for s in model.wiring.write_sites if s.block == 2 and model.graph.source_nodes[s.first].kind == "mlp")
    x, _ = activations_at(model, (d.read, *d.writes), tokens)
    with torch.no_grad(), hooked([(site.port, lambda y: d.coder(x)[..., 0, :])]):
        want = model.module(tokens)
    with standing_in(model, [d]):
        got = model.module(tokens)
    torch.testing.assert_close(got, want)
    with torch.no_grad():
        assert not torch.allclose(model.module(tokens), got)


def test_recovered_alone_is_that_of_the_measure(models):
    model, d = models[STORY], load_dictionary(f"{STORY}/attn-saes/1")
    score = RECIPES.of_task(model, "gender-pronoun", 32)
    module = model.wiring.blocks[1].attn

    def replaced(function):
        if function is None:
            return score()

        def hook(_module, _args, output):
            return (function(output[0]), *output[1:]) if isinstance(output, tuple) else function(output)

        handle = module.register_forward_hook(hook)
        try:
            return score()
        finally:
            handle.remove()

    assert recovered_together(model, [d], score) == pytest.approx(recovered(replaced, d.coder), abs=1e-5)


def test_layers_of_a_cross_layer_transcoder_add_up(models):
    """Two that write one site: what they write is the sum, the bias of the first included once."""
    model = models[STORY]
    sites = tuple(Site("mlp-out", i) for i in range(5))
    one, two = (SparseCoder(64, 4, 64, n_out=n) for n in (5, 4))
    for i, coder in enumerate((one, two)):
        for p in coder.parameters():
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.1
    clt = (Dictionary(one, Site("mlp-in", 0), sites), Dictionary(two, Site("mlp-in", 1), sites[1:]))
    tokens, seen = torch.tensor([[1, 403, 407]]), {}
    with standing_in(model, clt):
        seen = dict(zip(("in0", "in1", "out4"), _inside(model, tokens), strict=True))
    want = one(seen["in0"])[..., 4, :] + two(seen["in1"])[..., 3, :]
    torch.testing.assert_close(seen["out4"], want)


def _inside(model, tokens):
    """What MLPs 0 and 1 read and what MLP 4 writes, in the run that is on."""
    kept = {}
    blocks = model.wiring.blocks
    ports = [blocks[0].mlp.hook_in, blocks[1].mlp.hook_in, blocks[4].mlp.hook_out]
    handles = [
        port.register_forward_hook(lambda _m, _a, out, i=i: kept.__setitem__(i, out.detach()))
        for i, port in enumerate(ports)
    ]
    try:
        model.module(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return kept[0], kept[1], kept[2]


def test_no_hook_is_left_and_a_score_that_does_not_depend_is_refused(models):
    model, d = models[STORY], load_dictionary(f"{STORY}/transcoders/2")
    with pytest.raises(ZeroDivisionError), standing_in(model, [d]):
        _ = 1 / 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.wiring.blocks[2].mlp.modules())
    with pytest.raises(OptionError, match="nothing can be recovered"):
        recovered_together(model, [d], lambda: 1.0)
