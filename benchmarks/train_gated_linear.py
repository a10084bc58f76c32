"""Train a gated linear recurrent network to imitate linear attention, and keep what it learned.

python benchmarks/train_gated_linear.py --seed 0
    writes data/gated_linear_student/{student,teacher}.safetensors and student.json
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from circuitkit.analysis.trilinear import fit_trilinear, trilinear_of_attention, with_constant
from circuitkit.models.recurrent.cells.gated_linear import GatedLinear
from circuitkit.models.recurrent.cells.linear_attention import LinearAttention

HOME = Path(__file__).parent.parent / "data" / "gated_linear_student"
D, STEPS, UNITS, GATES, STD = 4, 20, 80, 64, 0.5


def make_teacher(generator):
    """Linear attention with normal weights."""
    teacher = LinearAttention(D, D, D)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.copy_(STD * torch.randn(weight.shape, generator=generator))
    return teacher.requires_grad_(False)


def outputs_of(student, x):
    """The student's outputs, with the products over the input taken for all steps at once."""
    entered = (x @ student.A.T) * (x @ student.B.T)
    h, states = torch.zeros_like(entered[:, 0]), []
    for u in entered.unbind(1):
        h = student.lam * h + u
        states.append(h)
    h = torch.stack(states, 1)
    return ((h @ student.C1.T) * (h @ student.C2.T)) @ student.D.T


def train(seed, n_updates=4000, rate=4e-3, batch=64):
    """Student and teacher, and the normalised loss every 500 updates."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    teacher, student = make_teacher(generator), GatedLinear(D + 1, UNITS, GATES, D)
    optimiser = torch.optim.AdamW(student.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, n_updates)
    log = []
    for update in range(1, n_updates + 1):
        x = torch.randn(batch, STEPS, D, generator=generator)
        y = attend(teacher, x)
        loss = (outputs_of(student, with_constant(x)) - y).square().mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            student.lam.clamp_(0, 1)
        if update % 500 == 0:
            log.append({"update": update, "nmse": float(loss.detach() / y.var())})
    return student, teacher, log


def attend(teacher, x):
    """The teacher's outputs for all steps at once."""
    return ((x @ teacher.W_q.T) @ (x @ teacher.W_k.T).mT).tril() @ (x @ teacher.W_v.T)


def measure(student, teacher, seed=10_000, n=1000, steps=STEPS):
    """How well the student imitates the teacher, as a function and by its trilinear coefficients."""
    x = torch.randn(n, steps, D, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        want, got = attend(teacher, x), outputs_of(student, with_constant(x))
    fitted = fit_trilinear(x, got)
    truth = trilinear_of_attention(teacher.W_q, teacher.W_k, teacher.W_v)
    return {
        "nmse": float((got - want).square().mean() / want.var()),
        "trilinear_r2": fitted.r2,
        "coefficient_cosine": fitted.cosine(truth),
        "coefficient_relative_error": fitted.relative_error(truth),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=HOME)
    options = parser.parse_args()
    torch.set_num_threads(1)
    student, teacher, log = train(options.seed, options.updates)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, module in (("student", student), ("teacher", teacher)):
        save_file(
            {key: value.detach().contiguous() for key, value in module.state_dict().items()},
            options.out / f"{name}.safetensors",
        )
    about = {
        "made_by": "python benchmarks/train_gated_linear.py --seed " + str(options.seed),
        "licence": "MIT, trained for circuitkit",
        "torch": torch.__version__,
        "student": {"input_size": D + 1, "hidden_size": UNITS, "gate_size": GATES, "output_size": D},
        "teacher": {"input_size": D, "key_size": D, "value_size": D},
        "steps": STEPS,
        "training": log,
        "measured": measure(student, teacher),
        "measured_at_100_steps": {"nmse": measure(student, teacher, steps=100)["nmse"]},
    }
    (options.out / "student.json").write_text(json.dumps(about, indent=1) + "\n")
    print(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
