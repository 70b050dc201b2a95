"""Train the small GraniteMoe in this folder on the Python standard library of this machine.

    python tiny/train.py --out new                # about an hour on two cores; run again to resume
    python tiny/train.py --out new --start tiny --tokens 58e6         # go on from what is there
    python tiny/train.py --out off --aux-coef 0 --tokens 4e6 --prompt-tokens 0   # not balanced
    python tiny/train.py --out dense --dense --tokens 4e6 --prompt-tokens 0      # without experts

Writes a checkpoint that any GraniteMoe program opens (config.json, model.safetensors in bfloat16,
tokenizer.json, tokenizer_config.json, generation_config.json), log.csv (loss and expert load
against tokens seen) and report.json (held-out losses and baselines). Until it is done, state.part
holds what a second run needs to continue; a folder that holds a finished model is refused.

The recipe is that of PowerMoE (arXiv 2408.13359) at a width of 192: the Power learning rate, muP
scaling by m_width = hidden / 256, AdamW, and the load-balancing loss added to the cross-entropy.
Windows are half a context long until the last sixth of the tokens, since attention is a third of
the time here, and whole from there on.
"""

import argparse
import contextlib
import csv
import dataclasses
import hashlib
import itertools
import json
import math
import random
import re
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from granitemoe import GraniteMoeConfig, GraniteMoeForCausalLM, load_balancing_loss  # noqa: E402

VOCAB, T, B, WARMUP, ETA_MAX, A, EXPONENT = 2048, 512, 8, 100, 0.02, 4.0, -0.51
CUTS, PROMPT_RATE = 0.04, 4e-4  # see encode and practise_prompts
COLUMNS = ["tokens", "train_loss", "held_out_loss", "aux_loss", "max_share", "min_share"]
HEAD = """
Every 100 steps: the tokens seen, the loss in training (the mean of these steps) and on held-out
files, both in nats a token; the balance loss of the last step, which is K if all is even; the
largest and the smallest share of a layer's choices that an expert got.

    tokens   train  held out  balance  largest smallest  tokens/s     left"""
SPECIAL = ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"]
CONFIG = GraniteMoeConfig(
    vocab_size=VOCAB,
    hidden_size=192,
    intermediate_size=128,
    num_hidden_layers=5,
    num_attention_heads=6,
    num_key_value_heads=2,
    num_local_experts=8,
    num_experts_per_tok=2,
    max_position_embeddings=T,
    rope_theta=10000.0,
    rms_norm_eps=1e-6,
    embedding_multiplier=12.0,
    attention_multiplier=1 / 32,  # 1 / head_dim
    residual_multiplier=0.22,
    logits_scaling=0.75,  # m_width = 192 / 256
    tie_word_embeddings=True,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=0,
    router_aux_loss_coef=0.0,  # added below, layer by layer
    output_router_logits=False,
    initializer_range=0.1,
    dtype="bfloat16",
)


def standard_library() -> tuple[list[str], list[str]]:
    """Texts to train on and, one file in 25 by the hash of its path, whole files held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: tuple[list[str], list[str]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        # Tables of characters and third-party packages are not what a reader calls Python.
        if any(part in name for part in ("site-packages", "encodings/", "_vendor/", "stringprep")):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            texts[int(hashlib.md5(name.encode()).hexdigest(), 16) % 25 == 0].append(text)
    return texts


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE as Granite's: single digits, then the GPT-2 split."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=alphabet),
    )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str], cuts: float = 0.0) -> torch.Tensor:
    """All texts as one row of ids, each ended by id 0.

    cuts: the share of words before which a text is cut and its pieces encoded each by itself. A
    prompt ends like that: in "def " the space is a token, in "def f" it belongs to the next word's,
    and a model that has only seen whole texts does not know how to go on.
    """
    rng, row = random.Random(0), []
    for text in texts:
        words = re.split(r"(?<=\s)(?=\S)", text)
        starts = [0, *(i for i in range(1, len(words)) if rng.random() < cuts), len(words)]
        pieces = ["".join(words[a:b]) for a, b in itertools.pairwise(starts)]
        ids = [i for piece in tokenizer.encode_batch(pieces) for i in piece.ids]
        row.append(np.array([*ids, 0], dtype=np.int64))
    return torch.from_numpy(np.concatenate(row))


def power_rate(tokens: float, total: float, seen: float = 0.0) -> float:
    """eta(n) = min(eta_max, beta * a * n^b) after a linear warmup; the last sixth decays to 1 %.

    beta is the batch size in sequences of 4,096 tokens, on which the constants were fitted. A run
    that goes on from a checkpoint which has seen tokens warms up and decays over its own share.
    """
    decay_from = seen + (total - seen) * 5 / 6
    rate = min(ETA_MAX, B * T / 4096 * A * max(min(tokens, decay_from), 1) ** EXPONENT)
    decay = 0.01 ** max(0.0, (tokens - decay_from) / (total - decay_from))
    return rate * decay * min(1.0, (tokens - seen) / (WARMUP * B * T))


def new_model(config: GraniteMoeConfig, seed: int) -> GraniteMoeForCausalLM:
    """muP: matrices inside the layers start smaller by the root of the width, 192 / 256."""
    torch.manual_seed(seed)
    model = GraniteMoeForCausalLM(config)
    with torch.no_grad():
        for p in matrices_inside(model):
            p.div_(math.sqrt(config.hidden_size / 256))
    return model


def matrices_inside(model: GraniteMoeForCausalLM) -> list[torch.nn.Parameter]:
    return [p for n, p in model.named_parameters() if "layers" in n and p.dim() > 1]


def new_optimizer(model: GraniteMoeForCausalLM) -> torch.optim.Optimizer:
    """muP: the same matrices learn slower by the width; norms do not decay."""
    norms = [p for p in model.parameters() if p.dim() == 1]
    slower = 256 / model.config.hidden_size
    groups = [
        {"params": [model.model.embed_tokens.weight], "scale": 1.0, "weight_decay": 0.1},
        {"params": matrices_inside(model), "scale": slower, "weight_decay": 0.1},
        {"params": norms, "scale": 1.0, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def windows(ids: torch.Tensor, length: int, generator: torch.Generator) -> torch.Tensor:
    """(B * T / length, length) ids from random places."""
    starts = torch.randint(len(ids) - length, (B * T // length, 1), generator=generator)
    return ids[starts + torch.arange(length)]


@torch.no_grad()
def evaluate(
    model: GraniteMoeForCausalLM, ids: torch.Tensor, length: int = T
) -> tuple[float, list]:
    """Mean loss in nats a token over consecutive windows, and each layer's share of each expert."""
    rows = ids[: len(ids) // length * length].view(-1, length)
    device = next(model.parameters()).device
    losses, counts = [], 0
    for row in rows.split(B * T // length):
        output = model(row.to(device), labels=row.to(device), output_router_logits=True)
        losses.append(output.loss.item() * len(row))
        top = [x.topk(model.config.num_experts_per_tok).indices for x in output.router_logits]
        bins = model.config.num_local_experts
        counts = counts + torch.stack([t.flatten().cpu().bincount(minlength=bins) for t in top])
    return sum(losses) / len(rows), (counts / counts.sum(dim=1, keepdim=True)).tolist()


def baselines(train: torch.Tensor, held_out: torch.Tensor) -> dict[str, float]:
    """Held-out nats a token of counting: single tokens, and pairs mixed with single tokens."""
    single = train.bincount(minlength=VOCAB).double() + 1
    single /= single.sum()
    pairs = (
        (train[:-1] * VOCAB + train[1:]).bincount(minlength=VOCAB**2).view(VOCAB, VOCAB).double()
    )
    seen = pairs.sum(dim=1, keepdim=True)
    mixed = (pairs + 100 * single) / (seen + 100)
    return {
        "unigram": -single[held_out].log().mean().item(),
        "bigram": -mixed[held_out[:-1], held_out[1:]].log().mean().item(),
    }


def learn(
    model: GraniteMoeForCausalLM, optimizer: torch.optim.Optimizer, batch: torch.Tensor, coef: float
) -> tuple[float, float]:
    """One step; returns the cross-entropy and the balance loss (K where balance is perfect)."""
    config = model.config
    output = model(batch, labels=batch, output_router_logits=True)
    # Pooled over the layers, as the model's own loss is, balance would let one layer send all to
    # its expert 0 and the next all to its expert 1; so each layer is held to it by itself.
    k, layers = config.num_experts_per_tok, config.num_hidden_layers
    aux = sum(load_balancing_loss((x,), k) for x in output.router_logits) / layers
    (output.loss + coef * aux).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return output.loss.item(), aux.item()


def options(args: argparse.Namespace) -> dict:
    """What must be the same when a run goes on."""
    start = str(args.start or "")
    names = ("tokens", "aux_coef", "seed", "dense")
    return {"start": start, **{name: getattr(args, name) for name in names}}


def resume(
    args: argparse.Namespace,
    model: GraniteMoeForCausalLM,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> tuple[int, int, list[list]]:
    """Load what the run goes on from: --start's model, then what it wrote before an interruption.

    Returns the run's first step, the next one, and the rows of the log so far.
    """
    first, state, log = 0, args.out / "state.part", args.out / "log.csv"
    layers = range(model.config.num_hidden_layers)
    rows = [[*COLUMNS, *(f"max_share_{i}" for i in layers), *(f"min_share_{i}" for i in layers)]]
    if args.start:
        model.load_state_dict(load_file(args.start / "model.safetensors"))
        seen = json.loads((args.start / "report.json").read_text())["tokens_seen"]
        first = int(seen // (B * T))
        generator.manual_seed(first + args.seed)
        log = log if state.exists() else args.start / "log.csv"
    step = first
    if state.exists():
        saved = torch.load(state, weights_only=True)
        if saved["options"] != options(args):
            begun = f"was begun with {saved['options']}, not {options(args)}"
            sys.exit(f"train.py: error: --out {args.out}: {begun}")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        step = saved["step"]
    if args.start or state.exists():
        read = list(csv.reader(log.open()))[1:]
        rows += [row for row in read if int(row[0]) <= step * B * T]
    return first, step, rows


def tell(text: str) -> None:
    """On a terminal: what is being done, on a line that the next thing overwrites."""
    if sys.stderr is not None and sys.stderr.isatty():
        print(f"\r{text:<60}", end="\r", file=sys.stderr, flush=True)


def line(row: list[float], speed: float, left: str) -> str:
    """A row of the log under HEAD."""
    tokens, train_loss, held_loss, aux, most, least = row[: len(COLUMNS)]
    losses = f"{tokens:>10,}{train_loss:>8.3f}{held_loss:>10.3f}{aux:>9.3f}"
    return f"{losses}{most:>9.1%}{least:>9.1%}{speed:>10,.0f}{left:>9}"


def train(
    args: argparse.Namespace, config: GraniteMoeConfig, ids: torch.Tensor, held: torch.Tensor
) -> GraniteMoeForCausalLM:
    """Run until args.tokens are seen; returns the trained model."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = new_model(config, args.seed).to(device)
    optimizer, generator = new_optimizer(model), torch.Generator().manual_seed(args.seed)
    first, step, rows = resume(args, model, optimizer, generator)
    print(HEAD, flush=True)
    steps, losses, state = math.ceil(args.tokens / (B * T)), [], args.out / "state.part"
    began, before = time.monotonic(), step
    while step < steps:
        rate = power_rate((step + 1) * B * T, steps * B * T, first * B * T)
        for group in optimizer.param_groups:
            group["lr"] = group["scale"] * rate
        length = T // 2 if step < first + (steps - first) * 5 / 6 else T
        batch = windows(ids, length, generator).to(device)
        loss, aux = learn(model, optimizer, batch, args.aux_coef)
        losses, step = [*losses, loss], step + 1
        tell(f"step {step} of {steps}: loss {loss:.3f}")
        if step % 100 == 0:
            tell(f"step {step} of {steps}: trying it on held-out files")
            held_loss, shares = evaluate(model, held[: 16 * B * T], length)
            most, least = [max(x) for x in shares], [min(x) for x in shares]
            numbers = [np.mean(losses), held_loss, aux, max(most), min(least), *most, *least]
            rows.append([step * B * T, *(round(float(x), 4) for x in numbers)])
            speed = (step - before) * B * T / (time.monotonic() - began)
            left = f"{(steps - step) * B * T / speed / 60:.0f} min"
            tell("")
            print(line(rows[-1], speed, left), flush=True)
            with (args.out / "log.csv").open("w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(rows)
            losses = []
            parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            parts |= {"generator": generator.get_state(), "step": step, "options": options(args)}
            torch.save(parts, f"{state}.new")
            Path(f"{state}.new").replace(state)
    return model


def prompt_windows(texts: list[str], tokenizer: Tokenizer, rng: random.Random) -> torch.Tensor:
    """(2 * B, T / 2) ids that begin as prompts do: at an unindented line, cut after some words."""
    sizes, rows = list(itertools.accumulate(map(len, texts))), []
    begin = re.compile(r"^(?=[^\s#])", re.MULTILINE)
    while len(rows) < 2 * B:
        (text,) = rng.choices(texts, cum_weights=sizes)
        if line := begin.search(text, rng.randrange(len(text))):
            words = re.split(r"(?<=\s)(?=\S)", text[line.start() : line.start() + 4 * T])
            cut = rng.randint(1, 4)
            pieces = tokenizer.encode_batch(["".join(words[:cut]), "".join(words[cut:])])
            ids = [i for piece in pieces for i in piece.ids]
            rows += [ids[: T // 2]] if len(ids) >= T // 2 else []
    return torch.tensor(rows)


def practise_prompts(
    args: argparse.Namespace,
    model: GraniteMoeForCausalLM,
    texts: list[str],
    tokenizer: Tokenizer,
    ids: torch.Tensor,
) -> None:
    """The last stage: every second step on beginnings of prompts, the others as before.

    Windows from random places hardly ever begin with "def ", and a model knows least about what has
    no context: without this stage it goes on from "def " with more of "def".
    """
    optimizer, device = new_optimizer(model), model.model.norm.weight.device
    generator, rng = torch.Generator().manual_seed(1), random.Random(1)
    steps, losses = int(args.prompt_tokens / (B * T)), []
    for step in range(steps):
        for group in optimizer.param_groups:
            rate = PROMPT_RATE * min(1.0, step / 50) * 0.01 ** (step / steps)
            group["lr"] = group["scale"] * rate
        batch = windows(ids, T, generator) if step % 2 else prompt_windows(texts, tokenizer, rng)
        losses.append(learn(model, optimizer, batch.to(device), args.aux_coef)[0])
        if step % 100 == 99:
            means = f"{np.mean(losses[-100::2]):.3f}, of windows {np.mean(losses[-99::2]):.3f}"
            print(f"{step + 1} of {steps} steps: loss of prompts {means}", flush=True)


def save(model: GraniteMoeForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    """Write the checkpoint in the form in which the released ones are written."""
    fields = dataclasses.asdict(model.config)
    for ours in ("attention_backend", "experts_backend"):
        del fields[ours]
    head = {"architectures": ["GraniteMoeForCausalLM"], "model_type": "granitemoe"}
    tensors = {n: p.detach().bfloat16().contiguous() for n, p in model.state_dict().items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    ends = {name: 0 for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    kind = {name: SPECIAL[0] for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    others = {"attention_bias": False, "rope_scaling": None, "use_cache": True}
    reads = {"model_input_names": ["input_ids", "attention_mask"], "model_max_length": T}
    reads |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, data in (
        ("config.json", head | fields | others),
        ("generation_config.json", ends),
        ("tokenizer_config.json", kind | reads),
    ):
        (out / name).write_text(json.dumps(data, indent=2) + "\n")


def save_report(
    args: argparse.Namespace,
    model: GraniteMoeForCausalLM,
    ids: torch.Tensor,
    held: torch.Tensor,
    held_bytes: int,
) -> None:
    held_loss, shares = evaluate(model, held)
    train_loss, _ = evaluate(model, ids[: len(held)])
    report = {
        "tokens_seen": args.tokens + args.prompt_tokens,
        "training_tokens": len(ids),
        "held_out_tokens": len(held),
        "parameters": model.num_parameters(),
        "active_parameters": model.num_parameters(active=True),
        "train_loss": train_loss,
        "held_out_loss": held_loss,
        "held_out_bits_per_byte": held_loss / math.log(2) * len(held) / held_bytes,
        **{f"{name}_held_out_loss": loss for name, loss in baselines(ids, held).items()},
        "expert_shares": shares,
    }
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One line, and not the whole usage."""
        self.exit(2, f"train.py: error: {message}\n")


def folder(text: str) -> Path:
    """A type for argparse. An empty one would be the folder that one is in."""
    if not text:
        raise argparse.ArgumentTypeError("must be a folder, got ''")
    return Path(text)


def number(text: str) -> float:
    """A type for argparse."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1e12:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number from 0 to 1e12, got {text!a:.60}")


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=folder, required=True, help="the folder to write")
    parser.add_argument(
        "--start", type=folder, help="a folder of this script's whose model goes on"
    )
    parser.add_argument("--tokens", type=number, default=18e6, help="how many tokens to have seen")
    parser.add_argument("--prompt-tokens", type=number, default=2.5e6, help="of the last stage")
    parser.add_argument("--aux-coef", type=number, default=0.02, help="of the balance loss")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the weights and of the windows that it reads"
    )
    parser.add_argument("--dense", action="store_true", help="one expert of the active width")
    args = parser.parse_args()
    done = not (args.out / "state.part").exists()  # which goes last
    if done and (args.out / "model.safetensors").exists():
        parser.error(f"--out {args.out}: holds a finished model; name another folder")
    for name in ("model.safetensors", "report.json", "log.csv") if args.start else ():
        if not (args.start / name).is_file():
            parser.error(f"--start {args.start}: has no {name}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror.lower()}")
    torch.set_flush_denormal(True)
    one = {"num_local_experts": 1, "num_experts_per_tok": 1, "intermediate_size": 256}
    config = dataclasses.replace(CONFIG, **(one if args.dense else {}))
    texts, held_texts = standard_library()
    tokenizer_file = HERE / "tokenizer.json"
    if tokenizer_file.exists():
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    else:
        tokenizer = train_tokenizer(texts)
        tokenizer.save(str(tokenizer_file))
    ids, held = encode(tokenizer, texts, CUTS), encode(tokenizer, held_texts)
    held_bytes = sum(len(text.encode()) for text in held_texts)
    sizes = f"{len(ids)} training tokens, {len(held)} held out ({held_bytes} bytes)"
    print(sizes, *(f"{k} {v:.3f}" for k, v in baselines(ids, held).items()), sep="; ", flush=True)
    model = train(args, config, ids, held)
    practise_prompts(args, model, texts, tokenizer, ids)
    model.cpu()
    save(model, tokenizer, args.out)
    save_report(args, model, ids, held, held_bytes)
    (args.out / "state.part").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
