"""Qwen2.5 in plain PyTorch: the architecture, and its published safetensors folders in and out.

    model = Qwen2.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct")     # a hub id, or a folder
    logits = model(tokens)                                          # (B, T) int64 -> (B, T, V)
    model.save_pretrained("my-folder")                              # opens in transformers and vLLM

The network (Qwen2.5 report, arXiv 2412.15115, section 2): L blocks of pre-norm attention and SwiGLU. RMSNorm, rotary
positions, grouped-query attention with biases on q, k and v only, output head tied to the embedding in the small sizes.
Parameters carry the names of the published checkpoints, so loading is an identity map.

Letters: B rows, T tokens in a row, C model width, H query heads, K key/value heads, D head width, F feed-forward width,
V vocabulary, L layers, S positions of the key/value cache that a pass can see.
"""
import hashlib
import json
import math
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

# Read when torch is first imported: threads that wait for each other sleep after so many spins. To spin on, the
# default, is 3 % faster on an idle machine, but beside a running script a decoding step takes seven times as long.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint
from support.files import sync


# ---------------------------------------------------------------------------------------------------------------------
# Configuration

@dataclass
class Config:
    """The shape of a model, under the names of its published config.json."""
    vocab_size: int = 512
    hidden_size: int = 128                  # C
    intermediate_size: int = 384            # F
    num_hidden_layers: int = 4              # L
    num_attention_heads: int = 4            # H
    num_key_value_heads: int = 2            # K
    max_position_embeddings: int = 32768    # the longest row the model was made for, in tokens
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = True        # the output head is the embedding matrix

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def preset(cls, name):
        """The shape of a published size ("0.5b" ... "32b"), or "tiny", small enough to train on a laptop's CPU."""
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
        keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings")
        return cls(**dict(zip(keys, PRESETS[name])))

    @classmethod
    def from_pretrained(cls, folder):
        """Read config.json. Raises ValueError for a missing file, another architecture, or an unsupported variant."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise ValueError(f"{folder} holds no config.json; expected the folder of a Qwen2.5 checkpoint")
        try:
            raw = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON ({error}); download it again") from None
        kind = raw.get("model_type") if isinstance(raw, dict) else None
        if kind != "qwen2":
            raise ValueError(f"{path} says model_type {kind!r}; expected 'qwen2' (Qwen2, Qwen2.5)")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}      # newer files nest rope_theta here
        scaled = not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default"
        if scaled or raw.get("use_sliding_window"):
            raise ValueError(f"{path} asks for scaled rotary positions or a sliding window; only plain ones are built")
        raw = {"rope_theta": rope.get("rope_theta", 1e6), **raw}
        missing = [f.name for f in fields(cls) if f.name not in raw]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}")
        for f in fields(cls):
            value, kinds = raw[f.name], (int, float) if f.type is float else (f.type,)
            most = 1 << (10 if f.name == "num_hidden_layers" else 24)       # no model that is built for ever
            if type(value) not in kinds or f.type is not bool and not 0 < value <= most:
                raise ValueError(f"{path}: {f.name} must be of type {f.type.__name__}, and above 0 and at most {most:,} "
                                 "if it is a number")
        config = cls(**{f.name: raw[f.name] for f in fields(cls)})
        if config.head_dim * config.num_attention_heads != config.hidden_size or "head_dim" in raw \
                and raw["head_dim"] not in (None, config.head_dim):
            raise ValueError(f"{path}: hidden_size {config.hidden_size} must be num_attention_heads "
                             f"{config.num_attention_heads} times the head width")
        return config

    def save(self, folder, dtype):
        """Write config.json as transformers and vLLM expect it."""
        text = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
                "use_sliding_window": False, "torch_dtype": str(dtype).removeprefix("torch."), **asdict(self)}
        (Path(folder) / "config.json").write_text(json.dumps(text, indent=2) + "\n")


PRESETS = {  # V, C, F, L, H, K, longest row, tied head
    "tiny": (512, 128, 384, 4, 4, 2, 32768, True),
    "0.5b": (151936, 896, 4864, 24, 14, 2, 32768, True),
    "1.5b": (151936, 1536, 8960, 28, 12, 2, 32768, True),
    "3b": (151936, 2048, 11008, 36, 16, 2, 32768, True),
    "7b": (152064, 3584, 18944, 28, 28, 4, 32768, False),
    "14b": (152064, 5120, 13824, 48, 40, 8, 32768, False),
    "32b": (152064, 5120, 27648, 64, 40, 8, 32768, False),
}


# ---------------------------------------------------------------------------------------------------------------------
# Operations that fused.py also has, in Triton, under the same names

def norm(x, weight, eps):
    """RMSNorm of x (..., C)."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def add_norm(x, y, weight, eps):
    """x + y, and its RMSNorm, each (..., C)."""
    x = x + y
    return x, norm(x, weight, eps)


def rope(q, k, cos, sin):
    """q (B, T, H, D) and k (B, T, K, D) with each pair (i, i + D/2) turned by its angle, in fp32; see rotary."""
    return tuple(torch.addcmul(y * cos, y.roll(y.shape[-1] // 2, -1), sin).to(q.dtype) for y in (q.float(), k.float()))


def swiglu(gate, up):
    """silu(gate) * up."""
    return F.silu(gate) * up


def word_sums(logits, targets, temperature, best, total, mean, target):
    """Take notice of more words: with z = logits / temperature over all of them so far, best becomes max z, total the
    sum of exp(z - best), mean that of z exp(z - best) and target the target's z, each (N,), in place.

    logits: (N, words), lost. targets: (N,), which of these words; outside 0 .. words - 1 it is none of them.
    """
    z, here = logits.to(best.dtype).div_(temperature), (targets >= 0) & (targets < logits.shape[1])
    top = torch.maximum(best, z.amax(-1))
    p, shrink = (z - top[:, None]).exp_(), (best - top).exp_()
    total.mul_(shrink).add_(p.sum(-1))
    mean.mul_(shrink).add_(torch.linalg.vecdot(p, z))
    best.copy_(top)
    target.copy_(torch.where(here, z.gather(1, targets.clamp(0, z.shape[1] - 1)[:, None])[:, 0], target))


def word_slopes(logits, targets, temperature, lse, entropy, d_logp, d_entropy):
    """The gradient of sum(d_logp * logp + d_entropy * entropy), without d_entropy where that is None, with respect to
    the logits of some words: (N, words), in their dtype. See word_sums for logits and targets.

    With p the softmax and E its entropy, d logp / dz = 1[target] - p and d E / dz = -p (log p + E).
    """
    here = (targets >= 0) & (targets < logits.shape[1])
    logq = logits.to(lse.dtype).div_(temperature).sub_(lse[:, None])                    # log p
    if d_entropy is None:
        d = logq.exp_().mul_(-d_logp[:, None])
    else:
        d = logq.exp().mul_(-d_logp[:, None] - (logq + entropy[:, None]) * d_entropy[:, None])
    d.scatter_add_(1, targets.clamp(0, d.shape[1] - 1)[:, None], torch.where(here, d_logp, 0)[:, None])
    return d.div_(temperature).to(logits.dtype)


def sight(places, S, group, dtype):
    """What attend has to know of who sees what: query t of row b sees positions 0 .. places[b, t] of S. Here a mask
    to add to the scores, (B, 1, T * group, S); group: query heads that share a key."""
    unseen = torch.arange(S, device=places.device) > places.repeat_interleave(group, 1)[:, None, :, None]
    return torch.zeros_like(unseen, dtype=dtype).masked_fill_(unseen, -torch.inf)


def attend(q, k, v, seen):
    """What queries (B, T, H, D) find in cached keys and values (B, K, S, D), as far as each sees: (B, T, H, D)."""
    (B, T, H, D), K = q.shape, k.shape[1]       # heads that share a key stand as extra queries: no copy of the cache
    x = q.view(B, T, K, H // K, D).transpose(1, 2).reshape(B, K, -1, D)
    y = F.scaled_dot_product_attention(x, k, v, attn_mask=seen)
    return y.view(B, K, T, H // K, D).transpose(1, 2).reshape(B, T, H, D)


ops = sys.modules[__name__]


def use_kernels(name, device):
    """Let "torch", the functions above, or "triton", those of fused.py, do their work from now on in this process.
    Raises ValueError where they cannot, on this device or without the package."""
    global ops
    if name not in ("torch", "triton"):
        raise ValueError(f"expected kernels torch or triton, found {name!r}")
    if name == "triton":
        try:
            import fused
        except ImportError as error:
            raise ValueError(f"the Triton kernels need triton ({error}); pip install it, or use torch's") from None
        fused.check(device)
    ops = fused if name == "triton" else sys.modules[__name__]


# ---------------------------------------------------------------------------------------------------------------------
# Layers

class Linear(nn.Linear):
    """y = x W^T + b, by whichever form of the product is fast for the few rows of a decoding step on a CPU.

    Training, CUDA and long prefills use F.linear. A step of 1 to 64 rows in fp32 takes its time from reading weights,
    so pack() keeps a second copy for it. Weights that are exact in fp16 but for a power of two, as those of a published
    bf16 checkpoint are, are stored so, half the bytes; products and sums stay fp32. Others are stored in oneDNN's
    blocked layout. Measured on two cores at the 0.5B shapes, in GB/s of fp32 weights (30 is the memory's own rate):
    F.linear 29, 13, 10 and 5 at 1, 4, 8 and 64 rows; fp16 37 to 42, 31, 25, 7; blocked 23, 22, 20, 8. In bf16 on a CPU
    with AMX, W @ x^T does about twice the work of F.linear.
    """
    packed = None       # (numbers of rows, function of x) of the copy; Engine makes it for fp32 sampling on a CPU

    def pack(self):
        """Make the copy, or make it again after the weight has changed."""
        weight = self.weight.detach()
        scale = 2.0 ** (15 - math.ceil(math.log2(max(weight.abs().max().item(), 1e-30))))
        if all(torch.equal((rows * scale).half().float(), rows * scale) for rows in weight.split(4096)):
            bias = None if self.bias is None else self.bias.detach() * scale
            copy = torch.ops.quantized.linear_prepack_fp16(weight * scale, bias)
            self.packed = range(1, 65), lambda x: torch.ops.quantized.linear_dynamic_fp16(x, copy).div_(scale)
        else:
            copy = torch.ops.mkldnn._reorder_linear_weight(weight, 8)
            self.packed = range(4, 65), lambda x: torch.ops.mkldnn._linear_pointwise(x, copy, self.bias, "none", [], "")

    def step_bytes(self):
        """Bytes that a product with one row reads: the weight's, or the fp16 copy's."""
        return self.weight.nbytes // (2 if self.packed and 1 in self.packed[0] else 1)

    def forward(self, x):
        rows = x.numel() // x.shape[-1]
        if x.dtype is not self.weight.dtype:        # Qwen2.compute
            return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        if x.device.type != "cpu" or torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias)
        if x.dtype is torch.bfloat16:
            flat = x.reshape(rows, -1)
            y = torch.mv(self.weight, flat[0])[None] if rows == 1 else (self.weight @ flat.T).T
            y = y if self.bias is None else y + self.bias
            return y.reshape(*x.shape[:-1], -1)
        if self.packed and rows in self.packed[0]:
            return self.packed[1](x)
        return F.linear(x, self.weight, self.bias)


IGNORE = -100       # the target of a token that has none: padding, and what the policy did not choose


class LinearLogProb(torch.autograd.Function):
    """log softmax(x W^T / temperature)[target], the entropy of the softmax, and if the target is its likeliest token,
    without ever holding (N, V) logits.

    Logits are made for some `words` of the vocabulary at a time, with a running maximum and sums in fp32 (word_sums);
    backward makes them again, and scales each row by its own upstream gradient (word_slopes). Going along the
    vocabulary, each row of the weight and of its gradient is touched once in a pass, however many tokens there are.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, temperature, size, words):
        exact = torch.promote_types(x.dtype, torch.float32)
        total, mean, target = (torch.zeros(len(x), dtype=exact, device=x.device) for _ in range(3))
        best = torch.full_like(total, -torch.inf)
        for start in range(0, size, words):
            part = weight[start:min(start + words, size)].to(x.dtype)
            ops.word_sums(x @ part.T, targets - start, temperature, best, total, mean, target)
        lse = best + total.log()
        entropy, first = lse - mean / total, target >= best
        ctx.save_for_backward(x, weight, targets, lse, entropy)
        ctx.settings = temperature, size, words
        ctx.mark_non_differentiable(first)
        ctx.set_materialize_grads(False)
        return target - lse, entropy, first

    @staticmethod
    def backward(ctx, d_logp, d_entropy, _):
        (x, weight, targets, lse, entropy), (temperature, size, words) = ctx.saved_tensors, ctx.settings
        d_logp = torch.zeros_like(lse) if d_logp is None else d_logp
        dx, dw = torch.zeros_like(x, dtype=lse.dtype), torch.empty_like(weight)
        dw[size:] = 0
        for start in range(0, size, words):
            stop = min(start + words, size)
            part = weight[start:stop].to(x.dtype)
            d = ops.word_slopes(x @ part.T, targets - start, temperature, lse, entropy, d_logp, d_entropy)
            dx += d @ part
            dw[start:stop] = d.T @ x
        return dx.to(x.dtype), dw, None, None, None, None


class Head(Linear):
    """The output layer: logits, or what LinearLogProb says of given targets."""

    def forward(self, x, targets=None, temperature=1.0, size=None):
        """x (..., C) -> logits (..., V); with targets (N,) int64: x (N, C) -> logp, entropy, first, each (N,).

        size: the number of token ids; rows of the vocabulary beyond it get no probability, as in sampling.
        """
        if targets is None:
            return super().forward(x)
        size = size or self.out_features
        budget = 2**24 if x.device.type == "cpu" else 2**27         # logits at a time: 64 MiB, 512 MiB
        return LinearLogProb.apply(x, self.weight, targets, temperature, size, max(64, budget // max(1, len(x))))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight; the mean is taken in fp32 whatever the dtype."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x, y=None):
        """The norm of x; with y, of the same shape: x + y, and its norm."""
        weight = self.weight.to(x.dtype)
        return ops.norm(x, weight, self.eps) if y is None else ops.add_norm(x, y, weight, self.eps)


def rotary(positions, head_dim, theta):
    """(cos, sin) of the angles position * theta^(-2i/D), i < D/2, for rope: fp32, each (B, T, 1, D), where i and
    i + D/2 share an angle and the first half of sin is negative. positions: (B, T) integers.

    RoFormer (arXiv 2104.09864), equation 15. Computed at each pass and never stored: a buffer would be one more thing
    that the meta device leaves uninitialised.
    """
    frequency = theta ** (torch.arange(0, head_dim, 2, device=positions.device).float() / -head_dim)
    angle = positions[:, :, None, None].float() * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.H, self.K, self.D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = Linear(c.hidden_size, self.H * self.D, bias=True)
        self.k_proj = Linear(c.hidden_size, self.K * self.D, bias=True)
        self.v_proj = Linear(c.hidden_size, self.K * self.D, bias=True)
        self.o_proj = Linear(self.H * self.D, c.hidden_size, bias=False)

    def forward(self, x, cos, sin, window, layer, lengths):
        B, T, C = x.shape
        q, k = ops.rope(self.q_proj(x).view(B, T, self.H, self.D), self.k_proj(x).view(B, T, self.K, self.D), cos, sin)
        v = self.v_proj(x).view(B, T, self.K, self.D)
        if window is not None:
            window.append(layer, k[0], v[0])
        if window is None or window.fresh:      # a text's whole past is in this pass: plain causal attention
            texts = zip(*(x.transpose(1, 2).split(lengths or [T], dim=2) for x in (q, k, v)))
            y = torch.cat([F.scaled_dot_product_attention(*text, is_causal=True, enable_gqa=True) for text in texts], 2)
            y = y.transpose(1, 2)
        else:
            y = window.attend(layer, q[0])
        return self.o_proj(y.reshape(B, T, C))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), arXiv 2002.05202."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    recompute = False       # activation checkpointing: backward computes the block again, from its input alone

    def __init__(self, c):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, cos, sin, window, layer, lengths):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.compute, x, cos, sin, window, layer, lengths, use_reentrant=False)
        return self.compute(x, cos, sin, window, layer, lengths)

    def compute(self, x, cos, sin, window, layer, lengths):
        x, y = self.post_attention_layernorm(
            x, self.self_attn(self.input_layernorm(x), cos, sin, window, layer, lengths))
        return x + self.mlp(y)


class Backbone(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Qwen2(nn.Module):
    """The language model. Build it with from_pretrained or from_scratch; the bare constructor leaves weights unset."""
    compute = None      # the dtype of activations and products where that is not the weights' own: mixed precision

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self):
        """Make head and embedding one parameter where the config says so; moving off the meta device parts them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden(self, tokens, window=None, lengths=None):
        """The last normalised hidden states, (B, T, C), of `tokens`, (B, T) int64.

        Without a window each row is a text from its first token, and token t sees 0..t. With lengths, a list that
        sums to T, each row is such texts back to back, none of which sees another. With a window (sample.Window) the
        one row is the window's tokens, which continue what is cached.
        """
        if window is not None:
            positions, lengths = window.positions, window.counts
        else:
            parts = [torch.arange(n, device=tokens.device) for n in lengths or [tokens.shape[1]]]
            positions = torch.cat(parts)[None]
        cos, sin = rotary(positions, self.config.head_dim, self.config.rope_theta)
        x = self.model.embed_tokens(tokens)
        x = x.to(self.compute or x.dtype)
        for i, block in enumerate(self.model.layers):
            x = block(x, cos, sin, window, i, lengths)
        return self.model.norm(x)

    def forward(self, tokens, window=None, lengths=None, targets=None, temperature=1.0, size=None):
        """Logits of the next token at every position: (B, T) int64 -> (B, T, V).

        With targets, (B, T) int64 and IGNORE where there is none: of the N targets in the order of the rows the
        log-probs, the entropies of their distributions, both (N,) fp32, and whether each is the likeliest token, (N,)
        bool. See hidden for the rest, and Head for size.
        """
        x = self.hidden(tokens, window, lengths)
        if targets is None:
            return self.lm_head(x)
        kept = targets != IGNORE
        return self.lm_head(x[kept], targets[kept], temperature, size)

    @classmethod
    def from_scratch(cls, config, seed=0, dtype=torch.float32, device="cpu"):
        """Random weights: normal with deviation 0.02, unit norms, zero biases."""
        model = cls._empty(config, dtype, device)
        generator = torch.Generator(device).manual_seed(seed)
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "norm" in name:
                nn.init.ones_(p)
            else:
                nn.init.normal_(p, std=0.02, generator=generator)
        return model

    @torch.no_grad()
    def draw_copying(self, seed=0):
        """Random weights that copy: an induction circuit (arXiv 2209.11895) stands in blocks 0 and 1 from the start.

        In block 0 the first query head looks one token back, the second two. Their biases do it: with a on the fastest
        rotary pairs, R(i) a . R(j) R(1) a is largest at j = i - 1. They write that token's embedding, seen in D
        directions V, into D other directions each, U_1 and U_2. In block 1 those heads ask by V and, turned, by U_1 (what
        is here, and before it) and find by U_1 and U_2 the places that come after the same two tokens, through slow
        pairs alone, which hardly turn; and they write what stands there. So what followed the last time is what comes
        next. Found by training alone this takes millions of tokens. Here 80 % of a repeated random text is right before
        the first step. Everything else is drawn small.
        """
        c, generator = self.config, torch.Generator().manual_seed(seed)
        C, D, group = c.hidden_size, c.head_dim, c.num_attention_heads // c.num_key_value_heads
        if C < 4 * D or c.num_hidden_layers < 2 or D < 16 or group != 2:
            raise ValueError("copying needs 2 blocks, 4 heads of width 16 or more, and 2 query heads for each key head, "
                             f"found {c}")
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = 0.1 if "embed" in name else 0.005 if "o_proj" in name or "down" in name else C ** -0.5
                nn.init.normal_(p, std=std, generator=generator)
        basis = torch.linalg.qr(torch.randn(C, C, generator=generator))[0]
        turn = torch.linalg.qr(torch.randn(D, D, generator=generator))[0]
        V, W, *U = (basis[:, i * D:(i + 1) * D] for i in range(4))       # each (C, D)
        before, after = (block.self_attn for block in self.model.layers[:2])
        fast = c.rope_theta ** (torch.arange(0, 6, 2) / -D)
        first = torch.cat([torch.arange(3), torch.arange(3) + D // 2])         # the rows of the three fastest pairs
        slow = (torch.arange(D) % (D // 2) >= 5).float()[:, None]
        before.k_proj.weight[:D] *= 0.3
        before.k_proj.bias[first] = 8 * torch.cat([fast.cos(), fast.sin()])
        before.v_proj.weight[:D], after.v_proj.weight[:D] = V.T, W.T
        after.k_proj.weight[:D] = slow * (3 * U[0].T + turn @ U[1].T)
        for back, rows in enumerate(torch.arange(group * D).split(D)):
            before.q_proj.weight[rows] *= 0.3
            before.q_proj.bias[rows[first]] = 8 * torch.cat([(back * fast).cos(), -(back * fast).sin()])
            before.o_proj.weight[:, rows] = 0.2 * U[back]
            after.q_proj.weight[rows] = slow * (3 * V.T + turn @ U[0].T)
            after.o_proj.weight[:, rows] = 1.6 * W
        return self

    @classmethod
    def _empty(cls, config, dtype, device):
        with torch.device("meta"):
            model = cls(config).to(dtype)
        model.to_empty(device=device)
        model.tie()
        return model.requires_grad_(True)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Load a published checkpoint: a folder, or a hub id such as "Qwen/Qwen2.5-7B".

        Built on the meta device, then filled tensor by tensor, each read once and converted to `dtype` on its way into
        place, so the peak of memory is the model itself and one slice. Raises ValueError naming every tensor that is
        missing, unexpected or of another shape.
        """
        folder = find_folder(path)
        model = cls._empty(Config.from_pretrained(folder), dtype, device)
        load_tensors(folder, {name: (p, 0, tuple(p.shape)) for name, p in model.named_parameters()})
        return model

    def save_pretrained(self, folder, max_shard_bytes=5 * 10**9):
        """Write config.json and model.safetensors, or shards of at most max_shard_bytes with their index. The
        tokenizer's files are not written here (Tokenizer.save)."""
        tensors = ((name, p.detach()) for name, p in self.named_parameters())   # a tied head comes once, as embedding
        write_checkpoint(folder, self.config, tensors, next(self.parameters()).dtype, max_shard_bytes)


def write_checkpoint(folder, config, tensors, dtype, max_shard_bytes=5 * 10**9):
    """Write an ordinary checkpoint folder from an iterable of (name, tensor), converted to dtype, a shard at a time.

    The config is removed first and written last: a folder whose writing broke off does not load.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    sync(folder)
    shards, shard, size, total = [], {}, 0, 0       # shards: the names in each file

    def write():
        file = folder / f"model-{len(shards)}.safetensors"
        save_file(shard, file, metadata={"format": "pt"})
        sync(file)
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        tensor = tensor.to("cpu", dtype).contiguous()
        if shard and size + tensor.nbytes > max_shard_bytes:
            write()
            size = 0
        shard[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    write()
    index = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        (folder / f"model-{i}.safetensors").rename(folder / file)
        index.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text + "\n")
        sync(folder / "model.safetensors.index.json")
    sync(folder)
    config.save(folder, dtype)
    sync(folder / "config.json")
    sync(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Reading checkpoints

def find_folder(path, files=("*.json", "*.safetensors", "merges.txt")):
    """The local folder of a checkpoint; a hub id's ("owner/name") `files` are downloaded once into the hub's cache."""
    if Path(path).is_dir():
        return Path(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise ValueError(f"no model folder {str(path)!r}, and it is not a hub id such as Qwen/Qwen2.5-0.5B-Instruct")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    try:
        return Path(snapshot_download(str(path), allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"no folder {str(path)!r} here, and the hub did not give it: {why}") from None


def hash_checkpoint(folder):
    """The sha256, shortened, of all that a model is read from: weights, config and tokenizer. A copy has the same, and
    a model that was trained anew in the same folder another. It reads the files whole."""
    told = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    files = sorted(file for file in Path(folder).iterdir()
                   if file.is_file() and (file.suffix == ".safetensors" or file.name in told))

    def one(file):
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    with ThreadPoolExecutor() as threads:
        found = {file.name: sha for file, sha in zip(files, threads.map(one, files))}
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


def checkpoint_files(folder):
    """{tensor name: safetensors file that holds it}, from the index or from the single file's header."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            named = dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, LookupError, TypeError, RecursionError):
            raise ValueError(f"{index} is damaged; download it again") from None
        if others := [file for file in named.values() if not isinstance(file, str) or Path(file).name != file]:
            raise ValueError(f"{index} names {others[0]!r:.80}, which is no file of that folder")
        where = {name: folder / file for name, file in named.items()}
        absent = sorted({file.name for file in where.values() if not file.is_file()})
        if absent:
            raise ValueError(f"{folder} lacks {', '.join(absent)}, named in {index.name}; download it again")
    elif single.is_file():
        where = {}
    else:
        raise ValueError(f"{folder} holds neither model.safetensors nor model.safetensors.index.json")
    held = {}
    for file in sorted(set(where.values()) or {single}):
        try:
            with safe_open(file, framework="pt") as f:
                held.update(dict.fromkeys(f.keys(), file))
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); download it again") from None
    return held


def load_tensors(folder, parameters, slice_bytes=32 * 2**20, unused=()):
    """Fill parameters from the checkpoint in `folder`, a slice of rows at a time.

    parameters: {name: (tensor, first, shape)}; the tensor receives the rows from `first` on of one of this shape, so
    that a process which holds a part reads only that part. unused: names in the checkpoint that need no parameter. The
    file is opened anew for each slice: the library maps it into memory, and pages once read would count until it is
    closed. Raises ValueError naming missing, unexpected and mis-shaped tensors together, before anything is copied.
    """
    where = checkpoint_files(folder)
    shapes = {}
    for file in sorted(set(where.values())):
        with safe_open(file, framework="pt") as f:
            shapes.update({name: tuple(f.get_slice(name).get_shape()) for name in f.keys()})
    faults = {
        "missing": sorted(parameters.keys() - shapes.keys()),
        "unexpected": sorted(shapes.keys() - parameters.keys() - set(unused)),
        "of another shape": [f"{name} (expected {parameters[name][2]}, found {shapes[name]})"
                             for name in sorted(parameters.keys() & shapes.keys())
                             if parameters[name][2] != shapes[name]],
    }
    if any(faults.values()):
        text = "; ".join(f"{len(names)} {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
                         for kind, names in faults.items() if names)
        raise ValueError(f"{folder} does not fit its config.json: {text}")
    with torch.no_grad():
        for name, (rows, first, _) in parameters.items():
            step = max(1, slice_bytes // max(1, rows[:1].nbytes))
            for start in range(0, len(rows), step):
                stop = min(start + step, len(rows))
                with safe_open(where[name], framework="pt") as f:
                    rows[start:stop].copy_(f.get_slice(name)[first + start:first + stop])
