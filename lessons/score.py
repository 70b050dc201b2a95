"""How well a model predicts a text.

    python lessons/score.py README.md
    python lessons/score.py README.md --tokens | sort -n | head     what surprised it most

loss        mean of -log p(token | tokens before it), in nats a token
perplexity  e^loss: as unsure as when choosing among so many equally likely tokens
bits/byte   all of -log2 p over the text's bytes: unlike the others, comparable between tokenizers

Every token is scored once. The first one follows the model's bos token, which for Granite is the
end of the text before, as in training.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from common import Parser, command, file_name, integer, pieces, progress, read_text
from torch import Tensor

from generate import TINY, encode, load_model, load_tokenizer
from granitemoe import GraniteMoeConfig, GraniteMoeForCausalLM

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@torch.inference_mode()
def log_probs(
    model: GraniteMoeForCausalLM,
    ids: list[int],
    context: int,
    stride: int,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> Tensor:
    """log p of each of ids but the first, in nats, float32 (len(ids) - 1,).

    `stride` tokens are scored at a time, from the `context` tokens before the last of them: each
    sees at least context - stride + 1 tokens, or all where the text has fewer. A large stride is
    cheap, a small one is fair. `tell` is called with how many are scored, and of how many. Raises
    ValueError unless 1 <= stride <= context.
    """
    limit = model.config.max_position_embeddings
    if not 1 <= context <= limit:
        raise ValueError(f"context: must be from 1 to the model's, {limit}, got {context}")
    if not 1 <= stride <= context:
        raise ValueError(f"stride: must be from 1 to the context, {context}, got {stride}")
    row = torch.tensor(ids, device=model.model.norm.weight.device)
    scores = []
    for start in range(1, len(ids), stride):
        end = min(start + stride, len(ids))
        window = row[max(0, end - 1 - context) : end - 1]
        logits = model(window[None], logits_to_keep=end - start).logits[0].float()
        scores.append(logits.log_softmax(dim=-1).gather(1, row[start:end, None])[:, 0])
        tell(end - 1, len(ids) - 1)
    return torch.cat(scores)


def default_window(config: GraniteMoeConfig) -> tuple[int, int]:
    """The model's context, at most 2048, and half of it as the stride."""
    context = min(2048, config.max_position_embeddings)
    return context, max(1, context // 2)


def read_ids(file: Path, tokenizer: "Tokenizer", config: GraniteMoeConfig) -> tuple[list[int], int]:
    """The bos token and the ids of a UTF-8 text, and how many bytes it has. Raises ValueError."""
    text, bos = read_text(file), config.bos_token_id
    # without a bos token of the tokenizer's own: it would be there twice, and score as text
    ids = encode(tokenizer, text, config.vocab_size, add_special_tokens=False)
    if not ids:
        raise ValueError(f"{str(file)!r}: must have a token to score, has none")
    if bos is None:
        raise ValueError("the model: must have a bos_token_id, since a text is scored after it")
    return [bos, *ids], len(text.encode())


def summarise(scores: Tensor, text_bytes: int) -> dict[str, float]:
    """Loss, perplexity and bits per byte of a text's log-probabilities."""
    loss = -scores.double().mean().item()
    bits = loss * len(scores) / math.log(2)
    perplexity = math.exp(loss) if loss < 700 else math.inf  # more overflows
    return {"loss": loss, "perplexity": perplexity, "bits/byte": bits / text_bytes}


def main() -> None:
    parser = Parser(description="Score a text.")
    add = parser.add_argument
    add("file", type=file_name, metavar="FILE", help="UTF-8 text")
    add("--model", default=TINY, help="folder or hub id (default: tiny/)")
    add("--context", type=integer(1), metavar="N", help="default: the model's, at most 2048")
    add("--stride", type=integer(1), metavar="N", help="default: half the context")
    add("--tokens", action="store_true", help="print each token's log-probability")
    args = parser.parse_args()
    exact = "float32" if args.model == TINY else None  # so that all machines print the same
    model, tokenizer = load_model(args.model, dtype=exact), load_tokenizer(args.model)
    ids, size = read_ids(args.file, tokenizer, model.config)
    context, stride = default_window(model.config)
    if args.context is not None:
        context, stride = args.context, max(1, args.context // 2)
    stride = stride if args.stride is None else args.stride
    with progress("scored tokens") as tell:
        scores = log_probs(model, ids, context, stride, tell)
    if args.tokens:
        for score, token in zip(scores.tolist(), pieces(tokenizer, ids[1:]), strict=True):
            print(f"{score:9.4f}  {token!r}")
        return
    print(f"{len(scores)} tokens, {size} bytes; context {context}, stride {stride}")
    print(*(f"{name} {value:.4f}" for name, value in summarise(scores, size).items()), sep="  ")


if __name__ == "__main__":
    command(main)
