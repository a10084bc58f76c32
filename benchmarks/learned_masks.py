"""What learned masks find, against eap-ig: faithfulness on pairs they never saw, known circuits, and CPU time.

    python benchmarks/learned_masks.py [--out benchmarks/results/learned_masks.json] [--only METHOD ...]

Story model: scored on 64 pairs (seed 0), measured on 64 others (seed 1), at 34 of the 1,701 edges (2 %) and over MIB's
sizes, which `evaluate` counts as it does for every method. Seconds are of the process, on one thread.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

import circuitkit as ck
from circuitkit.functional.stats import auroc

METHODS = {
    "eap-ig": {},
    "edge-pruning": {},
    "ugs": {},
    "subnetwork-probing": {},
    "matryoshka": {},
}
KNOWN = (
    ("induction/trained", "induction-letters", None),
    ("tracr/hist", "tracr", "zero"),
    ("tracr/reverse", "tracr", "zero"),
)


def on_stories(method, options, seeds):
    model = ck.load("stories260k")
    task, other = (ck.task("gender-pronoun", model, n=64, seed=seed) for seed in (0, 1))
    rows = []
    for seed in seeds:
        began = time.process_time()
        scores = ck.score(model, task, method, progress=False, seed=seed, **options)
        seconds = time.process_time() - began
        result = ck.evaluate(model, other, scores.top(34), progress=False)
        close = ck.evaluate(model, other.with_metric("kl"), scores.top(34), progress=False, curve=False)
        row = {
            "seed": seed,
            "cpu_seconds": round(seconds, 1),
            "faithfulness_34": result.faithfulness,
            "interval_34": result.faithfulness_interval,
            "random_34": result.random_faithfulness,
            "kl_34": -close.circuit,
            "cpr": result.cpr,
            "cmd": result.cmd,
            "log_area": result.log_area,
            "curve": {p.fraction: p.faithfulness for p in result.curve_points if p.absolute},
        }
        if scores.selected is not None:
            own = ck.evaluate(model, other, scores.own(), progress=False, curve=False)
            row |= {"own_edges": own.n_edges, "own_faithfulness": own.faithfulness}
        rows.append(row)
        sys.stderr.write(f"{method} {json.dumps(row)}\n")
    return rows


def on_known(method, options):
    rows = {}
    for name, task_name, corrupt_value in KNOWN:
        model = ck.load(name)
        task = ck.task(task_name, model, n=40)
        extra = {"corrupt_value": corrupt_value} if corrupt_value else {}
        if method == "edge-pruning":
            extra["target"] = len(task.known)
        began = time.process_time()
        scores = ck.score(model, task, method, progress=False, **options, **extra)
        seconds = time.process_time() - began
        known, mask = model.graph.edge_mask(task.known), model.graph.mask
        top = scores.top(len(task.known)).mask
        rows[name] = {
            "edges": len(task.known),
            "found_in_as_many": int((top & known).sum()),
            "auroc": auroc(scores.values[mask].abs(), known[mask]),
            "cpu_seconds": round(seconds, 1),
        }
        if scores.selected is not None:
            own = scores.own()
            hits = int((own.mask & known).sum())
            rows[name] |= {"own_recall": hits / len(task.known), "own_precision": hits / max(len(own), 1)}
        sys.stderr.write(f"{method} {name} {json.dumps(rows[name])}\n")
    return rows


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "learned_masks.json")
    parser.add_argument("--only", nargs="*", default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    for method in args.only:
        options, seeds = METHODS[method], range(1 if method == "eap-ig" else args.seeds)
        found[method] = {"stories260k": on_stories(method, options, seeds), "known": on_known(method, options)}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
