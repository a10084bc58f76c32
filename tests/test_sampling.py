"""Texts that models write: with and without the cache the same, seeded, and nothing of the user's touched."""

import math

import pytest
import torch

import circuitkit as ck
from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.dictionaries.sparse_coder import SparseCoder
from circuitkit.dictionaries.splice import splice
from circuitkit.errors import OptionError, UnsupportedModel
from circuitkit.models import sampling
from circuitkit.models.sampling import sample
from circuitkit.testing import tiny_model
from tests.families import build, every_family


@pytest.fixture(scope="module")
def model():
    return ck.load("stories260k", check=False)


def literal(model, prompts, n, draws, temperature=1.0):
    """One row, one token and one probability at a time."""
    rows = []
    for row, numbers in zip(prompts, draws.tolist(), strict=True):
        row = row[None]
        for number in numbers:
            with torch.no_grad():
                out = model.module(row)
            p = ((out if isinstance(out, torch.Tensor) else out.logits)[0, -1].double() / temperature).softmax(-1)
            token, total = 0, float(p[0])
            while total <= number and token < len(p) - 1:
                token += 1
                total += float(p[token])
            row = torch.cat([row, torch.tensor([[token]])], 1)
        rows.append(row)
    return torch.cat(rows)


def draws_of(seed, batch, n):
    return torch.rand(batch, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@every_family
def test_the_cache_changes_no_token(family, monkeypatch):
    model = ck.load(build(family), check=False)
    prompts = torch.tensor([[5, 3, 8], [1, 2, 3]])
    assert sampling._cached(model) is not None
    fast = sample(model, prompts, 12, seed=3)
    monkeypatch.setattr(sampling, "_cached", lambda model: None)
    assert torch.equal(sample(model, prompts, 12, seed=3), fast)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_a_batch_is_the_literal_draw_of_each_row(model, temperature):
    prompts = torch.tensor([[1, 403], [1, 407], [1, 261]])
    got = sample(model, prompts, 10, temperature=temperature, seed=5)
    assert torch.equal(got, literal(model, prompts, 10, draws_of(5, 3, 10), temperature))
    assert torch.equal(sample(model, prompts[:2], 10, temperature=temperature, seed=5), got[:2])


def test_a_model_without_a_cache():
    model = tiny_model()
    prompts = torch.tensor([[1, 2], [3, 4]])
    assert torch.equal(sample(model, prompts, 3, seed=1), literal(model, prompts, 3, draws_of(1, 2, 3)))


def test_a_module_that_breaks_on_a_cache_is_sampled_without(model, monkeypatch):
    wanted = sample(model, torch.tensor([[1]]), 6, seed=2)

    def broken(inner):
        def following(tokens):
            raise AttributeError("no cache here")

        return following

    monkeypatch.setattr(sampling, "_on_cache", broken)
    assert torch.equal(sample(model, torch.tensor([[1]]), 6, seed=2), wanted)
    monkeypatch.setattr(sampling, "_on_cache", lambda inner: lambda tokens: torch.zeros(len(tokens), model.d_vocab))
    assert torch.equal(sample(model, torch.tensor([[1]]), 6, seed=2), wanted)


def test_temperature_zero_is_the_likeliest_and_one_the_models_own(model):
    prompts = torch.ones(512, 1, dtype=torch.long)
    greedy = sample(model, prompts[:2], 8, temperature=0)
    with torch.no_grad():
        logits = model.module(greedy[:, :-1])
    assert torch.equal(greedy[:, 1:], logits.argmax(-1))
    first = sample(model, prompts, 1)[:, 1]
    p = logits[0, 0].softmax(-1)
    for token in p.topk(3).indices:
        spread = math.sqrt(float(p[token] * (1 - p[token])) / 512)
        assert abs(float((first == token).double().mean()) - float(p[token])) <= 4 * spread


def test_seeds_decide_and_the_users_state_is_left_alone(model):
    prompts = torch.ones(4, 1, dtype=torch.long)
    module, before = model.module, torch.get_rng_state()
    module.train()
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()]
    flags = [p.requires_grad for p in module.original_model.parameters()]
    one, other = sample(model, prompts, 12), sample(model, prompts, 12, seed=1)
    assert torch.equal(one, sample(model, prompts, 12)) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before) and all(m.training for m in module.modules())
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()]
    assert flags == [p.requires_grad for p in module.original_model.parameters()]
    assert all(p.grad is None for p in module.original_model.parameters())
    module.eval()


def test_dictionaries_in_a_spliced_model_take_no_part(model):
    zero = Dictionary(SparseCoder(64, 8, 64), Site("mlp-out", 1), (Site("mlp-out", 1),))
    spliced = splice(model, zero, replace=True, check=False)
    prompts = torch.ones(2, 1, dtype=torch.long)
    assert torch.equal(sample(spliced, prompts, 8), sample(model, prompts, 8))


def test_no_tokens_more(model):
    assert torch.equal(sample(model, torch.tensor([[1, 2]]), 0), torch.tensor([[1, 2]]))


@pytest.mark.parametrize("temperature", [-1.0, math.nan, math.inf])
def test_bad_temperatures(model, temperature):
    with pytest.raises(OptionError, match="temperature"):
        sample(model, torch.tensor([[1]]), 2, temperature=temperature)


def test_other_bad_input(model):
    with pytest.raises(OptionError, match="at most 512"):
        sample(model, torch.tensor([[1]]), 512)
    with pytest.raises(OptionError, match="prompts"):
        sample(model, torch.zeros(2, 0, dtype=torch.long), 2)
    with pytest.raises(OptionError, match="n = -1"):
        sample(model, torch.tensor([[1]]), -1)
    with pytest.raises(UnsupportedModel, match="causal"):
        sample(ck.load("toys/parity_gru_s0"), torch.tensor([[1]]), 2)
    with pytest.raises(UnsupportedModel, match="causal"):
        sample(ck.load("modadd/modelB_clock_standard_attention"), torch.tensor([[1]]), 1)


def test_logits_that_are_not_finite_are_refused():
    module = build("Llama")
    module.model.norm.weight.data[0] = math.nan
    with pytest.raises(UnsupportedModel, match="NaN"):
        sample(ck.load(module, check=False), torch.tensor([[1]]), 2)
