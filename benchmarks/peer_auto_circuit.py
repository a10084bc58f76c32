"""How long auto-circuit takes for the edge scores of `edge_scores.py`: same shape, same tokens, CPU.

It runs in an environment of its own, without circuitkit (transformer-lens 2 wants an older numpy):

    python3.11 -m venv venv-peer
    venv-peer/bin/pip install torch==2.13.0 auto-circuit==1.0.1 transformer-lens==2.18.0 "transformers<5" \
        "numpy<2" "pandas<3" "pyarrow<23" "scipy<1.16" "jax<0.6" "jaxlib<0.6" "ml-dtypes<0.5.2"
    venv-peer/bin/python benchmarks/peer_auto_circuit.py [--repeats 3] [--threads N] [--out FILE.json]

Each method has a process to itself: peak memory is what its first call takes on top of the wrapped model, the time is
the best of the calls after that. auto-circuit takes integrated gradients along its edge masks (all edges at once), at
steps + 1 points with both ends included, and adds the gradients up instead of averaging them.
"""

import argparse
import gc
import json
import multiprocessing
import platform
import sys
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

METHODS = {"eap": {"mask_val": 0.0}, "eap-ig": {"integrated_grad_samples": 5}}
SHAPE = {"n_layers": 12, "n_heads": 12, "d_model": 768, "d_head": 64, "d_mlp": 3072, "n_ctx": 1024, "d_vocab": 50257}
PACKAGES = ("auto-circuit", "transformer-lens", "transformers", "torch", "numpy")


def patchable():
    """A random model with what auto-circuit asks of its config and its parameters frozen, wrapped for edge patching."""
    from auto_circuit.utils.graph_utils import patchable_model
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        **SHAPE, act_fn="gelu_new", normalization_type="LN", device="cpu", seed=0,
        use_attn_result=True, use_attn_in=True, use_split_qkv_input=True, use_hook_mlp_in=True,
    )  # fmt: skip
    model = HookedTransformer(config).eval().requires_grad_(False)
    return patchable_model(model, factorized=True, slice_output="last_seq", separate_qkv=True)


def random_pairs(n, length):
    """The pairs that edge_scores.py draws, as one batch."""
    from auto_circuit.data import PromptDataLoader, PromptDataset

    vocab = SHAPE["d_vocab"]
    generator = torch.Generator().manual_seed(0)
    clean, corrupt = torch.randint(vocab, (2, n, length), generator=generator)
    right, wrong = torch.randint(vocab // 2, (2, n, 1), generator=generator)
    pairs = PromptDataset(clean, corrupt, list(right), list(wrong + vocab // 2))
    return PromptDataLoader(pairs, seq_len=length, diverge_idx=0, batch_size=n)


def status_bytes(field):
    """A field of this process's status, such as VmRSS (resident now) or VmHWM (at its highest since the last reset)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def measure(name, pairs, length, repeats, threads):
    from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores

    torch.set_num_threads(threads)
    model, loader = patchable(), random_pairs(pairs, length)
    options = {"grad_function": "logit", "answer_function": "avg_diff"} | METHODS[name]
    call = partial(mask_gradient_prune_scores, model, loader, None, **options)
    gc.collect()
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    call()
    peak = status_bytes("VmHWM") - before
    times = []
    for _ in range(repeats):
        gc.collect()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return {"seconds": min(times), "all_seconds": times, "peak_extra_bytes": peak, "edges": model.n_edges}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out")
    args = parser.parse_args()
    record = {}
    for name in args.methods:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            record[name] = pool.apply(measure, (name, args.pairs, args.length, args.repeats, args.threads))
    edges = {name: result.pop("edges") for name, result in record.items()}
    record |= {
        "versions": {name: version(name) for name in PACKAGES}, "threads": args.threads, "machine": platform.machine(),
        "shape": {**SHAPE, "pairs": args.pairs, "length": args.length, "edges": edges[args.methods[0]]},
    }  # fmt: skip
    text = json.dumps(record, indent=2)
    if args.out:
        Path(args.out).write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
