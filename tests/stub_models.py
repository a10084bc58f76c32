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


@dataclass
class RecurrentStub(StubModel):
    """What a task needs to know of a recurrent network: how many numbers it reads (None: token ids) and gives."""

    numbers: int | None = None
    d_vocab_out: int = 2


@functools.cache
def recurrent(name: str) -> RecurrentStub:
    """A recurrent network of the zoo: ``g2p/gru``, ``toys/parity_gru_s0``..."""
    from circuitkit.models.recurrent.zoo import build

    module, network, card = build(name)
    table, outputs = module.embedding, module.readout.out_features
    numbers = module.cell.input_size if table is None else None
    d_vocab = table.num_embeddings if numbers is None else numbers
    causal = not getattr(getattr(module, "cell", None), "bidirectional", False) and network is None
    return RecurrentStub(name, d_vocab, 1000, None, card, causal, numbers, outputs)
