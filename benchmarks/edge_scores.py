"""How long edge scores take against the hardware's floor, on a random model of GPT-2 small's shape.

    python benchmarks/edge_scores.py [--shape gpt2-small|llama-1b|stories260k] [--device cpu|cuda] [--out FILE.json]

Floor F: one forward pass without unembedding, plus one forward and backward pass to activations only, of the bare
Hugging Face module on the same tokens. Each figure is the best of several runs in one process; peak memory is what
the process takes on top of the loaded model.
"""

import argparse
import gc
import json
import platform
import sys
import time
from pathlib import Path

import torch
import transformers

import circuitkit as ck
from circuitkit.methods.base import backward_bytes
from circuitkit.methods.plan import Plan
from circuitkit.models.edits import patch_edges
from circuitkit.models.hooks import hooked, quiet

SHAPES = {
    "gpt2-small": lambda: transformers.GPT2Config(),
    "llama-1b": lambda: transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=2048,
    ),
    "stories260k": lambda: transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=512,
    ),
}


def random_pairs(model, n, length, vocab):
    generator = torch.Generator().manual_seed(0)
    clean, corrupt = torch.randint(vocab, (2, n, length), generator=generator)
    right, wrong = torch.randint(vocab // 2, (2, n), generator=generator)
    return ck.Task.from_tokens(clean, corrupt, right, wrong + vocab // 2, vocab=model)


def best(functions, repeats, device):
    """Shortest time of each function, measured in turns so that a slow minute of the machine hits all alike."""
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            gc.collect()
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: min(seconds) for name, seconds in times.items()}


def floor(module, tokens, metric):
    """Seconds of: forward without unembedding; forward and backward from the metric to the embeddings."""
    body, head = module.base_model, module.get_output_embeddings()

    def forward():
        with torch.no_grad():
            body(tokens, use_cache=False)

    def both():
        x = body.get_input_embeddings()(tokens).detach().requires_grad_()
        last = body(inputs_embeds=x, use_cache=False).last_hidden_state[:, -1]
        torch.autograd.grad(metric(head(last)), x)

    return forward, both


def peak_extra(function, device):
    """Bytes that a call takes at its peak on top of what is allocated before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    before = resident()
    reset_peak()
    function()
    return resident("VmHWM") - before


def resident(field="VmRSS"):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def reset_peak():
    Path("/proc/self/clear_refs").write_text("5")


def literal_edges_per_second(model, task, count, *, passes):
    """One edge at a time: a whole hooked forward pass per edge; with two passes the corrupt run is repeated, too."""
    batch = task.batches[0].to(model.device)
    run = model.record(batch.clean)
    delta = model.wiring.expand_difference(run.writes, model.record(batch.corrupt).writes)
    edges = spread(model, count)
    start = time.perf_counter()
    with torch.no_grad(), quiet(model.module):
        for site, edge in edges:
            seen = {}
            u, v = edge
            if passes == 2:
                model.module(batch.corrupt, use_cache=False)
            head = v - site.first

            def edit(y, site=site, u=u, head=head, seen=seen):
                out = y.clone().reshape(*y.shape[:2], site.n, -1)
                private = seen["x"] - delta[u]
                out[:, :, head] = site.read(private[None], slice(head, head + 1))[0]
                return out.reshape(y.shape)

            def keep(x, seen=seen):
                seen["x"] = x

            hooks = [(site.stream, keep)]
            hooks.append((site.port, edit if site.block < len(model.wiring.blocks) else lambda x, u=u: x - delta[u]))
            with hooked(hooks):
                logits = model.module(batch.clean, use_cache=False)
            task.metric(logits[torch.arange(len(batch))[:, None], batch.positions], batch)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return len(edges) / (time.perf_counter() - start)


def batched_edges_per_second(model, task, count):
    """The same edges through `patch_edges`."""
    batch = task.batches[0].to(model.device)
    by_site = {}
    for site, edge in spread(model, count):
        by_site.setdefault(site, []).append(edge)
    start = time.perf_counter()
    run = model.record(batch.clean)
    delta = model.wiring.expand_difference(run.writes, model.record(batch.corrupt).writes)
    rows = max(1, Plan().rows(backward_bytes(model, batch) / 2, model.device) // len(batch))
    with torch.no_grad(), quiet(model.module):
        for site, edges in by_site.items():
            edges.sort(key=lambda e: e[1])
            for i in range(0, len(edges), rows):
                logits, _ = patch_edges(model, run, delta, site, edges[i : i + rows], batch.positions)
                many = batch.rows(torch.arange(len(batch), device=model.device).repeat(len(logits)))
                task.metric(logits.flatten(0, 1), many)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return count / (time.perf_counter() - start)


def spread(model, count):
    """Evenly spaced edges of the whole graph, with their sites."""
    edges = model.graph.mask.T.nonzero()
    picked = edges[torch.linspace(0, len(edges) - 1, count).long()].tolist()
    site_of = {column: site for site in model.wiring.read_sites for column in range(site.first, site.first + site.n)}
    return [(site_of[v], (u, v)) for v, u in picked]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="gpt2-small", choices=sorted(SHAPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--edges", type=int, default=300)
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = SHAPES[args.shape]()
    module = transformers.AutoModelForCausalLM.from_config(config).eval().to(args.device)
    module.requires_grad_(False)
    model = ck.load(module)
    task = random_pairs(model, args.pairs, args.length, config.vocab_size)
    batch = task.batches[0].to(args.device)
    forward, both = floor(module, batch.clean, lambda logits: task.metric(logits[:, None], batch).sum())
    record = {
        "shape": args.shape, "device": args.device, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "machine": platform.machine(), "pairs": args.pairs, "length": args.length, "edges": model.graph.n_edges,
        "parameters": sum(p.numel() for p in module.parameters()),
    }  # fmt: skip
    if args.device == "cuda":
        record["gpu"] = torch.cuda.get_device_name()
    # Memory first: afterwards the allocator holds pages that a later peak would not show.
    peaks = {
        name: peak_extra(
            lambda name=name, options=options: ck.score(model, task, name, progress=False, **options), args.device
        )
        for name, options in (("eap", {}), ("eap-ig", {"steps": 5}))
    }
    calls = {
        "forward": forward,
        "both": both,
        "eap": lambda: ck.score(model, task, "eap", progress=False),
        "eap-ig": lambda: ck.score(model, task, "eap-ig", steps=5, progress=False),
    }
    times = best(calls, args.repeats, args.device)
    f, fb = times["forward"], times["both"]
    record |= {"forward_s": f, "forward_backward_s": fb, "floor_s": f + fb}
    for name, unit in (("eap", f + fb), ("eap-ig", f + 5 * fb)):
        record[name] = {
            "seconds": times[name],
            "floor_s": unit,
            "ratio": times[name] / unit,
            "peak_extra_bytes": peaks[name],
        }
    for factor in (2, 4):
        larger = random_pairs(model, factor * args.pairs, args.length, config.vocab_size)
        call = {"eap": lambda larger=larger: ck.score(model, larger, "eap", progress=False)}
        seconds = best(call, max(1, args.repeats // 2), args.device)["eap"]
        record["eap"][f"seconds_per_pair_x{factor}"] = seconds / (factor * args.pairs)
    record["eap"]["seconds_per_pair_x1"] = record["eap"]["seconds"] / args.pairs
    if args.edges:
        few = max(4, args.edges // 10)
        one, two = (literal_edges_per_second(model, task, few, passes=n) for n in (1, 2))
        record["exact"] = {
            "one_pass_edges_per_s": one,
            "two_passes_edges_per_s": two,
            "edges_per_s": batched_edges_per_second(model, task, args.edges),
        }
    text = json.dumps(record, indent=2)
    if args.out:
        Path(args.out).write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
