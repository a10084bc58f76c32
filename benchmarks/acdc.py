"""How long ACDC takes against ACDC with one whole forward pass per edge, on random models.

    python benchmarks/acdc.py [--shape 4-layer|gpt2-small] [--device cpu|cuda] [--out FILE.json]

The literal search runs, for every edge that it tests, the corrupt inputs and then the circuit through all blocks, as
programs do that start from nothing each time; it gets its circuits from the same vectorised code, so nothing but the
search itself is compared. Both must keep the same edges. With `--edges` below the number that is tested, as is needed
for GPT-2 small, the literal time is extrapolated, and the record says so. `--tau` is a share of the KL divergence that
corrupting everything causes.
"""

import argparse
import json
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers

import circuitkit as ck
from circuitkit.methods.base import fidelity
from circuitkit.models.circuits import run_circuits

SHAPES = {
    "4-layer": {"n_layer": 4, "n_head": 4, "n_embd": 64, "vocab_size": 1000, "n_positions": 64},
    "gpt2-small": {},
}
SPREAD = 0.05  # wider weights than at initialisation, so that edges matter


def random_model(shape, device):
    torch.manual_seed(0)
    config = transformers.GPT2Config(**SHAPES[shape], bos_token_id=0, eos_token_id=0)
    module = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter += SPREAD * torch.randn_like(parameter) if shape == "4-layer" else 0.0
    return ck.load(module.to(device)), config.vocab_size


def random_pairs(model, n, length, vocab):
    generator = torch.Generator().manual_seed(0)
    clean, corrupt = torch.randint(vocab, (2, n, length), generator=generator)
    return ck.Task.from_tokens(clean, corrupt, clean[:, 0], vocab=model, metric="kl")


def sync(device):
    if device == "cuda":
        torch.cuda.synchronize()


def literal_acdc(model, task, tau, most, device):
    """Kept edges, tests and seconds, one edge at a time from the logits down; stops after ``most`` tests."""
    task, graph = fidelity(task, None), model.graph
    batch = task.batches[0].to(device)
    with torch.no_grad(), model.quiet():
        run = model.record(batch.clean)
        batch = replace(batch, reference=model.logits(run.inputs[-1], batch.positions))

        def metric(keep):
            corrupt = model.record(batch.corrupt).writes
            logits = run_circuits(model, run, corrupt, keep[None], batch.positions)[0]
            return float(task.metric(logits, batch).double().mean())

        keep, alive = graph.mask.clone(), set(graph.sinks.nonzero().flatten().tolist())
        sync(device)
        start, tests, now = time.perf_counter(), 0, metric(keep)
        for v in reversed(range(len(graph.destinations))):
            fed = graph.feeds[v].nonzero().flatten().tolist()
            if v not in alive and not any(keep[u, sorted(alive)].any() for u in fed):
                keep[:, v] = False
                continue
            alive.add(v)
            for u in reversed(graph.mask[:, v].nonzero().flatten().tolist()):
                keep[u, v] = False
                less = metric(keep)
                tests += 1
                if now - less < tau:
                    now = less
                else:
                    keep[u, v] = True
                if tests == most:
                    return None, tests, time.perf_counter() - start
    return keep, tests, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="4-layer", choices=sorted(SHAPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--length", type=int, default=12)
    parser.add_argument("--tau", type=float, default=0.03)
    parser.add_argument("--edges", type=int, default=100_000, help="most tests of the literal search")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out")
    args = parser.parse_args()
    model, vocab = random_model(args.shape, args.device)
    task = random_pairs(model, args.pairs, args.length, vocab)
    nothing = ck.evaluate(model, task, ck.Circuit.from_edges(model.graph, []), curve=False, progress=False)
    tau = args.tau * abs(nothing.corrupt)
    times, literal = [], []
    for _ in range(args.repeats):
        start = time.perf_counter()
        scores = ck.score(model, task, "acdc", tau=tau, progress=False)
        times.append(time.perf_counter() - start)
        keep, tests, seconds = literal_acdc(model, task, tau, args.edges, args.device)
        literal.append(seconds / tests)
    groups = ck.score(model, task, "group-testing", tau=tau, progress=False)
    counts = scores.provenance
    whole = min(literal) * counts["evaluations"]
    record = {
        "shape": args.shape, "device": args.device, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "machine": platform.machine(), "pairs": args.pairs, "length": args.length, "edges": model.graph.n_edges,
        "kl_of_corrupting_everything": -nothing.corrupt, "tau": tau, "kept": int(scores.selected.sum()),
        "tests": counts["evaluations"], "circuits_run": counts["circuits_run"], "seconds": min(times),
        "literal_tests": tests, "literal_seconds_per_test": min(literal), "literal_seconds": whole,
        "literal_extrapolated": keep is None,
        "same_edges": None if keep is None else bool((keep == scores.selected).all()),
        "times_faster": whole / min(times),
        "group_testing": {
            "kept": int(groups.selected.sum()), "tests": groups.provenance["evaluations"],
            "seconds": groups.provenance["seconds"],
        },
    }  # fmt: skip
    if args.device == "cuda":
        record["gpu"] = torch.cuda.get_device_name()
    text = json.dumps(record, indent=2)
    if args.out:
        Path(args.out).write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
