"""One training step, from state to state: slopes, Adam, decoder norms, and latents that died."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from circuitkit.dictionaries.losses import (
    dead_reconstruction_loss,
    gate_reconstruction,
    penalty,
    training_latents,
)
from circuitkit.dictionaries.recipe import Recipe
from circuitkit.dictionaries.sparse_coder import SparseCoder
from circuitkit.dictionaries.training_state import COLUMNS, Named, State
from circuitkit.dictionaries.units import measure_units
from circuitkit.errors import OptionError

BETAS, EPS = (0.9, 0.999), 1e-8
PENALTY_RISE = 0.2  # share of the steps over which the penalty rises to its full weight
REVIVE_UNTIL = 0.8  # share of the steps after which no latent is started anew
THRESHOLD_START = 0.5  # of jumprelu, in training units
THRESHOLD_MEMORY = 0.99  # of batchtopk's running threshold
RIDGE = 1e-2
LOGS = 100

Inputs = Float[Tensor, "batch read d_in"]
Targets = Float[Tensor, "batch out d_out"]


def begin(recipe: Recipe, x: Inputs, y: Targets, *, same: bool) -> tuple[tuple[SparseCoder, ...], State]:
    """Coders and the state before the first step; units and biases from one batch."""
    _check_finite(x, y, 1)
    x, y = x.float(), y.float()
    units = measure_units(x, y, same=same)
    x, y = x * units.read[:, None], y * units.write[:, None]
    generator = torch.Generator().manual_seed(recipe.seed)
    coders = []
    for i in range(x.shape[1]):
        target = y[:, _places(i, x.shape[1])]
        coder = SparseCoder(
            x.shape[2], recipe.n_latents, y.shape[2], n_out=target.shape[1], activation=recipe.activation, k=recipe.k,
            skip=recipe.skip, subtract_b_dec=same,
        ).to(x)  # fmt: skip
        _initialise(coder, x[:, i], target, same, x.shape[1] > 1, generator)
        coders.append(coder)
    value = {f"{i}.{name}": p.detach() for i, coder in enumerate(coders) for name, p in coder.named_parameters()}
    zero = {name: torch.zeros_like(tensor) for name, tensor in value.items()}
    silent = {str(i): torch.zeros(recipe.n_latents, dtype=torch.long, device=x.device) for i in range(len(coders))}
    history = torch.zeros(0, len(COLUMNS), dtype=torch.float64)
    return tuple(coders), State(0, value, zero, dict(zero), silent, generator.get_state(), units, history)


def _places(i: int, n_coders: int) -> slice:
    """The sites that a coder writes: its own and all later ones, or all if there is one coder."""
    return slice(i, None) if n_coders > 1 else slice(None)


@torch.no_grad()
def _initialise(
    coder: SparseCoder, x: Tensor, y: Targets, same: bool, stacked: bool, generator: torch.Generator
) -> None:
    """Random directions to read; each writes what goes with it on the whole: its image under the best linear map."""
    mean = x.mean(0)
    encoder = torch.randn(coder.W_enc.shape, generator=generator).to(coder.W_enc)
    encoder = encoder / encoder.norm(dim=0)
    rows = encoder.T[None] if same else encoder.T @ _linear_map(x - mean, y - y.mean(0))
    coder.W_enc.copy_(encoder)
    coder.W_dec.copy_(rows / _row_norm(rows))
    # A site's bias belongs to one coder of a stack, the one that reads the same layer.
    coder.b_dec[: 1 if stacked else None].copy_(y.mean(0)[: 1 if stacked else None])
    if not same:
        coder.b_enc.copy_(-(mean @ encoder))
    if coder.b_mag is not None:
        coder.b_mag.copy_(coder.b_enc)
    if coder.threshold is not None:
        coder.threshold.fill_(THRESHOLD_START * (coder.activation == "jumprelu"))


def _linear_map(x: Float[Tensor, "batch d_in"], y: Targets) -> Float[Tensor, "out d_in d_out"]:
    """Least squares with a ridge, so that directions in which a small batch does not vary do no harm."""
    gram = x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1]).to(x)
    return torch.linalg.solve(gram, torch.einsum("bi,bld->lid", x, y))


def put(coders: tuple[SparseCoder, ...], state: State) -> list[Tensor]:
    """Let the coders hold the state's weights, and return these as leaves, in the state's order."""
    leaves = list[Tensor]()
    for i, coder in enumerate(coders):
        for name, parameter in coder.named_parameters():
            parameter.data = state.value[f"{i}.{name}"]
            leaves.append(parameter)
    return leaves


def advance(recipe: Recipe, coders: tuple[SparseCoder, ...], now: State, x: Inputs, y: Targets) -> State:
    """The state after one more step; ``now`` is not changed.

    Raises:
        OptionError: if the batch is not finite, or training diverges.
    """
    _check_finite(x, y, now.step + 1)
    x, y = x.float() * now.units.read[:, None], y.float() * now.units.write[:, None]
    leaves = put(coders, now)
    with torch.enable_grad():
        loss, fvu, left, latents = _loss(recipe, coders, now, x, y)
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    value, first, second = _adam(recipe, now, dict(zip(now.value, gradients, strict=True)), len(coders) > 1)
    silent = {}
    for i, f in enumerate(latents):
        silent[str(i)] = torch.where((f > 0).any(0), 0, now.silent[str(i)] + 1)
        _constrain(value, i, f, recipe.activation, now.step)
    generator = torch.Generator()
    generator.set_state(now.random)
    step = now.step + 1
    if step % recipe.dead_after == 0 and step < REVIVE_UNTIL * recipe.steps:
        moments = (first, second)
        for i, coder in enumerate(coders):
            places = _places(i, len(coders))
            _revive(coder, i, silent, recipe, value, moments, x[:, i], left[:, places], generator)
    if not torch.isfinite(loss) or not all(bool(v.isfinite().all()) for v in value.values()):
        raise OptionError(f"training diverged at step {step} of {recipe.steps}; lower lr (now {recipe.lr:g})")
    history = now.history
    if step % max(1, recipe.steps // LOGS) == 0 or step == recipe.steps:
        l0 = sum(float((f > 0).sum(-1).float().mean()) for f in latents)
        dead = sum(float((s >= recipe.dead_after).float().mean()) for s in silent.values()) / len(coders)
        row = torch.tensor([[step, float(loss.detach()), float(fvu), l0, dead]], dtype=torch.float64)
        history = torch.cat((history, row))
    return State(step, value, first, second, silent, generator.get_state(), now.units, history)


def _loss(
    recipe: Recipe, coders: tuple[SparseCoder, ...], now: State, x: Inputs, y: Targets
) -> tuple[Tensor, Tensor, Targets, list[Float[Tensor, "batch latent"]]]:
    """The loss, its FVU, what is left unexplained, and every coder's latents."""
    written, gates = torch.zeros_like(y), torch.zeros_like(y)
    pres, latents = [], []
    active = x.new_zeros(())
    for i, coder in enumerate(coders):
        pre = coder.pre_activation(x[:, i])
        f = training_latents(coder, pre)
        out = coder.decode(f)
        out = out if coder.W_skip is None else out + (x[:, i] @ coder.W_skip)[:, None]
        written = _add(written, out, i, len(coders))
        if coder.activation == "gated":
            gates = _add(gates, gate_reconstruction(coder, pre), i, len(coders))
        active = active + penalty(coder, pre, f, recipe.penalty)
        pres.append(pre)
        latents.append(f)
    left = y - written
    fvu = left.square().mean()
    rise = min(1.0, (now.step + 1) / max(1.0, PENALTY_RISE * recipe.steps))
    loss = fvu + rise * recipe.sparsity / y[0].numel() * active
    if recipe.activation == "gated":
        loss = loss + (y - gates).square().mean()
    if recipe.activation in ("topk", "batchtopk"):
        for i, (coder, pre) in enumerate(zip(coders, pres, strict=True)):
            dead = now.silent[str(i)] >= recipe.dead_after
            if bool(dead.any()):
                loss = loss + dead_reconstruction_loss(coder, pre, dead, left[:, _places(i, len(coders))])
    return loss, fvu.detach(), left.detach(), [f.detach() for f in latents]


def _add(total: Targets, part: Targets, i: int, n_coders: int) -> Targets:
    if n_coders == 1:
        return total + part
    return torch.cat((total[:, :i], total[:, i:] + part), 1)


def _adam(recipe: Recipe, now: State, gradients: Named, stacked: bool) -> tuple[Named, Named, Named]:
    value, first, second = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    rate = recipe.rate(now.step)
    for name, gradient in gradients.items():
        old = now.value[name]
        if name.endswith("W_dec"):  # what would change a row's norm is no use: the norm is set to 1 again
            gradient = gradient - (gradient * old).sum((0, 2), keepdim=True) * old
        if name.endswith("b_dec") and stacked:
            gradient = torch.cat((gradient[:1], torch.zeros_like(gradient[1:])))
        first[name] = torch.lerp(gradient, now.first[name], BETAS[0])
        second[name] = torch.lerp(gradient.square(), now.second[name], BETAS[1])
        mean = first[name] / (1 - BETAS[0] ** (now.step + 1))
        scale = (second[name] / (1 - BETAS[1] ** (now.step + 1))).sqrt() + EPS
        value[name] = old - rate * mean / scale
    return value, first, second


def _constrain(value: Named, i: int, latents: Float[Tensor, "batch latent"], activation: str, step: int) -> None:
    """Decoder rows of norm 1, thresholds not below 0, and batchtopk's threshold: the running least active value."""
    rows = value[f"{i}.W_dec"]
    value[f"{i}.W_dec"] = rows / _row_norm(rows)
    name = f"{i}.threshold"
    if activation == "jumprelu":
        value[name] = value[name].clamp(min=0)
    if activation == "batchtopk" and bool((latents > 0).any()):
        least = latents[latents > 0].min()
        value[name] = torch.lerp(least, value[name], THRESHOLD_MEMORY) if step else least.expand_as(value[name]).clone()


def _row_norm(rows: Float[Tensor, "out latent d_out"]) -> Float[Tensor, "1 latent 1"]:
    return rows.square().sum((0, 2), keepdim=True).sqrt().clamp(min=1e-8)


def _revive(
    coder: SparseCoder,
    i: int,
    silent: Named,
    recipe: Recipe,
    value: Named,
    moments: tuple[Named, Named],
    x: Float[Tensor, "batch d_in"],
    left: Targets,
    generator: torch.Generator,
) -> None:
    """Start dead latents anew on inputs drawn in proportion to what is left unexplained of them."""
    dead = (silent[str(i)] >= recipe.dead_after).nonzero()[:, 0]
    weight = left.square().sum((1, 2)).cpu()
    if not len(dead) or not bool(weight.sum() > 0):
        return
    drawn = torch.multinomial(weight, len(dead), replacement=True, generator=generator).to(x.device)
    center = value[f"{i}.b_dec"][0] if coder.subtract_b_dec else x.mean(0)
    direction = x[drawn] - center
    direction = direction / direction.norm(dim=1, keepdim=True).clamp(min=1e-8)
    rows = left[drawn].transpose(0, 1)
    new = {
        "W_enc": direction.T,
        "W_dec": rows / _row_norm(rows),
        "b_enc": torch.zeros(len(dead)).to(x) if coder.subtract_b_dec else -(direction @ center),
        "threshold": torch.full((len(dead),), THRESHOLD_START).to(x),
        "r_mag": torch.zeros(len(dead)).to(x),
        "b_mag": torch.zeros(len(dead)).to(x),
    }
    if coder.activation == "gated":
        new["b_mag"] = new["b_enc"]
    for name, part in new.items():
        if f"{i}.{name}" not in value:
            continue
        axis = 1 if name in ("W_enc", "W_dec") else 0
        value[f"{i}.{name}"] = value[f"{i}.{name}"].index_copy(axis, dead, part)
        for moment in moments:
            moment[f"{i}.{name}"] = moment[f"{i}.{name}"].index_fill(axis, dead, 0.0)
    silent[str(i)] = silent[str(i)].index_fill(0, dead, 0)


def _check_finite(x: Tensor, y: Tensor, number: int) -> None:
    if not (bool(x.isfinite().all()) and bool(y.isfinite().all())):
        raise OptionError(f"batch {number} holds NaN or infinite values; check the activations that it is made of")
