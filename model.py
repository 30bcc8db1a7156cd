"""Qwen2.5 in plain PyTorch: the architecture, and its published safetensors folders in and out.

    model = Qwen2.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct")     # a hub id, or a folder
    logits = model(tokens)                                          # (B, T) int64 -> (B, T, V)
    model.save_pretrained("my-folder")                              # opens in transformers and vLLM

The network is that of the Qwen2.5 report, arXiv 2412.15115, section 2. Parameters carry the names of the published
checkpoints.

Letters in shapes: B rows, T tokens in a row, N tokens with a target, S cached positions, V vocabulary, L layers,
C model width, F feed-forward width, H query heads, K key/value heads, D head width.
"""
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import support  # noqa: F401  before torch

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from support.pretrained import SHARD_BYTES, check_config, find_folder, load_tensors, read_json, write_checkpoint

# cuDNN makes a plan for every new shape of an attention, which takes 40 to 400 ms, and shapes change at each pass.
torch.backends.cuda.enable_cudnn_sdp(False)

IGNORE = -100               # the target of a token that has none
CPU_LOGITS = 2**24          # logits that the log-probs hold at a time: 64 MiB in fp32
GPU_LOGITS = 2**27          # 512 MiB
CHUNK_STEP = 256            # a chunk's width is a multiple of this: tensor cores are slow at odd widths
NO_LOGIT = -1e9             # of ids that do not exist; infinity times a probability of 0 would be NaN


# -- Configuration

@dataclass
class Config:
    """The shape of a model, under the names of its published config.json. The defaults are the "tiny" preset."""
    vocab_size: int = 512                   # V
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
        """Returns the shape of a published size ("0.5b" ... "32b"), or "tiny"."""
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
        return replace(PRESETS[name])

    @classmethod
    def from_pretrained(cls, folder):
        """Reads config.json. ValueError: it is missing, damaged, or of a model that is not built here."""
        path = Path(folder) / "config.json"
        raw = read_json(path)
        if raw.get("model_type") != "qwen2":
            raise ValueError(f"{path} says model_type {raw.get('model_type')!r}; expected 'qwen2' (Qwen2, Qwen2.5)")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
        if rope_type != "default" or raw.get("use_sliding_window"):
            raise ValueError(f"{path} asks for scaled rotary positions or a sliding window; only plain ones are built")
        raw.setdefault("rope_theta", rope.get("rope_theta", 1e6))       # newer files nest it

        config = cls(**{field.name: raw.get(field.name) for field in fields(cls)})
        check_config(config, raw.get("head_dim"), path)
        return config


PRESETS = {     # V, C, F, L, H, K
    "tiny": Config(),
    "0.5b": Config(151936, 896, 4864, 24, 14, 2),
    "1.5b": Config(151936, 1536, 8960, 28, 12, 2),
    "3b": Config(151936, 2048, 11008, 36, 16, 2),
    "7b": Config(152064, 3584, 18944, 28, 28, 4, tie_word_embeddings=False),
    "14b": Config(152064, 5120, 13824, 48, 40, 8, tie_word_embeddings=False),
    "32b": Config(152064, 5120, 27648, 64, 40, 8, tie_word_embeddings=False),
}


# -- Operations that fused.py also has, in Triton, with the same names, arguments and results

def norm(x, weight, eps):
    """Returns the RMSNorm of x (..., C)."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def add_norm(x, y, weight, eps):
    """Returns x + y and its RMSNorm, each (..., C)."""
    total = x + y
    return total, norm(total, weight, eps)


def rope(q, k, cos, sin):
    """Returns q (B, T, H, D) and k (B, T, K, D), each pair (i, i + D/2) turned by its angle in fp32; see rotary."""
    return rotate(q, cos, sin), rotate(k, cos, sin)


def rotate(x, cos, sin):
    y = x.float()
    return torch.addcmul(y * cos, y.roll(y.shape[-1] // 2, -1), sin).to(x.dtype)


def swiglu(gate, up):
    """Returns silu(gate) * up."""
    return F.silu(gate) * up


def logprob_stats(logits, targets, temperature, row_max, sum_exp, sum_z_exp, target_logit):
    """Adds a chunk of the vocabulary to the statistics of N softmaxes, (N,) and changed in place: with
    z = logits / temperature, max z, the sums of exp(z - row_max) and of z exp(z - row_max), and the z of the target.
    logits: (N, chunk), overwritten. targets: (N,), also of other chunks."""
    z = logits.to(row_max.dtype).div_(temperature)
    new_max = torch.maximum(row_max, z.amax(-1))
    p = (z - new_max[:, None]).exp_()
    shrink = (row_max - new_max).exp_()
    sum_exp.mul_(shrink).add_(p.sum(-1))
    sum_z_exp.mul_(shrink).add_(torch.linalg.vecdot(p, z))
    row_max.copy_(new_max)
    columns, in_chunk = target_columns(targets, z.shape[1])
    target_logit.copy_(torch.where(in_chunk, z.gather(1, columns)[:, 0], target_logit))


def logprob_backward(logits, targets, temperature, lse, entropy, d_logp, d_entropy):
    """Returns the gradient of sum(d_logp * logp + d_entropy * entropy) in a chunk of logits, (N, chunk). With p the
    softmax and E its entropy, d logp / dz = 1[target] - p and d E / dz = -p (log p + E). d_entropy may be None. logits
    is overwritten."""
    logq = logits.to(lse.dtype).div_(temperature).sub_(lse[:, None])        # log p
    if d_entropy is None:
        d = logq.exp_().mul_(-d_logp[:, None])
    else:
        d = logq.exp().mul_(-d_logp[:, None] - (logq + entropy[:, None]) * d_entropy[:, None])
    columns, in_chunk = target_columns(targets, d.shape[1])
    d.scatter_add_(1, columns, torch.where(in_chunk, d_logp, 0)[:, None])
    return d.div_(temperature).to(logits.dtype)


def target_columns(targets, chunk):
    """Returns the targets as columns (N, 1) that can be indexed, and which are columns of the chunk, (N,)."""
    return targets.clamp(0, chunk - 1)[:, None], (targets >= 0) & (targets < chunk)


def attention_mask(positions, S, group, dtype):
    """Returns what attend adds to the scores, (B, 1, T * group, S): query t of row b sees positions
    0 .. positions[b, t] of S. group: query heads that share a key head."""
    last_seen = positions.repeat_interleave(group, 1)[:, None, :, None]
    unseen = torch.arange(S, device=positions.device) > last_seen
    return torch.zeros_like(unseen, dtype=dtype).masked_fill_(unseen, -torch.inf)


def attend(q, k, v, mask):
    """Returns the attention of queries (B, T, H, D) over keys and values (B, K, S, D), (B, T, H, D)."""
    B, T, H, D = q.shape
    K = k.shape[1]
    # Heads that share a key head become further queries of it: the cache is not copied.
    q = q.view(B, T, K, H // K, D).transpose(1, 2).reshape(B, K, T * H // K, D)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return y.view(B, K, T, H // K, D).transpose(1, 2).reshape(B, T, H, D)


PLAIN = {f.__name__: f for f in (norm, add_norm, rope, swiglu, logprob_stats, logprob_backward, attention_mask, attend)}
KERNELS = SimpleNamespace(**PLAIN)              # the operations in use


def use_kernels(name, device):
    """Lets the functions above ("torch", and "compiled", where build_model compiles the blocks) or those of fused.py
    ("triton") do the work from now on in this process. ValueError: another name, or what cannot run here."""
    if name not in ("torch", "compiled", "triton"):
        raise ValueError(f"expected kernels torch, compiled or triton, found {name!r}")
    functions = PLAIN
    can_run = name == "torch" or torch.device(device).type == "cuda"
    if name == "triton":
        try:
            import fused
        except ImportError as error:
            raise ValueError(f"the Triton kernels need triton ({error}); pip install it, or use torch's") from None
        can_run |= fused.INTERPRETED
        functions = {name: getattr(fused, name) for name in PLAIN}
    if not can_run:
        raise ValueError(f"{name} kernels need a CUDA device, found {str(device)!r}; use torch's there")
    vars(KERNELS).update(functions)


# -- Layers

class Linear(nn.Linear):
    """y = x W^T + b, in x's dtype."""

    def forward(self, x):
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, self.weight.to(x.dtype), bias)


class LinearLogProb(torch.autograd.Function):
    """Log-prob of each target under softmax(x W^T / temperature), the entropy of that softmax, and whether the target
    is its likeliest token, without ever holding (N, V) logits: they are made for a chunk of the vocabulary at a time,
    with running statistics in fp32, and made again in backward."""

    @staticmethod
    def forward(ctx, x, weight, targets, temperature, vocab_limit, vocab_chunk):
        """x (N, C), weight (V, C), targets (N,) -> three (N,). Only the first vocab_limit rows of weight count."""
        row_max = x.new_full((len(x),), -torch.inf, dtype=torch.promote_types(x.dtype, torch.float32))
        sum_exp = torch.zeros_like(row_max)
        sum_z_exp = torch.zeros_like(row_max)
        target_logit = torch.zeros_like(row_max)
        for start in range(0, vocab_limit, vocab_chunk):
            logits = logits_of_chunk(x, weight[start:start + vocab_chunk], vocab_limit - start)
            KERNELS.logprob_stats(logits, targets - start, temperature, row_max, sum_exp, sum_z_exp, target_logit)
        lse = row_max + sum_exp.log()
        entropy = lse - sum_z_exp / sum_exp
        is_argmax = target_logit >= row_max
        ctx.save_for_backward(x, weight, targets, lse, entropy)
        ctx.settings = temperature, vocab_limit, vocab_chunk
        ctx.set_materialize_grads(False)        # None for a result that nothing depends on
        return target_logit - lse, entropy, is_argmax

    @staticmethod
    def backward(ctx, d_logp, d_entropy, _):
        x, weight, targets, lse, entropy = ctx.saved_tensors
        temperature, vocab_limit, vocab_chunk = ctx.settings
        if d_logp is None:
            d_logp = torch.zeros_like(lse)
        dx = torch.zeros_like(x, dtype=lse.dtype)
        dw = torch.zeros_like(weight)
        for start in range(0, vocab_limit, vocab_chunk):
            part = weight[start:start + vocab_chunk]
            logits = logits_of_chunk(x, part, vocab_limit - start)
            d = KERNELS.logprob_backward(logits, targets - start, temperature, lse, entropy, d_logp, d_entropy)
            dx += d @ part.to(x.dtype)
            dw[start:start + vocab_chunk] = d.T @ x
        return dx.to(x.dtype), dw, None, None, None, None


def logits_of_chunk(x, weight, limit):
    """Returns the logits (N, chunk) of rows of the head, NO_LOGIT of those from `limit` on."""
    logits = x @ weight.to(x.dtype).T
    if limit < logits.shape[1]:
        logits[:, limit:] = NO_LOGIT
    return logits


class Head(Linear):
    """The output layer: logits, or with targets what LinearLogProb gives of them."""

    def forward(self, x, targets=None, temperature=1.0, num_token_ids=None):
        """x (..., C) -> logits (..., V); with targets (N,) int64: x (N, C) -> logp, entropy, is_argmax, each (N,).
        Rows of the vocabulary beyond num_token_ids get no probability, as in sampling."""
        if targets is None:
            return super().forward(x)
        max_logits = CPU_LOGITS if x.device.type == "cpu" else GPU_LOGITS
        vocab_chunk = max(1, max_logits // max(1, len(x)) // CHUNK_STEP) * CHUNK_STEP
        num_token_ids = num_token_ids or self.out_features
        return LinearLogProb.apply(x, self.weight, targets, temperature, num_token_ids, vocab_chunk)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight; the mean is taken in fp32 whatever the dtype."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x, y=None):
        """Returns the norm of x; with y, of the same shape: x + y, and its norm."""
        weight = self.weight.to(x.dtype)
        if y is None:
            return KERNELS.norm(x, weight, self.eps)
        return KERNELS.add_norm(x, y, weight, self.eps)


def rotary(positions, head_dim, theta):
    """Returns (cos, sin) of the angles position * theta^(-2i/D), i < D/2, in fp32, each (B, T, 1, D), for rope
    (arXiv 2104.09864, equation 15). i and i + D/2 share an angle, and the first half of sin is negative."""
    frequency = theta ** (torch.arange(0, head_dim, 2, device=positions.device).float() / -head_dim)
    angle = positions[:, :, None, None].float() * frequency
    cos = angle.cos()
    sin = angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


class Layout(NamedTuple):
    """Which tokens of a row see which. The last five are for varlen_attention alone."""
    trees: list                 # [(tokens of the prefix, [tokens of each branch])]; a text alone has no branches
    positions: torch.Tensor     # (1, T): of each token in its own text
    key_index: torch.Tensor = None      # (S,): the keys of all queries' texts, prefixes repeated, back to back
    query_ends: torch.Tensor = None     # (texts + 1,) int32: where the queries of each text end, after a 0
    key_ends: torch.Tensor = None       # (texts + 1,) int32: the same of the keys
    max_queries: int = None
    max_keys: int = None


def make_layout(lengths, device, varlen):
    """Returns the Layout of a row. lengths: of the texts in it, back to back. An entry (P, [R1, R2, ...]) is a tree: P
    tokens that several texts begin with, once, and then the rest of each text, a branch. varlen: with what
    varlen_attention needs, as tensors, so that a compiled block serves every layout."""
    trees = as_trees(lengths)
    positions = []
    keys = []
    queries = []            # tokens of each text that are queries
    num_keys = []
    first = 0
    for prefix, branches in trees:
        parts = [(0, prefix)] if prefix else []
        parts += [(prefix, length) for length in branches]
        begin = first
        for seen, length in parts:
            positions.append(torch.arange(seen, seen + length))
            keys += [torch.arange(first, first + seen), torch.arange(begin, begin + length)]
            queries.append(length)
            num_keys.append(seen + length)
            begin += length
        first = begin
    positions = torch.cat(positions)[None].to(device)
    if not varlen:
        return Layout(trees, positions)
    ends = torch.tensor([[0, *queries], [0, *num_keys]]).cumsum(1).to(device, torch.int32)
    return Layout(trees, positions, torch.cat(keys).to(device), *ends, max(queries), max(num_keys))


def as_trees(lengths):
    """Returns the texts and trees of a row as [(tokens of the prefix, [tokens of each branch])]."""
    return [(entry, []) if isinstance(entry, int) else entry for entry in lengths]


def packed_attention(q, k, v, layout):
    """Returns the causal attention within each text of the rows, (B, T, H, D): a product for each text, and one for
    the branches of a tree. q: (B, T, H, D). k, v: (B, T, K, D). A row with branches stands alone."""
    outputs = []
    begin = 0
    for prefix, branches in layout.trees:
        end = begin + prefix + sum(branches)
        tree = [x[:, begin:end] for x in (q, k, v)]
        if prefix:
            outputs.append(causal_attention(*(x[:, :prefix] for x in tree), is_causal=True))
        if branches:
            outputs.append(branch_attention(*tree, prefix, branches))
        begin = end
    return torch.cat(outputs, dim=1)


def branch_attention(q, k, v, P, lengths):
    """Returns the attention of a tree's branches over themselves and their prefix of P tokens, (1, N, H, D).
    q: (1, P + N, H, D). k, v: (1, P + N, K, D)."""
    R = max(lengths)
    own = [pad_sequence(x[0, P:].split(lengths), batch_first=True) for x in (q, k, v)]      # (n, R, heads, D)
    q = own[0]
    k = torch.cat([k[:, :P].expand(len(lengths), -1, -1, -1), own[1]], dim=1)
    v = torch.cat([v[:, :P].expand(len(lengths), -1, -1, -1), own[2]], dim=1)
    mask = torch.ones(R, P + R, dtype=torch.bool, device=q.device).tril(P)  # padding stands behind all it could hide
    y = causal_attention(q, k, v, attn_mask=mask)
    return torch.cat([branch[:length] for branch, length in zip(y, lengths)])[None]


def causal_attention(q, k, v, **options):
    """Returns scaled_dot_product_attention of q (B, T, H, D) over k and v (B, S, K, D), (B, T, H, D)."""
    if q.is_cuda and q.dtype is torch.float32:      # the fast kernels do not share heads in this dtype, and the plain
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))   # one makes all scores: 25 GB
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options).transpose(1, 2)


def has_varlen(tokens, dtype):
    """Returns whether varlen_attention can serve a pass of tokens (B, T), computed in this dtype."""
    is_served = tokens.is_cuda and len(tokens) == 1 and dtype is torch.bfloat16
    return is_served and torch.cuda.get_device_capability(tokens.device) >= (8, 0)      # Ampere


def varlen_attention(q, k, v, layout):
    """Returns what packed_attention does in one call for all texts and branches, a branch's queries being the last of
    its text."""
    from torch.nn.attention.varlen import varlen_attn       # it brings the compiler, which takes two seconds to import
    k, v = (x[0].index_select(0, layout.key_index) for x in (k, v))
    y = varlen_attn(q[0], k, v, layout.query_ends, layout.key_ends, layout.max_queries, layout.max_keys,
                    window_size=(-1, 0), enable_gqa=True)       # causal, aligned at the end
    return y[None]


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.hidden_size
        D = config.head_dim
        self.H = config.num_attention_heads
        self.K = config.num_key_value_heads
        self.D = D
        self.q_proj = Linear(C, self.H * D, bias=True)
        self.k_proj = Linear(C, self.K * D, bias=True)
        self.v_proj = Linear(C, self.K * D, bias=True)
        self.o_proj = Linear(self.H * D, C, bias=False)

    def forward(self, x, cos, sin, batch, layer, layout):
        """x (B, T, C) -> (B, T, C). layout: None where the batch knows who sees what. layer: the index of the block."""
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, self.H, self.D)
        k = self.k_proj(x).view(B, T, self.K, self.D)
        v = self.v_proj(x).view(B, T, self.K, self.D)
        q, k = KERNELS.rope(q, k, cos, sin)
        if batch is not None:
            batch.append(layer, k[0], v[0])
        if layout is None:
            y = batch.attend(layer, q[0])
        elif layout.key_index is None:
            y = packed_attention(q, k, v, layout)
        else:
            y = varlen_attention(q, k, v, layout)
        return self.o_proj(y.reshape(B, T, C))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), arXiv 2002.05202."""

    def __init__(self, config):
        super().__init__()
        C = config.hidden_size
        F = config.intermediate_size
        self.gate_proj = Linear(C, F, bias=False)
        self.up_proj = Linear(C, F, bias=False)
        self.down_proj = Linear(F, C, bias=False)

    def forward(self, x):
        return self.down_proj(KERNELS.swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    recompute = False       # activation checkpointing: backward computes the block again, from its input alone

    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def compile(self, **options):
        """Has the block compiled, one graph for every layout of a row, for training."""
        self.residual = torch.compile(self.residual, fullgraph=True, **options)

    def forward(self, *inputs):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.residual, *inputs, use_reentrant=False)
        return self.residual(*inputs)

    def residual(self, x, cos, sin, batch, layer, layout):
        y = self.self_attn(self.input_layernorm(x), cos, sin, batch, layer, layout)
        x, normed = self.post_attention_layernorm(x, y)         # x + y, and its norm
        return x + self.mlp(normed)


class Backbone(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


def at_targets(x, targets):
    """Returns x (N, C) and targets (N,) of x (B, T, C) and targets (B, T), a tensor on any device or numpy, where there
    are targets."""
    targets = torch.as_tensor(targets).flatten()
    index = (targets != IGNORE).nonzero()[:, 0]
    return x.flatten(0, 1)[index.to(x.device)], targets[index].to(x.device)


class Qwen2(nn.Module):
    """The language model. Build it with from_pretrained or from_scratch; the bare constructor leaves weights unset."""
    compute_dtype = None    # the dtype of activations and products where that is not the weights' own: mixed precision

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self):
        """Makes head and embedding one parameter where the config says so; moving off the meta device parts them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def hidden_states(self, tokens, batch=None, lengths=None):
        """Returns the last normalised hidden states, (B, T, C), of `tokens`, (B, T) int64.

        Each row is a text; with lengths it holds several, none of which sees another, or trees of them (make_layout).
        With a batch (sample.ForwardBatch) the one row is the batch's tokens, which continue what is cached.
        """
        dtype = self.compute_dtype or self.model.embed_tokens.weight.dtype
        layout = None
        if batch is None or batch.fresh:        # the whole past of every token is in this pass
            lengths = batch.counts if batch else lengths or [tokens.shape[1]]
            layout = make_layout(lengths, tokens.device, has_varlen(tokens, dtype))
        positions = layout.positions if layout else batch.positions
        cos, sin = rotary(positions, self.config.head_dim, self.config.rope_theta)
        x = self.model.embed_tokens(tokens).to(dtype)                       # (B, T, C)
        for layer, block in enumerate(self.model.layers):
            x = block(x, cos, sin, batch, layer, layout)
        return self.model.norm(x)

    def forward(self, tokens, batch=None, lengths=None, targets=None, temperature=1.0, num_token_ids=None):
        """Returns the logits of the next token at every position: (B, T) int64 -> (B, T, V).

        With targets, (B, T) int64 and IGNORE where there is none, it returns of these N, in the order of the rows,
        log-probs and entropies, (N,) fp32, and whether each is the likeliest token, (N,) bool. Targets as numpy spare
        waiting for a GPU. See hidden_states, and Head for num_token_ids.
        """
        x = self.hidden_states(tokens, batch, lengths)
        if targets is None:
            return self.lm_head(x)
        x, targets = at_targets(x, targets)
        return self.lm_head(x, targets, temperature, num_token_ids)

    @classmethod
    def from_scratch(cls, config, seed=0, dtype=torch.float32, device="cpu"):
        """Returns a model of random weights: normal with deviation 0.02, unit norms, zero biases."""
        model = cls.uninitialized(config, dtype, device)
        generator = torch.Generator(device).manual_seed(seed)
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "norm" in name:
                nn.init.ones_(p)
            else:
                nn.init.normal_(p, std=0.02, generator=generator)
        return model

    @classmethod
    def uninitialized(cls, config, dtype, device):
        with torch.device("meta"):
            model = cls(config).to(dtype)
        model.to_empty(device=device)
        model.tie()
        return model

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """Loads a published checkpoint: a folder, or a hub id such as "Qwen/Qwen2.5-7B". ValueError: its files do not
        fit its config."""
        folder = find_folder(path)
        model = cls.uninitialized(Config.from_pretrained(folder), dtype, device)
        load_tensors(folder, {name: (p, 0, tuple(p.shape)) for name, p in model.named_parameters()})
        return model

    def save_pretrained(self, folder, max_shard_bytes=SHARD_BYTES):
        """Writes config.json and the weights. Tokenizer.save writes the tokenizer's files."""
        tensors = ((name, p.detach()) for name, p in self.named_parameters())   # a tied head comes once, as embedding
        write_checkpoint(folder, self.config, tensors, next(self.parameters()).dtype, max_shard_bytes)
