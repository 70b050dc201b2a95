"""Where the names a400m and a800m come from.

    python lessons/sparsity.py             the released sizes and tiny/
    python lessons/sparsity.py FOLDER ...  and others

Decoding one token reads every weight that the token uses, once, and does about two operations with
each: so time goes with the active parameters, while what a model can store goes with all of them.
The names count the active ones without the embedding (with it the 3b would be an a900m). It is read
all the same, since the tied head is that very matrix. Keys and values, which grow with the text,
are left out.
"""

import torch
from common import Parser, command, file_name, markdown

from generate import TINY, checkpoint
from granitemoe import GraniteMoeConfig, GraniteMoeForCausalLM

COMMON = {
    "model_type": "granitemoe", "vocab_size": 49155, "intermediate_size": 512,
    "num_key_value_heads": 8, "num_experts_per_tok": 8, "max_position_embeddings": 4096,
    "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "embedding_multiplier": 12.0,
    "attention_multiplier": 1 / 64, "residual_multiplier": 0.22, "logits_scaling": 6.0,
    "tie_word_embeddings": True,
}  # fmt: skip
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_local_experts")
RELEASED = {
    "1b-a400m": COMMON | dict(zip(SIZES, (1024, 24, 16, 32), strict=True)),
    "3b-a800m": COMMON | dict(zip(SIZES, (1536, 32, 24, 40), strict=True)),
}
COLUMNS = ("model", "experts", "parameters", "used by a token", "without embedding")
COLUMNS += ("read a token", "dense of that size")


def count(config: GraniteMoeConfig) -> dict[str, int]:
    """Parameters in all, used by one token, and of those without the embedding; bytes in bfloat16
    that one token reads, here and in a dense model with as many parameters.

    Counted from the modules themselves, built on the meta device, which holds no memory.
    """
    with torch.device("meta"):
        model = GraniteMoeForCausalLM(config)
    total, active = model.num_parameters(), model.num_parameters(active=True)
    embedding = model.model.embed_tokens.weight.numel()
    untied = 0 if config.tie_word_embeddings else embedding  # then a token reads one row of it
    return {
        "total": total,
        "active": active,
        "inside": active - embedding - untied,
        "bytes": 2 * (active - untied),
        "dense_bytes": 2 * (total - untied),
    }


def table(configs: dict[str, GraniteMoeConfig]) -> str:
    """A markdown table; parameters in millions, bytes in megabytes."""
    rows = []
    for name, config in configs.items():
        n = count(config)
        total, active, inside, sparse, dense = (f"{x / 1e6:,.1f}" for x in n.values())
        experts = f"{config.num_experts_per_tok} of {config.num_local_experts}"
        dense += f" MB, {n['dense_bytes'] / n['bytes']:.1f} x"
        rows.append([name, experts, f"{total} M", f"{active} M", f"{inside} M", f"{sparse} MB"])
        rows[-1].append(dense)
    return markdown(COLUMNS, rows)


def main() -> None:
    parser = Parser(description="Count what a token uses.")
    parser.add_argument("folders", nargs="*", type=file_name, default=[TINY], metavar="FOLDER")
    folders = parser.parse_args().folders
    configs = {name: GraniteMoeConfig.from_dict(data) for name, data in RELEASED.items()}
    for folder in folders:
        short = folder.resolve().name
        name = short if short not in configs else str(folder)  # or one would hide the other
        configs[name] = config = checkpoint.read_config(folder)
        if config.num_hidden_layers > checkpoint.MAX_LAYERS:  # each takes time to build
            most = f"num_hidden_layers: must be at most {checkpoint.MAX_LAYERS}"
            raise ValueError(f"{str(folder)!r}: {most}, got {config.num_hidden_layers}")
    print(table(configs))


if __name__ == "__main__":
    command(main)
