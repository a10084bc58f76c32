"""Training finds planted features, goes on after a stop to the same bits, and folds its units away exactly."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitkit as ck
from circuitkit.dictionaries import train as train_module
from circuitkit.dictionaries.base import Site
from circuitkit.dictionaries.formats import load_dictionary, save_dictionary
from circuitkit.dictionaries.losses import BANDWIDTH, penalty, training_latents
from circuitkit.dictionaries.measures import measure, recovered
from circuitkit.dictionaries.optimise import advance, begin
from circuitkit.dictionaries.recipe import Recipe
from circuitkit.dictionaries.sparse_coder import ACTIVATIONS, SparseCoder
from circuitkit.dictionaries.stream import ActivationStream
from circuitkit.dictionaries.train import COLUMNS, train, train_on
from circuitkit.dictionaries.units import from_units
from circuitkit.errors import CircuitKitError, FormatError, OptionError
from tests.toys import random_model

D, PLANTED = 32, 40
PER_ACTIVATION = {
    "relu": {"sparsity": 1.5},
    "gated": {"sparsity": 5.0},
    "topk": {"k": 2},
    "batchtopk": {"k": 2},
    "jumprelu": {"sparsity": 1.0, "penalty": "tanh"},
}


def normalise(x):
    return torch.nn.functional.normalize(x, dim=-1)


def planted(n_sites=1, batches=200, size=256, seed=1):
    """Directions, and batches of which features are active (5 % of the time, 0.5 to 1.5)."""
    generator = torch.Generator().manual_seed(seed)
    directions = normalise(torch.randn(n_sites, PLANTED, D, generator=generator))
    strengths = 0.5 + torch.rand(batches, size, PLANTED, generator=generator)
    return directions, strengths * (torch.rand(strengths.shape, generator=generator) < 0.05)


def closest(planted_rows, found):
    """Mean over planted features of the largest cosine with a row of the decoder."""
    return float((planted_rows @ normalise(found).T).max(1).values.mean())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_sae_finds_planted_features(activation):
    (features,), strengths = planted()
    batches = list(3 * strengths @ features + 1)
    recipe = Recipe(48, activation, steps=1200, lr=3e-3, dead_after=100, **PER_ACTIVATION[activation])
    trained = train(recipe, batches, progress=False)
    assert closest(features, trained.coder.W_dec[0]) >= 0.95
    quality = measure(trained.coder, batches[:20])
    assert quality.l0 < 6 and quality.fvu < 0.2
    history = dict(zip(COLUMNS, trained.history.T, strict=True))
    assert history["fvu"][-5:].mean() < 0.5 * history["fvu"][0]
    # The decoder's rows keep norm 1 whatever the units of the data are.
    torch.testing.assert_close(trained.coder.W_dec[0].norm(dim=1), torch.ones(48), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "gated", "topk", "jumprelu"])
def test_a_transcoder_finds_what_is_read_and_what_is_written(activation):
    (read, written), strengths = planted(2)
    pairs = [(3 * a @ read + 1, 0.2 * a @ written - 2) for a in strengths]
    recipe = Recipe(64, activation, steps=1200, lr=3e-3, dead_after=100, **PER_ACTIVATION[activation])
    coder = train(recipe, pairs, progress=False).coder
    assert closest(written, coder.W_dec[0]) >= 0.95
    assert measure(coder, pairs[:20]).fvu < 0.25


def test_a_skip_carries_what_is_linear():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(8, 6, generator=generator)
    x = torch.randn(40, 64, 8, generator=generator)
    pairs = [(row, row @ matrix) for row in x]
    recipe = Recipe(16, "relu", sparsity=2.0, steps=400, lr=5e-3)
    with_skip = measure(train(replace(recipe, skip=True), pairs, progress=False).coder, pairs)
    without = measure(train(recipe, pairs, progress=False).coder, pairs)
    assert with_skip.fvu < 0.01 < 0.3 < without.fvu
    assert with_skip.l0 < 0.1 * without.l0


def test_a_cross_layer_transcoder_writes_later_layers():
    """Each layer's output is the features of its own input and of those below; only together are they explained."""
    generator = torch.Generator().manual_seed(2)
    layers, n, d = 3, 12, 16
    read = normalise(torch.randn(layers, n, d, generator=generator))
    written = normalise(torch.randn(layers, layers, n, d, generator=generator))
    pairs = []
    for _ in range(60):
        active = (torch.rand(256, layers, n, generator=generator) < 0.08).float()
        y = torch.stack([sum(active[:, i] @ written[i, j] for i in range(j + 1)) for j in range(layers)], 1)
        pairs.append((torch.einsum("bln,lnd->bld", active, read), 5 * y + 1))
    recipe = Recipe(16, "relu", sparsity=0.5, steps=600, lr=4e-3, dead_after=100)
    trained = train(recipe, pairs, progress=False)
    assert [coder.n_out for coder in trained.coders] == [3, 2, 1]
    x, y = pairs[0]
    total = torch.zeros_like(y)
    for i, coder in enumerate(trained.coders):
        total[:, i:] += coder(x[:, i])
    unexplained = (y - total).square().sum() / (y - y.mean(0)).square().sum()
    assert float(unexplained) < 0.15
    # One dictionary for each layer cannot do that for the last.
    alone = train(recipe, [(x[:, 2], y[:, 2]) for x, y in pairs], progress=False)
    assert measure(alone.coder, [(x[:, 2], y[:, 2]) for x, y in pairs]).fvu > 0.4
    for i, coder in enumerate(trained.coders):  # the bias of a layer is kept by the coder that reads it
        assert float(coder.b_dec[1:].abs().sum()) == 0 and (i == 0 or float(coder.b_dec[0].abs().sum()) > 0)


def states(trained):
    return [p for coder in trained.coders for p in coder.parameters()]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_stopped_run_goes_on_to_the_same_bits(activation, tmp_path, monkeypatch):
    (features,), strengths = planted(batches=13, size=32)
    batches = list(strengths @ features)
    recipe = Recipe(64, activation, steps=40, dead_after=5, **PER_ACTIVATION[activation])
    want = train(recipe, batches, progress=False)

    class Stop(Exception):
        pass

    def stopping(after):
        for n, batch in enumerate(batches):
            if n == after:
                raise Stop
            yield batch

    path = tmp_path / "training.safetensors"
    with pytest.raises(Stop) as raised:
        train(recipe, stopping(11), checkpoint=path, progress=False)
    assert "step 11 is kept" in raised.value.__notes__[0]
    got = train(recipe, batches, checkpoint=path, progress=False)
    assert torch.equal(got.history, want.history)
    assert all(torch.equal(a, b) for a, b in zip(states(got), states(want), strict=True))
    again = train(recipe, batches, checkpoint=path, progress=False)  # nothing is left to do
    assert all(torch.equal(a, b) for a, b in zip(states(again), states(want), strict=True))


def test_a_checkpoint_of_another_run_or_a_broken_one_is_refused(tmp_path):
    batches, path = [torch.randn(16, 4, generator=torch.Generator().manual_seed(0))], tmp_path / "c.safetensors"
    recipe = Recipe(8, steps=3)
    train(recipe, batches, checkpoint=path, progress=False)
    with pytest.raises(OptionError, match="lr"):
        train(replace(recipe, lr=1.0), batches, checkpoint=path, progress=False)
    with pytest.raises(OptionError, match="shapes"):
        train(recipe, [torch.cat(batches * 2, 1)], checkpoint=path, progress=False)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(FormatError, match="delete it"):
        train(recipe, batches, checkpoint=path, progress=False)


def test_seeds_count_and_the_user_s_random_state_does_not():
    batches = [torch.randn(64, 6, generator=torch.Generator().manual_seed(0))]
    recipe = Recipe(12, "gated", steps=30, dead_after=5)
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = train(recipe, batches, progress=False)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]  # noqa: NPY002
    assert torch.equal(before[0], after[0]) and before[1] == after[1] and (before[2] == after[2]).all()
    torch.manual_seed(99)
    same, other = train(recipe, batches, progress=False), train(replace(recipe, seed=1), batches, progress=False)
    assert torch.equal(first.coder.W_enc, same.coder.W_enc)
    assert not torch.equal(first.coder.W_enc, other.coder.W_enc)
    assert not any(p.requires_grad for p in first.coder.parameters())


@given(
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    read=st.floats(0.05, 20),
    write=st.lists(st.floats(0.05, 20), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_units_are_folded_into_the_weights(activation, read, write, seed):
    generator = torch.Generator().manual_seed(seed)
    options = {"k": 3} if "topk" in activation else {}
    same = len(write) == 1 and seed % 2 == 0
    coder = SparseCoder(5, 9, 5, n_out=len(write), activation=activation, subtract_b_dec=same, **options,
                        skip=len(write) == 1 and seed % 3 == 0).double()  # fmt: skip
    for parameter in coder.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    if coder.threshold is not None:
        coder.threshold.data.abs_()
    scales = torch.tensor([read] if same else write, dtype=torch.float64)
    x = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    want = coder(x * read) / scales[:, None]
    latents = coder.encode(x * read)
    from_units(coder, read, scales)
    torch.testing.assert_close(coder(x), want)
    assert torch.equal(coder.encode(x) > 0, latents > 0)


def test_thresholds_get_the_kernel_estimate_of_their_slope():
    """Against the same estimate made by hand, and against the true slope of the expected loss."""
    generator = torch.Generator().manual_seed(0)
    coder = SparseCoder(1, 1, 1, activation="jumprelu").double()
    coder.threshold.data = torch.tensor([0.8], dtype=torch.float64)
    pre = torch.randn(200_000, 1, generator=generator, dtype=torch.float64)
    (got,) = torch.autograd.grad(penalty(coder, pre, training_latents(coder, pre), "step"), coder.threshold)
    near = ((pre - 0.8).abs() < BANDWIDTH / 2).double().mean() / BANDWIDTH
    torch.testing.assert_close(got[0], -near)
    density = torch.distributions.Normal(0, 1).log_prob(torch.tensor(0.8)).exp()  # d P(pre > t) / dt = -density
    assert abs(float(got[0] + density)) < 0.01
    (slope,) = torch.autograd.grad(training_latents(coder, pre).mean(), coder.threshold)
    assert abs(float(slope[0] + 0.8 * density)) < 0.01


def test_batchtopk_takes_k_per_input_on_average_and_its_threshold_keeps_that():
    (features,), strengths = planted(batches=100)
    batches = list(strengths @ features)
    coder = train(Recipe(48, "batchtopk", k=3, steps=400, dead_after=100), batches, progress=False).coder
    pre = coder.pre_activation(batches[0])
    active = (training_latents(coder, pre) > 0).sum(-1)
    assert int(active.sum()) == 3 * len(pre) and len(active.unique()) > 1
    assert abs(measure(coder, batches).l0 - 3) < 0.3


def test_dead_latents_are_started_anew():
    (features,), strengths = planted(batches=100)
    batches = list(3 * strengths @ features)
    recipe = Recipe(64, "relu", sparsity=3.0, steps=400, dead_after=60)
    revived, left = (train(replace(recipe, dead_after=after), batches, progress=False).coder for after in (60, 10_000))
    assert closest(features, revived.W_dec[0]) >= closest(features, left.W_dec[0])
    assert measure(revived, batches).dead <= measure(left, batches).dead


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_a_latent_started_anew_begins_with(activation):
    x = torch.randn(64, 1, 5, generator=torch.Generator().manual_seed(0))
    options = {"k": 2} if "topk" in activation else {}
    recipe = Recipe(6, activation, steps=20, dead_after=3, **options)
    coders, state = begin(recipe, x, x, same=True)
    state.value["0.b_enc"][2] = -100.0
    for name in ("W_enc", "W_dec", "b_enc"):  # as if it had been learning before it fell silent
        state.first[f"0.{name}"].fill_(1.0)
    for _ in range(2):
        state = advance(recipe, coders, state, x, x)
    assert int(state.silent["0"][2]) == 2 and float(state.value["0.b_enc"][2]) < -90
    after = advance(recipe, coders, state, x, x)
    assert int(after.silent["0"][2]) == 0 and float(after.value["0.b_enc"][2]) == 0
    assert float(after.value["0.W_enc"][:, 2].norm()) == pytest.approx(1)
    assert float(after.value["0.W_dec"][0, 2].norm()) == pytest.approx(1)
    for moment in (after.first, after.second):
        steps = [moment["0.W_enc"][:, 2], moment["0.W_dec"][0, 2], moment["0.b_enc"][2]]
        assert all(float(step.abs().sum()) == 0 for step in steps)
        assert float(moment["0.W_enc"][:, 1].abs().sum()) > 0
    # The state that it was made from is as it was.
    assert float(state.value["0.b_enc"][2]) < -90 and int(state.silent["0"][2]) == 2


def test_streamed_batches_skip_without_a_run_and_hold_every_position_once(monkeypatch):
    model = random_model(n_layers=1)
    tokens = torch.randint(9, (20, 6), generator=torch.Generator().manual_seed(0))
    site = Site("resid-pre", 0)
    stream = ActivationStream(model, (site,), (site,), tokens.split(4), 12, 48, 3)
    whole = [next_batch for next_batch, _ in zip(stream.from_step(0), range(25), strict=False)]
    runs = []
    record = type(model).record
    monkeypatch.setattr(type(model), "record", lambda self, tokens: runs.append(1) or record(self, tokens))
    late = stream.from_step(17)
    assert torch.equal(next(late)[0], whole[17][0]) and len(runs) <= 2
    assert torch.equal(next(late)[0], whole[18][0])
    # An epoch is 10 batches of 12 positions: all 120, each once.
    from circuitkit.dictionaries.sites import activations

    got = torch.cat([x for x, _ in whole[:10]])[:, 0]
    want = activations(model, site, tokens).flatten(0, 1)
    order = [t[torch.tensor(np.lexsort(t.T.numpy()))] for t in (got, want)]
    torch.testing.assert_close(*order)
    assert not torch.equal(whole[0][0], whole[10][0])  # another order in the next epoch


@pytest.mark.parametrize(
    ("read", "writes", "kind"),
    [
        (Site("resid-post", 0), None, "sae"),
        (Site("attn-out", 1), None, "sae"),
        (Site("mlp-in", 1), Site("mlp-out", 1), "transcoder"),
        (Site("mlp-in", 0), (Site("mlp-out", 0), Site("mlp-out", 1)), "clt"),
    ],
)
def test_training_on_a_model(read, writes, kind, tmp_path):
    model = random_model()
    tokens = torch.randint(model.d_vocab, (64, 6), generator=torch.Generator().manual_seed(0))
    trained = train_on(model, Recipe(24, "topk", k=4, steps=150), tokens, read, writes, batch_size=64, progress=False)
    dictionary = trained.dictionary
    assert dictionary.kind == kind and dictionary.model == model.name
    assert trained.history[-1, 2] < 0.7 * trained.history[0, 2]
    back = load_dictionary(save_dictionary(dictionary, tmp_path))
    assert torch.equal(back.coder.W_enc, dictionary.coder.W_enc) and back.card["recipe"]["k"] == 4


def test_a_cross_layer_transcoder_on_a_model_and_resume(tmp_path, monkeypatch):
    model = random_model()
    tokens = torch.randint(model.d_vocab, (64, 6), generator=torch.Generator().manual_seed(0))
    sites = [tuple(Site(kind, i) for i in (0, 1)) for kind in ("mlp-in", "mlp-out")]
    recipe, options = Recipe(16, "relu", steps=30, dead_after=7), {"batch_size": 48, "buffer": 150, "progress": False}
    want = train_on(model, recipe, tokens, *sites, **options)
    assert [len(d.writes) for d in want.dictionaries] == [2, 1] and want.dictionaries[0].kind == "clt"
    steps = []

    def stopping(*args, _old=train_module.advance):
        if len(steps) == 17:
            raise KeyboardInterrupt
        steps.append(1)
        return _old(*args)

    monkeypatch.setattr(train_module, "advance", stopping)
    with pytest.raises(KeyboardInterrupt):
        train_on(model, recipe, tokens, *sites, checkpoint=tmp_path / "c", **options)
    monkeypatch.undo()
    got = train_on(model, recipe, tokens, *sites, checkpoint=tmp_path / "c", **options)
    assert all(torch.equal(a, b) for a, b in zip(states(got), states(want), strict=True))


def test_recurrent_hidden_states():
    model = ck.load(torch.nn.GRU(3, 12, batch_first=True))
    inputs = torch.randn(64, 10, 3, generator=torch.Generator().manual_seed(0))
    recipe = Recipe(24, "topk", k=5, steps=300)
    trained = train_on(model, recipe, inputs, Site("state", 0, "l0.h"), batch_size=64, progress=False)
    assert trained.dictionary.kind == "sae" and str(trained.dictionary.read) == "state.l0.h"
    states = model.module(inputs)[0].detach()
    assert measure(trained.coder, [states]).fvu < 0.3


def test_recovered_is_one_for_a_perfect_copy_and_nought_for_nothing():
    coder = SparseCoder(4, 8, 4).requires_grad_(False)
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))

    def score(replacement):
        return float((x if replacement is None else replacement(x)).square().sum())

    assert recovered(score, coder) == 0
    coder.W_enc.copy_(torch.cat((torch.eye(4), -torch.eye(4)), 1))
    coder.W_dec[0].copy_(coder.W_enc.T)
    assert recovered(score, coder) == pytest.approx(1)
    with pytest.raises(OptionError, match="does not depend"):
        recovered(lambda _: 1.0, coder)


def test_quality_is_the_literal_one():
    generator = torch.Generator().manual_seed(0)
    coder = SparseCoder(4, 9, 4)
    for parameter in coder.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    x, y = torch.randn(2, 30, 4, generator=generator)
    f = coder.encode(x)
    got = measure(coder, [(x[:13], y[:13]), (x[13:], y[13:])])
    assert got.l0 == pytest.approx(float((f > 0).sum(-1).float().mean()))
    want = (y - coder(x)[:, 0]).square().sum() / (y - y.mean(0)).square().sum()
    assert got.fvu == pytest.approx(float(want.detach()), rel=1e-5)
    assert got.dead == pytest.approx(float((~(f > 0).any(0)).float().mean())) and got.n == 30


X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
BAD = {
    "inputs that do not vary": ([torch.ones(16, 4)], {}, "vary"),
    "NaN": ([X * torch.nan], {}, "NaN"),
    "NaN later": ([X, X / 0], {}, "batch 2"),
    "an iterator that ends": (iter([X, X]), {}, "ended after 2"),
    "no batch": ([], {}, "ended after 0"),
    "other lengths": ([(X, X[:5])], {}, "targets"),
    "one dimension": ([X[0]], {}, "targets"),
    "layers that differ": ([(torch.randn(8, 2, 4), torch.randn(8, 3, 4))], {}, "targets"),
    "k without topk": ([X], {"k": 3}, "k = 3"),
    "no k": ([X], {"activation": "topk"}, "k = None"),
    "a skip to two sites": ([(X, torch.randn(16, 2, 4))], {"skip": True}, "one site"),
    "an activation": ([X], {"activation": "swish"}, "swish"),
    "a penalty": ([X], {"penalty": "l2"}, "l2"),
    "steps": ([X], {"steps": 0}, "steps"),
    "lr": ([X], {"lr": 0.0}, "lr"),
    "a rate that diverges": ([X], {"lr": 1e38}, "diverged"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    pairs, options, message = BAD[name]
    with pytest.raises(CircuitKitError, match=message):
        train(Recipe(**{"n_latents": 8, "steps": 5} | options), pairs, progress=False)


def test_bad_sites_and_tokens():
    model, tokens = random_model(), torch.zeros(4, 6, dtype=torch.long)
    recipe, options = Recipe(8, steps=2), {"progress": False}
    with pytest.raises(OptionError, match="layers 0 to 1"):
        train_on(model, recipe, tokens, Site("mlp-in", 2), **options)
    with pytest.raises(OptionError, match="less than one batch"):
        train_on(model, recipe, tokens, Site("mlp-in", 0), batch_size=1000, **options)
    with pytest.raises(OptionError, match="there are 2"):
        sites = Site("mlp-in", 0), Site("mlp-in", 1)
        _ = train_on(model, recipe, torch.arange(24).view(4, 6) % 9, sites, sites, batch_size=8, **options).coder
