"""Trains the small recurrent networks under data/recurrent_toys, on one thread in a few minutes.

    python benchmarks/train_recurrent.py [--out data/recurrent_toys] [--only flip-flop_tanh_s0 ...]

Three tasks x three cells x three seeds, and the pair that shows what a gate without signs cannot do (parity with a
diagonal transition whose entries may be negative, and with one whose entries lie in 0..1).
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from circuitkit.models.recurrent.cells.bilinear import DiagonalBilinear
from circuitkit.models.recurrent.net import RecurrentNet

N_BITS = 3


@dataclass(frozen=True)
class Recipe:
    """How one task is trained."""

    steps: int
    batch: int
    length: int
    learning_rate: float


def flip_flop(batch: int, length: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pulses of +-1 on three channels; the target is the last pulse of each. Every channel has one at step 0."""
    rate = torch.empty(batch, 1, 1).uniform_(0.0, 0.3, generator=rng)
    sign = torch.randint(0, 2, (batch, length, N_BITS), generator=rng) * 2.0 - 1
    present = torch.rand(batch, length, N_BITS, generator=rng) < rate
    present[:, 0] = True
    last = torch.where(present, torch.arange(length)[:, None], -1).cummax(1).values
    return sign * present, sign.gather(1, last)


def parity(batch: int, length: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bits as token ids; the target is whether an odd number of ones has been read."""
    bits = torch.randint(0, 2, (batch, length), generator=rng)
    return bits, bits.cumsum(1) % 2


def integrator(batch: int, length: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy evidence with a drift; the target is a fifth of its running sum."""
    drift = torch.empty(batch, 1, 1).uniform_(-0.2, 0.2, generator=rng)
    evidence = drift + 0.6 * torch.randn(batch, length, 1, generator=rng)
    return evidence, evidence.cumsum(1) / 5


def squared(outputs: Tensor, target: Tensor) -> Tensor:
    return (outputs - target).square().mean()


def cross_entropy(outputs: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs.flatten(0, 1), target.flatten())


def same_sign(outputs: Tensor, target: Tensor) -> float:
    """Share of outputs with the sign of their target."""
    return float((outputs.sign() == target.sign()).double().mean())


def same_class(outputs: Tensor, target: Tensor) -> float:
    """Share of steps with the right class."""
    return float((outputs.argmax(-1) == target).double().mean())


def explained(outputs: Tensor, target: Tensor) -> float:
    """Share of the target's variance that the outputs explain."""
    return float(1 - (outputs - target).var() / target.var())


@dataclass(frozen=True)
class Task:
    """Inputs and targets, a loss, a measure, and the recipe."""

    draw: Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    measure: Callable[[Tensor, Tensor], float]
    what: str
    size: int
    n_out: int
    recipe: Recipe


TASKS = {
    "flip-flop": Task(flip_flop, squared, same_sign, "sign accuracy", N_BITS, N_BITS, Recipe(2500, 128, 25, 4e-3)),
    "parity": Task(parity, cross_entropy, same_class, "accuracy", 2, 2, Recipe(2000, 64, 30, 5e-3)),
    "integrator": Task(
        integrator, squared, explained, "share of variance explained", 1, 1, Recipe(2000, 128, 25, 4e-3)
    ),
}
CELLS: dict[str, Callable[[int], nn.Module]] = {
    "tanh": lambda size: nn.RNN(size, 32, batch_first=True),
    "gru": lambda size: nn.GRU(size, 24, batch_first=True),
    "lstm": lambda size: nn.LSTM(size, 32, batch_first=True),
}
SEEDS = (0, 1, 2)
# Parity alone: transitions h(t) = a(x(t)) h(t-1) with a of any sign, or within 0..1.
PAIR: dict[str, Callable[[int], nn.Module]] = {
    "signed": lambda size: DiagonalBilinear(size, 32, signed=True, normalise=True),
    "nonnegative": lambda size: DiagonalBilinear(size, 32, signed=False, normalise=True),
}
KINDS = {"signed": ("signed",), "nonnegative": ("non-negative",)}
PAIR_RECIPE = Recipe(800, 64, 40, 1e-2)


def build(cell: nn.Module, task: Task, name: str) -> RecurrentNet:
    """The untrained network; parity reads bits through a fixed one-hot table."""
    table = nn.Embedding.from_pretrained(torch.eye(2)) if name == "parity" else None
    return RecurrentNet(cell, task.n_out, table)


def train(net: nn.Module, task: Task, rng: torch.Generator) -> None:
    """Adam with a falling rate, the gradient's norm cut at 1; lengths grow over the first third."""
    recipe = task.recipe
    optimiser = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, recipe.steps)
    for step in range(1, recipe.steps + 1):
        longest = max(4, min(recipe.length, recipe.length * 3 * step // recipe.steps))
        inputs, target = task.draw(recipe.batch, longest, rng)
        loss = task.loss(net(inputs), target)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        schedule.step()


@torch.no_grad()
def measured(net: nn.Module, task: Task, length: int) -> float:
    """The task's measure on 1000 fresh trials."""
    inputs, target = task.draw(1000, length, torch.Generator().manual_seed(1000))
    return round(task.measure(net(inputs), target), 5)


def one(name: str, cell: str, seed: int, folder: Path) -> None:
    """Train one network and write its weights and its card."""
    task, began = TASKS[name], time.time()
    task = replace(task, recipe=PAIR_RECIPE) if cell in PAIR else task
    torch.manual_seed(seed)
    net = build((CELLS | PAIR)[cell](task.size), task, name)
    train(net, task, torch.Generator().manual_seed(seed))
    card = {
        "task": name,
        "cell": " ".join((*KINDS.get(cell, ()), type(net.cell).__name__)),
        "input_size": task.size,
        "hidden_size": net.readout.in_features,
        "n_out": task.n_out,
        "reads": "token ids through a one-hot table" if net.embedding is not None else "numbers",
        "recipe": asdict(task.recipe) | {"optimiser": "Adam, cosine to 0", "clip": 1.0, "seed": seed},
        "measure": task.what,
        "measured": {str(length): measured(net, task, length) for length in (task.recipe.length, 100, 400)},
    }
    path = folder / f"{name}_{cell}_s{seed}.safetensors"
    save_file({key: value.contiguous() for key, value in net.state_dict().items()}, path)
    path.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")
    sys.stderr.write(f"{path.stem} {card['measured']} {time.time() - began:.1f} s\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/recurrent_toys"))
    parser.add_argument("--only", nargs="*", help="names such as flip-flop_tanh_s0")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    every = [(name, cell, seed) for name in TASKS for cell in CELLS for seed in SEEDS]
    for name, cell, seed in (*every, ("parity", "signed", 0), ("parity", "nonnegative", 0)):
        if not args.only or f"{name}_{cell}_s{seed}" in args.only:
            one(name, cell, seed, args.out)


if __name__ == "__main__":
    main()
