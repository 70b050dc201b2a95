"""Show where a mixture of experts sends each token.

    python lessons/routing.py "def add(a, b):"                        in colours
    python lessons/routing.py "def add(a, b):" | cat                  with experts' numbers instead
    python lessons/routing.py --file tiny/train.py                    the load of a long text
    python lessons/routing.py --file tiny/train.py --html page.html   one page, without network

The model is not touched: forward hooks on its routers write down what they return. A layer's
experts are its own, so expert 3 of one layer has nothing to do with expert 3 of the next. Colours
follow a token's first expert, the one with the largest weight. Shapes as in granitemoe.py, and L
layers.
"""

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from common import (
    Parser,
    check_prompt,
    command,
    file_name,
    integer,
    new_file_name,
    pieces,
    read_text,
    watch,
    words,
)
from torch import Tensor

from generate import TINY, encode, generate, load_model, load_tokenizer
from granitemoe import GraniteMoeForCausalLM

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TEMPLATE = Path(__file__).with_name("routing.template")  # no .html: it is no page yet
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
BARS = " ▁▂▃▄▅▆▇█"
LONGEST = 4000  # tokens of a file; a page holds them all


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


class Read(NamedTuple):
    """What the routers are watched at."""

    ids: list[int]
    prompt: int  # how many of them were given
    length: str  # in words: of a long file, the first tokens only


def balance(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Peak and entropy of each row of (L, E)."""
    shares = counts / counts.sum(dim=1, keepdim=True)
    entropy = -torch.special.xlogy(shares, shares).sum(dim=1) / math.log(2)
    return shares.amax(dim=1) * counts.shape[1], entropy.clamp(min=0)


@torch.inference_mode()
def record(model: GraniteMoeForCausalLM, ids: list[int]) -> Routing:
    """Forwards over ids (N of them), in windows of the context, with a hook on each router."""
    E, made = model.config.num_local_experts, []
    for window in torch.tensor([ids], device="cpu").split(
        model.config.max_position_embeddings, dim=1
    ):
        with watch(layer.block_sparse_moe.router for layer in model.model.layers) as calls:
            model(window, logits_to_keep=1)
        made.append([torch.stack([output[i] for _, output in calls]) for i in (1, 2)])
    weights, expert_ids = (torch.cat(parts, dim=1) for parts in zip(*made, strict=True))
    counts = torch.stack([layer.flatten().bincount(minlength=E) for layer in expert_ids])
    return Routing(weights.float(), expert_ids, counts, *balance(counts))


def usual(expert_ids: Tensor, ids: list[int]) -> list[float]:
    """For each layer of (L, N, K): of the tokens that come more than once, the share whose first
    expert is the one that the same token has most often."""
    shares, times = [], Counter(ids)
    for firsts in expert_ids[:, :, 0].tolist():
        most: dict[int, int] = {}
        for (token, _), count in Counter(zip(ids, firsts, strict=True)).items():
            if times[token] > 1:
                most[token] = max(count, most.get(token, 0))
        repeated = sum(times[token] for token in most)
        shares.append(sum(most.values()) / repeated if repeated else math.nan)
    return shares


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


def show_load(routing: Routing, same: list[float] | None = None) -> list[str]:
    """A line for each layer: a bar an expert, 8 eighths being twice the mean, and the balance."""
    E = routing.counts.shape[1]
    wide = E <= 16  # percentages fit beside the bars
    head = f"{'layer':<12}{f'experts 0 to {E - 1}':<{E}}"
    if wide:
        head = f"layer, expert{0:>5d}" + "".join(f"{e:>6d}" for e in range(1, E))
    lines = [f"{head}   max/mean  entropy of {math.log2(E):.2f} bits"]
    lines[0] += "  same" if same else ""
    for i, row in enumerate((routing.counts / routing.counts.sum(dim=1, keepdim=True)).tolist()):
        bars = [BARS[min(8, math.ceil(share * E * 4))] for share in row]
        cells = [f"{s:4.0%} {b}" if wide else b for s, b in zip(row, bars, strict=True)]
        figures = f"{routing.peak[i]:8.2f}  {routing.entropy[i]:7.2f}"
        figures += f"{'':13}{same[i]:5.0%}" if same else ""
        lines.append(f"{i:11d} {''.join(cells)}   {figures}")
    return lines


def page(title: str, tokens: list[str], prompt: int, routing: Routing, start: dict) -> str:
    """One HTML page, which builds itself from data; start: the layer shown, the window, and the
    length in words.

    Whatever a token holds is text there: it enters the page inside a JSON string without a <, and
    is only ever set as text. Of choices and weights (in hundredths), N * K a layer, each is one
    character: long texts stay small."""
    data = {"title": title, "tokens": tokens, "prompt": prompt, **start}
    for name, decimals in {"counts": 0, "peak": 2, "entropy": 2}.items():
        data[name] = getattr(routing, name).double().round(decimals=decimals).tolist()
    hundredths = (routing.weights * 100).round().long()
    for name, numbers in {"expert_ids": routing.expert_ids, "weights": hundredths}.items():
        data[name] = ["".join(chr(61 + n) for n in row.flatten().tolist()) for row in numbers]
    raw = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", raw)


def read_args() -> argparse.Namespace:
    parser = Parser(description="Show where each token is sent.")
    one = parser.add_mutually_exclusive_group(required=True)
    one.add_argument("text", nargs="?", type=words, metavar="TEXT", help="a prompt to continue")
    longest = f"a UTF-8 text, of which the first {LONGEST} tokens are read, instead"
    one.add_argument("--file", type=file_name, metavar="FILE", help=longest)
    add = parser.add_argument
    add("--model", default=TINY, help="folder or hub id (default: tiny/)")
    new = {"type": integer(0), "default": 48, "metavar": "N"}
    add("--max-new-tokens", **new, help="how much to generate (48)")
    layer = {"type": integer(0), "default": 0, "metavar": "I"}
    add("--layer", **layer, help="the layer that gives the colours (0)")
    add("--html", type=new_file_name, metavar="OUT", help="write a page instead")
    return parser.parse_args()


def read(args: argparse.Namespace, model: GraniteMoeForCausalLM, tokenizer: "Tokenizer") -> Read:
    """The file's first tokens, or TEXT's and what the model writes after them."""
    c = model.config
    if args.file:
        whole = encode(tokenizer, read_text(args.file), c.vocab_size)
        if not whole:
            raise ValueError(f"{str(args.file)!r}: must have a token, has none")
        ids, cut = whole[:LONGEST], f"the first {LONGEST} of " if len(whole) > LONGEST else ""
        return Read(ids, len(ids), f"{cut}{len(whole)} tokens")
    prompt = encode(tokenizer, args.text, c.vocab_size)
    check_prompt("TEXT", prompt, c.max_position_embeddings)  # a longer one can be a --file
    made = generate(model, [prompt], args.max_new_tokens, eos_token_ids=c.eos_token_id)
    ids = prompt + [row[0] for row in made]
    return Read(ids, len(prompt), f"{len(ids)} tokens")


def main() -> None:
    args = read_args()
    exact = "float32" if args.model == TINY else None  # so that all machines print the same
    model, tokenizer = load_model(args.model, dtype=exact), load_tokenizer(args.model)
    c, name = model.config, Path(args.model).name
    if not 0 <= args.layer < c.num_hidden_layers:
        last = c.num_hidden_layers - 1
        raise ValueError(f"--layer: must be from 0 to {last}, got {args.layer}")
    ids, prompt, length = read(args, model, tokenizer)
    name += f", {args.file.name}" if args.file else ""
    routing, tokens = record(model, ids), pieces(tokenizer, ids)
    if args.html:
        start = {"layer": args.layer, "window": c.max_position_embeddings, "length": length}
        made = page(name, tokens, prompt, routing, start)
        args.html.write_text(made, encoding="utf-8")
        return print(f"{args.html}: {length}, {c.num_hidden_layers} layers")
    if args.file:
        print(f"{name}: {length}. same: how often a token that comes")
        print("more than once has its most frequent first expert\n")
        return print(*show_load(routing, usual(routing.expert_ids, ids)), sep="\n")
    E, K, codes = c.num_local_experts, c.num_experts_per_tok, None
    if sys.stdout.isatty():
        codes = palette(E)
        print("experts", *(paint(f" {e} ", e, codes) for e in range(E)), "\n")
    print(
        f"{name}, layer {args.layer}: each token's {K} experts with their weights, then the text in"
    )
    print("which each shows its first expert (generated after ▸), and the load of each layer\n")
    print(*show(tokens, prompt, routing, args.layer, codes), sep="\n")


if __name__ == "__main__":
    command(main)
