"""Whether edge scores of recurrent networks lead to faithful circuits, with time cut and with time collapsed.

    python benchmarks/attractor_study.py [--only flip-flop_tanh_s0 ...] [--pairs 16]

Three cells x three tasks x three seeds of data/recurrent_toys; 12 steps, clean and corrupt differ at step 0 only.
Writes benchmarks/results/attractor_study.json and the tables of docs/recurrent.md. One thread.

Two ways to choose: among all edges (what `Scores.top` does), and among the edges from step to step only, where all
edges from the input and into the logits are kept. The second asks for the ranking of the recurrence alone.
"""

import argparse
import json
import platform
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

import circuitkit as ck
from circuitkit.atomic import write_atomic
from circuitkit.evaluation.faithfulness import circuit_metrics, normalised
from circuitkit.methods.plan import Plan

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "attractor_study.json"
PAGE = HERE.parent / "docs" / "recurrent.md"
TASKS, CELLS, SEEDS = ("flip-flop", "parity", "integrator"), ("tanh", "gru", "lstm"), (0, 1, 2)
STEPS = 12
VIEWS = {"expanded": {"time": "expanded", "steps": STEPS, "read_at": [STEPS - 1]}, "collapsed": {}}
METHODS = {"eap": {}, "eap-ig": {"steps": 8}, "exact": {}}
SHARES = (5, 10, 20)  # per cent of the edges


def pairs(name, model, n):
    """The task's pairs; of parity with the first bit changed, as the others differ at step 0 already."""
    task = ck.task(name, model, n=n, length=STEPS)
    if name != "parity":
        return task
    clean = torch.cat([batch.clean for batch in task.batches])
    corrupt = clean.clone()
    corrupt[:, 0] = 1 - clean[:, 0]
    return ck.Task.from_tokens(clean, corrupt, clean.sum(1) % 2, corrupt.sum(1) % 2, name=name)


def ranks(values):
    """Ranks from 1; equal values share the mean of theirs."""
    _, number, count = values.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2)[number]


def correlation(a, b):
    return float(torch.corrcoef(torch.stack((a.double(), b.double())))[0, 1])


def outside(graph):
    """Edges from the input and into the logits."""
    from_input = torch.tensor([node.kind == "input" for node in graph.source_nodes])
    to_logits = torch.tensor([node.kind == "logits" for node in graph.destination_nodes])
    return from_input, graph.mask & (from_input[:, None] | to_logits)


def cuts(scores, total):
    """Sums of scores as shares of the total effect, over the edges from the input and over those from step 5 to 6."""
    graph = scores.graph
    from_input, _ = outside(graph)
    out = {"input": float(scores.values[from_input].sum()) / total}
    rows = [i for i, node in enumerate(graph.source_nodes) if node.span == str(STEPS // 2 - 1)]
    columns = [i for i, node in enumerate(graph.destination_nodes) if node.span == str(STEPS // 2)]
    if rows:
        out["time"] = float(scores.values[rows][:, columns].sum()) / total
    return out


def recurrent_only(scores, share):
    """The strongest edges from step to step, as many as that share of them, with all edges in and out."""
    _, kept = outside(scores.graph)
    inner = scores.graph.mask & ~kept
    values = torch.where(kept, torch.inf, scores.values.abs())
    n = int(kept.sum()) + round(share / 100 * int(inner.sum()))
    return replace(scores, values=values).top(n)


def view_of(model, task, options):
    """All numbers of one view of one network."""
    model = model.viewed(**options)
    began = time.process_time()
    scores = {name: ck.score(model, task, name, progress=False, **more) for name, more in METHODS.items()}
    mask = model.graph.mask
    chosen = {}
    for name, found in scores.items():
        for share in SHARES:
            chosen[f"all {name} {share}"] = found.top(round(share / 100 * model.graph.n_edges))
            chosen[f"recurrent {name} {share}"] = recurrent_only(found, share)
    masks = torch.stack([torch.zeros_like(mask), mask, *(circuit.mask for circuit in chosen.values())])
    plan = Plan.of("auto", None, False, 0)
    clean, values = circuit_metrics(model, task, masks, plan=plan, corrupt_value="counterfactual")
    kept = [normalised(v, values[0], clean) for v in values[1:]]
    total = float(clean.mean() - values[0].mean())
    eap, exact = scores["eap"].values[mask], scores["exact"].values[mask]
    return {
        "edges": model.graph.n_edges,
        "clean": float(clean.mean()),
        "corrupt": float(values[0].mean()),
        "pearson": correlation(eap, exact),
        "spearman": correlation(ranks(eap.abs()), ranks(exact.abs())),
        "cuts": {name: cuts(found, total) for name, found in scores.items()},
        "all_edges": kept[0],
        "faithfulness": dict(zip(chosen, kept[1:], strict=True)),
        "kept_edges": {name: len(circuit) for name, circuit in chosen.items()},
        "cpu_seconds": round(time.process_time() - began, 2),
    }


def study(name, n):
    """All numbers of one network."""
    model = ck.load(f"toys/{name}")
    task = pairs(name.split("_")[0], model, n)
    return {view: view_of(model, task, options) for view, options in VIEWS.items()}


def triple(row, kind, method):
    return " / ".join(f"{row['faithfulness'][f'{kind} {method} {share}'] + 0.0:.2f}" for share in SHARES)


def table(found, kind):
    """One row per network: faithfulness at 5 / 10 / 20 % of the edges, by view and method."""
    heads = [f"{view} {method}" for view in VIEWS for method in METHODS]
    rows = [f"| network | {' | '.join(heads)} |", "|" + "---|" * (len(heads) + 1)]
    for name, views in found.items():
        cells = [triple(views[view], kind, method) for view in VIEWS for method in METHODS]
        rows.append(f"| {name} | {' | '.join(cells)} |".replace("-0.00", "0.00"))
    return rows


def numbers(found):
    """One row per network: agreement of eap with exact, and what the scores over a cut add up to."""
    rows = [
        "| network | Spearman, expanded | Pearson, expanded | Spearman, collapsed | Pearson, collapsed "
        "| time cut: eap | eap-ig | exact | input cut: eap | eap-ig |",
        "|" + "---|" * 10,
    ]
    for name, views in found.items():
        agree = [views[view][key] for view in VIEWS for key in ("spearman", "pearson")]
        shares = [views["expanded"]["cuts"][method]["time"] for method in METHODS]
        shares += [views["expanded"]["cuts"][method]["input"] for method in ("eap", "eap-ig")]
        cells = [f"{x:.3f}" for x in agree] + [f"{x:.2f}" for x in shares]
        rows.append(f"| {name} | {' | '.join(cells)} |".replace("-0.00", "0.00"))
    return rows


def write(found, about):
    """The numbers as JSON, and the tables of the page."""
    write_atomic(RESULTS, json.dumps({"about": about, "networks": found}, indent=1) + "\n")
    if not PAGE.exists():
        return
    text = PAGE.read_text()
    for mark, rows in (
        ("study", table(found, "all")),
        ("study-recurrent", table(found, "recurrent")),
        ("study-scores", numbers(found)),
    ):
        place = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.S)
        assert place.search(text), f"docs/recurrent.md has lost its mark {mark}"
        text = place.sub(lambda m, rows=rows: m[1] + "\n".join(rows) + "\n" + m[2], text)
    write_atomic(PAGE, text)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names such as flip-flop_tanh_s0: printed, not written")
    parser.add_argument("--pairs", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found, began = {}, time.process_time()
    for name in args.only or [f"{task}_{cell}_s{seed}" for task in TASKS for cell in CELLS for seed in SEEDS]:
        found[name] = study(name, args.pairs)
        sys.stderr.write(f"{name} {time.process_time() - began:.0f} s\n")
    about = {
        "pairs": args.pairs,
        "steps": STEPS,
        "methods": METHODS,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, one thread of a CPU",
        "cpu_seconds": round(time.process_time() - began, 1),
    }
    if not args.only:
        write(found, about)
    sys.stdout.write("\n".join([*table(found, "all"), "", *table(found, "recurrent"), "", *numbers(found), ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
