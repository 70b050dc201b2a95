"""Damage checkpoints at random and see how the command takes it.

    python tests/fuzz.py N SEED        N cases; exits with 1 if one of them went wrong
    python tests/fuzz.py 1 SEED I      case I alone, with what it printed

Each mutation says what must become of its case: "reject" (one line of error and exit status 1),
"accept" (the text of the undamaged checkpoint) or "either" (one of the two, or another text, since
a changed number can be as good as the old one). A case runs in a process of its own, with 10
seconds and 4 GiB, and never may it end in a traceback, a signal or a hang.
"""

import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from changes import (
    INF,
    REQUIRED,
    Change,
    both,
    config,
    edit,
    header,
    put,
    shard_of,
    shards,
    spelled,
    tensors,
)  # fmt: skip
from conftest import (
    CONFIG,
    HEAD,
    INDEX,
    SHARDS,
    WEIGHTS,
    Outcome,
    checkpoint,
    command,
    forked,
    pack,
    problem,
    unpack,
    write_files,
)  # fmt: skip
from test_chat import HOSTILE, TEMPLATES
from test_checkpoint import ACCEPTED
from test_checkpoint import ROWS as CHECKPOINTS
from test_tokenizer import LEFTOVERS
from test_tokenizer import ROWS as TOKENIZERS

from files.checkpoint import WRAPPERS

ARGS = ("--max-new-tokens", "3", "a 1")
JUNK = [None, True, -1, 0, "x", "8", [], {}, [8], INF, -INF, INF - INF, 10**30, 10**400, 1e40]
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_local_experts")
HARMLESS = {  # variants of the corpus that go together: one of each line, in this order
    "config": ("as it is", "rope_parameters", "rope_scaling null", "no dtype", "ints for floats",
               "activation_function", "head_dim", "unknown keys", "largest context",
               "generation_config"),
    "weights": ("as it is", "stored tied head", "bfloat16", "mixed dtypes", "both spellings",
                "the other spelling", "names in another order", "spaces after the header",
                "names without model.", "buffers", "the tied head alone"),
    "shards": ("as it is", "shards", "index without metadata", "index with odd metadata",
               "index names an absent head", "index names an absent head's shard"),
}  # fmt: skip
TEMPLATE = "chat_template.jinja"  # a folder that has one is asked with --chat
SAYING = (  # templates that write the one message as it is
    "{{ messages[0].content }}", "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    "{%- set x = messages[-1] -%}\n{{ x.content | trim }}",
    "{% generation %}{{ messages[0]['content'] }}{% endgeneration %}",
    "{{ messages | map(attribute='content') | join }}{{ tools if tools }}",
)  # fmt: skip


def flip(name: str, rng: Random, end: int | None = None) -> Change:
    """Some bytes of a file, before `end`, replaced, removed or inserted."""

    def act(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(end or len(data))
            data[at : at + rng.randint(0, 1)] = rng.randbytes(rng.randint(0, 2))
        (folder / name).write_bytes(data)

    return act


def cut(name: str, rng: Random) -> Change:
    return lambda folder: os.truncate(folder / name, rng.randrange((folder / name).stat().st_size))


def entry(rng: Random, change: Callable[[dict], object]) -> Change:
    """Change a random tensor's entry in the header."""
    return header(lambda h: change(h[rng.choice([n for n in h if n != "__metadata__"])]))


def not_finite(rng: Random) -> Change:
    def change(state: dict) -> None:
        flat = state[rng.choice([*state])].view(-1)
        flat[rng.randrange(len(flat))] = rng.choice((INF, -INF, INF - INF))

    return tensors(change)


def a_name_twice(rng: Random) -> Change:
    entries, data = unpack(checkpoint()[WEIGHTS])
    name = rng.choice([*entries])
    again = f'{{"{name}": {json.dumps(entries[name])}, {json.dumps(entries)[1:]}'
    return put(WEIGHTS, pack(again.encode(), data))


def tokenizer_junk(rng: Random) -> Change:
    def change(data: dict) -> None:
        part = rng.choice((data, data["model"], data["model"]["vocab"], data["added_tokens"][0]))
        part[rng.choice([*part])] = rng.choice([*JUNK[:9], 2**32 - 1, 299, {"type": "x"}])

    return edit("tokenizer.json", change)


def wrapped(rng: Random) -> Change:
    prefix = "".join(rng.sample([*WRAPPERS], rng.randint(1, 2)))
    return spelled(lambda name: prefix + name)


def wrong_end(rng: Random) -> Change:
    end = rng.choice([True, "x", {}, [8, "x"], INF, 1e40])  # an integer, if too large, never comes
    return put("generation_config.json", json.dumps({"eos_token_id": end}).encode())


def template_junk(rng: Random) -> Change:
    """A good template of which a piece is gone, doubled, or another's."""
    text, other = (rng.choice([*TEMPLATES.values(), *SAYING]) for _ in range(2))
    at, to = sorted(rng.randrange(len(text)) for _ in range(2))
    made = rng.choice((text[:at] + text[to:], text[:to] + text[at:], text[:at] + other[at:]))
    return put(TEMPLATE, made.encode())


REJECT: list[Callable[[Random], Change]] = [
    lambda rng: put(TEMPLATE, rng.choice([*HOSTILE.values()])[0].encode()),
    wrapped,
    wrong_end,
    lambda rng: put("adapter_config.json", rng.randbytes(rng.randint(0, 9))),
    lambda rng: both(config(tie_word_embeddings=False), ACCEPTED["index names an absent head"]),
    lambda rng: rng.choice(CHECKPOINTS + TOKENIZERS)[1],
    lambda rng: config(rng.choice(REQUIRED)),
    lambda rng: config(**{rng.choice(REQUIRED): rng.choice(JUNK)}),
    lambda rng: config(**{(n := rng.choice(SIZES)): CONFIG[n] + rng.choice((-1, 1, 4, 999))}),
    lambda rng: cut("config.json", rng),
    lambda rng: cut("tokenizer.json", rng),
    lambda rng: cut(WEIGHTS, rng),
    lambda rng: tensors(lambda t: t.pop(rng.choice([*t]))),
    lambda rng: tensors(lambda t: t.update({(n := rng.choice([*t])) + rng.choice("xyz.1"): t[n]})),
    lambda rng: tensors(lambda t: t.update({HEAD: t[rng.choice([*t])] + 1})),
    lambda rng: header(lambda h: h.update({rng.randbytes(9).hex() + "\x1b": h.popitem()[1]})),
    lambda rng: entry(rng, lambda e: e.update(dtype=rng.choice(["BF16", "F64", "I8", *JUNK]))),
    lambda rng: entry(rng, lambda e: e.update(shape=rng.choice([e["shape"] * 2, [2**63], *JUNK]))),
    lambda rng: entry(rng, lambda e: e.update(data_offsets=[
        o + rng.choice((-4, 4, 128, 2**40, 2**64)) for o in e["data_offsets"]])),
    lambda rng: entry(rng, lambda e: e.update(data_offsets=rng.choice(JUNK))),
    not_finite,
    a_name_twice,
    lambda rng: shards(lambda i: i["weight_map"].pop(rng.choice([*i["weight_map"]]))),
    lambda rng: both(shards(), cut(rng.choice((*SHARDS, INDEX)), rng)),
    lambda rng: shard_of(rng.choice([*unpack(checkpoint()[WEIGHTS])[0]]), rng.choice(JUNK)),
]  # fmt: skip
EITHER: list[Callable[[Random], Change]] = [
    lambda rng: flip("config.json", rng),
    lambda rng: flip("tokenizer.json", rng),
    lambda rng: flip(WEIGHTS, rng, end=2000),
    lambda rng: flip(WEIGHTS, rng),
    lambda rng: both(shards(), flip(INDEX, rng)),
    lambda rng: both(shards(), flip(rng.choice(SHARDS), rng, end=1000)),
    lambda rng: config(**{(n := rng.choice(REQUIRED)): CONFIG[n] * rng.choice((0.5, 2))}),
    lambda rng: config(**{rng.choice([*CONFIG, "rope_parameters", "head_dim"]): rng.choice(JUNK)}),
    tokenizer_junk,
    template_junk,
]
ACCEPT: list[Callable[[Random], Change]] = [
    lambda rng: both(
        *(ACCEPTED[rng.choice(names)] for names in HARMLESS.values()),
        LEFTOVERS[rng.choice([*LEFTOVERS])],
        rng.choice((lambda folder: None, put(TEMPLATE, rng.choice(SAYING).encode()))),
    ),
]
MUTATIONS = {"reject": REJECT, "either": EITHER, "accept": ACCEPT}


def run_case(folder: Path, change: Change) -> Outcome:
    change(write_files(folder, checkpoint()))
    chat = ["--chat"] if (folder / TEMPLATE).exists() else []
    outcome = forked(command("--model", str(folder), *chat, *ARGS), seconds=10)
    shutil.rmtree(folder)
    if chat:  # which shows a reply alone
        outcome = outcome._replace(out=ARGS[-1] + outcome.out)
    return outcome


def verdict(label: str, outcome: Outcome, good: str) -> str:
    """What went wrong with a case, or nothing."""
    if outcome.status < 0:
        return "hang" if outcome.status == -14 else "signal"
    if outcome.status not in (0, 1) or "Traceback" in outcome.err:
        return "traceback"
    if outcome.status == 1 and (fault := problem(outcome, 1)):
        return fault
    if label == "reject" and outcome.status == 0:
        return "must be rejected, was accepted"
    if label == "accept" and (outcome.status == 1 or outcome.out != good):
        return "must be accepted, was refused or changed"
    return ""


def main(count: int, seed: int, only: int | None = None) -> int:
    torch.set_num_threads(1)  # a fork of a process that has used more would wait for them
    wrong, ended = Counter(), Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz") as base:
        os.chdir(base)
        good = run_case(Path("good"), lambda folder: None)
        for number in range(count) if only is None else [only]:
            rng = Random(f"{seed}/{number}")
            label = rng.choices([*MUTATIONS], (5, 3, 2))[0]
            outcome = run_case(Path("model"), rng.choice(MUTATIONS[label])(rng))
            ended[label, outcome.status] += 1
            if fault := verdict(label, outcome, good.out):
                wrong[fault.partition(":")[0]] += 1
                print(f"case {number} ({label}): {fault}: {outcome.err[-300:]}")
            if only is not None:
                print(label, outcome)
    print(f"{count} cases of seed {seed}: {sum(wrong.values())} wrong {dict(wrong) or ''}")
    for (label, status), times in sorted(ended.items()):
        print(f"    {label}: {times} ended with status {status}")
    return 1 if wrong or good.status else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
