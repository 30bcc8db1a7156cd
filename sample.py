"""Sampling: tokenizer and chat template, a continuously batched engine, and a client for OpenAI-compatible servers.

    python sample.py --model Qwen/Qwen2.5-0.5B-Instruct --prompt "Write a haiku about gradient descent."

    engine = load("Qwen/Qwen2.5-0.5B-Instruct")                     # or a folder, "tiny", "http://host:8000/v1#name"
    reply = engine.chat([{"role": "user", "content": "Hello"}])     # thread-safe; many threads share one batch
    groups = engine.generate(["1 + 1 =", "def f("], n=4)            # 4 samples of each prompt, one prefill each

The letters B, T, K, D, S, V, L are those of model.py; R is the number of rows of the cache.
"""
import argparse
import codecs
import dataclasses
import difflib
import http.client
import inspect
import json
import math
import os
import queue
import random
import re
import sys
import threading
import time
import typing
import urllib.error
import urllib.parse
import urllib.request
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F

import model as modeling
from model import Config, Linear, Qwen2, attend, find_folder, sight, sync, use_kernels


class ContextFull(ValueError):
    """The prompt and the reply asked for do not fit the model's context."""


@dataclass
class Completion:
    """One sampled reply. `tokens` hold the end-of-turn token, or the last token of a stop string, where one ended it;
    `text` does not. `logps[i]` is the log-probability of `tokens[i]` under the distribution it was drawn from."""
    text: str
    tokens: list        # of int
    logps: list         # of float, in nats
    finish: str         # "stop": end of turn or stop string; "length": max_new_tokens reached
    prompt_tokens: int = 0
    cached_tokens: int = 0      # of the prompt's tokens, how many needed no computation
    seconds: float = 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer

SYSTEM_TURN = ("{% if messages[0]['role'] != 'system' %}"       # what transformers and vLLM read of Qwen's chat format
               r"{{ '<|im_start|>system\nSYSTEM<|im_end|>\n' }}{% endif %}")
CHAT_TEMPLATE = (r"{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
                 r"{% endfor %}"
                 r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


class Tokenizer:
    """A byte-level BPE tokenizer (tokenizer.json) with Qwen's chat format.

    size: number of token ids; the model's vocabulary may be larger, and its spare ids are never sampled.
    eos: ids that end a turn.
    """
    TURN, END, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
    SYSTEM = "You are a helpful assistant."

    def __init__(self, bpe, eos=(), system=SYSTEM, folder=None):
        """system: the text that stands where a conversation has no system message; None: nothing does."""
        self.bpe, self.system, self.folder = bpe, system, folder
        self.bpe.encode_special_tokens = True       # "<|im_end|>" in a script's output stays text, and ends no turn
        self.size = max(bpe.get_vocab(with_added_tokens=True).values()) + 1
        self.turn, self.end = (bpe.token_to_id(t) for t in (self.TURN, self.END))
        if self.turn is None or self.end is None:
            raise ValueError(f"the tokenizer has no {self.TURN} or {self.END}; expected that of a Qwen2.5 checkpoint")
        if self.size > 1 << 24:     # a table of all ids is made
            raise ValueError(f"the tokenizer has an id of {self.size - 1:,}; expected that of a Qwen2.5 checkpoint")
        self.eos = set(eos) | {self.end}
        # Byte-level BPE spells each byte as one printable character: the inverse map gives the bytes of every id, so
        # that text can grow token by token and a stop string is found without decoding from the start.
        byte_of = {c: b for b, c in enumerate(byte_alphabet())}
        added = bpe.get_added_tokens_decoder()
        self.control = {i for i, token in added.items() if token.special} | self.eos | {self.turn}
        self.bytes = [b""] * self.size
        for text, i in bpe.get_vocab(with_added_tokens=True).items():
            if i not in added and not byte_of.keys() >= set(text):
                raise ValueError(f"the tokenizer spells {text[:80]!r} in no bytes; expected that of a Qwen2.5 checkpoint")
            self.bytes[i] = text.encode() if i in added else bytes(byte_of[c] for c in text)

    @classmethod
    def from_pretrained(cls, folder):
        """Read tokenizer.json of a checkpoint folder, and from its other files the ids that end a turn and the default
        system text. Raises ValueError for a missing or damaged file."""
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(f"{folder} holds no tokenizer.json; copy it from the checkpoint the model came from")
        try:
            bpe = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:      # the library raises bare Exception for every malformed file
            raise ValueError(f"{folder / 'tokenizer.json'} cannot be read ({error}); download it again") from None
        eos = _json(folder / "generation_config.json").get("eos_token_id") or []
        eos = eos if isinstance(eos, list) else [eos]
        if not all(isinstance(each, int) for each in eos):
            raise ValueError(f"{folder / 'generation_config.json'}: eos_token_id must be numbers, found {str(eos):.80}")
        template = str(_json(folder / "tokenizer_config.json").get("chat_template", ""))
        if not template and (folder / "chat_template.jinja").is_file():     # where newer tools put it
            template = (folder / "chat_template.jinja").read_text()
        found = re.search(r"<\|im_start\|>system\\n(You are[^'<{]*)<\|im_end\|>", template)
        system = found[1] if found else None if template else cls.SYSTEM
        return cls(bpe, eos, system, folder)

    @classmethod
    def of_bytes(cls):
        """One token a byte, and the three special tokens: enough for a model without a checkpoint."""
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(byte_alphabet())}, []))
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.decoder = tokenizers.decoders.ByteLevel()
        bpe.add_special_tokens([cls.TEXT_END, cls.TURN, cls.END])
        return cls(bpe)

    def save(self, folder):
        """Write the tokenizer's files beside a saved model, so that transformers and vLLM open the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not self.folder:
            template = SYSTEM_TURN.replace("SYSTEM", self.system or "") * (self.system is not None) + CHAT_TEMPLATE
            for name, value in (("generation_config.json", {"eos_token_id": self.end}), ("tokenizer_config.json", {
                    "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.END, "pad_token": self.TEXT_END,
                    "clean_up_tokenization_spaces": False, "chat_template": template})):
                (folder / name).write_text(json.dumps(value, indent=2) + "\n")
        for name in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
            if self.folder and (self.folder / name).is_file() and self.folder.resolve() != folder.resolve():
                (folder / name).write_bytes((self.folder / name).read_bytes())
        part = folder / "tokenizer.part"        # a run that is killed here finds the whole file or none
        self.bpe.save(str(part))
        sync(part)
        part.replace(folder / "tokenizer.json")

    def encode(self, text):
        """Token ids of plain text."""
        return self.bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """Text of token ids; bytes that are no valid UTF-8 become U+FFFD."""
        return b"".join(self.bytes[i] for i in ids).decode("utf-8", "replace")

    def spelling(self, ids, text):
        """Those of the sampled ids that are the text, without what ended it: an end of turn, a stop string. None where
        they are not exactly that, or are no ids at all, since they may come from a file."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        place = 0
        for n, i in enumerate(ids if isinstance(ids, list) else []):
            if place == len(text) and not decoder.getstate()[0]:
                return ids[:n]
            piece = self.bytes[i] if type(i) is int and 0 <= i < self.size and i not in self.control else b""
            said = decoder.decode(piece)
            if not piece or not text.startswith(said, place):
                return None
            place += len(said)
        return ids if text[place:] == decoder.decode(b"", final=True) else None

    def chat(self, messages, add_generation_prompt=True):
        """Token ids of a conversation in Qwen's chat format, ending where the assistant speaks; see conversation."""
        ids = self.conversation(messages)[0]
        return ids + [self.turn, *self.encode("assistant\n")] if add_generation_prompt else ids

    def conversation(self, messages, trained=None):
        """(ids, chosen) of a conversation, [{"role", "content"}]: its token ids in Qwen's chat format, and for each
        whether the assistant chose it, which holds for its replies and the token that ends each. trained: indices of
        the messages that count as chosen; None: all of the assistant's.

        A message is <|im_start|>role\\ncontent<|im_end|>\\n; without a system message the checkpoint's default one
        comes first, if it has one. A message's "tokens", the ids that were sampled for it, stand for its content where
        they spell it: a reply that was sampled is not tokenised again. Raises ValueError for another role, or a message
        without content.
        """
        numbered = list(enumerate(messages))
        if self.system is not None and (not messages or messages[0].get("role") != "system"):
            numbered.insert(0, (-1, {"role": "system", "content": self.system}))
        ids, chosen, newline = [], [], self.encode("\n")
        for i, message in numbered:
            role, content, tokens = message.get("role"), message.get("content"), message.get("tokens")
            if role not in ("system", "user", "assistant") or not isinstance(content, str):
                raise ValueError(f"message {i}: expected a role of system, user or assistant and a text as content, "
                                 f"found role {role!r} and content {str(content)[:40]!r}")
            head, reply = self.encode(f"{role}\n{content}"), []
            if role == "assistant":     # apart, as when it was sampled
                head, reply = self.encode("assistant\n"), self.spelling(tokens, content) or self.encode(content)
            ids += [self.turn, *head, *reply, self.end, *newline]
            counts = role == "assistant" and (trained is None or i in trained)
            chosen += [False] * (1 + len(head)) + [counts] * (len(reply) + 1) + [False] * len(newline)
        return ids, chosen


def byte_alphabet():
    """GPT-2's character for each of the 256 bytes: printable Latin-1 stands for itself, the rest for U+0100 onwards."""
    plain = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    spare = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(spare)) for b in range(256)]


def _json(path):
    """The object in a file of a checkpoint, {} where there is none."""
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged; download it again")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Key/value cache

class KVCache:
    """Keys and values of R conversations of up to S_max tokens: two tensors (L, R, K, S_max, D), allocated once."""

    def __init__(self, config, rows, length, dtype, device):
        self.group = config.num_attention_heads // config.num_key_value_heads       # query heads that share a key
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, length, config.head_dim)
        # Zeros, not empty: a masked position has weight 0, and 0 times a stray NaN would still be NaN.
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def copy(self, source, target, length):
        """Copy the first `length` positions of one row to another."""
        for t in (self.k, self.v):
            t[:, target, :, :length] = t[:, source, :, :length]

    def swap(self, a, b, length):
        """Exchange the first `length` positions of two rows."""
        for t in (self.k, self.v):
            kept = t[:, a, :, :length].clone()
            t[:, a, :, :length] = t[:, b, :, :length]
            t[:, b, :, :length] = kept


class ForwardBatch:
    """What one pass sees: rows of a cache, each continued by counts[i] >= 1 tokens after its starts[i] tokens.

    The new tokens of all rows, N together, stand back to back; positions: (1, N), where each stands in its row. A token
    looks at the cache up to its own position: what a row's past leaves beyond that is never read. fresh: every row is
    at its start, so that plain causal attention over the new tokens says the same.
    """

    def __init__(self, cache, rows, starts, counts):
        device = cache.k.device
        self.cache, self.counts, self.fresh = cache, counts, not any(starts)
        begin, end = [0], []
        for count in counts:
            end.append(begin[-1] + count)
            begin.append(end[-1])
        self.positions = torch.tensor([[s + i for s, n in zip(starts, counts) for i in range(n)]], device=device)
        self.rows = torch.tensor([row for row, n in zip(rows, counts) for _ in range(n)], device=device)
        self.parts = []     # what attends together: (new tokens, rows, S, what they see of S))
        if self.fresh:
            return
        lone = len(rows) > 1 and min(counts) == 1 and rows[-1] - rows[0] == len(rows) - 1
        if lone:            # the first token of every row in one product; where a row has more, it is done again below
            parts = [(begin[:-1] if end[-1] > len(rows) else slice(None), slice(rows[0], rows[-1] + 1), len(rows))]
        else:
            parts = []
        parts += [(slice(b, e), slice(r, r + 1), 1) for r, b, e in zip(rows, begin, end) if e - b > 1 or not lone]
        for new, where, B in parts:
            places = self.positions[0, new].view(B, -1)                                 # (rows, tokens of each)
            S = int(places.max()) + 1
            self.parts.append((new, where, S, sight(places, S, cache.group, cache.k.dtype)))

    def append(self, layer, k, v):
        """Store this pass's keys and values, (N, K, D)."""
        for cached, new in ((self.cache.k[layer], k), (self.cache.v[layer], v)):
            cached[self.rows, :, self.positions[0]] = new

    def attend(self, layer, q):
        """What queries (N, H, D) find in the cache: (N, H, D)."""
        out = torch.empty_like(q)
        for new, rows, S, seen in self.parts:
            k, v = self.cache.k[layer, rows, :, :S], self.cache.v[layer, rows, :, :S]           # (B, K, S, D)
            y = attend(q[new].view(len(k), -1, *q.shape[1:]), k, v, seen).view(-1, *q.shape[1:])
            if len(self.parts) == 1:
                return y
            out[new] = y
        return out


class DecodeGraph:
    """A decoding pass of one shape, made again and again: the first B rows of a cache, each continued by T tokens that
    see its first S positions. All it reads and leaves is in tensors that stay where they are, so that on CUDA a pass is
    one graph, replayed without asking the device anything; on a CPU the same function runs as it stands.

    A token at the cache's last position, which no row ever reaches, is padding: it writes there alone and its result
    means nothing. After each pass positions move on by one and, where T is 1, the tokens drawn are the next pass's, so
    that several passes follow each other before what they drew, in `drawn` and `logps`, (passes, B * T), is read.
    limits: whether top_p and top_k are looked at. A token takes one uniform number, as in `sample_tokens`, not a race between
    the words of the vocabulary: it needs no answer from the device either, and a seed means the same as without frames.
    """
    fresh, counts = False, None

    def __init__(self, model, size, cache, B, T, S, limits, pool):
        self.model, self.size, self.cache, self.shape, self.limits = model, size, cache, (B, T, S), limits
        device, N, self.spare = cache.k.device, B * T, cache.k.shape[3] - 1
        self.rows = torch.arange(B, device=device).repeat_interleave(T)
        self.tokens, self.positions = torch.zeros(1, N, dtype=torch.int64, device=device), torch.full(
            (1, N), self.spare, device=device)
        self.settings = torch.ones(N, 3, dtype=torch.float64, device=device)            # temperature, top_p, top_k
        self.uniform = torch.zeros(CHECK_EVERY, N, dtype=torch.float64, device=device)
        self.drawn, self.logps = torch.zeros_like(self.uniform, dtype=torch.int64), torch.zeros_like(self.uniform)
        self.pass_index, self.graph = torch.zeros(1, dtype=torch.int64, device=device), None    # which pass this is
        if device.type == "cuda":       # captured while everything is padding: no live row is written
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.compute()          # libraries set themselves up in a first call, which cannot be captured
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=pool):
                self.compute()

    def compute(self):
        B, T, S = self.shape
        places = torch.where(self.positions < self.spare, self.positions, 0).view(B, T)
        self.seen = modeling.ops.sight(places, S, self.cache.group, self.cache.k.dtype)
        logits = self.model(self.tokens, self)[0].float()
        logits[:, self.size:] = -torch.inf
        temperature, top_p, top_k = self.settings.unbind(1)
        drawn, logps = sample_tokens(logits, temperature, top_p, top_k.long(), self.uniform.index_select(0, self.pass_index)[0],
                            self.limits)
        self.drawn.index_copy_(0, self.pass_index, drawn[None])
        self.logps.index_copy_(0, self.pass_index, logps[None].double())
        if T == 1:
            self.tokens.copy_(drawn[None])
        self.positions.add_(1).clamp_(max=self.spare)
        self.pass_index.add_(1)

    def append(self, layer, k, v):
        """Store this pass's keys and values, (N, K, D)."""
        for cached, new in ((self.cache.k[layer], k), (self.cache.v[layer], v)):
            cached[self.rows, :, self.positions[0]] = new

    def attend(self, layer, q):
        """What queries (N, H, D) find in the cache: (N, H, D)."""
        B, T, S = self.shape
        k, v = self.cache.k[layer, :B, :, :S], self.cache.v[layer, :B, :, :S]
        return modeling.ops.attend(q.view(B, T, *q.shape[1:]), k, v, self.seen).view(q.shape)

    def run(self, tokens, positions, settings, uniform):
        """Passes over the given tokens (B, T), positions (B, T), settings (B, 3), and uniform numbers (B, passes, T):
        the tokens drawn and their log-probs, two arrays (B, passes * T)."""
        (B, T, _), passes = self.shape, uniform.shape[1]
        for buffer, values in ((self.tokens, tokens.reshape(1, -1)), (self.positions, positions.reshape(1, -1)),
                               (self.settings, settings.repeat(T, 0)),
                               (self.uniform[:passes], uniform.transpose(1, 0, 2).reshape(passes, -1))):
            buffer.copy_(torch.from_numpy(values))
        self.pass_index.zero_()
        for _ in range(passes):
            self.graph.replay() if self.graph else self.compute()
        drawn = torch.stack((self.drawn[:passes].double(), self.logps[:passes])).cpu().numpy()      # the only wait
        drawn = drawn.reshape(2, passes, B, T).transpose(0, 2, 1, 3).reshape(2, B, -1)
        return drawn[0].astype(int), drawn[1]


CHECK_EVERY = 4             # passes of a DecodeGraph between two looks at what they drew
GRAPH_TOKENS = 256          # of one pass, padding included; beyond it padding costs more than launching does


# ---------------------------------------------------------------------------------------------------------------------
# Drawing a token

def sample_tokens(logits, temperature, top_p, top_k, uniform, limits=None):
    """One token for each row, and its log-probability under the distribution it was drawn from.

    logits: (B, V) fp32. temperature, top_p, uniform in [0, 1): (B,) float64; top_k: (B,) int64, 0 for no limit.
    The distribution is softmax(logits / temperature), cut to its top_k tokens, renormalised, cut to the smallest set of
    most likely tokens whose probability reaches top_p, renormalised; the token is its inverse CDF at `uniform`.
    Temperature 0 takes the most likely token and reports its log-probability at temperature 1, uncut. limits: whether
    any row has a top_p or top_k, from one who knows; the device is then asked nothing.
    Returns (tokens (B,) int64, logps (B,) fp32).
    """
    greedy = temperature == 0
    logp = F.log_softmax(logits / torch.where(greedy, 1.0, temperature).float()[:, None], dim=-1)
    if limits is None and greedy.all():
        tokens = logits.argmax(-1)
        return tokens, logp.gather(1, tokens[:, None])[:, 0]
    limited = ((top_p < 1) | (top_k > 0)) & ~greedy
    if limits:
        logp = torch.where(limited[:, None], truncate(logp, top_p, top_k, logp.shape[-1]), logp)
    elif limits is None and limited.any():
        logp[limited] = truncate(logp[limited], top_p[limited], top_k[limited])
    cdf = logp.exp().cumsum(-1, dtype=torch.float64)
    tokens = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    tokens = torch.where(greedy, logits.argmax(-1), tokens)
    return tokens, logp.gather(1, tokens[:, None])[:, 0]


def truncate(logp, top_p, top_k, width=1024):
    """Log-probabilities, (B, V), after top-k and then nucleus truncation, renormalised; -inf outside.

    Sorting 152,064 values a row costs more than a decoding step of a small model, so only the `width` most likely are
    sorted first, and all of them only where these do not settle it.
    """
    V = logp.shape[-1]
    value, index = logp.topk(min(width, V), dim=-1)
    unsettled = torch.where(top_k == 0, value.double().exp().sum(-1) < top_p, top_k > width)
    if width < V and unsettled.any():
        return truncate(logp, top_p, top_k, V)
    rank = torch.arange(value.shape[1], device=logp.device)
    p = torch.where((top_k == 0)[:, None] | (rank < top_k[:, None]), value.double().exp(), 0.0)
    p = p / torch.where(top_k == 0, 1.0, p.sum(-1))[:, None]         # without a top-k the mass is 1 already
    keep = (p > 0) & (p.cumsum(-1) - p < top_p[:, None])
    kept = torch.where(keep, value, -torch.inf)
    return torch.full_like(logp, -torch.inf).scatter(1, index, kept - kept.logsumexp(-1, keepdim=True))


# ---------------------------------------------------------------------------------------------------------------------
# Engine

@dataclass
class Request:
    """A reply being sampled."""
    prompt: np.ndarray          # (P,) int64
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop: list                  # of bytes
    uniform: list               # max_new_tokens floats: all its random numbers, so batching cannot change them
    stream: typing.Callable     # called with each new piece of text, or None
    future: Future = field(default_factory=Future)
    tokens: list = field(default_factory=list)
    logps: list = field(default_factory=list)
    text: bytearray = field(default_factory=bytearray)
    cached: int = 0
    lookup: "PromptLookup" = None     # what may come next; None without drafting
    started: float = field(default_factory=time.perf_counter)

    @property
    def last(self):
        """The newest token, which no pass has seen yet."""
        return self.tokens[-1] if self.tokens else self.prompt[-1]


class PromptLookup:
    """Guesses what comes next in a text: what followed when its last GRAM tokens occurred before (prompt lookup).

    at: where in `seq` the token expected next stands, or None. match: how many tokens before it equal the end of the
    text, at most 16. odds: [right, made] guesses of all texts for each length of match; every token added tells,
    drafted or not. recent: the same of this text alone, older guesses counting less.
    """
    GRAM = 2

    def __init__(self, prompt, odds):
        seq = self.seq = prompt.tolist()
        self.counts, self.acceptance = odds, [0.0, 0.0]
        grams = zip(*(seq[i:] for i in range(self.GRAM)))
        self.ngram_index = dict(zip(grams, range(self.GRAM, len(seq))))      # n-gram -> where it was last followed
        self._find()

    def _find(self):
        """Look the last n-gram up, and count how much more than it matches."""
        self.pos, self.match_len = self.ngram_index.get(tuple(self.seq[-self.GRAM:])), self.GRAM
        if self.pos is not None:
            while self.match_len < min(16, self.pos) and self.seq[self.pos - 1 - self.match_len] == self.seq[-1 - self.match_len]:
                self.match_len += 1

    def add(self, token):
        """Take notice of the next token. A copy goes on where it is, wherever else its n-grams occur."""
        right = False
        if self.pos is not None:
            right = self.seq[self.pos] == token
            odds = self.counts[self.match_len]
            odds[0] += right
            odds[1] += 1
            self.acceptance = [0.9 * self.acceptance[0] + right, 0.9 * self.acceptance[1] + 1]
        self.ngram_index[tuple(self.seq[-self.GRAM:])] = len(self.seq)
        self.seq.append(token)
        if right:
            self.pos, self.match_len = self.pos + 1, min(16, self.match_len + 1)
        else:
            self._find()

    def accept_prob(self):
        """Probability that the next guess is right: that of such matches, and this text's own record."""
        if self.pos is None:
            return 0.0
        right, made = self.counts[self.match_len]
        return (self.acceptance[0] + 2 * right / made) / (self.acceptance[1] + 2)


class Engine:
    """Samples many conversations at once from one model.

    rows: conversations in the cache, which is also the largest batch. context: tokens of one conversation, prompt and
    reply. A finished row keeps its keys and values: when a prompt comes that begins with the same tokens (the next turn
    of a conversation, another sample of the same prompt), they are reused. After the model's weights change call
    refresh(). On a CPU in fp32, pack=True keeps a second copy of the weights in a layout that is about twice as fast
    for 4 to 64 rows; None does so where they are too large for the processor's cache (64 MiB). draft: guess tokens from
    the prompt and the reply so far, and check several in one pass where that is expected to pay; the tokens stay those
    of plain decoding. What pays depends on what was sampled since refresh() alone, so that the same calls give the same
    log-probs to the last bit. static: decode in DecodeGraphs, which on CUDA are graphs: off
    by default as long as nobody has run it on a GPU. What is sampled is the same.

    chat, generate and submit may be called from any thread. The first chat or submit starts one that runs the model
    from then on. Until then generate runs it in the caller's thread, which on a CPU is a quarter faster: there is one
    pool of OpenMP threads, not two that share the cores.
    """

    def __init__(self, model, tokenizer, rows=8, context=16384, name="engine", pack=None, draft=True,
                 static=False):
        weight = model.lm_head.weight
        self.model, self.tokenizer, self.name, self.rows = model, tokenizer, name, rows
        self.context = min(context, model.config.max_position_embeddings)
        self.device = weight.device
        dtype = getattr(model, "compute", None) or weight.dtype     # of what is computed, and so of what is cached
        streamed = sum(p.nbytes for p in model.parameters()) > 2**26 if pack is None else pack
        self.pack = streamed and self.device.type == "cpu" and weight.dtype is dtype is torch.float32
        self.static, self.graphs = static, {}       # {shape: DecodeGraph}, kept while weights are changed in place
        self.pool = torch.cuda.graph_pool_handle() if static and self.device.type == "cuda" else None
        self.cache = KVCache(model.config, rows, self.context + static, dtype, self.device)
        # Rows 0 .. len(active) - 1 are being sampled; the rest are parked, their cached tokens waiting for reuse.
        self.active = []
        self.tokens = np.zeros((rows, self.context), int)                   # what each row's cache holds
        self.lengths = [0] * rows                                           # how many of them
        self.used = [0] * rows                                              # when each was parked last
        self.waiting, self.wake, self.thread, self.turn = deque(), threading.Condition(), None, threading.Lock()
        self.sampled_tokens = self.prefilled_tokens = self.reused_tokens = 0
        self.draft = draft
        self.passes = self.drafted_tokens = self.accepted_tokens = 0
        self.refresh()

    def forget(self):
        """Drop every cached token. Raises RuntimeError while replies are being sampled."""
        with self.wake:
            if self.active or self.waiting:
                raise RuntimeError("the cache cannot be dropped while replies are being sampled; wait for them first")
            self.lengths, self.used = [0] * self.rows, [0] * self.rows

    def refresh(self):
        """Take notice of changed weights: drop what the old ones cached, and pack anew."""
        self.forget()
        self.guess_counts = [[1, 2] for _ in range(17)]     # see PromptLookup
        if self.pack:
            for layer in self.model.modules():
                if isinstance(layer, Linear):
                    layer.pack()

    # -- what callers use

    def chat(self, messages, *, stream=None, **options):
        """The assistant's next reply to a conversation: one Completion (see submit for the options)."""
        return self.submit(self.tokenizer.chat(messages), stream=stream, **options).result()

    def generate(self, prompts, n=1, seed=0, each=None, **options):
        """n samples of each prompt (a text, a list of ids, or a conversation): a list of n Completions for each.

        The n samples of a prompt share one prefill. Sample j of prompt i draws from seed + i * n + j. each(i, j,
        completion) is called in the caller's thread as soon as that sample is done; the others wait meanwhile, so it
        should hand longer work to another thread. What it raises ends the call and takes back what is not done.
        """
        done = queue.SimpleQueue()
        with self.wake:     # all or none are there when the engine looks, so a run can be repeated exactly
            requests = [[self._request(self._ids(prompt), seed=seed + i * n + j, **options) for j in range(n)]
                        for i, prompt in enumerate(prompts)]
            for i, group in enumerate(requests):
                for j, request in enumerate(group):
                    request.future.add_done_callback(lambda _, at=(i, j): done.put(at))
                self.waiting.extend(group)
            self.wake.notify()
        try:
            for _ in range(len(requests) * n):
                while self.thread is None and done.empty():
                    self._advance()
                i, j = done.get()
                reply = requests[i][j].future.result()
                if each:
                    each(i, j, reply)
        except BaseException:
            self._withdraw({id(request) for group in requests for request in group})
            raise
        return [[request.future.result() for request in group] for group in requests]

    def submit(self, ids, **options):
        """Queue one reply to the token ids of a prompt; returns a Future of its Completion.

        Options: max_new_tokens=1024, temperature=1.0, top_p=1.0, top_k=0, stop=(), seed=0, and stream, called with the
        bytes of each new token. Raises ContextFull when ids and max_new_tokens do not fit the context, ValueError for
        options out of range.
        """
        request = self._request(ids, **options)
        with self.wake:
            self.waiting.append(request)
            if self.thread is None:
                self.thread = threading.Thread(target=self._serve, daemon=True)
                self.thread.start()
            self.wake.notify()
        return request.future

    def _request(self, ids, max_new_tokens=1024, temperature=1.0, top_p=1.0, top_k=0, stop=(), seed=0, stream=None):
        if not (ids and max_new_tokens >= 1 and temperature >= 0 and 0 < top_p <= 1 and top_k >= 0):
            raise ValueError("expected a prompt, max_new_tokens >= 1, temperature >= 0, 0 < top_p <= 1 and top_k >= 0; "
                             f"found {len(ids)} prompt tokens, {max_new_tokens}, {temperature}, {top_p}, {top_k}")
        if len(ids) + max_new_tokens > self.context:
            raise ContextFull(f"{len(ids)} prompt tokens and {max_new_tokens} new ones exceed the context of "
                              f"{self.context}; shorten the prompt, or give the engine a larger context")
        generator = torch.Generator().manual_seed(seed)
        return Request(np.array(ids), max_new_tokens, temperature, top_p, top_k,
                       [s.encode() for s in ([stop] if isinstance(stop, str) else stop) if s],
                       torch.rand(max_new_tokens, generator=generator, dtype=torch.float64).tolist(), stream)

    def _ids(self, prompt):
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return self.tokenizer.chat(prompt) if prompt and isinstance(prompt[0], dict) else list(prompt)

    # -- what runs the model

    def _serve(self):
        while True:
            with self.wake:
                while not (self.active or self.waiting):
                    self.wake.wait()
            self._advance()

    def _advance(self):
        """One step, if there is anything to do. What it raises is handed to everyone who waits for a reply."""
        with self.turn, torch.no_grad():        # not inference_mode: it would break later training of the same module
            try:
                if self.active or self.waiting:
                    self.step()
            except BaseException as error:      # also Ctrl-C, which may come while a row is half written
                with self.wake:
                    failed, self.active, self.waiting = [*self.active, *self.waiting], [], deque()
                    self.lengths = [0] * self.rows
                for request in failed:
                    request.future.set_exception(error)
                if not isinstance(error, Exception):
                    raise

    def _withdraw(self, requests):
        """Sample no further what nobody waits for any more. requests: a set of their ids."""
        with self.turn, self.wake:
            self.waiting = deque(r for r in self.waiting if id(r) not in requests)
            for row in reversed(range(len(self.active))):
                if id(self.active[row]) in requests:
                    self.release_row(row)

    def step(self):
        """Start waiting requests while rows are free, then one pass: a token for every active row, and with it those of
        its draft that prove right.

        At each drafted position a token is drawn from the model's distribution with that position's own random number,
        as without a draft; the draft only decides whether the positions after it count. So the tokens, and their
        log-probs, are those of plain decoding.
        """
        self.schedule()
        drafts = self.propose_drafts()
        passes, frame = self.decode_graph(drafts)
        replies = self._replay(drafts, passes, frame) if frame else self._pass(drafts)
        self.passes += passes
        self.drafted_tokens += sum(map(len, drafts))
        done = []
        for row, (request, draft, reply) in enumerate(zip(self.active, drafts, replies)):
            for i, (token, logp) in enumerate(reply):
                if not math.isfinite(logp):
                    raise FloatingPointError(f"{self.name} gives logits that are not finite; its weights are damaged")
                self.lengths[row] += 1
                completion = self.append_token(request, token, logp)
                if completion or i < len(draft) and token != draft[i]:
                    break
            self.sampled_tokens += i + 1
            self.accepted_tokens += i if draft else 0
            if completion:
                done.append((row, request, completion))
        for row, _, _ in reversed(done):
            self.release_row(row)
        for _, request, completion in done:     # last, so that who waits for a reply finds its row free
            request.future.set_result(completion)

    def _pass(self, drafts):
        """For each active row [(token, logp)]: what is drawn after its last token and after each of its draft."""
        inputs, settings = [], []
        for r, draft in zip(self.active, drafts):
            inputs += [r.last, *draft]
            for u in r.uniform[len(r.tokens):len(r.tokens) + 1 + len(draft)]:
                settings.append((r.temperature, r.top_p, r.top_k, u))
        counts = [1 + len(draft) for draft in drafts]
        window = ForwardBatch(self.cache, range(len(counts)), self.lengths[:len(counts)], counts)
        logits = self.model(torch.tensor([inputs], device=self.device), window)[0].float()                # (N, V)
        logits[:, self.tokenizer.size:] = -torch.inf        # rows of the vocabulary that stand for no token
        settings = torch.tensor(settings, dtype=torch.float64, device=self.device)
        tokens, logps = sample_tokens(logits, settings[:, 0], settings[:, 1], settings[:, 2].long(), settings[:, 3])
        drawn = iter(zip(tokens.tolist(), logps.tolist()))
        return [[next(drawn) for _ in range(count)] for count in counts]

    def decode_graph(self, drafts):
        """(passes, frame) that fit the active rows, each size of the frame one of few; or (1, None) where none does."""
        power = lambda n: 1 << (n - 1).bit_length()
        B, T = min(power(len(drafts)), self.rows), power(1 + max(map(len, drafts)))
        if not self.static or B * T > GRAPH_TOKENS:
            return 1, None
        passes = 1 if T > 1 else min(CHECK_EVERY, max(r.max_new_tokens - len(r.tokens) for r in self.active))
        S = min(max(256, power(max(self.lengths[:len(drafts)]) + T + passes)), self.context)
        shape = B, T, S, any(r.temperature and (r.top_p < 1 or r.top_k) for r in self.active)
        if shape not in self.graphs:
            self.graphs[shape] = DecodeGraph(self.model, self.tokenizer.size, self.cache, *shape, self.pool)
        return passes, self.graphs[shape]

    def _replay(self, drafts, passes, frame):
        """As _pass, in a DecodeGraph, and where no row has a draft, several passes."""
        B, T, *_ = frame.shape
        tokens, positions = np.zeros((B, T), int), np.full((B, T), frame.spare)
        settings, uniform = np.ones((B, 3)), np.zeros((B, passes, T))
        for row, (r, draft) in enumerate(zip(self.active, drafts)):
            n, u = 1 + len(draft), r.uniform[len(r.tokens):len(r.tokens) + passes * T]
            tokens[row, :n], positions[row, :n] = [r.last, *draft], self.lengths[row] + np.arange(n)
            settings[row] = r.temperature, r.top_p, r.top_k
            uniform[row].reshape(-1)[:len(u)] = u
        tokens, logps = (drawn.tolist() for drawn in frame.run(tokens, positions, settings, uniform))
        return [list(zip(tokens[row], logps[row]))[:passes + len(draft)] for row, draft in enumerate(drafts)]

    def propose_drafts(self):
        """For each active row the tokens to try after its last.

        A guess that is right with probability p, after j others, is right with p^(j + 1) and costs TOKEN_COST. It
        pays if that is above TOKEN_COST times the tokens per cost without it; to take all that pay raises the rate, so the
        lengths are found again with the new one.
        """
        B = len(self.active)
        if not self.draft:
            return [[]] * B
        chances = [r.lookup.accept_prob() for r in self.active]
        counts, rate = [0] * B, B / (PASS_COST + TOKEN_COST * B)
        for _ in range(3):
            least = max(TOKEN_COST * rate, 1e-9)
            counts = [int(min(LONGEST_DRAFT, math.log(least) / math.log(p))) if p > least else 0 for p in chances]
            tokens = B + sum(p * (1 - p ** k) / (1 - p) for p, k in zip(chances, counts) if k)
            rate = max(rate, tokens / (PASS_COST + TOKEN_COST * (B + sum(counts))))
        counts = [min(k, r.max_new_tokens - len(r.tokens) - 1) for k, r in zip(counts, self.active)]
        return [r.lookup.seq[r.lookup.pos:r.lookup.pos + k] if k else [] for k, r in zip(counts, self.active)]

    def schedule(self):
        """Give free rows to waiting requests, and bring all of their prompts but the last token into the cache.

        Each reuses the longest beginning that some row holds. Prompts are computed several at a time; one that begins
        like another of them waits for that one, to copy it.
        """
        with self.wake:
            ready = len(self.active)
            while self.waiting and len(self.active) < self.rows:
                self.active.append(self.waiting.popleft())
        while ready < len(self.active):
            known = [len(r.prompt) - 1 for r in self.active[:ready]] + self.lengths[ready:]     # tokens of each row
            row, later = ready, []
            for request in self.active[ready:]:
                P = len(request.prompt) - 1
                same = self.tokens[:, :P] == request.prompt[:P]                                     # (R, P)
                same = np.where(same.all(1), P, same.argmin(1)) if P else np.zeros(self.rows, int)
                shared = np.minimum(same, known)
                source = int(shared.argmax())
                if same[ready:row].max(initial=0) > shared[source] + 16:
                    later.append(request)
                    continue
                self.assign_row(request, row, source, int(shared[source]))
                known[row:] = self.lengths[row:]
                self.active[row] = request
                row += 1
            self.active[row:] = later
            self._prefill(range(ready, row))
            ready = row

    def assign_row(self, request, row, source, reused):
        """Make `row` begin with the `reused` tokens of the row `source` that are the request's first."""
        P, parked = len(request.prompt) - 1, range(row, self.rows)
        home = min(parked, key=lambda r: (self.lengths[r] > 0, self.used[r]))       # an empty row, or the oldest
        goes_on, again = reused + 16 >= self.lengths[source], reused == P and self.lengths[home] > 0
        if source in parked and (goes_on or again):         # take its row over: next turn, or other reply to its prompt
            home = source
        else:                           # another conversation begins alike
            if source != home:
                self.cache.copy(source, home, reused)
            self.lengths[home] = reused         # so that what was copied moves with the row
        self.swap_rows(home, row)
        self.lengths[row] = request.cached = reused
        self.tokens[row, :P] = request.prompt[:P]
        if self.draft:
            request.lookup = PromptLookup(request.prompt, self.guess_counts)
        self.reused_tokens += reused
        self.prefilled_tokens += P - reused

    def _prefill(self, rows):
        """Compute the prompts of these rows, PREFILL_TOKENS in one pass: of several rows, or a part of one."""
        todo = deque(row for row in rows if self.lengths[row] < len(self.active[row].prompt) - 1)
        while todo:
            chosen, starts, parts = [], [], []
            room = PREFILL_TOKENS
            while todo and room:
                row = todo[0]
                part = self.active[row].prompt[self.lengths[row]:-1][:room]
                chosen.append(row)
                starts.append(self.lengths[row])
                parts.append(part)
                room -= len(part)
                self.lengths[row] += len(part)
                if self.lengths[row] == len(self.active[row].prompt) - 1:
                    todo.popleft()
            window = ForwardBatch(self.cache, chosen, starts, [len(part) for part in parts])
            self.model.hidden(torch.from_numpy(np.concatenate(parts))[None].to(self.device), window)

    def append_token(self, request, token, logp):
        """Add a sampled token to its reply; its Completion when that ends it, else None."""
        r, ended, cut = request, token in self.tokenizer.eos, None
        r.tokens.append(token)
        r.logps.append(logp)
        if r.lookup:
            r.lookup.add(token)
        if not ended:
            new = self.tokenizer.bytes[token]
            r.text += new
            cut = find_stop(r.text, r.stop, len(new))
            if r.stream:
                r.stream(bytes(new))
        stopped = ended or cut is not None
        if not stopped and len(r.tokens) < r.max_new_tokens:
            return None
        return Completion(bytes(r.text[:cut]).decode("utf-8", "replace"), r.tokens, r.logps,
                          "stop" if stopped else "length", len(r.prompt), r.cached, time.perf_counter() - r.started)

    def release_row(self, row):
        """Take a finished row out of the batch, keeping what it has cached."""
        last, request = len(self.active) - 1, self.active[row]
        P, length = len(request.prompt) - 1, self.lengths[row]
        self.tokens[row, P:length] = [request.prompt[-1], *request.tokens[:-1]][:length - P]
        self.swap_rows(row, last)
        self.active[row] = self.active[last]
        self.active.pop()
        self.used[last] = max(self.used) + 1

    def swap_rows(self, a, b):
        if a != b:
            self.cache.swap(a, b, max(self.lengths[a], self.lengths[b]))
            self.tokens[[a, b]] = self.tokens[[b, a]]
            for values in (self.lengths, self.used):
                values[a], values[b] = values[b], values[a]


def find_stop(text, stops, num_new):
    """Return where the earliest stop string begins in a text, or None. Only its last num_new characters are new."""
    starts = [text.find(stop, max(0, len(text) - num_new - len(stop) + 1)) for stop in stops]
    return min((start for start in starts if start >= 0), default=None)


PREFILL_TOKENS = 512        # of prompts in one pass: bounds the memory of a long prompt's activations and mask
LONGEST_DRAFT = 32          # tokens of one row
PASS_COST = 10.0            # of a pass, and of each of its tokens, in a unit that does not matter: constants, so that the
TOKEN_COST = 1.0            # same seeds always make the same passes


# ---------------------------------------------------------------------------------------------------------------------
# OpenAI-compatible servers

class EndpointError(RuntimeError):
    """A server gave no usable answer. retry_s: seconds to wait before asking again; None: asking again cannot help."""

    def __init__(self, message, retry_s=None):
        super().__init__(message)
        self.retry_s = retry_s


def is_server(spec):
    """Return whether a --model value is the address of a server."""
    return str(spec).lower().startswith(("http://", "https://"))


def address(spec):
    """Return ((scheme, host, port), the URL to post to, the model's name) of "http://host:port/v1#name".

    Raises ValueError for another form, and for a key in it, because addresses stand in messages and results.
    """
    expected = "expected an endpoint like http://host:port/v1#model-name"
    url, _, name = str(spec).partition("#")
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        raise ValueError(f"{expected}, found one whose host or port cannot be read") from None
    if "@" in parts.netloc or parts.query:
        raise ValueError(f"{expected}, found one with a password or a query in it; a key belongs in OPENAI_API_KEY")
    if not is_server(url) or not parts.hostname or not name or not url.isprintable() or " " in url:
        raise ValueError(f"{expected}, found {spec!r}")
    url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    return (parts.scheme, parts.hostname, port), url, name


def coder_key(coder, model):
    """Return the name of the environment variable that holds the key for the server `coder`.

    OPENAI_API_KEY is for the host of `model`: a coder on another host has OPENAI_API_KEY_CODER, and so has any coder
    where that is set.
    """
    other_host = is_server(coder) and is_server(model) and address(coder)[0] != address(model)[0]
    if other_host or os.environ.get("OPENAI_API_KEY_CODER"):
        return "OPENAI_API_KEY_CODER"
    return "OPENAI_API_KEY"


def mask_key(text, key):
    """Return the text with * for each piece of eight or more characters of the key (a server may have cut it)."""
    if not key:
        return text
    spellings = "\n".join((key, json.dumps(key), urllib.parse.quote(key, safe="")))
    size = min(8, len(key))
    masked = list(text)
    for i in range(len(text) - size + 1):
        if text[i:i + size] in spellings:
            masked[i:i + size] = "*" * size
    return "".join(masked)


class AnyStatus(urllib.request.HTTPErrorProcessor):
    """Hands over answers of any status, and so follows no redirect: it would take the conversation to another host."""

    def http_response(self, request, response):
        return response

    https_response = http_response


class Endpoint:
    """The same `chat` as Engine's, answered by any server that speaks /v1/chat/completions. Threads may share it.

    spec is "http://host:port/v1#model-name". key: the environment variable that holds the server's key, which is sent
    to that host alone and stands in no message. Busy servers, server errors, lost connections, timeouts and answers
    that are no chat completion are tried again, after pauses that double.
    """
    context = None              # in tokens; only the server knows
    timeout_s = 120.0           # of one request
    retries = 5
    backoff_s = 1.0             # the first pause
    max_bytes = 16 * 2**20      # of one answer

    def __init__(self, spec, key="OPENAI_API_KEY"):
        _, self.url, self.name = address(spec)
        self.key_name = key
        self._key = os.environ.get(key, "").strip()
        if not self._key.isascii() or not self._key.isprintable():
            raise ValueError(f"{key} holds characters that cannot be sent in a header; set it again")
        self._opener = urllib.request.build_opener(AnyStatus)

    def chat(self, messages, *, max_new_tokens=1024, temperature=1.0, top_p=1.0, top_k=0, stop=(), seed=0):
        """Return a Completion without tokens and logps, which the server keeps. messages: [{"role", "content"}].

        Raises ContextFull where the server says so, and EndpointError for any other answer that is no reply.
        """
        stop = [stop] if isinstance(stop, str) else [text for text in stop if text]
        body = {"model": self.name, "messages": [{"role": m["role"], "content": m["content"]} for m in messages],
                "max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        if stop:
            body["stop"] = stop
        if top_k:       # not in OpenAI's own interface; vLLM, SGLang, llama.cpp and others take it
            body["top_k"] = top_k
        start = time.perf_counter()
        for attempt in range(self.retries + 1):
            try:
                completion = self._ask(json.dumps(body).encode())
                break
            except EndpointError as error:
                if error.retry_s is None or attempt == self.retries:
                    raise
                pause = min(60.0, self.backoff_s * 2 ** attempt) * random.uniform(0.5, 1.0)
                time.sleep(max(pause, min(error.retry_s, self.timeout_s)))
        cut = find_stop(completion.text, stop, len(completion.text))
        if cut is not None:     # the server ignores `stop`, or returns the string with the text
            completion.text = completion.text[:cut]
            completion.finish = "stop"
        completion.seconds = time.perf_counter() - start
        return completion

    def _ask(self, body):
        status, retry_after, said = self._post(body)
        answered = f"{self.url} answered {status}: {self._excerpt(said)}"
        too_long = re.search(r"context.{0,12}(length|window|size)|too long|too many tokens", said[:4096], re.I)
        if too_long and status in (400, 413, 422):
            raise ContextFull(f"{answered}; the conversation is longer than {self.name!r} takes")
        if status in (408, 409, 425, 429) or status >= 500:
            seconds = re.fullmatch(r"\d{1,9}(\.\d+)?", retry_after)
            raise EndpointError(f"{answered}; it is busy or broken", float(seconds[0]) if seconds else 0.0)
        if status != 200:
            raise EndpointError(f"{answered}; check the address, the model's name {self.name!r} and the key in "
                                f"{self.key_name}")
        try:
            answer = json.loads(said)
            choice = answer["choices"][0]
            text = choice["message"]["content"].encode("utf-8", "replace").decode()     # half a surrogate pair: "?"
            finish = "length" if choice.get("finish_reason") == "length" else "stop"
            usage = answer.get("usage") or {}
            counts = [usage.get("prompt_tokens"), (usage.get("prompt_tokens_details") or {}).get("cached_tokens")]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise EndpointError(f"{self.url} answered, but not with a chat completion: {self._excerpt(said)}; is this the "
                                "address of an OpenAI-compatible /v1?", 0.0) from None
        if len(self._key) >= 16:        # a shorter one, such as EMPTY, is a word that a reply may well hold
            text = mask_key(text, self._key)
        counts = [count if isinstance(count, int) and 0 <= count < 2**31 else 0 for count in counts]
        return Completion(text, [], [], finish, *counts)

    def _post(self, body):
        """Return (status, Retry-After, text) of the server's answer to one request."""
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json", "User-Agent": "ml-agent"})
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        raw = bytearray()
        deadline = time.monotonic() + self.timeout_s        # the socket's own limit is for each piece of an answer
        try:
            with self._opener.open(request, timeout=self.timeout_s) as response:
                while part := response.read1(65536):
                    raw += part
                    if len(raw) > self.max_bytes:
                        raise OSError(f"more than {self.max_bytes} bytes")
                    if time.monotonic() > deadline:
                        raise TimeoutError("not complete in time")
        except (OSError, http.client.HTTPException) as error:
            raise EndpointError(f"{self.url} gave no answer ({self._excerpt(str(error))}; the limit is {self.timeout_s:g} "
                                "s); is the server running there, and is it overloaded?", 0.0) from None
        return response.status, response.headers.get("Retry-After", ""), raw.decode("utf-8", "replace")

    def _excerpt(self, said):
        """Return the beginning of what a server said, in printable ASCII and without the key."""
        text = " ".join(said[:4096].split())
        return ascii(mask_key(text, self._key)[:300])


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def parse(cls, argv=None, fill=None):
    """An instance of the dataclass `cls`, filled from the command line (`argv`, by default sys.argv[1:]).

    fill: a function of all settings, {name: value} as typed or by default, that gives [(where from, {name: value})]:
    settings that hold where none was typed, the first that has one. What they change is said on the error stream. What
    was typed holds, also where it is what the default would have been.

    A field reads `name: type = default  # help text`; comment lines below it, indented deeper, continue the text.
    Types: int, float, str, bool (--name / --no-name), X | None (the word `none`) and tuple[X, ...] (a comma list).
    --max-new-tokens and --max_new_tokens are one flag and --x=1 works. A name that does not exist (near ones are
    listed), a value of the wrong type or a ValueError of fill or the class's own __post_init__ ends the program with
    status 2.
    """
    about, name = {}, None  # field -> its trailing comment
    for line in inspect.getsource(cls).splitlines():
        if found := re.match(r"    (\w+)\s*:\s*\S.*?(?:  # (.*))?$", line):
            name, about[found[1]] = found[1], found[2] or ""
        elif name and (found := re.match(r"     +# ?(.*)", line)):
            about[name] += " " + found[1]
        else:
            name = None

    def convert(text, kind):
        inner = typing.get_args(kind)
        if typing.get_origin(kind) is tuple:
            return tuple(convert(word.strip(), inner[0]) for word in text.split(",") if word.strip())
        if inner:  # X | None
            return None if text.lower() == "none" else convert(text, inner[0])
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {kind.__name__}, found {text!r}") from None

    parser = argparse.ArgumentParser(description=sys.modules[cls.__module__].__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = typing.get_type_hints(cls)
    for one in dataclasses.fields(cls):
        kind, default = kinds[one.name], one.default
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        needed = default is dataclasses.MISSING
        text = (about.get(one.name, "") + (" (required)" if needed else f" (default: {shown})")).replace("%", "%%")
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        else:
            letters = re.findall("int|float|str", str(kind))[0].upper() + ",..." * (typing.get_origin(kind) is tuple)
            how = {"type": lambda text, kind=kind: convert(text, kind), "metavar": letters}
        parser.add_argument("--" + one.name.replace("_", "-"), required=needed, default=argparse.SUPPRESS, help=text,
                            **how)

    argv = [re.sub(r"^--[^=]+", lambda flag: flag[0].replace("_", "-"), word)
            for word in (sys.argv[1:] if argv is None else argv)]
    typed, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(flag, ["--" + name.replace("_", "-") for name in kinds], n=3)
        parser.error(f"there is no {flag}" + (f"; did you mean {' or '.join(near)}?" if near else "; see --help"))
    default = {one.name: one.default for one in dataclasses.fields(cls)}
    values = vars(typed)
    try:
        for source, more in fill({**default, **values}) if fill else ():
            new = {name: value for name, value in more.items() if name in default and name not in values}
            values.update(new)
            said = ", ".join(as_flag(name, value) for name, value in new.items() if value != default[name])
            if said:
                tell(f"{source}: {said}")
        return cls(**values)
    except ValueError as error:
        parser.error(str(error))


def tell(text):
    """Says something on the error stream; of several processes under torchrun the first one says it."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def as_flag(name, value):
    """A setting as one would type it."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {','.join(map(str, value)) if isinstance(value, tuple) else value}"


def preset(name, recipes):
    """What parse's fill gives for --preset NAME; recipes: {name: settings}. ValueError: there is no such one."""
    if name not in recipes:
        raise ValueError(f"there is no --preset {name}; there is {', '.join(recipes)}")
    return f"--preset {name}", recipes[name]


# ---------------------------------------------------------------------------------------------------------------------
# Loading what --model names, and the command line

def load(spec, dtype="auto", device="auto", rows=8, context=16384, kernels="torch", graphs=False,
         key="OPENAI_API_KEY"):
    """The Engine or Endpoint that a --model value names.

    spec: a folder, a hub id ("Qwen/Qwen2.5-7B-Instruct"), "tiny" (random weights, one token a byte: for trying things
    out), or "http://host:port/v1#name". device "auto": CUDA if there is one. dtype "auto": bfloat16 where the hardware
    multiplies it (CUDA, or a CPU with AMX), else float32. kernels: torch, or triton on CUDA. graphs: decode in CUDA
    graphs. key: the environment variable that holds a server's key. Raises ValueError for what cannot be loaded.
    """
    if is_server(spec):
        return Endpoint(spec, key=key)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        fast = device != "cpu" or torch.cpu.get_capabilities().get("amx_bf16", False)
        dtype = "bfloat16" if fast and spec != "tiny" else "float32"
    if dtype not in ("float64", "float32", "bfloat16"):
        raise ValueError(f"expected dtype auto, float64, float32 or bfloat16, found {dtype!r}")
    if graphs and not str(device).startswith("cuda"):
        raise ValueError(f"CUDA graphs need a CUDA device, found {device!r}; leave them off there")
    use_kernels(kernels, device)
    kind = getattr(torch, dtype)
    if spec == "tiny":
        tokenizer, model = Tokenizer.of_bytes(), Qwen2.from_scratch(Config.preset("tiny"), dtype=kind, device=device)
    else:
        folder = find_folder(spec)
        tokenizer, model = Tokenizer.from_pretrained(folder), Qwen2.from_pretrained(folder, kind, device)
    if tokenizer.size > model.config.vocab_size:
        raise ValueError(f"{spec}: the tokenizer has {tokenizer.size} ids and the model rows for "
                         f"{model.config.vocab_size}; they are not of one checkpoint")
    return Engine(model.requires_grad_(False), tokenizer, rows, context, name=str(spec), static=graphs)


@dataclass
class Settings:
    """Command line of sample.py."""
    prompt: str                         # what to say to the model
    model: str = "tiny"                 # a folder, a hub id, "tiny" (random weights), or http://host:port/v1#name
    system: str = ""                    # system message; empty: the checkpoint's own
    max_new_tokens: int = 256           # the longest reply, in tokens
    temperature: float = 0.7            # 0 always takes the most likely token
    top_p: float = 1.0                  # sample from the most likely tokens that together reach this probability
    top_k: int = 0                      # sample from this many most likely tokens; 0: all
    seed: int = 0                       # of the random numbers
    dtype: str = "auto"                 # auto, float32 or bfloat16
    device: str = "auto"                # auto, cpu or cuda
    kernels: str = "torch"              # torch, or triton, on CUDA: fused operations, not yet measured on a GPU
    graphs: bool = False                # decode in CUDA graphs, which nobody has run on a GPU yet


def main(s):
    start = time.perf_counter()
    policy = load(s.model, s.dtype, s.device, rows=1, kernels=s.kernels, graphs=s.graphs)
    options = {name: getattr(s, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k", "seed")}
    messages = [{"role": "system", "content": s.system}] * bool(s.system) + [{"role": "user", "content": s.prompt}]
    if isinstance(policy, Endpoint):
        print(policy.chat(messages, **options).text)
        return
    weight = policy.model.lm_head.weight
    print(f"{s.model}: {sum(p.numel() for p in policy.model.parameters()) / 1e6:,.0f}M parameters, "
          f"{str(weight.dtype).removeprefix('torch.')}, {weight.device}, loaded in {time.perf_counter() - start:.1f} s",
          file=sys.stderr)
    decoder, passes = codecs.getincrementaldecoder("utf-8")("replace"), []

    def show(piece):
        passes.append((policy.passes, time.perf_counter()))
        print(decoder.decode(piece), end="", flush=True)

    reply = policy.generate([messages], stream=show, **options)[0][0]
    print(decoder.decode(b"", final=True))
    if len(passes) > 1 and passes[-1][0] > passes[0][0]:
        seconds = passes[-1][1] - passes[0][1]
        print(f"{reply.prompt_tokens} prompt tokens, {len(reply.tokens)} sampled in {policy.passes} passes (drafted "
              f"{policy.drafted_tokens}, accepted {policy.accepted_tokens}), {(len(passes) - 1) / seconds:.1f} "
              "tokens/s after the first", file=sys.stderr)


if __name__ == "__main__":
    settings = parse(Settings)
    try:
        main(settings)
    except (ValueError, EndpointError) as error:
        sys.exit(f"sample.py: {error}")
