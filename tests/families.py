"""Small random Hugging Face models of every family whose wiring is promised, built in memory."""

import pytest
import torch

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GROUPED = SIZES | {"num_key_value_heads": 2}
FAMILIES = {
    "GPT2": GPT2,
    "GPTNeoX": SIZES,
    "GPTJ": GPT2 | {"rotary_dim": 4},
    "Llama": GROUPED,
    "Mistral": GROUPED | {"sliding_window": 4},
    "Qwen2": GROUPED,
    "Qwen3": GROUPED | {"head_dim": 8},
    "Gemma2": GROUPED | {"head_dim": 8, "sliding_window": 4},
    "Gemma3": GROUPED | {"head_dim": 8, "sliding_window": 4},
    "Phi": SIZES,
}


def build(family, *, seed=0, dtype=torch.float32, **changes):
    """A random model of a family; weights are spread so that norms, biases and gains all matter."""
    import transformers

    config_name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, config_name)(**FAMILIES[family] | changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")(config).eval()
        for parameter in module.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return module.to(dtype)


every_family = pytest.mark.parametrize("family", sorted(FAMILIES))
