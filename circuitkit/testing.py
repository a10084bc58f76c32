"""Laws that a new method or model must obey, for the test suites of third parties.

    from circuitkit.testing import check_method
    check_method("my-method")

Each function raises `LawBroken` naming the law. The laws of a model are those that `load` tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from circuitkit.functional.metrics import METRICS, Metric
from circuitkit.methods.base import score
from circuitkit.models.base import load
from circuitkit.models.hooked import Model
from circuitkit.models.native import NativeConfig, NativeTransformer
from circuitkit.models.tl_layout import native_model
from circuitkit.scores import Scores
from circuitkit.tasks.base import Task


class LawBroken(AssertionError):
    """A method breaks a law that all methods obey."""


def check_model(module: nn.Module | str) -> Model:
    """Load a model and test the laws of its wiring. Raises UnsupportedModel naming the law, the layer and the gap."""
    return load(module, check=True)


def check_method(name: str, **options: Any) -> None:
    """Test a registered method of edge level on tiny random transformers.

    Raises:
        LawBroken: naming the law and the model.

    >>> check_method("eap")
    """
    for shape in ({}, {"n_heads": 4, "n_key_value_heads": 2}, {"attn_only": True, "normalization_type": None}):
        for law, holds in _method_laws(name, tiny_model(**shape), options):
            if not holds:
                raise LawBroken(f"{name} breaks the law that {law}, on a random transformer with {shape or 'defaults'}")


def _method_laws(name: str, model: Model, options: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """Each law and whether it holds, tested one after the other."""
    task = tiny_task(model)

    def scored(task: Task, **common: Any) -> Scores:
        scores: Scores = score(model, task, name, progress=False, **common, **options)
        return scores

    def run(task: Task, **common: Any) -> Tensor:
        return scored(task, **common).values

    before = _state(model.module)
    scores = scored(task)
    values = scores.values
    yield "the model is left as found", _state(model.module) == before
    yield "impossible edges score 0", not values[~scores.graph.mask].any()
    yield "scores are finite", bool(values.isfinite().all())
    yield "identical pairs score exactly 0", not run(_identical(task)).any()
    yield "the batch size changes nothing", _close(run(task, batch_size=1), values)
    yield "the memory budget changes nothing", _close(run(task, budget="2KiB"), values)
    yield "scores scale with the metric", _close(run(_scaled(task, 3.0)), 3 * values)


def tiny_model(*, seed: int = 0, scale: float = 0.6, dtype: torch.dtype = torch.float64, **config: Any) -> Model:
    """A random transformer of two layers; ``config`` overrides fields of `NativeConfig`.

    >>> tiny_model(n_layers=1)
    Model(random: 4 writers, 8 readers, 13 edges)
    """
    fields = {
        "n_layers": 2, "d_model": 8, "d_head": 4, "n_heads": 2, "n_ctx": 12, "d_vocab": 11, "d_mlp": 10,
        "act_fn": "silu", "normalization_type": "RMS",
    } | config  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    blank = NativeTransformer(NativeConfig.from_dict(fields)).state_dict()
    weights = {k: torch.randn(v.shape, generator=generator) * (scale if v.dim() > 1 else 0.1) for k, v in blank.items()}
    weights |= {k: 1 + 0.2 * v for k, v in weights.items() if k.endswith(".w")}
    model = native_model(fields, weights, name="random", dtype=dtype)
    model.check()
    return model


def tiny_task(model: Model, *, n: int = 4, length: int = 6, seed: int = 0, **options: Any) -> Task:
    """Random pairs with random right and wrong answers; ``options`` as for `Task.from_tokens`."""
    generator = torch.Generator().manual_seed(seed)
    clean, corrupt = torch.randint(model.d_vocab, (2, n, length), generator=generator)
    right = torch.randint(model.d_vocab, (n,), generator=generator)
    wrong = (right + torch.randint(1, model.d_vocab, (n,), generator=generator)) % model.d_vocab
    return Task.from_tokens(clean, corrupt, right, wrong, **options)


def _identical(task: Task) -> Task:
    return replace(task, batches=tuple(replace(b, corrupt=b.clean) for b in task.batches))


def _scaled(task: Task, factor: float) -> Task:
    base = METRICS[task.metric.name]
    return replace(task, metric=Metric("scaled", lambda x, b: factor * base.function(x, b), base.needs))


def _close(got: Tensor, want: Tensor) -> bool:
    return torch.allclose(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def _state(module: nn.Module) -> tuple[Any, ...]:
    """What a method must leave as it found it: modes, hooks, gradients, weights and the random state."""
    return (
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in module.modules()],
        [(p.requires_grad, p.grad is None, p._version, float(p.detach().sum())) for p in module.parameters()],
        torch.random.get_rng_state().tolist(),
    )
