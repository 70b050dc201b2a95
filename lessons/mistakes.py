"""For puzzles.py and faster.py: the likely mistakes of each piece, in words.

A mistake is what is said of it, and what a piece that has made it gives. A piece that gives the
same in every case has made it; where several mistakes give the same, the first is told.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from answers import PUZZLES, attend, balance, choose, keep, norm, one_expert, step, turn
from torch import Tensor

import granitemoe
from granitemoe import experts_loop

Mistakes = Iterator[tuple[str, object]]  # what is said of one, and what it gives


# ------------------------------------------------------------------------------- norm and positions
def of_norm(x: Tensor, weight: Tensor, eps: float) -> Mistakes:
    yield from wrong_eps(x, weight, eps)
    yield from wrong_root(x, weight, eps)
    yield from wrong_mean(x, weight, eps)
    yield from wrong_axis(x, weight, eps)
    yield from wrong_weight(x, weight, eps)
    yield from rounded_norm(x, weight, eps)


def mean_square(x: Tensor) -> Tensor:
    return x.float().square().mean(-1, keepdim=True)


def divided(x: Tensor, root: Tensor, weight: Tensor) -> Tensor:
    return x.float() / root * weight


def wrong_eps(x: Tensor, weight: Tensor, eps: float) -> Mistakes:
    mean = mean_square(x)
    root = mean.sqrt()

    def over(root: Tensor) -> Tensor:
        return divided(x, root, weight)

    yield "eps is added to the root. Add it to the mean, under the root.", over(root + eps)
    yield "eps is missing, or a constant stands in its place. Add eps to the mean.", over(root)
    yield "The mean is at least eps here (clamp, max). Add eps.", over(mean.clamp(min=eps).sqrt())
    yield "The root is at least eps here (clamp, max). Add eps.", over(root.clamp(min=eps))
    yield "eps is squared. Add it as it is.", over((mean + eps * eps).sqrt())
    yield "eps is subtracted. Add it.", over((mean - eps).sqrt())
    yield "eps is added to the sum. Add it to the mean.", over((mean + eps / len(weight)).sqrt())
    yield "eps is added to the result. Add it to the mean.", over(root) + eps


def wrong_root(x: Tensor, weight: Tensor, eps: float) -> Mistakes:
    mean, total = mean_square(x), x.float().square().sum(-1, keepdim=True)

    def over(root: Tensor) -> Tensor:
        return divided(x, root, weight)

    of_sum = "This is the root of the sum. Take the root of the mean."
    yield of_sum, over((total + eps).sqrt())
    yield of_sum, over(total.sqrt() + eps)
    yield of_sum, over(total.sqrt().clamp(min=eps))
    yield of_sum, over(total.sqrt())
    missing = "The root is missing. Divide by the root of the mean."
    yield missing, over(mean + eps)
    yield missing, over(mean)
    yield "The root is taken twice. Take it once.", over((mean + eps).sqrt().sqrt())
    yield "It multiplies by the root. Divide by it.", over((mean + eps).rsqrt())
    yield "It multiplies by the mean. Divide by its root.", over(1 / (mean + eps))
    yield "This is weight over the root. Divide x by it.", weight / (mean + eps).sqrt() + 0 * x
    yield "The division is missing. Divide x by the root.", x * weight


def wrong_mean(x: Tensor, weight: Tensor, eps: float) -> Mistakes:
    """Something else than the mean of squares."""
    wide, mean, sizes = x.float(), x.float().mean(-1, keepdim=True), x.float().abs()

    def over(root: Tensor, x: Tensor = x) -> Tensor:
        return divided(x, root, weight)

    layer_norm = "The mean of x is subtracted: that is LayerNorm. Do not subtract it."
    spreads = [wide.var(-1, keepdim=True, correction=less) for less in (0, 1)]
    for under in (*spreads, mean_square(x)):
        yield layer_norm, over((under + eps).sqrt(), wide - mean)
    deviation = "It divides by the standard deviation. Do not subtract the mean in it."
    for spread in spreads:
        for root in ((spread + eps).sqrt(), spread.sqrt(), spread.sqrt() + eps):
            yield deviation, over(root)
    of_sizes = "This is the mean of the sizes (abs). Square, then mean, then root."
    for size in (sizes, (sizes.square() + eps).sqrt(), sizes + eps):
        yield of_sizes, over(size.mean(-1, keepdim=True))
    late = "The mean is squared. Square first, then take the mean."
    yield late, over((mean.square() + eps).sqrt())
    yield "It divides by the mean of x. Square, then mean, then root.", over(mean + eps)
    largest = "It divides by the largest size. Divide by the root of the mean square."
    yield largest, over(sizes.amax(-1, keepdim=True))


def wrong_axis(x: Tensor, weight: Tensor, eps: float) -> Mistakes:
    def over(dim: int | tuple[int, ...]) -> Tensor:
        mean = x.float().square().mean(dim, keepdim=True)
        return divided(x, (mean + eps).sqrt(), weight)

    yield "The mean is over T. Take it over D, the last dimension.", over(1)
    yield "The mean is over B. Take it over D, the last dimension.", over(0)
    for dims in ((0, 1, 2), (1, 2), (0, 1)):
        yield "The mean is over all tokens. Take one for each token, over D.", over(dims)


def wrong_weight(x: Tensor, weight: Tensor, eps: float) -> Mistakes:
    one = torch.ones_like(weight)
    y = norm(x, one, eps)
    yield "The weight is missing. Multiply by it.", y
    yield "It multiplies by 1 + weight, as Gemma does. Multiply by weight alone.", y * (1 + weight)
    yield "The weight is added. Multiply by it.", y + weight
    yield "It divides by the weight. Multiply by it.", y / weight
    yield "The weight is applied twice. Multiply by it once.", y * weight * weight
    yield "The weight comes in before the mean. Multiply by it last.", norm(x * weight, one, eps)


def rounded_norm(x: Tensor, weight: Tensor, eps: float) -> Mistakes:
    """What rounds at the wrong place, which shows in bfloat16 alone."""
    root = (mean_square(x) + eps).sqrt()
    early = "The weight comes in before rounding. Round to x's dtype first, then multiply."
    yield early, divided(x, root, weight.float()).to(x.dtype)
    rounded = "The mean, or the root, is computed in x's dtype. Go to float32 first: x.float()."
    mean = x.square().mean(-1, keepdim=True)
    yield rounded, x * (mean + eps).rsqrt() * weight
    yield rounded, x / (mean + eps).sqrt() * weight
    late = "The root is rounded to x's dtype before the division. Divide in float32."
    yield late, x / root.to(x.dtype) * weight
    yield late, x * (1 / root).to(x.dtype) * weight


def of_rotary(x: Tensor, positions: Tensor, theta: float) -> Mistakes:
    yield from wrong_positions(x, positions, theta)
    yield from wrong_frequencies(x, positions, theta)
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


def wrong_positions(x: Tensor, positions: Tensor, theta: float) -> Mistakes:
    first, counted = positions[0], torch.arange(len(positions))
    yield "The angles have the wrong sign. Turn the other way.", turn(x, -positions, theta)
    from_first = "The first position is subtracted. Use positions as they are."
    yield from_first, turn(x, positions - first, theta)
    yield (
        "Each position is one too large. Use positions as they are.",
        turn(x, positions + 1, theta),
    )
    yield (
        "Each position is one too small. Use positions as they are.",
        turn(x, positions - 1, theta),
    )
    yield "Tokens are numbered from 0. Use positions.", turn(x, counted, theta)
    on = "Tokens are numbered from the first position on. Use positions."
    yield on, turn(x, first + counted, theta)


def wrong_frequencies(x: Tensor, positions: Tensor, theta: float) -> Mistakes:
    angles, at = angles_of(x, positions, theta), positions[:, None].float()
    C, half = x.shape[3], x.shape[3] // 2
    i = torch.arange(half)
    yield "theta is not used: it is 10,000 here.", turn(x, positions, 10000.0)
    ends = "The exponents end at -1 (linspace). The last is -2i/C with i = C/2 - 1."
    yield ends, turned(x, at * theta ** -torch.linspace(0, 1, half))
    yield "The exponent is -i/C. It must be -2i/C.", turn(x, positions, theta**0.5)
    yield "The exponent is -4i/C (or -2i over C/2). It must be -2i/C.", turn(x, positions, theta**2)
    yield "The exponent has the wrong sign. It must be -2i/C.", turn(x, positions, 1 / theta)
    yield (
        "The exponent is rounded (//). Divide by /.",
        turned(x, at * theta ** (-2 * i // C).float()),
    )
    yield "i begins at 1. It must begin at 0.", turned(x, at * theta ** (-2 * (i + 1) / C))
    yield "The frequencies are in reverse. Begin with i = 0.", turned(x, angles.flip(1))
    yield "All pairs turn alike. The angle depends on i.", turned(x, at.expand(-1, half))
    product = "theta is multiplied by the exponent. Raise it to that power."
    yield product, turned(x, at * theta * (-2 * i / C))
    alone = "It turns by the frequency alone. Multiply it by the position."
    yield alone, turned(x, angles / at.clamp(min=1))
    over = "The position is divided by theta. Raise theta to the power -2i/C."
    yield over, turned(x, at / theta * (2 * i / C))
    yield (
        "The angle is multiplied by 2 pi. It is in radians already.",
        turned(x, angles * 2 * torch.pi),
    )
    degrees = "The angle is taken for degrees. It is in radians already."
    yield degrees, turned(x, angles * torch.pi / 180)


def wrong_pairs(x: Tensor, positions: Tensor, theta: float) -> Mistakes:
    angles, half = angles_of(x, positions, theta), x.shape[3] // 2
    u, v = x.chunk(2, dim=-1)
    paired = "The pairs are neighbours. Pair x_i with x_(i + C/2)."
    yield paired, apart(turn(neighbours(x), positions, theta))
    yield paired, turn(neighbours(x), positions, theta)
    first, second = turn(torch.cat((u, v.flip(3)), dim=-1), positions, theta).chunk(2, dim=-1)
    mirrored = "x_i is paired from the end. Pair it with x_(i + C/2)."
    yield mirrored, torch.cat((first, second.flip(3)), dim=-1)
    a = angles.repeat_interleave(2, dim=-1)
    repeated = "Angles are repeated for neighbours. x_i and x_(i + C/2) have the same angle."
    yield repeated, x * a.cos() + torch.cat((-v, u), dim=-1) * a.sin()
    a = torch.cat((angles, angles), dim=-1)
    partners = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    mixed = "The partners are neighbours, but the angles are not. Pair x_i with x_(i + C/2)."
    yield mixed, x * a.cos() + partners * a.sin()
    yield "The two halves are swapped.", turn(x, positions, theta).roll(half, -1)
    yield "The halves are taken in reverse.", turn(x.roll(half, -1), positions, theta)
    together = "The results are interleaved. The first halves come first."
    yield together, apart(turn(x, positions, theta))


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
    yield from wrong_masking(q, k, v, scale)
    yield from wrong_softmax(q, k, v, scale)
    yield from wrong_heads(q, k, v, scale)
    yield from wrong_inputs(q, k, v, scale)


def wrong_scale(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Mistakes:
    root = q.shape[3] ** -0.5
    yield "Scores are divided by the root of C. Multiply by scale.", attend(q, k, v, root)
    too = "Scores are divided by the root of C too. Multiply by scale alone."
    yield too, attend(q, k, v, scale * root)
    yield "scale is not used. Multiply the scores by it.", attend(q, k, v, 1.0)
    yield "Scores are divided by scale. Multiply by it.", attend(q, k, v, 1 / scale)
    yield "scale is applied twice. Apply it once.", attend(q, k, v, scale**2)
    yield "The root of scale is taken. Multiply by scale itself.", attend(q, k, v, scale**0.5)
    late = "scale comes in after the softmax. Multiply the scores by it."
    yield late, attend(q, k, v, 1.0) * scale


def wrong_mask(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Mistakes:
    """Queries see other keys than they should."""
    T, S, it = q.shape[2], k.shape[2], scored(q, k, v, scale)
    fewer = causal(q, k, S - T - 1)
    yield "There is no mask: queries see keys ahead. Hide those.", attend(q, k, v, scale, S)
    by_T = "It is causal by T, but keys are more than queries. The last query must see all S keys."
    yield by_T, attend(q, k, v, scale, 0)
    yield "Each query sees one key too many.", attend(q, k, v, scale, S - T + 1)
    few = "Each query sees one key too few: not the last of its own."
    yield few, it.masked(fewer)
    yield few, attend(q, k, v, scale, S - T - 1)
    yield few, it.masked(fewer, -1e9)
    future = "The mask is the wrong way round: queries see only what is ahead."
    yield future, it.masked(~it.seen)
    yield future, it.masked(~it.seen, -1e9)
    yield future, it.masked(~fewer)
    yield "The mask is the wrong way round, and by T.", it.masked(~causal(q, k, 0))
    newest = "The queries see the last T keys alone. The older ones count too."
    yield newest, attend(q, k[:, :, -T:], v[:, :, -T:], scale)
    offset = "The mask's offset has the wrong sign. The last query must see all S keys."
    sees = causal(q, k, T - S)
    yield offset, it.masked(sees)
    yield offset, it.masked(sees | (torch.arange(S) == 0))


def wrong_masking(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Mistakes:
    """The right keys are hidden, in the wrong way."""
    it = scored(q, k, v, scale)
    hidden = ~it.seen
    late = "Keys ahead are set to 0 after the softmax. Mask their scores before it."
    yield late, it.mean(it.scores.softmax(-1) * it.seen)
    zero = "Masked scores are 0 or nearly 0, which is a score like others. Make them -inf."
    yield zero, it.masked(it.seen, 0.0)
    yield zero, it.masked(causal(q, k, 0), 0.0)
    yield "1 is added to masked scores. Make them -inf.", it.mean((it.scores + hidden).softmax(-1))
    less = "Masked scores are only 1 less than without a mask. Make them -inf."
    yield less, it.mean((it.scores - 1.0 * hidden).softmax(-1))
    large = "The masked scores are not small enough: a score may be less. Make them -inf."
    yield large, it.masked(it.seen, -1.0)
    for value in (-10.0, -20.0, -50.0, -100.0):
        yield large, it.masked(it.seen, value)
        yield large, it.mean((it.scores + value * hidden).softmax(-1))
    nothing = "All is nan. Does the mask multiply (0 * -inf)? Use masked_fill."
    yield nothing, torch.full_like(q, torch.nan)


def wrong_softmax(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Mistakes:
    it = scored(q, k, v, scale)
    scores = it.scores.masked_fill(~it.seen, 0)
    axis = "The softmax is over the queries (dim=-2). Take it over the keys, dim=-1."
    yield axis, it.masked(it.seen, dim=-2)
    axis = "The softmax is over the heads (dim=1). Take it over the keys, dim=-1."
    yield axis, it.masked(it.seen, dim=1)
    yield "The softmax is missing.", it.mean(scores)
    yield "These are sigmoids. Take the softmax.", it.mean(it.scores.sigmoid() * it.seen)
    yield "exp is not divided by its sum.", it.mean(it.scores.exp() * it.seen)
    share = scores / scores.sum(-1, keepdim=True)
    yield "Scores are divided by their sum. Take the softmax.", it.mean(share)
    once = it.scores.masked_fill(~it.seen, -torch.inf).softmax(-1)
    yield "The softmax is taken twice. Take it once.", it.mean(once.softmax(-1))
    even = it.seen / it.seen.sum(-1, keepdim=True) + 0 * scores
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
    folded = k.transpose(-1, -2).reshape(k.shape) if k.shape[2] == 1 else refolded(k)
    yield "k is reshaped. Transpose it: k.transpose(-1, -2).", attend(q, folded, v, scale)
    right = attend(q, k, v, scale)
    mixed = "Heads and tokens are mixed by a reshape. Use transpose."
    yield mixed, right.transpose(1, 2).reshape(right.shape)


def refolded(x: Tensor) -> Tensor:
    """What must be transposed to get x as a reshape gives it, with its last dimensions swapped."""
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
    yield from wrong_turns(it)
    yield from wrong_kept(it)
    yield from wrong_seen(it)
    yield from other_mistakes(it)


def wrong_numbers(it: Step) -> Mistakes:
    at, T = it.at(), it.q.shape[2]
    from_0 = torch.arange(T)

    def every(numbers: Tensor) -> tuple:
        return it.numbered(numbers, numbers)

    L = "Number them from L."
    yield f"New tokens are numbered from 0 again. {L}", every(from_0)
    yield f"New tokens are numbered from L + 1. {L}", every(at + 1)
    yield f"New tokens are numbered from L - 1. {L}", every(at - 1)
    yield "All new tokens have the number L. Number them L, L + 1, ...", every(0 * at + at[0])
    last = "All new tokens have the last one's number. Number them L, L + 1, ..."
    yield last, every(0 * at + at[-1])
    yield f"New tokens are numbered from L + T. {L}", every(at + T)
    yield f"New tokens are numbered from T. {L}", every(from_0 + T)
    for name, size in (
        ("H", it.q.shape[1]),
        *zip("BGC", it.keys.shape[:2] + it.keys.shape[3:], strict=True),
    ):
        yield f"New tokens are numbered from {name}. {L} It is keys.shape[2].", every(from_0 + size)
    ends = "They are numbered from the end. Number them from 0, all together."
    yield ends, every(from_0 + 1 - T)
    yield ends, every(T - 1 - from_0)
    yield f"The queries are numbered from 0 again. {L}", it.numbered(from_0, at)
    yield f"The new keys are numbered from 0 again. {L}", it.numbered(at, from_0)


def wrong_turns(it: Step) -> Mistakes:
    at, theta = it.at(), it.theta
    still = 0 * at
    yield "The angles have the wrong sign. Turn the other way.", it.numbered(-at, -at)
    yield "The queries are turned the wrong way.", it.numbered(-at, at)
    yield "The queries are not turned. Turn them too.", it.numbered(still, at)
    yield "The new keys are not turned. Turn them too.", it.numbered(at, still)
    yield "Neither queries nor new keys are turned. Turn both.", it.numbered(still, still)
    y, keys, values = it.but()
    again = torch.cat((turn(it.keys, torch.arange(at[0]), theta), keys[:, :, at[0] :]), dim=2)
    said = "The old keys are turned again. Turn the new ones alone."
    yield said, (it.seeing(again, values), again, values)
    yield said, (it.seeing(again, values), keys, values)
    turned_v = torch.cat((it.values, turn(it.v, at, theta)), dim=2)
    said = "The values are turned. Turn queries and keys alone."
    yield said, (it.seeing(keys, turned_v), keys, turned_v)


def wrong_kept(it: Step) -> Mistakes:
    """Wrong keys and values are returned, or are in a wrong order."""
    (y, keys, values), L = it.but(), it.keys.shape[2]
    unturned = "The new keys are not turned in what is returned."
    yield unturned, (y, torch.cat((it.keys, it.k), dim=2), values)
    yield "The new tokens are not in the keys and values returned.", (y, it.keys, it.values)
    alone = "The old tokens are not in the keys and values returned."
    yield alone, (y, keys[:, :, L:], values[:, :, L:])
    front_k, front_v = (torch.cat((x[:, :, L:], x[:, :, :L]), dim=2) for x in (keys, values))
    swapped = "The new tokens stand before the old ones. Put them after."
    yield swapped, (it.seeing(front_k, front_v), front_k, front_v)
    yield swapped, (y, front_k, front_v)
    of_values = "New values stand before the old ones. Put them after, as the keys."
    yield of_values, (it.seeing(keys, front_v), keys, front_v)
    yield "Keys and values are swapped in attention.", (it.seeing(values, keys), keys, values)
    yield "Keys and values are swapped in what is returned.", (y, values, keys)


def wrong_seen(it: Step) -> Mistakes:
    """Attention over other keys than it should, or with other heads."""
    (_, keys, values), L, T = it.but(), it.keys.shape[2], it.q.shape[2]

    def seeing(keys: Tensor = keys, values: Tensor = values, last: int | None = None) -> tuple:
        return it.seeing(keys, values, last), *whole

    whole = keys, values
    yield "The queries see only the new tokens.", seeing(keys[:, :, L:], values[:, :, L:])
    yield "The queries see only the old tokens.", seeing(it.keys, it.values, L + T)
    yield "There is no mask: new tokens see those after them. Hide those.", seeing(last=L + T)
    yield "It is causal by T: the mask must begin at the old tokens' end.", seeing(last=0)
    yield "Each query sees one key too many.", seeing(last=L + 1)
    yield "Each query sees one key too few: not its own.", seeing(last=L - 1)
    groups, must = it.q.shape[1] // keys.shape[1], "It must be head h // (H/G)."
    tiled = (x.repeat(1, groups, 1, 1) for x in whole)
    yield f"Query head h uses head h % G. {must}", seeing(*tiled)
    yield f"All query heads use key head 0. {must}", seeing(keys[:, :1], values[:, :1])


def other_mistakes(it: Step) -> Mistakes:
    at, scale, theta = it.at(), it.scale, it.theta
    root = it.q.shape[3] ** -0.5
    yield "Scores are divided by the root of C. Multiply by scale.", it.but(scale=root)
    yield "scale is not used. Multiply the scores by it.", it.but(scale=1.0)
    yield "scale is applied twice. Apply it once.", it.but(scale=scale**2)
    yield "scale and theta are exchanged.", it.but(scale=theta, theta=scale)
    yield "The exponent of theta has the wrong sign. It must be -2i/C.", it.but(theta=1 / theta)
    yield "The exponent is -i/C. It must be -2i/C.", it.but(theta=theta**0.5)

    def both(act: Callable[[Tensor], Tensor]) -> tuple:
        return it.turning(act, act)

    paired = "The pairs are neighbours. Pair x_i with x_(i + C/2)."
    yield paired, both(lambda x: apart(turn(neighbours(x), at, theta)))
    said = "Angles are computed in the inputs' dtype. Far positions need float32."
    rough_at, frequencies = at[:, None].to(it.q.dtype), angles_of(it.q, torch.ones(1), theta)
    for angles in (rough_at * frequencies.to(it.q.dtype), rough_at * frequencies):
        yield said, both(lambda x, angles=angles: turned(x, angles).to(x.dtype))


# ----------------------------------------------------------------------------- mixture of experts
def of_route(x_ND: Tensor, router_ED: Tensor, K: int) -> Mistakes:
    logits_NE = (x_ND @ router_ED.T).float()
    yield from wrong_weights(x_ND, router_ED, K)
    yield from wrong_scores(x_ND, router_ED, K)
    yield from wrong_order(*choose(x_ND, router_ED, K))
    yield from wrong_experts(logits_NE, K)


def wrong_weights(x_ND: Tensor, router_ED: Tensor, K: int) -> Mistakes:
    """The right experts."""
    weights_NK, ids_NK = choose(x_ND, router_ED, K)
    logits_NE = (x_ND @ router_ED.T).float()
    top_NK, all_NK = logits_NE.gather(1, ids_NK), logits_NE.softmax(-1).gather(1, ids_NK)
    yield "This is the softmax over all experts. Take it over the chosen K.", (all_NK, ids_NK)
    twice = "The softmax is taken twice. Take it once, over the chosen K."
    yield twice, (all_NK.softmax(-1), ids_NK)
    yield twice, (weights_NK.softmax(-1), ids_NK)
    tokens = "The softmax is over the tokens (dim=0). Take it over the chosen K, dim=-1."
    of_tokens, by_tokens = logits_NE.softmax(0), logits_NE.softmax(0).topk(K)
    yield tokens, (top_NK.softmax(0), ids_NK)
    yield tokens, (of_tokens.gather(1, ids_NK), ids_NK)
    yield tokens, by_tokens
    yield tokens, (by_tokens.values / by_tokens.values.sum(-1, True), by_tokens.indices)
    sigmoids = top_NK.sigmoid()
    yield "These are sigmoids. Take the softmax.", (sigmoids, ids_NK)
    shares = sigmoids / sigmoids.sum(-1, True)
    yield "These are sigmoids over their sum. Take the softmax.", (shares, ids_NK)
    yield "These are the scores. Take their softmax.", (top_NK, ids_NK)
    shares = top_NK / top_NK.sum(-1, True)
    yield "Scores are divided by their sum. Take their softmax.", (shares, ids_NK)
    yield "These are exp of the scores. Divide them by their sum.", (top_NK.exp(), ids_NK)
    yield "These are logarithms. Take the softmax.", (top_NK.log_softmax(-1), ids_NK)
    take, one = "Take the softmax of the K scores.", torch.ones_like(top_NK)
    yield f"All weights are 1/K. {take}", (one / K, ids_NK)
    yield f"All weights are 1. {take}", (one, ids_NK)
    yield f"Probabilities among all experts are divided by K. {take}", (all_NK / K, ids_NK)
    yield "Weights are multiplied by K. They sum to 1.", (weights_NK * K, ids_NK)
    yield "Weights are divided by K. They sum to 1 already.", (weights_NK / K, ids_NK)


def wrong_scores(x_ND: Tensor, router_ED: Tensor, K: int) -> Mistakes:
    logits_NE = (x_ND @ router_ED.T).float()
    (E, D), plain = router_ED.shape, "Take the dot products as they are."

    def by(scores_NE: Tensor) -> tuple:
        top = scores_NE.float().topk(K)
        return top.values.softmax(-1), top.indices

    yield f"Scores are divided by the root of D. {plain}", by(logits_NE * D**-0.5)
    yield f"Scores are divided by K. {plain}", by(logits_NE / K)
    cosines = F.normalize(x_ND.float(), dim=-1) @ F.normalize(router_ED.float(), dim=-1).T
    yield "These are cosines. Take the dot products.", by(cosines)
    reshaped = "router_ED is reshaped, or not transposed. Transpose it."
    yield reshaped, by(x_ND @ router_ED.reshape(D, E))


def wrong_order(weights_NK: Tensor, ids_NK: Tensor) -> Mistakes:
    order = ids_NK.argsort(1)
    sorted_NK, sorted_ids = weights_NK.gather(1, order), ids_NK.gather(1, order)
    yield "The largest must come first.", (weights_NK.flip(1), ids_NK.flip(1))
    yield "They are sorted by expert. The largest must come first.", (sorted_NK, sorted_ids)
    by_id = "Weights are in the order of experts, numbers in that of scores."
    yield by_id, (sorted_NK, ids_NK)
    by_id = "Numbers are in the order of experts, weights in that of scores."
    yield by_id, (weights_NK, sorted_ids)
    yield "Weights are in reverse: the best has the smallest.", (weights_NK.flip(1), ids_NK)
    yield "Numbers are in reverse.", (weights_NK, ids_NK.flip(1))
    yield "Experts are numbered from 1. Number them from 0.", (weights_NK, ids_NK + 1)


def wrong_experts(logits_NE: Tensor, K: int) -> Mistakes:
    N, order = len(logits_NE), logits_NE.argsort(-1, descending=True)
    weights_NK = logits_NE.topk(K).values.softmax(-1)

    def by(ids_NK: Tensor) -> tuple:
        return logits_NE.gather(1, ids_NK).softmax(-1), ids_NK

    yield "The best expert is left out. Begin with it.", by(order.roll(-1, -1)[:, :K])
    small, least = "It chooses the smallest scores. Choose the largest.", order.flip(1)[:, :K]
    yield small, by(least)
    yield small, by(least.flip(1))
    yield small, ((-logits_NE).gather(1, least).softmax(-1), least)
    sizes = "It chooses the largest sizes (abs). Choose the largest scores."
    signless = logits_NE.abs().topk(K)
    yield sizes, by(signless.indices)
    yield sizes, (signless.values.softmax(-1), signless.indices)
    first = torch.arange(K).expand(N, K)
    yield "It takes the first K experts. Choose the K largest scores.", by(first)
    places = "The numbers are places among the chosen. Return the experts' numbers."
    yield places, (weights_NK, first)
    yield "It takes the best expert K times. Choose K experts.", by(order[:, :1].expand(N, K))
    ranks = "These are ranks. Return the numbers of the chosen experts."
    yield ranks, (weights_NK, order.argsort(1)[:, :K])


def of_expert(x_ND: Tensor, gate_up_PD: Tensor, down_DF: Tensor) -> Mistakes:
    D, width = down_DF.shape
    g, u = F.linear(x_ND, gate_up_PD).chunk(2, dim=-1)
    y_ND, down = one_expert(x_ND, gate_up_PD, down_DF), down_DF.T
    yield "Gate and up are swapped.", F.silu(u) * g @ down
    rows_PD, other = apart_rows(gate_up_PD), "The gate is the first half, not every other row."
    yield other, one_expert(x_ND, rows_PD, down_DF)
    yield other, one_expert(x_ND, rows_PD.roll(width, 0), down_DF)
    for said, hidden in wrong_hidden(g, u):
        yield said, hidden @ down
    reshaped = "down_DF is reshaped, or not transposed. Transpose it."
    yield reshaped, F.silu(g) * u @ down_DF.reshape(width, D)
    yield "silu comes after down. Apply it to g, before.", F.silu(g * u @ down)
    reshaped = "gate_up_PD is reshaped, or not transposed. Transpose it."
    yield reshaped, one_expert(x_ND, refolded(gate_up_PD), down_DF)
    late = F.linear(x_ND, gate_up_PD[width - 1 : -1])
    yield "The up begins one row too early. It begins at row F.", F.silu(g) * late @ down
    yield "x is added. The layer does that later.", y_ND + x_ND
    yield "silu is applied to the result too. Apply it to g alone.", F.silu(y_ND)
    yield "The result is multiplied by x.", y_ND * x_ND
    yield "The result is divided by the root of F.", y_ND * width**-0.5


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
    yield "silu is applied to the product. Apply it to g alone.", F.silu(g * u)
    yield "silu is applied to u too. Apply it to g alone.", F.silu(g) * F.silu(u)
    yield "silu(g) and u are added. Multiply them.", F.silu(g) + u
    yield "u is missing: multiply silu(g) by u.", F.silu(g)
    yield "silu(g) is missing: only u is there.", u
    yield "This is silu(u), without g. Take silu(g) * u.", F.silu(u)
    yield (
        "silu(g) is multiplied by g (is u made of the gate too?). Multiply it by u.",
        F.silu(g) * g,
    )
    yield "silu is applied twice. Apply it once.", F.silu(F.silu(g)) * u
    yield f"This is sigmoid(g) * u * u. {take}", g.sigmoid() * u * u
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
    yield from every_expert(it)
    yield from wrong_rows(it)
    yield from wrong_inside(it)
    yield from rounded_sum(it)


def of_loop(x: Tensor, gate_up: Tensor, down: Tensor, w: Tensor, ids: Tensor) -> Mistakes:
    it = Experts(x, gate_up, down, w, ids)
    yield from of_experts(*it)
    yield from wrong_loop(it)


def wrong_sum(it: Experts) -> Mistakes:
    """Weights and sums."""
    w, ids, (E, (_, K)) = it.w, it.ids, (len(it.down), it.w.shape)
    y, plain = it.but(), it.but(w=it.w**0)
    yield "The weights are not applied (or added up over K: that is 1).", plain
    yield "The weights are applied twice. Apply them once.", it.but(w=w * w)
    yield "The weights' softmax is taken. They are weights already.", it.but(w=w.softmax(-1))
    yield "The weight of the first choice is used for all.", it.but(w=w[:, :1].expand_as(w))
    yield "The weight of the last choice is used for all.", it.but(w=w[:, -1:].expand_as(w))
    yield "The weights are in reverse.", it.but(w=w.flip(1))
    by_id = "Weights go by the order of experts. They go by that of choices."
    yield by_id, it.but(w=w.gather(1, ids.argsort(1).argsort(1)))
    yield "Each weight is divided by K. They sum to 1 already.", y / K
    yield "The sum is divided by E. Take the sum.", y / E
    yield "The choices' mean is taken, without weights.", plain / K
    shares_E = torch.zeros(E, dtype=w.dtype).index_add(0, ids.flatten(), w.flatten())
    by_expert = "Weights are divided by their sum over an expert's tokens. Use them as they are."
    yield by_expert, it.but(w=w / shares_E[ids])
    by_token = "Weights are divided by their sum over tokens. Use them as they are."
    yield by_token, it.but(w=w / w.sum(0))
    column = "Expert e takes column e of the weights. Take that of the choice."
    yield column, it.but(w=w.gather(1, ids % K))
    lost = "Everything is 0: a sum is thrown away (index_add without _, or y[ids][mask] += ...)."
    yield lost, y * 0
    yield "x is added. The layer does that later.", y + it.x


def wrong_choice(it: Experts) -> Mistakes:
    """Some of a token's choices are lost."""
    w, ids, first = it.w, it.ids, torch.arange(it.w.shape[1]) == 0
    last = first.flip(0)
    yield "Only the first choice of a token is in the sum. Add up all K.", it.but(w=w * first)
    alone = "Only the first choice is used, with weight 1. Add up all K, with their weights."
    yield alone, it.but(w=w**0 * first)
    once = "Only the last choice of a token is in the sum. (y[tokens] += ... adds one row a token.)"
    yield once, it.but(w=w * last)
    yield "The first choice of a token is left out.", it.but(w=w * ~first)
    yield "The last choice of a token is left out.", it.but(w=w * ~last)
    replaces = "A later expert replaces what an earlier one gave. Add them."
    yield replaces, it.but(w=w * (ids == ids.amax(1, keepdim=True)))
    yield replaces, it.but(w=w * (ids == ids.amin(1, keepdim=True)))


def wrong_matrices(it: Experts) -> Mistakes:
    x, w, ids, width = it.x, it.w, it.ids, it.down.shape[2]
    reshaped = "gate_up_EPD is reshaped. Swap its last two dimensions: transpose(1, 2)."
    yield reshaped, it.but(gate_up=refolded(it.gate_up))
    reshaped = "down_EDF is reshaped, or not transposed. Swap its last two: transpose(1, 2)."
    yield reshaped, it.but(down=refolded(it.down))
    yield "Gate and up are swapped.", it.but(gate_up=it.gate_up.roll(width, 1))
    other = "The gate is the first half, not every other row."
    yield other, it.but(gate_up=apart_rows(it.gate_up))
    gate_up_NPD = torch.einsum("nk,nkpd->npd", w, it.gate_up[ids])
    down_NDF = torch.einsum("nk,nkdf->ndf", w, it.down[ids])
    merged = "The matrices are averaged first. Experts are not linear: weigh their outputs."
    yield merged, it._replace(gate_up=gate_up_NPD, down=down_NDF).rows(x, torch.arange(len(x)))


def wrong_ids(it: Experts) -> Mistakes:
    """Sums over other experts than the chosen ones."""
    E, (N, K), w, ids = len(it.down), it.w.shape, it.w, it.ids
    yield "Expert 0 is left out. Begin with it.", it.but(w=w * (ids != 0))
    yield "The last expert is left out. There are E.", it.but(w=w * (ids != E - 1))
    yield "The last expert is left out. There are E.", it.but(w=w * (ids != ids.max()))
    yield "Choice k uses expert k. Use expert_ids_NK.", it.but(ids=torch.arange(K).expand(N, K))
    yield "All tokens use the first token's experts.", it.but(ids=ids[:1].expand(N, K))
    yield "Each expert's number is one too large.", it.but(ids=(ids + 1) % E)
    yield "Each expert's number is one too small.", it.but(ids=(ids - 1) % E)
    shifted = "Each choice goes to the next expert. (Are the runs' ends their beginnings?)"
    yield shifted, it.but(w=w * (ids + 1 < E), ids=(ids + 1) % E)
    yield "All experts use the same matrices, those of expert 0.", it.but(ids=ids * 0)


def every_expert(it: Experts) -> Mistakes:
    """Experts that were not chosen have a part in the sum."""
    E, N, w, ids = len(it.down), len(it.w), it.w, it.ids
    every = torch.arange(E).expand(N, E)
    chosen = "Each expert sees all tokens. Only those that chose it count."
    yield chosen, it.but(w=w.new_ones(N, E), ids=every)
    yield chosen, it.but(w=w[:, :1].expand(N, E), ids=every)
    shares_E = torch.zeros(E, dtype=w.dtype).index_add(0, ids.flatten(), w.flatten())
    one = "Each expert has one weight for all tokens. Each choice has its own."
    yield one, it.but(w=shares_E.expand(N, E), ids=every)
    soft = torch.zeros(N, E).scatter(1, ids, w.float()).softmax(-1)
    said = "Experts that were not chosen get a weight (a softmax over zeros). Leave them at 0."
    yield said, it.but(w=soft, ids=every)


def wrong_rows(it: Experts) -> Mistakes:
    """One row for each of the N * K choices, in a wrong order or with a wrong token."""
    x, w_M, (N, K) = it.x, it.w.flatten()[:, None], it.w.shape
    ids_M, (order, tokens, _) = it.ids.flatten(), granitemoe.sort_by_expert(it.ids, len(it.down))
    rows = it.rows(x.repeat_interleave(K, dim=0), ids_M)
    wrong, back = it.rows(x.repeat(K, 1), ids_M) * w_M, order.argsort()
    modulo = "Choice p belongs to token p // K, not p % N."
    yield modulo, torch.zeros_like(x).index_add(0, torch.arange(N * K) % N, wrong)
    yield modulo, it.summed(wrong)
    inputs = "The weights are on the input. Multiply the expert's output."
    yield inputs, it.summed(it.rows(x.repeat_interleave(K, dim=0) * w_M, ids_M))
    unsorted = "The rows are not gathered in the order of experts. Take x_ND[tokens_M]."
    lined = it.rows(x.repeat_interleave(K, dim=0), ids_M[order])
    yield unsorted, it.summed(lined[back] * w_M)
    yield unsorted, torch.zeros_like(x).index_add(0, tokens, lined * w_M[order])
    put_back = "Rows are in the order of experts. Put them back in the order of tokens."
    yield put_back, it.summed(rows[order] * w_M)
    yield put_back, it.summed((rows * w_M)[order])
    weights = "Weights are in the order of tokens, rows in that of experts. Reorder the weights."
    yield weights, torch.zeros_like(x).index_add(0, tokens, rows[order] * w_M)
    inverse = "Rows are put back by order. Use its inverse, order.argsort()."
    yield inverse, it.summed(rows[order][order] * w_M)
    yield inverse, it.summed((rows * w_M)[order][order])
    by_token = "The rows lie token by token: view them as (N, K, D), not (K, N, D)."
    yield by_token, (rows * w_M).view(K, N, -1).sum(dim=0)


def wrong_inside(it: Experts) -> Mistakes:
    """Within an expert."""
    g, u = torch.einsum("nd,nkpd->nkp", it.x, it.gate_up[it.ids]).chunk(2, dim=-1)
    down, w = it.down[it.ids], it.w
    early = F.silu(g * w[..., None]) * u
    on_g = "The weights are on g. Multiply the expert's output."
    yield on_g, torch.einsum("nkf,nkdf->nd", early, down)
    for said, hidden in wrong_hidden(g, u):
        yield said, torch.einsum("nkf,nkdf,nk->nd", hidden, down, w)


def rounded_sum(it: Experts) -> Mistakes:
    """What shows in bfloat16 alone."""
    said = "The sum is kept in x's dtype, which rounds after each expert. Keep it in float32."
    sums = [torch.zeros_like(it.x), torch.zeros_like(it.x)]
    for e in range(len(it.down)):
        sums[0] = sums[0] + it.but(w=it.w * (it.ids == e))
    for choice in range(it.w.shape[1]):
        sums[1] = sums[1] + it.but(w=it.w[:, choice, None], ids=it.ids[:, choice, None])
    for rough in sums:
        yield said, rough


def wrong_loop(it: Experts) -> Mistakes:
    """A loop that leaves out experts."""
    E, w, ids = len(it.down), it.w, it.ids
    returned = "Only the first expert is in the sum. Does `return` stand inside the loop?"
    yield returned, it.but(w=w * (ids == 0))
    last = "Only the last expert is in the sum. Add to y within the loop."
    yield last, it.but(w=w * (ids == E - 1))
    yield last, it.but(w=w * (ids == ids.max()))
    yield "Only K experts are tried. Loop over all E.", it.but(w=w * (ids < w.shape[1]))
    idle = ids.flatten().bincount(minlength=E) == 0
    ends = "The loop ends at the first expert without tokens. Go on: continue, not break."
    yield ends, it.but(w=w * (idle.cumsum(0) == 0)[ids])


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
    yield "It is divided by K twice. Leave that out.", loss / K / K
    yield "One of the two means is a sum over tokens. Divide it by N.", loss * N
    yield "Both means are sums over tokens. Divide both by N.", loss * N * N
    yield "1 is subtracted.", loss - 1
    yield "K is subtracted.", loss - K
    yield "The sign is wrong.", -loss


def wrong_product(logits_NE: Tensor, K: int) -> Mistakes:
    probs_NE, chosen_NE = logits_NE.softmax(-1), counted(logits_NE, K)
    f_E, p_E, E = chosen_NE.mean(0), probs_NE.mean(0), logits_NE.shape[1]
    choices = "Choices are multiplied by choices. Multiply them by mean probabilities."
    yield choices, loss_of(f_E, f_E)
    yield choices, loss_of(f_E / K, f_E / K)
    twice = "It is p * p: probabilities twice. Multiply choices by mean probabilities."
    yield twice, loss_of(p_E, p_E)
    yield twice, K * loss_of(p_E, p_E)
    yield twice, E * probs_NE.square().mean(0).sum()
    always = "It is always E * K. Multiply choices and probabilities of the same expert."
    yield always, E * f_E.sum()
    yield "The choices are missing: it is always E. Multiply by them.", E * p_E.sum()
    yield "Choices and probabilities are added. Multiply them.", E * (f_E + p_E).sum()
    each = "Choices and probabilities are multiplied token by token. Take both means first."
    by_token = (chosen_NE * probs_NE).mean(0).sum()
    for factor in (E, 1, E / K):
        yield each, factor * by_token
    over_experts = "The means are over experts. Take them over tokens."
    products = chosen_NE.mean(1) * probs_NE.mean(1)
    yield over_experts, E * products.sum()
    yield over_experts, E * products.mean()
    variance = "This is the variance of the load. Multiply choices by probabilities."
    yield variance, E * (f_E / f_E.sum() - 1 / E).square().sum()


def wrong_probabilities(logits_NE: Tensor, K: int) -> Mistakes:
    probs_NE, chosen_NE = logits_NE.softmax(-1), counted(logits_NE, K)
    f_E, kept_NE, over_tokens = chosen_NE.mean(0), probs_NE * chosen_NE, logits_NE.softmax(0)
    tokens = "The softmax is over the tokens (dim=0). Take it over the experts, dim=-1."
    yield tokens, loss_of(f_E, over_tokens.mean(0))
    yield tokens, loss_of(counted(over_tokens, K).mean(0), over_tokens.mean(0))
    some = "Probabilities are of the chosen alone. Take the mean over all."
    yield some, loss_of(f_E, kept_NE.mean(0))
    yield some, loss_of(f_E, (kept_NE / kept_NE.sum(-1, keepdim=True)).mean(0))
    yield "These are the scores. Take their softmax.", loss_of(f_E, logits_NE.mean(0))
    yield "These are sigmoids. Take the softmax.", loss_of(f_E, logits_NE.sigmoid().mean(0))
    early = "It is the softmax of mean scores. Take the mean of softmaxes."
    yield early, loss_of(f_E, logits_NE.mean(0).softmax(0))
    log = "The logarithm of the probabilities is taken. Leave it out."
    yield log, loss_of(f_E, probs_NE.log().mean(0))
    yield log, -loss_of(f_E, logits_NE.log_softmax(-1).mean(0))


def wrong_counts(logits_NE: Tensor, K: int) -> Mistakes:
    (N, E), probs_NE, best = logits_NE.shape, logits_NE.softmax(-1), "A token chooses its K best."
    p_E = probs_NE.mean(0)
    least = counted(-logits_NE, K).mean(0)
    yield f"It counts the smallest scores. {best}", loss_of(least, p_E)
    above = (probs_NE > 1 / E).float().mean(0)
    yield f"It counts experts over 1/E. {best}", loss_of(above, p_E)
    counts = logits_NE.topk(K).indices.flatten().bincount() / N
    fits = len(counts) in (1, E)  # else PyTorch cannot multiply
    lacking = "The counts lack the last experts. bincount takes minlength=E."
    yield lacking, loss_of(counts if fits else torch.tensor(torch.nan), p_E)


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


def shares(probs: Tensor) -> Tensor:
    return probs / probs.sum(-1, keepdim=True)


def of_top_p(logits: Tensor, p: float) -> Mistakes:
    probs = logits.softmax(dim=-1)
    yield from wrong_division(logits, p)
    yield from one_off(probs, p)
    yield from wrong_cut(probs, p)
    yield from compared_alone(probs, p)
    yield from unsorted(probs, p)
    yield from over_batch(logits, p)


def wrong_division(logits: Tensor, p: float) -> Mistakes:
    """The right ids stay."""
    probs, right = logits.softmax(-1), keep(logits, p)
    stay = right > 0
    kept = probs * stay
    yield "What stays is not divided by its sum. Divide it.", kept
    yield "What stays is divided by p. Divide it by its sum.", kept / p
    all_rows = "It is divided by the sum of all rows. Divide each by its own."
    yield all_rows, kept / kept.sum()
    twice = "The softmax is taken of probabilities. Divide them by their sum."
    yield twice, kept.softmax(-1)
    yield twice, probs.masked_fill(~stay, -torch.inf).softmax(-1)
    yield twice, right.softmax(-1)
    yield "The dropped logits are 0. Make them -inf.", (logits * stay).softmax(-1)
    yield "These are ones. Give probabilities.", stay.float()
    equal = "What stays is equally likely. Keep the probabilities' proportions."
    yield equal, shares(stay.float())
    yield "These are logits. Give probabilities.", logits.masked_fill(~stay, -torch.inf)
    order_of = "They are sorted. Put them in the order of ids."
    yield order_of, right.sort(descending=True).values
    gathered = "Put back by gather with order; that takes scatter, or its inverse."
    down, order = ranked(probs)
    yield gathered, right.sort(descending=True, stable=True).values.gather(-1, order)


def one_off(probs: Tensor, p: float) -> Mistakes:
    it = ranked(probs)
    mass, best = it.down.cumsum(-1), torch.arange(probs.shape[1]) == 0
    stay = mass - it.down < p
    dropped = "The id with which the sum reaches p is dropped. It stays."
    for fewer in (mass <= p, mass < p):
        yield dropped, it.of(fewer)
        yield dropped, it.of(fewer).nan_to_num(0.0)
        yield dropped, it.apart(fewer)
        yield dropped, it.of(fewer | best)
        yield dropped, it.apart(fewer | best)
    yield "One id too many stays.", it.of(F.pad(stay[:, :-1], (1, 0), value=True))
    few, fewer = "One id too few stays.", F.pad(stay[:, 1:], (0, 1))
    yield few, it.of(fewer)
    yield few, it.of(fewer | best)
    value = probs.masked_fill(it.apart(stay) == 0, 2.0).amin(-1, keepdim=True)
    yield few, shares(probs * ((probs > value) | (probs == probs.amax(-1, keepdim=True))))
    yield "The likeliest id is dropped. It always stays.", it.of(stay & ~best)
    yield "Of equally likely ids more stay than needed.", shares(probs * (probs >= value))
    marked = "What stays is marked in sorted order, but used in the order of ids."
    yield marked, shares(probs * stay)


def wrong_cut(probs: Tensor, p: float) -> Mistakes:
    """Much more or less stays."""
    it, V = ranked(probs), probs.shape[1]
    stay, place = it.down.cumsum(-1) - it.down < p, torch.arange(V)
    nothing = "Nothing is dropped. (Is the sum over the rows, dim=0? Take it over the ids.)"
    yield nothing, probs
    yield nothing, it.of(it.down.cumsum(0) - it.down < p)
    yield "Only the likeliest id stays.", it.of(place == 0)
    yield "This keeps 1 - p. Keep p.", keep(probs.log(), 1 - p if p < 1 else 1e-9)
    share = "This keeps a share p of the ids. Their probabilities must add up to p."
    for count in (max(1, round(p * V)), int(p * V), max(1, int(p * V))):
        yield share, it.of(place < count)
    cut = "All rows have the same cut. Each has its own."
    yield cut, it.of(stay.any(0, keepdim=True).expand_as(stay))
    yield cut, it.of(stay[:1].expand_as(stay))


def compared_alone(probs: Tensor, p: float) -> Mistakes:
    it = ranked(probs)
    down, best = it.down, torch.arange(probs.shape[1]) == 0
    low = "This is min-p: ids of at least p times the largest. Add up probabilities."
    yield low, it.of(down >= p * down[:, :1])
    yield low, it.of(down > p * down[:, :1])
    alone = "Each probability is compared with p. Compare their sum."
    yield alone, it.of(down >= p)
    yield alone, it.of(down >= p).nan_to_num(0.0)
    yield alone, it.of((down >= p) | best)
    yield alone, it.of(down >= 1 - p)
    yield alone, it.of(down < p)


def unsorted(probs: Tensor, p: float) -> Mistakes:
    it = Ranked(*probs.sort(stable=True))
    least = "The sum begins with the unlikeliest. Begin with the likeliest."
    mass = it.down.cumsum(-1)
    for kept in (mass - it.down < p, mass <= p, mass < p):
        yield least, it.of(kept)
    said = "They are not sorted before they are added up. Sort them, the likeliest first."
    mass = probs.cumsum(-1)
    for kept in (mass - probs < p, mass <= p, mass < p):
        yield said, shares(probs * kept)


def over_batch(logits: Tensor, p: float) -> Mistakes:
    """Rows are taken together."""
    rows = "The softmax is over the rows (dim=0). Take it over the ids, dim=-1."
    probs, columns = logits.softmax(-1), logits.softmax(0)
    yield rows, keep(columns.log(), p)
    it = ranked(columns)
    stay = it.down.cumsum(-1) - it.down < p
    yield rows, it.of(stay)
    yield rows, it.of(stay | (p >= 1))
    it = ranked(probs.flatten())
    stay = it.down.cumsum(-1) - it.down < p * len(probs)
    yield (
        "The rows are taken together. Each has its own set.",
        shares(it.apart(stay).view_as(probs)),
    )


# ------------------------------------------------------------------------------------------- faster
def of_sort(ids_NK: Tensor, E: int) -> Mistakes:
    order_M, tokens_M, ends_E = granitemoe.sort_by_expert(ids_NK, E)
    flat, (N, K) = ids_NK.flatten(), ids_NK.shape
    counts_E = flat.bincount(minlength=E).int()
    yield "These are counts. Add them up: where each run ends.", (order_M, tokens_M, counts_E)
    beginnings = "These are the runs' beginnings. Return their ends."
    yield beginnings, (order_M, tokens_M, ends_E - counts_E)
    yield "Each end is one too small: it is the place after a run.", (order_M, tokens_M, ends_E - 1)
    short = "The counts lack the last experts. bincount takes minlength=E."
    yield short, (order_M, tokens_M, flat.bincount().cumsum(0))
    must = "The token of place p is p // K, not"
    yield f"{must} p % K.", (order_M, order_M % K, ends_E)
    yield f"{must} p % N.", (order_M, order_M % N, ends_E)
    yield f"{must} p // N.", (order_M, order_M // N, ends_E)
    yield f"{must} p // E.", (order_M, order_M // E, ends_E)
    last = N * K - 1 - flat.flip(0).argsort(stable=True)
    yield "Equal experts are in reverse. Their places stay in order.", (last, last // K, ends_E)
    columns = ids_NK.T.flatten().argsort(stable=True)
    by_column = "The choices are flattened by columns. Flatten by tokens."
    yield by_column, (columns, columns // K, ends_E)
    yield by_column, (columns, columns % N, ends_E)
    places = "Tokens are not in the sorted order. Divide order_M by K."
    yield places, (order_M, torch.arange(N * K) // K, ends_E)
    inverse = order_M.argsort()
    said = "This is the inverse of the order: where each choice goes. Return the order."
    yield said, (inverse, inverse // K, ends_E)
    yield said, (inverse, tokens_M, ends_E)
    back = flat.sort(stable=True, descending=True).indices
    yield "Experts are in reverse. Expert 0 comes first.", (back, back // K, ends_E)
    yield "These are experts. Return places, and their tokens.", (flat[order_M], tokens_M, ends_E)


def of_gate_up(x_D: Tensor, gate_up_EPD: Tensor, ids_K: Tensor) -> Mistakes:
    def act(matrices: Tensor) -> Tensor:
        return granitemoe.swiglu(torch.einsum("kpd,d->kp", matrices, x_D))

    width, chosen = gate_up_EPD.shape[1] // 2, gate_up_EPD[ids_K]
    yield "Gate and up are swapped.", act(chosen.roll(width, 1))
    g, u = torch.einsum("kpd,d->kp", chosen, x_D).chunk(2, dim=-1)
    yield from wrong_hidden(g, u)
    yield "The gate is the first half, not every other row.", act(apart_rows(chosen))
    rows = ids_K[:, None] * width + torch.arange(2 * width)
    stride = "An expert has 2 * WIDTH rows. Expert e begins at row e * 2 * WIDTH."
    yield stride, act(gate_up_EPD.flatten(0, 1)[rows])
    unchosen = "It reads an expert that was not chosen. Program k takes number expert_ids[k]."
    yield unchosen, act(gate_up_EPD[: len(ids_K)])
    yield unchosen, torch.full_like(g, torch.nan)


MISTAKES: dict[str, Callable[..., Mistakes]] = {
    "rms_norm": of_norm,
    "rotary": of_rotary,
    "attention": of_attention,
    "route": of_route,
    "expert": of_expert,
    "experts_loop": of_loop,
    "experts_batched": of_loop,
    "load_balancing": of_balance,
    "cached_step": of_step,
    "top_p": of_top_p,
    "sort_by_expert": of_sort,
    "experts_grouped": of_experts,
    "gate_up": of_gate_up,
}
assert MISTAKES.keys() <= PUZZLES.keys()
