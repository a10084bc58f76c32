"""Attribution graphs: rows by the sweep against rows by autograd on copies of the prompt, and whole graphs.

    python -m benchmarks.attribution_graphs [--shapes stories260k gemma-cut] [--tokens 16 64 256]

Writes benchmarks/results/attribution_graphs.json and the tables of docs/attribution_graphs.md. One thread; CPU time of
the process; memory is the resident set's peak above what it was before, each cell in a fresh process; what the
prompt's decoder rows take is not in it, since both need them (it is for whole graphs). Models and transcoders are
random: the cost of a row does not depend on weights. Rows are random latents of the prompt.

    sweep      rows with contraction, row sums tested; at most as many rows at once as the other has copies, for memory
    autograd   one forward pass of the copies, then backward passes with the graph kept, one row per copy and pass, and
               the same contraction: tests/oracles/attribution_rows.py, the way public engines work
    graph      attribution_graph as a user calls it, with max_features = 2048 (gemma-cut: 256)

    stories260k   5 layers, d 64, 8 heads (4 for keys and values), MLP 172; 1024 latents per layer, 16 active
    gemma-cut     Gemma-2-2B's attention: d 2304, 8 heads of 256 (4 for keys and values); 8 of its 26 layers, MLP 2304
                  of its 9216, vocabulary 512, no post-norms; 4096 latents per layer, 32 active

Copies of 1024 tokens do not fit beside the rest, so autograd ends at 256.
"""

import argparse
import ctypes
import gc
import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

from circuitkit.atomic import write_atomic
from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.dictionaries.sparse_coder import SparseCoder
from circuitkit.features.attribution import attribution_graph
from circuitkit.features.explore import Table, rows_of
from circuitkit.features.replace import local_model
from circuitkit.features.sweep import contract
from circuitkit.models.native import NativeConfig, NativeTransformer
from circuitkit.models.tl_layout import native_model
from tests.oracles.attribution_rows import LiteralRows

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "attribution_graphs.json"
PAGE = HERE.parent / "docs" / "attribution_graphs.md"
COMMON = {
    "n_ctx": 1024, "d_vocab": 512, "act_fn": "silu", "gated_mlp": True, "normalization_type": "RMS",
    "positional_embedding_type": "rotary", "rotary_adjacent_pairs": True, "n_heads": 8, "n_key_value_heads": 4,
}  # fmt: skip
SHAPES = {
    "stories260k": {
        "config": {"n_layers": 5, "d_model": 64, "d_head": 8, "rotary_dim": 8, "d_mlp": 172},
        "latents": 1024, "active": 16, "rows": 512, "copies": 64, "features": 2048,
    },
    "gemma-cut": {
        "config": {"n_layers": 8, "d_model": 2304, "d_head": 256, "rotary_dim": 256, "d_mlp": 2304},
        "latents": 4096, "active": 32, "rows": 256, "copies": 8, "features": 256,
    },
}  # fmt: skip


def random_case(shape, length):
    """A random model, a transcoder for each of its layers, and a prompt."""
    fields = COMMON | SHAPES[shape]["config"]
    generator = torch.Generator().manual_seed(0)

    def drawn(p):
        return torch.randn(p.shape, generator=generator) * (p.shape[-2] ** -0.5 if p.dim() > 1 else 0.0)

    blank = NativeTransformer(NativeConfig.from_dict(fields)).state_dict()
    weights = {k: torch.ones_like(p) if k.endswith(".w") else drawn(p) for k, p in blank.items()}
    model = native_model(fields, weights, name=f"{shape}, random")
    d, dictionaries = fields["d_model"], []
    for layer in range(fields["n_layers"]):
        coder = SparseCoder(d, SHAPES[shape]["latents"], d, activation="topk", k=SHAPES[shape]["active"])
        for p in coder.requires_grad_(False).parameters():
            p.copy_(drawn(p))
        dictionaries.append(Dictionary(coder, Site("mlp-in", layer), (Site("mlp-out", layer),)))
    return model, dictionaries, torch.randint(512, (length,), generator=generator)


def some_targets(local, count):
    table = Table.of(local, [])
    chosen = torch.zeros(len(table.numbers), dtype=torch.bool)
    chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))[:count]] = True
    return table.take(chosen)


def lay_out(local):
    """Arrange what is written by position: both engines use it, and it is not counted."""
    return [write.padded for stage in local.stages() for write in (*stage.inner, *stage.outer)]


def by_autograd(model, dictionaries, tokens, copies):
    """CPU seconds of the forward pass, and of a backward pass with its contraction."""
    local = local_model(model, dictionaries, tokens)
    table = some_targets(local, copies)
    rows = [(r.site, int(p), v) for r in table.reads for p, v in zip(r.positions, r.vectors, strict=True)]
    first, *layers = (s for s in local.stages() if s.inner and s.site.kind in ("resid-pre", "mlp-out"))
    written = {"tokens": first.inner} | {stage.site: stage.inner for stage in layers}
    lay_out(local)
    before, start = mark(), time.process_time()
    engine = LiteralRows(model, dictionaries, tokens, copies=copies)
    forward = time.process_time() - start
    out = torch.zeros(len(rows), local.n_sources)
    start = time.process_time()
    for site, gradient in engine.gradients(rows).items():
        contract(written[site], gradient, out)
    passed = time.process_time() - start
    return {"forward_s": forward, "backward_s": passed, "peak_bytes": peak() - before}


def by_sweep(model, dictionaries, tokens, count):
    local = local_model(model, dictionaries, tokens)
    table = some_targets(local, count)
    lay_out(local)
    before, start = mark(), time.process_time()
    rows_of(local, table)
    return {"rows_s": time.process_time() - start, "peak_bytes": peak() - before}


def whole_graph(model, dictionaries, tokens, most):
    local_model(model, dictionaries, tokens)  # first calls load libraries
    before, start = mark(), time.process_time()
    graph = attribution_graph(model, dictionaries, tokens, max_features=most)
    made = time.process_time() - start
    pruned = graph.prune()
    return {
        "graph_s": made, "prune_s": time.process_time() - start - made, "nodes": len(graph), "edges": graph.n_edges,
        "pruned_nodes": len(pruned), "peak_bytes": peak() - before,
    }  # fmt: skip


def mark():
    """Bytes that are resident now; the peak is counted from here. What was freed goes back to the system first."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _of_status("VmRSS")


def peak():
    return _of_status("VmHWM")


def _of_status(name):
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def cell(kind, shape, length):
    """One measurement, in this process."""
    case, sizes = random_case(shape, length), SHAPES[shape]
    calls = {
        "autograd": lambda: by_autograd(*case, sizes["copies"]),
        "sweep": lambda: by_sweep(*case, sizes["rows"]),
        "sweep memory": lambda: by_sweep(*case, sizes["copies"]),
        "graph": lambda: whole_graph(*case, sizes["features"]),
    }
    return calls[kind]()


def in_fresh_process(kind, shape, length):
    command = [sys.executable, "-m", "benchmarks.attribution_graphs", "--cell", kind, shape, str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE.parent)
    return json.loads(done.stdout.splitlines()[-1])


def measured(shape, length):
    sizes, found = SHAPES[shape], {"shape": shape, "tokens": length}
    for kind in ("autograd", "sweep", "sweep memory", "graph"):
        if kind == "autograd" and length > 256:
            continue
        found[kind] = in_fresh_process(kind, shape, length)
        sys.stderr.write(f"{shape} {length} {kind}: {found[kind]}\n")
    if "autograd" in found:
        per_row = found["sweep"]["rows_s"] / sizes["rows"], found["autograd"]["backward_s"] / sizes["copies"]
        found["times_faster"] = per_row[1] / per_row[0]
        found["times_less_memory"] = found["autograd"]["peak_bytes"] / max(1, found["sweep memory"]["peak_bytes"])
    return found


def table_of(cells):
    """Markdown."""

    def megabytes(found):
        return f"{found['peak_bytes'] / 2**20:,.0f} MiB"

    lines = [
        "| shape | tokens | autograd, ms per row | sweep, ms per row | times faster | autograd, peak | sweep, peak | "
        "times less |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in cells:
        sizes, sweep = SHAPES[c["shape"]], c["sweep"]["rows_s"] * 1000
        mine = f"{sweep / sizes['rows']:.2f}"
        if "autograd" not in c:
            lines.append(f"| {c['shape']} | {c['tokens']} | | {mine} | | | {megabytes(c['sweep memory'])} | |")
            continue
        theirs = f"{c['autograd']['backward_s'] * 1000 / sizes['copies']:.2f}"
        lines.append(
            f"| {c['shape']} | {c['tokens']} | {theirs} | {mine} | {c['times_faster']:.1f} | "
            f"{megabytes(c['autograd'])} | {megabytes(c['sweep memory'])} | {c['times_less_memory']:.0f} |"
        )
    lines += [
        "",
        "| shape | tokens | whole graph, CPU s | pruning, CPU s | nodes | edges | peak |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {c['shape']} | {c['tokens']} | {c['graph']['graph_s']:.2f} | {c['graph']['prune_s']:.2f} | "
        f"{c['graph']['nodes']:,} | {c['graph']['edges']:,} | {megabytes(c['graph'])} |"
        for c in cells
        if "graph" in c
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[16, 64, 256, 1024])
    parser.add_argument("--cell", nargs=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.cell:
        kind, shape, length = given.cell
        sys.stdout.write(json.dumps(cell(kind, shape, int(length))) + "\n")
        return
    cells = [measured(shape, length) for shape in given.shapes for length in given.tokens]
    about = {"torch": torch.__version__, "machine": platform.machine(), "python": platform.python_version()}
    write_atomic(RESULTS, json.dumps({"about": about, "cells": cells}, indent=1) + "\n")
    begin, end = "<!-- table -->\n", "<!-- end of table -->"
    if PAGE.exists():
        before, _, rest = PAGE.read_text().partition(begin)
        write_atomic(PAGE, before + begin + table_of(cells) + "\n" + end + rest.partition(end)[2])


if __name__ == "__main__":
    main()
