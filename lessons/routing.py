"""Show where a mixture of experts sends each token.

    python lessons/routing.py "def add(a, b):"                       in colours
    python lessons/routing.py "def add(a, b):" | cat                 with experts' numbers instead
    python lessons/routing.py "def add(a, b):" --html routing.html   one page, without network

The model is not touched: forward hooks on its routers write down what they return. A layer's
experts are its own, so expert 3 of one layer has nothing to do with expert 3 of the next. Colours
follow a token's first expert, the one with the largest weight. Shapes as in granitemoe.py, and L
layers.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from common import command, pieces, watch
from torch import Tensor

from generate import TINY, generate, load_model, load_tokenizer
from granitemoe import GraniteMoeForCausalLM

TEMPLATE = Path(__file__).with_name("routing.html")
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
BARS = " ▁▂▃▄▅▆▇█"


class Routing(NamedTuple):
    """What the routers of all layers chose for each of N tokens, and what that makes of the load.

    Counts sum to N * K in each layer. `peak` is the largest over the mean load: 1 is even, E is one
    expert for all. `entropy` is in bits: log2(E) is even, 0 is one expert for all.
    """

    weights: Tensor  # (L, N, K), each row sums to 1 and falls
    expert_ids: Tensor  # (L, N, K)
    counts: Tensor  # (L, E), assignments
    peak: Tensor  # (L,)
    entropy: Tensor  # (L,)


def balance(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Peak and entropy of each row of (L, E)."""
    shares = counts / counts.sum(dim=1, keepdim=True)
    entropy = -torch.special.xlogy(shares, shares).sum(dim=1) / math.log(2)
    return shares.amax(dim=1) * counts.shape[1], entropy.clamp(min=0)


@torch.inference_mode()
def record(model: GraniteMoeForCausalLM, ids: list[int]) -> Routing:
    """One forward over ids (N of them), with a hook on each layer's router."""
    with watch(layer.block_sparse_moe.router for layer in model.model.layers) as calls:
        model(torch.tensor([ids]), logits_to_keep=1)
    weights, expert_ids = (torch.stack([output[i] for _, output in calls]) for i in (1, 2))
    E = model.config.num_local_experts
    counts = torch.stack([layer.flatten().bincount(minlength=E) for layer in expert_ids])
    return Routing(weights.float(), expert_ids, counts, *balance(counts))


def palette(E: int) -> list[int]:
    """E codes of the terminal's 256 colours, light enough for black text, far from each other."""
    cube = [(r, g, b) for r in range(6) for g in range(6) for b in range(6)]
    light = [c for c in cube if 0.3 * c[0] + 0.59 * c[1] + 0.11 * c[2] > 2.4]
    chosen = [(5, 3, 1)]
    while len(chosen) < min(E, len(light)):
        chosen.append(max(light, key=lambda c: min(math.dist(c, other) for other in chosen)))
    codes = [16 + 36 * r + 6 * g + b for r, g, b in chosen]
    return [codes[e % len(codes)] for e in range(E)]


def paint(text: str, expert: int, codes: list[int] | None) -> str:
    """Text on its expert's colour or, without colours, with the expert's number after it."""
    if codes is None:
        line, newline, rest = text.partition("\n")
        return line + str(expert).translate(SUPERSCRIPTS) + newline + rest
    start = f"\x1b[38;5;16;48;5;{codes[expert]}m"
    return "\n".join(f"{start}{line}\x1b[0m" if line else "" for line in text.split("\n"))


def show(
    tokens: list[str], prompt: int, routing: Routing, layer: int, codes: list[int] | None
) -> list[str]:
    """Each token's K experts with their weights, then the text, and the load of each layer."""
    weights, ids = routing.weights[layer].tolist(), routing.expert_ids[layer].tolist()
    lines = []
    for token, row, experts in zip(tokens, weights, ids, strict=True):
        choices = [f"{e:3d} {w:.2f}" for e, w in zip(experts, row, strict=True)]
        if codes:
            choices = [paint(c, e, codes) for c, e in zip(choices, experts, strict=True)]
        lines.append(f"  {token!r:<16.16}{'  '.join(choices)}")
    painted = [
        paint(token.replace("\n", "↵\n"), experts[0], codes)
        for token, experts in zip(tokens, ids, strict=True)
    ]
    text = "".join([*painted[:prompt], "▸", *painted[prompt:]])
    return [*lines, "", text, "", *show_load(routing)]


def show_load(routing: Routing) -> list[str]:
    """A line for each layer: a bar an expert, 8 eighths being twice the mean, and the balance."""
    E = routing.counts.shape[1]
    wide = E <= 16  # room for percentages beside the bars
    head = "".join(f"{e:>6d}" for e in range(E)) if wide else f"{f'experts 0 to {E - 1}':<{E}}"
    lines = [f"load, layer {head}   max/mean  entropy of {math.log2(E):.2f} bits"]
    for i, row in enumerate((routing.counts / routing.counts.sum(dim=1, keepdim=True)).tolist()):
        bars = [BARS[min(8, math.ceil(share * E * 4))] for share in row]
        cells = [f"{s:4.0%} {b}" if wide else b for s, b in zip(row, bars, strict=True)]
        figures = f"{routing.peak[i]:8.2f}  {routing.entropy[i]:7.2f}"
        lines.append(f"{i:11d} {''.join(cells)}   {figures}")
    return lines


def page(title: str, tokens: list[str], prompt: int, routing: Routing, layer: int) -> str:
    """The same as one HTML page, which builds itself from data. Whatever a token holds is text
    there: it enters the page inside a JSON string without a <, and is only ever set as text."""
    fields = {"weights": 3, "expert_ids": 0, "counts": 0, "peak": 2, "entropy": 2}  # decimals
    data = {"title": title, "tokens": tokens, "prompt": prompt, "layer": layer}
    for name, decimals in fields.items():
        data[name] = getattr(routing, name).double().round(decimals=decimals).tolist()
    raw = json.dumps(data).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", raw)


def main() -> None:
    parser = argparse.ArgumentParser(description="Show where each token is sent.")
    add = parser.add_argument
    add("text", metavar="TEXT", help="the prompt")
    add("--model", default=TINY, help="folder or hub id (default: tiny/)")
    add("--max-new-tokens", type=int, default=48, metavar="N", help="how much to generate (48)")
    add("--layer", type=int, default=0, metavar="I", help="the layer that gives the colours (0)")
    add("--html", type=Path, metavar="FILE", help="write a page instead")
    args = parser.parse_args()
    exact = "float32" if args.model == TINY else None  # so that all machines print the same
    model, tokenizer = load_model(args.model, dtype=exact), load_tokenizer(args.model)
    c, prompt = model.config, tokenizer.encode(args.text).ids
    if not 0 <= args.layer < c.num_hidden_layers:
        raise ValueError(f"--layer: must be below {c.num_hidden_layers}, got {args.layer}")
    steps = generate(model, [prompt], args.max_new_tokens, eos_token_ids=c.eos_token_id)
    ids = prompt + [row[0] for row in steps]
    routing, tokens = record(model, ids), pieces(tokenizer, ids)
    name = Path(args.model).name
    if args.html:
        made = page(name, tokens, len(prompt), routing, args.layer)
        args.html.write_text(made, encoding="utf-8")
        return print(f"{args.html}: {len(ids)} tokens, {c.num_hidden_layers} layers")
    E, K, codes = c.num_local_experts, c.num_experts_per_tok, None
    if sys.stdout.isatty():
        codes = palette(E)
        print("experts", *(paint(f" {e} ", e, codes) for e in range(E)), "\n")
    print(
        f"{name}, layer {args.layer}: each token's {K} experts with their weights, then the text in"
    )
    print("which each shows its first expert (generated after ▸), and the load of each layer\n")
    print(*show(tokens, len(prompt), routing, args.layer, codes), sep="\n")


if __name__ == "__main__":
    command(main)
