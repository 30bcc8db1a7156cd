"""The operations of model.py in Triton, for CUDA: the same names, arguments and results (model.use_kernels picks them).

Each does in one pass over its data what torch's own calls do in several. Not here, because they cannot pay: the matrix
products, also those of the log-probs, which cuBLAS does at the machine's rate. logprob_stats and logprob_backward are what is
left of the log-probs: one reading of the logits forward, one reading and writing backward, where torch makes about
eight.
The file is not called kernels.py because transformers would take it for the package of that name.

With TRITON_INTERPRET=1 in the environment everything runs on a CPU, slowly, for the tests.

The letters B, T, H, K, D, S are those of model.py; N is the number of rows, C or F their width.
"""
import os

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def check(device):
    """Raises ValueError where these kernels cannot run."""
    if torch.device(device).type != "cuda" and not INTERPRETED:
        raise ValueError(f"the Triton kernels need a CUDA device, found {str(device)!r}; use torch's there")


def _block(width):
    """(block, warps) for a program that holds a whole row: the power of two that covers it."""
    block = triton.next_power_of_2(width)
    return block, min(16, max(4, block // 512))


# ---------------------------------------------------------------------------------------------------------------------
# RMSNorm, alone and after an addition

@triton.jit
def _norm(x, y, weight, total, out, C, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    place, live = tl.program_id(0).to(tl.int64) * C + at, at < C
    a = tl.load(x + place, mask=live, other=0)
    if ADD:
        a = (a.to(tl.float32) + tl.load(y + place, mask=live, other=0).to(tl.float32)).to(a.dtype)
        tl.store(total + place, a, mask=live)
    a = a.to(tl.float32)
    a *= tl.rsqrt(tl.sum(a * a) / C + eps) * tl.load(weight + at, mask=live, other=0).to(tl.float32)
    tl.store(out + place, a, mask=live)


@triton.jit
def _norm_back(x, weight, d_total, d_out, dx, dw, N, C, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """With r = 1 / sqrt(mean(x^2) + eps) and g = weight * d_out: dx = r (g - x r^2 mean(g x)), dw = sum of d_out x r.
    A program sums dw of every num_programs-th row."""
    at = tl.arange(0, BLOCK)
    live = at < C
    w, sums = tl.load(weight + at, mask=live, other=0).to(tl.float32), tl.zeros((BLOCK,), tl.float32)
    for row in range(tl.program_id(0), N, tl.num_programs(0)):
        place = tl.cast(row, tl.int64) * C + at
        a = tl.load(x + place, mask=live, other=0).to(tl.float32)
        d = tl.load(d_out + place, mask=live, other=0).to(tl.float32)
        r = tl.rsqrt(tl.sum(a * a) / C + eps)
        sums += d * a * r
        d *= w
        d = r * (d - a * (r * r * tl.sum(d * a) / C))
        if ADD:
            d += tl.load(d_total + place, mask=live, other=0).to(tl.float32)
        tl.store(dx + place, d, mask=live)
    tl.store(dw + tl.program_id(0) * C + at, sums, mask=live)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, weight, eps):
        x, C = x.contiguous(), x.shape[-1]
        total, out = x if y is None else torch.empty_like(x), torch.empty_like(x)
        block, warps = _block(C)
        _norm[(x.numel() // C,)](x, x if y is None else y.contiguous(), weight, total, out, C, eps, ADD=y is not None,
                                 BLOCK=block, num_warps=warps)
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.add = eps, y is not None
        return (total, out) if ctx.add else out

    @staticmethod
    def backward(ctx, *d):
        x, weight = ctx.saved_tensors       # read once: recomputed activations are given out a single time
        C = x.shape[-1]
        N, d = x.numel() // C, [each.contiguous() for each in d]
        dx, parts = torch.empty_like(x), torch.empty(min(N, 264), C, dtype=torch.float32, device=x.device)
        block, warps = _block(C)
        _norm_back[(len(parts),)](x, weight, d[0], d[-1], dx, parts, N, C, ctx.eps, ADD=ctx.add, BLOCK=block,
                                  num_warps=warps)
        return dx, dx if ctx.add else None, parts.sum(0).to(weight.dtype), None


def norm(x, weight, eps):
    return _Norm.apply(x, None, weight, eps)


def add_norm(x, y, weight, eps):
    return _Norm.apply(x, y, weight, eps)


# ---------------------------------------------------------------------------------------------------------------------
# Rotary positions, queries and keys in one launch

@triton.jit
def _turn(x, out, c, s, start, heads, i, D, HEADS: tl.constexpr):
    head = tl.arange(0, HEADS)[:, None]
    at, live = start * heads + head * D + i, (head < heads) & (i < D // 2)
    a = tl.load(x + at, mask=live, other=0).to(tl.float32)
    b = tl.load(x + at + D // 2, mask=live, other=0).to(tl.float32)
    tl.store(out + at, a * c - b * s, mask=live)
    tl.store(out + at + D // 2, b * c + a * s, mask=live)


@triton.jit
def _rope(q, k, cos, sin, q_out, k_out, H, K, D, sign, H_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
          HALF: tl.constexpr):
    """A program turns all heads of one token. sin: its second half is positive."""
    start, i = tl.program_id(0).to(tl.int64) * D, tl.arange(0, HALF)[None]
    c = tl.load(cos + start + i, mask=i < D // 2, other=0)
    s = tl.load(sin + start + D // 2 + i, mask=i < D // 2, other=0) * sign
    _turn(q, q_out, c, s, start, H, i, D, H_BLOCK)
    _turn(k, k_out, c, s, start, K, i, D, K_BLOCK)


class _Rope(torch.autograd.Function):
    @staticmethod
    def turn(q, k, cos, sin, sign):
        (B, T, H, D), K = q.shape, k.shape[2]
        q, k, cos, sin = q.contiguous(), k.contiguous(), *(a.expand(B, T, 1, D).contiguous() for a in (cos, sin))
        q_out, k_out, power = torch.empty_like(q), torch.empty_like(k), triton.next_power_of_2
        _rope[(B * T,)](q, k, cos, sin, q_out, k_out, H, K, D, sign, H_BLOCK=power(H), K_BLOCK=power(K),
                        HALF=power(D // 2))
        return q_out, k_out

    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _Rope.turn(q, k, cos, sin, 1.0)

    @staticmethod
    def backward(ctx, dq, dk):
        return *_Rope.turn(dq, dk, *ctx.saved_tensors, -1.0), None, None      # a rotation's transpose turns back


def rope(q, k, cos, sin):
    return _Rope.apply(q, k, cos, sin)


# ---------------------------------------------------------------------------------------------------------------------
# SwiGLU

@triton.jit
def _swiglu(gate, up, out, d_out, d_gate, d_up, size, BACK: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < size, other=0).to(tl.float32)
    u = tl.load(up + at, mask=at < size, other=0).to(tl.float32)
    s = tl.sigmoid(g)
    if BACK:
        d = tl.load(d_out + at, mask=at < size, other=0).to(tl.float32)
        tl.store(d_gate + at, d * u * s * (1 + g * (1 - s)), mask=at < size)
        tl.store(d_up + at, d * g * s, mask=at < size)
    else:
        tl.store(out + at, g * s * u, mask=at < size)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        ctx.save_for_backward(gate, up)
        _swiglu[(triton.cdiv(out.numel(), 2048),)](gate, up, out, out, out, out, out.numel(), BACK=False, BLOCK=2048)
        return out

    @staticmethod
    def backward(ctx, d):
        gate, up = ctx.saved_tensors
        d, d_gate, d_up = d.contiguous(), torch.empty_like(gate), torch.empty_like(up)
        _swiglu[(triton.cdiv(d.numel(), 2048),)](gate, up, d, d, d_gate, d_up, d.numel(), BACK=True, BLOCK=2048)
        return d_gate, d_up


def swiglu(gate, up):
    return _SwiGLU.apply(gate, up)


# ---------------------------------------------------------------------------------------------------------------------
# Log-probs: what follows the product with some words of the vocabulary

@triton.jit
def _logprob_stats(logits, targets, best, total, mean, target, words, scale, BLOCK: tl.constexpr):
    """A program goes along one row."""
    row = tl.program_id(0).to(tl.int64)
    top, sums, mass = tl.load(best + row), tl.load(total + row), tl.load(mean + row)
    for first in range(0, words, BLOCK):
        at = first + tl.arange(0, BLOCK)
        z = tl.load(logits + row * words + at, mask=at < words, other=-float("inf")).to(tl.float32) * scale
        new = tl.maximum(top, tl.max(z))
        p, shrink = tl.exp(z - new), tl.exp(top - new)
        sums = sums * shrink + tl.sum(p)
        mass = mass * shrink + tl.sum(tl.where(at < words, p * z, 0.0))
        top = new
    tl.store(best + row, top)
    tl.store(total + row, sums)
    tl.store(mean + row, mass)
    t = tl.load(targets + row)
    here = (t >= 0) & (t < words)
    tl.store(target + row, tl.load(logits + row * words + t, mask=here, other=0).to(tl.float32) * scale, mask=here)


@triton.jit
def _logprob_backward(logits, targets, lse, entropy, d_logp, d_entropy, words, scale, ENTROPY: tl.constexpr,
                 BLOCK: tl.constexpr):
    """In place."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place, live = logits + row * words + at, at < words
    logq = tl.load(place, mask=live, other=0).to(tl.float32) * scale - tl.load(lse + row)
    slope, up = -tl.load(d_logp + row), tl.where(at == tl.load(targets + row), tl.load(d_logp + row), 0.0)
    if ENTROPY:
        slope -= (logq + tl.load(entropy + row)) * tl.load(d_entropy + row)
    tl.store(place, (tl.exp(logq) * slope + up) * scale, mask=live)


def logprob_stats(logits, targets, temperature, best, total, mean, target):
    if len(logits):
        _logprob_stats[(len(logits),)](logits, targets, best, total, mean, target, logits.shape[1], 1 / temperature,
                                   BLOCK=4096, num_warps=8)


def logprob_backward(logits, targets, temperature, lse, entropy, d_logp, d_entropy):
    N, words = logits.shape
    if N:
        rows = [d.contiguous() for d in (d_logp, d_logp if d_entropy is None else d_entropy)]
        _logprob_backward[(N, triton.cdiv(words, 4096))](logits, targets, lse, entropy, *rows, words, 1 / temperature,
                                                    ENTROPY=d_entropy is not None, BLOCK=4096, num_warps=8)
    return logits


# ---------------------------------------------------------------------------------------------------------------------
# Attention of a decoding step

@triton.jit
def _dot(a, b, WIDE: tl.constexpr):
    if WIDE:            # the interpreter multiplies no bf16; in fp32 the products are the same
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _attend(q, k, v, places, out, parts, sums, stride_b, stride_k, scale, T, K, D, SPLITS: tl.constexpr,
            GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """A program takes one of SPLITS parts of the positions that a row sees, for the T queries of all GROUP heads that
    share a key head, so that keys and values are read once. parts, sums: what these find, with the maximum and the sum
    of its softmax; of a single part the result itself, in out."""
    b, h, split = tl.program_id(0) // K, tl.program_id(0) % K, tl.program_id(1)
    at, d = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    t, live = at // GROUP, at < T * GROUP
    place = tl.load(places + b * T + t, mask=live, other=-1)
    row = (b * T + t) * K * GROUP + h * GROUP + at % GROUP                      # of the (B * T * H) queries
    seen = tl.max(place) + 1
    span = tl.cdiv(tl.cdiv(seen, SPLITS), KEYS) * KEYS
    x = tl.load(q + row[:, None] * D + d, mask=live[:, None] & (d < D), other=0)
    start = b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_k
    top, mass = tl.full((ROWS,), -float("inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    found = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(split * span, tl.minimum(split * span + span, seen), KEYS):
        s = first + tl.arange(0, KEYS)
        there = (s[:, None] < seen) & (d < D)
        y = tl.load(k + start + s[:, None] * D + d, mask=there, other=0)
        z = _dot(x, tl.trans(y), WIDE) * scale
        z = tl.where(s <= place[:, None], z, -float("inf"))
        new = tl.maximum(top, tl.max(z, 1))
        ground = tl.where(new == -float("inf"), 0.0, new)                       # a query that sees nothing of this part
        p, shrink = tl.exp(z - ground[:, None]), tl.exp(top - ground)
        y = tl.load(v + start + s[:, None] * D + d, mask=there, other=0)
        found = found * shrink[:, None] + _dot(p.to(y.dtype), y, WIDE)
        mass, top = mass * shrink + tl.sum(p, 1), new
    if SPLITS == 1:
        tl.store(out + row[:, None] * D + d, found / mass[:, None], mask=live[:, None] & (d < D))
    else:
        tl.store(parts + (row[:, None] * SPLITS + split) * D + d, found, mask=live[:, None] & (d < D))
        tl.store(sums + (row * SPLITS + split) * 2, top, mask=live)
        tl.store(sums + (row * SPLITS + split) * 2 + 1, mass, mask=live)


@triton.jit
def _join(parts, sums, out, D, SPLITS: tl.constexpr, WIDTH: tl.constexpr):
    row, d, i = tl.program_id(0), tl.arange(0, WIDTH), tl.arange(0, SPLITS)
    top, mass = tl.load(sums + (row * SPLITS + i) * 2), tl.load(sums + (row * SPLITS + i) * 2 + 1)
    share = tl.exp(top - tl.max(top))
    found = tl.load(parts + (row * SPLITS + i)[:, None] * D + d, mask=d < D, other=0)
    tl.store(out + row * D + d, tl.sum(found * share[:, None], 0) / tl.sum(mass * share), mask=d < D)


def attention_mask(places, S, group, dtype):
    return places


sight = attention_mask      # the name in sample.py


def attend(q, k, v, seen):
    """Two launches where one row's cache would keep too few of the GPU's processors busy: it is cut into parts, whose
    results are joined."""
    (B, T, H, D), (K, S) = q.shape, k.shape[1:3]
    out, keys = torch.empty_like(q), 64
    splits = min(32, triton.next_power_of_2(max(1, min(264 // (B * K), triton.cdiv(S, 2 * keys)))))
    parts = torch.empty(B * T * H, splits, D, dtype=torch.float32, device=q.device)
    sums = torch.empty(B * T * H, splits, 2, dtype=torch.float32, device=q.device)
    rows, width = max(16, triton.next_power_of_2(T * H // K)), max(16, triton.next_power_of_2(D))
    _attend[(B * K, splits)](q, k, v, seen, out, parts, sums, k.stride(0), k.stride(1), D ** -0.5, T, K, D,
                             SPLITS=splits, GROUP=H // K, ROWS=rows, KEYS=keys, WIDTH=width, WIDE=INTERPRETED,
                             num_warps=4)
    if splits > 1:
        _join[(B * T * H,)](parts, sums, out, D, SPLITS=splits, WIDTH=width)
    return out
