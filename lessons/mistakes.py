"""For puzzles.py and faster.py: the likely mistakes of each piece, in words.

A mistake is what is said of it, and what a piece that has made it gives. A piece that gives the
same in every case has made it. Where several slips give the same, the sentence names them all.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from answers import PUZZLES, attend, balance, choose, keep, norm, one_expert, step, turn
from torch import Tensor

import granitemoe
from granitemoe import experts_loop

Mistakes = Iterator[tuple[str, object]]  # what is said of one, and what it gives


# ------------------------------------------------------------------------------- norm and positions
def of_norm(x: Tensor, weight: Tensor, eps: float) -> Mistakes:
    wide, one = x.float(), torch.ones_like(weight)
    square, mean = wide.square(), wide.square().mean(-1, True)

    def over(root: Tensor) -> Tensor:
        return (wide / root).to(x.dtype) * weight

    outside = "eps is added to the root. Add it to the mean, under the root."
    yield outside, over(mean.sqrt() + eps)
    yield "eps is missing.", over(mean.sqrt())
    yield "eps is missing: this is always 0.000001, or the like.", over((mean + 1e-6).sqrt())
    yield "eps is missing: this is always 0.00001, or the like.", over((mean + 1e-5).sqrt())
    yield "eps is the least mean here (clamp, max). Add it.", over(mean.clamp(min=eps).sqrt())
    yield "eps is the least root here (clamp, max). Add it.", over(mean.sqrt().clamp(min=eps))
    yield "eps is squared.", over((mean + eps * eps).sqrt())
    yield "eps is subtracted. Add it.", over((mean - eps).sqrt())
    yield "eps is added to the sum. Add it to the mean.", over((mean + eps / len(weight)).sqrt())
    yield "eps is added to the result. Add it to the mean.", over(mean.sqrt()) + eps
    total = square.sum(-1, True)
    of_sum = "This is the root of the sum. Take the mean."
    yield of_sum, over((total + eps).sqrt())
    yield of_sum, over(total.sqrt() + eps)
    yield of_sum, over(total.sqrt().clamp(min=eps))
    yield of_sum, over(total.sqrt())
    missing = "The root is missing."
    yield missing, over(mean + eps)
    yield missing, over(mean)
    yield "The root is taken twice.", over((mean + eps).sqrt().sqrt())
    yield "It multiplies by the root. Divide by it.", over((mean + eps).rsqrt())
    yield "It multiplies by the mean. Divide by its root.", over(1 / (mean + eps))
    yield "Here x is not divided: this is weight over the root.", over((mean + eps).sqrt() * wide)
    yield "The division is missing.", x * weight
    yield from other_means(x, weight, eps)
    yield "The weight is missing.", norm(x, one, eps)
    yield "1 + weight is Gemma's. Multiply by weight alone.", norm(x, one, eps) * (1 + weight)
    yield "The weight is added. Multiply by it.", norm(x, one, eps) + weight
    yield "It divides by the weight. Multiply by it.", norm(x, one, eps) / weight
    yield "The weight is applied twice.", norm(x, weight, eps) * weight
    yield "The weight comes in before the mean. Multiply by it last.", norm(x * weight, one, eps)
    yield from rounded_norm(x, weight, eps)


def other_means(x: Tensor, weight: Tensor, eps: float) -> Mistakes:
    """Something else than the mean of squares over D."""
    wide = x.float()
    square, sizes, centred = wide.square(), wide.abs(), wide - wide.mean(-1, True)

    def over(root: Tensor, x: Tensor = wide) -> Tensor:
        return (x / root).to(weight.dtype) * weight

    layer_norm = "The mean of x is subtracted. That is LayerNorm."
    spread = wide.var(-1, keepdim=True, correction=0)
    yield layer_norm, over((spread + eps).sqrt(), centred)
    yield layer_norm, over((wide.var(-1, keepdim=True) + eps).sqrt(), centred)
    yield layer_norm, over((square.mean(-1, True) + eps).sqrt(), centred)
    deviation = "It divides by the standard deviation. Do not subtract the mean."
    for correction in (0, 1):
        spread = wide.var(-1, keepdim=True, correction=correction)
        for root in ((spread + eps).sqrt(), spread.sqrt(), spread.sqrt() + eps):
            yield deviation, over(root)
    over_T = "The mean is over T. Take it over D, the last dimension."
    yield over_T, over((square.mean(1, True) + eps).sqrt())
    yield (
        "The mean is over B. Take it over D, the last dimension.",
        over((square.mean(0, True) + eps).sqrt()),
    )
    all_tokens = "The mean is over all tokens. Take one for each token."
    yield all_tokens, over((square.mean() + eps).sqrt())
    yield all_tokens, over((square.mean((1, 2), True) + eps).sqrt())
    yield all_tokens, over((square.mean((0, 1), True) + eps).sqrt())
    of_sizes = "This is the mean of the sizes (abs). Square, then mean, then root."
    for mean in (sizes, (square + eps).sqrt(), sizes + eps):
        yield of_sizes, over(mean.mean(-1, True))
    late = "The mean is squared. Square first, then take the mean."
    yield late, over((wide.mean(-1, True).square() + eps).sqrt())
    yield (
        "It divides by the mean of x. Square, then mean, then root.",
        over(wide.mean(-1, True) + eps),
    )
    yield "It divides by the largest. Take the root of the mean square.", over(sizes.amax(-1, True))


def rounded_norm(x: Tensor, weight: Tensor, eps: float) -> Mistakes:
    """What rounds at the wrong place, which shows in bfloat16 alone."""
    wide, mean = x.float(), x.square().mean(-1, True)
    normed = F.rms_norm(wide, weight.shape, eps=eps)
    early = "The weight comes in before rounding. Round to x's dtype first, then multiply."
    yield early, (normed * weight.float()).to(x.dtype)
    rounded = "The mean, or the root, is computed in x's dtype. Go to float32 first: x.float()."
    yield rounded, x * (mean + eps).rsqrt() * weight
    yield rounded, x / (mean + eps).sqrt() * weight
    yield rounded, (x * (mean + eps).rsqrt() * weight.float()).to(x.dtype)
    root = (wide.square().mean(-1, True) + eps).sqrt()
    yield "The root is rounded to x's dtype before the division.", x / root.to(x.dtype) * weight
    yield (
        "The root is rounded to x's dtype before the division.",
        x * (1 / root).to(x.dtype) * weight,
    )


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, C) turned, with a cosine and a sine for each pair (T, C/2)."""
    u, v = x.chunk(2, dim=-1)
    return torch.cat((u * cos - v * sin, v * cos + u * sin), dim=-1)


def neighbours(x: Tensor) -> Tensor:
    """The first of each two neighbours, then the second of each."""
    return torch.cat((x[..., ::2], x[..., 1::2]), dim=-1)


def apart(x: Tensor) -> Tensor:
    """The reverse of neighbours."""
    return torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)


def of_rotary(x: Tensor, positions: Tensor, theta: float) -> Mistakes:
    C, half = x.shape[3], x.shape[3] // 2
    i, at, counted = torch.arange(half), positions[:, None].float(), torch.arange(len(positions))
    angles = at * theta ** (-2 * i / C)
    cos, sin = angles.cos(), angles.sin()
    u, v = x.chunk(2, dim=-1)
    yield "The angles have the wrong sign.", turn(x, -positions, theta)
    yield "theta is not used: this is always 10,000.", turn(x, positions, 10000.0)
    yield (
        "Positions are taken from the first one. Use them as they are.",
        turn(x, positions - positions[0], theta),
    )
    spread = theta ** -torch.linspace(0, 1, half)
    yield (
        "The exponents end at -1 (linspace). The last is -2i/C with i = C/2 - 1.",
        turned(x, *two(at * spread)),
    )
    yield "Each position is one too large.", turn(x, positions + 1, theta)
    yield "Each position is one too small.", turn(x, positions - 1, theta)
    yield "Tokens are numbered from 0. Use positions.", turn(x, counted, theta)
    yield (
        "Tokens are numbered from the first position on. Use positions.",
        turn(x, positions[0] + counted, theta),
    )
    yield "The exponent is -i/C. It must be -2i/C.", turn(x, positions, theta**0.5)
    yield "The exponent is -4i/C (or -2i over C/2). It must be -2i/C.", turn(x, positions, theta**2)
    yield "The exponent has the wrong sign. It must be -2i/C.", turn(x, positions, 1 / theta)
    yield "i begins at 1. It must begin at 0.", turned(x, *two(at * theta ** (-2 * (i + 1) / C)))
    yield "The frequencies are in reverse.", turned(x, cos.flip(1), sin.flip(1))
    yield "All pairs turn alike. The angle depends on i.", turned(x, *two(at.expand(-1, half)))
    yield "theta is multiplied. Raise it to the power.", turned(x, *two(at * theta * (-2 * i / C)))
    yield (
        "It turns by the frequency alone. Multiply it by the position.",
        turned(x, *two(angles / at.clamp(min=1))),
    )
    yield (
        "The position is divided by theta. Raise theta to the power.",
        turned(x, *two(at / theta * (2 * i / C))),
    )
    paired = "The pairs are neighbours. Pair x_i with x_(i + C/2)."
    yield paired, apart(turn(neighbours(x), positions, theta))
    yield paired, turn(neighbours(x), positions, theta)
    yield paired, apart(turn(x, positions, theta))
    mirror = torch.cat((u, v.flip(3)), dim=-1)
    back = turn(mirror, positions, theta)
    yield (
        "x_i is paired from the end. Pair it with x_(i + C/2).",
        torch.cat((back[..., :half], back[..., half:].flip(3)), -1),
    )
    each = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    twice = [y.repeat_interleave(2, -1) for y in (cos, sin)]
    rolled = torch.cat((-v, u), dim=-1)
    yield (
        "Angles are repeated for neighbours. Pair i and i + C/2 share one.",
        x * twice[0] + rolled * twice[1],
    )
    pairs = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    yield (
        "The partners are neighbours, the angles are not. Pair x_i with x_(i + C/2).",
        x * each[0] + pairs * each[1],
    )
    yield "The minus is missing.", torch.cat((u * cos + v * sin, v * cos + u * sin), -1)
    yield "There is a minus too many.", torch.cat((u * cos - v * sin, v * cos - u * sin), -1)
    yield "Cosine and sine are swapped.", turned(x, sin, cos)
    yield "The two halves are swapped.", turn(x, positions, theta).roll(half, -1)
    yield "The halves are taken in reverse.", turned(x.roll(half, -1), cos, sin)
    yield "The second half is not turned.", torch.cat((u * cos - v * sin, v), -1)
    yield "The first half is not turned.", torch.cat((u, v * cos + u * sin), -1)
    first = u * cos - v * sin
    yield (
        "The new first half is used for the second. Keep the old one.",
        torch.cat((first, v * cos + first * sin), -1),
    )
    yield (
        "The results are interleaved. The first halves come first.",
        apart(turn(x, positions, theta)),
    )
    yield "It is turned twice.", turn(turn(x, positions, theta), positions, theta)
    yield "The sine's part is missing.", torch.cat((u * cos, v * cos), -1)
    yield (
        "The angle is in turns. Do not multiply it by 2 pi.",
        turned(x, *two(angles * 2 * torch.pi)),
    )
    yield "The angle is in degrees. It is in radians.", turned(x, *two(angles * torch.pi / 180))
    yield from rounded_angles(x, positions, theta)


def rounded_angles(x: Tensor, positions: Tensor, theta: float) -> Mistakes:
    """What shows in bfloat16 alone."""
    exact = theta ** (-2 * torch.arange(x.shape[3] // 2) / x.shape[3])
    at, rough = positions[:, None].float(), exact.to(x.dtype)
    said = "Angles are computed in x's dtype. Far positions need float32."
    for angles in (at.to(x.dtype) * rough, at.to(x.dtype) * exact, at * rough, at * rough.float()):
        yield said, turned(x, *two(angles)).to(x.dtype)
    late = (at * exact).to(x.dtype)
    yield "Angles are rounded to x's dtype. Take cosine and sine in float32.", turned(x, *two(late))


def two(angles: Tensor) -> tuple[Tensor, Tensor]:
    return angles.cos(), angles.sin()


# -------------------------------------------------------------------------------------- attention
def of_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Mistakes:
    (H, T, C), (G, S) = q.shape[1:], k.shape[1:3]
    yield "Scores are divided by the root of C. Multiply by scale.", attend(q, k, v, C**-0.5)
    yield (
        "Scores are divided by the root of C too. Multiply by scale alone.",
        attend(q, k, v, scale * C**-0.5),
    )
    yield "scale is not used.", attend(q, k, v, 1.0)
    yield "Scores are divided by scale. Multiply by it.", attend(q, k, v, 1 / scale)
    yield "scale is applied twice.", attend(q, k, v, scale**2)
    yield "The root of scale is taken.", attend(q, k, v, scale**0.5)
    yield (
        "scale comes in after the softmax. Multiply the scores by it.",
        attend(q, k, v, 1.0) * scale,
    )
    yield "There is no mask: queries see keys ahead.", attend(q, k, v, scale, S)
    by_T = "It is causal by T, but keys are more than queries. The last query must see all S keys."
    yield by_T, attend(q, k, v, scale, 0)
    yield "Each query sees one key too many.", attend(q, k, v, scale, S - T + 1)
    heads_k, heads_v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))
    scores = (q @ heads_k.mT * scale).float()
    seen = torch.ones(T, S, dtype=torch.bool).tril(S - T)

    def mean(hidden: Tensor, value: float, dim: int = -1) -> Tensor:
        return scores.masked_fill(hidden, value).softmax(dim).nan_to_num(0.0).to(q.dtype) @ heads_v

    few = "Each query sees one key too few: not the last of its own."
    yield few, mean(~seen.tril(S - T - 1), -torch.inf)
    yield few, attend(q, k, v, scale, S - T - 1)
    yield few, mean(~seen.tril(S - T - 1), -1e9)
    future = "The mask is the wrong way round: queries see only what is ahead."
    yield future, mean(seen, -torch.inf)
    yield future, mean(seen, -1e9)
    yield future, mean(seen.tril(S - T - 1), -torch.inf)
    yield future, mean(~seen.triu(S - T), -torch.inf)
    yield (
        "The mask is the wrong way round, by T too.",
        mean(torch.ones(T, S, dtype=torch.bool).tril(0), -torch.inf),
    )
    weights = scores.softmax(-1).to(q.dtype)
    late = "Keys ahead are set to 0 after the softmax. Mask their scores before it."
    yield late, weights.masked_fill(~seen, 0) @ heads_v
    zero = "Masked scores are 0, which is a score like others. Make them -inf."
    yield zero, mean(~seen, 0.0)
    yield zero, mean(~torch.ones(T, S, dtype=torch.bool).tril(0), 0.0)
    yield (
        "1 is added to masked scores. Make them -inf.",
        (scores + ~seen).softmax(-1).to(q.dtype) @ heads_v,
    )
    yield (
        "The mask is added as 0 and 1. Make masked scores -inf.",
        (scores + seen).softmax(-1).to(q.dtype) @ heads_v,
    )
    large = "The masked scores are not small enough: a score may be less. Make them -inf."
    for value in (-1.0, -10.0, -20.0, -50.0, -100.0):
        yield large, mean(~seen, value)
        yield large, (scores + value * ~seen).softmax(-1).to(q.dtype) @ heads_v
    tiny = "The masked scores are tiny, not very negative. Make them -inf."
    yield tiny, mean(~seen, 1e-9)
    axis = "The softmax is over the queries (dim=-2). Take it over the keys, dim=-1."
    yield axis, mean(~seen, -torch.inf, -2)
    yield (
        "The softmax is over the heads. Take it over the keys, dim=-1.",
        mean(~seen, -torch.inf, 1),
    )
    yield "The softmax is missing.", scores.masked_fill(~seen, 0).to(q.dtype) @ heads_v
    yield (
        "These are sigmoids. Take the softmax.",
        scores.sigmoid().masked_fill(~seen, 0).to(q.dtype) @ heads_v,
    )
    yield "exp is not divided by its sum.", scores.exp().masked_fill(~seen, 0).to(q.dtype) @ heads_v
    share = scores.masked_fill(~seen, 0)
    yield (
        "Scores are divided by their sum. Take the softmax.",
        (share / share.sum(-1, True)).to(q.dtype) @ heads_v,
    )
    yield (
        "The softmax is taken twice.",
        scores.masked_fill(~seen, -torch.inf).softmax(-1).softmax(-1).to(q.dtype) @ heads_v,
    )
    even = seen / seen.sum(-1, True)
    yield "All keys have the same weight.", even.to(q.dtype) @ heads_v
    tiled = attend(q, *(x.repeat(1, H // G, 1, 1) for x in (k, v)), scale)
    yield "Query head h uses head h % G. It must be head h // (H/G).", tiled
    yield (
        "Keys go by h // (H/G), values by h % G. Both go by h // (H/G).",
        attend(q, heads_k, v.repeat(1, H // G, 1, 1), scale),
    )
    yield (
        "Values go by h // (H/G), keys by h % G. Both go by h // (H/G).",
        attend(q, k.repeat(1, H // G, 1, 1), heads_v, scale),
    )
    yield (
        "All query heads use key head 0. It must be head h // (H/G).",
        attend(q, k[:, :1], v[:, :1], scale),
    )
    last = [x[:, (torch.arange(H) * 0 + torch.arange(H).clamp(max=G - 1))] for x in (k, v)]
    yield (
        "Query head h uses head h, or the last. It must be head h // (H/G).",
        attend(q, *last, scale),
    )
    first = [x[:, torch.arange(H) // G % G] for x in (k, v)]
    yield "Query head h uses head h // G. It must be head h // (H/G).", attend(q, *first, scale)
    yield "Keys and values are swapped.", attend(q, v, k, scale)
    yield "It gives a mean of keys. Take the values.", attend(q, k, k, scale)
    yield "Scores are of queries and values. Take the keys.", attend(q, v, v, scale)
    newest = "The queries see the last T keys alone. The older ones count too."
    yield newest, attend(q, k[:, :, -T:], v[:, :, -T:], scale)
    yield (
        "k is reshaped. Transpose it: k.transpose(-1, -2).",
        reshaped(q, heads_k, heads_v, scale, ~seen),
    )
    nothing = "0 * -inf is nan: it stands where the mask multiplies. Use masked_fill."
    yield nothing, torch.full_like(q, torch.nan)
    offset = "The mask's offset has the wrong sign. The last query must see all S keys."
    for sees in (torch.ones(T, S).tril(T - S), torch.ones(T, S).triu(T - S + 1)):
        yield offset, mean(sees == 0, -torch.inf)
        first_too = (sees != 0) | (torch.arange(S) == 0)
        yield offset, mean(~first_too, -torch.inf)
    right = attend(q, k, v, scale)
    mixed = right.transpose(1, 2).reshape(right.shape)
    yield "Heads and tokens are mixed by a reshape. Use transpose.", mixed


def reshaped(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor) -> Tensor:
    scores = (q @ k.reshape(*k.shape[:2], k.shape[3], k.shape[2]) * scale).float()
    return scores.masked_fill(hidden, -torch.inf).softmax(-1).to(q.dtype) @ v


def of_step(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, *n: float) -> Mistakes:
    (y, *whole), L, T = step(q, k, v, keys, values, *n), keys.shape[2], q.shape[2]
    (scale, theta), at = n, torch.arange(L, L + T)
    new = [x[:, :, L:] for x in whole]

    def numbered(for_q: Tensor, for_k: Tensor) -> tuple:
        """The step with positions for the queries and for the keys."""
        all_k = torch.cat((keys, turn(k, for_k, theta)), dim=2)
        return attend(turn(q, for_q, theta), all_k, whole[1], scale), all_k, whole[1]

    def seeing(*keys_and_values: Tensor, scale: float = scale, last: int | None = None) -> tuple:
        """The step with other keys and values, or another scale or mask, in attention alone."""
        return attend(turn(q, at, theta), *keys_and_values, scale, last), *whole

    from_0 = torch.arange(T)
    yield "New tokens are numbered from 0 again. Number them from L.", numbered(from_0, from_0)
    yield "New tokens are numbered from L + 1. Number them from L.", numbered(at + 1, at + 1)
    yield "New tokens are numbered from L - 1. Number them from L.", numbered(at - 1, at - 1)
    yield (
        "All new tokens have the number L. Number them L, L + 1, ...",
        numbered(at * 0 + L, at * 0 + L),
    )
    yield (
        "New tokens have the number L + T, or L + T - 1. Number them L, L + 1, ...",
        numbered(at * 0 + L + T - 1, at * 0 + L + T - 1),
    )
    yield (
        "New tokens have the number L + T, or L + T - 1. Number them L, L + 1, ...",
        numbered(at + T, at + T),
    )
    yield "New tokens are numbered from T. Number them from L.", numbered(from_0 + T, from_0 + T)
    heads = from_0 + keys.shape[1]
    yield "L is read from the heads' dimension. It is keys.shape[2].", numbered(heads, heads)
    yield (
        "L is read from the batch. It is keys.shape[2].",
        numbered(from_0 + len(keys), from_0 + len(keys)),
    )
    ends = from_0 + 1 - T
    yield "They are numbered from the end. Number them from 0, all together.", numbered(ends, ends)
    yield (
        "They are numbered from the end. Number them from 0, all together.",
        numbered(-ends, -ends),
    )
    yield "The queries are numbered from 0 again. Number them from L.", numbered(from_0, at)
    yield "The new keys are numbered from 0 again. Number them from L.", numbered(at, from_0)
    yield "The angles have the wrong sign.", numbered(-at, -at)
    yield "The queries are turned the wrong way.", numbered(-at, at)
    yield "The queries are not turned.", numbered(at * 0, at)
    yield "The new keys are not turned.", numbered(at, at * 0)
    yield "Neither queries nor new keys are turned.", numbered(at * 0, at * 0)
    yield "The new keys are not turned in what is returned.", (y, torch.cat((keys, k), 2), whole[1])
    yield "The new tokens are not in the keys and values returned.", (y, keys, values)
    yield "The old tokens are not in the keys and values returned.", (y, *new)
    again = torch.cat((turn(keys, torch.arange(L), theta), new[0]), dim=2)
    yield "The old keys are turned again.", (seeing(again, whole[1])[0], again, whole[1])
    yield "The old keys are turned again, in attention.", seeing(again, whole[1])
    every = torch.cat((keys, k), dim=2)
    moved = turn(every, torch.arange(L + T), theta)
    yield "The old keys are turned again.", (seeing(moved, whole[1])[0], moved, whole[1])
    moved = turn(every, torch.arange(L + T).clamp(max=T - 1), theta)
    yield "The old keys are turned again.", (seeing(moved, whole[1])[0], moved, whole[1])
    turned_v = torch.cat((values, turn(v, at, theta)), dim=2)
    yield (
        "The values are turned. Only queries and keys are.",
        (seeing(whole[0], turned_v)[0], whole[0], turned_v),
    )
    if L:
        yield "The queries see only the new tokens.", seeing(*new)
        yield "The queries see only the old tokens.", seeing(keys, values, last=L + T)
    else:
        yield "The queries see only the new tokens.", (y, *whole)
        yield "The queries see only the old tokens.", (y * 0, *whole)
    front = [torch.cat((x[:, :, L:], x[:, :, :L]), dim=2) for x in whole]
    swapped = "The new tokens stand before the old ones."
    yield swapped, (seeing(*front)[0], *front)
    yield swapped, (y, *front)
    yield "There is no mask: new tokens see those after them.", seeing(*whole, last=L + T)
    by_T = "It is causal by T: the mask must begin at the old tokens' end."
    yield by_T, seeing(*whole, last=0)
    yield "Each query sees one key too many.", seeing(*whole, last=L + 1)
    yield "Each query sees one key too few: not its own.", seeing(*whole, last=L - 1)
    yield (
        "Scores are divided by the root of C. Multiply by scale.",
        seeing(*whole, scale=q.shape[3] ** -0.5),
    )
    yield "scale is not used.", seeing(*whole, scale=1.0)
    yield "scale is applied twice.", seeing(*whole, scale=scale**2)
    groups = q.shape[1] // k.shape[1]
    yield (
        "Query head h uses head h % G. It must be head h // (H/G).",
        seeing(*(x.repeat(1, groups, 1, 1) for x in whole)),
    )
    yield (
        "All query heads use key head 0. It must be head h // (H/G).",
        seeing(*(x[:, :1] for x in whole)),
    )
    yield "scale and theta are exchanged.", exchanged(q, k, keys, whole[1], scale, theta)
    yield (
        "The values before are not in attention's order: the new ones stand first.",
        (seeing(whole[0], front[1])[0], whole[0], front[1]),
    )
    yield "Keys and values are swapped in attention.", seeing(whole[1], whole[0])
    yield "Keys and values are swapped in what is returned.", (y, whole[1], whole[0])
    sign = [turn(x, at, 1 / theta) for x in (q, k)]
    wrong = torch.cat((keys, sign[1]), dim=2)
    yield (
        "The exponent of theta has the wrong sign.",
        (attend(sign[0], wrong, whole[1], scale), wrong, whole[1]),
    )
    yield (
        "The exponent is -i/C. It must be -2i/C.",
        other_pairs(q, k, keys, whole[1], scale, lambda x: turn(x, at, theta**0.5)),
    )
    paired = "The pairs are neighbours. Pair x_i with x_(i + C/2)."
    yield (
        paired,
        other_pairs(q, k, keys, whole[1], scale, lambda x: apart(turn(neighbours(x), at, theta))),
    )
    said = "Angles are computed in the inputs' dtype. Far positions need float32."
    rough_at, exact = (
        at[:, None].to(q.dtype),
        theta ** (-2 * torch.arange(q.shape[3] // 2) / q.shape[3]),
    )
    for angles in (rough_at * exact.to(q.dtype), rough_at.float() * exact):
        wrong = other_pairs(
            q, k, keys, whole[1], scale, lambda x, a=angles: turned(x, *two(a)).to(x.dtype)
        )
        yield said, wrong


def exchanged(q: Tensor, k: Tensor, keys: Tensor, values: Tensor, *n: float) -> tuple:
    at = torch.arange(keys.shape[2], keys.shape[2] + q.shape[2])
    all_k = torch.cat((keys, turn(k, at, n[0])), dim=2)
    return attend(turn(q, at, n[0]), all_k, values, n[1]), all_k, values


def other_pairs(
    q: Tensor,
    k: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    act: Callable[[Tensor], Tensor],
) -> tuple:
    """The step with another way to turn."""
    all_k = torch.cat((keys, act(k)), dim=2)
    return attend(act(q), all_k, values, scale), all_k, values


# ----------------------------------------------------------------------------- mixture of experts
def of_route(x_ND: Tensor, router_ED: Tensor, K: int) -> Mistakes:
    weights_NK, ids_NK = choose(x_ND, router_ED, K)
    logits_NE, N = (x_ND @ router_ED.T).float(), len(x_ND)
    probs_NE, top_NK = logits_NE.softmax(-1), logits_NE.gather(1, ids_NK)
    all_NK = probs_NE.gather(1, ids_NK)
    same = x_ND.dtype

    def by(weights: Tensor, ids: Tensor = ids_NK) -> tuple:
        return weights.to(same), ids

    yield "This is the softmax over all experts. Take it over the chosen K.", by(all_NK)
    yield "The softmax is taken twice.", by(all_NK.softmax(dim=-1))
    yield "The softmax is taken twice.", by(weights_NK.float().softmax(dim=-1))
    tokens = "The softmax is over the tokens (dim=0). Take it over the chosen K, dim=-1."
    yield tokens, by(top_NK.softmax(0))
    yield tokens, by(logits_NE.softmax(0).gather(1, ids_NK))
    of_tokens = logits_NE.softmax(0).topk(K)
    yield tokens, by(*of_tokens)
    yield tokens, by(of_tokens.values / of_tokens.values.sum(-1, True), of_tokens.indices)
    yield "These are sigmoids. Take the softmax.", by(top_NK.sigmoid())
    shares = top_NK.sigmoid()
    yield "These are sigmoids over their sum. Take the softmax.", by(shares / shares.sum(-1, True))
    yield "These are the scores. Take their softmax.", by(top_NK)
    yield "Scores are divided by their sum. Take their softmax.", by(top_NK / top_NK.sum(-1, True))
    yield "These are exp of the scores. Divide them by their sum.", by(top_NK.exp())
    yield "These are logarithms. Take the softmax.", by(top_NK.log_softmax(-1))
    yield (
        "All weights are 1/K. Take the softmax of the K scores.",
        by(torch.full_like(top_NK, 1 / K)),
    )
    yield "All weights are 1. Take the softmax of the K scores.", by(torch.ones_like(top_NK))
    yield "Scores are divided by the root of D.", by((top_NK * x_ND.shape[1] ** -0.5).softmax(-1))
    yield "Scores are divided by K.", by((top_NK / K).softmax(-1))
    yield "Weights are multiplied by K.", by(weights_NK * K)
    yield "Weights are divided by K.", by(weights_NK / K)
    yield "The largest must come first.", by(weights_NK.flip(1), ids_NK.flip(1))
    yield "Probabilities of all are divided by K. Take the softmax of the K scores.", by(all_NK / K)
    likeness = F.normalize(x_ND.float(), dim=-1) @ F.normalize(router_ED.float(), dim=-1).T
    nearest = likeness.topk(K)
    yield (
        "These are cosines. Take the dot products.",
        by(nearest.values.softmax(-1), nearest.indices),
    )
    folded = (x_ND @ router_ED.reshape(x_ND.shape[1], -1)).float().topk(K)
    yield "router_ED is reshaped. Transpose it.", by(folded.values.softmax(-1), folded.indices)
    rolled = logits_NE.argsort(-1, descending=True).roll(-1, -1)[:, :K]
    yield "The best expert is left out.", by(logits_NE.gather(1, rolled).softmax(-1), rolled)
    next_best = logits_NE.argsort(-1, descending=True)[:, 1 : K + 1]
    if next_best.shape == ids_NK.shape:
        rolled = next_best
    yield "The best expert is left out.", by(logits_NE.gather(1, rolled).softmax(-1), rolled)
    order = ids_NK.argsort(1)
    yield (
        "They are sorted by expert. The largest must come first.",
        by(weights_NK.gather(1, order), ids_NK.gather(1, order)),
    )
    yield (
        "Weights are in the order of experts, numbers in that of scores.",
        by(weights_NK.gather(1, order)),
    )
    yield (
        "Numbers are in the order of experts, weights in that of scores.",
        by(weights_NK, ids_NK.gather(1, order)),
    )
    yield "Weights are in reverse: the best has the smallest.", by(weights_NK.flip(1))
    yield "Numbers are in reverse.", by(weights_NK, ids_NK.flip(1))
    least = logits_NE.topk(K, largest=False)
    small = "It chooses the smallest scores. Choose the largest."
    yield small, by(least.values.softmax(-1), least.indices)
    yield small, by(least.values.flip(1).softmax(-1), least.indices.flip(1))
    yield small, by((-least.values).softmax(-1), least.indices)
    signless = logits_NE.abs().topk(K)
    yield (
        "It chooses the largest sizes (abs). Choose the largest scores.",
        by(logits_NE.gather(1, signless.indices).softmax(-1), signless.indices),
    )
    yield (
        "It chooses the largest sizes (abs). Choose the largest scores.",
        by(signless.values.softmax(-1), signless.indices),
    )
    yield "Experts are numbered from 1. Number them from 0.", by(weights_NK, ids_NK + 1)
    first = torch.arange(K).expand(N, K)
    yield (
        "It takes the first K experts. Choose the K largest scores.",
        by(logits_NE[:, :K].softmax(-1), first),
    )
    yield "The numbers are places among the chosen. Return the experts'.", by(weights_NK, first)
    best = ids_NK[:, :1].expand(N, K)
    yield "It takes the best K times.", by(torch.full_like(top_NK, 1 / K), best)
    ranks = logits_NE.argsort(1, descending=True).argsort(1)[:, :K]
    yield "These are ranks. Return the numbers of the chosen experts.", by(weights_NK, ranks)


def of_expert(x_ND: Tensor, gate_up_PD: Tensor, down_DF: Tensor) -> Mistakes:
    D, width = down_DF.shape
    yield "Gate and up are swapped.", one_expert(x_ND, gate_up_PD.roll(width, 0), down_DF)
    rows_PD = gate_up_PD.view(width, 2, D).transpose(0, 1).flatten(0, 1)
    yield "The gate is the first half, not every other row.", one_expert(x_ND, rows_PD, down_DF)
    yield (
        "The gate is the first half, not every other row.",
        one_expert(x_ND, rows_PD.roll(width, 0), down_DF),
    )
    g, u = F.linear(x_ND, gate_up_PD).chunk(2, dim=-1)
    y_ND = one_expert(x_ND, gate_up_PD, down_DF)
    for said, hidden in wrong_hidden(g, u):
        yield said, F.linear(hidden, down_DF)
    yield "down_DF is transposed.", F.silu(g) * u @ down_DF.reshape(width, D)
    yield "silu comes after down. Apply it to g, before.", F.silu(F.linear(g * u, down_DF))
    folded = F.silu((h := x_ND @ gate_up_PD.reshape(D, -1))[:, :width]) * h[:, width:]
    yield "gate_up_PD is reshaped. Transpose it.", F.linear(folded, down_DF)
    late = F.linear(x_ND, gate_up_PD[width - 1 : -1])
    yield "The up begins one row too early.", F.linear(F.silu(g) * late, down_DF)
    quick = F.linear(x_ND, gate_up_PD[:width])
    yield "The gate is used for both.", F.linear(F.silu(quick) * quick, down_DF)
    yield "x is added. The stream is the layer's business.", y_ND + x_ND
    yield "silu is applied to the result too.", F.silu(y_ND)
    yield "The result is multiplied by x.", y_ND * x_ND
    yield "The result is divided by the root of F.", y_ND * width**-0.5


def wrong_hidden(g: Tensor, u: Tensor) -> Mistakes:
    """What may stand in place of silu(g) * u."""
    yield "silu is missing.", g * u
    yield "This is relu. Take silu(g) = g * sigmoid(g).", g.relu() * u
    for approximate in ("none", "tanh"):
        yield "This is gelu. Take silu(g) = g * sigmoid(g).", F.gelu(g, approximate=approximate) * u
    yield "This is sigmoid(g). Take silu(g) = g * sigmoid(g).", g.sigmoid() * u
    yield "This is gelu. Take silu(g) = g * sigmoid(g).", g * (1.702 * g).sigmoid() * u
    yield "This is F.glu: g * sigmoid(u). Take silu(g) * u.", g * u.sigmoid()
    yield "This is sigmoid alone. Take silu(g) * u, with silu(g) = g * sigmoid(g).", g.sigmoid()
    yield "This is tanh. Take silu(g) = g * sigmoid(g).", g.tanh() * u
    yield "This is softmax. Take silu(g) = g * sigmoid(g).", g.softmax(-1) * u
    yield "This is softplus. Take silu(g) = g * sigmoid(g).", F.softplus(g) * u
    yield "silu is applied to the product. Apply it to g alone.", F.silu(g * u)
    yield "silu is applied to u too. Apply it to g alone.", F.silu(g) * F.silu(u)
    yield "silu(g) and u are added. Multiply them.", F.silu(g) + u
    yield "u is missing: multiply silu(g) by u.", F.silu(g)
    yield "silu(g) is missing: only u is there.", u
    yield "It is silu(u), without g.", F.silu(u)
    yield "silu(g) is multiplied by g. Multiply it by u.", F.silu(g) * g
    yield "silu is applied twice.", F.silu(F.silu(g)) * u
    yield "silu(g) is g * sigmoid(g), not sigmoid(g) * u * u.", g.sigmoid() * u * u
    yield "silu(g) is g * sigmoid(g). Here it is g * sigmoid(-g).", g * (-g).sigmoid() * u
    yield "silu(g) is g * sigmoid(g). Here it is g * sigmoid(u).", g * u.sigmoid() * u
    yield "1 is added to u.", F.silu(g) * (u + 1)


def of_experts(x: Tensor, gate_up: Tensor, down: Tensor, w: Tensor, ids: Tensor) -> Mistakes:
    (E, D, width), (N, K) = down.shape, w.shape

    def loop(w: Tensor, ids: Tensor = ids, x: Tensor = x) -> Tensor:
        return experts_loop(x, gate_up, down, w, ids)

    yield "The weights are not applied (or added up over K: that is 1).", loop(w**0)
    yield "The weights are applied twice.", loop(w * w)
    yield (
        "The weights' softmax is taken. They are weights already.",
        loop(w.float().softmax(-1).to(w.dtype)),
    )
    yield "Only the first choice of a token is in the sum.", loop(w[:, :1], ids[:, :1])
    yield "Only the first choice is used, with weight 1.", loop(w[:, :1] ** 0, ids[:, :1])
    yield (
        (
            "Only the last choice of a token is in the sum. (y[tokens] += rows counts a repeated "
            "token once. Use index_add_.)"
        ),
        loop(w[:, -1:], ids[:, -1:]),
    )
    yield (
        "The first choice of a token is left out.",
        loop(w[:, 1:], ids[:, 1:]) if K > 1 else loop(w) * 0,
    )
    yield (
        "The last choice of a token is left out.",
        loop(w[:, :-1], ids[:, :-1]) if K > 1 else loop(w) * 0,
    )
    yield "The weight of the first choice is used for all.", loop(w[:, :1].expand_as(w))
    yield "The weight of the last choice is used for all.", loop(w[:, -1:].expand_as(w))
    yield "The weights are in reverse.", loop(w.flip(1))
    yield (
        "Weights go by the order of experts. They go by that of choices.",
        loop(w.gather(1, ids.argsort(1).argsort(1))),
    )
    yield "Each weight is divided by K. They sum to 1 already.", loop(w) / K
    yield "The sum is divided by E.", loop(w) / E
    yield "The choices' mean is taken, without weights.", loop(w**0) / K
    yield (
        "The weights are on the input. Multiply the expert's output.",
        weighted_inputs(x, gate_up, down, w, ids),
    )
    lost = torch.isin(ids, ids.max())
    yield "The last expert is left out.", loop(w * ~lost)
    flat = torch.arange(N * K) % N
    rows = loop(w.new_ones(N * K, 1), ids.reshape(-1, 1), x[flat]) * w.reshape(-1, 1)
    yield (
        "Choice p belongs to token p // K, not p % N.",
        torch.zeros_like(x).index_add(0, flat, rows),
    )
    folded = gate_up.reshape(E, D, 2 * width).transpose(1, 2)
    yield "gate_up_EPD is reshaped. Transpose it.", experts_loop(x, folded, down, w, ids)
    shifted = loop(w * (ids + 1 < E), (ids + 1) % E)
    yield "The ends are beginnings: each expert gets the rows of the one before it.", shifted
    yield (
        "The rows are not gathered in the order of experts.",
        unsorted_rows(x, gate_up, down, w, ids),
    )
    yield from wrong_choices(x, gate_up, down, w, ids)
    replaces = "A later expert replaces what an earlier one gave. Add them."
    for last in (ids == ids[:, -1:], ids == ids.amax(1, True)):
        yield replaces, loop(w * last)
    yield replaces, loop(w * (ids == ids.amin(1, True)))
    order, tokens, _ = granitemoe.sort_by_expert(ids, E)
    rows = loop(w.new_ones(len(order), 1), ids.flatten()[order, None], x[tokens])
    y = (rows.view(*w.shape, -1) * w[..., None]).sum(dim=1)
    yield "Rows are in the order of experts. Put them back in the order of tokens.", y
    y = (rows * w.flatten()[order, None]).view(*w.shape, -1).sum(dim=1)
    yield "Rows are in the order of experts. Put them back in the order of tokens.", y
    y = torch.zeros_like(x).index_add_(0, tokens, rows * w.flatten()[:, None])
    yield "Weights are in the order of tokens, rows in that of experts.", y
    y = (rows[order].view(*w.shape, -1) * w[..., None]).sum(dim=1)
    yield "Rows are put back by order; that takes its inverse, order.argsort().", y
    tokens_of = torch.arange(N * K) % N
    mixed = loop(w.new_ones(N * K, 1), ids.reshape(-1, 1), x[tokens_of]).view(*w.shape, -1)
    lined = torch.stack([rows_of(x, gate_up, down, ids) * w[..., None]]).flatten(0, 2)
    yield (
        "The rows lie token by token: view them as (N, K, D), not (K, N, D).",
        lined.view(K, N, -1).sum(0),
    )
    shares = torch.zeros(E, dtype=w.dtype).index_add(0, ids.flatten(), w.flatten())
    yield "Weights are divided by their sum over an expert's tokens.", loop(w / shares[ids])
    yield "Weights are divided by their sum over tokens.", loop(w / w.sum(0))
    yield (
        "Expert e takes column e of the weights. Take that of the choice.",
        loop(w.gather(1, ids % K)),
    )
    yield (
        "Everything is 0: a sum is thrown away (index_add without _, or y[ids][mask] += ...).",
        x * 0,
    )
    merged = merge(x, gate_up, down, w, ids)
    yield "The matrices are averaged first. Experts are not linear: weigh their outputs.", merged
    yield "Choice p belongs to token p // K, not p % N.", (mixed * w[..., None]).sum(dim=1)
    yield "x is added. The stream is the layer's business.", loop(w) + x
    swapped = gate_up.roll(width, 1)
    yield "Gate and up are swapped.", experts_loop(x, swapped, down, w, ids)
    rows_EPD = gate_up.view(E, width, 2, D).transpose(1, 2).flatten(1, 2)
    yield (
        "The gate is the first half, not every other row.",
        experts_loop(x, rows_EPD, down, w, ids),
    )
    g, u = torch.einsum("nd,nkpd->nkp", x, gate_up[ids]).chunk(2, dim=-1)
    early = F.silu(g * w[..., None]) * u
    yield (
        "The weights are on g. Multiply the expert's output.",
        torch.einsum("nkf,nkdf->nd", early, down[ids]),
    )
    for said, hidden in wrong_hidden(g, u):
        yield said, torch.einsum("nkf,nkdf,nk->nd", hidden, down[ids], w)
    rough = torch.zeros_like(x)
    for e in range(E):
        rough = rough + loop(w * (ids == e))
    yield "The sum is kept in x's dtype, which rounds after each expert. Keep it in float32.", rough
    rough = torch.zeros_like(x)
    for choice in range(K):
        rough = rough + loop(w[:, choice, None], ids[:, choice, None])
    yield "The sum is kept in x's dtype, which rounds after each expert. Keep it in float32.", rough


def rows_of(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor) -> Tensor:
    """What each choice's expert gives, without weights: (N, K, D)."""
    g, u = torch.einsum("nd,nkpd->nkp", x, gate_up[ids]).chunk(2, dim=-1)
    return torch.einsum("nkf,nkdf->nkd", F.silu(g) * u, down[ids])


def merge(x: Tensor, gate_up: Tensor, down: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    gate_up_NPD = torch.einsum("nk,nkpd->npd", w, gate_up[ids])
    g, u = torch.einsum("nd,npd->np", x, gate_up_NPD).chunk(2, dim=-1)
    down_NDF = torch.einsum("nk,nkdf->ndf", w, down[ids])
    return torch.einsum("nf,ndf->nd", F.silu(g) * u, down_NDF)


def unsorted_rows(x: Tensor, gate_up: Tensor, down: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """Experts in their order, on tokens in that of the choices; put back as if both were sorted."""
    order = ids.flatten().argsort(stable=True)
    repeated = x.repeat_interleave(w.shape[1], dim=0)
    ones = w.new_ones(len(order), 1)
    rows = experts_loop(repeated, gate_up, down, ones, ids.flatten()[order, None])
    return (rows[order.argsort()].view(*w.shape, -1) * w[..., None]).sum(dim=1)


def weighted_inputs(x: Tensor, gate_up: Tensor, down: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    K = w.shape[1]
    inputs = (x[:, None] * w[..., None]).flatten(0, 1)
    rows = experts_loop(inputs, gate_up, down, w.new_ones(len(inputs), 1), ids.reshape(-1, 1))
    return rows.view(len(x), K, -1).sum(dim=1)


def wrong_choices(x: Tensor, gate_up: Tensor, down: Tensor, w: Tensor, ids: Tensor) -> Mistakes:
    """Sums over other experts than the chosen ones."""
    E, (N, K) = len(down), w.shape

    def loop(w: Tensor, ids: Tensor) -> Tensor:
        return experts_loop(x, gate_up, down, w, ids)

    yield "Expert 0 is left out.", loop(w * (ids != 0), ids)
    yield "The last expert is left out.", loop(w * (ids != E - 1), ids)
    returned = "`return` stands inside the loop: only the first expert is in the sum."
    yield returned, loop(w * (ids == 0), ids)
    yield returned, loop(w * (ids == ids.min()), ids)
    yield (
        "Only the last expert is in the sum. Add to y within the loop.",
        loop(w * (ids == E - 1), ids),
    )
    yield (
        "Only the last expert is in the sum. Add to y within the loop.",
        loop(w * (ids == ids.max()), ids),
    )
    yield "Only K experts are tried. Loop over all E.", loop(w * (ids < K), ids)
    yield "Choice k uses expert k. Use expert_ids_NK.", loop(w, torch.arange(K).expand(N, K))
    yield "All tokens use the first token's experts.", loop(w, ids[:1].expand(N, K))
    yield "Each expert's number is one too large.", loop(w, (ids + 1) % E)
    yield "Each expert's number is one too small.", loop(w, (ids - 1) % E)
    every = torch.arange(E).expand(N, E)
    yield (
        "Each expert sees all tokens. Only those that chose it count.",
        loop(w.new_ones(N, E), every),
    )
    yield "All experts use the same matrices, those of expert 0.", loop(w, ids * 0)
    firsts = torch.isin(ids, first_run(ids, E))
    yield (
        "The loop ends at the first expert without tokens. Go on: continue, not break.",
        loop(w * firsts, ids),
    )
    of_E = torch.zeros(E, dtype=w.dtype).index_add(0, ids.flatten(), w.flatten()).expand(N, E)
    yield "Each expert has one weight for all tokens.", loop(of_E, every)
    soft = torch.zeros(N, E).scatter(1, ids, w.float()).softmax(-1).to(w.dtype)
    yield "Experts that were not chosen get a weight (a softmax over zeros).", loop(soft, every)
    picked = w[:, :1].expand(N, E)
    yield "Each expert sees all tokens. Only those that chose it count.", loop(picked, every)


def first_run(ids: Tensor, E: int) -> Tensor:
    """The experts before the first without tokens."""
    idle = ids.flatten().bincount(minlength=E) == 0
    return torch.arange(E)[idle.cumsum(0) == 0]


def of_balance(logits_NE: Tensor, K: int) -> Mistakes:
    (N, E), loss = logits_NE.shape, balance(logits_NE, K)
    probs = logits_NE.softmax(-1)
    chosen = torch.zeros_like(probs).scatter_(1, probs.topk(K).indices, 1.0)
    p_E, f_E = probs.mean(0), chosen.mean(0)
    yield "It must be E times the sum over experts (not their mean).", loss / E
    yield "It is multiplied by E twice.", loss * E
    yield "Only the first choice of a token is counted. Count all K.", balance(logits_NE, 1)
    yield "It is divided by K.", loss / K
    yield "It is multiplied by K.", loss * K
    yield "It is divided by E and K: multiply by E.", loss / E / K
    yield "It is multiplied by K, not by E.", loss / E * K
    yield "It is divided by K twice.", loss / K / K
    yield "One of the two means is a sum over tokens.", loss * N
    yield "Both means are sums over tokens.", loss * N * N
    yield (
        "It is f * f: choices twice. Multiply choices by mean probabilities.",
        E * (f_E * f_E).sum(),
    )
    yield (
        "It is p * p: probabilities twice. Multiply choices by mean probabilities.",
        E * (p_E * p_E).sum(),
    )
    yield "The product is missing: these are the choices' shares.", E * f_E.sum()
    yield "The choices are missing: these are the probabilities alone.", E * p_E.sum()
    yield "Shares are added. Multiply them.", E * (f_E + p_E).sum()
    tokens = "The softmax is over the tokens (dim=0). Take it over the experts, dim=-1."
    other = logits_NE.softmax(0)
    yield tokens, E * (f_E * other.mean(0)).sum()
    of_other = torch.zeros_like(probs).scatter_(1, other.topk(K).indices, 1.0)
    yield tokens, E * (of_other.mean(0) * other.mean(0)).sum()
    kept = probs * chosen
    some = "Probabilities are of the chosen alone. Take the mean over all."
    yield some, E * (f_E * kept.mean(0)).sum()
    yield some, E * (f_E * (kept / kept.sum(-1, True)).mean(0)).sum()
    each = "Choices and probabilities are multiplied token by token. Take both means first."
    yield each, E * (chosen * probs).mean(0).sum()
    yield each, (chosen * probs).sum(-1).mean()
    yield each, (chosen * probs).sum() / N * E / K
    yield "These are the scores. Take their softmax.", E * (f_E * logits_NE.mean(0)).sum()
    yield "These are sigmoids. Take the softmax.", E * (f_E * logits_NE.sigmoid().mean(0)).sum()
    softmax_of_mean = logits_NE.mean(0).softmax(0)
    yield (
        "It is the softmax of mean scores. Take the mean of softmaxes.",
        E * (f_E * softmax_of_mean).sum(),
    )
    least = torch.zeros_like(probs).scatter_(1, probs.topk(K, largest=False).indices, 1.0)
    yield (
        "It counts the smallest scores. A token chooses its K best.",
        E * (least.mean(0) * p_E).sum(),
    )
    above = (probs > 1 / E).to(probs.dtype)
    yield "It counts experts over 1/E. A token chooses its K best.", E * (above.mean(0) * p_E).sum()
    yield "log is taken of the probabilities.", E * (f_E * probs.log()).mean(0).sum()
    squares = "It is p * p: probabilities twice. Multiply choices by mean probabilities."
    yield squares, E * K * (p_E * p_E).sum()
    yield squares, E * probs.square().mean(0).sum()
    yield (
        "The choices' share is squared. Multiply choices by mean probabilities.",
        E * (f_E / K).square().sum(),
    )
    yield "log is taken of the probabilities.", -E * (f_E * logits_NE.log_softmax(-1).mean(0)).sum()
    short = torch.bincount(probs.topk(K).indices.flatten()) / N
    if len(short) in (1, E):
        yield (
            "The counts lack the last experts. bincount takes minlength=E.",
            E * (short * p_E).sum(),
        )
    else:
        yield "The counts lack the last experts. bincount takes minlength=E.", loss * torch.nan
    yield "1 is subtracted.", loss - 1
    yield "K is subtracted.", loss - K
    yield "The sign is wrong.", -loss
    yield (
        "The means are over experts. Take them over tokens.",
        E * (chosen.mean(1) * probs.mean(1)).sum(),
    )
    yield (
        "The means are over experts. Take them over tokens.",
        E * chosen.mean(1).mul(probs.mean(1)).mean(),
    )
    yield "log is taken of the probabilities.", E * (f_E * probs.log().mean(0)).sum()
    shares = f_E / f_E.sum() - 1 / E
    yield (
        "This is the variance of the load. Multiply choices by probabilities.",
        E * shares.square().sum(),
    )


# -------------------------------------------------------------------------------------- the next id
def of_top_p(logits: Tensor, p: float) -> Mistakes:
    probs, right = logits.softmax(dim=-1), keep(logits, p)
    down, order = probs.sort(descending=True, stable=True)
    mass = down.cumsum(-1)

    def of(kept: Tensor, by: Tensor = down) -> Tensor:
        """What stays, in the order of the ids."""
        kept = torch.zeros_like(probs).scatter(-1, order, by * kept)
        return kept / kept.sum(-1, True)

    best = torch.arange(logits.shape[1]) == 0
    yield "What stays is not divided by its sum.", probs * (right > 0)
    dropped = "The id with which the sum reaches p is dropped. It stays."
    for fewer in (mass <= p, mass < p):
        for kept in (fewer, fewer | best):
            yield dropped, of(kept)
            yield dropped, of(kept).nan_to_num(0.0)
            yield dropped, torch.zeros_like(probs).scatter(-1, order, down * kept)
    more = mass - down < p
    one_more = torch.cat((torch.ones_like(more[:, :1]), more[:, :-1]), dim=-1)
    yield "One id too many stays.", of(one_more)
    one_fewer = torch.cat((more[:, 1:], torch.zeros_like(more[:, :1])), dim=-1)
    yield "One id too few stays.", of(one_fewer)
    yield "One id too few stays.", of(one_fewer | best)
    yield "The likeliest id is dropped. It always stays.", of(more & ~best)
    low = "This is min-p: ids of at least p times the largest. Add up probabilities."
    yield low, of(down >= p * down[:, :1])
    yield low, of(down > p * down[:, :1])
    by_rows = down.cumsum(0)
    yield "The sum is over the rows (dim=0). Take it over the ids.", of(by_rows - down < p)
    alone = "Each probability is compared with p. Compare their sum."
    yield alone, of(down >= p)
    yield alone, of((down >= p) | best)
    yield alone, of(down >= 1 - p)
    yield alone, of(down < p)
    rising = probs.sort(stable=True)
    up = rising.values.cumsum(-1)
    least = "The sum begins with the unlikeliest. Begin with the likeliest."
    for kept in (up - rising.values < p, up <= p, up < p):
        some = torch.zeros_like(probs).scatter(-1, rising.indices, rising.values * kept)
        yield least, some / some.sum(-1, True)
    plain = probs.cumsum(-1)
    unsorted = "They are not sorted before they are added up."
    for kept in (plain - probs < p, plain <= p, plain < p):
        yield unsorted, probs * kept / (probs * kept).sum(-1, True)
    order_of = "They are sorted. Put them in the order of ids."
    yield order_of, right.sort(descending=True).values
    yield order_of, right.sort(descending=True).values * more.sum(-1, True).clamp(1, 1)
    mixed = right.sort(descending=True, stable=True).values.gather(-1, order)
    yield "Put back by gather with order; that takes scatter, or its inverse.", mixed
    wrong = probs * more / (probs * more).sum(-1, True)
    yield "What stays is marked in sorted order, but used in the order of ids.", wrong
    yield "This keeps 1 - p. Keep p.", keep(logits, 1 - p) if p < 1 else keep(logits, 1e-9)
    count = max(1, round(p * logits.shape[1]))
    yield (
        "This keeps a share p of the ids. Their probabilities must add up to p.",
        of(torch.arange(logits.shape[1]) < count),
    )
    twice = "The softmax is taken of probabilities. Divide them by their sum."
    yield twice, (probs * (right > 0)).softmax(-1)
    yield twice, probs.masked_fill(right == 0, -torch.inf).softmax(-1)
    yield twice, right.softmax(-1)
    yield (
        "The dropped logits are 0. Make them -inf.",
        logits.masked_fill(right == 0, 0.0).softmax(-1),
    )
    yield "Nothing is dropped.", probs
    yield "Only the likeliest id stays.", of(best)
    yield "These are ones. Give probabilities.", (right > 0).to(probs.dtype)
    yield (
        "What stays is equally likely. Keep the probabilities' proportions.",
        (right > 0) / (right > 0).sum(-1, True),
    )
    yield "What stays is divided by p. Divide it by its sum.", probs * (right > 0) / p
    value = probs.masked_fill(right == 0, 2.0).amin(-1, True)
    tied = probs * (probs >= value)
    yield "Of equally likely ids more stay than needed.", tied / tied.sum(-1, True)
    yield "These are logits. Give probabilities.", logits.masked_fill(right == 0, -torch.inf)
    yield (
        "The softmax is over the rows (dim=0). Take it over the ids.",
        keep(logits.softmax(0).log(), p),
    )
    columns = logits.softmax(0)
    firm, places = columns.sort(descending=True, stable=True)
    some = torch.zeros_like(probs).scatter(-1, places, firm * (firm.cumsum(-1) - firm < p))
    yield "The softmax is over the rows (dim=0). Take it over the ids.", some / some.sum(-1, True)
    count = int(p * logits.shape[1])
    share = of(torch.arange(logits.shape[1]) < count)
    yield "This keeps a share p of the ids. Their probabilities must add up to p.", share
    large = probs * (probs >= p)
    yield (
        "Each probability is compared with p. Compare their sum.",
        large / large.sum(-1, True).clamp(min=1e-9),
    )
    exact = probs * ((probs > value) | (probs == probs.amax(-1, True)))
    yield "One id too few stays.", exact / exact.sum(-1, True)
    kept_rows = probs * (right > 0)
    yield (
        "It is divided by the sum of all rows. Divide each by its own.",
        kept_rows / kept_rows.sum(),
    )
    yield "All rows have the same cut. Each has its own.", of(more.any(0, True).expand_as(more))
    yield "All rows have the same cut. Each has its own.", of(more[:1].expand_as(more))
    floor = max(1, int(p * logits.shape[1]))
    yield (
        "This keeps a share p of the ids. Their probabilities must add up to p.",
        of(torch.arange(logits.shape[1]) < floor),
    )
    yield "The id with which the sum exceeds p is dropped.", of(mass <= p)
    yield "The rows are taken together. Each has its own set.", over_rows(probs, p)


def over_rows(probs: Tensor, p: float) -> Tensor:
    down, order = probs.flatten().sort(descending=True)
    kept = torch.zeros_like(down).scatter(
        -1, order, down * (down.cumsum(-1) - down < p * len(probs))
    )
    kept = kept.view_as(probs)
    return kept / kept.sum(-1, True)


# ------------------------------------------------------------------------------------------- faster
def of_sort(ids_NK: Tensor, E: int) -> Mistakes:
    order_M, tokens_M, ends_E = granitemoe.sort_by_expert(ids_NK, E)
    N, K = ids_NK.shape
    counts_E = ids_NK.flatten().bincount(minlength=E).int()
    yield "These are counts. Add them up: where each run ends.", (order_M, tokens_M, counts_E)
    yield (
        "These are the runs' beginnings. Return their ends.",
        (order_M, tokens_M, ends_E - counts_E),
    )
    yield "Each end is one too small: it is the place after a run.", (order_M, tokens_M, ends_E - 1)
    yield "The token of place p is p // K, not p % K.", (order_M, order_M % K, ends_E)
    yield "The token of place p is p // K, not p % N.", (order_M, order_M % N, ends_E)
    yield "The token of place p is p // K, not p // N.", (order_M, order_M // N, ends_E)
    yield "The token of place p is p // K, not p // E.", (order_M, order_M // E, ends_E)
    last = N * K - 1 - ids_NK.flatten().flip(0).argsort(stable=True)
    yield "Equal experts are in reverse. Their places stay in order.", (last, last // K, ends_E)
    columns = ids_NK.T.flatten().argsort(stable=True)
    yield (
        "The choices are flattened by columns. Flatten by tokens.",
        (columns, columns // K, ends_E),
    )
    yield (
        "Tokens are not in the sorted order: divide order_M.",
        (order_M, torch.arange(N * K) // K, ends_E),
    )
    yield (
        "This is the inverse of the order: where each choice goes.",
        (order_M.argsort(), order_M.argsort() // K, ends_E),
    )
    back = ids_NK.flatten().sort(stable=True, descending=True).indices
    yield "Experts are in reverse. Expert 0 comes first.", (back, back // K, ends_E)
    by_column = ids_NK.T.flatten().sort(stable=True).indices
    yield (
        "The choices are flattened by columns. Flatten by tokens.",
        (by_column, by_column % N, ends_E),
    )
    sorted_M = ids_NK.flatten().sort(stable=True).values
    yield "These are experts. Return places, and their tokens.", (sorted_M, tokens_M, ends_E)


def of_gate_up(x_D: Tensor, gate_up_EPD: Tensor, ids_K: Tensor) -> Mistakes:
    width = gate_up_EPD.shape[1] // 2
    g, u = torch.einsum("kpd,d->kp", gate_up_EPD[ids_K], x_D).split(width, dim=-1)
    yield "Gate and up are swapped.", F.silu(u) * g
    yield from wrong_hidden(g, u)
    first = torch.einsum("kpd,d->kp", gate_up_EPD[: len(ids_K)], x_D)
    yield "Program k reads expert k. Use the number in expert_ids.", granitemoe.swiglu(first)
    yield "It reads an expert that was not chosen.", torch.full_like(g, torch.nan)


MISTAKES: dict[str, Callable[..., Mistakes]] = {
    "rms_norm": of_norm,
    "rotary": of_rotary,
    "attention": of_attention,
    "route": of_route,
    "expert": of_expert,
    "experts_loop": of_experts,
    "experts_batched": of_experts,
    "load_balancing": of_balance,
    "cached_step": of_step,
    "top_p": of_top_p,
    "sort_by_expert": of_sort,
    "experts_grouped": of_experts,
    "gate_up": of_gate_up,
}
assert MISTAKES.keys() <= PUZZLES.keys()
