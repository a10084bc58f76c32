"""Tails against enumeration, and tests that keep their level and see what is there."""

from itertools import combinations
from math import comb

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from circuitkit.functional.significance import (
    binomial,
    dependence_p,
    equivalence_p,
    expected_jaccard,
    hypergeometric,
    overlap_p,
    rank_p,
)
from circuitkit.functional.stats import auroc, roc_curve, trapezoid


@pytest.mark.parametrize(("n", "a", "b"), [(6, 3, 2), (5, 5, 3), (6, 4, 4), (4, 0, 2), (3, 3, 3)])
def test_overlaps_by_enumeration(n, a, b):
    first = set(range(a))
    sets = [set(c) for c in combinations(range(n), b)]
    shared = [len(first & s) for s in sets]
    for x in range(min(a, b) + 1):
        assert float(hypergeometric(n, a, b)[x]) == pytest.approx(shared.count(x) / len(sets), abs=1e-12)
        assert overlap_p(n, a, b, x) == pytest.approx(sum(s >= x for s in shared) / len(sets))
    jaccard = [len(first & s) / len(first | s) if first | s else 1.0 for s in sets]
    assert expected_jaccard(n, a, b) == pytest.approx(sum(jaccard) / len(sets))


def test_large_graphs_do_not_overflow():
    assert overlap_p(1_592_881, 5000, 5000, 0) == 1.0
    assert 0 <= overlap_p(1_592_881, 5000, 5000, 200) < 1e-100
    assert float(hypergeometric(32491, 200, 200).sum()) == pytest.approx(1)


@given(n=st.integers(1, 12), p=st.floats(0, 1), k=st.integers(0, 12))
def test_binomial_tails_by_hand(n, p, k):
    want = [comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(n + 1)]
    assert binomial(n, p).tolist() == pytest.approx(want, abs=1e-12)
    assert rank_p(min(k, n), n, p) == pytest.approx(sum(want[: min(k, n) + 1]), abs=1e-9)


def test_the_equivalence_p_value_is_the_largest_over_the_margin():
    for wins in (10, 13, 17, 20):
        at = [
            sum(float(binomial(20, p)[k]) for k in range(21) if abs(k / 20 - 0.5) >= abs(wins / 20 - 0.5) - 1e-12)
            for p in (0.4, 0.45, 0.5, 0.55, 0.6)
        ]
        assert equivalence_p(wins, 20, 0.1) == pytest.approx(max(at))
    assert equivalence_p(20, 20, 0.1) == pytest.approx(0.6**20 + 0.4**20)


def test_dependence_keeps_its_level_and_sees_a_bend():
    draw = torch.Generator().manual_seed(0)
    rejected = bent = 0
    for _ in range(300):
        x, y = torch.randn(2, 30, generator=draw)
        rejected += dependence_p(x, y, permutations=59, generator=draw)[1] <= 0.05
        bent += dependence_p(x, x**2 + 0.3 * y, permutations=59, generator=draw)[1] <= 0.05
    assert 0.02 < rejected / 300 < 0.09
    assert bent / 300 > 0.9


def test_constant_samples_are_independent():
    x = torch.ones(10)
    draw = torch.Generator().manual_seed(0)
    assert dependence_p(x, torch.arange(10.0), permutations=50, generator=draw) == (0.0, 1.0)


def test_hsic_by_loops():
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 6, generator=draw, dtype=torch.float64)

    def kernel(v):
        gaps = [abs(float(v[i] - v[j])) for i in range(6) for j in range(6) if i != j]
        width = sorted(gaps)[(len(gaps) - 1) // 2]
        return [[float(torch.exp(-((v[i] - v[j]) ** 2) / (2 * width**2))) for j in range(6)] for i in range(6)]

    k, other, total = kernel(x), kernel(y), 0.0
    row, col = ([sum(m[i]) / 6 for i in range(6)] for m in (k, other))
    for i in range(6):
        for j in range(6):
            a = k[i][j] - row[i] - row[j] + sum(row) / 6
            b = other[i][j] - col[i] - col[j] + sum(col) / 6
            total += a * b / 36
    assert dependence_p(x, y, permutations=1, generator=draw)[0] == pytest.approx(total)


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=15))
def test_the_roc_curve_ends_at_the_corners_and_its_area_is_auroc(items):
    values = torch.tensor([float(v) for v, _ in items])
    positive = torch.tensor([p for _, p in items])
    curve = roc_curve(values, positive)
    if curve is None:
        assert positive.all() or not positive.any()
        return
    false, true, thresholds = curve
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert trapezoid(true, false) == pytest.approx(auroc(values, positive), abs=1e-12)
    assert len(thresholds) == len({v for v, _ in items}) + 1
    for f, t, level in zip(false, true, thresholds, strict=True):
        taken = values >= level
        assert t == pytest.approx(int((taken & positive).sum()) / int(positive.sum()))
        assert f == pytest.approx(int((taken & ~positive).sum()) / int((~positive).sum()))
