"""How far attribution graphs of stories260k come true, and what their circuits keep, before and after a refit.

    python -m benchmarks.feature_verification [--dictionaries stories260k/transcoders]

Gender-pronoun prompts, half of them to learn from and half to measure on. ``--dictionaries`` is a name or a folder of
`circuitkit.dictionaries.formats.load_dictionaries`; ``--quick FOLDER`` trains small transcoders (a few minutes) into a
folder and uses these. Prints the tables of docs/verifying_feature_graphs.md.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

import circuitkit as ck
from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.dictionaries.formats import load_dictionaries, save_dictionary
from circuitkit.dictionaries.recipe import Recipe
from circuitkit.dictionaries.train import train_on
from circuitkit.evaluation.feature_faithfulness import circuit_faithfulness
from circuitkit.evaluation.feature_graphs import Verification, verify
from circuitkit.evaluation.feature_refit import refit
from circuitkit.evaluation.feature_shares import FeatureFaithfulness
from circuitkit.features.attribution import attribution_graph
from circuitkit.models.hooked import Model

PARTS = {"edges": "largest edges, direct", "random_edges": "random edges, direct",
         "paths": "largest edges, all paths", "nodes": "nodes, all paths to the logit"}  # fmt: skip
MODES = ("constrained", "frozen", "free")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dictionaries", default="stories260k/transcoders")
    parser.add_argument("--quick", metavar="FOLDER", help="train small transcoders into this folder")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--sizes", type=int, nargs="*", default=[75, 150], help="of refitted circuits")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = ck.load("stories260k")
    if options.quick:
        quick_transcoders(model, options.quick)
    dictionaries = load_dictionaries(options.quick or options.dictionaries)
    prompts, pairs = pronoun_prompts(model, options.prompts)
    graphs = [attribution_graph(model, dictionaries, p, targets=[r]) for p, (r, _) in zip(prompts, pairs, strict=True)]
    half = len(graphs) // 2
    edges([verify(model, dictionaries, graph) for graph in graphs[:half]])
    print("\n| pruned to | errors | latents | faithfulness | completeness | random circuits | verdict |")
    print("|---|---|---|---|---|---|---|")
    for share in (0.6, 0.8, 0.95):
        small = [graph.prune(share) for graph in graphs[:half]]
        for errors in ("kept", "graph"):
            found = circuit_faithfulness(model, dictionaries, small, targets=pairs[:half], errors=errors)
            print(f"| {share:.0%} | {errors} | {row(found)}")
    print("\n| latents of each prompt's circuit | | active | faithfulness | completeness | random | verdict |")
    print("|---|---|---|---|---|---|---|")
    for size in options.sizes:
        judge = (graphs[half:], pairs[half:])
        fitted = refit(model, dictionaries, graphs[:half], size, targets=pairs[:half], judge=judge)
        for name, found in (("most influence", fitted.before), ("refitted", fitted.after)):
            print(f"| {size} | {name} | {row(found)}", flush=True)


def edges(found: list[Verification]) -> None:
    """The table of predictions, means over prompts."""
    n, tokens = len(found), [one.n_tokens for one in found]
    mean = [sum(getattr(one, name) for one in found) / n for name in ("replacement_score", "completeness_score")]
    print(
        f"{n} prompts of {min(tokens)} to {max(tokens)} tokens, replacement {mean[0]:.2f}, completeness {mean[1]:.2f}\n"
    )
    print(f"| Spearman / R2, mean over prompts | {' | '.join(MODES)} |\n|---|---|---|---|")
    for name, label in PARTS.items():
        parts = [getattr(one, name) for one in found]
        cells = []
        for mode in MODES:
            known = [(p.spearman(mode), p.r_squared(mode)) for p in parts if mode in p.measured]
            cells.append(" / ".join(f"{sum(x) / len(x):.2f}" for x in zip(*known, strict=True)))
        print(f"| {label} | {' | '.join(cells)} |", flush=True)


def row(found: FeatureFaithfulness) -> str:
    """Cells of one circuit."""
    shares = []
    for value, interval in (
        (found.faithfulness, found.faithfulness_interval), (found.completeness, found.completeness_interval),
    ):  # fmt: skip
        between = "" if interval is None else f" ({interval[0]:.2f} to {interval[1]:.2f})"
        shares.append(f"{value:.2f}{between}")
    random = found.random_faithfulness
    latents = f"{sum(found.n_latents) / len(found.clean):.0f} of {sum(found.n_active) / len(found.clean):.0f}"
    verdict = found.verdict.partition(":")[0]
    return f"{latents} | {' | '.join(shares)} | {min(random):.2f} to {max(random):.2f} | {verdict} |"


def pronoun_prompts(model: Model, n: int) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """Clean prompts up to the answer, in random order, and their right and wrong tokens."""
    task, found = ck.task("gender-pronoun", model, n=n, seed=0), []
    for batch in task.batches:
        for i in range(len(batch)):
            tokens = batch.clean[i, : int(batch.positions[i, 0]) + 1]
            found.append((tokens, (int(batch.right[i].flatten()[0]), int(batch.wrong[i].flatten()[0]))))
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    return [found[i][0] for i in order], [found[i][1] for i in order]


def quick_transcoders(model: Model, folder: str) -> None:
    """Transcoders of 256 latents, 32 active, trained for 400 steps on 96 stories of 64 tokens that the model writes."""
    generator, tokens = torch.Generator().manual_seed(0), torch.ones(96, 1, dtype=torch.long)
    with torch.no_grad():
        for _ in range(63):
            out = model.module(tokens)
            logits = (out if isinstance(out, Tensor) else out.logits)[:, -1]
            tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1, generator=generator)], 1)
    for layer in range(len(model.wiring.blocks)):
        recipe, sites = Recipe(256, "topk", k=32, steps=400), (Site("mlp-in", layer), Site("mlp-out", layer))
        trained: Dictionary = train_on(model, recipe, tokens, *sites, progress=False).dictionary
        save_dictionary(trained, f"{folder}/{layer}")


if __name__ == "__main__":
    main()
