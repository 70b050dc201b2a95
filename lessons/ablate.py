"""Break one thing of a model, and see what it does to the loss on a text and to what it writes.

    python lessons/ablate.py --top-k 1                       experts for each token
    python lessons/ablate.py --no-renormalise                weights: a softmax over all the scores
    python lessons/ablate.py --drop-expert 0:3               layer 0, expert 3 gives nothing
    python lessons/ablate.py --drop-expert all               each expert of each layer in turn
    python lessons/ablate.py --scalar residual_multiplier=1  one of Granite's four scalars
    python lessons/ablate.py --swap-experts 0:3:5            in layer 0, 3 gets the tokens of 5

One change at a time, so that an effect has one cause. No weight is edited: --top-k and --scalar put
the same weights under a changed config; the other changes are forward hooks, which change what a
router returns. --drop-expert sets the routing weight of that expert to zero and leaves the other
weights as they are: a token that chose it gets nothing in its place.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING

import torch
from common import (
    CONTROL,
    Parser,
    check_prompt,
    command,
    file_name,
    integer,
    markdown,
    new_figure,
    new_file_name,
    progress,
    words,
)
from score import default_window, log_probs, read_ids
from torch import Tensor, nn

from generate import TINY, encode, generate, load_model, load_tokenizer
from granitemoe import GraniteMoeForCausalLM

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SCALARS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
TEXT, NEW_TOKENS = Path(__file__).with_name("common.py"), 48
HEAD = "{}: {} tokens, loss in nats a token"
Change = Callable[[Tensor, Tensor, Tensor], tuple]  # of a router's logits_NE, weights_NK, ids_NK


def under(model: GraniteMoeForCausalLM, **changes: float | str) -> GraniteMoeForCausalLM:
    """The same weights, shared and not copied, under a changed config."""
    with torch.device("meta"):
        other = GraniteMoeForCausalLM(replace(model.config, **changes))
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval()


@contextmanager
def rerouted(
    model: GraniteMoeForCausalLM, routers: Iterable[nn.Module], change: Change
) -> Iterator[GraniteMoeForCausalLM]:
    """Within `with`, what each of the model's routers returns goes through change."""
    hooks = [each.register_forward_hook(lambda _, x, out: change(*out)) for each in routers]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def not_renormalised(logits_NE: Tensor, weights_NK: Tensor, ids_NK: Tensor) -> tuple:
    """The K chosen keep their part of the softmax over all E, so that they sum to less than 1."""
    return logits_NE, logits_NE.softmax(dim=-1).gather(1, ids_NK).to(weights_NK.dtype), ids_NK


def dropped(e: int) -> Change:
    """A weight of zero for expert e; whoever chose it still has the others, as before."""
    return lambda logits, weights, ids: (logits, weights.masked_fill(ids == e, 0), ids)


def swapped(a: int, b: int) -> Change:
    swap = lambda ids: torch.where(ids == a, b, torch.where(ids == b, a, ids))  # noqa: E731
    return lambda logits, weights, ids: (logits, weights, swap(ids))


def places(option: str, text: str, limits: list[int]) -> list[int]:
    """The layer and the experts of "L:E" or "L:A:B", each below its limit. Raises ValueError."""
    parts = [int(part) if part.isdecimal() else -1 for part in text[:40].split(":")]
    if len(parts) != len(limits) or not all(0 <= n < m for n, m in zip(parts, limits)):  # noqa: B905
        form = "L:E" if len(limits) == 2 else "L:A:B"
        last = ":".join(str(limit - 1) for limit in limits)
        raise ValueError(f"{option}: must be {form}, numbers up to {last}, got {text!a:.40}")
    return parts


def named_scalar(text: str) -> tuple[str, float]:
    """The scalar and the number of "NAME=X". Raises ValueError.

    Zero, which no config.json may have, breaks a model as well as any number does. Only a division
    by it gives nothing to look at.
    """
    name, _, number = text.partition("=")
    if name not in SCALARS:
        raise ValueError(f"--scalar: must be one of {', '.join(SCALARS)}, got {name!a:.40}")
    least, why = (1e-18, ", since it divides the logits") if name == "logits_scaling" else (0, "")
    with suppress(ValueError):
        if least <= float(number) <= 1e18:  # squares of more would not be finite
            return name, float(number)
    allowed = f"a number from {least} to 1e+18{why}"
    raise ValueError(f"--scalar {name}: must be {allowed}, got {number!a:.40}")


def broken(
    model: GraniteMoeForCausalLM, args: argparse.Namespace
) -> AbstractContextManager[GraniteMoeForCausalLM]:
    """For `with`: the model with the one change that args has. Raises ValueError."""
    routers = [layer.block_sparse_moe.router for layer in model.model.layers]
    L, E = len(routers), model.config.num_local_experts
    if args.top_k is not None:
        if args.top_k > E:
            raise ValueError(f"--top-k: must be at most {E}, the experts, got {args.top_k}")
        return nullcontext(under(model, num_experts_per_tok=args.top_k))
    if args.scalar is not None:
        name, value = named_scalar(args.scalar)
        changes = {name: value}
        if changes.get("attention_multiplier") == 0:  # the fast kernels multiply -inf by it: NaN
            changes["attention_backend"] = "eager"
        return nullcontext(under(model, **changes))
    if args.no_renormalise:
        return rerouted(model, routers, not_renormalised)
    if args.drop_expert is not None:
        layer, e = places("--drop-expert", args.drop_expert, [L, E])
        return rerouted(model, [routers[layer]], dropped(e))
    layer, a, b = places("--swap-experts", args.swap_experts, [L, E, E])
    return rerouted(model, [routers[layer]], swapped(a, b))


def loss(
    model: GraniteMoeForCausalLM,
    ids: list[int],
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> float:
    """Nats a token, as score.py has it."""
    return -log_probs(model, ids, *default_window(model.config), tell).double().mean().item()


def drop_each(model: GraniteMoeForCausalLM, ids: list[int]) -> Tensor:
    """The loss without each expert of each layer, one at a time, (L, E)."""
    E, losses = model.config.num_local_experts, []
    routers = [layer.block_sparse_moe.router for layer in model.model.layers]
    with progress("scored tokens") as tell:

        def tell_all(done: int, of: int) -> None:
            tell(len(losses) * of + done, len(routers) * E * of)

        for router in routers:
            for e in range(E):
                with rerouted(model, [router], dropped(e)):
                    losses.append(loss(model, ids, tell_all))
    return torch.tensor(losses, dtype=torch.float64).view(-1, E)


def print_drops(model: GraniteMoeForCausalLM, args: argparse.Namespace, ids: list[int]) -> None:
    """Print the table of drop_each and, if asked to, draw it. Raises ValueError."""
    figure = new_figure(args.plot, figsize=(9, 5)) if args.plot else None  # before the work
    with progress("scored tokens") as tell:
        before = loss(model, ids, tell)
    rises = drop_each(model, ids) - before
    print(HEAD.format(args.file.name, len(ids) - 1))
    print(f"unchanged  {before:.4f}; without one expert of one layer:\n")
    rows = [[str(i), *(f"{x:+.3f}" for x in row)] for i, row in enumerate(rises.tolist())]
    print(markdown(["layer", *(f"expert {e}" for e in range(rises.shape[1]))], rows))
    if figure:
        axes, most = figure.subplots(), rises.abs().max().item()
        squares = axes.imshow(rises.numpy(), cmap="RdBu_r", vmin=-most, vmax=most)
        axes.set(title="rise of the loss, nats a token", xlabel="expert left out", ylabel="layer")
        figure.colorbar(squares)
        figure.savefig(args.plot)


def compare(
    model: GraniteMoeForCausalLM, tokenizer: "Tokenizer", args: argparse.Namespace, ids: list[int]
) -> None:
    """Print the loss and the text of the model and of the changed one. Raises ValueError."""
    c, losses, texts = model.config, [], []
    prompt, eos = encode(tokenizer, args.prompt, c.vocab_size), c.eos_token_id
    check_prompt("--prompt", prompt, c.max_position_embeddings)
    how = {"temperature": 0.8, "top_p": 0.9, "seed": args.seed, "eos_token_ids": eos}
    for each in (nullcontext(model), broken(model, args)):
        with each as changed:
            with progress("scored tokens") as tell:
                losses.append(loss(changed, ids, tell))
            new = [row[0] for row in generate(changed, [prompt], NEW_TOKENS, **how)]
        texts.append(CONTROL.sub("\ufffd", tokenizer.decode(prompt + new)))
    print(HEAD.format(args.file.name, len(ids) - 1))
    print(f"unchanged  {losses[0]:.4f}\nchanged    {losses[1]:.4f}  {losses[1] - losses[0]:+.4f}")
    for name, text in zip(("unchanged", "changed"), texts, strict=True):
        print(f"\n{name}:\n{indent(text, '    ')}")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--top-k", type=integer(1), metavar="K", help="experts for each token")
    add("--no-renormalise", action="store_true", help="weights: a softmax over all the scores")
    dropping = "weight 0 for expert E of layer L, the others keep theirs; all: each in turn"
    add("--drop-expert", metavar="L:E", help=dropping)
    add("--scalar", metavar="NAME=X", help=", ".join(SCALARS))
    add("--swap-experts", metavar="L:A:B", help="in layer L, exchange experts A and B")
    add = parser.add_argument
    add("--model", default=TINY, help="folder or hub id (default: tiny/)")
    add("--file", type=file_name, default=TEXT, help="text to score (default: lessons/common.py)")
    add("--prompt", type=words, default="class Stack:", metavar="TEXT", help="text to continue")
    seed = {"type": integer(0, 2**63 - 1), "default": 40, "metavar": "S"}
    add("--seed", **seed, help="of the random numbers of both texts")
    add("--plot", type=new_file_name, metavar="FILE", help="draw the table of --drop-expert all")
    args = parser.parse_args()
    if args.plot and args.drop_expert != "all":
        parser.error("--plot: needs --drop-expert all")
    exact = "float32" if args.model == TINY else None  # so that all machines print the same
    model, tokenizer = load_model(args.model, dtype=exact), load_tokenizer(args.model)
    ids, _ = read_ids(args.file, tokenizer, model.config)
    if args.drop_expert == "all":
        print_drops(model, args, ids)
    else:
        compare(model, tokenizer, args, ids)


if __name__ == "__main__":
    command(main)
