"""Each metric against its formula written out with loops, in numpy and float64."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitkit.errors import MetricError
from circuitkit.functional.metrics import METRICS, Metric
from circuitkit.tasks.base import Batch

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def literal(name: str, logits: torch.Tensor, batch: Batch) -> list[float]:
    """The metric of each example, one position and one token at a time."""
    values = []
    for i in range(len(logits)):
        per_position = []
        for j in range(logits.shape[1]):
            z = logits[i, j].double().numpy()
            p = softmax(z)
            right = [k for k in batch.right[i, j].tolist() if k >= 0]
            wrong = [k for k in batch.wrong[i, j].tolist() if k >= 0]
            per_position.append(one(name, z, p, right, wrong, batch, (i, j)))
        values.append(sum(per_position) / len(per_position))
    return values


def one(
    name: str, z: np.ndarray, p: np.ndarray, right: list[int], wrong: list[int], batch: Batch, at: tuple[int, int]
) -> float:
    if name == "logit-diff":
        return sum(z[k] for k in right) / len(right) - sum(z[k] for k in wrong) / len(wrong)
    if name == "prob-diff":
        return sum(p[k] for k in right) - sum(p[k] for k in wrong)
    if name == "cross-entropy":
        return math.log(sum(p[k] for k in right))
    if name == "accuracy":
        return float(int(np.argmax(z)) in right)
    if name == "squared-error":
        target = batch.target[at].double().numpy()
        return -sum((z[k] - target[k]) ** 2 for k in range(len(z)))
    if name == "signed-output":
        target = batch.target[at].double().numpy()
        used = [k for k in range(len(z)) if target[k] != 0]
        return sum(z[k] * target[k] for k in used) / max(len(used), 1)
    assert name == "kl"
    q = softmax(batch.reference[at].double().numpy())
    return -sum(q[k] * (math.log(q[k]) - math.log(p[k])) for k in range(len(p)))


def draw(seed: int, dtype: torch.dtype, n: int, answers: int, vocab: int) -> tuple[torch.Tensor, Batch]:
    """Logits and a batch whose sets of right and wrong tokens have different sizes in every row."""
    rng = torch.Generator().manual_seed(seed)
    logits, reference, target = (4 * torch.randn(n, answers, vocab, generator=rng).to(dtype) for _ in range(3))
    target[..., ::3] = 0  # an output that does not matter, for the metric that knows of these
    right, wrong = (torch.full((n, answers, vocab), -1) for _ in range(2))
    for i in range(n):
        for j in range(answers):
            order = torch.randperm(vocab, generator=rng)
            a, b = (int(torch.randint(1, vocab // 2 + 1, (1,), generator=rng)) for _ in range(2))
            # Unused slots may stand anywhere, not only at the end.
            right[i, j, torch.randperm(vocab, generator=rng)[:a]] = order[:a]
            wrong[i, j, torch.randperm(vocab, generator=rng)[:b]] = order[a : a + b]
    positions = torch.arange(answers).expand(n, -1)
    tokens = torch.zeros(n, answers, dtype=torch.long)
    lengths = torch.full((n,), answers)
    return logits, Batch(tokens, tokens, lengths, positions, right, wrong, target, reference)


@pytest.mark.parametrize("name", sorted(METRICS))
@given(
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    n=st.integers(1, 4),
    answers=st.integers(1, 3),
    vocab=st.integers(2, 9),
)
@settings(max_examples=25, deadline=None)
def test_equals_the_literal_formula(name: str, seed: int, dtype: torch.dtype, n: int, answers: int, vocab: int) -> None:
    logits, batch = draw(seed, dtype, n, answers, vocab)
    values = METRICS[name](logits, batch)
    assert values.dtype in (torch.float32, torch.float64)
    np.testing.assert_allclose(values.double().numpy(), literal(name, logits, batch), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", sorted(METRICS))
def test_one_example_is_as_good_as_many(name: str) -> None:
    logits, batch = draw(0, torch.float64, 5, 2, 7)
    alone = [METRICS[name](logits[i : i + 1], batch.rows(slice(i, i + 1))) for i in range(5)]
    torch.testing.assert_close(METRICS[name](logits, batch), torch.cat(alone))


@pytest.mark.parametrize("name", sorted(name for name in METRICS if METRICS[name].differentiable))
def test_gradients_are_right_and_finite(name: str) -> None:
    logits, batch = draw(1, torch.float64, 3, 2, 6)
    assert torch.autograd.gradcheck(lambda x: METRICS[name](x, batch), logits.requires_grad_())


@pytest.mark.parametrize("name", sorted(METRICS))
def test_large_logits_stay_finite(name: str) -> None:
    logits, batch = draw(2, torch.float32, 2, 1, 6)
    scaled = replace(batch, reference=1e3 * batch.reference)
    assert torch.isfinite(METRICS[name](1e3 * logits, scaled)).all()


def test_cross_entropy_of_one_token_is_torchs() -> None:
    logits, batch = draw(3, torch.float32, 4, 1, 6)
    right = torch.tensor([0, 3, 5, 1])
    values = METRICS["cross-entropy"](logits, replace(batch, right=right[:, None, None]))
    torch.testing.assert_close(values, -torch.nn.functional.cross_entropy(logits[:, 0], right, reduction="none"))


def test_kl_is_summed_over_the_vocabulary_and_zero_at_the_clean_run() -> None:
    logits, batch = draw(4, torch.float32, 3, 1, 50)
    expected = torch.nn.functional.kl_div(
        logits.log_softmax(-1), batch.reference.log_softmax(-1), log_target=True, reduction="none"
    )
    torch.testing.assert_close(METRICS["kl"](logits, batch), -expected.sum(-1).mean(-1))
    assert METRICS["kl"](batch.reference, batch).abs().max() == 0


def test_kl_with_classes_that_are_ruled_out() -> None:
    logits, batch = draw(5, torch.float32, 2, 1, 6)
    ruled_out = torch.tensor([0.0, 0, 0, 0, 0, -torch.inf])
    batch = replace(batch, reference=batch.reference + ruled_out)
    x = (logits + ruled_out).requires_grad_()
    values = METRICS["kl"](x, batch)
    kept = METRICS["kl"](logits[..., :5], replace(batch, reference=batch.reference[..., :5]))
    torch.testing.assert_close(values, kept)
    assert torch.isfinite(torch.autograd.grad(values.sum(), x)[0]).all()


def test_half_precision_logits_are_not_judged_in_half_precision() -> None:
    logits, batch = draw(6, torch.bfloat16, 4, 1, 500)
    for name in ("prob-diff", "cross-entropy", "kl"):
        precise = METRICS[name](logits.double(), replace(batch, reference=batch.reference.double()))
        torch.testing.assert_close(METRICS[name](logits, batch).double(), precise, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("logit-diff", {"right": torch.tensor([[[9]], [[1]]])}, "id 9, the model only 6 outputs"),
        ("logit-diff", {"wrong": torch.tensor([[[1]]])}, "same examples and answer positions"),
        ("squared-error", {"target": torch.zeros(2, 1, 1)}, "same examples and answer positions"),
        ("squared-error", {"target": None}, "needs batch.target"),
        ("kl", {"reference": None}, "needs batch.reference"),
        ("kl", {"reference": torch.zeros(1, 1, 6)}, "same examples and answer positions"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(name: str, change: dict[str, torch.Tensor | None], message: str) -> None:
    logits, batch = draw(7, torch.float32, 2, 1, 6)
    with pytest.raises(MetricError, match=message):
        METRICS[name](logits, replace(batch, **change))


@pytest.mark.parametrize("name", sorted(METRICS))
def test_nan_is_an_error_that_names_the_example(name: str) -> None:
    logits, batch = draw(8, torch.float32, 3, 1, 6)
    logits[1] = torch.nan
    with pytest.raises(MetricError, match=r"not finite on examples \[1\]"):
        METRICS[name](logits, batch)


def test_a_metric_that_averages_over_the_batch_is_refused() -> None:
    logits, batch = draw(9, torch.float32, 3, 1, 6)
    with pytest.raises(MetricError, match="one number per example"):
        Metric("mine", lambda x, _: x.mean(), needs=())(logits, batch)
