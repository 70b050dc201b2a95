"""Follow one token through a mixture of experts, with the numbers of a real model.

    python lessons/walkthrough.py "def __init__(self"

For someone who knows attention and wants to see what replaces the feed-forward block. The token is
the text's last one; of a long text the model reads the last tokens that fit into its context. What
is printed is read off by hooks on the model's own modules.
"""

from collections.abc import Iterator

import torch
from common import Parser, command, pieces, watch, words
from torch import Tensor

import granitemoe
from generate import TINY, encode, load_model, load_tokenizer
from granitemoe import GraniteMoeForCausalLM

SHOWN_EXPERTS = 8
INTRODUCTION = """\
The token {token!r} is number {number}, the last of {count}. Its embedding has {D} numbers of
size {raw:.3f} (root mean square); times {scale:g} they enter the residual stream, to which each
layer adds twice. A layer's router scores its {E} experts: the {K} best compute, the others rest.
Softmax over all scores says how sure the router is; over those {K} alone it gives the weights of
their sum. What an expert gives of that sum depends on its output's size and direction too.
"""


def rms(x: Tensor) -> float:
    """The usual size of one number of x."""
    return x.float().square().mean().sqrt().item()


@torch.inference_mode()
def follow(model: GraniteMoeForCausalLM, ids: list[int]) -> tuple[list[dict[str, Tensor]], Tensor]:
    """What each layer does to the last of ids, and the logits (V,) of what comes after it.

    A layer's record holds the stream `before` and `after` (D,), what `attention` and the `experts`
    returned for it (D,), the router's `logits` (E,), `weights` and `chosen` (K,), and `shares`
    (K,): how much of the experts' sum each gives, measured along that sum; they add up to 1.
    """
    layers = model.model.layers
    moes = [layer.block_sparse_moe for layer in layers]
    with (
        watch(layers) as streams, watch(layer.self_attn for layer in layers) as attentions,
        watch(moes) as experts, watch(moe.router for moe in moes) as routers,
    ):  # fmt: skip
        logits = model(torch.tensor([ids], device="cpu")).logits[0, -1]
    steps = []
    for i, moe in enumerate(moes):
        (x_ND,), (router_logits_NE, weights_NK, expert_ids_NK) = routers[i]
        chosen, weights, y = expert_ids_NK[-1], weights_NK[-1], experts[i][1][0][0, -1]
        packed, rows = (moe.input_linear.weight, moe.output_linear.weight), x_ND[[-1] * len(chosen)]
        ones = torch.ones_like(weights)[:, None]
        alone = granitemoe.experts_loop(rows, *packed, ones, chosen[:, None])
        steps.append({
            "before": streams[i][0][0][0, -1], "after": streams[i][1][0][0, -1],
            "attention": attentions[i][1][0, -1], "experts": y, "chosen": chosen,
            "logits": router_logits_NE[-1], "weights": weights,
            "shares": weights * (alone @ y) / y.square().sum(),
        })  # fmt: skip
    return steps, logits


def describe_layer(i: int, step: dict[str, Tensor], m: float) -> Iterator[str]:
    """One layer in words; m is the residual multiplier. The best experts stand first."""
    probs = step["logits"].softmax(dim=-1)
    best = probs.topk(min(max(SHOWN_EXPERTS, len(step["chosen"])), len(probs))).indices
    before, attention, experts, after = (
        f"{rms(step[name]):.2f}" for name in ("before", "attention", "experts", "after")
    )
    yield f"Layer {i}: in comes size {before}; attention returns {attention}, {m:g} of it is added"
    for name, values, form in (
        ("expert", best, "d"), ("score", step["logits"][best], "+.2f"),
        ("softmax", probs[best], ".0%"), ("weight", step["weights"], ".2f"),
        ("gives", step["shares"], "z.0%"),
    ):  # fmt: skip
        yield f"    {name:8s}" + "".join(f"{value:{form}}".rjust(8) for value in values.tolist())
    yield f"    the experts return {experts}, {m:g} of it is added; out goes size {after}"


def describe(
    model: GraniteMoeForCausalLM, ids: list[int], steps: list[dict], texts: list[str]
) -> Iterator[str]:
    """The walk, a line an item: of many layers the first three and the last two."""
    c, raw = model.config, model.model.embed_tokens.weight[ids[-1]]
    yield INTRODUCTION.format(
        token=texts[-1], number=ids[-1], count=len(ids), raw=rms(raw), D=c.hidden_size,
        scale=c.embedding_multiplier, E=c.num_local_experts, K=c.num_experts_per_tok,
    )  # fmt: skip
    for i, step in enumerate(steps):
        if i < 3 or i >= len(steps) - 2:
            yield from describe_layer(i, step, c.residual_multiplier)
    yield f"\nThe last norm and the head, over {c.logits_scaling:g}, give the next token:"


def main() -> None:
    parser = Parser(description="Follow one token through the model.")
    add = parser.add_argument
    add("text", nargs="?", type=words, default="def __init__(self", metavar="TEXT")
    add("--model", default=TINY, help="folder or hub id (default: tiny/)")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, dtype="float32"), load_tokenizer(args.model)
    ids = encode(tokenizer, args.text, model.config.vocab_size)
    if not ids:
        raise ValueError("TEXT: must have a token, has none")
    whole, ids = len(ids), ids[-model.config.max_position_embeddings :]
    if len(ids) < whole:
        print(f"Of {whole} tokens the model reads the last {len(ids)}: its context has no more.\n")
    steps, logits = follow(model, ids)
    print(*describe(model, ids, steps, pieces(tokenizer, ids)), sep="\n")
    top = logits.softmax(dim=-1).topk(5)
    for p, text in zip(top.values.tolist(), pieces(tokenizer, top.indices.tolist()), strict=True):
        print(f"  {p:6.1%}  {text!r}")


if __name__ == "__main__":
    command(main)
