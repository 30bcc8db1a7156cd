"""The operations of model.py in Triton, for CUDA: the same names, arguments and results (model.use_kernels picks them).

Each reads and writes its data once where torch's own calls do so several times. With TRITON_INTERPRET=1 in the
environment everything runs on a CPU, slowly, for the tests. Letters of shapes are those of model.py; N is the number of
rows. (Named kernels.py, transformers would take the file for a package.)
"""
import os

import torch
import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PROGRAMS = 264      # enough to keep a GPU busy: two for each of an H100's 132 processors
BLOCK = 4096        # logits that a program holds at a time
QUERIES = 16        # of a program of attention: the smallest side of a matrix product
KEYS = 64           # that it reads at a time


def row_launch(width):
    """Returns the launch options of a program that holds a whole row."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(4, block // 512))}


# -- RMSNorm, alone and after an addition

@triton.jit
def _norm(x, y, weight, total, out, C, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    valid = cols < C
    offset = tl.program_id(0).to(tl.int64) * C + cols
    a = tl.load(x + offset, mask=valid, other=0)
    if ADD:
        a = (a.to(tl.float32) + tl.load(y + offset, mask=valid, other=0).to(tl.float32)).to(a.dtype)
        tl.store(total + offset, a, mask=valid)
    a = a.to(tl.float32)
    a *= tl.rsqrt(tl.sum(a * a) / C + eps) * tl.load(weight + cols, mask=valid, other=0).to(tl.float32)
    tl.store(out + offset, a, mask=valid)


@triton.jit
def _norm_backward(x, weight, d_total, d_out, dx, dw, N, C, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """With r = 1 / sqrt(mean(x^2) + eps) and g = weight * d_out: dx = r (g - x r^2 mean(g x)), dw = sum of d_out x r,
    of which a program sums every num_programs-th row."""
    cols = tl.arange(0, BLOCK)
    valid = cols < C
    w = tl.load(weight + cols, mask=valid, other=0).to(tl.float32)
    dw_sum = tl.zeros((BLOCK,), tl.float32)
    for row in range(tl.program_id(0), N, tl.num_programs(0)):
        offset = tl.cast(row, tl.int64) * C + cols
        a = tl.load(x + offset, mask=valid, other=0).to(tl.float32)
        d = tl.load(d_out + offset, mask=valid, other=0).to(tl.float32)
        r = tl.rsqrt(tl.sum(a * a) / C + eps)
        dw_sum += d * a * r
        d *= w
        d = r * (d - a * (r * r * tl.sum(d * a) / C))
        if ADD:
            d += tl.load(d_total + offset, mask=valid, other=0).to(tl.float32)
        tl.store(dx + offset, d, mask=valid)
    tl.store(dw + tl.program_id(0) * C + cols, dw_sum, mask=valid)


class _AddNorm(torch.autograd.Function):
    """x + y, or x where y is None, and the norm of that."""

    @staticmethod
    def forward(ctx, x, y, weight, eps):
        x = x.contiguous()
        C = x.shape[-1]
        add = y is not None
        y = y.contiguous() if add else x
        total = torch.empty_like(x) if add else x
        out = torch.empty_like(x)
        _norm[(x.numel() // C,)](x, y, weight, total, out, C, eps, ADD=add, **row_launch(C))
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        ctx.add = add
        ctx.set_materialize_grads(False)        # None for a result that nothing depends on
        return total, out

    @staticmethod
    def backward(ctx, d_total, d_out):
        x, weight = ctx.saved_tensors       # recomputed activations are given out a single time
        C = x.shape[-1]
        N = x.numel() // C
        add = d_total is not None
        d_out = d_out.contiguous() if d_out is not None else torch.zeros_like(x)
        d_total = d_total.contiguous() if add else d_out
        dx = torch.empty_like(x)
        dw = torch.empty(min(N, PROGRAMS), C, dtype=torch.float32, device=x.device)
        _norm_backward[(len(dw),)](x, weight, d_total, d_out, dx, dw, N, C, ctx.eps, ADD=add, **row_launch(C))
        return dx, dx if ctx.add else None, dw.sum(0).to(weight.dtype), None


def norm(x, weight, eps):
    return _AddNorm.apply(x, None, weight, eps)[1]


def add_norm(x, y, weight, eps):
    return _AddNorm.apply(x, y, weight, eps)


# -- Rotary positions, queries and keys in one launch

@triton.jit
def _rotate(x, out, c, s, start, heads, i, D, HEADS: tl.constexpr):
    head = tl.arange(0, HEADS)[:, None]
    valid = (head < heads) & (i < D // 2)
    offset = start * heads + head * D + i
    a = tl.load(x + offset, mask=valid, other=0).to(tl.float32)
    b = tl.load(x + offset + D // 2, mask=valid, other=0).to(tl.float32)
    tl.store(out + offset, a * c - b * s, mask=valid)
    tl.store(out + offset + D // 2, b * c + a * s, mask=valid)


@triton.jit
def _rope(q, k, cos, sin, q_out, k_out, H, K, D, sign, H_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
          HALF: tl.constexpr):
    """A program rotates all heads of one token. Of sin the second half is positive."""
    start = tl.program_id(0).to(tl.int64) * D
    i = tl.arange(0, HALF)[None]
    c = tl.load(cos + start + i, mask=i < D // 2, other=0)
    s = tl.load(sin + start + D // 2 + i, mask=i < D // 2, other=0) * sign
    _rotate(q, q_out, c, s, start, H, i, D, H_BLOCK)
    _rotate(k, k_out, c, s, start, K, i, D, K_BLOCK)


def launch_rope(q, k, cos, sin, sign):
    B, T, H, D = q.shape
    K = k.shape[2]
    cos = cos.expand(B, T, 1, D).contiguous()
    sin = sin.expand(B, T, 1, D).contiguous()
    q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    k_out = torch.empty_like(k, memory_format=torch.contiguous_format)
    power = triton.next_power_of_2
    _rope[(B * T,)](q.contiguous(), k.contiguous(), cos, sin, q_out, k_out, H, K, D, sign, H_BLOCK=power(H),
                    K_BLOCK=power(K), HALF=power(D // 2))
    return q_out, k_out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return launch_rope(q, k, cos, sin, 1.0)

    @staticmethod
    def backward(ctx, dq, dk):
        dq, dk = launch_rope(dq, dk, *ctx.saved_tensors, -1.0)      # the transpose of a rotation turns back
        return dq, dk, None, None


def rope(q, k, cos, sin):
    return _Rope.apply(q, k, cos, sin)


# -- SwiGLU

@triton.jit
def _swiglu(gate, up, out, size, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + offset, mask=offset < size, other=0).to(tl.float32)
    u = tl.load(up + offset, mask=offset < size, other=0).to(tl.float32)
    tl.store(out + offset, g * tl.sigmoid(g) * u, mask=offset < size)


@triton.jit
def _swiglu_backward(gate, up, d_out, d_gate, d_up, size, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + offset, mask=offset < size, other=0).to(tl.float32)
    u = tl.load(up + offset, mask=offset < size, other=0).to(tl.float32)
    d = tl.load(d_out + offset, mask=offset < size, other=0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(d_gate + offset, d * u * s * (1 + g * (1 - s)), mask=offset < size)
    tl.store(d_up + offset, d * g * s, mask=offset < size)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gate = gate.contiguous()
        up = up.contiguous()
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        _swiglu[(triton.cdiv(out.numel(), 2048),)](gate, up, out, out.numel(), BLOCK=2048)
        return out

    @staticmethod
    def backward(ctx, d_out):
        gate, up = ctx.saved_tensors
        d_gate = torch.empty_like(gate)
        d_up = torch.empty_like(up)
        grid = (triton.cdiv(gate.numel(), 2048),)
        _swiglu_backward[grid](gate, up, d_out.contiguous(), d_gate, d_up, gate.numel(), BLOCK=2048)
        return d_gate, d_up


def swiglu(gate, up):
    return _SwiGLU.apply(gate, up)


# -- Log-probs: what follows the product with a chunk of the vocabulary

@triton.jit
def _logprob_stats(logits, targets, row_max, sum_exp, sum_z_exp, target_logit, chunk, scale, BLOCK: tl.constexpr):
    """A program goes along one row."""
    row = tl.program_id(0).to(tl.int64)
    top = tl.load(row_max + row)
    total = tl.load(sum_exp + row)
    z_total = tl.load(sum_z_exp + row)
    for first in range(0, chunk, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        z = tl.load(logits + row * chunk + cols, mask=cols < chunk, other=-float("inf")).to(tl.float32) * scale
        new_top = tl.maximum(top, tl.max(z))
        p = tl.exp(z - new_top)
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(p)
        z_total = z_total * shrink + tl.sum(tl.where(cols < chunk, p * z, 0.0))
        top = new_top
    tl.store(row_max + row, top)
    tl.store(sum_exp + row, total)
    tl.store(sum_z_exp + row, z_total)
    target = tl.load(targets + row)
    in_chunk = (target >= 0) & (target < chunk)
    z = tl.load(logits + row * chunk + target, mask=in_chunk, other=0).to(tl.float32) * scale
    tl.store(target_logit + row, z, mask=in_chunk)


@triton.jit
def _logprob_backward(logits, targets, lse, entropy, d_logp, d_entropy, chunk, scale, ENTROPY: tl.constexpr,
                      BLOCK: tl.constexpr):
    """The gradient takes the place of the logits."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offset = logits + row * chunk + cols
    logq = tl.load(offset, mask=cols < chunk, other=0).to(tl.float32) * scale - tl.load(lse + row)
    slope = -tl.load(d_logp + row)
    if ENTROPY:
        slope -= (logq + tl.load(entropy + row)) * tl.load(d_entropy + row)
    at_target = tl.where(cols == tl.load(targets + row), tl.load(d_logp + row), 0.0)
    tl.store(offset, (tl.exp(logq) * slope + at_target) * scale, mask=cols < chunk)


def logprob_stats(logits, targets, temperature, row_max, sum_exp, sum_z_exp, target_logit):
    N, chunk = logits.shape
    if N:
        _logprob_stats[(N,)](logits, targets, row_max, sum_exp, sum_z_exp, target_logit, chunk, 1 / temperature,
                             BLOCK=BLOCK, num_warps=8)


def logprob_backward(logits, targets, temperature, lse, entropy, d_logp, d_entropy):
    N, chunk = logits.shape
    d_logp = d_logp.contiguous()
    with_entropy = d_entropy is not None
    d_entropy = d_entropy.contiguous() if with_entropy else d_logp
    if N:
        grid = (N, triton.cdiv(chunk, BLOCK))
        _logprob_backward[grid](logits, targets, lse, entropy, d_logp, d_entropy, chunk, 1 / temperature,
                                ENTROPY=with_entropy, BLOCK=BLOCK, num_warps=8)
    return logits


# -- Attention over a cache

@triton.jit
def _dot(a, b, WIDE: tl.constexpr):
    if WIDE:            # the interpreter multiplies no bf16; in fp32 the products are the same
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _attend(q, k, v, positions, out, parts, stats, stride_b, stride_k, scale, T, K, D, SPLITS: tl.constexpr,
            GROUP: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """A program takes some queries of one row of all GROUP heads that share a key head, and one of SPLITS parts of the
    positions that they see. With several parts the result goes to parts, with the maximum and the sum of its softmax in
    stats."""
    b = tl.program_id(0) // K
    h = tl.program_id(0) % K
    split = tl.program_id(1)
    i = tl.program_id(2) * QUERIES + tl.arange(0, QUERIES)                      # of the T * GROUP queries
    d = tl.arange(0, WIDTH)
    valid = i < T * GROUP
    last_seen = tl.load(positions + b * T + i // GROUP, mask=valid, other=-1)
    row = (b * T + i // GROUP) * K * GROUP + h * GROUP + i % GROUP              # of the B * T * H queries
    x = tl.load(q + row[:, None] * D + d, mask=valid[:, None] & (d < D), other=0)
    seen = tl.max(last_seen) + 1
    span = tl.cdiv(tl.cdiv(seen, SPLITS), KEYS) * KEYS
    start = b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_k
    row_max = tl.full((QUERIES,), -float("inf"), tl.float32)
    sum_exp = tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, WIDTH), tl.float32)
    for first in range(split * span, tl.minimum(split * span + span, seen), KEYS):
        s = first + tl.arange(0, KEYS)
        cached = (s[:, None] < seen) & (d < D)
        key = tl.load(k + start + s[:, None] * D + d, mask=cached, other=0)
        z = _dot(x, tl.trans(key), WIDE) * scale
        z = tl.where(s <= last_seen[:, None], z, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(z, 1))
        finite_max = tl.where(new_max == -float("inf"), 0.0, new_max)           # of a query that sees nothing here
        p = tl.exp(z - finite_max[:, None])
        shrink = tl.exp(row_max - finite_max)
        value = tl.load(v + start + s[:, None] * D + d, mask=cached, other=0)
        acc = acc * shrink[:, None] + _dot(p.to(value.dtype), value, WIDE)
        sum_exp = sum_exp * shrink + tl.sum(p, 1)
        row_max = new_max
    if SPLITS == 1:
        tl.store(out + row[:, None] * D + d, acc / sum_exp[:, None], mask=valid[:, None] & (d < D))
    else:
        tl.store(parts + (row[:, None] * SPLITS + split) * D + d, acc, mask=valid[:, None] & (d < D))
        tl.store(stats + (row * SPLITS + split) * 2, row_max, mask=valid)
        tl.store(stats + (row * SPLITS + split) * 2 + 1, sum_exp, mask=valid)


@triton.jit
def _join(parts, stats, out, D, SPLITS: tl.constexpr, WIDTH: tl.constexpr):
    """A program joins the parts of one query."""
    row = tl.program_id(0)
    split = row * SPLITS + tl.arange(0, SPLITS)
    d = tl.arange(0, WIDTH)
    row_max = tl.load(stats + split * 2)
    share = tl.exp(row_max - tl.max(row_max))
    sum_exp = tl.sum(tl.load(stats + split * 2 + 1) * share)
    acc = tl.load(parts + split[:, None] * D + d, mask=d < D, other=0)
    tl.store(out + row * D + d, tl.sum(acc * share[:, None], 0) / sum_exp, mask=d < D)


def attention_mask(positions, S, group, dtype):
    return positions


def attend(q, k, v, mask):
    """What the queries see is cut into parts where they alone would not keep the GPU busy."""
    B, T, H, D = q.shape
    K, S = k.shape[1:3]
    out = torch.empty_like(q)
    tiles = triton.cdiv(T * H // K, QUERIES)
    splits = max(1, min(PROGRAMS // (B * K * tiles), triton.cdiv(S, 2 * KEYS)))
    splits = min(32, triton.next_power_of_2(splits))
    parts = torch.empty(B * T * H, splits, D, dtype=torch.float32, device=q.device)
    stats = torch.empty(B * T * H, splits, 2, dtype=torch.float32, device=q.device)
    width = max(16, triton.next_power_of_2(D))
    _attend[(B * K, splits, tiles)](
        q, k, v, mask, out, parts, stats, k.stride(0), k.stride(1), D ** -0.5, T, K, D, SPLITS=splits, GROUP=H // K,
        QUERIES=QUERIES, KEYS=KEYS, WIDTH=width, WIDE=INTERPRETED, num_warps=4)
    if splits > 1:
        _join[(B * T * H,)](parts, stats, out, D, SPLITS=splits, WIDTH=width)
    return out
