"""How fast edges of recurrent networks are scored, on random networks: exact patching, eap, and eap's memory.

    python benchmarks/recurrent_speed.py [--sample 0.5] [--cells tanh gru lstm]

Writes benchmarks/results/recurrent_speed.json and the tables of docs/benchmarks.md. One thread; CPU time of the
process, which other work on the machine lengthens less than wall-clock time, and wall-clock time beside it.

    exact    edges per second of the collapsed graph, 8 pairs: chunks of edges, as `exact` makes them, are timed in
             random order until the sample's seconds are over; the rest is extrapolated
    eap      as a multiple of one forward and backward pass of the stepper without circuitkit's bookkeeping
    memory   resident set of a fresh process that scores one example of 10,000 steps, before and at its peak

Chunks of large networks are kept smaller than the method would make them, so that one takes a few seconds at most.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

import circuitkit as ck
from circuitkit.atomic import write_atomic
from circuitkit.methods.base import backward_bytes
from circuitkit.methods.plan import Plan
from circuitkit.models.recurrent import edges
from circuitkit.models.recurrent.parts import FEATURES
from circuitkit.models.recurrent.stepper import run_network

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "recurrent_speed.json"
PAGE = HERE.parent / "docs" / "benchmarks.md"
CELLS = {"tanh": (nn.RNN, 1), "gru": (nn.GRU, 3), "lstm": (nn.LSTM, 4)}
UNITS, STEPS = (32, 128, 512), (12, 100, 1000)
N_IN, N_OUT, PAIRS = 3, 3, 8
MOST_PRODUCTS = 3e9  # multiplications of one chunk
LONG = {"cell": "gru", "units": 128, "steps": 10_000, "pairs": 1}


class Net(nn.Module):
    """A recurrent layer and a linear read-out."""

    def __init__(self, cell, units):
        super().__init__()
        self.layer, self.head = CELLS[cell][0](N_IN, units, batch_first=True), nn.Linear(units, N_OUT)

    def forward(self, x):
        return self.head(self.layer(x)[0])


def random_case(cell, units, steps, pairs=PAIRS):
    """A random network and pairs that differ at every step."""
    torch.manual_seed(0)
    model = ck.load(Net(cell, units), name=f"{cell}-{units}")
    clean, corrupt = torch.randn(2, pairs, steps, N_IN)
    return model, ck.Task.from_tokens(clean, corrupt, torch.zeros(pairs).long(), torch.ones(pairs).long())


def clocked(function, times=1):
    """CPU and wall-clock seconds, the least of several calls."""
    found = []
    for _ in range(times):
        cpu, wall = time.process_time(), time.perf_counter()
        function()
        found.append((time.process_time() - cpu, time.perf_counter() - wall))
    return min(found)


def exact_speed(cell, model, task, units, steps, seconds):
    """Edges per CPU second and per second, from chunks in random order until the sample's seconds are over."""
    batch = task.batches[0]
    with torch.no_grad(), model.quiet():
        run, corrupt = model.record(batch.clean), model.record(batch.corrupt).writes
        other = dict(zip((write.name for write in model.network.writes), (w.flatten(2) for w in corrupt), strict=True))
        fits = Plan.of("auto", None, False, 0).rows(backward_bytes(model, batch) / 2, model.device)
        rows = min(fits, int(MOST_PRODUCTS / (CELLS[cell][1] * units**2 * steps)))
        chunks = list(edges.chunks(model.view, steps, max(1, rows // PAIRS)))
        order = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(0)).tolist()
        done, cpu, wall = 0, time.process_time(), time.perf_counter()
        for i in order:
            features, _ = edges.patched_features(model.view, run.values, other, chunks[i], steps)
            model.logits(features.flatten(0, 1), batch.positions.repeat(len(chunks[i].edges), 1))
            done += len(chunks[i].edges)
            if time.process_time() - cpu > seconds:
                break
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {
        "edges": model.graph.n_edges,
        "edges_timed": done,
        "edges_at_once": max(1, rows // PAIRS),
        "edges_per_cpu_s": done / cpu,
        "edges_per_s": done / wall,
        "all_edges_cpu_s": cpu * model.graph.n_edges / done,
    }


def forward_backward(model, task):
    """One forward and backward pass of the stepper: outputs, metric, gradient at the input."""
    batch = task.batches[0]
    x = model.vectors(batch.clean).requires_grad_()
    with torch.enable_grad():
        values = run_network(model.network, x)
        goal = task.metric(model.logits(values[FEATURES], batch.positions), batch).sum()
        torch.autograd.grad(goal, x)


def eap_speed(model, task, units, steps):
    times = 5 if steps <= 100 else 2 if units < 512 else 1
    pairs = [
        (
            clocked(lambda: forward_backward(model, task)),
            clocked(lambda: ck.score(model, task, "eap", progress=False)),
        )
        for _ in range(times)
    ]
    floor, mine = (min(pair[i] for pair in pairs) for i in (0, 1))
    return {
        "pass_cpu_s": floor[0],
        "eap_cpu_s": mine[0],
        "ratio_cpu": mine[0] / floor[0],
        "pass_s": floor[1],
        "eap_s": mine[1],
    }


def all_steps_cut():
    """Every edge of a small network with its time expanded: nothing is extrapolated."""
    model, task = random_case("tanh", 32, 12)
    model = model.viewed("expanded", steps=12, read_at=[11])
    cpu, wall = clocked(lambda: ck.score(model, task, "exact", progress=False), 2)
    return {"edges": model.graph.n_edges, "pairs": PAIRS, "cpu_s": cpu, "s": wall}


def peak_bytes():
    """Highest resident set so far; the kernel's own count, as ru_maxrss starts at what the parent process had."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def long_run():
    """In a process of its own: highest memory before and after scoring."""
    model, task = random_case(LONG["cell"], LONG["units"], LONG["steps"], LONG["pairs"])
    before = peak_bytes()
    cpu, wall = clocked(lambda: ck.score(model, task, "eap", progress=False))
    return {**LONG, "before_bytes": before, "peak_bytes": peak_bytes(), "cpu_s": cpu, "s": wall}


def in_a_fresh_process():
    command = [sys.executable, __file__, "--long-run"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def exact_table(found):
    rows = ["| cell, units | " + " | ".join(f"{steps:,} steps" for steps in STEPS) + " |", "|---|---|---|---|"]
    for cell in CELLS:
        for units in UNITS:
            cases = [found["cases"].get(f"{cell}/{units}/{steps}") for steps in STEPS]
            cells = ["–" if c is None else f"{_short(c['exact']['edges_per_cpu_s'])}{_mark(c)}" for c in cases]
            rows.append(f"| {cell}, {units} | {' | '.join(cells)} |")
    return rows


def _short(x):
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}"


def _mark(case):
    done = case["exact"]["edges_timed"] / case["exact"]["edges"]
    return "" if done == 1 else f" ({100 * done:.1f} %)" if done >= 0.001 else " (< 0.1 %)"


def eap_table(found):
    rows = ["| cell, units | " + " | ".join(f"{steps:,} steps" for steps in STEPS) + " |", "|---|---|---|---|"]
    for cell in CELLS:
        for units in UNITS:
            cases = [found["cases"].get(f"{cell}/{units}/{steps}") for steps in STEPS]
            rows.append(f"| {cell}, {units} | {' | '.join(map(_multiple, cases))} |")
    return rows


def _multiple(case):
    return "–" if case is None else f"{1000 * case['eap']['eap_cpu_s']:,.0f} ms, {case['eap']['ratio_cpu']:.2f} x"


def other_table(found):
    cut, long = found["all_steps_cut"], found["long_run"]
    return [
        "| | |",
        "|---|---|",
        f"| exact, all {cut['edges']:,} edges of a 32-unit tanh network with 12 steps expanded, {cut['pairs']} pairs "
        f"| {cut['cpu_s']:.2f} s CPU, {cut['s']:.2f} s |",
        f"| eap, {long['steps']:,} steps, {long['units']}-unit {long['cell'].upper()}, one example "
        f"| {long['cpu_s']:.1f} s CPU; process at its peak {long['peak_bytes'] / 1e9:.2f} GB, "
        f"{long['before_bytes'] / 1e9:.2f} GB before scoring |",
    ]


def write(found):
    """The numbers as JSON, and the tables of the page."""
    write_atomic(RESULTS, json.dumps(found, indent=1) + "\n")
    text = PAGE.read_text()
    tables = {"recurrent-exact": exact_table, "recurrent-eap": eap_table, "recurrent-other": other_table}
    for mark, table in tables.items():
        rows = "\n".join(table(found))
        place = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.S)
        assert place.search(text), f"docs/benchmarks.md has lost its mark {mark}"
        text = place.sub(lambda m, rows=rows: m[1] + rows + "\n" + m[2], text)
    write_atomic(PAGE, text)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=float, default=0.5, help="CPU seconds of exact patching per case")
    parser.add_argument("--cells", nargs="*", choices=list(CELLS), help="only these: printed, not written")
    parser.add_argument("--long-run", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.long_run:
        sys.stdout.write(json.dumps(long_run()))
        return 0
    model, task = random_case("tanh", 32, 12)
    eap_speed(model, task, 32, 12)  # first calls load libraries
    began, cases = time.process_time(), {}
    for cell in args.cells or CELLS:
        for units in UNITS:
            for steps in STEPS:
                model, task = random_case(cell, units, steps)
                cases[f"{cell}/{units}/{steps}"] = {
                    "exact": exact_speed(cell, model, task, units, steps, args.sample),
                    "eap": eap_speed(model, task, units, steps),
                }
                sys.stderr.write(f"{cell} {units} {steps} {time.process_time() - began:.0f} s\n")
    found = {
        "about": {"torch": torch.__version__, "machine": platform.machine(), "threads": 1, "pairs": PAIRS},
        "cases": cases,
        "all_steps_cut": all_steps_cut(),
        "long_run": in_a_fresh_process(),
    }
    if not args.cells:
        write(found)
    sys.stdout.write("\n".join([*exact_table(found), "", *eap_table(found), "", *other_table(found), ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
