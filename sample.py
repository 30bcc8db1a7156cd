"""Sampling: an engine that decodes many conversations in one batch, which they join and leave at any token.

    python sample.py --model Qwen/Qwen2.5-0.5B-Instruct --prompt "Write a haiku about gradient descent."

    engine = load("Qwen/Qwen2.5-0.5B-Instruct")                     # or a folder, "tiny", "http://host:8000/v1#name"
    reply = engine.chat([{"role": "user", "content": "Hello"}])     # thread-safe; many threads share one batch
    groups = engine.generate(["1 + 1 =", "def f("], n=4)            # 4 samples of each prompt, one prefill each

The letters B, T, N, K, D, S, V, L are those of model.py; R is the number of rows of the cache.
"""
import itertools, math, queue, sys, threading, time
from collections import Counter, deque
from concurrent.futures import Future
from dataclasses import dataclass, field

import support  # noqa: F401  before torch

import numpy as np
import torch
import torch.nn.functional as F

from model import KERNELS, Config, Qwen2, use_kernels
from support import cpu_linear
from support.cli import ContextFull, ModelSettings, RunError, announce, parse
from support.distributed import SMALL_BELOW, choose_device, compute_type
from support.drafts import TOKEN_COST, PromptLookup, draft_lengths
from support.endpoint import Completion, Endpoint, address, find_stop, is_server
from support.files import is_text
from support.tokenizer import Tokenizer, open_checkpoint


# -- Key/value cache

class KVCache:
    """Keys and values of R conversations: two tensors (L, R, K, S_max, D), allocated as one. S_max is the next
    multiple of 64 above `length`. No token stands at its last position, where padding is written."""

    def __init__(self, config, rows, length, dtype, device):
        self.group = config.num_attention_heads // config.num_key_value_heads       # query heads that share a key
        self.padding = (length // SIGHT_STEP + 1) * SIGHT_STEP - 1
        shape = (2, config.num_hidden_layers, rows, config.num_key_value_heads, self.padding + 1, config.head_dim)
        # Zeros, not empty: a masked position has weight 0, and 0 times a stray NaN would still be NaN.
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.k, self.v = self.kv

    def copy(self, source, target, length):
        self.kv[:, :, target, :, :length] = self.kv[:, :, source, :, :length]

    def swap(self, a, b, length):
        kept = self.kv[:, :, a, :, :length].clone()
        self.copy(b, a, length)
        self.kv[:, :, b, :, :length] = kept


class ForwardBatch:
    """The tokens of one pass: row rows[i] of a cache goes on with counts[i] >= 1 tokens after its starts[i] tokens.

    The new tokens of all rows, N together, stand back to back. positions: (1, N), where each stands in its row, which
    it sees up to there. fresh: no row has anything cached, so the new tokens attend to each other alone, as in training
    (model.py: packed_attention), and `attend` is not needed.
    """
    def __init__(self, cache, rows, starts, counts):
        self.cache = cache
        self.counts = counts
        self.fresh = not any(starts)
        ends = list(itertools.accumulate(counts))
        begins = [0, *ends[:-1]]
        device = cache.k.device
        positions = np.arange(ends[-1]) + np.repeat(np.subtract(starts, begins), counts)
        self.positions = torch.from_numpy(positions)[None].to(device)
        self.rows = torch.from_numpy(np.repeat(rows, counts)).to(device)       # (N,)
        self.parts = []     # of the attention: (new tokens, their rows, the number S of positions they see, mask)
        if self.fresh:
            return
        # The first token of every row goes into one product, further ones of a row into one of its own.
        together = len(rows) > 1 and min(counts) == 1 and rows[-1] - rows[0] == len(rows) - 1
        if together:
            tokens = slice(None) if max(counts) == 1 else begins
            self.add_part(tokens, rows[0], rows[-1] + 1, max(starts) + 1)
        for row, start, begin, end in zip(rows, starts, begins, ends):
            if end - begin > 1 or not together:
                self.add_part(slice(begin, end), row, row + 1, start + end - begin)

    def add_part(self, tokens, first_row, end_row, S):
        if self.positions.device.type in FEW_SHAPES:
            S = math.ceil(S / SIGHT_STEP) * SIGHT_STEP
        positions = self.positions[0, tokens].view(end_row - first_row, -1)
        mask = KERNELS.attention_mask(positions, S, self.cache.group, self.cache.k.dtype)
        self.parts.append((tokens, slice(first_row, end_row), S, mask))

    def append(self, layer, k, v):
        """Stores this pass's keys and values, (N, K, D)."""
        self.cache.k[layer][self.rows, :, self.positions[0]] = k
        self.cache.v[layer][self.rows, :, self.positions[0]] = v

    def attend(self, layer, q):
        """Returns what the queries (N, H, D) find in the cache, (N, H, D)."""
        out = torch.empty_like(q)
        for tokens, rows, S, mask in self.parts:
            k = self.cache.k[layer, rows, :, :S]        # (B, K, S, D)
            v = self.cache.v[layer, rows, :, :S]
            y = KERNELS.attend(q[tokens].view(len(k), -1, *q.shape[1:]), k, v, mask)
            out[tokens] = y.view(-1, *q.shape[1:])
        return out


class DecodeGraph(ForwardBatch):
    """A pass of one shape, run again and again: the first B rows of a cache, each with T new tokens that see its first
    S positions. All it reads and writes are tensors that stay where they are, so that on CUDA a pass is one graph; on a
    CPU the same function runs as it stands.

    A token at the cache's last position is padding.
    """
    fresh = False

    def __init__(self, model, num_ids, cache, B, T, S, pool):
        self.model = model
        self.num_ids = num_ids
        self.cache = cache
        self.shape = B, T, S
        device = cache.k.device
        self.rows = torch.arange(B, device=device).repeat_interleave(T)
        self.tokens = torch.zeros(1, B * T, dtype=torch.int64, device=device)
        self.positions = torch.full((1, B * T), cache.padding, device=device)
        numbers = torch.zeros(4, B * T, dtype=torch.float64, device=device)
        self.temperature, self.uniform = numbers[:2]
        self.result = numbers[2:]       # tokens, log-probs
        self.graph = None
        if device.type == "cuda":
            self.compute()              # libraries set themselves up in a first call, which cannot be captured
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=pool):       # while all is padding: no live row is written
                self.compute()

    def compute(self):
        B, T, S = self.shape
        positions = torch.where(self.positions < self.cache.padding, self.positions, 0).view(B, T)
        mask = KERNELS.attention_mask(positions, S, self.cache.group, self.cache.k.dtype)
        self.parts = [(slice(None), slice(0, B), S, mask)]
        sampled, logps = next_tokens(self.model, self, self.num_ids, self.tokens, self.temperature, self.uniform)
        self.result.copy_(torch.stack((sampled.double(), logps.double())))

    def run(self, tokens, starts, temperature, uniform):
        """Returns for each row [(token, logp)], one after each of its tokens. Rows may be fewer than B, tokens than T.
        tokens: a list for each row, which goes on after its first `starts` positions."""
        B, T, _ = self.shape
        positions = [range(start, start + len(new)) for start, new in zip(starts, tokens)]
        self.tokens.copy_(padded(tokens, B, T, 0))
        self.positions.copy_(padded(positions, B, T, self.cache.padding))
        self.temperature.copy_(padded([[t] * T for t in temperature], B, T, 0.0))
        self.uniform.copy_(padded(uniform, B, T, 0.0))
        if self.graph:
            self.graph.replay()
        else:
            self.compute()
        sampled, logps = self.result.view(2, B, T).tolist()             # the only wait for the device
        return [[(int(token), logp) for token, logp in zip(sampled[row], logps[row])][:len(new)]
                for row, new in enumerate(tokens)]


def padded(rows, B, T, padding):
    """Returns at most B rows of at most T numbers as (B * T,), filled up with padding."""
    array = np.full((B, T), padding)
    for row, values in enumerate(rows):
        array[row, :len(values)] = values
    return torch.from_numpy(array).flatten()


GRAPH_TOKENS = 256          # of one pass, padding included; beyond it padding costs more than launching does
SHORTEST_SIGHT = 256        # positions that a graph's tokens see at least, so that there are few graphs
# On these devices the number S of positions that a pass sees grows in steps: there a kernel is chosen for each new
# shape, and a mask of odd width is copied in every layer.
FEW_SHAPES = ("cuda",)
SIGHT_STEP = 64


# -- Sampling a token

def next_tokens(model, batch, num_ids, tokens, temperature, uniform):
    """Returns what is sampled after each of the batch's tokens (1, N), and its log-probs, both (N,)."""
    # As in training, for equal log-probs: rows of the vocabulary that stand for no token are left out, and logits
    # become fp32 before they are divided by the temperature.
    logits = model(tokens, batch)[0, :, :num_ids].float()
    return sample_tokens(logits, temperature, uniform)


def sample_tokens(logits, temperature, uniform):
    """Returns one token for each row, (N,) int64, and its log-prob under softmax(logits / temperature), (N,) fp32.

    logits: (N, V) fp32. uniform: (N,) float64 in [0, 1), at which the token is the inverse CDF. temperature: (N,)
    float64; 0 takes the most likely token and reports its log-prob at temperature 1. None: it is 0 in every row.
    """
    likeliest = logits.argmax(-1)
    if temperature is None:
        return likeliest, logits.log_softmax(-1).gather(1, likeliest[:, None])[:, 0]
    greedy = temperature == 0
    logp = F.log_softmax(logits / torch.where(greedy, 1.0, temperature).float()[:, None], dim=-1)
    cdf = logp.exp().cumsum(-1, dtype=torch.float64)
    drawn = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    tokens = torch.where(greedy, likeliest, drawn)
    return tokens, logp.gather(1, tokens[:, None])[:, 0]


# -- Engine

@dataclass
class Request:
    """A reply being sampled."""
    prompt: np.ndarray          # (P,) int64
    max_new_tokens: int
    temperature: float
    stop: list                  # of bytes
    uniform: np.ndarray         # (max_new_tokens,): all its random numbers, so batching cannot change them
    future: Future = field(default_factory=Future)
    tokens: list = field(default_factory=list)
    logps: list = field(default_factory=list)
    text: bytearray = field(default_factory=bytearray)
    cached: int = 0
    lookup: PromptLookup = None         # None without drafting
    started: float = field(default_factory=time.perf_counter)


class Engine:
    """Samples many conversations at once from one model. Any thread may call chat, generate and submit.

    All happens in `step`, again and again: waiting requests get rows, their prompts are computed, and one pass gives
    every row its next tokens.

    rows: conversations in the cache, which is also the largest batch. A finished row keeps its keys and values: a
    prompt that begins with the same tokens reuses them. context: tokens of one conversation. draft: check several
    tokens, guessed from the text, in one pass. fixed_shapes: decode by DecodeGraph. Neither changes what is sampled.

    For chat and submit a thread runs the model, and ends when nobody has asked for IDLE_S. While there is none,
    generate runs it in the caller's: a quarter faster for a large model on a CPU, with one pool of OpenMP threads.
    """

    def __init__(self, model, tokenizer, rows=8, context=16384, name="engine", draft=True, fixed_shapes=False):
        weight = model.lm_head.weight
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.rows = rows
        self.context = min(context, model.config.max_position_embeddings)
        if self.context < context:
            announce(f"{name} is made for {self.context} tokens, not for a context of {context}, which is cut")
        self.device = weight.device
        self.draft = draft
        self.fixed_shapes = fixed_shapes
        self.graphs = {}        # {shape: DecodeGraph}, kept while weights are changed in place
        self.pool = torch.cuda.graph_pool_handle() if fixed_shapes and self.device.type == "cuda" else None
        dtype = model.compute_dtype or weight.dtype       # of what is computed and cached
        self.packs = weight.dtype is dtype and cpu_linear.pays(model)
        # A small model takes one OpenMP thread, as in support.distributed.row_threads.
        is_small = self.device.type == "cpu" and sum(p.numel() for p in model.parameters()) < SMALL_BELOW
        self.num_threads = 1 if is_small else torch.get_num_threads()
        self.cache = KVCache(model.config, rows, self.context, dtype, self.device)
        # Rows 0 .. len(active) - 1 are being sampled; the others are parked, their cached tokens waiting for reuse.
        self.active = []
        self.tokens = np.zeros((rows, self.context), int)       # what each row's cache holds
        self.waiting = deque()
        self.wake = threading.Condition()       # guards active and waiting
        self.turn = threading.Lock()            # held by who runs the model
        self.thread = None
        self.sampled_tokens = self.prefilled_tokens = 0
        self.passes = self.drafted_tokens = self.accepted_tokens = 0
        self.refresh()

    def forget(self):
        """Drops every cached token, which must not be while replies are being sampled."""
        self.lengths = [0] * self.rows      # tokens that each row's cache holds
        self.used = [0] * self.rows         # when each was parked last

    def refresh(self):
        """To be called when weights have changed."""
        self.forget()
        self.guess_counts = [[1, 2] for _ in range(PromptLookup.LONGEST + 1)]
        if self.packs:
            cpu_linear.pack(self.model)

    # -- what callers use

    def chat(self, messages, **options):
        """Returns the Completion of a conversation. See submit for the options."""
        return self.submit(messages, **options).result()

    def generate(self, prompts, n=1, seed=0, on_completion=None, **options):
        """Returns a list of n Completions for each prompt. See submit for the options.

        Sample j of prompt i draws from seed + i * n + j. on_completion(i, j, completion) is called in the caller's
        thread as soon as that sample is done.
        """
        repeated = [prompt for prompt in prompts for _ in range(n)]
        requests = [self._request(prompt, seed=seed + i, **options) for i, prompt in enumerate(repeated)]
        futures = [request.future for request in requests]
        done = queue.SimpleQueue()
        for future in futures:
            future.add_done_callback(done.put)
        with self.wake:     # the engine sees all or none, so that a run can be repeated exactly
            self.waiting.extend(requests)
            self.wake.notify()
        for _ in futures:
            while self.thread is None and done.empty():
                self._advance()
            future = done.get()
            completion = future.result()
            if on_completion:
                on_completion(*divmod(futures.index(future), n), completion)
        completions = [future.result() for future in futures]
        return [completions[i:i + n] for i in range(0, len(completions), n)]

    def submit(self, prompt, **options):
        """Queues one reply to a prompt (a text, a list of ids, or a conversation), and returns a Future of its
        Completion. Options: max_new_tokens, temperature, stop (strings), seed. ContextFull: the reply may not fit."""
        request = self._request(prompt, **options)
        with self.wake:
            self.waiting.append(request)
            if self.thread is None:
                self.thread = threading.Thread(target=self._serve, daemon=True)
                self.thread.start()
            self.wake.notify()
        return request.future

    def _request(self, prompt, max_new_tokens=1024, temperature=1.0, top_p=1.0, stop=(), seed=0):
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if ids and isinstance(ids[0], dict):
            ids = self.tokenizer.chat(ids)
        if not (ids and max_new_tokens >= 1 and (temperature == 0 or temperature > 1e-30) and top_p == 1):
            raise ValueError("expected a prompt, max_new_tokens >= 1, temperature >= 0, and a top_p of 1, as training "
                             f"has; found {len(ids)} prompt tokens, {max_new_tokens}, {temperature} and {top_p}")
        if len(ids) + max_new_tokens > self.context:
            raise ContextFull(f"{len(ids)} prompt tokens and {max_new_tokens} new ones exceed the context of "
                              f"{self.context}; shorten the prompt, or give the engine a larger context")
        stop = [stop] if isinstance(stop, str) else stop
        uniform = torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        request = Request(np.array(ids), max_new_tokens, temperature, [text.encode() for text in stop if text],
                          uniform.numpy())
        request.future.set_running_or_notify_cancel()       # one that was cancelled could not be given its reply
        return request

    # -- what runs the model

    def _serve(self):
        while True:
            with self.wake:
                if not self.wake.wait_for(lambda: self.active or self.waiting, IDLE_S):
                    self.thread = None      # else an engine that nobody uses any more would keep its memory
                    return
            self._advance()

    def _advance(self):
        """Makes one step if there is anything to do. What it raises is handed to all who wait for a reply."""
        with self.turn, torch.no_grad():        # not inference_mode: it would break later training of the same module
            num_threads = torch.get_num_threads()       # of OpenMP, each Python thread's own
            torch.set_num_threads(self.num_threads)
            try:
                if self.active or self.waiting:
                    self.step()
            except BaseException as error:      # also Ctrl-C, which may come while a row is half written
                with self.wake:
                    failed = [*self.active, *self.waiting]
                    self.active = []
                    self.waiting.clear()
                    self.forget()
                for request in failed:
                    request.future.set_exception(error)
                if not isinstance(error, Exception):
                    raise
            finally:
                torch.set_num_threads(num_threads)

    def step(self):
        """Runs one pass: every active row gets a token, and with it those of its draft that prove right. Each position
        has its own random number, with a draft and without: so the tokens are those of plain decoding."""
        # 1. New requests get rows, and their prompts come into the cache.
        self.schedule()
        # 2. One pass over each row's last token and its draft.
        drafts = self.propose_drafts()
        replies = self.forward(drafts)
        self.passes += 1
        self.drafted_tokens += sum(map(len, drafts))
        # 3. Each row takes its tokens up to the first that ends the reply or differs from the draft.
        finished = []
        for row, (request, draft, reply) in enumerate(zip(self.active, drafts, replies)):
            for i, (token, logp) in enumerate(reply):
                if not math.isfinite(logp):
                    raise RunError(f"{self.name} gives logits that are not finite; its weights are damaged")
                self.lengths[row] += 1
                completion = self.append_token(request, token, logp)
                if completion or (i < len(draft) and token != draft[i]):
                    break
            self.sampled_tokens += i + 1
            self.accepted_tokens += i
            if completion:
                finished.append((row, request.future, completion))
        # 4. Finished rows are parked, and only then handed over, so that who waits for a reply finds its row free.
        for row, _, _ in reversed(finished):
            self.release_row(row)
        for _, future, completion in finished:
            future.set_result(completion)

    def propose_drafts(self):
        """Returns for each active row the tokens to try after its last."""
        if not self.draft:
            return [[]] * len(self.active)
        probs = [request.lookup.accept_prob() for request in self.active]
        lengths = draft_lengths(probs, TOKEN_COST[self.device.type])
        left = [request.max_new_tokens - len(request.tokens) - 1 for request in self.active]
        return [request.lookup.guess(min(k, most)) for request, k, most in zip(self.active, lengths, left)]

    def decode_graph(self, drafts):
        """Returns the DecodeGraph for the active rows, or None where the pass is run as it stands."""
        B = min(round_up(len(drafts)), self.rows)
        T = round_up(1 + max(map(len, drafts)))
        if not self.fixed_shapes or B * T > GRAPH_TOKENS:
            return None
        longest = max(self.lengths[:len(drafts)])
        S = min(max(SHORTEST_SIGHT, round_up(longest + T)), self.cache.padding + 1)
        shape = B, T, S
        if shape not in self.graphs:
            self.graphs[shape] = DecodeGraph(self.model, self.tokenizer.size, self.cache, *shape, self.pool)
        return self.graphs[shape]

    def forward(self, drafts):
        """Returns for each active row [(token, logp)] after its last token and each of its draft."""
        counts = [1 + len(draft) for draft in drafts]
        newest = [(request.tokens or request.prompt)[-1] for request in self.active]
        tokens = [[token, *draft] for token, draft in zip(newest, drafts)]         # no pass has seen them yet
        starts = self.lengths[:len(tokens)]
        temperature = [request.temperature for request in self.active]
        uniform = [request.uniform[len(request.tokens):][:count] for request, count in zip(self.active, counts)]
        graph = self.decode_graph(drafts)
        if graph:
            return graph.run(tokens, starts, temperature, uniform)
        batch = ForwardBatch(self.cache, range(len(tokens)), starts, counts)
        arrays = np.concatenate(tokens)[None], np.repeat(temperature, counts).astype(float), np.concatenate(uniform)
        inputs = [torch.from_numpy(array).to(self.device) for array in arrays]
        if not any(temperature):
            inputs[1] = None
        sampled, logps = next_tokens(self.model, batch, self.tokenizer.size, *inputs)
        pairs = zip(sampled.tolist(), logps.tolist())
        return [list(itertools.islice(pairs, count)) for count in counts]

    def schedule(self):
        """Gives free rows to waiting requests, and brings their prompts but for the last token into the cache."""
        # 1. Requests get rows.
        with self.wake:
            ready = len(self.active)
            while self.waiting and len(self.active) < self.rows:
                self.active.append(self.waiting.popleft())
        while ready < len(self.active):
            # 2. The tokens of each row that a prompt may reuse: of an active row, those of its own prompt.
            known = [len(request.prompt) - 1 for request in self.active[:ready]] + self.lengths[ready:]
            row = ready
            later = []
            for request in self.active[ready:]:
                # 3. The row that shares most with the prompt, unless one of this round will share more.
                equal = self.tokens[:, :len(request.prompt) - 1] == request.prompt[:-1]
                same = np.logical_and.accumulate(equal, axis=1).sum(1)      # (R,)
                shared = np.minimum(same, known)
                source = int(shared.argmax())
                if same[ready:row].max(initial=0) > shared[source] + FEW_TOKENS:
                    later.append(request)
                    continue
                self.assign_row(request, row, source, int(shared[source]))
                known[row:] = self.lengths[row:]
                self.active[row] = request
                row += 1
            # 4. This round is computed at once. Who waited for it copies from it in the next one.
            self.active[row:] = later
            self.prefill(range(ready, row))
            ready = row

    def assign_row(self, request, row, source, reused):
        """Makes `row` begin with the request's first `reused` tokens, which the row `source` holds."""
        # 1. Take over a parked source that holds this conversation's last turn, or another reply to its prompt. Else
        #    copy what is shared, best to an empty row.
        P = len(request.prompt) - 1
        parked = range(row, self.rows)
        home = min(parked, key=lambda r: (self.lengths[r] > 0, self.used[r]))
        is_next_turn = reused + FEW_TOKENS >= self.lengths[source]
        is_same_prompt = reused == P and self.lengths[home] > 0
        if source in parked and (is_next_turn or is_same_prompt):
            home = source
        else:
            self.cache.copy(source, home, reused)
            self.lengths[home] = reused         # before the swap, so that what was copied moves with the row
        # 2. Bring it to its place.
        self.swap_rows(home, row)
        self.lengths[row] = reused
        self.tokens[row, :P] = request.prompt[:P]
        request.cached = reused
        if self.draft:
            request.lookup = PromptLookup(request.prompt, self.guess_counts)
        self.prefilled_tokens += P - reused

    def prefill(self, rows):
        """Computes what the cache lacks of the prompts in these rows."""
        missing = [(row, pos) for row in rows for pos in range(self.lengths[row], len(self.active[row].prompt) - 1)]
        for begin in range(0, len(missing), PREFILL_TOKENS):
            part = missing[begin:begin + PREFILL_TOKENS]
            counts = Counter(row for row, _ in part)
            starts = [self.lengths[row] for row in counts]
            batch = ForwardBatch(self.cache, list(counts), starts, list(counts.values()))
            tokens = torch.tensor([[self.tokens[row, pos] for row, pos in part]], device=self.device)
            self.model.hidden_states(tokens, batch)
            for row, count in counts.items():
                self.lengths[row] += count

    def append_token(self, request, token, logp):
        """Adds a sampled token to its reply. Returns the Completion where that ends it, and else None."""
        request.tokens.append(token)
        request.logps.append(logp)
        if request.lookup:
            request.lookup.add(token)
        ended = token in self.tokenizer.eos
        piece = b"" if ended else self.tokenizer.bytes[token]
        request.text += piece
        cut = find_stop(request.text, request.stop, len(piece))
        stopped = ended or cut is not None
        if not stopped and len(request.tokens) < request.max_new_tokens:
            return None
        return Completion(bytes(request.text[:cut]).decode("utf-8", "replace"), request.tokens, request.logps,
                          "stop" if stopped else "length", len(request.prompt), request.cached,
                          time.perf_counter() - request.started)

    def release_row(self, row):
        """Takes a finished row out of the batch, and keeps what it has cached."""
        request = self.active[row]
        last = len(self.active) - 1
        P = len(request.prompt) - 1
        self.tokens[row, P:self.lengths[row]] = [request.prompt[-1], *request.tokens[:-1]]  # the last was never fed
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


def round_up(n):
    """Returns the next power of two."""
    return 1 << (n - 1).bit_length()


IDLE_S = 10                 # seconds without a request, after which the thread of an engine ends
PREFILL_TOKENS = 512        # of prompts in one pass: bounds the memory of a long prompt's activations and mask
FEW_TOKENS = 16             # a prefix that is so much longer is not worth a wait or a copy


# -- Loading what --model names, and the command line

def load(spec, dtype="auto", device="auto", rows=8, context=16384, kernels="torch", graphs=False,
         key=None, timeout_s=600.0):
    """Returns the Engine or Endpoint that a --model value names (Settings.model). ValueError: it cannot be loaded.

    device, dtype, kernels: as in support.cli.ModelSettings. key, timeout_s: of a server, see Endpoint. The others: of
    an engine, see Engine; graphs are its fixed_shapes, captured on CUDA.
    """
    if is_server(spec):
        return Endpoint(spec, key, timeout_s)
    device = choose_device(device)
    if graphs and device.type != "cuda":
        raise ValueError(f"CUDA graphs need a CUDA device, found {device.type!r}; leave them off there")
    use_kernels(kernels, device)
    if spec == "tiny":
        config = Config.preset("tiny")
        tokenizer = Tokenizer.of_bytes()
        model = Qwen2.from_scratch(config, dtype=compute_type(dtype, device, config), device=device)
    else:
        folder, config, tokenizer = open_checkpoint(spec)
        model = Qwen2.from_pretrained(folder, compute_type(dtype, device, config), device)
    return Engine(model.requires_grad_(False), tokenizer, rows, context, name=str(spec), fixed_shapes=graphs)


@dataclass(kw_only=True)
class Settings(ModelSettings):
    """Command line of sample.py."""
    prompt: str                         # what to say to the model
    model: str = "tiny"                 # a folder, a hub id, "tiny" (random weights), or http://host:port/v1#name
    max_new_tokens: int = 256           # the longest reply, in tokens
    temperature: float = 0.7            # 0 always takes the most likely token
    graphs: bool = False                # decode in CUDA graphs, which nobody has run on a GPU yet

    def __post_init__(self):
        super().__post_init__()
        if not is_text(self.prompt):
            raise ValueError("--prompt must be valid UTF-8")
        if is_server(self.model):
            address(self.model)     # refuses a key in it before it is printed


def main(cfg):
    policy = load(cfg.model, cfg.dtype, cfg.device, rows=1, kernels=cfg.kernels, graphs=cfg.graphs)
    messages = [{"role": "user", "content": cfg.prompt}]
    options = dict(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, seed=cfg.seed)
    is_engine = isinstance(policy, Engine)
    # An engine runs in this thread: that is faster, and Ctrl-C ends it.
    reply = policy.generate([messages], **options)[0][0] if is_engine else policy.chat(messages, **options)
    print(reply.text or reply.no_reply)
    if is_engine:
        print(f"{reply.prompt_tokens} prompt tokens, {len(reply.tokens)} sampled in {policy.passes} passes and "
              f"{reply.seconds:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    settings = parse(Settings)
    try:
        main(settings)
    except (ValueError, RunError, OSError) as error:
        sys.exit(f"sample.py: {error}")
