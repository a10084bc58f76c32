"""Attribution graphs of recurrent networks: do their total effects come true, and what do they cost?

    python -m benchmarks.recurrent_attribution

Prints the tables of docs/recurrent_attribution_graphs.md: Spearman's correlation of predicted and measured effects of
setting a unit to zero at a step, over all units and steps, for every output and 8 inputs of the network's task; and CPU
seconds (one thread) and peak memory of networks with random weights and 16 input channels. Fresh processes for memory
are left out: the peak is that of all cases so far.
"""

import resource
import time

import torch
from torch import nn

import circuitkit as ck
from circuitkit.features.recurrent import recurrent_attribution_graph
from circuitkit.features.recurrent_effects import input_effects, measured_effects
from circuitkit.functional.agreement import spearman

NETWORKS = (
    "flip-flop_gru_s0", "flip-flop_lstm_s0", "flip-flop_tanh_s0", "integrator_gru_s0", "integrator_lstm_s0",
    "integrator_tanh_s0", "parity_gru_s0", "parity_tanh_s0",
)  # fmt: skip
SHAPES = (("GRU", 64), ("LSTM", 64), ("GRU", 256))
STEPS, MOST_NODES, WINDOW = (16, 64, 256, 1024), 16384, 32


def correlations(name):
    """Of every output and input."""
    model = ck.load(f"toys/{name}")
    found = []
    for x in ck.task(name.split("_")[0], model, n=8, seed=0).batches[0].clean:
        effects, measured = input_effects(model, x), measured_effects(model, x, "l0.h")
        for k in range(len(effects.names)):
            found.append(spearman(effects.states["l0.h"][k].flatten(), measured[k].flatten()))
    return torch.tensor(found)


def seconds(call):
    start = time.process_time()
    call()
    return time.process_time() - start


def cost(kind, units, steps):
    """CPU seconds of input effects, of the whole graph where it is small enough, and of the last steps' graph."""
    model = ck.load(getattr(nn, kind)(16, units, batch_first=True))
    x = torch.randn(steps, 16, generator=torch.Generator().manual_seed(0))
    found = [seconds(lambda: input_effects(model, x, [0]))]
    small = steps * units * (2 if kind == "LSTM" else 1) <= MOST_NODES
    found.append(seconds(lambda: recurrent_attribution_graph(model, [], x, targets=[0])) if small else None)
    options = {"window": WINDOW, "max_features": 1000}
    found.append(
        seconds(lambda: recurrent_attribution_graph(model, [], x, targets=[0], **options)) if steps >= 256 else None
    )
    return found


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| network | Spearman, mean | range |\n|---|---|---|")
    for name in NETWORKS:
        found = correlations(name)
        print(f"| {name} | {found.mean():.2f} | {found.min():.2f} to {found.max():.2f} |", flush=True)
    print(
        "\n| network | steps | input effects, s | whole graph, s | last 32 steps, s | peak, GB |\n" + "|---" * 6 + "|"
    )
    for kind, units in SHAPES:
        for steps in STEPS:
            cells = ["" if s is None else f"{s:.2f}" for s in cost(kind, units, steps)]
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            print(f"| {kind} {units} | {steps} | {' | '.join(cells)} | {peak:.1f} |", flush=True)


if __name__ == "__main__":
    main()
