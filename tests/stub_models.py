"""What tasks need to know of a model, without a model: names, sizes, tokenizers and cards."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from typing import Any

from circuitkit.resources import resource

FOLDERS = {
    "tracr": "tracr_compiled",
    "modadd": "modadd_clock_pizza",
    "induction": "induction_2layer_attn_only",
}
PROGRAMS = ("frac_prevs", "hist", "length", "pair_balance", "reverse", "sort_unique")


@dataclass
class StubModel:
    """Satisfies `circuitkit.tasks.base.Vocabulary`."""

    name: str = "stub"
    d_vocab: int = 100
    n_ctx: int = 64
    tokenizer: Any = None
    card: dict[str, Any] = field(default_factory=dict)
    causal: bool = True


@functools.cache
def stories() -> StubModel:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resource("stories260k", "hf"))
    return StubModel(
        "stories260k",
        512,
        512,
        tokenizer,
        json.loads(resource("stories260k", "stories260k.json").read_text()),
    )


@functools.cache
def gpt2() -> StubModel:
    from transformers import GPT2TokenizerFast

    # The keyword arguments of its constructor changed between transformers 4 and 5; this works in both.
    return StubModel("gpt2", 50257, 1024, GPT2TokenizerFast.from_pretrained(resource("gpt2_tokenizer")))


@functools.cache
def zoo(name: str) -> StubModel:
    """A model kept in TransformerLens's layout: ``tracr/hist``, ``modadd/two_layer``..."""
    short, stem = name.split("/")
    card = json.loads(resource(FOLDERS[short], f"{stem}.json").read_text())
    config = card["hooked_transformer_config"]
    return StubModel(name, config["d_vocab"], config["n_ctx"], None, card, config["attention_dir"] == "causal")
