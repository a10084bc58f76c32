"""Trains the dictionaries under data/dictionaries, on one thread, from texts that the models write themselves.

    python benchmarks/train_dictionaries.py [--out data/dictionaries] [--only stories260k/transcoders ...]
    python benchmarks/train_dictionaries.py --table        the numbers of the cards that are there, as Markdown

stories260k: 2816 stories of 192 tokens are trained on, 64 others measured on, all from the model's own distribution
(temperature 1) behind the beginning-of-text token. modadd: all pairs of addends, both for training and for measuring.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import circuitkit as ck
from circuitkit.dictionaries.base import Dictionary, Site
from circuitkit.dictionaries.formats import load_dictionaries, save_dictionary
from circuitkit.dictionaries.measures import measure
from circuitkit.dictionaries.recipe import Recipe
from circuitkit.dictionaries.sites import activations_at
from circuitkit.dictionaries.stand_in import recovered_together
from circuitkit.dictionaries.train import train
from circuitkit.models.hooked import Model
from circuitkit.models.sampling import sample

STORIES, LENGTH, AT_ONCE = 2816, 192, 256
HELD_OUT, HELD_OUT_SEED = 64, 1000
PAIRS = 256
Scores = dict[str, Callable[[], float]]


@dataclass(frozen=True)
class Set:
    """What is trained of one model: dictionaries of all layers, or of some."""

    model: str
    read: str
    write: str
    recipe: Recipe
    batch_size: int = 256
    together: bool = False  # one cross-layer transcoder
    layers: tuple[int, ...] = ()
    harder: tuple[int, Recipe] | None = None  # a layer that takes more

    def recipe_of(self, layer: int) -> Recipe:
        """The recipe of one layer."""
        return self.harder[1] if self.harder is not None and self.harder[0] == layer else self.recipe


CLOCK = "modadd/modelB_clock_standard_attention"
STORY = "stories260k"
SETS = {
    f"{STORY}/attn-saes": Set(STORY, "attn-out", "attn-out", Recipe(256, "topk", k=32, lr=1e-2, steps=3000)),
    # Where the pronoun is decided, the last MLP does little, and an error of its size undoes it.
    f"{STORY}/transcoders": Set(
        STORY,
        "mlp-in",
        "mlp-out",
        Recipe(1024, "topk", k=48, lr=1e-2, steps=5000),
        harder=(4, Recipe(1024, "topk", k=64, lr=1e-2, steps=20000)),
    ),
    # The two layers whose MLPs matter most to gender-pronoun.
    f"{STORY}/skip-transcoders": Set(
        STORY, "mlp-in", "mlp-out", Recipe(768, "topk", k=48, skip=True, lr=1.5e-2, steps=4000), layers=(1, 2)
    ),
    f"{STORY}/clt": Set(STORY, "mlp-in", "mlp-out", Recipe(512, "topk", k=48, lr=1.5e-2, steps=4000), together=True),
    f"{CLOCK}/attn-saes": Set(CLOCK, "attn-out", "attn-out", Recipe(256, "topk", k=16, lr=1e-2, steps=2000)),
    f"{CLOCK}/transcoders": Set(CLOCK, "mlp-in", "mlp-out", Recipe(256, "topk", k=32, lr=1e-2, steps=2000)),
}


@dataclass(frozen=True)
class Text:
    """What a model is trained and measured on."""

    train: Tensor
    held_out: Tensor
    about: dict[str, object]
    scores: Scores


def stories(model: Model) -> Text:
    """Stories of the model's own, and how well it tells them."""
    begin = torch.full((AT_ONCE, 1), model.tokenizer.bos_token_id)
    train = torch.cat([sample(model, begin, LENGTH - 1, seed=seed) for seed in range(STORIES // AT_ONCE)])
    held_out = sample(model, begin[:HELD_OUT], LENGTH - 1, seed=HELD_OUT_SEED)
    about = {
        "text": f"{STORIES} stories of {LENGTH} tokens that the model wrote itself, temperature 1, seeds 0 to "
        f"{STORIES // AT_ONCE - 1}",
        "measured_on": f"{HELD_OUT} other stories of {LENGTH} tokens, seed {HELD_OUT_SEED}; gender-pronoun with n = "
        f"{PAIRS}, seed 0",
        "licence": "MIT, trained for circuitkit on stories260K (Andrej Karpathy, MIT; see data/stories260k/README.md)",
    }
    return Text(train, held_out, about, {
        "cross-entropy": lambda: next_token(model, held_out),
        "gender-pronoun": of_task(model, "gender-pronoun", PAIRS),
        "lead": lead(model, held_out),
    })  # fmt: skip


def pairs(model: Model) -> Text:
    """All pairs of addends."""
    every = torch.cartesian_prod(torch.arange(model.d_vocab), torch.arange(model.d_vocab))
    about = {
        "text": f"all {len(every)} pairs of addends",
        "measured_on": "the same pairs; modular-addition with all pairs, seed 0",
        "licence": "MIT, trained for circuitkit on model B of Zhong et al. 2023 (MIT; see "
        "data/modadd_clock_pizza/README.md)",
    }
    answers = every.sum(1) % model.d_vocab

    def cross_entropy() -> float:
        return float(torch.nn.functional.cross_entropy(model.module(every)[:, -1], answers))

    return Text(every, every, about, {
        "cross-entropy": cross_entropy,
        "modular-addition": of_task(model, "modular-addition", len(every)),
    })  # fmt: skip


def next_token(model: Model, tokens: Tensor) -> float:
    """Cross-entropy of the next token, in nats."""
    logits = model.module(tokens)[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


def of_task(model: Model, name: str, n: int) -> Callable[[], float]:
    """A task's logit difference on its clean prompts."""
    task = ck.task(name, model, n=n, seed=0)
    (batch,) = task.batches

    def score() -> float:
        logits = model.module(batch.clean)
        at = batch.positions[..., None].expand(-1, -1, logits.shape[-1])
        return float(task.metric(logits.gather(1, at), batch).mean())

    return score


def lead(model: Model, tokens: Tensor) -> Callable[[], float]:
    """Logit of what the untouched model holds likeliest minus that of its second, at every position."""
    with torch.no_grad(), model.quiet():
        two = model.module(tokens).topk(2).indices

    def score() -> float:
        best, second = model.module(tokens).gather(2, two).unbind(-1)
        return float((best - second).mean())

    return score


@dataclass(frozen=True, eq=False)
class Pairs:
    """Inputs and targets as shuffled batches, in one order however often they are gone through."""

    x: Tensor
    y: Tensor
    batch_size: int
    seed: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        for rows in torch.randperm(len(self.x), generator=generator).split(self.batch_size):
            if len(rows) == self.batch_size:
                yield self.x[rows], self.y[rows]


def recorded(model: Model, tokens: Tensor, kinds: Sequence[str]) -> dict[Site, Tensor]:
    """All layers' activations ``[row, d]``. They are kept, because several dictionaries read the same ones."""
    sites = [Site(kind, i) for kind in dict.fromkeys(kinds) for i in range(len(model.wiring.blocks))]
    parts = [activations_at(model, sites, batch) for batch in tokens.split(AT_ONCE // 8)]
    return {site: torch.cat([part[i].flatten(0, 1) for part in parts]) for i, site in enumerate(sites)}


def trained(model: Model, one: Set, acts: dict[Site, Tensor]) -> tuple[Dictionary, ...]:
    """The dictionaries of a set, by layer."""
    layers = one.layers or range(len(model.wiring.blocks))
    reads, writes = ([Site(kind, i) for i in layers] for kind in (one.read, one.write))
    if one.together:
        x, y = (torch.stack([acts[site] for site in sites], 1) for sites in (reads, writes))
        coders = train(one.recipe, Pairs(x, y, one.batch_size, one.recipe.seed), progress=False).coders
        return tuple(Dictionary(coder, reads[i], tuple(writes[i:])) for i, coder in enumerate(coders))
    return tuple(
        Dictionary(
            train(recipe, Pairs(acts[read], acts[write], one.batch_size, recipe.seed), progress=False).coder,
            read,
            (write,),
        )
        for read, write, recipe in zip(reads, writes, map(one.recipe_of, layers), strict=True)
    )


def measured(model: Model, dictionaries: Sequence[Dictionary], text: Text) -> list[dict[str, object]]:
    """Each dictionary's numbers; what is recovered with it alone in its place."""
    acts = recorded(model, text.held_out, [site.kind for d in dictionaries for site in (d.read, *d.writes)])
    rows = []
    for d in dictionaries:
        parts = at_site(dictionaries, d.writes[0])
        quality = measured_at_site(d, parts, acts) | {"recovered": shares(model, parts, text)}
        rows.append({name: rounded(value) for name, value in quality.items()})
    return rows


def at_site(layers: Sequence[Dictionary], site: Site) -> tuple[Dictionary, ...]:
    """What the dictionaries of a set write at one site, each as a dictionary of that site alone; by layer."""
    parts = []
    for d in (one for one in layers if site in one.writes):
        coder, i = copy.deepcopy(d.coder), d.writes.index(site)
        coder.W_dec, coder.b_dec, coder.n_out = (
            nn.Parameter(d.coder.W_dec[i : i + 1], requires_grad=False),
            nn.Parameter(d.coder.b_dec[i : i + 1], requires_grad=False),
            1,
        )
        parts.append(replace(d, coder=coder, writes=(site,)))
    return tuple(parts)


def measured_at_site(d: Dictionary, parts: Sequence[Dictionary], acts: dict[Site, Tensor]) -> dict[str, object]:
    """L0 and dead share of a dictionary, and the FVU of the first site that it writes, which ``parts`` write."""
    y = acts[d.writes[0]]
    with torch.no_grad():
        made = sum(part.coder(acts[part.read])[:, 0] for part in parts)
    quality = asdict(measure(parts[-1].coder, [(acts[d.read], y)]))
    return quality | {"fvu": float((y - made).double().square().sum() / (y - y.mean(0)).double().square().sum())}


def shares(model: Model, dictionaries: Sequence[Dictionary], text: Text) -> dict[str, float]:
    """How much of each score comes back with dictionaries standing in for what they explain."""
    return {name: round(recovered_together(model, dictionaries, score), 4) for name, score in text.scores.items()}


def rounded(value: object) -> object:
    return round(value, 5) if isinstance(value, float) else value


def make(name: str, model: Model, text: Text, acts: dict[Site, Tensor], out: Path) -> None:
    """Train, measure and write one set."""
    began = time.monotonic()
    one = SETS[name]
    dictionaries = trained(model, one, acts)
    seconds = round(time.monotonic() - began)
    rows, together = measured(model, dictionaries, text), shares(model, dictionaries, text)
    for d, row in zip(dictionaries, rows, strict=True):
        folder = out / name / str(d.read.layer)
        card = text.about | {
            "recipe": asdict(one.recipe_of(d.read.layer)) | {"batch_size": one.batch_size},
            "made_by": f"python benchmarks/train_dictionaries.py --only {name}",
            "measured": row,
            "all_layers_recovered": together,
            "seconds_for_all_layers": seconds,
        }  # fmt: skip
        save_dictionary(replace(d, model=model.name, card=card), folder)
        print(folder, row, flush=True)
    print(name, "all layers", together, f"{seconds} s", flush=True)


def table(folder: Path, names: Sequence[str]) -> list[str]:
    """The cards' numbers: a row for each dictionary, and one for all layers of a set at once."""
    rows = [
        "| name | latents | L0 | FVU | dead | cross-entropy | logit difference | lead |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in (name for name in names if (folder / name).is_dir()):
        dictionaries = load_dictionaries(folder / name)
        for d in dictionaries:
            got = d.card["measured"]
            numbers = f"{d.coder.n_latents} | {got['l0']:.1f} | {got['fvu']:.3f} | {got['dead']:.2f}"
            rows.append(f"| `{name}/{d.read.layer}` | {numbers} | {_three(got.get('recovered', {}))} |")
        if len(dictionaries) > 1:
            rows.append(f"| `{name}`, all at once | | | | | {_three(dictionaries[0].card['all_layers_recovered'])} |")
    return rows


def _three(recovered: dict[str, float]) -> str:
    """Cross-entropy, the task's logit difference, and the lead where it was measured."""
    task = next((name for name in recovered if name in ("gender-pronoun", "modular-addition")), "")
    return " | ".join(f"{recovered[name]:.3f}" if name in recovered else "" for name in ("cross-entropy", task, "lead"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/dictionaries"))
    parser.add_argument("--only", nargs="*", default=list(SETS), choices=list(SETS))
    parser.add_argument("--table", action="store_true", help="only print the numbers of what is there")
    args = parser.parse_args()
    if args.table:
        print("\n".join(table(args.out, args.only)))
        return
    torch.set_num_threads(1)
    for which in dict.fromkeys(SETS[name].model for name in args.only):
        model = ck.load(which)
        text = stories(model) if model.tokenizer is not None else pairs(model)
        names = [name for name in args.only if SETS[name].model == which]
        acts = recorded(model, text.train, [kind for name in names for kind in (SETS[name].read, SETS[name].write)])
        for name in names:
            make(name, model, text, acts, args.out)


if __name__ == "__main__":
    main()
