"""How long the ten sizes of a faithfulness curve take together, against one evaluation for each of them.

    python benchmarks/circuit_sweep.py [--shape gpt2-small|stories260k] [--device cpu|cuda] [--pairs N] [--out FILE]

``one_by_one``: for each size a corrupt run, a clean run, and a run of the whole circuit in which every reader has its
private stream, which is how evaluators of circuits go about it. ``alone``: ten calls of our own evaluator, which skips
what a circuit does not need. ``sweep``: one call for all ten. ``forward``: one recorded run of the model. Weights are
random, edges are ranked by eap-ig; the three agree on every metric, or the script stops.
"""

import argparse
import json
import platform
import sys
from pathlib import Path

import torch
import transformers
from edge_scores import SHAPES, best, random_pairs

import circuitkit as ck
from circuitkit.evaluation.curve import curve_circuits
from circuitkit.evaluation.faithfulness import circuit_metrics
from circuitkit.methods.plan import Plan
from circuitkit.models.circuits import run_circuits


def whole(model, task, mask):
    """The metric of one circuit, everything computed."""
    batch = task.batches[0].to(model.device)
    with torch.no_grad(), model.quiet():
        run, corrupt = model.record(batch.clean), model.record(batch.corrupt).writes
        task.metric(model.logits(run.inputs[-1], batch.positions), batch)
        return task.metric(run_circuits(model, run, corrupt, mask[None], batch.positions)[0], batch).cpu().double()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="stories260k", choices=sorted(SHAPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = SHAPES[args.shape]()
    model = ck.load(transformers.AutoModelForCausalLM.from_config(config).eval().to(args.device))
    task = random_pairs(model, args.pairs, args.length, config.vocab_size)
    scores = ck.score(model, task, "eap-ig", progress=False)
    masks = torch.stack([size.mask for size in curve_circuits(scores) if not size.absolute])

    def ours(chosen):
        return circuit_metrics(model, task, chosen, plan=Plan(progress=False), corrupt_value="counterfactual")[1]

    together = ours(masks)
    for one, row in zip(masks, together, strict=True):
        torch.testing.assert_close(whole(model, task, one), row, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(ours(one[None])[0], row, rtol=1e-3, atol=1e-3)
    calls = {
        "forward": lambda: model.record(task.batches[0].clean),
        "one_by_one": lambda: [whole(model, task, one) for one in masks],
        "alone": lambda: [ours(one[None]) for one in masks],
        "sweep": lambda: ours(masks),
    }
    times = best(calls, args.repeats, args.device)
    record = {
        "shape": args.shape, "device": args.device, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "machine": platform.machine(), "pairs": args.pairs, "length": args.length, "edges": model.graph.n_edges,
        "sizes": [int(mask.sum()) for mask in masks], **{f"{name}_s": seconds for name, seconds in times.items()},
        "ratio": times["one_by_one"] / times["sweep"], "ratio_alone": times["alone"] / times["sweep"],
    }  # fmt: skip
    if args.device == "cuda":
        record["gpu"] = torch.cuda.get_device_name()
    text = json.dumps(record, indent=2)
    if args.out:
        Path(args.out).write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
