"""Figures of speed and memory, each beside a named peer in the same run and the physical limit.

    python tests/bench.py decode --model DIR [--json FILE]      # sampling, against transformers' generate
    python tests/bench.py prefill --model DIR                   # reading one prompt for one reply, and for eight
    python tests/bench.py edit --model DIR                      # replies that copy from their prompts, with drafts
    python tests/bench.py load --model DIR                      # reading a checkpoint, against transformers
    python tests/bench.py sft --model DIR                       # fine-tuning, against transformers with its own loss
    python tests/bench.py update                                # PPO's update: states shared, packed, in transformers
    python tests/bench.py busy                                  # the miniature alone and beside a busy program
    python tests/bench.py rl --repeats 5                        # PPO: step-wise against episode-wise
    python tests/bench.py kernels                               # on a GPU: Triton's against torch, eager and compiled
    python tests/bench.py sandbox --repeats 50                  # running a script, against a bare subprocess
    python tests/bench.py gpu --json FILE                       # all that needs a GPU, in eight minutes

Ours and the peer's runs alternate and the medians are compared, so that a busy machine slows both. transformers is
optional: without it only our figures and the share of the limit are printed.
"""
import functools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if "--dry" in sys.argv:
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}     # read when triton and torch are imported

import tasks
from support.cli import parse
from support.sandbox import execute, protection
from sample import load     # sets how threads wait, so it comes before torch

import torch

import model
from model import IGNORE, Config, LinearLogProb, rotary
from support import cpu_linear, distributed, logs, sampling
from support.pretrained import find_folder
from support.tokenizer import Tokenizer

try:
    import transformers
except ImportError:
    transformers = None


@dataclass
class Settings:
    """Command line of bench.py, after the names of the measurements."""
    model: str = "tiny"             # checkpoint folder; tiny: random weights, without a peer
    json: str = ""                  # also write the figures to this file
    batches: tuple[int, ...] = (1, 8)   # rows sampled together
    new_tokens: int = 48            # sampled for each row
    longest_state: int = 4000       # that update measures
    repeats: int = 3                # runs of each; the median counts
    dtype: str = "float32"          # float32 or bfloat16, ours and the peer's
    device: str = "auto"            # auto, cpu or cuda
    kernels: str = "torch"          # torch, or triton on CUDA
    graphs: bool = False            # decode in CUDA graphs
    script_seconds: float = 1.0     # that a task's script takes, in rl
    dry: bool = False               # gpu: tiny shapes on a CPU, which tries the code
    seconds: float = 440            # of gpu, after which no further part begins


PROMPT_TOKENS = 32      # of each row's prompt that decode reads
STATE_TOKENS = 1000     # of the prompt that prefill reads
TRAIN_TOKENS = 1024     # of the packed row that is trained on


def alternate(runs, repeats, warm=True):
    """Median seconds of each callable of {name: callable}, run in turns, after one warm-up of each where warm."""
    seconds = {name: [] for name in runs}
    for i in range(repeats + warm):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if i or not warm:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def read_bandwidth(device="cpu", num_bytes=2**28):
    """Bytes a second at which this device reads its memory: the best of five sums over a large tensor."""
    x = torch.ones(num_bytes // 4, device=device)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        x.sum().item()
        best = max(best, x.nbytes / (time.perf_counter() - start))
    return best


def streamed_bytes(net):
    """Bytes of weights that a decoding step of one row reads: every matrix product's, in the form it is read in."""
    total = 0
    for layer in net.modules():
        if isinstance(layer, model.Linear):
            *_, product = getattr(layer.forward, "args", [None])        # of cpu_linear.packed_forward
            is_halved = getattr(product, "func", None) is cpu_linear.fp16_product
            total += layer.weight.nbytes // (2 if is_halved else 1)
    return total


def open_engine(s, rows, context):
    return load(s.model, s.dtype, s.device, rows, context, s.kernels, s.graphs)


def open_peer(s, device):
    """The same checkpoint in transformers, set to sample as many tokens as it is asked for; None without it."""
    if not transformers or s.model == "tiny":
        return None
    peer = transformers.AutoModelForCausalLM.from_pretrained(s.model, dtype=getattr(torch, s.dtype)).to(device).eval()
    peer.generation_config.eos_token_id = None
    return peer


def ask_peer(peer, prompts, new_tokens, **options):
    """Its greedy replies to prompts of equal length, as lists of ids."""
    ids = torch.tensor(prompts, device=peer.device)
    return peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
                         repetition_penalty=1.0, pad_token_id=0, **options)[:, ids.shape[1]:].tolist()


def random_prompts(engine, num, length):
    return torch.randint(1000 if engine.tokenizer.size > 1000 else 256, (num, length),
                         generator=torch.Generator().manual_seed(num)).tolist()


def decode(s):
    """Greedy tokens/s of whole calls, prompt included: Engine.generate without drafts against generate of
    transformers."""
    engine = open_engine(s, rows=max(s.batches), context=PROMPT_TOKENS + s.new_tokens)
    engine.tokenizer.eos = set()            # every row samples new_tokens
    engine.draft = False
    limit = read_bandwidth(engine.device) / streamed_bytes(engine.model)       # decoding steps a second
    whole = sum(m.weight.nbytes for m in engine.model.modules() if isinstance(m, model.Linear)) / streamed_bytes(
        engine.model)           # of fp32 weights half the bytes may be read: support/cpu_linear.py
    peer = open_peer(s, engine.device)
    for B in s.batches:
        prompts = random_prompts(engine, B, PROMPT_TOKENS)

        def ours():
            engine.forget()                 # no prefix cached by an earlier run
            return [g[0].tokens for g in engine.generate(prompts, max_new_tokens=s.new_tokens, temperature=0)]

        def theirs():
            return ask_peer(peer, prompts, s.new_tokens)

        figures = {"batch": B}
        if peer:
            figures["same tokens"] = ours() == theirs()
        seconds = alternate({"ours": ours, **({"transformers": theirs} if peer else {})}, s.repeats)
        rate = {name: B * s.new_tokens / t for name, t in seconds.items()}
        figures |= {f"{name} tokens/s": r for name, r in rate.items()}
        if peer:
            figures["ratio"] = rate["ours"] / rate["transformers"]
        figures |= {"limit tokens/s": B * limit, "share of read bandwidth": rate["ours"] / (B * limit),
                    "if all weights were read as they are": rate["ours"] / (B * limit) * whole}
        yield figures


def prefill(s):
    """Seconds to the first token of one reply to a long prompt, and of eight; limit: its products at the machine's best
    rate."""
    engine = open_engine(s, rows=8, context=STATE_TOKENS + 1)
    prompts = random_prompts(engine, 1, STATE_TOKENS)
    peer = open_peer(s, engine.device)

    def ours(n):
        engine.forget()
        engine.generate(prompts, n=n, max_new_tokens=1, temperature=0)

    a = torch.ones(2048, 2048, dtype=engine.model.lm_head.weight.dtype, device=engine.device)
    runs = {"1 reply": lambda: ours(1), "8 replies": lambda: ours(8), "product": lambda: (a @ a)[0, 0].item()}
    if peer:
        runs["transformers"] = lambda: ask_peer(peer, prompts, 1)
    seconds = alternate(runs, s.repeats)
    layers = sum(p.numel() for p in engine.model.model.layers.parameters())
    limit = STATE_TOKENS * 2 * layers * seconds["product"] / (2 * 2048 ** 3)
    yield {"prompt tokens": STATE_TOKENS, **{f"{name} s": t for name, t in seconds.items() if name != "product"},
           "8 over 1": seconds["8 replies"] / seconds["1 reply"],
           **({"ratio": seconds["transformers"] / seconds["1 reply"]} if peer else {}),
           "limit s": limit, "share of the limit": limit / seconds["1 reply"]}


SCRIPT = """This is the Python script train.py:
```python
{script}
```

Change it as follows, and nothing else:
{idea}

"""
WHOLE = "Answer with the whole changed script in one ```python block."
REPLACE = """Answer with one line of JSON, {"script_name": "train.py", "find": ..., "replace": ...}, in which "find" \
is a text that occurs once in the script and "replace" is what shall stand in its place."""
NOTHING = "Write a long story about {}."
THEMES = ("a fox who learns to sail", "the last keeper of a lighthouse", "a city under the ice",
          "two clocks that disagree", "a maker of violins", "the first umbrella", "a letter that came too late",
          "the gardener and the moon")


def edit(s):
    """Decoding with drafts against decoding without, prompts already read, at 1, 2, 4 and 8 rows: scripts of the tasks
    that are to be changed, returned whole or as a Replace action (greedy), and stories, which copy nothing (sampled).
    At one row the two kinds of edit are also shown apart, each beside transformers with its own prompt lookup, whole
    calls, ours as well."""
    folder = Path(__file__).resolve().parent.parent / "tasks"
    edits = []
    for file in sorted(folder.glob("*/ideas.json"), key=lambda f: len((f.parent / "train.py").read_text())):
        idea = json.loads(file.read_text())[0]["instruction"]
        text = SCRIPT.format(script=(file.parent / "train.py").read_text(), idea=idea)
        edits += [[{"role": "user", "content": text + (WHOLE if len(edits) % 2 == 0 else REPLACE)}]]
    stories = [[{"role": "user", "content": NOTHING.format(theme)}] for theme in THEMES]
    engine = open_engine(s, rows=8, context=4096)
    peer = open_peer(s, engine.device)
    for name, prompts, options in (("edits", edits, dict(temperature=0, max_new_tokens=96, stop="\n```\n")),
                                   ("stories", stories, dict(temperature=1, max_new_tokens=s.new_tokens))):
        for B in (1, 2, 4, 8):
            chosen = prompts[:max(4, B)]
            replies = {}
            passes = {}
            parts = [chosen[i:i + B] for i in range(0, len(chosen), B)]

            def run(draft, i):
                engine.draft = draft
                before = engine.passes
                replies[draft, i] = [g[0].tokens for g in engine.generate(parts[i], seed=i, **options)]
                passes[draft, i] = engine.passes - before

            engine.generate(chosen, **{**options, "max_new_tokens": 1})         # reads the prompts
            seconds = alternate({(draft, i): functools.partial(run, draft, i) for i in range(len(parts))
                                 for draft in (False, True)}, max(1, s.repeats // 2), warm=False)

            def compared(chosen_parts):
                plain, drafts = (sum(seconds[draft, i] for i in chosen_parts) for draft in (False, True))
                tokens = sum(len(reply) for i in chosen_parts for reply in replies[True, i])
                return {"same tokens": all(replies[True, i] == replies[False, i] for i in chosen_parts),
                        "plain tokens/s": tokens / plain, "drafts tokens/s": tokens / drafts,
                        "drafts over plain": plain / drafts,
                        "tokens a pass": tokens / B / sum(passes[True, i] for i in chosen_parts)}

            yield {"text": name, "batch": B, **compared(range(len(parts)))}
            for i in range(2) if B == 1 and name == "edits" else ():
                figures = {"text": ("whole scripts", "Replace actions")[i], "batch": 1,
                           **compared(range(i, len(parts), 2))}
                if peer:
                    def ours():
                        engine.forget()
                        run(True, i)

                    ids = engine.tokenizer.chat(chosen[i])
                    size = len(replies[True, i][0])
                    whole = alternate({"ours": ours, "transformers": lambda: ask_peer(
                        peer, [ids], size, prompt_lookup_num_tokens=10)}, 1, warm=False)
                    figures |= {"transformers' lookup tokens/s": size / whole["transformers"],
                                "ratio": whole["transformers"] / whole["ours"]}
                yield figures


def in_new_process(call):
    """What a call of a function of this file gives in a process of its own, which returns freed memory at once."""
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000",
           "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run([sys.executable, "-c", f"import json, bench; print(json.dumps(bench.{call}))"],
                         capture_output=True, text=True, check=True, env=env)
    return json.loads(run.stdout.splitlines()[-1])


def grown(run):
    """How far the resident set of this process grows above what it is now while `run` runs, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")       # the peak begins anew
    before = peak_resident()
    run()
    return peak_resident() - before


def peak_resident():
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def load_once(folder, dtype, loader):
    """(seconds, growth of the resident set over the weights' size) of loading a checkpoint."""
    opened = []
    start = time.perf_counter()
    cls = model.Qwen2 if loader == "ours" else transformers.AutoModelForCausalLM
    size = grown(lambda: opened.append(cls.from_pretrained(folder, dtype=getattr(torch, dtype))))
    return time.perf_counter() - start, size / sum(p.nbytes for p in opened[0].parameters())


def load_checkpoint(s):
    """Seconds and peak memory of loading on the CPU, see load_once."""
    for loader in ("ours", "transformers"):
        if s.model == "tiny" or loader == "transformers" and not transformers:
            continue
        call = f"load_once({s.model!r}, {s.dtype!r}, {loader!r})"
        seconds, peaks = zip(*(in_new_process(call) for _ in range(s.repeats)))
        yield {"loader": loader, "seconds": statistics.median(seconds), "peak over weights": statistics.median(peaks)}


def kernel_cases(c, tokens, rows, length, dtype, device):
    """What `kernels` measures, with model.use_kernels for the log-probs: (name, function of the operations' module and
    the inputs, inputs, with gradients, bytes or FLOPs that it cannot do without, "GB/s" or "TFLOP/s", function of the
    inputs for torch.compile where another than the first is its best). c: Config; tokens of a training row, rows and
    cached positions of a decoding step."""
    import fused

    def new(*shape):
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    def log_probs(ops, x, weight):
        return LinearLogProb.apply(x, weight, targets, 1.0, c.vocab_size, max(64, 2**27 // tokens))[:2]

    def simple(x, weight):
        logq = (x @ weight.T).float().log_softmax(-1)
        return logq.gather(1, targets[:, None])[:, 0], -(logq.exp() * logq).sum(-1)

    N = tokens
    C = c.hidden_size
    F = c.intermediate_size
    V = c.vocab_size
    D = c.head_dim
    size = dtype.itemsize
    H = c.num_attention_heads
    K = c.num_key_value_heads
    targets = torch.randint(c.vocab_size, (tokens,), device=device)
    angles = rotary(torch.arange(N, device=device)[None], D, c.rope_theta)
    norm = lambda ops, x, w: ops.norm(x, w, 1e-6)
    add_norm = lambda ops, x, y, w: ops.add_norm(x, y, w, 1e-6)
    rope = lambda ops, q, k: ops.rope(q, k, *angles)
    swiglu = lambda ops, gate, up: ops.swiglu(gate, up)
    x = new(1, N, C)
    y = new(1, N, C)
    w = new(C)
    gate = new(1, N, F)
    up = new(1, N, F)
    q = new(1, N, H, D)
    k = new(1, N, K, D)
    for grad, name in ((False, ""), (True, " and gradients")):
        yield "norm" + name, norm, (x, w), grad, size * N * C * (5 if grad else 2), "GB/s", None
        yield "add_norm" + name, add_norm, (x, y, w), grad, size * N * C * (8 if grad else 4), "GB/s", None
        turned = 2 * size * N * (H + K) * D + 4 * N * D
        yield "rope" + name, rope, (q, k), grad, turned * (1 + grad), "GB/s", None
        yield "swiglu" + name, swiglu, (gate, up), grad, size * N * F * (8 if grad else 3), "GB/s", None
        yield ("log-probs" + name, log_probs, (new(N, C), new(V, C)), grad, 2 * N * C * V * (4 if grad else 1),
               "TFLOP/s", simple)
    for B in (1, rows):
        q = new(B, 1, H, D).detach()
        k = new(B, K, length, D).detach()
        v = new(B, K, length, D).detach()
        places = torch.linspace(length // 2, length - 1, B, device=device).long()[:, None]
        seen = {ops: ops.attention_mask(places, length, H // K, dtype) for ops in (model, fused)}
        yield (f"attend, {B} rows", lambda ops, q, k, v, seen=seen: ops.attend(q, k, v, seen[ops]), (q, k, v), False,
               2 * size * K * D * int(places.sum() + B), "GB/s", None)


def run_case(function, inputs, grad, ups):
    """A case's results, or with grad the gradients of its inputs for upstream gradients `ups` (made when empty)."""
    with torch.set_grad_enabled(grad):
        out = function(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    if not grad:
        return out
    ups[:] = ups or [torch.randn_like(y) for y in out]
    return torch.autograd.grad(out, inputs, ups)


def kernels(s):
    """Milliseconds of each operation at the 7B's shapes in bf16: Triton's, torch eager and torch.compile, and how much
    of what the memory or the matrix products allow Triton's reaches. Medians of triton.testing.do_bench, L2 cold."""
    if not torch.cuda.is_available():
        yield {"not measured": "there is no CUDA device here"}
        return
    import fused
    from triton.testing import do_bench
    a = torch.ones(8192, 8192, dtype=torch.bfloat16, device="cuda")
    limits = {"GB/s": read_bandwidth("cuda", 2**32) / 1e9, "TFLOP/s": 2 * 8192 ** 3 / do_bench(lambda: a @ a) / 1e9}
    for name, function, inputs, grad, amount, unit, simple in kernel_cases(Config.preset("7b"), 4096, 64, 2048,
                                                                           torch.bfloat16, "cuda"):
        ways = {"ours": functools.partial(function, fused), "eager": functools.partial(function, model),
                "compiled": torch.compile(simple or functools.partial(function, model))}
        ms = {}
        for way, run in ways.items():
            model.use_kernels("triton" if way == "ours" else "torch", "cuda")
            ms[way] = do_bench(functools.partial(run_case, run, inputs, grad, []), return_mode="median")
        rate = amount / ms["ours"] / (1e6 if unit == "GB/s" else 1e9)
        yield {"operation": name, **{f"{way} ms": t for way, t in ms.items()}, unit: rate,
               "share of the limit": rate / limits[unit],
               "over the best of torch": min(ms["eager"], ms["compiled"]) / ms["ours"]}


STARTERS = ("leaf-classification", "spaceship-titanic", "spooky-author-identification", "home-data-for-ml-course",
            "whale-categorization-playground", "ogbn-arxiv", "cifar-10")


def config_of(s, **tiny):
    """(Config, folder) of the model; of tiny those of the 0.5B with some values changed, and None."""
    if s.model == "tiny":
        return replace(Config.preset("0.5b"), **tiny), None
    folder = find_folder(s.model)
    return Config.from_pretrained(folder), folder


def packed_row(config):
    """A PackedRow of four texts of random tokens: of each the last third is learned."""
    g = torch.Generator().manual_seed(0)
    n = TRAIN_TOKENS // 4
    examples = [(torch.randint(min(config.vocab_size, 150000), (n + 1,), generator=g).tolist(),
                 [i > 2 * n // 3 for i in range(n + 1)]) for _ in range(4)]
    return distributed.packed_rows(examples, range(4), 0, 1, TRAIN_TOKENS)[0]


def fine_tuning(s):
    """Tokens/s of loss and gradients of one packed row, without the optimizer and without recomputing, against
    transformers with its own loss on the same tokens (positions restart, which parts the texts there); and the extra
    memory of the log-probs alone. Of tiny: four blocks of the 0.5B, with its whole vocabulary and random weights."""
    import sft
    device = torch.device("cpu")
    compute = getattr(torch, s.dtype)
    config, folder = config_of(s, num_hidden_layers=4)
    model = distributed.build_model(config, folder, device, recompute=False, compute=compute)
    row = packed_row(config)
    tokens, lengths, targets = row.inputs(device)
    targets = torch.as_tensor(targets)
    num = int((targets != IGNORE).sum())

    def ours():
        loss = sft.nll_gradients(model, [row], num, 1, device, config.vocab_size).item()
        model.zero_grad()
        return loss

    runs = {"ours": ours}
    if transformers:
        with tempfile.TemporaryDirectory() as own:
            if not folder:
                model.save_pretrained(own)
            peer = transformers.AutoModelForCausalLM.from_pretrained(folder or own, dtype=torch.float32)
        positions = torch.cat([torch.arange(n) for n in lengths])[None]

        def theirs():
            with torch.autocast("cpu", torch.bfloat16, enabled=compute is torch.bfloat16):
                loss = peer(input_ids=tokens, position_ids=positions, labels=targets, shift_labels=targets,
                            use_cache=False).loss
            loss.backward()
            peer.zero_grad()
            return loss.item()
        runs["transformers"] = theirs
    figures = {"tokens": tokens.numel(), "learned": num}
    if transformers:
        figures["losses"] = abs(ours() / theirs() - 1)
    seconds = alternate(runs, s.repeats)
    figures |= {f"{name} tokens/s": tokens.numel() / t for name, t in seconds.items()}
    if transformers:
        figures["ratio"] = seconds["transformers"] / seconds["ours"]
    share = logs.flops_of(config, [row]) / seconds["ours"] / logs.peak_flops(device, torch.float32)
    yield figures | {"share of measured fp32 products": share}
    memory = {way: in_new_process(f"head_memory({way!r})") for way in ("ours", "plain")}
    yield {"log-probs of": "1024 x 151936", **{f"{way} MiB": size / 2**20 for way, size in memory.items()},
           "share": memory["ours"] / memory["plain"]}


def head_memory(way):
    """Bytes that log-probs of 1024 tokens and their gradients take, without the gradients themselves."""
    head = model.Head(896, 151936, bias=False)
    x = torch.randn(1024, 896, requires_grad=True)
    targets = torch.arange(1024)

    def step():
        if way == "ours":
            logp = head(x, targets)[0]
        else:
            logp = head(x).log_softmax(-1).gather(1, targets[:, None])
        logp.mean().backward()
    return grown(step) - head.weight.nbytes - x.nbytes


UPDATES = ((300, 30, 8), (1000, 100, 2), (1000, 100, 8), (1000, 300, 8), (4000, 300, 8))
WAYS = ("shared", "packed", "transformers")


def ragged_actions(prefix, length, n, limit):
    """Examples of n actions in a state of so many tokens, of length / 2 to 3 length / 2 tokens each, evenly spread."""
    g = torch.Generator().manual_seed(0)
    state = torch.randint(limit, (prefix,), generator=g).tolist()
    examples = []
    for i in range(n):
        action = torch.randint(limit, (length // 2 + length * i // max(1, n - 1),), generator=g).tolist()
        examples.append((state + action, [False] * prefix + [True] * len(action)))
    return examples


def update_model(s, way):
    """The model that `update` trains in one of the WAYS; activations are computed again in backward."""
    config, folder = config_of(s, num_hidden_layers=2, vocab_size=151936 // 12)
    ours = distributed.build_model(config, folder, torch.device("cpu"), recompute=True, compute=getattr(torch, s.dtype))
    if way != "transformers":
        return ours
    with torch.device("meta"):
        peer = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**asdict(config)))
    peer.load_state_dict(ours.state_dict(), assign=True)
    peer.tie_weights()
    peer.model.rotary_emb = type(peer.model.rotary_emb)(peer.config)        # its buffers are in no state
    peer.gradient_checkpointing_enable()
    return peer.train()


def update_step(s, way, net, examples):
    """Log-probs of the actions' tokens, and the gradients of a weighted sum of them: (log-probs, tokens computed)."""
    count = sum(sum(loss_mask) for _, loss_mask in examples)
    device = next(net.parameters()).device
    weights = torch.linspace(-1, 1, count, device=device)
    if way == "transformers":
        longest = max(len(ids) for ids, _ in examples)
        start = min(loss_mask.index(True) for _, loss_mask in examples)
        padded = torch.zeros(len(examples), longest, dtype=torch.int64)
        seen = torch.zeros_like(padded)
        learned = torch.zeros_like(padded, dtype=torch.bool)
        for row, (ids, loss_mask) in enumerate(examples):
            padded[row, :len(ids)] = torch.tensor(ids)
            seen[row, :len(ids)] = 1
            learned[row, :len(ids)] = torch.tensor(loss_mask)
        with torch.autocast("cpu", torch.bfloat16, enabled=s.dtype == "bfloat16"):
            logits = net(input_ids=padded, attention_mask=seen, use_cache=False,
                         logits_to_keep=longest - start + 1).logits
        logp = logits[:, :-1].float().log_softmax(-1).gather(2, padded[:, start:, None])[:, :, 0]
        logp = logp[learned[:, start:]]
        (weights * logp).sum().backward()
        return logp.detach(), padded.numel()
    if way == "shared":
        row, = distributed.packed_rows(examples, range(len(examples)), 0, 1, 10**9)
    else:
        texts = [distributed.packed_rows(examples, [i], 0, 1, 10**9)[0] for i in range(len(examples))]
        row = distributed.PackedRow(*(sum((getattr(text, name) for text in texts), []) for name in texts[0]._fields))
    counts = [sum(loss_mask) for _, loss_mask in examples]
    tokens, lengths, targets = row.inputs(device)
    logp = net(tokens, lengths=lengths, targets=targets)[0]
    in_order = [part for _, part in sorted(zip(row.examples, logp.split([counts[i] for i in row.examples])),
                                           key=lambda pair: pair[0])]
    logp = torch.cat(in_order)
    (weights * logp).sum().backward()
    return logp.detach(), tokens.numel()


def update_memory(s, way, examples):
    """In a process of its own: how far the resident set grows above weights and gradients, in bytes."""
    net = update_model(s, way)
    update_step(s, way, net, ragged_actions(20, 4, 2, 1000))        # makes the gradients, and loads what is needed
    return grown(lambda: update_step(s, way, net, examples))


def update(s):
    """An update of PPO for n actions in one state, forward and backward in one row: with the state once, with it before
    each action, and in transformers with padding. Tokens, seconds, and memory above weights and gradients. Of tiny: a
    twelfth of the 0.5B, two of its blocks and a twelfth of its vocabulary, so that head and blocks cost as they do
    there, with random weights."""
    ways = WAYS if transformers else WAYS[:2]
    nets = {way: update_model(s, way) for way in ways if way != "packed"}
    nets["packed"] = nets["shared"]
    limit = nets["shared"].config.vocab_size
    for prefix, length, n in UPDATES:
        if prefix > s.longest_state:
            continue
        examples = ragged_actions(prefix, length, n, limit)
        found = {}

        def run(way):
            found[way] = update_step(s, way, nets[way], examples)

        seconds = alternate({way: functools.partial(run, way) for way in ways}, s.repeats, warm=s.repeats > 1)
        figures = {"state": prefix, "action": length, "actions": n}
        memory = {}
        for way in ways:
            memory[way] = in_new_process(
                f"update_memory(bench.Settings(model={s.model!r}, dtype={s.dtype!r}), {way!r}, "
                f"bench.ragged_actions({prefix}, {length}, {n}, {limit}))")
            figures |= {f"{way} tokens": found[way][1], f"{way} s": seconds[way], f"{way} GiB": memory[way] / 2**30}
        for way in ways[1:]:
            figures |= {f"{way} over shared, time": seconds[way] / seconds["shared"],
                        f"{way} over shared, memory": memory[way] / memory["shared"],
                        f"log-probs from {way}": (found[way][0] - found["shared"][0]).abs().max().item()}
        yield figures


def line(figures):
    return "  ".join(f"{k}: {v:.3g}" if isinstance(v, float) else f"{k}: {v}" for k, v in figures.items())


def sandbox(s):
    """Milliseconds to run a script that prints one word: a bare subprocess, execute without and with the sandbox. Then
    seconds to run miniature starters cold and warm: what a warm process saves is the imports."""
    from test_execute import warm_up
    limits = dict(timeout_s=60, memory_bytes=1 << 30)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "one.py").write_text("print('one')")
        ways = {"bare": lambda: subprocess.run([sys.executable, "one.py"], cwd=folder, capture_output=True),
                "sandbox off": lambda: execute("one.py", folder, sandbox="off", **limits),
                "sandbox on": lambda: execute("one.py", folder, **limits)}
        seconds = alternate(ways, s.repeats)
    yield {"layers": "+".join(protection()), **{f"{name} ms": 1000 * t for name, t in seconds.items()},
           "overhead ms": 1000 * (seconds["sandbox on"] - seconds["bare"])}
    for libraries in (b"numpy", b"torch"):
        begun = time.perf_counter()
        if not warm_up(libraries):
            return
        yield {"warm process with": libraries.decode(), "seconds until up": time.perf_counter() - begun}
    ratios = []
    for id in STARTERS:
        with tempfile.TemporaryDirectory() as data, tempfile.TemporaryDirectory() as folder:
            public = tasks.prepare(id, data=data, log=lambda line: None) / "public"
            task = tasks.load(id)
            shutil.copy(task.folder / task.entry, folder)
            os.symlink(public, f"{folder}/data")
            limits = dict(timeout_s=task.time_limit_s, memory_bytes=task.memory_limit_bytes, readable=[public])
            ways = {way: functools.partial(execute, task.entry, folder, warm=way == "warm", **limits)
                    for way in ("cold", "warm")}
            seconds = alternate(ways, max(3, s.repeats // 10))
        ratios.append(seconds["cold"] / seconds["warm"])
        yield {"starter": id, **{f"{way} s": each for way, each in seconds.items()}, "cold / warm": ratios[-1]}
    yield {"starters": len(ratios), "median cold / warm": statistics.median(ratios)}


def busy(s):
    """Seconds of an iteration's passes of the miniature, and of sampling 64 replies: 8 actions in each of 32 states,
    without their scripts. Alone, and beside a program that keeps one core busy."""
    import rl
    cfg = rl.Settings(advantage="rloo", samples=8, epochs=2, minibatches=4, max_row_tokens=704,
                      max_batch=64, context=256, max_new_tokens=64)
    trainer = rl.PPOTrainer(cfg, Config.preset("tiny"), None, 259, torch.device("cpu"))
    engine = sampling.make_engine(cfg, trainer.actor, Tokenizer.of_bytes())
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(250, (116,), generator=g).tolist() for _ in range(32)]
    replies = [[torch.randint(250, (26,), generator=g).tolist() for _ in range(8)] for _ in prompts]
    examples = [(prompt + reply, [False] * 116 + [True] * 26) for prompt, group in zip(prompts, replies)
                for reply in group]
    groups = [i // 8 for i in range(256)]
    old = trainer.logprobs(trainer.actor, examples)
    ones = [torch.ones_like(logp) for logp in old]

    def update():
        trainer.logprobs(trainer.actor, examples, range(32))        # a share is checked
        trainer.logprobs(trainer.reference, examples)
        trainer.update_actor(examples, old, ones, ones, trainer.minibatches(groups, 0))

    def draw():
        engine.forget()
        engine.generate(prompts[:8], n=8, max_new_tokens=26)

    alone = alternate({"update": update, "sample": draw}, s.repeats)
    program = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        beside = alternate({"update": update, "sample": draw}, s.repeats)
    finally:
        program.kill()
    for name in alone:
        yield {"of": name, "alone s": alone[name], "beside a busy core s": beside[name],
               "times alone": beside[name] / alone[name]}


def rl_updates(s):
    """PPO on two toy tasks whose script takes --script-seconds. First step-wise against episode-wise, 16 actions an
    update, each beginning with an empty cache. The default model knows a few replies. Figures are medians of
    --repeats updates, without the first and the last, which differ."""
    import rl
    import test_rl_run

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tasks.FOLDERS[:] = [folder / "tasks"]
        test_rl_run.make(folder, s.script_seconds)

        def updates(name, **more):
            shutil.copytree(folder / "pool", folder / name, ignore=shutil.ignore_patterns("cache"))
            if s.model != "tiny":       # which writes whole replies, of more tokens
                more |= dict(max_new_tokens=128, context=2048)
            r = test_rl_run.settings(folder, trajectories=str(folder / name), out=str(folder / f"{name}-out"), lr=1e-3,
                                     critic_lr=1e-3, iterations=2 + s.repeats, save_every=99, **more)
            r.model = r.model if s.model == "tiny" else s.model
            Path(r.out).mkdir()
            rl.train(r, 0, torch.device("cpu"))
            lines = [json.loads(line) for line in Path(r.out, "log.jsonl").read_text().splitlines()]
            median = lambda name: statistics.median(line[name] for line in lines[1:-1])
            names = ("seconds", "sample_s", "execute_s", "logprobs_s", "update_s", "cache_hits")
            rewards = {"first reward": lines[0]["reward"], "last reward": lines[-1]["reward"]}
            return {name: median(name) for name in names} | rewards

        for name, more in {"step": dict(states=8, samples=2), "episode": dict(states=2, samples=1, steps=8)}.items():
            figures = updates(name, rollout=name, **more)
            yield {"rollout": name, "updates an hour": 3600 / figures["seconds"], **figures}


def gpu(s):
    """All that needs a GPU, see bench_gpu.py."""
    import bench_gpu
    if not s.dry and not torch.cuda.is_available():
        sys.exit("bench.py gpu: there is no CUDA device here; --dry runs the same code at tiny shapes on a CPU")
    yield from bench_gpu.run_parts(s.dry, s.seconds)


MEASUREMENTS = {"decode": decode, "prefill": prefill, "edit": edit, "kernels": kernels, "load": load_checkpoint,
                "sft": fine_tuning, "update": update, "sandbox": sandbox, "busy": busy,
                "rl": rl_updates, "gpu": gpu}


def main():
    names = []
    while len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        names.append(sys.argv.pop(1))
    unknown = [n for n in names if n not in MEASUREMENTS]
    if unknown or not names:
        sys.exit(f"bench.py: expected one or more of {', '.join(MEASUREMENTS)}, found {' '.join(unknown) or 'none'}")
    s = parse(Settings)
    machine = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
               "torch": torch.__version__, "threads": torch.get_num_threads(), "model": s.model, "dtype": s.dtype,
               "read GB/s": read_bandwidth("cuda" if torch.cuda.is_available() and s.device != "cpu" else "cpu") / 1e9}
    print(line(machine))
    report = {"machine": machine}
    for name in names:
        report[name] = []
        for figures in MEASUREMENTS[name](s):
            report[name].append(figures)
            print(name, line(figures), flush=True)
            if s.json:      # at once, so that a run that is cut loses nothing
                Path(s.json).write_text(json.dumps(report, indent=2) + "\n")
    failed = [figures["check"] for name in names for figures in report[name] if not figures.get("ok", True)]
    if failed:
        sys.exit("\n".join(["failed:", *failed]))


if __name__ == "__main__":
    main()
