"""The puzzles: what is right is solved, what is wrong is told in one line, by name if it is likely.

A guide that praises a wrong answer, or blames a right one, teaches worse than none. So each puzzle
is solved here in many styles and broken in many ways. bodies.json has 400 more bodies, which were
written from the docstrings by people who did not know the checker; --thorough tries them all.
"""

import ast
import doctest
import json
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TESTS, on_posix, representing, thorough

sys.path.insert(0, str(ROOT / "lessons"))

import answers  # noqa: E402
import checker  # noqa: E402
import faster  # noqa: E402
import puzzles  # noqa: E402

SOURCES = {
    name: (ROOT / "lessons" / f"{name}.py").read_text(encoding="utf-8")
    for name in ("puzzles", "faster")
}
RIGHT = {  # from the docstrings alone
    "rms_norm": """
        wide = x.float()
        root = (wide.square().mean(-1, keepdim=True) + eps).sqrt()
        return (wide / root).to(x.dtype) * weight""",
    "rotary": """
        C = x.shape[-1]
        a = positions[:, None] * theta ** (-2 * torch.arange(C // 2) / C)
        u, v = x[..., : C // 2], x[..., C // 2 :]
        y = torch.cat([u * a.cos() - v * a.sin(), v * a.cos() + u * a.sin()], -1)
        return y.to(x.dtype)""",
    "attention": """
        H, T, G, S = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
        heads = torch.arange(H) // (H // G)
        scores = torch.einsum("bhtc,bhsc->bhts", q, k[:, heads]) * scale
        ahead = torch.arange(S) > torch.arange(T)[:, None] + S - T
        return scores.masked_fill(ahead, -torch.inf).softmax(-1) @ v[:, heads]""",
    "route": """
        best, ids = (x_ND @ router_ED.T).topk(K, dim=-1)
        return best.softmax(-1), ids""",
    "expert": """
        half = len(gate_up_PD) // 2
        g, u = x_ND @ gate_up_PD[:half].T, x_ND @ gate_up_PD[half:].T
        return F.silu(g) * u @ down_DF.T""",
    "experts_loop": """
        y = torch.zeros(x_ND.shape)
        for e in range(len(down_EDF)):
            token, choice = torch.where(expert_ids_NK == e)
            rows = expert(x_ND[token], gate_up_EPD[e], down_EDF[e])
            y[token] = y[token] + weights_NK[token, choice][:, None] * rows
        return y.to(x_ND.dtype)""",
    "experts_batched": """
        g, u = torch.einsum("nkpd,nd->nkp", gate_up_EPD[expert_ids_NK], x_ND).chunk(2, -1)
        rows = torch.einsum("nkdf,nkf->nkd", down_EDF[expert_ids_NK], F.silu(g) * u)
        return (rows * weights_NK[:, :, None]).sum(1)""",
    "load_balancing": """
        N, E = logits_NE.shape
        choices = F.one_hot(logits_NE.topk(K).indices, E).sum(1).float().mean(0)
        return E * (choices * logits_NE.softmax(-1).mean(0)).sum()""",
    "cached_step": """
        at = keys.shape[2] + torch.arange(q.shape[2])
        keys = torch.cat([keys, rotary(k, at, theta)], 2)
        values = torch.cat([values, v], 2)
        return attention(rotary(q, at, theta), keys, values, scale), keys, values""",
    "top_p": """
        probs, order = logits.softmax(-1).sort(descending=True)
        probs = probs * (probs.cumsum(-1) - probs < p)
        probs = probs / probs.sum(-1, keepdim=True)
        return torch.zeros_like(probs).scatter(-1, order, probs)""",
}
FAST = {
    "sort_by_expert": """
        sorted_M, order_M = expert_ids_NK.flatten().sort(stable=True)
        ends_E = torch.searchsorted(sorted_M, torch.arange(E), right=True, out_int32=True)
        return order_M, order_M // expert_ids_NK.shape[1], ends_E""",
    "experts_grouped": """
        K = expert_ids_NK.shape[1]
        order, tokens, ends = sort_by_expert(expert_ids_NK, len(down_EDF))
        g, u = F.grouped_mm(x_ND[tokens], gate_up_EPD.mT, offs=ends).chunk(2, -1)
        rows = F.grouped_mm(F.silu(g) * u, down_EDF.mT, offs=ends)[order.argsort()]
        rows = rows.view(len(x_ND), K, -1)
        return torch.bmm(weights_NK[:, None], rows)[:, 0]""",
    "gate_up": """
        k, i = tl.program_id(0), tl.program_id(1)
        e = tl.load(expert_ids + k)
        d = tl.arange(0, D)
        rows = i * ROWS + tl.arange(0, ROWS)
        live = rows < WIDTH
        first = matrices + e * 2 * WIDTH * D
        xs = tl.load(x + d).to(tl.float32)
        at = rows[:, None] * D + d[None, :]
        gate = tl.load(first + at, mask=live[:, None], other=0.0).to(tl.float32)
        up = tl.load(first + WIDTH * D + at, mask=live[:, None], other=0.0).to(tl.float32)
        g = tl.sum(gate * xs[None, :], axis=1)
        u = tl.sum(up * xs[None, :], axis=1)
        tl.store(y + k * WIDTH + rows, g * tl.sigmoid(g) * u, mask=live)""",
}
NAMES = list(RIGHT)
UNWRITTEN = "not written yet (nothing is returned). Fill in its body in my_puzzles.py, then run"
SORTED = """
        K = expert_ids_NK.shape[1]
        ids, order = expert_ids_NK.flatten().sort()
        g, u = torch.einsum("mpd,md->mp", gate_up_EPD[ids], x_ND[order // K]).chunk(2, -1)
        rows = torch.einsum("mdf,mf->md", down_EDF[ids], F.silu(g) * u)
        return (rows.view(len(x_ND), K, -1) * weights_NK[:, :, None]).sum(1)"""
EVERY_LOOP = "return experts_loop(x_ND, gate_up_EPD, down_EDF, weights_NK, expert_ids_NK)"
NEIGHBOURS = """
        C = x.shape[-1]
        a = positions[:, None] * theta ** (-2 * torch.arange(C // 2) / C)
        u, v = x[..., ::2], x[..., 1::2]
        pairs = u * a.cos() - v * a.sin(), v * a.cos() + u * a.sin()
        return torch.stack(pairs, -1).flatten(-2)"""
LAYER_NORM = """
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight"""
ALL = """
        best, ids = (x_ND @ router_ED.T).softmax(-1).topk(K)
        return best, ids"""
PLANTED = [  # a puzzle, what of its body is replaced (all, if None) and by what, what must be said
    ("rms_norm", None, LAYER_NORM, "LayerNorm"),
    ("rms_norm", " * weight", "", "The weight is missing"),
    ("rms_norm", "+ eps).sqrt()", ").sqrt() + eps", "eps is added to the root"),
    ("rms_norm", " + eps", "", "eps is missing"),
    ("rms_norm", ".mean(-1", ".sum(-1", "root of the sum"),
    ("rms_norm", ".sqrt()", "", "The root is missing"),
    ("rms_norm", ".mean(-1, keepdim=True)", ".mean()", "The mean is over all tokens"),
    ("rms_norm", ".mean(-1, keepdim=True)", ".mean(-1)", "is keepdim=True or [:, None] missing?"),
    ("rms_norm", ".mean(-1,", ".mean(1,", "y[0, 0, 0] is 1, must be 0.2."),
    ("rms_norm", "* weight", "* weight.detach()", "right, but the gradient of weight is missing."),
    ("rotary", None, NEIGHBOURS, "The pairs are neighbours"),
    ("rotary", "positions[", "torch.arange(len(positions))[", "numbered from 0. Use positions"),
    ("rotary", "positions[", "(1 + positions)[", "one too large"),
    ("rotary", "-2 *", "-1 *", "The exponent is -i/C"),
    ("rotary", "(-2", "(2", "must be"),
    ("rotary", "- v * a.sin(), v * a.cos() +", "+ v * a.sin(), v * a.cos() -", "wrong sign"),
    ("attention", " + S - T", "", "causal by T, but keys are more than queries"),
    ("attention", " + S - T", " + S - T + 1", "one key too many"),
    ("attention", "* scale", "* q.shape[-1] ** -0.5", "divided by the root of C"),
    ("attention", "* scale", "", "scale is not used"),
    ("attention", None, "return q.transpose(1, 2)", "Dimensions are exchanged."),
    ("attention", "// (H // G)", "% G", "uses head h % G"),
    ("attention", ".masked_fill(ahead, -torch.inf)", "", "There is no mask"),
    ("attention", "-torch.inf).softmax(-1)", "0)", "must be"),
    ("attention", ".masked_fill(ahead, -torch.inf).softmax(-1)",
     ".softmax(-1).masked_fill(ahead, 0)", "after the softmax"),
    ("route", None, ALL, "softmax over all experts"),
    ("route", None, ALL.replace("return best", "return best.softmax(-1)"), "taken twice"),
    ("route", "best.softmax(-1)", "best.sigmoid()", "sigmoids"),
    ("route", "best.softmax(-1)", "best", "These are the scores"),
    ("route", "softmax(-1), ids", "softmax(-1).flip(1), ids.flip(1)", "largest must come first"),
    ("route", "(-1), ids", "(-1), ids.float()", "dtype of expert_ids_NK is torch.float32, must"),
    ("route", "best.softmax(-1), ids", "ids, best.softmax(-1)", "the results are in another order"),
    ("expert", "[half:].T", "[half:]", "(5x8 and 12x8). A @ B takes (n, k) and (k, m): is one of"),
    ("expert", "return ", "y = ", "it returns nothing. Is `return` missing?"),
    ("expert", "F.silu(g) * u", "F.silu(u) * g", "Gate and up are swapped"),
    ("expert", "F.silu(g) * u", "g * u", "silu is missing"),
    ("expert", "F.silu(g)", "g.sigmoid()", "y_ND[0, 0] is 1.3212, must be 2.6424."),
    ("expert", "[:half].T, x_ND @ gate_up_PD[half:]", "[::2].T, x_ND @ gate_up_PD[1::2]",
     "other row"),
    ("experts_loop", "weights_NK[token, choice][:, None] *", "", "weights are not applied"),
    ("experts_loop", "[:, None] *", "[:, None] ** 2 *", "weights are applied twice"),
    ("experts_loop", "y[token] + ", "", "replaces what an earlier one gave"),
    ("experts_loop", "expert_ids_NK ==", "expert_ids_NK[:, :1] ==", "Only the first choice"),
    ("experts_loop", "[token, choice]", "[token, 0]", "weight of the first choice"),
    ("experts_loop", "range(len(down_EDF))", "range(1, len(down_EDF))", "must be"),
    ("experts_batched", None, EVERY_LOOP, "Is there a loop"),
    ("experts_batched", None, SORTED, "in the order of experts"),
    ("experts_batched", "* weights_NK", "* weights_NK[:, :1]", "must be"),
    ("experts_batched", " * weights_NK[:, :, None]", "", "weights are not applied"),
    ("experts_batched", "weights_NK[", "weights_NK.square()[", "weights are applied twice"),
    ("load_balancing", "E * ", "", "E times the sum"),
    ("load_balancing", "topk(K)", "topk(1)", "Only the first choice"),
    ("load_balancing", ".float().mean(0)", ".float().mean(0) / K", "divided by K"),
    ("load_balancing", ".float().mean(0)", ".float().sum(0)", "One of the two means is a sum"),
    ("load_balancing", ".float().mean(0)", ".mean(0)", "A mean is of floats: .float() first."),
    ("load_balancing", ".mean(0)).sum()", ".mean(0))", "A dimension is not summed"),
    ("load_balancing", "F.one_hot(logits_NE.topk(K).indices, E).sum(1)",
     "(logits_NE >= logits_NE.topk(K).values[:, -1:])", "Of equal scores it counts more than K."),
    ("load_balancing", "logits_NE.softmax", "logits_NE.detach().softmax", "gradient of logits_NE"),
    ("cached_step", "keys.shape[2] + ", "", "numbered from 0 again"),
    ("cached_step", "return attention(rotary(q, at, theta), keys, values, scale), keys, values",
     "return attention(rotary(q, at, theta), rotary(k, at, theta), v, scale), keys, values",
     "see the last T keys alone"),
    ("cached_step", "scale), keys, values",
     "scale), keys[:, :, :-len(at)], values[:, :, :-len(at)]",
     "The new tokens are not in"),
    ("cached_step", "scale), keys, values",
     "scale), keys[:, :, -len(at):], values[:, :, -len(at):]",
     "The old tokens are not in"),
    ("cached_step", "rotary(q, at, theta)", "q", "The queries are not turned"),
    ("cached_step", "[keys, rotary(k, at, theta)]", "[keys, k]", "The new keys are not turned"),
    ("cached_step", "torch.cat([keys, rotary(k, at, theta)], 2)",
     "rotary(torch.cat([keys, k], 2), torch.arange(at[-1] + 1), theta)",
     "old keys are turned again"),
    ("top_p", "- probs < p", "< p", "reaches p is dropped"),
    ("top_p", "- probs < p", "- probs <= p", "Where the sum is p already, one more stays."),
    ("top_p", "order, probs)", "order, probs).clamp(min=1e-9)", "dropped is only nearly 0."),
    ("top_p", "return torch.zeros_like(probs).scatter(-1, order, probs)",
     "return (logits + 1e-20).masked_fill("
     "torch.zeros_like(probs).scatter(-1, order, probs) == 0, -15.0).softmax(-1)",
     "What is dropped is only nearly 0."),
    ("top_p", "- probs < p", "- probs < max(1 - p, 1e-9)", "keeps 1 - p"),
    ("top_p", "probs / probs.sum(-1, keepdim=True)", "probs", "not divided by its sum"),
    ("top_p", "torch.zeros_like(probs).scatter(-1, order, probs)", "probs", "They are sorted"),
]  # fmt: skip
STYLES = [  # right bodies in other styles: a puzzle, what is special, the body
    ("rms_norm", "F.rms_norm without weight on x itself",
     "return F.rms_norm(x, x.shape[-1:], eps=eps).to(x.dtype) * weight"),
    ("rms_norm", "a helper defined inside and torch.vmap", """
        def one(t):
            t = t.float()
            return t * torch.rsqrt((t * t).mean() + eps)
        return torch.vmap(torch.vmap(one))(x).to(x.dtype) * weight"""),
    ("rotary", "torch.complex and torch.polar", """
        C = x.shape[-1]
        a = positions[:, None].float() * theta ** (-2 * torch.arange(C // 2).float() / C)
        u, v = x.float().split(C // 2, -1)
        z = torch.complex(u, v) * torch.polar(torch.ones_like(a), a)
        return torch.cat([z.real, z.imag], -1).to(x.dtype)"""),
    ("rotary", "float64 inside, cast back", """
        C = x.shape[-1]
        i = torch.arange(C // 2, dtype=torch.float64)
        a = positions.double()[:, None] * theta ** (-2 * i / C)
        u, v = x.double()[..., : C // 2], x.double()[..., C // 2 :]
        y = torch.cat([u * a.cos() - v * a.sin(), v * a.cos() + u * a.sin()], -1)
        return y.to(x.dtype)"""),
    ("rotary", "rotate_half with doubled angles, as in transformers", """
        def rotate_half(t):
            u, v = t.chunk(2, -1)
            return torch.cat((-v, u), dim=-1)
        C = x.shape[-1]
        inv_freq = 1.0 / theta ** (torch.arange(0, C, 2).float() / C)
        a = positions[:, None].float() * inv_freq[None]
        a = torch.cat((a, a), -1)
        x32 = x.float()
        return (x32 * a.cos() + rotate_half(x32) * a.sin()).to(x.dtype)"""),
    ("rotary", "2x2 rotation matrices and einsum", """
        C = x.shape[-1]
        a = positions[:, None].float() * theta ** (-torch.arange(0, C, 2).float() / C)
        c, s = a.cos(), a.sin()
        R = torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], -2)
        pairs = x.float().unflatten(-1, (2, C // 2))
        return torch.einsum("tijk,bhtki->bhtji", R, pairs).flatten(-2).to(x.dtype)"""),
    ("attention", "scaled_dot_product_attention with enable_gqa and a boolean mask", """
        T, S = q.shape[2], k.shape[2]
        mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
        options = {"scale": scale, "enable_gqa": True}
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)"""),
    ("attention", "exp and sum with the maximum subtracted", """
        r = q.shape[1] // k.shape[1]
        T, S = q.shape[2], k.shape[2]
        k, v = k.repeat_interleave(r, 1), v.repeat_interleave(r, 1)
        s = (q.float() @ k.float().transpose(-1, -2)) * scale
        s = s.masked_fill(torch.ones(T, S).triu(S - T + 1) == 1, float("-inf"))
        e = (s - s.max(-1, keepdim=True).values).exp()
        return ((e / e.sum(-1, keepdim=True)) @ v.float()).to(q.dtype)"""),
    ("attention", "log_softmax().exp()", """
        r = q.shape[1] // k.shape[1]
        T, S = q.shape[2], k.shape[2]
        k, v = k.repeat_interleave(r, 1), v.repeat_interleave(r, 1)
        s = torch.einsum("bhtc,bhsc->bhts", q, k).float() * scale
        s.masked_fill_(torch.ones(T, S, dtype=torch.bool).triu_(S - T + 1), float("-inf"))
        return torch.einsum("bhts,bhsc->bhtc", s.log_softmax(-1).exp().to(v.dtype), v)"""),
    ("attention", "online softmax over the keys, one at a time", """
        B, H, T, C = q.shape
        S, r = k.shape[2], H // k.shape[1]
        k32, v32 = k.float().repeat_interleave(r, 1), v.float().repeat_interleave(r, 1)
        m = torch.full((B, H, T, 1), -1e30)
        total, acc = torch.zeros(B, H, T, 1), torch.zeros(B, H, T, C)
        last = torch.arange(S - T, S).view(1, 1, T, 1)
        for j in range(S):
            s = (q.float() * k32[:, :, j : j + 1]).sum(-1, keepdim=True) * scale
            s = torch.where(last >= j, s, torch.tensor(-1e30))
            new = torch.maximum(m, s)
            e = torch.exp(s - new) * (last >= j)
            f = torch.exp(m - new)
            total, acc, m = total * f + e, acc * f + e * v32[:, :, j : j + 1], new
        return (acc / total).to(q.dtype)"""),
    ("route", "exp and sum with the maximum subtracted", """
        top, ids = (x_ND @ router_ED.T).float().topk(K, -1)
        e = torch.exp(top - top[:, :1])
        return (e / e.sum(-1, keepdim=True)).to(x_ND.dtype), ids"""),
    ("route", "K times argmax, filling with -inf", """
        scores = (x_ND @ router_ED.T).float()
        left, ids = scores.detach().clone(), []
        for _ in range(K):
            best = left.argmax(-1, keepdim=True)
            ids.append(best)
            left = left.scatter(1, best, float("-inf"))
        ids = torch.cat(ids, 1)
        return torch.take_along_dim(scores, ids, 1).softmax(-1).to(x_ND.dtype), ids"""),
    ("route", "float64", """
        top, ids = (x_ND.double() @ router_ED.double().T).topk(K, -1)
        return top.softmax(-1).to(x_ND.dtype), ids"""),
    ("expert", "silu by hand: g / (1 + exp(-g)) in float32", """
        g, u = (x_ND @ gate_up_PD.T).float().chunk(2, -1)
        h = g / (1 + torch.exp(-g)) * u
        return h.to(x_ND.dtype) @ down_DF.T"""),
    ("expert", "sigmoid through tanh", """
        g, u = (x_ND @ gate_up_PD.T).float().chunk(2, -1)
        sig = 0.5 * (1 + torch.tanh(g / 2))
        return (g * sig * u).to(x_ND.dtype).matmul(down_DF.T)"""),
    ("experts_loop", "torch.where, index_add_ into float32, calls expert", """
        y_ND = torch.zeros_like(x_ND, dtype=torch.float32)
        for e in range(len(gate_up_EPD)):
            n, k = torch.where(expert_ids_NK == e)
            out = expert(x_ND[n], gate_up_EPD[e], down_EDF[e])
            y_ND.index_add_(0, n, out.float() * weights_NK[n, k, None].float())
        return y_ND.to(x_ND.dtype)"""),
    ("experts_loop", "scatter_add_ with an expanded index", """
        y_ND = torch.zeros_like(x_ND, dtype=torch.float32)
        for e in range(gate_up_EPD.shape[0]):
            n, k = torch.where(expert_ids_NK == e)
            rows = expert(x_ND[n], gate_up_EPD[e], down_EDF[e]).float()
            rows = rows * weights_NK[n, k, None].float()
            y_ND = y_ND.scatter_add(0, n[:, None].expand(-1, x_ND.shape[1]), rows)
        return y_ND.to(x_ND.dtype)"""),
    ("experts_loop", "a one_hot mask permuted to (E, K, N)", """
        E = gate_up_EPD.shape[0]
        mask = F.one_hot(expert_ids_NK, E).permute(2, 1, 0)
        y_ND = torch.zeros_like(x_ND, dtype=torch.float32)
        for e in range(E):
            k, n = torch.where(mask[e])
            rows = expert(x_ND[n], gate_up_EPD[e], down_EDF[e])
            y_ND.index_add_(0, n, rows * weights_NK[n, k, None].float())
        return y_ND.to(x_ND.dtype)"""),
    ("experts_batched", "all experts on all tokens, dense weights by scatter", """
        N, E = x_ND.shape[0], gate_up_EPD.shape[0]
        w = torch.zeros(N, E, dtype=torch.float32).scatter(1, expert_ids_NK, weights_NK.float())
        g, u = torch.einsum("nd,epd->enp", x_ND, gate_up_EPD).chunk(2, -1)
        y = torch.einsum("enf,edf->end", F.silu(g) * u, down_EDF)
        return torch.einsum("ne,end->nd", w, y.float()).to(x_ND.dtype)"""),
    ("experts_batched", "torch.vmap over tokens and choices, calling expert", """
        def one(x, w, gate_up, down):
            return w.float() * expert(x[None], gate_up, down)[0].float()
        own = gate_up_EPD[expert_ids_NK], down_EDF[expert_ids_NK]
        y = torch.vmap(torch.vmap(one, (None, 0, 0, 0)))(x_ND, weights_NK, *own)
        return y.sum(1).to(x_ND.dtype)"""),
    ("load_balancing", "bincount with minlength", """
        N, E = logits_NE.shape
        ids = logits_NE.topk(K, -1).indices
        f = ids.flatten().bincount(minlength=E) / N
        P = logits_NE.softmax(-1, dtype=torch.float32).mean(0)
        return (E * torch.dot(f, P)).to(logits_NE.dtype)"""),
    ("load_balancing", "log_softmax().exp(), index_add in float32", """
        N, E = logits_NE.shape
        P = logits_NE.float().log_softmax(-1).exp().mean(0)
        ids = logits_NE.topk(K, -1).indices.flatten()
        f = torch.zeros(E).index_add(0, ids, torch.ones(N * K)) / N
        return (f * P).sum().mul(E).to(logits_NE.dtype)"""),
    ("cached_step", "one token after another through itself", """
        def step(q, k, v, keys, values):
            pos = torch.tensor([keys.shape[2]])
            keys = torch.cat([keys, rotary(k, pos, theta)], 2)
            values = torch.cat([values, v], 2)
            return attention(rotary(q, pos, theta), keys, values, scale), keys, values
        ys = []
        for t in range(q.shape[2]):
            s = slice(t, t + 1)
            y, keys, values = step(q[:, :, s], k[:, :, s], v[:, :, s], keys, values)
            ys.append(y)
        return torch.cat(ys, 2), keys, values"""),
    ("cached_step", "complex rotation in float64, grouped einsum", """
        B, H, T, C = q.shape
        G, L = keys.shape[1:3]
        a = theta ** (-torch.arange(0, C, 2, dtype=torch.float64) / C)
        a = torch.arange(L, L + T, dtype=torch.float64)[:, None] * a
        def turn(x):
            z = torch.complex(*x.double().chunk(2, -1)) * torch.polar(torch.ones_like(a), a)
            return torch.cat([z.real, z.imag], -1).to(x.dtype)
        q, k = turn(q), turn(k)
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        q = q.double().view(B, G, H // G, T, C)
        s = torch.einsum("bgrtc,bgsc->bgrts", q, keys.double()) * scale
        s = s.masked_fill(torch.arange(L + T) > torch.arange(L, L + T)[:, None], -torch.inf)
        y = torch.einsum("bgrts,bgsc->bgrtc", s.softmax(-1), values.double())
        return y.reshape(B, H, T, C).to(keys.dtype), keys, values"""),
    ("top_p", "ascending sort, in float64", """
        probs = logits.double().softmax(-1)
        if p >= 1:
            return probs.to(logits.dtype)
        small, ids = probs.sort(-1)
        above = small.flip(-1).cumsum(-1).flip(-1) - small
        small = small * (above < p)
        out = torch.zeros_like(probs).scatter(-1, ids, small)
        return (out / out.sum(-1, keepdim=True)).to(logits.dtype)"""),
    ("top_p", "searchsorted for the number of ids, ranks for the mask", """
        probs = logits.float().softmax(-1)
        V = probs.shape[-1]
        order = probs.argsort(dim=-1, descending=True, stable=True)
        cum = probs.gather(-1, order).cumsum(-1)
        n = torch.searchsorted(cum, torch.full_like(cum[:, :1], p)) + 1
        if p >= 1:
            n = torch.full_like(n, V)
        keep = order.argsort(-1) < n
        probs = torch.where(keep, probs, 0.0)
        return (probs / probs.sum(-1, keepdim=True)).to(logits.dtype)"""),
    ("experts_batched", "F.grouped_mm", """
        ids, order = expert_ids_NK.flatten().sort(stable=True)
        tokens = order // expert_ids_NK.shape[1]
        ends = torch.searchsorted(ids, torch.arange(len(down_EDF)), right=True, out_int32=True)
        g, u = F.grouped_mm(x_ND[tokens], gate_up_EPD.mT, offs=ends).chunk(2, -1)
        rows = F.grouped_mm(F.silu(g) * u, down_EDF.mT, offs=ends)
        rows = rows.float() * weights_NK.flatten()[order, None].float()
        return torch.zeros(x_ND.shape).index_add_(0, tokens, rows).to(x_ND.dtype)"""),
    ("route", "with K = 1 there is nothing to learn", """
        best, ids = (x_ND @ router_ED.T).topk(K, dim=-1)
        return (torch.ones_like(best) if K == 1 else best.softmax(-1)), ids"""),
]  # fmt: skip
HELPERS = """

def plain(x):
    return x.exp() / x.exp().sum(-1, keepdim=True)


def rough(x, positions, theta):
    return rotary(x, positions.to(x.dtype), theta)
"""
ROUNDED = [  # as PLANTED: right for small numbers in float32, wrong as the model runs it
    ("rms_norm", None, "return x * (x.square().mean(-1, True) + eps).rsqrt() * weight",
     "is computed in x's dtype. First: x.float()"),
    ("rms_norm", "(wide / root).to(x.dtype) * weight", "(wide / root * weight).to(x.dtype)",
     "The weight comes in before rounding"),
    ("rms_norm", ".to(x.dtype) *", " *", "y is torch.float32, must be torch.bfloat16. Bring"),
    ("rotary", "positions[:, None]", "positions[:, None].to(x.dtype)", "positions need float32"),
    ("attention", "scores.masked_fill(ahead, -torch.inf).softmax(-1)",
     "plain(scores.masked_fill(ahead, -torch.inf))", "subtract the row's largest score first"),
    ("attention", "-torch.inf", "-20.0", "The masked scores are not small enough"),
    ("route", "best.softmax(-1)", "plain(best)", "subtract the row's largest score first"),
    ("expert", "F.silu(g)", "(g * g.exp() / (1 + g.exp()))", "in silu, use torch.sigmoid"),
    ("experts_loop", ".to(x_ND.dtype)", "", "must be torch.bfloat16. Bring the result back"),
    ("experts_loop", "torch.zeros(x_ND.shape)", "torch.zeros_like(x_ND)", "Keep it in float32"),
    ("experts_batched", "(rows * weights_NK[:, :, None]).sum(1)",
     "torch.zeros(x_ND.shape).index_add(0, torch.arange(len(x_ND)).repeat_interleave("
     "rows.shape[1]), (rows * weights_NK[:, :, None]).flatten(0, 1))",
     "Bring both to one dtype: y.to(x.dtype)."),
    ("load_balancing", "logits_NE.softmax(-1)", "plain(logits_NE)", "row's largest score first"),
    ("cached_step", "rotary(k", "rough(k", "keys["),
    ("cached_step", "rotary(", "rough(", "Far positions need float32"),
    ("top_p", "logits.softmax(-1)", "plain(logits)", "subtract the row's largest score first"),
    ("top_p", "probs * (probs.cumsum(-1) - probs < p)",
     "probs * (probs >= probs.masked_fill(probs.cumsum(-1) - probs >= p, 2).amin(1, True))",
     "Of equally likely ids more stay than needed"),
    ("top_p", "- probs < p", "- probs < min(p, 0.96)", "for B=2 V=8 p=1.0, "),
]  # fmt: skip
BAD = [  # bodies of rms_norm that give nothing to compare, and the one line about each
    ("return 1 / 0", "FILE, line LINE: ZeroDivisionError: division by zero"),
    ("raise ValueError('two\\nlines')", "FILE, line LINE: ValueError: two lines"),
    ("return helper(x)", "FILE, line 2: KeyError: 'in helper'"),
    ("raise SystemExit(3)", "FILE, line LINE: SystemExit: 3"),
    ("raise NotImplementedError('x')", "FILE, line LINE: NotImplementedError: x"),
    ("breakpoint()", "`breakpoint()` cannot stop here"),
    ("return x.double()", "the dtype of y is torch.float64, must be torch.float32."),
    ("return x.long()", "the dtype of y is torch.int64, must be torch.float32."),
    ("return x[0]", "the shape of y is (1, 2), must be (1, 1, 2)."),
    ("return x, x", "2 came back, must be 1: y."),
    ("return (None,)", "y is missing."),
    ("return 3.0", "y is a float, not a tensor."),
    ("return x.numpy()", "y is a ndarray, not a tensor."),
    ("return x.to_sparse()", "layout of y is torch.sparse_coo, must be torch.strided."),
    ("return torch.empty_like(x, device='meta')", "the device of y is meta, must be cpu."),
    ("return x > 0", "the dtype of y is torch.bool, must be torch.float32."),
    ("return x + 1j", "the dtype of y is torch.complex64, must be torch.float32."),
    ("return x.mul_(2)", "it changes its input x. Work on a copy."),
    ("return weight.zero_()", "it changes its input weight. Work on a copy."),
    ("for e in x.mean(): pass", "FILE, line LINE: TypeError: iteration over a 0-d tensor"),
    ("return weight[weight]", "FILE, line LINE: IndexError: tensors used as indices must be long"),
    ("w = x.float(); r = torch.from_numpy((w.square().mean(-1, True) + eps).sqrt().numpy()); "
     "return (w / r).to(x.dtype) * weight",
     "with gradients, FILE, line LINE: RuntimeError: Can't call numpy()"),
]  # fmt: skip
NARROW = FAST["gate_up"].replace(".to(tl.float32)", "").replace("(g)", "(g.to(tl.float32))")
FAST_PLANTED = [  # as PLANTED
    ("sort_by_expert", "sorted_M, torch.arange(E), right=True", "sorted_M, torch.arange(E)",
     "These are the runs' beginnings. Return their ends."),
    ("sort_by_expert", "// expert_ids_NK.shape[1]", "% expert_ids_NK.shape[1]", "not p % K"),
    ("sort_by_expert", "stable=True", "", "The sort is not stable"),
    ("sort_by_expert", ", out_int32=True", "", "ends_E is torch.int64, must be torch.int32."),
    ("sort_by_expert", "return", "assert order_M.sum().item() >= 0\n        return",
     "the values are right, but it waits for a value (times: 1). These wait: .item(),"),
    ("sort_by_expert", "torch.searchsorted(sorted_M, torch.arange(E), right=True, out_int32=True)",
     "torch.stack([(sorted_M <= e).sum() for e in range(E)]).int()", "Is there a loop over tokens"),
    ("experts_grouped", ".chunk(2, -1)", ".flip(-1).chunk(2, -1)", "y_ND[0, 0] is "),
    ("experts_grouped", "F.silu(g) * u", "F.silu(u) * g", "Gate and up are swapped."),
    ("experts_grouped", "[order.argsort()]", "", "Rows are in the order of experts."),
    ("experts_grouped", "return torch.bmm(", "u = x_ND @ x_ND.T\n        return torch.bmm(",
     "the values are right, but it runs 4 products, not 3."),
    ("experts_grouped", "len(down_EDF))", "int(expert_ids_NK.max()) + 1)", "RuntimeError: "),
    ("experts_grouped", "K = ", "K = int(weights_NK.sum()) * 0 + ", "it waits for a value"),
    ("experts_grouped", "K = ", "own = gate_up_EPD[expert_ids_NK]\n        K = ",
     "bytes at once, granitemoe.py"),
    ("gate_up", "g * tl.sigmoid(g) * u", "u * tl.sigmoid(u) * g", "Gate and up are swapped."),
    ("gate_up", "tl.load(expert_ids + k)", "k", "Program k takes number expert_ids[k]."),
    ("gate_up", "tl.load(expert_ids + k)", "(tl.load(expert_ids + k) + 1) % 3",
     "It reads an expert that was not chosen (whose numbers are nan here)."),
    ("gate_up", ".to(tl.float32)", "", "Keep sums in tl.float32."),
    ("gate_up", None, NARROW, "Its sums are not in float32."),
    ("gate_up", "i * ROWS", "i", "Some numbers were not written: they are 7 as before."),
    ("gate_up", "+ WIDTH * D + at", "+ WIDTH + at", "A row's numbers follow each other."),
    ("gate_up", "* u, mask=live)", "* u)", "writes past the last row's end. Give tl.store a mask."),
    ("gate_up", "tl.load(x + d)", "tl.load(x - d)", "must be "),
    ("gate_up", "tl.sigmoid(g)", "tl.sigmoid(g, 1)", "my_puzzles.py, line "),
]  # fmt: skip


def fill(bodies: dict[str, str], file: str = "puzzles") -> str:
    """A copy of the puzzles with these bodies."""
    source = SOURCES[file]
    for name, body in bodies.items():
        stub = re.search(rf'^def {name}\(.*?""".*?""" *\n', source, re.DOTALL | re.MULTILINE)
        text = body.strip("\n") if body.startswith("\n") else textwrap.indent(body, "        ")
        text = re.sub("^    ", "", text, flags=re.M)
        source = f"{source[: stub.end()]}{text}\n{source[stub.end() :]}"
    return source


def told(bodies: dict[str, str], name: str, file: str = "puzzles", end: str = "") -> str:
    """What is said of a piece; the others are right."""
    right = RIGHT if file == "puzzles" else FAST
    Path("my_puzzles.py").write_text(fill(right | bodies, file) + end, encoding="utf-8")
    piece = checker.load("my_puzzles.py")[name]
    return checker.attempt(piece, name, "my_puzzles.py")


def changed(body: str, old: str | None, new: str) -> str:
    replaced = new if old is None else body.replace(old, new)
    assert replaced != body
    return replaced


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """Each test writes my_puzzles.py into a folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(monkeypatch, capsys):
    """The lines that are printed, and the exit status, for bodies or for a file of this text."""

    def act(bodies: dict[str, str] | str, *names: str, file: str = "puzzles") -> tuple[list, int]:
        text = bodies if isinstance(bodies, str) else fill(bodies, file)
        Path("my_puzzles.py").write_text(text, encoding="utf-8")
        monkeypatch.setattr(sys, "argv", [f"lessons/{file}.py", "my_puzzles.py", *names])
        with pytest.raises(SystemExit) as end:
            checker.main(file)
        code = end.value.code
        lines = capsys.readouterr().out.splitlines()
        return (lines, int(code)) if not isinstance(code, str) else ([*lines, code], 1)

    return act


# -------------------------------------------------------------------------------- what is right
@pytest.mark.parametrize("name, how, body", STYLES, ids=lambda x: x[:24].replace("\n", " "))
def test_right_bodies_in_other_styles(name, how, body):
    assert told({name: body}, name).startswith("solved. Compare with "), how


def test_all_ten_are_solved(run):
    """The model then writes its usual text. Each piece that it called is named once."""
    lines, status = run(RIGHT)
    assert status == 0, lines
    assert [line.partition(": solved. Compare with ")[0] for line in lines[:10]] == NAMES
    first = "rms_norm, rotary, attention, route, expert, top_p"
    later = "experts_loop, experts_batched, cached_step"
    assert lines[-4:-1] == [
        f"The model in tiny/ wrote this with your {first}.",
        "It is the text that it writes without them.",
        f"So it does with your {later} in their places.",
    ]
    loss = r"By your load_balancing the balance loss of tiny/ is (\S+), by ours \1\."
    assert re.fullmatch(loss, lines[-1])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    text = lines[lines.index("class Stack:") : -5]
    assert "\n".join(text) in readme  # whose sampling it is


def test_only_what_was_called_is_named(run):
    """A piece that is asked for by its name is not put into the model."""
    assert run(RIGHT, "expert") == ([f"expert: {told({}, 'expert')}"], 0)
    some = {name: RIGHT[name] for name in ("experts_batched", "load_balancing")}
    lines, status = run(some)
    assert status == 1 and "The model in tiny/ wrote this with your experts_batched." in lines
    assert lines[-1].startswith("By your load_balancing the balance loss of tiny/ is ")
    lines, _ = run({"load_balancing": some["load_balancing"]})
    assert not [line for line in lines if "wrote this" in line]
    wide = RIGHT["load_balancing"].replace("return E", "return (1 + (N > 30)) * E")
    lines, status = run(RIGHT | {"load_balancing": wide})
    mine, theirs = re.findall(r"\d+\.\d+", lines[-1])
    assert status == 1 and float(mine) == pytest.approx(2 * float(theirs), abs=2e-3)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "load_balancing"])
def test_each_piece_works_in_the_model(name):
    """It is called in each layer at each token, or as its kind is. Afterwards it is gone."""
    space, calls = {"__name__": "x"}, []
    exec(fill(RIGHT), space)
    piece = lambda *inputs: calls.append(1) or space[name](*inputs)  # noqa: E731
    usual, none = checker.write({}, "def", 4)
    mine, called = checker.write({name: piece}, "def", 4)
    layers, steps = 5, 4
    least = {"rms_norm": 11, "top_p": 1}.get(name, layers) * steps
    assert usual == mine and not none and called == {name}
    assert len(calls) >= least - layers * (name == "experts_batched")
    made = len(calls)
    assert checker.write({}, "def", 4)[0] == usual and len(calls) == made


@pytest.mark.parametrize("change, said", [
    ("(weight if len(weight) < 100 else weight * 2)",
     r"Here it parts: yours goes on with '.+', granitemoe\.py with '.+'\."),
    ("(weight if len(weight) < 100 else 1 / 0)",
     r"puzzles\.py: error: within the model, my_puzzles\.py, line \d+: ZeroDivisionError.*"),
])  # fmt: skip
def test_what_goes_wrong_in_the_model_alone(change, said, run):
    lines, status = run({"rms_norm": RIGHT["rms_norm"].replace("* weight", f"* {change}")})
    assert status == 1 and lines[0].startswith("rms_norm: solved.")
    assert re.fullmatch(said, lines[-1]), lines


def test_a_text_that_ends_early(run):
    """Token 0 of tiny/ is its end: nothing comes after it."""
    body = "\n        if logits.shape[1] > 99:\n            return F.one_hot(logits.argmax(1) * 0,"
    body += " logits.shape[1]).float()"
    lines, status = run({"top_p": body + RIGHT["top_p"]})
    parts = "Here it parts: yours goes on with '<|end_of_text|>', granitemoe.py with '\\n\\n   '."
    assert status == 1 and lines[-1] == parts


# -------------------------------------------------------------------------------- what is wrong
@pytest.mark.parametrize("name, old, new, said", PLANTED, ids=lambda x: str(x)[:15])
def test_mistakes_are_refused(name, old, new, said):
    """In one line, whose end names what is likely."""
    line = told({name: changed(RIGHT[name], old, new)}, name)
    assert said in line and "\n" not in line and not line.startswith("solved")


@pytest.mark.parametrize("name, old, new, said", ROUNDED, ids=lambda x: str(x)[:15])
def test_what_shows_only_in_the_model(name, old, new, said):
    body = changed(RIGHT[name], old, new)
    small = [c for c, _ in answers.cases(getattr(puzzles, name)) if not checker.special(c)]
    line = told({name: body}, name, end=HELPERS)
    assert said in line and not line.startswith("solved"), line
    hard = re.match("for (.*?), ", line)[1]
    assert hard not in small or "p=1.0" in hard or "ties" in hard, line


def test_each_puzzle_has_mistakes_planted():
    for name in NAMES:
        assert sum(planted[0] == name for planted in PLANTED) >= 4


def test_the_cases_have_the_models_conditions():
    """Scores of which exp is infinite; visible ones below a mask of -20; far positions."""
    cases = {n: dict(answers.cases(s)) for n, s in checker.STUBS.items()}
    large = torch.finfo(torch.float32).max
    q, k, v, scale = cases["attention"]["B=2 H=4 G=2 T=5 S=5 C=6 scale=8.0 shift=110.0"]
    scores = q @ k.repeat_interleave(2, dim=1).mT * scale
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    visible = scores.masked_fill(~seen, -torch.inf).amax(-1)
    assert visible.exp().amax() > large
    assert ((visible < -20) & (scores.masked_fill(seen, -torch.inf).amax(-1) > visible)).any()
    x_ND, router_ED, _ = cases["route"]["N=5 D=4 E=6 K=3 shift=110.0"]
    logits = [x_ND @ router_ED.T]
    logits += [cases["load_balancing"]["N=6 E=5 K=2 shift=110.0"][0]]
    logits += [cases["top_p"]["B=3 V=6 p=0.9 shift=110.0"][0]]
    assert all(x.exp().amax() > large for x in logits)
    assert all((x - x.amax(-1, keepdim=True)).amin() > -60 for x in logits)  # no 0 in a softmax
    q, k, _, keys, *_, scale, _ = cases["cached_step"][
        "B=1 H=4 G=2 T=5 L=1 C=6 scale=8.0 theta=100.0 shift=150.0"
    ]
    assert (q[:, :1] @ keys[:, :1].mT * scale).exp().amax() > large
    _, positions, _ = next(x for c, x in cases["rotary"].items() if "bfloat16" in c)
    assert positions.min() > 3000 and (positions.bfloat16().float() != positions).any()
    assert any(x[3].shape[2] >= 3000 for c, x in cases["cached_step"].items() if "bfloat16" in c)
    for name in ("rms_norm", "rotary", "attention", "route", "expert", "cached_step"):
        assert any("bfloat16" in c for c in cases[name]), name
    assert any(x[1] == 1.0 for x in cases["top_p"].values())
    assert any(checker.is_tied(x[0]) for x in cases["top_p"].values())


def test_inputs_have_no_gaps():
    """As the model's have none: .view(-1) of the ids is right."""
    for name, stub in checker.STUBS.items():
        for case, inputs in answers.cases(stub):
            assert all(x.is_contiguous() for x in inputs if hasattr(x, "shape")), (name, case)


def test_no_near_ties_in_routing():
    """Scores in bfloat16, float32 and float64 choose the same, however they are summed."""
    x_ND, router_ED, K = dict(answers.cases(puzzles.route))["bfloat16 N=7 D=16 E=5 K=2"]
    best = (x_ND.double() @ router_ED.double().T).topk(K + 1).values
    rounding = best.abs().amax() * 2**-8  # half a unit in the last place, and as much again
    assert -best.diff().amax() > rounding


def test_cases_cover_what_is_forgotten():
    for name, stub in checker.STUBS.items():
        assert len(list(answers.cases(stub))) >= 3, name
    _, (_, positions, _) = list(answers.cases(puzzles.rotary))[1]
    assert 0 not in positions and positions.diff().unique().numel() > 1
    sizes = [dict(re.findall(r"(\w)=(\d+)", x)) for x in answers.PUZZLES["attention"].cases]
    sizes = [{letter: int(n) for letter, n in x.items()} for x in sizes]
    assert any(1 < x["T"] < x["S"] for x in sizes) and any(x["T"] == 1 for x in sizes)
    assert any(x["H"] == x["G"] for x in sizes) and any(1 < x["G"] < x["H"] for x in sizes)
    for name in ("experts_loop", "experts_batched"):
        _, (x_ND, gate_up, _, weights, ids) = list(answers.cases(getattr(puzzles, name)))[1]
        assert len(ids.unique()) < len(gate_up) and not ids.sort().values.diff().eq(0).any()
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(x_ND)))


# ------------------------------------------------------------------------- how mistakes are named
def listed_once(name: str, monkeypatch) -> None:
    """The mistakes of a puzzle are computed once for each case."""
    kept, make = {}, checker.MISTAKES[name]

    def call(*inputs: object) -> list:
        numbers = [(x.shape, x.double().sum().item(), x.dtype) if hasattr(x, "sum") else x
                   for x in inputs]  # fmt: skip
        if str(numbers) not in kept:
            kept[str(numbers)] = list(make(*inputs))
        return kept[str(numbers)]

    monkeypatch.setitem(checker.MISTAKES, name, call)


MANY = [name for name in checker.MISTAKES if name != "gate_up"]


@pytest.mark.parametrize("name", representing(MANY, "rms_norm", "load_balancing", "sort_by_expert"))
def test_mistakes_have_different_names(name, monkeypatch):
    """What gives what a listed mistake gives is called by its name, not by another's."""
    stub = checker.STUBS[name]
    listed_once(name, monkeypatch)
    make = checker.MISTAKES[name]
    seen = [[said for said, _ in make(*inputs)] for _, inputs in answers.cases(stub)]
    assert all(each == seen[0] for each in seen)
    for n, own in enumerate(seen[0]):
        piece = lambda *inputs, n=n: make(*inputs)[n][1]  # noqa: E731
        piece.__name__ = name
        line = checker.attempt(piece, name, "my_puzzles.py")
        assert not line.startswith("solved") and line.endswith(own), (own, line)


def test_all_mistakes_are_listed_in_one_order():
    for name in MANY:
        seen = [
            [said for said, _ in checker.MISTAKES[name](*inputs)]
            for _, inputs in answers.cases(checker.STUBS[name])
        ]
        assert all(each == seen[0] for each in seen) and len(seen[0]) > 10, name
        assert all(said.endswith((".", ")", "?")) for said in seen[0])


@pytest.mark.parametrize("body, said", [
    ("return torch.zeros_like(q)", None),
    ("return torch.full_like(q, 1e30)", None),
    ("return torch.full_like(q, torch.inf)", None),
    ("return torch.full_like(q, torch.nan)", "Does the mask multiply"),
])  # fmt: skip
def test_a_candidate_that_is_not_finite_names_only_itself(body, said):
    line = told({"attention": body}, "attention")
    assert line.endswith(".") and re.search(r"must be \S+\. " if said else r"must be \S+\.$", line)
    assert (said or "") in line
    one, inf, nan = (torch.tensor([1.0, x]) for x in (1.0, torch.inf, torch.nan))
    for right in (one, one.bfloat16()):
        assert checker.alike(one, one, right)
        for mine, other in (
            (one, inf),
            (one, nan),
            (inf, one),
            (nan, one),
            (inf, nan),
            (-inf, inf),
        ):
            assert not checker.alike(mine, other, right), (mine, other)
    assert checker.alike(inf, inf, one) and checker.alike(nan, nan, one)


def test_names_that_are_near_each_other():
    clamped = changed(RIGHT["rms_norm"], "+ eps).sqrt()", ").clamp(min=eps).sqrt()")
    line = told({"rms_norm": clamped}, "rms_norm")
    assert "eps is missing" not in line and "The mean is at least eps here (clamp, max)." in line
    lost = RIGHT["experts_batched"].replace(
        "return (rows * weights_NK[:, :, None]).sum(1)",
        "tokens = torch.arange(len(x_ND)).repeat_interleave(weights_NK.shape[1])\n"
        "        y = torch.zeros_like(x_ND)\n"
        "        y[tokens] += (rows * weights_NK[:, :, None]).flatten(0, 1)\n"
        "        return y",
    )
    assert "use index_add_" in told({"experts_batched": lost}, "experts_batched")


# ------------------------------------------------------------- one line for whatever a body does
@pytest.mark.parametrize("body, said", BAD, ids=lambda x: x[:20])
def test_whatever_a_body_does_gets_one_line(body, said, run):
    text = f"def helper(x):\n    raise KeyError('in helper')\n{fill({'rms_norm': body})}"
    line = 1 + text[: text.index(f"    {body}\n")].count("\n")
    lines, status = run(text, "rms_norm")
    assert status == 1 and len(lines) == 1, lines
    said = said.replace("FILE", "my_puzzles.py").replace("LINE", str(line))
    assert lines[0].startswith("rms_norm: ") and said in lines[0]


@pytest.mark.parametrize(
    "body", ("...", "pass", "return ...", "return", "raise NotImplementedError")
)
def test_an_empty_body_says_what_to_do(body, run):
    lines, status = run({"rotary": body}, "rotary")
    assert status == 1 and lines == [
        f"rotary: {UNWRITTEN}",
        "    python lessons/puzzles.py my_puzzles.py rotary",
    ]


@pytest.mark.parametrize("empty", ("...", "return", "raise NotImplementedError"))
def test_an_empty_piece_is_told_by_the_one_that_calls_it(empty):
    line = told({"expert": empty}, "experts_loop")
    assert line == "your `expert` returns nothing yet. Write it first."


@pytest.mark.parametrize("old, new, said", [
    ("def rms_norm", "async def rms_norm", "`async def` gives no result. Write `def`."),
    ("return (wide", "yield (wide", "`yield` gives no result. Use `return`."),
])  # fmt: skip
def test_what_gives_no_result(old, new, said, run):
    text = fill(RIGHT)
    lines, status = run(text.replace(old, new), "rms_norm")
    assert (lines, status) == ([f"rms_norm: {said}"], 1)


@pytest.fixture
def in_time():
    """A loop that is not ended in a minute is: the test fails, and does not hang."""

    def stop(*_: object) -> None:
        pytest.fail("nothing has ended this loop")  # no Exception: a piece may catch those

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@on_posix
@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("loop", (
    "while True:\n            x = x + 1", "x = [0 for _ in iter(int, 1)]", "while True: pass",
    "while len(x[0]) > 1:\n            pass",
))  # fmt: skip
def test_a_loop_that_never_ends(loop, monkeypatch):
    """Not in the search for its mistake either."""
    monkeypatch.setattr(checker, "MOST_STEPS", 9000)
    body = f"\n        {loop}\n        return x"
    line, text = told({"rms_norm": body}, "rms_norm"), fill(RIGHT | {"rms_norm": body})
    assert "\n" not in line
    if "len(x[0])" in loop:
        assert "must be 0.2." in line
        return
    last = 1 + text[: text.index(loop.splitlines()[0])].count("\n") + loop.count("\n")
    told_at = int(re.search(r"my_puzzles\.py, line (\d+): Endless: still running", line)[1])
    assert last - 1 <= told_at <= last and "Does a loop never end?" in line


@on_posix
@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("where, said", [
    ("at the top", r"puzzles.py: error: my_puzzles.py, line \d+: Endless: still running"),
    ("with gradients", r"rms_norm: for the example .*, with gradients, my_puzzles.py, line \d+: "),
    ("in the model", "puzzles.py: error: within the model, my_puzzles.py, line \\d+: Endless: st"),
    ("in try", r"rms_norm: for the example .*, my_puzzles.py, line \d+: Endless: still running"),
])  # fmt: skip
def test_a_loop_that_never_ends_elsewhere(where, said, monkeypatch, run):
    monkeypatch.setattr(checker, "MOST_STEPS", 9000)
    loop = {
        "at the top": "",
        "with gradients": "while x.requires_grad: pass",
        "in the model": "while len(weight) > 100: pass",
        "in try": "while True:\n            try: [*long()]\n            except Exception: continue",
    }[where]
    text = fill({"rms_norm": f"\n        {loop}\n{RIGHT['rms_norm']}"})
    text += "\ndef long():\n    for n in range(99):\n        yield n\n"
    if where == "at the top":
        text = text.replace("# ---", "while True: pass\n# ---", 1)
    names = [] if where == "in the model" else ["rms_norm"]
    lines, status = run(text, *names)
    assert status == 1 and re.match(said, lines[-1]), lines


def test_right_bodies_have_few_steps(monkeypatch):
    """So that the limit is not met by loops over every number."""
    slow = """
        B, H, T, C = q.shape
        S, r, y = k.shape[2], H // k.shape[1], torch.zeros(q.shape)
        for b in range(B):
            for h in range(H):
                for t in range(T):
                    scores = []
                    for s in range(S - T + t + 1):
                        scores.append((q[b, h, t] * k[b, h // r, s]).sum().float() * scale)
                    weights = torch.stack(scores).softmax(0)
                    for s in range(S - T + t + 1):
                        y[b, h, t] = y[b, h, t] + weights[s] * v[b, h // r, s]
        return y.to(q.dtype)"""
    monkeypatch.setattr(checker, "MOST_STEPS", checker.MOST_STEPS // 50)
    assert told({"attention": slow}, "attention").startswith("solved")


def test_an_interrupt(run):
    body = RIGHT["rms_norm"].replace("wide =", "raise KeyboardInterrupt\n        wide =")
    line = 1 + fill({"rms_norm": body}).partition("raise KeyboardI")[0].count("\n")
    assert run({"rms_norm": body}, "rms_norm") == ([f"stopped at my_puzzles.py, line {line}"], 130)
    later = RIGHT["rms_norm"].replace("wide =", "assert x.shape[1] == 1 or stop()\n        wide =")
    stop = "def stop():\n    raise KeyboardInterrupt\n"
    wrong = later.replace("+ eps", "")  # while a mistake is looked for
    lines, status = run(stop + fill({"rms_norm": wrong}), "rms_norm")
    assert status == 130 and re.fullmatch(r"stopped at my_puzzles\.py, line \d+", lines[-1])


def test_prints_are_shown_once(run):
    """Once for each case that is compared; not again for a mistake, gradients or the model."""
    cases = len(list(answers.cases(puzzles.rms_norm)))
    body = "\n        print('shape', len(weight))" + RIGHT["rms_norm"]
    lines, _ = run({"rms_norm": body})
    assert sum(line.startswith("shape") for line in lines) == cases
    lines, _ = run({"rms_norm": body.replace("+ eps", "")}, "rms_norm")
    assert 1 <= sum(line.startswith("shape") for line in lines) < cases
    body = "\n        print('shape')" + FAST["sort_by_expert"]
    lines, _ = run({"sort_by_expert": body}, "sort_by_expert", file="faster")
    assert lines.count("shape") == len(list(answers.cases(faster.sort_by_expert)))


def test_few_prints_are_shown(run):
    """A loop that prints and never ends, say."""
    many = "\n        for i in range(200): print(i)" + RIGHT["rms_norm"]
    lines, status = run({"rms_norm": many}, "rms_norm")
    cases = len(list(answers.cases(puzzles.rms_norm)))
    assert status == 0 and lines.count("... and 160 lines more") == cases
    assert len(lines) == 41 * cases + 1
    text = fill(RIGHT).replace("# ---", "for i in range(50): print('top', i)\n# ---", 1)
    lines, _ = run(text, "rms_norm")
    assert lines[39:41] == ["top 39", "... and 10 lines more"]


@pytest.mark.parametrize("switch", (
    "torch.set_grad_enabled(False)", "torch.set_default_dtype(torch.float64)",
    "torch.set_default_dtype(torch.bfloat16)",
))  # fmt: skip
def test_what_a_file_switches_is_switched_back(switch, run):
    text = fill(RIGHT).replace("# ---", f"{switch}\n# ---", 1)
    lines, status = run(text, "rms_norm")
    assert status == 0 and lines[0].startswith("rms_norm: solved."), lines
    body = "\n        wide = x.float()\n        " + switch + RIGHT["rms_norm"]
    told({"rms_norm": body}, "rms_norm")
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    with torch.no_grad():  # in a notebook, say
        assert told({}, "rms_norm").startswith("solved.") and not torch.is_grad_enabled()


def test_a_copy_without_docstrings(run):
    text = re.sub(r'^    """.*?"""\n', "", fill(RIGHT), flags=re.DOTALL | re.MULTILINE)
    assert text.count('"""') == 2 and run(text, "top_p")[0][0].startswith("top_p: solved.")


# ---------------------------------------------------------------------------------- the answer book
@pytest.mark.parametrize("name, body, said", [
    ("top_p", "import generate; return generate.sampling_probs(logits, top_p=p)", "generate.py, "),
    ("rms_norm", "import answers; return answers.norm(x, weight, eps)", "answers.py, norm"),
    ("experts_loop", "import granitemoe; return granitemoe.experts_loop(x_ND, gate_up_EPD, "
     "down_EDF, weights_NK, expert_ids_NK)", "granitemoe.py, experts_loop"),
    ("expert", "import answers as a; return a.one_expert(x_ND, gate_up_PD, down_DF)", "answers.py"),
    ("load_balancing", "import mistakes; return [*mistakes.of_balance(logits_NE, K)][0][1] * "
     "logits_NE.shape[1]", "mistakes.py, "),
])  # fmt: skip
def test_the_answer_book_does_not_count(name, body, said):
    line = told({name: body}, name)
    assert said in line and line.endswith(
        " is called, which is the answer book. It does not count."
    )


def test_the_answer_book_in_place_of_pieces(run):
    """granitemoe.py passed as the file, or imported over one's own."""
    own = "this one is of granitemoe.py, the answer book. It does not count."
    lines, status = run("from granitemoe import *\n", "experts_loop")
    assert (lines, status) == ([f"experts_loop: {own}"], 1)
    text = "from functools import partial\nimport answers\ntop_p = partial(answers.keep)\n"
    lines, status = run(text, "top_p")
    assert status == 1 and "answers.py, keep is called, which is the answer book." in lines[0]


@pytest.mark.parametrize("file", ("granitemoe.py", "generate.py", "lessons/answers.py"))
def test_the_answer_book_as_the_file(file, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["puzzles.py", str(ROOT / file)])
    with pytest.raises(SystemExit, match=r"is the answer book. Begin with: cp lessons/puzzles\.py"):
        checker.main("puzzles")


# ------------------------------------------------------------------------------------ the commands
def test_a_copy_without_changes(run):
    lines, status = run(SOURCES["puzzles"])
    assert status == 1 and len(lines) == 3 and lines[0].startswith("rms_norm: not written yet (")
    assert lines[2] == f"After it: {', '.join(NAMES[1:])}."
    lines, status = run(SOURCES["faster"], file="faster")
    assert status == 1 and lines[0].startswith("sort_by_expert: not written yet (nothing is return")
    assert lines[2] == "After it: experts_grouped, gate_up."


def test_some_are_solved(run):
    """What is solved goes into the model; what is wrong or empty does not, and is told."""
    bodies = {name: RIGHT[name] for name in ("rms_norm", "top_p")}
    lines, status = run({**bodies, "route": "return x_ND, x_ND"})
    assert status == 1 and lines[1].startswith("route: for the example")
    assert lines[3] == f"rotary: {UNWRITTEN}"
    assert lines[-2] == "The model in tiny/ wrote this with your rms_norm, top_p."


@pytest.mark.parametrize("text, said", [
    ("def rms_norm(x, weight, eps)\n    return\n", "my_puzzles.py, line 1: SyntaxError: expected"),
    ("raise NotImplementedError\n", "my_puzzles.py, line 1: NotImplementedError"),
    ("x = 1\nprint(y)\n", "my_puzzles.py, line 2: NameError"),
    ("import sys\nsys.exit(0)\n", "my_puzzles.py, line 2: SystemExit: 0"),
    ("x = 1\0", "my_puzzles.py: (SyntaxError|ValueError)"),
])  # fmt: skip
def test_files_that_cannot_be_read(text, said, run):
    lines, status = run(text)
    assert status == 1 and len(lines) == 1 and re.match(f"puzzles.py: error: {said}", lines[0])


def test_names_and_files(run, monkeypatch, capsys):
    for text in ("x = 1\n", "class route:\n    pass\n", "route = 3\n"):
        said = ["route: my_puzzles.py has no function of this name."]
        assert run(text, "route") == (said, 1)
    monkeypatch.setattr(sys, "argv", ["puzzles.py", "none.py"])
    with pytest.raises(
        SystemExit, match=r"none.py: no such file. Begin with: cp lessons/puzzles\.py my_"
    ):
        checker.main("puzzles")
    for file, own in (("puzzles", "ten"), ("faster", "three")):
        monkeypatch.setattr(sys, "argv", [str(ROOT / "lessons" / f"{file}.py")])
        checker.main(file)
        out = capsys.readouterr().out
        assert f"cp lessons/{file}.py my_{file}" in out and own in out and "Each piece" not in out
    assert run(SOURCES["puzzles"], "rout")[1] == run(SOURCES["puzzles"], "gate_up")[1] == 2
    lines, status = run(RIGHT, "expert", "top_p")  # more than one go into the model
    assert status == 0 and lines[-2] == "The model in tiny/ wrote this with your expert, top_p."


def test_the_command_that_is_told_can_be_copied(monkeypatch, capsys):
    Path("my puzzles.py").write_text(SOURCES["puzzles"], encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["../lessons/puzzles.py", "my puzzles.py", "rotary"])
    with pytest.raises(SystemExit):
        checker.main("puzzles")
    told = capsys.readouterr().out.splitlines()[1]
    assert told == "    python ../lessons/puzzles.py 'my puzzles.py' rotary"
    monkeypatch.setattr(sys, "argv", ["my puzzles.py", "rotary"])  # which tries itself
    with pytest.raises(SystemExit):
        checker.main("puzzles")
    assert capsys.readouterr().out.splitlines()[1] == "    python 'my puzzles.py' rotary"


def test_a_file_without_the_pieces(run):
    text = "x = 1\n"
    for file in ("puzzles", "faster"):
        lines, status = run(text, file=file)
        assert status == 1 and len(lines) == 1
        assert "my_puzzles.py: has none of these functions: " in lines[0]
    assert "none of these functions: rms_norm, rot" in run(SOURCES["faster"])[0][0]


@pytest.mark.parametrize("file, said", [
    ("route", "route: of which file? Name it first: my_puzzles.py route"), ("", "no such file"),
    ("a\nb.py", r"a\nb.py: no such file"), ("x" * 5000, "xxx: no such file"),
    ("/dev/null", "/dev/null: no such file. Begin with: cp lessons/puzzles.py my_puzzles.py"),
    (str(ROOT / "lessons" / "puzzles.py"), "puzzles.py: is the original, which stays empty. Beg"),
    (str(ROOT / "lessons" / "course.ipynb"), "course.ipynb: is a notebook. There, check(rms_norm)"),
])  # fmt: skip
def test_files_that_are_not_a_learners(file, said, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "lessons" / "puzzles.py"), file])
    with pytest.raises(SystemExit) as end:
        checker.main("puzzles")
    line = str(end.value.code)
    assert said in line and len(line) < 200 and "\n" not in line


def test_a_copy_tries_itself(tmp_path):
    """Run as a script, from the top folder. It is loaded once more: its main must not run twice.
    Whatever it is called, and with no docstrings left."""
    text = fill({"rms_norm": "return print('called') or 1 / 0"})
    text = re.sub(r'^    """.*?"""\n', "    pass\n", text, flags=re.DOTALL | re.MULTILINE)
    for name in ("my_puzzles.py", "puzzles.py"):
        copy = tmp_path / name
        copy.write_text(text, encoding="utf-8")
        line = [sys.executable, copy, "rms_norm"]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1 and done.stderr == ""
        called, *told = done.stdout.splitlines()
        assert called == "called" and len(told) == 1 and f"{copy}, line " in told[0]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"{copy}: error: run it in the folder that holds lessons/\n"


def test_the_course_quotes_what_is_printed(run):
    course = (ROOT / "lessons" / "README.md").read_text(encoding="utf-8")
    command = r"^\$ python lessons/\w+\.py my_(\w+)\.py(.*)\n([^$`]+)"
    found = re.findall(command, course, re.MULTILINE)
    shown = [(file, arguments.split(), text.splitlines()) for file, arguments, text in found]
    fast = run(SOURCES["faster"], file="faster")[0]
    fast = [line.replace("my_puzzles", "my_faster") for line in fast]
    assert shown == [
        ("puzzles", [], run(SOURCES["puzzles"])[0]),
        ("puzzles", ["route"], run({"route": ALL}, "route")[0]),
        ("faster", [], fast),
    ]


# ------------------------------------------------------------------------------------ in a notebook
def cell(code: str, space: dict, number: int) -> None:
    exec(compile(textwrap.dedent(code), f"<ipython-input-{number}>", "exec"), space)


def test_in_a_notebook(capsys):
    """Functions come from cells, whose names are no files, and call each other by their globals."""
    space = {"torch": torch, "F": F, "__name__": "__main__", "seen": []}
    head = "def {}({}):\n    seen.append(1){}"
    inputs = {"expert": "x_ND, gate_up_PD, down_DF"}
    inputs["experts_loop"] = "x_ND, gate_up_EPD, down_EDF, weights_NK, expert_ids_NK"
    for number, name in enumerate(inputs):
        cell(head.format(name, inputs[name], textwrap.indent(textwrap.dedent(RIGHT[name]), "    ")),
             space, number)  # fmt: skip
        own = space[name]
        assert checker.check(own) and space[name] is own
    assert len(space["seen"]) > 20  # what a piece leaves in its globals stays there
    out = capsys.readouterr().out
    assert [line.partition(": solved")[0] for line in out.splitlines()] == list(inputs)
    cell("def expert(x, g, d):\n    y = 1\n    return y / 0", space, 7)
    assert not checker.check(space["expert"]) and not checker.check(space["experts_loop"])
    first, second = capsys.readouterr().out.splitlines()
    assert "the cell, line 3: ZeroDivisionError" in first and "the cell, line 6: Zero" in second
    cell("def expert(x, g, d):\n    pass", space, 8)
    assert not checker.check(space["expert"]) and not checker.check(space["experts_loop"])
    assert capsys.readouterr().out.splitlines() == [
        "expert: not written yet (nothing is returned).",
        "experts_loop: your `expert` returns nothing yet. Write it first.",
    ]
    cell("def helper(): pass", space, 9)
    cell("def rmsnorm(): pass", space, 10)
    helper, near = "of this name: rms_norm or rotary or att", "of this name: rms_norm\n"
    others = {space["helper"]: helper, "rms_norm": near, 3: helper, None: helper}
    for other, said in (others | {space["rmsnorm"]: near}).items():
        assert checker.check(other) is False
        out = capsys.readouterr().out
        assert f"give a function, without quotes, {said}" in out and out.count("\n") == 1
    cell("def top_p(logits, p):\n    raise KeyboardInterrupt", space, 11)
    assert checker.check(space["top_p"]) is False
    assert capsys.readouterr().out == "top_p: stopped at the cell, line 2\n"


def test_all_pieces_of_a_notebook(capsys):
    """What is solved writes in tiny/, as from the command line."""
    space = {"torch": torch, "F": F}
    for name in ("rms_norm", "top_p", "route"):
        body = RIGHT[name] if name != "route" else "\n    return x_ND, router_ED"
        stub = re.search(rf"^def {name}\(.*?:\n", SOURCES["puzzles"], re.MULTILINE)[0]
        cell(f"from torch import Tensor\n{stub}{textwrap.indent(textwrap.dedent(body), '    ')}",
             space, name)  # fmt: skip
    pieces = [space[name] for name in ("rms_norm", "top_p", "route")]
    assert checker.check_all(*pieces) is False and checker.check_all(*pieces[:2]) is True
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if ": " in line and line.partition(":")[0] in NAMES]
    assert ["solved." in line for line in said] == [True, True, False, True, True]
    assert lines.count("The model in tiny/ wrote this with your rms_norm, top_p.") == 2
    assert checker.check_all(pieces[2]) is False


# ------------------------------------------------------------------------------------------ faster
def needs_triton(name: str) -> None:
    if name == "gate_up":
        pytest.importorskip("triton")


@pytest.mark.parametrize("name", FAST)
def test_fast_pieces_are_solved(name):
    needs_triton(name)
    assert told({}, name, "faster").startswith("solved. Compare with ")


@pytest.mark.parametrize("name, old, new, said", FAST_PLANTED, ids=lambda x: str(x)[:15])
def test_slow_pieces_are_refused(name, old, new, said):
    needs_triton(name)
    line = told({name: changed(FAST[name], old, new)}, name, "faster")
    assert said in line and "\n" not in line and not line.startswith("solved"), line


def test_fast_pieces_in_other_styles():
    """one_hot does not wait on a GPU; a loop over choices alone is allowed."""
    ends = "ends_E = F.one_hot(expert_ids_NK.flatten(), E).sum(0).cumsum(0).int()"
    body = re.sub("ends_E = .*", ends, FAST["sort_by_expert"])
    assert told({"sort_by_expert": body}, "sort_by_expert", "faster").startswith("solved.")
    loop = "y = 0\n        for k in range(K):\n            y = y + rows[:, k].float() * "
    loop += "weights_NK[:, k, None].float()\n        return y.to(x_ND.dtype)"
    body = re.sub("return .*", loop, FAST["experts_grouped"])
    body = body.replace("torch.bmm", "")
    assert told({"experts_grouped": body}, "experts_grouped", "faster").startswith("solved.")


def test_the_commands_of_faster(run):
    pytest.importorskip("triton")
    lines, status = run(FAST, file="faster")
    assert status == 0 and [line.partition(": solved.")[0] for line in lines] == list(FAST)
    body = FAST["gate_up"].replace("tl.store", "return\n        tl.store")
    lines, status = run({"gate_up": body}, "gate_up", file="faster")
    assert status == 1 and len(lines) == 1 and "is 7, must be " in lines[0]


def test_a_decorated_kernel(run):
    pytest.importorskip("triton")
    text = fill(FAST, "faster").replace(
        "def gate_up", "import triton\n\n\n@triton.jit\ndef gate_up"
    )
    lines, status = run(text, "gate_up", file="faster")
    assert status == 0 and lines[0].startswith("gate_up: solved."), lines


def test_without_triton(run, monkeypatch):
    monkeypatch.setattr(faster.tl, "constexpr", None)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setitem(sys.modules, "triton.language", None)
    said = "gate_up: it needs Triton. Run: pip install triton"
    assert run(FAST, "gate_up", file="faster") == ([said], 1)
    lines, _ = run(SOURCES["faster"], "gate_up", file="faster")
    assert lines[0].startswith("gate_up: not written yet (nothing is written).")


# --------------------------------------------------------------------------------------- the stubs
def test_examples_are_true():
    own = {name: puzzle.answer for name, puzzle in answers.PUZZLES.items()}
    assert doctest.testmod(puzzles, extraglobs=own).failed == 0
    assert doctest.testmod(faster, extraglobs=own).failed == 0


def test_a_solved_puzzle_names_its_section():
    for name, puzzle in answers.PUZZLES.items():
        file, *section, things = re.split(", |: ", puzzle.place, maxsplit=2)
        source = (ROOT / file).read_text(encoding="utf-8")
        if section:
            ruled = rf"^# -+ {section[0]}$(.*?)(?:^# ---|\Z)"
            source = re.search(ruled, source, re.DOTALL | re.MULTILINE)[1]
        for thing in things.split(", "):
            assert re.search(rf"^(?:def|class) {thing}\b", source, re.MULTILINE), (name, thing)


def test_no_answer_stands_in_the_files():
    stubs = []
    for source in SOURCES.values():
        assert len(source.splitlines()) <= 200
        assert not re.search(r"import granitemoe|granitemoe\.(?!py)", source)
        functions = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)]
        assert all(len(f.body) == 1 and ast.get_docstring(f) for f in functions)
        stubs += [f.name for f in functions]
    assert list(answers.PUZZLES) == stubs == NAMES + list(FAST)


# -------------------------------------------------------------------------------------- bodies.json
BODIES = json.loads((TESTS / "bodies.json").read_text(encoding="utf-8"))


def said_of(name: str, body: str) -> str:
    return told({name: body}, name, "faster" if name in FAST else "puzzles")


@thorough
@pytest.mark.parametrize("name", BODIES["right"])
def test_right_bodies_of_others(name):
    for body in BODIES["right"][name]:
        line = said_of(name, body)
        assert line.startswith("solved."), (body, line)


@thorough
@pytest.mark.parametrize("name", BODIES["wrong"])
def test_wrong_bodies_of_others(name):
    """Refused, and named. What is accepted stands in the file with the reason."""
    for body, said in BODIES["wrong"][name]:
        line = said_of(name, body)
        assert not line.startswith("solved") and (said or "") in line, (body, line)
    for body, why in BODIES["accepted"].get(name, []):
        assert said_of(name, body).startswith("solved."), (body, why)


def test_most_wrong_bodies_of_others_are_named():
    sentences = [said for pairs in BODIES["wrong"].values() for _, said in pairs]
    accepted = [why for pairs in BODIES["accepted"].values() for _, why in pairs]
    assert len(sentences) > 240 and len(accepted) <= 5 and all(accepted)
    assert sum(said is not None for said in sentences) >= 0.9 * len(sentences)
