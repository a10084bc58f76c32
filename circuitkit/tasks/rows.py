"""What a user gave, brought into the shapes of a `Batch`, or refused with the row named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitkit.errors import TaskError
from circuitkit.functional.metrics import Metric
from circuitkit.shapes import Inputs, Numbers
from circuitkit.tasks.base import Batch, Vocabulary


def input_rows(values: Any, what: str) -> Inputs:
    """Token ids, or numbers ``[n, pos, size]``. Raises TaskError if they are neither, or there is nothing in them."""
    if isinstance(values, Tensor) and values.is_floating_point() and values.ndim == 3:
        return _number_rows(values, what)
    ids = _whole(values, what)
    if ids.ndim != 2:
        raise TaskError(f"{what} has shape {tuple(ids.shape)}, expected [n, pos]: one row of token ids per example")
    if not ids.numel():
        raise TaskError(f"{what} is empty (shape {tuple(ids.shape)}), expected at least one pair of at least one token")
    return ids


def _number_rows(values: Tensor, what: str) -> Numbers:
    if not values.numel():
        raise TaskError(
            f"{what} is empty (shape {tuple(values.shape)}), expected at least one pair of at least one step"
        )
    bad = (~values.isfinite()).any(2).nonzero().tolist()
    if bad:
        raise TaskError(f"row {bad[0][0]}: {what} holds NaN or infinite numbers at step {bad[0][1]}")
    return values


def real_lengths(lengths: Any, tokens: Inputs) -> Int[Tensor, " batch"]:
    """Real tokens in each row, by default all. Raises TaskError for a length that the row cannot have."""
    n, width = tokens.shape[:2]
    if lengths is None:
        return torch.full((n,), width, dtype=torch.long, device=tokens.device)
    real = _whole(lengths, "lengths").to(tokens.device)
    if real.shape != (n,):
        raise TaskError(f"lengths has shape {tuple(real.shape)}, expected one length per row: ({n},)")
    bad = ((real < 1) | (real > width)).nonzero().flatten().tolist()
    if bad:
        raise TaskError(f"row {bad[0]}: got length {int(real[bad[0]])}, expected between 1 and {width}")
    return real


def answer_positions(positions: Any, lengths: Int[Tensor, " batch"]) -> Int[Tensor, "batch answer"]:
    """Where answers are read, by default the last real token. Raises TaskError for one outside its row."""
    if positions is None:
        return (lengths - 1)[:, None]
    where = _whole(positions, "positions").to(lengths.device)
    where = where[:, None] if where.ndim == 1 else where
    if where.ndim != 2 or len(where) != len(lengths) or not where.shape[1]:
        raise TaskError(
            f"positions has shape {tuple(where.shape)}, expected [n] or [n, answer] with n = {len(lengths)}"
        )
    bad = ((where < 0) | (where >= lengths[:, None])).nonzero().tolist()
    if bad:
        row, answer = bad[0]
        raise TaskError(
            f"row {row}: got answer position {int(where[row, answer])}, expected between 0 and {int(lengths[row]) - 1}"
        )
    return where


def inputs(tokens: Inputs, lengths: Int[Tensor, " batch"], vocab: Vocabulary | None, what: str) -> Inputs:
    """The ids or numbers with everything beyond each row's length set to 0, checked against what the model can read."""
    padding = torch.arange(tokens.shape[1], device=tokens.device) >= lengths.to(tokens.device)[:, None]
    ids = tokens.masked_fill(padding if tokens.ndim == 2 else padding[..., None], 0)
    if tokens.ndim == 2:
        _check_range(ids, None if vocab is None else vocab.d_vocab, what)
    if vocab is not None and int(lengths.max()) > vocab.n_ctx:
        row = int(lengths.argmax())
        raise TaskError(f"row {row}: {int(lengths[row])} tokens, but {vocab.name!r} reads at most {vocab.n_ctx}")
    # Columns that no row reaches would only be computed and thrown away, or overrun the context.
    return ids[:, : int(lengths.max())]


def is_causal(vocab: Vocabulary | None) -> bool:
    """Whether a position sees only earlier ones, as far as the model or its card say; True if neither does."""
    return bool(getattr(vocab, "causal", True)) and _config(vocab).get("attention_dir") != "bidirectional"


def output_size(vocab: Vocabulary | None) -> int | None:
    """Number of output classes, where it is known; compiled programs have fewer or more than input ids."""
    if vocab is None:
        return None
    return int(getattr(vocab, "d_vocab_out", _config(vocab).get("d_vocab_out", vocab.d_vocab)))


def answers(values: Any, positions: Tensor, size: int | None, what: str) -> Int[Tensor, "batch answer k"]:
    """Answer ids as ``[n, answer, k]``, -1 where a slot is unused; an id given twice counts once."""
    n, n_answers = positions.shape
    if values is None:
        return torch.full((n, n_answers, 0), -1, dtype=torch.long, device=positions.device)
    ids = _whole(_rectangular(values), what).to(positions.device)
    shape = tuple(ids.shape)
    if n_answers == 1 and ids.ndim in (1, 2) and shape[0] == n:
        ids = ids.reshape(n, 1, ids.numel() // n)
    if ids.ndim != 3 or ids.shape[:2] != positions.shape:
        forms = "[n], [n, k] or [n, answer, k]" if n_answers == 1 else "[n, answer, k]"
        raise TaskError(f"{what} has shape {shape}, expected {forms} with n = {n} and {n_answers} answer position(s)")
    _check_range(ids.masked_fill(ids == -1, 0), size, what)
    repeated = (ids[..., :, None] == ids[..., None, :]).tril(-1).any(-1)
    return ids.masked_fill(repeated, -1)


def numbers(values: Any, positions: Tensor) -> Float[Tensor, "batch answer vocab"] | None:
    """Target numbers as ``[n, answer, vocab]``. Raises TaskError if they do not fit or are not finite."""
    if values is None:
        return None
    target = torch.as_tensor(values, dtype=torch.float32, device=positions.device)
    shape = tuple(target.shape)
    target = target.reshape(len(positions), 1) if shape == (len(positions),) else target
    target = target[..., None] if target.ndim == 2 else target
    if target.ndim != 3 or target.shape[:2] != positions.shape:
        raise TaskError(
            f"target has shape {shape}, expected [n, answer] or [n, answer, vocab] with [n, answer] = "
            f"{list(positions.shape)}"
        )
    bad = (~torch.isfinite(target)).nonzero().tolist()
    if bad:
        raise TaskError(f"row {bad[0][0]}: the target {target[tuple(bad[0])].item()} is not a finite number")
    return target


def check_needs(metric: Metric, batch: Batch) -> None:
    """Refuse a metric whose fields the batch lacks. Raises TaskError naming the row."""
    for field in ("right", "wrong"):
        if field in metric.needs:
            empty = (getattr(batch, field) < 0).all(-1).any(-1).nonzero().flatten().tolist()
            if empty:
                raise TaskError(f"row {empty[0]}: metric {metric.name!r} needs a {field} answer, and there is none")
    if "target" in metric.needs and batch.target is None:
        raise TaskError(f"metric {metric.name!r} needs target numbers, and there are none; give target=")


def check_overlap(batch: Batch) -> None:
    """Refuse a token that is both right and wrong at one position. Raises TaskError naming the row."""
    both = (batch.right[..., :, None] == batch.wrong[..., None, :]) & (batch.right[..., :, None] >= 0)
    bad = both.nonzero().tolist()
    if bad:
        row, answer, slot, _ = bad[0]
        raise TaskError(f"row {row}: token id {int(batch.right[row, answer, slot])} is given as right and as wrong")


def _config(vocab: Vocabulary | None) -> dict[str, Any]:
    card: dict[str, Any] = getattr(vocab, "card", None) or {}
    return card.get("hooked_transformer_config", {})


def _whole(values: Any, what: str) -> Tensor:
    if isinstance(values, Sequence) and len({len(v) for v in values if isinstance(v, Sequence)}) > 1:
        sizes = [len(v) for v in values if isinstance(v, Sequence)]
        row = next(i for i, size in enumerate(sizes) if size != sizes[0])
        raise TaskError(f"row {row}: {what} has {sizes[row]} entries, row 0 has {sizes[0]}; pad rows and give lengths=")
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TaskError(f"{what} is not a tensor of whole numbers: {error}") from error
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise TaskError(
            f"{what} has dtype {tensor.dtype}, expected token ids or positions as whole numbers (torch.long)"
        )
    return tensor.long()


def _rectangular(values: Any) -> Any:
    """Lists of different lengths filled up with -1, at the innermost level."""
    if not isinstance(values, Sequence) or not any(isinstance(v, Sequence) for v in values):
        return values
    if any(isinstance(v, Sequence) and any(isinstance(w, Sequence) for w in v) for v in values):
        width = max(len(w) for v in values for w in v)
        return [[[*w, *[-1] * (width - len(w))] for w in v] for v in values]
    width = max(len(v) if isinstance(v, Sequence) else 1 for v in values)
    rows = [list(v) if isinstance(v, Sequence) else [v] for v in values]
    return [[*row, *[-1] * (width - len(row))] for row in rows]


def _check_range(ids: Tensor, size: int | None, what: str) -> None:
    wrong = ids < 0 if size is None else (ids < 0) | (ids >= size)
    bad = wrong.nonzero().tolist()
    if bad:
        limit = "0 or more" if size is None else f"between 0 and {size - 1}"
        raise TaskError(f"row {bad[0][0]}: {what} has id {int(ids[tuple(bad[0])])}, expected {limit}")
