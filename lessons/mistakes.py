"""For puzzles.py and faster.py: the likely mistakes of each piece, in words.

A mistake is what is said of it, and what a piece that has made it gives. A piece that gives the
same in every case has made it; where several mistakes give the same, the first is told.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from answers import PUZZLES, attend, balance, keep, norm, one_expert, step, turn
from torch import Tensor

import granitemoe
from granitemoe import experts_loop

Mistakes = Iterator[tuple[str, object]]  # what is said of one, and what it gives


def shares(x: Tensor) -> Tensor:
    """x divided by its sum."""
    return x / x.sum(-1, keepdim=True)


# ------------------------------------------------------------------------------- norm and positions
def of_norm(x: Tensor, weight: Tensor, eps: float) -> Mistakes:
    yield from wrong_root(x, weight, eps)
    yield from wrong_mean(x, weight, eps)
    yield from wrong_weight(x, weight, eps)
    yield from rounded_norm(x, weight, eps)


def mean_square(x: Tensor, dim: int | tuple[int, ...] = -1) -> Tensor:
    return x.float().square().mean(dim, keepdim=True)


def wrong_root(x: Tensor, weight: Tensor, eps: float) -> Mistakes:
    mean, wide = mean_square(x), x.float()
    root, total = mean.sqrt(), mean * len(weight)

    def over(root: Tensor) -> Tensor:
        return wide / root * weight

    yield "eps is added to the root. Add it to the mean, under the root.", over(root + eps)
    yield "eps is missing, or a constant stands in its place. Add eps to the mean.", over(root)
    yield "The mean is at least eps here (clamp, max). Add eps.", over(mean.clamp(min=eps).sqrt())
    yield "The root is at least eps here (clamp, max). Add eps.", over(root.clamp(min=eps))
    yield "eps is squared. Add it as it is.", over((mean + eps * eps).sqrt())
    yield "eps is added to the sum. Add it to the mean.", over((mean + eps / len(weight)).sqrt())
    yield "eps is added to the result. Add it to the mean.", over(root) + eps
    yield (
        "The sum is divided by D - 1. Divide by D.",
        over((total / (len(weight) - 1) + eps).sqrt()),
    )
    summed = total.sqrt()
    for norms in ((total + eps).sqrt(), summed + eps, summed.clamp(min=eps), summed):
        yield "This is the root of the sum. Take the root of the mean.", over(norms)
    for square in (mean + eps, mean):
        yield "The root is missing. Divide by the root of the mean.", over(square)
    yield "It multiplies by the root. Divide by it.", over((mean + eps).rsqrt())
    yield "It multiplies by the mean. Divide by its root.", over(1 / (mean + eps))
    yield "The division is missing. Divide x by the root.", x * weight


def wrong_mean(x: Tensor, weight: Tensor, eps: float) -> Mistakes:
    """Something else than the mean of squares over D."""
    wide, mean, size = x.float(), x.float().mean(-1, keepdim=True), x.float().abs()

    def over(root: Tensor, x: Tensor = wide) -> Tensor:
        return x / root * weight

    layer_norm = "The mean of x is subtracted: that is LayerNorm. Do not subtract it."
    spreads = [wide.var(-1, keepdim=True, correction=less) for less in (0, 1)]
    for square in (*spreads, mean_square(x)):
        yield layer_norm, over((square + eps).sqrt(), wide - mean)
    deviation = "It divides by the standard deviation. Do not subtract the mean in it."
    for spread in spreads:
        for root in ((spread + eps).sqrt(), spread.sqrt(), spread.sqrt() + eps):
            yield deviation, over(root)
    for sizes in (size, (size.square() + eps).sqrt(), size + eps):
        of_sizes = "This is the mean of the sizes (abs). Square, then mean, then root."
        yield of_sizes, over(sizes.mean(-1, keepdim=True))
    yield "The mean is squared. Square, then take the mean.", over((mean.square() + eps).sqrt())
    yield "It divides by the mean of x. Square, then mean, then root.", over(mean + eps)
    for name, dim in (("T", 1), ("B", 0)):
        said = f"The mean is over {name}. Take it over D, the last dimension."
        yield said, over((mean_square(x, dim) + eps).sqrt())
    for dims in ((0, 1, 2), (1, 2), (0, 1)):
        all_tokens = "The mean is over all tokens. Take one for each token, over D."
        yield all_tokens, over((mean_square(x, dims) + eps).sqrt())


def wrong_weight(x: Tensor, weight: Tensor, eps: float) -> Mistakes:
    one = torch.ones_like(weight)
    y = norm(x, one, eps)
    yield "The weight is missing. Multiply by it.", y
    yield "It multiplies by 1 + weight, as Gemma does. Multiply by weight alone.", y * (1 + weight)
    yield "The weight is added. Multiply by it.", y + weight
    yield "It divides by the weight. Multiply by it.", y / weight
    yield "The weight comes in before the mean. Multiply by it last.", norm(x * weight, one, eps)


def rounded_norm(x: Tensor, weight: Tensor, eps: float) -> Mistakes:
    """What rounds at the wrong place, which shows in bfloat16 alone."""
    root, rough = (mean_square(x) + eps).sqrt(), x.square().mean(-1, keepdim=True) + eps
    early = "The weight comes in before rounding. Round to x's dtype first, then multiply."
    yield early, (x.float() / root * weight.float()).to(x.dtype)
    for y in (x * rough.rsqrt(), x / rough.sqrt()):
        yield "The mean, or the root, is computed in x's dtype. First: x.float().", y * weight
    squares = x.square().mean(-1, keepdim=True).float() + eps
    inside = "The mean is computed in x's dtype. First: x.float()."
    yield inside, (x.float() * squares.rsqrt()).to(x.dtype) * weight
    late = "The root is rounded to x's dtype before the division. Divide in float32."
    yield late, x / root.to(x.dtype) * weight
    yield late, x * (1 / root).to(x.dtype) * weight


def of_rotary(x: Tensor, positions: Tensor, theta: float) -> Mistakes:
    yield from wrong_angles(x, positions, theta)
    yield from wrong_pairs(x, positions, theta)
    yield from wrong_turning(x, positions, theta)
    yield from rounded_angles(x, positions, theta)


def angles_of(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """(T, C/2)"""
    C = x.shape[3]
    return positions[:, None].float() * theta ** (-2 * torch.arange(C // 2) / C)


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """x (B, H, T, C), turned by an angle for each token and pair (T, C/2)."""
    (u, v), cos, sin = x.chunk(2, dim=-1), angles.cos(), angles.sin()
    return torch.cat((u * cos - v * sin, v * cos + u * sin), dim=-1)


def neighbours(x: Tensor) -> Tensor:
    """The first of each two neighbours, then the second of each."""
    return torch.cat((x[..., ::2], x[..., 1::2]), dim=-1)


def apart(x: Tensor) -> Tensor:
    """The reverse of neighbours."""
    return torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)


def wrong_angles(x: Tensor, positions: Tensor, theta: float) -> Mistakes:
    angles, at, first = angles_of(x, positions, theta), positions[:, None].float(), positions[0]
    C, half, counted = x.shape[3], x.shape[3] // 2, torch.arange(len(positions))
    i = torch.arange(half)

    def numbered(positions: Tensor) -> Tensor:
        return turn(x, positions, theta)

    def other_theta(theta: float) -> Tensor:
        return turn(x, positions, theta)

    yield "The angles have the wrong sign. Turn the other way.", numbered(-positions)
    yield "The first position is subtracted. Use them as they are.", numbered(positions - first)
    yield "Each position is one too large. Use positions as they are.", numbered(positions + 1)
    yield "Each position is one too small. Use positions as they are.", numbered(positions - 1)
    yield "Tokens are numbered from 0. Use positions.", numbered(counted)
    yield "Only the first position is used. Use each token's.", numbered(first + counted)
    yield "theta is not used: it is 10,000 here.", other_theta(10000.0)
    ends = "The exponents end at -1 (linspace). The last is -2i/C with i = C/2 - 1."
    yield ends, turned(x, at * theta ** -torch.linspace(0, 1, half))
    yield "The exponent is -i/C. It must be -2i/C.", other_theta(theta**0.5)
    yield "The exponent is -4i/C (or -2i over C/2). It must be -2i/C.", other_theta(theta**2)
    yield "The exponent has the wrong sign. It must be -2i/C.", other_theta(1 / theta)
    yield "The exponent is rounded (//). Divide by /.", turned(x, at / theta ** -(-2 * i // C))
    yield "i begins at 1. It must begin at 0.", turned(x, at * theta ** (-2 * (i + 1) / C))
    yield "The frequencies are in reverse. Begin with i = 0.", turned(x, angles.flip(1))
    yield "All pairs turn alike. The angle depends on i.", turned(x, at.expand(-1, half))
    yield "The position is not in the angle. Multiply by it.", turned(x, angles / at.clamp(min=1))
    yield "The angle is multiplied by 2 pi. It is in radians.", turned(x, angles * 2 * torch.pi)
    yield "The angle is in degrees. It must be in radians.", turned(x, angles * torch.pi / 180)


def wrong_pairs(x: Tensor, positions: Tensor, theta: float) -> Mistakes:
    angles, half, right = angles_of(x, positions, theta), x.shape[3] // 2, turn(x, positions, theta)
    u, v = x.chunk(2, dim=-1)
    paired = turn(neighbours(x), positions, theta)
    for y in (apart(paired), paired):
        yield "The pairs are neighbours. Pair x_i with x_(i + C/2).", y
    a, partners = angles.repeat_interleave(2, dim=-1), torch.cat((-v, u), dim=-1)
    repeated = "Angles are repeated for neighbours. x_i and x_(i + C/2) have the same angle."
    yield repeated, x * a.cos() + partners * a.sin()
    a = torch.cat((angles, angles), dim=-1)
    partners = apart(torch.cat((-x[..., 1::2], x[..., ::2]), dim=-1))
    mixed = "The partners are neighbours, but the angles are not. Pair x_i with x_(i + C/2)."
    yield mixed, x * a.cos() + partners * a.sin()
    yield "The two halves of the result are swapped.", right.roll(half, -1)
    yield "The two halves of x are swapped.", turn(x.roll(half, -1), positions, theta)
    yield "The results are interleaved. The first halves come first.", apart(right)


def wrong_turning(x: Tensor, positions: Tensor, theta: float) -> Mistakes:
    angles, (u, v) = angles_of(x, positions, theta), x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    first, second = u * cos - v * sin, v * cos + u * sin

    def together(first: Tensor, second: Tensor) -> Tensor:
        return torch.cat((first, second), dim=-1)

    yield "The minus is missing: u cos a - v sin a.", together(u * cos + v * sin, second)
    yield "There is a minus too many: v cos a + u sin a.", together(first, v * cos - u * sin)
    yield "Cosine and sine are swapped.", together(u * sin - v * cos, v * sin + u * cos)
    yield "The second half is not turned.", together(first, v)
    yield "The first half is not turned.", together(u, second)
    overwritten = "The new first half is used for the second. Keep the old one."
    yield overwritten, together(first, v * cos + first * sin)
    yield "It is turned twice. Turn it once.", turned(x, 2 * angles)
    yield "The sine's part is missing.", together(u * cos, v * cos)


def rounded_angles(x: Tensor, positions: Tensor, theta: float) -> Mistakes:
    """What shows in bfloat16 alone."""
    at, frequencies = positions[:, None].float(), angles_of(x, torch.ones(1), theta)
    rough_at, rough = at.to(x.dtype), frequencies.to(x.dtype)
    said = "Angles are computed in x's dtype. Far positions need float32."
    for angles in (rough_at * rough, rough_at * frequencies, at * rough):
        yield said, turned(x, angles).to(x.dtype)
    late = "Angles are rounded to x's dtype. Take cosine and sine in float32."
    yield late, turned(x, (at * frequencies).to(x.dtype))


# -------------------------------------------------------------------------------------- attention
class Scored(NamedTuple):
    """Attention before its softmax, each query head with its own keys and values."""

    scores: Tensor  # (B, H, T, S), in float32
    values: Tensor  # (B, H, S, C)
    seen: Tensor  # (T, S), True where a query may look

    def mean(self, weights: Tensor) -> Tensor:
        return weights.to(self.values.dtype) @ self.values

    def masked(self, seen: Tensor, value: float = -torch.inf, dim: int = -1) -> Tensor:
        """With another mask, and another value for what it hides."""
        weights = self.scores.masked_fill(~seen, value).softmax(dim)
        return self.mean(weights.nan_to_num(0.0))


def scored(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Scored:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return Scored((q @ k.mT * scale).float(), v, causal(q, k))


def causal(q: Tensor, k: Tensor, more: int | None = None) -> Tensor:
    """(T, S), True where a query may look: the first sees `more` keys beside its first one."""
    T, S = q.shape[2], k.shape[2]
    return torch.ones(T, S, dtype=torch.bool).tril(S - T if more is None else more)


def of_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Mistakes:
    yield from wrong_scale(q, k, v, scale)
    yield from wrong_mask(q, k, v, scale)
    yield from wrong_softmax(q, k, v, scale)
    yield from wrong_heads(q, k, v, scale)
    yield from wrong_inputs(q, k, v, scale)


def wrong_scale(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Mistakes:
    def by(scale: float) -> Tensor:
        return attend(q, k, v, scale)

    root = q.shape[3] ** -0.5
    yield "Scores are divided by the root of C. Multiply by scale.", by(root)
    yield "Scores are divided by the root of C too. Multiply by scale alone.", by(scale * root)
    yield "scale is not used. Multiply the scores by it.", by(1.0)
    yield "Scores are divided by scale. Multiply by it.", by(1 / scale)
    yield "scale is applied twice. Apply it once.", by(scale**2)
    yield "The root of scale is taken. Multiply by scale itself.", by(scale**0.5)
    yield "scale comes in after the softmax. Multiply the scores by it.", by(1.0) * scale


def wrong_mask(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Mistakes:
    """Queries see other keys than they should."""
    T, S, it = q.shape[2], k.shape[2], scored(q, k, v, scale)
    fewer, from_end = causal(q, k, S - T - 1), causal(q, k, T - S)
    yield "There is no mask: queries see keys ahead. Hide those.", attend(q, k, v, scale, S)
    by_T = "It is causal by T, but keys are more than queries. The last query must see all keys."
    yield by_T, attend(q, k, v, scale, 0)
    yield "Each query sees one key too many.", attend(q, k, v, scale, S - T + 1)
    for y in (it.masked(fewer), attend(q, k, v, scale, S - T - 1), it.masked(fewer, -1e9)):
        yield "Each query sees one key too few: not the last of its own.", y
    for y in (it.masked(~it.seen), it.masked(~it.seen, -1e9), it.masked(~fewer)):
        yield "The mask is the wrong way round: queries see only what is ahead.", y
    yield "The mask is the wrong way round, and by T.", it.masked(~causal(q, k, 0))
    newest = attend(q, k[:, :, -T:], v[:, :, -T:], scale)
    yield "The queries see the last T keys alone. The older ones count too.", newest
    for sees in (from_end, from_end | (torch.arange(S) == 0)):
        offset = "The mask's offset has the wrong sign. The last query must see all keys."
        yield offset, it.masked(sees)


def wrong_softmax(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Mistakes:
    """The right keys are hidden, in the wrong way, or the weights are wrong."""
    it, minus = scored(q, k, v, scale), "Make them -inf."
    scores, hidden = it.scores.masked_fill(~it.seen, 0), ~it.seen
    late = "Keys ahead are set to 0 after the softmax. Mask their scores before it."
    yield late, it.mean(it.scores.softmax(-1) * it.seen)
    for seen in (it.seen, causal(q, k, 0)):
        yield f"Masked scores are 0 or nearly 0, a score like others. {minus}", it.masked(seen, 0.0)
    yield f"1 is added to masked scores. {minus}", it.mean((it.scores + 1.0 * hidden).softmax(-1))
    yield f"Masked scores are only 1 less. {minus}", it.mean((it.scores - 1.0 * hidden).softmax(-1))
    large = f"The masked scores are not small enough: a score may be less. {minus}"
    yield large, it.masked(it.seen, -1.0)
    for value in (-10.0, -20.0, -30.0, -50.0, -100.0, -150.0):
        yield large, it.masked(it.seen, value)
    for value in (-10.0, -20.0):
        yield large, it.mean((it.scores + value * hidden).softmax(-1))
    yield "All is nan. Does the mask multiply (0 * -inf)? Use masked_fill.", q * torch.nan
    over = "Take it over the keys, dim=-1."
    yield f"The softmax is over the queries (dim=-2). {over}", it.masked(it.seen, dim=-2)
    yield f"The softmax is over the heads (dim=1). {over}", it.masked(it.seen, dim=1)
    yield "The softmax is missing.", it.mean(scores)
    yield "These are sigmoids. Take the softmax.", it.mean(it.scores.sigmoid() * it.seen)
    yield "exp is not divided by its sum.", it.mean(it.scores.exp() * it.seen)
    yield "Scores are divided by their sum. Take the softmax.", it.mean(shares(scores))
    once = it.scores.masked_fill(hidden, -torch.inf).softmax(-1)
    yield "The softmax is taken twice. Take it once.", it.mean(once.softmax(-1))
    even = shares(it.seen + 0 * scores)
    yield "All keys have the same weight. Take the softmax of the scores.", it.mean(even)


def wrong_heads(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Mistakes:
    H, G = q.shape[1], k.shape[1]
    h, must = torch.arange(H), "It must be head h // (H/G)."
    right, tiled = h // (H // G), h % G

    def by(for_k: Tensor, for_v: Tensor) -> Tensor:
        return attend(q, k[:, for_k], v[:, for_v], scale)

    yield f"Query head h uses head h % G. {must}", by(tiled, tiled)
    yield "Keys go by h // (H/G), values by h % G. Both go by h // (H/G).", by(right, tiled)
    yield "Values go by h // (H/G), keys by h % G. Both go by h // (H/G).", by(tiled, right)
    yield f"All query heads use key head 0. {must}", by(0 * h, 0 * h)
    own = h.clamp(max=G - 1)
    yield f"Query head h uses head h, or the last. {must}", by(own, own)
    by_G = h // G % G
    yield f"Query head h uses head h // G. {must}", by(by_G, by_G)


def wrong_inputs(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Mistakes:
    yield "Keys and values are swapped.", attend(q, v, k, scale)
    yield "It gives a mean of keys. Take the values.", attend(q, k, k, scale)
    yield "Scores are of queries and values. Take the keys.", attend(q, v, v, scale)
    reshaped = "k is reshaped, or not transposed. Transpose it: k.transpose(-1, -2)."
    yield reshaped, attend(q, refolded(k), v, scale)
    right = attend(q, k, v, scale)
    mixed = right.transpose(1, 2).reshape(right.shape)
    yield "Heads and tokens are mixed by a reshape. Use transpose.", mixed


def refolded(x: Tensor) -> Tensor:
    """What gives, when it is transposed, x reshaped to the transposed shape."""
    return x.reshape(*x.shape[:-2], x.shape[-1], x.shape[-2]).mT


class Step(NamedTuple):
    """The inputs of cached_step, and the step with something changed."""

    q: Tensor
    k: Tensor
    v: Tensor
    keys: Tensor
    values: Tensor
    scale: float
    theta: float

    def but(self, **changed: object) -> tuple:
        return step(*self._replace(**changed))

    def at(self) -> Tensor:
        """The new tokens' numbers."""
        L, T = self.keys.shape[2], self.q.shape[2]
        return torch.arange(L, L + T)

    def turning(self, turn_q: Callable, turn_k: Callable) -> tuple:
        """With other ways to turn the queries and the new keys."""
        keys = torch.cat((self.keys, turn_k(self.k)), dim=2)
        values = torch.cat((self.values, self.v), dim=2)
        return attend(turn_q(self.q), keys, values, self.scale), keys, values

    def numbered(self, for_q: Tensor, for_k: Tensor) -> tuple:
        """With other numbers for the queries and for the new keys."""
        theta = self.theta
        return self.turning(lambda q: turn(q, for_q, theta), lambda k: turn(k, for_k, theta))

    def seeing(self, keys: Tensor, values: Tensor, last: int | None = None) -> Tensor:
        """What attention gives for other keys and values, or another mask (see attend)."""
        return attend(turn(self.q, self.at(), self.theta), keys, values, self.scale, last)


def of_step(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, *n: float) -> Mistakes:
    it = Step(q, k, v, keys, values, *n)
    yield from wrong_numbers(it)
    yield from wrong_kept(it)
    yield from wrong_seen(it)
    yield from wrong_theta(it)


def wrong_numbers(it: Step) -> Mistakes:
    at, T, (B, G, L, C), L_on = it.at(), it.q.shape[2], it.keys.shape, "Number them from L."
    from_0 = torch.arange(T)

    def every(numbers: Tensor) -> tuple:
        return it.numbered(numbers, numbers)

    yield f"New tokens are numbered from 0 again. {L_on}", every(from_0)
    yield f"New tokens are numbered from L + 1. {L_on}", every(at + 1)
    yield f"New tokens are numbered from L - 1. {L_on}", every(at - 1)
    yield "All new tokens have the number L. Number them L, L + 1, ...", every(0 * at + L)
    yield "All new tokens have the last number. Number them L, L + 1, ...", every(0 * at + at[-1])
    sizes = {"L + T": L + T, "T": T, "H": it.q.shape[1], "B": B, "G": G, "C": C}
    for name, size in sizes.items():
        said = f"New tokens are numbered from {name}. {L_on} It is keys.shape[2]."
        yield said, every(from_0 + size)
    for ends in (from_0 + 1 - T, T - 1 - from_0):
        yield "They are numbered from the end. Number them from 0, all together.", every(ends)
    yield f"The queries are numbered from 0 again. {L_on}", it.numbered(from_0, at)
    yield f"The new keys are numbered from 0 again. {L_on}", it.numbered(at, from_0)
    yield "The angles have the wrong sign. Turn the other way.", it.numbered(-at, -at)
    yield "The queries are turned the wrong way.", it.numbered(-at, at)
    yield "The queries are not turned. Turn them too.", it.numbered(0 * at, at)
    yield "The new keys are not turned. Turn them too.", it.numbered(at, 0 * at)
    yield "Neither queries nor new keys are turned. Turn both.", every(0 * at)


def wrong_kept(it: Step) -> Mistakes:
    """Wrong keys and values, in what is returned or everywhere."""
    (y, keys, values), L = it.but(), it.keys.shape[2]

    def kept(keys: Tensor, values: Tensor) -> tuple:
        return it.seeing(keys, values), keys, values

    again = torch.cat((turn(it.keys, torch.arange(L), it.theta), keys[:, :, L:]), dim=2)
    for result in (kept(again, values), (it.seeing(again, values), keys, values)):
        yield "The old keys are turned again. Turn the new ones alone.", result
    turned_v = torch.cat((it.values, turn(it.v, it.at(), it.theta)), dim=2)
    yield "The values are turned. Turn queries and keys alone.", kept(keys, turned_v)
    unturned = torch.cat((it.keys, it.k), dim=2)
    yield "The new keys are not turned in what is returned.", (y, unturned, values)
    yield "The new tokens are not in the keys and values returned.", (y, it.keys, it.values)
    new_k, new_v = keys[:, :, L:], values[:, :, L:]
    yield "The old tokens are not in the keys and values returned.", (y, new_k, new_v)
    front_k, front_v = torch.cat((new_k, it.keys), dim=2), torch.cat((new_v, it.values), dim=2)
    for result in (kept(front_k, front_v), (y, front_k, front_v)):
        yield "The new tokens stand before the old ones. Put them after.", result
    yield "New values stand before the old ones. Put them after.", kept(keys, front_v)
    new_v = torch.cat((it.values, keys[:, :, L:]), dim=2)
    yield "The new keys stand for the new values.", kept(keys, new_v)
    yield "Keys and values are swapped in what is returned.", (y, values, keys)


def wrong_seen(it: Step) -> Mistakes:
    """What goes wrong in attention goes wrong here too."""
    (_, keys, values), L, T = it.but(), it.keys.shape[2], it.q.shape[2]
    for last in (L + T, L - T):
        old = it.seeing(it.keys, it.values, last)
        yield "The queries see only old tokens.", (old, keys, values)
    q = turn(it.q, it.at(), it.theta)
    for said, y in of_attention(q, keys, values, it.scale):
        yield said, (y, keys, values)


def wrong_theta(it: Step) -> Mistakes:
    at, scale, theta = it.at(), it.scale, it.theta
    yield "scale and theta are exchanged.", it.but(scale=theta, theta=scale)
    yield "The exponent of theta has the wrong sign. It must be -2i/C.", it.but(theta=1 / theta)
    yield "The exponent is -i/C. It must be -2i/C.", it.but(theta=theta**0.5)

    def both(act: Callable[[Tensor], Tensor]) -> tuple:
        return it.turning(act, act)

    paired = both(lambda x: apart(turn(neighbours(x), at, theta)))
    yield "The pairs are neighbours. Pair x_i with x_(i + C/2).", paired
    rough_at, frequencies = at[:, None].to(it.q.dtype), angles_of(it.q, torch.ones(1), theta)
    for angles in (rough_at * frequencies.to(it.q.dtype), rough_at * frequencies):
        rough = both(lambda x, angles=angles: turned(x, angles).to(x.dtype))
        yield "Angles are computed in the inputs' dtype. Far positions need float32.", rough


# ----------------------------------------------------------------------------- mixture of experts
def of_route(x_ND: Tensor, router_ED: Tensor, K: int) -> Mistakes:
    logits_NE = (x_ND @ router_ED.T).float()
    yield from wrong_weights(logits_NE, K)
    yield from wrong_scores(x_ND, router_ED, K)
    yield from wrong_order(*best_of(logits_NE, K))
    yield from wrong_experts(logits_NE, K)


def best_of(scores_NE: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Weights and numbers as route must give them, for any scores."""
    top = scores_NE.float().topk(K)
    return top.values.softmax(-1), top.indices


def wrong_weights(logits_NE: Tensor, K: int) -> Mistakes:
    weights_NK, ids_NK = best_of(logits_NE, K)
    take, top_NK = "Take the softmax of the K scores.", logits_NE.gather(1, ids_NK)
    all_NK, one = logits_NE.softmax(-1).gather(1, ids_NK), torch.ones_like(top_NK)
    yield "This is the softmax over all experts. Take it over the chosen K.", (all_NK, ids_NK)
    for twice in (all_NK.softmax(-1), weights_NK.softmax(-1)):
        yield "The softmax is taken twice. Take it once, over the chosen K.", (twice, ids_NK)
    of_tokens, by_tokens = logits_NE.softmax(0), logits_NE.softmax(0).topk(K)
    tokens = "The softmax is over the tokens (dim=0). Take it over the chosen K, dim=-1."
    yield tokens, (top_NK.softmax(0), ids_NK)
    yield tokens, (of_tokens.gather(1, ids_NK), ids_NK)
    yield tokens, by_tokens
    yield tokens, (shares(by_tokens.values), by_tokens.indices)
    sigmoids = top_NK.sigmoid()
    yield "These are sigmoids. Take the softmax.", (sigmoids, ids_NK)
    yield "These are sigmoids over their sum. Take the softmax.", (shares(sigmoids), ids_NK)
    yield "These are the scores. Take their softmax.", (top_NK, ids_NK)
    yield "Scores are divided by their sum. Take their softmax.", (shares(top_NK), ids_NK)
    yield "These are exp of the scores. Divide them by their sum.", (top_NK.exp(), ids_NK)
    yield "These are logarithms. Take the softmax.", (top_NK.log_softmax(-1), ids_NK)
    yield f"All weights are 1/K. {take}", (one / K, ids_NK)
    yield f"All weights are 1. {take}", (one, ids_NK)
    yield f"Probabilities among all experts are divided by K. {take}", (all_NK / K, ids_NK)
    yield "Weights are multiplied by K. They sum to 1 already.", (weights_NK * K, ids_NK)
    yield "Weights are divided by K. They sum to 1 already.", (weights_NK / K, ids_NK)


def wrong_scores(x_ND: Tensor, router_ED: Tensor, K: int) -> Mistakes:
    logits_NE, (E, D), x = (x_ND @ router_ED.T).float(), router_ED.shape, x_ND.float()
    cosines_NE = F.normalize(x, dim=-1) @ F.normalize(router_ED.float(), dim=-1).T
    folded_NE, plain = x_ND @ router_ED.reshape(D, E), "Take the dot products as they are."
    yield f"Scores are divided by the root of D. {plain}", best_of(logits_NE * D**-0.5, K)
    yield f"Scores are divided by K. {plain}", best_of(logits_NE / K, K)
    yield f"Scores are multiplied by K. {plain}", best_of(logits_NE * K, K)
    yield "These are cosines. Take the dot products.", best_of(cosines_NE, K)
    yield "router_ED is reshaped, or not transposed. Transpose it.", best_of(folded_NE, K)


def wrong_order(w_NK: Tensor, ids_NK: Tensor) -> Mistakes:
    order, by = ids_NK.argsort(1), "in the order of experts"
    sorted_NK, sorted_ids = w_NK.gather(1, order), ids_NK.gather(1, order)
    yield "The largest must come first.", (w_NK.flip(1), ids_NK.flip(1))
    yield "They are sorted by expert. The largest must come first.", (sorted_NK, sorted_ids)
    yield f"Weights are {by}, numbers in that of scores.", (sorted_NK, ids_NK)
    yield f"Numbers are {by}, weights in that of scores.", (w_NK, sorted_ids)
    yield "Weights are in reverse: the best has the smallest.", (w_NK.flip(1), ids_NK)
    yield "Numbers are in reverse.", (w_NK, ids_NK.flip(1))
    yield "Experts are numbered from 1. Number them from 0.", (w_NK, ids_NK + 1)


def wrong_experts(logits_NE: Tensor, K: int) -> Mistakes:
    w_NK, order = best_of(logits_NE, K)[0], logits_NE.argsort(-1, descending=True)
    first, least = torch.arange(K).expand_as(w_NK), order.flip(1)[:, :K]

    def by(ids_NK: Tensor, logits_NE: Tensor = logits_NE) -> tuple:
        return logits_NE.gather(1, ids_NK).softmax(-1), ids_NK

    yield "The best expert is left out. Begin with it.", by(order.roll(-1, -1)[:, :K])
    for result in (by(least), by(least.flip(1)), by(least, -logits_NE)):
        yield "It chooses the smallest scores. Choose the largest.", result
    largest = logits_NE.abs().topk(K).indices
    for result in (by(largest), by(largest, logits_NE.abs())):
        yield "It chooses the largest sizes (abs). Choose the largest scores.", result
    yield "It takes the first K experts. Choose the K largest scores.", by(first)
    yield "The numbers are places among the chosen. Return the experts'.", (w_NK, first)


def of_expert(x_ND: Tensor, gate_up_PD: Tensor, down_DF: Tensor) -> Mistakes:
    (D, width), (g, u) = down_DF.shape, F.linear(x_ND, gate_up_PD).chunk(2, dim=-1)
    y_ND, down = one_expert(x_ND, gate_up_PD, down_DF), down_DF.T
    not_T = "reshaped, or not transposed"
    yield "Gate and up are swapped.", F.silu(u) * g @ down
    for rows_PD in (apart_rows(gate_up_PD), apart_rows(gate_up_PD).roll(width, 0)):
        other = "The gate is the first half, not every other row."
        yield other, one_expert(x_ND, rows_PD, down_DF)
    for said, hidden in wrong_hidden(g, u):
        yield said, hidden @ down
    yield "down_DF is missing: it comes last.", F.silu(g) * u
    yield f"down_DF is {not_T}. Transpose it.", F.silu(g) * u @ down_DF.reshape(width, D)
    yield "silu comes after down. Apply it to g, before.", F.silu(g * u @ down)
    folded = one_expert(x_ND, refolded(gate_up_PD), down_DF)
    yield f"gate_up_PD is {not_T}. Transpose it.", folded
    late = F.linear(x_ND, gate_up_PD[width - 1 : -1])
    yield "The up begins one row too early. It begins at row F.", F.silu(g) * late @ down
    yield "x is added. The layer does that later.", y_ND + x_ND
    yield "silu is applied to the result too. Apply it to g alone.", F.silu(y_ND)


def apart_rows(gate_up: Tensor) -> Tensor:
    """Every other row (of the last dimension but one), then the rows between."""
    return torch.cat((gate_up[..., ::2, :], gate_up[..., 1::2, :]), dim=-2)


def wrong_hidden(g: Tensor, u: Tensor) -> Mistakes:
    """What may stand in place of silu(g) * u."""
    take = "Take silu(g) = g * sigmoid(g)."
    yield "silu is missing. Multiply silu(g) by u.", g * u
    yield f"This is relu. {take}", g.relu() * u
    for gelu in (F.gelu(g), F.gelu(g, approximate="tanh"), g * (1.702 * g).sigmoid()):
        yield f"This is gelu. {take}", gelu * u
    yield f"This is sigmoid(g) * u. {take}", g.sigmoid() * u
    yield "This is F.glu: g * sigmoid(u). Take silu(g) * u.", g * u.sigmoid()
    yield f"This is sigmoid(g) alone. Multiply silu(g) by u. {take}", g.sigmoid()
    yield f"This is tanh. {take}", g.tanh() * u
    yield f"This is softmax. {take}", g.softmax(-1) * u
    yield f"This is softplus. {take}", F.softplus(g) * u
    yield f"This is mish. {take}", F.mish(g) * u
    yield f"This is hardswish. {take}", F.hardswish(g) * u
    yield "g has the wrong sign in silu.", F.silu(-g) * u
    yield "silu is applied to the product. Apply it to g alone.", F.silu(g * u)
    yield "silu is applied to u too. Apply it to g alone.", F.silu(g) * F.silu(u)
    yield "silu(g) and u are added. Multiply them.", F.silu(g) + u
    yield "u is missing: multiply silu(g) by u.", F.silu(g)
    yield "silu(g) is missing: only u is there.", u
    yield "This is silu(u), without g. Take silu(g) * u.", F.silu(u)
    yield "silu(g) is multiplied by g (or g is used as u). Multiply it by u.", F.silu(g) * g
    yield "silu is applied twice. Apply it once.", F.silu(F.silu(g)) * u
    yield f"This is g * sigmoid(-g). {take}", g * (-g).sigmoid() * u
    yield "1 is added to u. Multiply silu(g) by u.", F.silu(g) * (u + 1)


class Experts(NamedTuple):
    """The inputs of the experts, and their sum with some of them changed."""

    x: Tensor
    gate_up: Tensor
    down: Tensor
    w: Tensor
    ids: Tensor

    def but(self, **changed: Tensor) -> Tensor:
        return experts_loop(*self._replace(**changed))

    def rows(self, x_MD: Tensor, ids_M: Tensor) -> Tensor:
        """Of each row its expert's result, without a weight."""
        g, u = torch.einsum("md,mpd->mp", x_MD, self.gate_up[ids_M]).chunk(2, dim=-1)
        return torch.einsum("mf,mdf->md", F.silu(g) * u, self.down[ids_M])

    def summed(self, rows_MD: Tensor) -> Tensor:
        """K rows to a token, which follow each other."""
        return rows_MD.view(*self.ids.shape, -1).sum(dim=1)


def of_experts(x: Tensor, gate_up: Tensor, down: Tensor, w: Tensor, ids: Tensor) -> Mistakes:
    it = Experts(x, gate_up, down, w, ids)
    yield from wrong_sum(it)
    yield from wrong_choice(it)
    yield from wrong_matrices(it)
    yield from wrong_ids(it)
    yield from wrong_rows(it)
    yield from wrong_inside(it)
    yield from rounded_sum(it)


def of_loop(x: Tensor, gate_up: Tensor, down: Tensor, w: Tensor, ids: Tensor) -> Mistakes:
    yield from of_experts(x, gate_up, down, w, ids)
    it = Experts(x, gate_up, down, w, ids)
    yield "Only the last choice of a token is in the sum. Add up all K.", it.but(w=w * only(ids)[0])
    for left in only(ids)[1:]:
        replaces = "Only one expert of a token is left: it replaces what an earlier one gave. Add."
        yield replaces, it.but(w=w * left)
    yield from wrong_loop(it)


def of_grouped(x: Tensor, gate_up: Tensor, down: Tensor, w: Tensor, ids: Tensor) -> Mistakes:
    yield from of_experts(x, gate_up, down, w, ids)
    once = (
        "Only one choice of a token is in the sum. (y[tokens] += ... adds a repeated index once: "
    )
    for left in only(ids):
        yield once + "use index_add_.)", experts_loop(x, gate_up, down, w * left, ids)


def of_batched(x: Tensor, gate_up: Tensor, down: Tensor, w: Tensor, ids: Tensor) -> Mistakes:
    yield from of_grouped(x, gate_up, down, w, ids)
    yield from wrong_loop(Experts(x, gate_up, down, w, ids))


def only(ids: Tensor) -> list[Tensor]:
    """What is left of a token's choices: the last, that of the last expert, of the first expert."""
    return [ids == one for one in (ids[:, -1:], ids.amax(1, True), ids.amin(1, True))]


def wrong_sum(it: Experts) -> Mistakes:
    """Weights and sums."""
    w, ids, E, K = it.w, it.ids, len(it.down), it.w.shape[1]
    y, plain, by_id = it.but(), it.but(w=w**0), ids.argsort(1).argsort(1)
    shares_E = torch.zeros(E, dtype=w.dtype).index_add(0, ids.flatten(), w.flatten())
    yield "The weights are not applied (or added up over K: that is 1).", plain
    yield "The weights are applied twice. Apply them once.", it.but(w=w * w)
    yield "The weights' softmax is taken. They are weights already.", it.but(w=w.softmax(-1))
    yield "The weight of the first choice is used for all.", it.but(w=w[:, :1].expand_as(w))
    yield "The weight of the last choice is used for all.", it.but(w=w[:, -1:].expand_as(w))
    yield "The weights are in reverse.", it.but(w=w.flip(1))
    mean = w.mean(1, keepdim=True).expand_as(w)
    yield "All choices have the mean of the weights. Each has its own.", it.but(w=mean)
    yield "Weights are in the order of experts, not of choices.", it.but(w=w.gather(1, by_id))
    yield "Each weight is divided by K. They sum to 1 already.", y / K
    yield "Weights are divided by their sum over an expert's tokens.", it.but(w=w / shares_E[ids])
    yield "Weights are divided by their sum over tokens.", it.but(w=w / w.sum(0))
    column = it.but(w=w.gather(1, ids % K))
    yield "Expert e takes column e of the weights. Take that of the choice.", column
    yield "Everything is 0: is a sum thrown away (index_add without _, y[ids][mask] += ...)?", y * 0
    yield "x is added. The layer does that later.", y + it.x


def wrong_choice(it: Experts) -> Mistakes:
    """Some of a token's choices are lost."""
    w, first = it.w, torch.arange(it.w.shape[1]) == 0
    last = first.flip(0)
    yield "Only the first choice of a token is in the sum. Add up all K.", it.but(w=w * first)
    yield "Only the first choice is used, with weight 1. Add up all K.", it.but(w=w**0 * first)
    yield "The first choice of a token is left out.", it.but(w=w * ~first)
    yield "The last choice of a token is left out.", it.but(w=w * ~last)
    chosen, even = F.one_hot(it.ids.flatten(), len(it.down)), it.ids.numel() / len(it.down)
    place = (chosen.cumsum(0) * chosen).sum(1).view(w.shape)  # a token is its expert's first: 1
    for capacity in (int(even), math.ceil(even)):
        dropped = "An expert drops tokens over a capacity. GraniteMoe has none: take all."
        yield dropped, it.but(w=w * (place <= capacity))


def wrong_matrices(it: Experts) -> Mistakes:
    w, ids, width, swap = it.w, it.ids, it.down.shape[2], "Swap its last two: transpose(1, 2)."
    yield f"gate_up_EPD is reshaped. {swap}", it.but(gate_up=refolded(it.gate_up))
    not_T = f"down_EDF is reshaped, or not transposed. {swap}"
    yield not_T, it.but(down=refolded(it.down))
    yield "Gate and up are swapped.", it.but(gate_up=it.gate_up.roll(width, 1))
    rows_EPD = apart_rows(it.gate_up)
    yield "The gate is the first half, not every other row.", it.but(gate_up=rows_EPD)
    gate_up_NPD = torch.einsum("nk,nkpd->npd", w, it.gate_up[ids])
    down_NDF = torch.einsum("nk,nkdf->ndf", w, it.down[ids])
    merged = it._replace(gate_up=gate_up_NPD, down=down_NDF).rows(it.x, torch.arange(len(w)))
    yield "The matrices are averaged first. Experts are not linear: weigh their outputs.", merged


def wrong_ids(it: Experts) -> Mistakes:
    """Sums over other experts than the chosen ones."""
    E, (N, K), w, ids = len(it.down), it.w.shape, it.w, it.ids
    yield "Expert 0 is left out. Begin with it.", it.but(w=w * (ids != 0))
    for lost in (E - 1, ids.max()):
        yield "The last expert is left out. There are E.", it.but(w=w * (ids != lost))
    yield "Choice k uses expert k. Use expert_ids_NK.", it.but(ids=torch.arange(K).expand(N, K))
    yield "Each expert's number is one too large.", it.but(ids=(ids + 1) % E)
    yield "Each expert's number is one too small.", it.but(ids=(ids - 1) % E)
    shifted = it.but(w=w * (ids + 1 < E), ids=(ids + 1) % E)
    yield "Each choice goes to the next expert. (Are the runs' ends their beginnings?)", shifted
    yield "All experts use the same matrices, those of expert 0.", it.but(ids=ids * 0)
    for name in ("gate_up", "down"):
        same = getattr(it, name)[:1].expand_as(getattr(it, name))
        yield f"All experts use the {name} of expert 0.", it.but(**{name: same})
    every = it._replace(ids=torch.arange(E).expand(N, E))
    for one in (w.new_ones(N, E), w[:, :1].expand(N, E)):
        yield "Each expert sees all tokens. Only those that chose it count.", every.but(w=one)
    sums_E = torch.zeros(E, dtype=w.dtype).index_add(0, ids.flatten(), w.flatten())
    same = every.but(w=sums_E.expand(N, E))
    yield "Each expert has one weight for all tokens. Each choice has its own.", same
    soft = every.but(w=torch.zeros(N, E).scatter(1, ids, w.float()).softmax(-1))
    yield "Experts that were not chosen get a weight (a softmax over zeros). Give them 0.", soft


def wrong_rows(it: Experts) -> Mistakes:
    """One row for each of the N * K choices, in a wrong order or with a wrong token."""
    w_M, ids_M, (N, K) = it.w.flatten()[:, None], it.ids.flatten(), it.w.shape
    order, tokens, _ = granitemoe.sort_by_expert(it.ids, len(it.down))
    repeated = it.x.repeat_interleave(K, dim=0)
    rows, wrong = it.rows(repeated, ids_M), it.rows(it.x.repeat(K, 1), ids_M) * w_M

    def added(tokens: Tensor, rows: Tensor) -> Tensor:
        return torch.zeros_like(it.x).index_add(0, tokens, rows)

    for y in (added(torch.arange(N * K) % N, wrong), it.summed(wrong)):
        yield "Choice p belongs to token p // K, not p % N.", y
    weighed = it.summed(it.rows(repeated * w_M, ids_M))
    yield "The weights are on the input. Multiply the expert's output.", weighed
    lined = it.rows(repeated, ids_M[order])[order.argsort()]
    unsorted = "The rows are not gathered in the order of experts. Take x_ND[tokens_M]."
    yield unsorted, it.summed(lined * w_M)
    for y in (rows[order] * w_M, (rows * w_M)[order]):
        put_back = "Rows are in the order of experts. Put them back in the order of tokens."
        yield put_back, it.summed(y)
    unmatched = added(tokens, rows[order] * w_M)
    yield "Weights are in the order of tokens, rows in that of experts.", unmatched
    for y in (rows[order][order] * w_M, (rows * w_M)[order][order]):
        yield "Rows are put back by order. Use its inverse, order.argsort().", it.summed(y)
    by_token = "The rows lie token by token: view them as (N, K, D), not (K, N, D)."
    yield by_token, (rows * w_M).view(K, N, -1).sum(dim=0)


def wrong_inside(it: Experts) -> Mistakes:
    """Within an expert."""
    g, u = torch.einsum("nd,nkpd->nkp", it.x, it.gate_up[it.ids]).chunk(2, dim=-1)
    down, w = it.down[it.ids], it.w
    early = torch.einsum("nkf,nkdf->nd", F.silu(g * w[..., None]) * u, down)
    yield "The weights are on g. Multiply the expert's output.", early
    for said, hidden in wrong_hidden(g, u):
        yield said, torch.einsum("nkf,nkdf,nk->nd", hidden, down, w)


def rounded_sum(it: Experts) -> Mistakes:
    """What shows in bfloat16 alone."""
    by_expert, by_choice = torch.zeros_like(it.x), torch.zeros_like(it.x)
    for e in range(len(it.down)):
        by_expert = by_expert + it.but(w=it.w * (it.ids == e))
    for w, ids in zip(it.w.T, it.ids.T, strict=True):
        by_choice = by_choice + it.but(w=w[:, None], ids=ids[:, None])
    for y in (by_expert, by_choice):
        yield "The sum is kept in x's dtype, which rounds after each expert. Keep it in float32.", y


def wrong_loop(it: Experts) -> Mistakes:
    """A loop that leaves out experts."""
    E, ids = len(it.down), it.ids

    def only(some: Tensor) -> Tensor:
        return it.but(w=it.w * some)

    yield "Only expert 0 is in the sum. Does `return` stand inside the loop?", only(ids == 0)
    for e in (E - 1, ids.max()):
        yield "Only the last expert is in the sum. Add to y within the loop.", only(ids == e)
    yield "Only K experts are tried. Loop over all E.", only(ids < ids.shape[1])
    before_idle = (ids.flatten().bincount(minlength=E) == 0).cumsum(0) == 0
    ends = "The loop ends at the first expert without tokens. Go on: continue, not break."
    yield ends, only(before_idle[ids])


# ----------------------------------------------------------------------------------- balance loss
def of_balance(logits_NE: Tensor, K: int) -> Mistakes:
    yield from wrong_factor(logits_NE, K)
    yield from wrong_product(logits_NE, K)
    yield from wrong_probabilities(logits_NE, K)
    yield from wrong_counts(logits_NE, K)


def counted(scores_NE: Tensor, K: int) -> Tensor:
    """(N, E), 1 where an expert is chosen."""
    return torch.zeros_like(scores_NE).scatter(1, scores_NE.topk(K).indices, 1.0)


def loss_of(f_E: Tensor, p_E: Tensor) -> Tensor:
    return len(p_E) * (f_E * p_E).sum()


def wrong_factor(logits_NE: Tensor, K: int) -> Mistakes:
    (N, E), loss = logits_NE.shape, balance(logits_NE, K)
    yield "It must be E times the sum over experts (not their mean).", loss / E
    yield "It is multiplied by E twice. Multiply once.", loss * E
    yield "Only the first choice of a token is counted. Count all K.", balance(logits_NE, 1)
    yield "It is divided by K. Leave that out.", loss / K
    yield "It is multiplied by K. Leave that out.", loss * K
    yield "It is divided by K, and not multiplied by E. Multiply by E alone.", loss / E / K
    yield "It is multiplied by K, not by E.", loss / E * K
    yield "It is multiplied by N, not by E.", loss / E * N
    yield "One of the two means is a sum over tokens. Divide it by N.", loss * N
    yield "Both means are sums over tokens. Divide both by N.", loss * N * N
    yield "The sign is wrong.", -loss


def wrong_product(logits_NE: Tensor, K: int) -> Mistakes:
    probs_NE, chosen_NE = logits_NE.softmax(-1), counted(logits_NE, K)
    f_E, p_E, E, by = chosen_NE.mean(0), probs_NE.mean(0), logits_NE.shape[1], "Multiply choices by"
    for loss in (loss_of(f_E, f_E), loss_of(f_E / K, f_E / K)):
        yield "Choices are multiplied by choices. Multiply them by mean probabilities.", loss
    for loss in (loss_of(p_E, p_E), K * loss_of(p_E, p_E), E * probs_NE.square().mean(0).sum()):
        yield f"It is p * p: probabilities twice. {by} mean probabilities.", loss
    yield f"It is always E * K. {by} probabilities of the same expert.", E * f_E.sum()
    yield "The choices are missing: it is always E. Multiply by them.", E * p_E.sum()
    yield "Choices and probabilities are added. Multiply them.", E * (f_E + p_E).sum()
    by_token = (chosen_NE * probs_NE).mean(0).sum()
    for loss in (E * by_token, by_token, E / K * by_token):
        yield "Choices and probabilities are multiplied by token. Take both means first.", loss
    over_experts = E * chosen_NE.mean(1) * probs_NE.mean(1)
    for loss in (over_experts.sum(), over_experts.mean()):
        yield "The means are over experts. Take them over tokens.", loss


def wrong_probabilities(logits_NE: Tensor, K: int) -> Mistakes:
    probs_NE, chosen_NE = logits_NE.softmax(-1), counted(logits_NE, K)
    f_E, kept_NE, of_tokens = chosen_NE.mean(0), probs_NE * chosen_NE, logits_NE.softmax(0)
    tokens = "The softmax is over the tokens (dim=0). Take it over the experts, dim=-1."
    yield tokens, loss_of(f_E, of_tokens.mean(0))
    for kept in (kept_NE, shares(kept_NE)):
        some = "Probabilities are of the chosen alone. Take the mean over all."
        yield some, loss_of(f_E, kept.mean(0))
    yield "These are the scores. Take their softmax.", loss_of(f_E, logits_NE.mean(0))
    yield "These are sigmoids. Take the softmax.", loss_of(f_E, logits_NE.sigmoid().mean(0))
    cooler = loss_of(f_E, (logits_NE / K).softmax(-1).mean(0))
    yield "Scores are divided by K. Take the softmax of them as they are.", cooler
    early = loss_of(f_E, logits_NE.mean(0).softmax(0))
    yield "It is the softmax of mean scores. Take the mean of softmaxes.", early
    log_loss = loss_of(f_E, logits_NE.log_softmax(-1).mean(0))
    for loss in (log_loss, -log_loss):
        yield "The logarithm of the probabilities is taken. Leave it out.", loss


def wrong_counts(logits_NE: Tensor, K: int) -> Mistakes:
    (N, E), probs_NE, best = logits_NE.shape, logits_NE.softmax(-1), "A token chooses its K best."
    p_E, least_NE, above_NE = probs_NE.mean(0), counted(-logits_NE, K), probs_NE > 1 / E
    yield f"It counts the smallest scores. {best}", loss_of(least_NE.mean(0), p_E)
    yield f"It counts experts over 1/E. {best}", loss_of(above_NE.float().mean(0), p_E)
    level_NE = logits_NE >= logits_NE.topk(K).values[:, -1:]
    equal = "Of equal scores it counts more than K. Count those that topk chooses."
    yield equal, loss_of(level_NE.float().mean(0), p_E)
    counts = logits_NE.topk(K).indices.flatten().bincount() / N
    if len(counts) not in (1, E):  # PyTorch cannot multiply them
        counts = torch.tensor(torch.nan)
    yield (
        "The counts lack the last experts. bincount takes minlength=E, one_hot num_classes.",
        loss_of(counts, p_E),
    )


# -------------------------------------------------------------------------------------- the next id
class Ranked(NamedTuple):
    """The probabilities, the likeliest first."""

    down: Tensor
    order: Tensor

    def of(self, kept: Tensor) -> Tensor:
        """Those kept, in the order of the ids, divided by their sum."""
        return shares(self.apart(kept))

    def apart(self, kept: Tensor) -> Tensor:
        return torch.zeros_like(self.down).scatter(-1, self.order, self.down * kept)


def ranked(probs: Tensor) -> Ranked:
    return Ranked(*probs.sort(descending=True, stable=True))


def of_top_p(logits: Tensor, p: float) -> Mistakes:
    probs = logits.softmax(dim=-1)
    yield from wrong_division(logits, p)
    yield from one_off(probs, p)
    yield from wrong_cut(probs, p)
    yield from unsorted(probs, p)
    yield from over_batch(logits, p)


def wrong_division(logits: Tensor, p: float) -> Mistakes:
    """The right ids stay."""
    probs, right = logits.softmax(-1), keep(logits, p)
    stay, (down, order) = right > 0, right.sort(descending=True, stable=True)
    kept, order = probs * stay, ranked(probs).order
    yield "What stays is not divided by its sum. Divide it.", kept
    yield "What stays is divided by p. Divide it by its sum.", kept / p
    yield "It is divided by the sum of all rows. Divide each by its own.", kept / kept.sum()
    again = probs.masked_fill(~stay, -torch.inf)
    for y in (kept.softmax(-1), again.softmax(-1), right.softmax(-1)):
        yield "The softmax is taken of probabilities. Divide them by their sum.", y
    yield "The dropped logits are 0. Make them -inf.", (logits * stay).softmax(-1)
    small = [logits.masked_fill(~stay, x).softmax(-1) for x in (-1.0, -10.0, -20.0, -50.0, -100.0)]
    for y in (*small, *(shares(kept.clamp(min=least)) for least in (1e-9, 1e-8, 1e-6))):
        yield "What is dropped is only nearly 0. Make its logit -inf, or its probability 0.", y
    yield "These are ones. Give probabilities.", stay.float()
    even = shares(stay.float())
    yield "What stays is equally likely. Keep the probabilities' proportions.", even
    yield "These are logits. Give probabilities.", logits.masked_fill(~stay, -torch.inf)
    yield "They are sorted. Put them in the order of ids.", down
    gathered = down.gather(-1, order)
    yield "Put back by gather with order; that takes scatter, or its inverse.", gathered


def one_off(probs: Tensor, p: float) -> Mistakes:
    it = ranked(probs)
    mass, best = it.down.cumsum(-1), torch.arange(probs.shape[1]) == 0
    stay = mass - it.down < p
    for fewer in (mass <= p, mass < p):
        cut, some = it.apart(fewer), it.apart(fewer | best)
        for y in (shares(cut), shares(cut).nan_to_num(0.0), cut, shares(some), some):
            yield "The id with which the sum reaches p is dropped. It stays.", y
    level = it.of(mass - it.down <= p)
    yield "Where the sum is p already, one more stays. Compare by <, not <=.", level
    yield "One id too many stays.", it.of(F.pad(stay[:, :-1], (1, 0), value=True))
    fewer, is_best = F.pad(stay[:, 1:], (0, 1)), probs == probs.amax(-1, keepdim=True)
    value = probs.masked_fill(it.apart(stay) == 0, 2.0).amin(-1, keepdim=True)
    above = shares(probs * ((probs > value) | is_best))
    for y in (it.of(fewer), it.of(fewer | best), above):
        yield "One id too few stays.", y
    yield "The likeliest id is dropped. It always stays.", it.of(stay & ~best)
    yield "Of equally likely ids more stay than needed.", shares(probs * (probs >= value))
    marked = shares(probs * stay)
    yield "What stays is marked in sorted order, but used in the order of ids.", marked


def wrong_cut(probs: Tensor, p: float) -> Mistakes:
    """Much more or less stays."""
    it, V = ranked(probs), probs.shape[1]
    stay, place = it.down.cumsum(-1) - it.down < p, torch.arange(V)
    yield "Nothing is dropped. (Is the sum over the rows, dim=0? Take it over the ids.)", probs
    yield "Only the likeliest id stays.", it.of(place == 0)
    yield "This keeps 1 - p. Keep p.", keep(probs.log(), 1 - p if p < 1 else 1e-9)
    for count in (max(1, round(p * V)), int(p * V), max(1, int(p * V))):
        share = "This keeps a share p of the ids. Their probabilities must add up to p."
        yield share, it.of(place < count)
    first = probs * (keep(probs.log(), p)[:1] > 0)
    for y in (it.of(stay.any(0, keepdim=True)), it.of(stay[:1]), shares(first)):
        yield "All rows have the same cut. Each has its own.", y
    low = "This is min-p: ids of at least p times the largest. Add up probabilities."
    yield low, it.of(it.down >= p * it.down[:, :1])
    yield low, it.of(it.down > p * it.down[:, :1])
    large = it.of(it.down >= p)
    some = [it.of(kept) for kept in (it.down >= 1 - p, it.down < p, (it.down >= p) | (place == 0))]
    for y in (large, large.nan_to_num(0.0), *some):
        yield "Each probability is compared with p. Compare their sum.", y


def unsorted(probs: Tensor, p: float) -> Mistakes:
    it = Ranked(*probs.sort(stable=True))
    mass = it.down.cumsum(-1)
    for kept in (mass - it.down < p, mass <= p, mass < p):
        yield "The sum begins with the unlikeliest. Begin with the likeliest.", it.of(kept)
    mass = probs.cumsum(-1)
    for kept in (mass - probs < p, mass <= p, mass < p):
        yield "They are added up unsorted. Sort them, the likeliest first.", shares(probs * kept)


def over_batch(logits: Tensor, p: float) -> Mistakes:
    """Rows are taken together."""
    probs, it = logits.softmax(-1), ranked(logits.softmax(0))
    stay = it.down.cumsum(-1) - it.down < p
    for y in (keep(logits.softmax(0).log(), p), it.of(stay), it.of(stay | (p >= 1))):
        yield "The softmax is over the rows (dim=0). Take it over the ids, dim=-1.", y
    it = ranked(probs.flatten())
    kept = it.apart(it.down.cumsum(-1) - it.down < p * len(probs)).view_as(probs)
    yield "The rows are taken together. Each has its own set.", shares(kept)


# ------------------------------------------------------------------------------------------- faster
def of_sort(ids_NK: Tensor, E: int) -> Mistakes:
    order, tokens, ends_E = granitemoe.sort_by_expert(ids_NK, E)
    flat, (N, K), columns = ids_NK.flatten(), ids_NK.shape, ids_NK.T.flatten().argsort(stable=True)
    counts_E, short = flat.bincount(minlength=E).int(), flat.bincount().cumsum(0).int()
    yield "These are counts. Add them up: where each run ends.", (order, tokens, counts_E)
    yield "These are the runs' beginnings. Return their ends.", (order, tokens, ends_E - counts_E)
    yield "Each end is one too small: it is the place after a run.", (order, tokens, ends_E - 1)
    yield (
        "The counts lack the last experts. bincount takes minlength=E, one_hot num_classes.",
        (order, tokens, short),
    )
    wrongs = {"% K": order % K, "% N": order % N, "// N": order // N, "// E": order // E}
    for wrong, y in wrongs.items():
        yield f"The token of place p is p // K, not p {wrong}.", (order, y, ends_E)
    last = N * K - 1 - flat.flip(0).argsort(stable=True)
    yield "Equal experts are in reverse. Their places stay in order.", (last, last // K, ends_E)
    mixed = flat.argsort()
    unstable = "The sort is not stable: equal experts change places. Give it stable=True."
    yield unstable, (mixed, mixed // K, ends_E)
    for y in (columns // K, columns % N):
        yield "The choices are flattened by columns. Flatten by tokens.", (columns, y, ends_E)
    places = torch.arange(N * K) // K
    yield "Tokens are not in the sorted order. Divide order_M by K.", (order, places, ends_E)
    inverse = order.argsort()
    for y in (inverse // K, tokens):
        said = "This is the inverse of the order: where each choice goes. Return the order."
        yield said, (inverse, y, ends_E)
    back = flat.sort(stable=True, descending=True).indices
    yield "Experts are in reverse. Expert 0 comes first.", (back, back // K, ends_E)
    for result in ((flat[order], tokens, ends_E), (order, flat[order], ends_E)):
        yield "These are experts. Return places, and their tokens.", result
    rows = (ids_NK.argsort(stable=True) + torch.arange(N)[:, None] * K).flatten()
    each = "Each token's choices are sorted by themselves. Sort all of them, flattened."
    yield each, (rows, rows // K, ends_E)


def of_gate_up(x_D: Tensor, gate_up_EPD: Tensor, ids_K: Tensor) -> Mistakes:
    def act(matrices: Tensor) -> Tensor:
        return granitemoe.swiglu(torch.einsum("kpd,d->kp", matrices, x_D))

    width, chosen = gate_up_EPD.shape[1] // 2, gate_up_EPD[ids_K]
    yield "Gate and up are swapped.", act(chosen.roll(width, 1))
    g, u = torch.einsum("kpd,d->kp", chosen, x_D).chunk(2, dim=-1)
    yield from wrong_hidden(g, u)
    yield "The gate is the first half, not every other row.", act(apart_rows(chosen))
    late, near = gate_up_EPD.flatten(1)[ids_K], torch.arange(width)[:, None] * len(x_D) + width
    swapped = late.view(len(ids_K), len(x_D), -1).transpose(1, 2)
    lines = "Row r of a matrix begins at r * D. A row's numbers follow each other."
    yield lines, act(swapped)
    yield lines, F.silu(g) * (late[:, near + torch.arange(len(x_D))] @ x_D)
    rows = ids_K[:, None] * width + torch.arange(2 * width)
    stride = "An expert has 2 * WIDTH rows. Expert e begins at row e * 2 * WIDTH."
    yield stride, act(gate_up_EPD.flatten(0, 1)[rows])
    unchosen = "It reads an expert that was not chosen. Program k takes number expert_ids[k]."
    yield unchosen, act(gate_up_EPD[: len(ids_K)])


MISTAKES: dict[str, Callable[..., Mistakes]] = {
    "rms_norm": of_norm,
    "rotary": of_rotary,
    "attention": of_attention,
    "route": of_route,
    "expert": of_expert,
    "experts_loop": of_loop,
    "experts_batched": of_batched,
    "load_balancing": of_balance,
    "cached_step": of_step,
    "top_p": of_top_p,
    "sort_by_expert": of_sort,
    "experts_grouped": of_grouped,
    "gate_up": of_gate_up,
}
assert MISTAKES.keys() == PUZZLES.keys()
