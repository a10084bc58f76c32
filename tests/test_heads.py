"""Head statistics against counting by hand, on patterns whose answer is known."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitkit as ck
from circuitkit.functional.heads import (
    first_score,
    lag_curve,
    prefix_matching_score,
    previous_token_score,
    self_score,
    shares,
)

STATISTICS = [previous_token_score, self_score, first_score, lag_curve]


def random_pattern(seed, batch=3, heads=2, steps=7):
    return torch.randn(batch, heads, steps, steps, generator=torch.Generator().manual_seed(seed)).tril().double()


def counted(pattern, pick, lengths):
    """The mean of a row's share at the picked keys, query by query."""
    out = []
    for head in range(pattern.shape[1]):
        found = []
        for row in range(len(pattern)):
            for t in range(int(lengths[row])):
                weights = pattern[row, head, t].abs()
                keys = pick(row, t)
                if keys:
                    found.append(sum(float(weights[s] / weights.sum()) for s in keys))
        out.append(sum(found) / len(found))
    return torch.tensor(out, dtype=torch.float64)


@given(st.integers(0, 999), st.booleans())
@settings(max_examples=20, deadline=None)
def test_statistics_equal_counting(seed, ragged):
    pattern = random_pattern(seed)
    lengths = torch.tensor([7, 3, 5]) if ragged else None
    full = torch.full((3,), 7) if lengths is None else lengths
    tokens = torch.randint(0, 3, (3, 7), generator=torch.Generator().manual_seed(seed))
    wanted = {
        previous_token_score: lambda row, t: [t - 1] if t else [],
        self_score: lambda row, t: [t],
        first_score: lambda row, t: [0] if t else [],
    }
    for statistic, pick in wanted.items():
        torch.testing.assert_close(statistic(pattern, lengths), counted(pattern, pick, full))
    curve = lag_curve(pattern, lengths)
    for lag in range(7):
        torch.testing.assert_close(
            curve[:, lag], counted(pattern, lambda row, t, lag=lag: [t - lag] if t >= lag else [], full)
        )

    def after(row, t):
        return [s + 1 for s in range(t - 1) if tokens[row, s] == tokens[row, t]]

    torch.testing.assert_close(prefix_matching_score(pattern, tokens, lengths), counted(pattern, after, full))


@pytest.mark.parametrize("statistic", STATISTICS)
def test_signs_scale_and_phase_of_a_map_do_not_matter(statistic):
    pattern = random_pattern(0)
    want = statistic(pattern)
    turned = pattern * torch.polar(torch.tensor(3.0).double(), torch.tensor(0.7).double())
    for other in (-pattern, 1e6 * pattern, pattern * torch.rand(3, 2, 7, 1).double().add(0.1), turned):
        torch.testing.assert_close(statistic(other), want)


def test_shares_are_the_pattern_itself_where_it_is_attention():
    pattern = random_pattern(1).abs()
    pattern = pattern / pattern.sum(-1, keepdim=True)
    torch.testing.assert_close(shares(pattern), pattern)
    assert torch.equal(shares(torch.zeros(1, 1, 2, 2)), torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize("statistic", STATISTICS)
def test_what_lies_behind_the_end_of_a_sequence_does_not_count(statistic):
    pattern, lengths = random_pattern(2), torch.tensor([7, 4, 2])
    padded = pattern.clone()
    padded[1, :, 4:], padded[2, :, 2:] = 100.0, -3.0
    assert torch.equal(statistic(pattern, lengths), statistic(padded, lengths))


def test_the_ideal_heads_score_one():
    half = torch.randperm(10)
    tokens = torch.cat((half, half))[None]
    induction, previous = torch.zeros(2, 1, 1, 20, 20)
    for t in range(20):
        induction[0, 0, t, max(t - 9, 0) if t > 9 else 0] = 1.0
        previous[0, 0, t, max(t - 1, 0)] = 1.0
    assert prefix_matching_score(induction, tokens).item() == 1.0
    assert previous_token_score(previous).item() == 1.0 and prefix_matching_score(previous, tokens).item() == 0.0
    assert lag_curve(previous)[0, 1] == 1.0


def test_nothing_repeated_is_no_number():
    assert prefix_matching_score(random_pattern(0, batch=1), torch.arange(7)[None]).isnan().all()


def test_a_trained_induction_circuit_is_told_by_its_patterns():
    """A previous-token head in layer 0, an induction head in layer 1, and not the other way round."""
    model = ck.load("induction/trained")
    tokens = ck.task("induction-letters", model, n=64).batches[0].clean
    patterns = {}
    for name, module in model.module.named_modules():
        if name.endswith("hook_pattern"):
            module.register_forward_hook(lambda _, __, out, name=name: patterns.setdefault(name, out))
    with torch.no_grad():
        model.module(tokens)
    first, second = (patterns[f"blocks.{layer}.attn.hook_pattern"] for layer in (0, 1))
    assert previous_token_score(first) > 0.7 > 0.3 > previous_token_score(second)
    assert prefix_matching_score(second, tokens) > 0.8 > 0.2 > prefix_matching_score(first, tokens)
