"""The parts of `python tests/bench.py gpu`: what only a GPU can tell, checked first, then measured, in order of worth.

Each part is a function of (Scale, seconds left) that yields {"check": what, "ok": whether, figures}. At --dry they run
on a CPU at tiny shapes, so that the code itself is tested.
"""
import json
import shutil
import tempfile
import time
import traceback
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

import bench
import model
import rl
import sample
import sft
from model import Config, Qwen2
from support import distributed, logs, sampling
from support.tokenizer import Tokenizer


@dataclass
class Scale:
    """Where it is measured, and how large the models, texts and batches are."""
    device: torch.device
    small: Config               # compared with a CPU
    large: Config               # decodes: the shape of the 7B
    trained: Config             # is trained: the same with as many blocks as fit an 80 GB device
    product: int                # side of the matrix product that the device is measured by
    reads: int                  # bytes that its memory is
    rows: tuple                 # rows that are decoded together
    prompt: int                 # tokens before a decoded one
    packed: tuple               # tokens of packed rows in training
    prefix: int                 # tokens of a state, of ...
    branches: tuple             # ... (actions, tokens of each)

    @property
    def on_gpu(self):
        return self.device.type == "cuda"

    def synchronize(self):
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, run, repeats=3, warm=1):
        """Returns the median seconds of a call, the device's work included."""
        def whole():
            run()
            self.synchronize()
        return sorted(bench.alternate({"run": whole}, repeats, warm).values())[0]


SMALL = replace(Config.preset("0.5b"), vocab_size=4096, num_hidden_layers=4)
TINY = Config(vocab_size=301, hidden_size=48, intermediate_size=88, num_hidden_layers=2, num_attention_heads=6,
              num_key_value_heads=2, tie_word_embeddings=False)


def scale_of(dry):
    """Returns the Scale of a GPU, or at --dry of a CPU."""
    if dry:
        return Scale(torch.device("cpu"), TINY, TINY, TINY, 128, 2**20, (1, 2), 24, (64, 96), 40, (3, 6))
    large = Config.preset("7b")
    return Scale(torch.device("cuda", 0), SMALL, large, replace(large, num_hidden_layers=8), 8192, 2**33, (1, 8, 64),
                 1024, (8192, 15000), 4000, (8, 300))


def distance(found, expected):
    """Returns the norm of the difference over that of what was expected."""
    found = found.detach().float().cpu()
    expected = expected.detach().float().cpu()
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def worst_distance(found, expected):
    """Returns the largest distance between tensors of two lists, leaving out those that are next to nothing."""
    largest = max(e.float().norm().item() for e in expected)
    return max(distance(f, e) for f, e in zip(found, expected) if e.float().norm().item() > 1e-4 * largest)


def random_tokens(num, limit, seed=0):
    return torch.randint(limit, (num,), generator=torch.Generator().manual_seed(seed)).tolist()


def example_of(num, limit, seed=0):
    """Returns an example of num + 1 random tokens, of which the last third is learned."""
    return random_tokens(num + 1, limit, seed), [i > 0.7 * num for i in range(num + 1)]


# -- Checks

def machine(scale, left):
    """The device, and its two ceilings: products of random bf16 matrices, and reads of its memory."""
    names = {"torch": torch.__version__, "device": "cpu"}
    if scale.on_gpu:
        names = {"torch": torch.__version__, "device": torch.cuda.get_device_name(), "cuda": torch.version.cuda,
                 "GiB": torch.cuda.mem_get_info()[1] / 2**30}
    a = torch.randn(scale.product, scale.product, device=scale.device).bfloat16()
    seconds = scale.seconds(lambda: a @ a.T, 5)
    yield {"check": "machine", "ok": True, **names, "TFLOP/s": 2 * scale.product**3 / seconds / 1e12,
           "read GB/s": bench.read_bandwidth(scale.device, scale.reads) / 1e9}


def parity(scale, left):
    """A small model here against the same in fp32 on a CPU: logits, with texts and a tree in one row, and gradients."""
    lengths = [100, (60, [1, 20, 40]), 79]
    tokens = torch.tensor([random_tokens(300, scale.small.vocab_size)])
    reference = Qwen2.from_scratch(scale.small, seed=1)
    scale_weights(reference)
    texts = [example_of(n, scale.small.vocab_size, n) for n in (90, 30, 180)]
    rows = distributed.packed_rows(texts, range(3), 0, 1, 300)

    def results_of(net, device):
        net.zero_grad()
        with torch.no_grad():
            whole = net(tokens.to(device))
            packed = net(tokens.to(device), lengths=lengths)
        sft.nll_gradients(net, rows, 100, 1, device, scale.small.vocab_size)
        return whole, packed, [p.grad for p in net.parameters()]

    expected = results_of(reference, torch.device("cpu"))
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        net = distributed.build_model(scale.small, None, scale.device, seed=1, compute=dtype)
        scale_weights(net)
        found = results_of(net, scale.device)
        errors = {"whole": distance(found[0], expected[0]), "packed": distance(found[1], expected[1])}
        # What an error of the layout would make of it must be far more.
        seen = distance(expected[0], expected[1])
        yield {"check": f"logits against the CPU's, {dtype}", "ok": max(errors.values()) < limit < seen / 3, **errors,
               "packed from whole": seen}
        worst = worst_distance(found[2], expected[2])
        yield {"check": f"gradients against the CPU's, {dtype}", "ok": worst < 4 * limit, "worst": worst}


@torch.no_grad()
def scale_weights(net):
    """Makes the output of random weights depend more on what a token sees, and less evenly spread."""
    for name, p in net.named_parameters():
        if "norm" not in name:
            p.mul_(3)


def attention(scale, left):
    """Attention at the shape of the 7B, forward and backward: what a row costs whose lengths are new, and the memory
    that it takes, in fp32 too, where the fast kernels do not let heads share keys."""
    T = scale.packed[-1]
    c = scale.large
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (torch.randn(1, T, heads, c.head_dim, device=scale.device).to(dtype).requires_grad_()
                   for heads in (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads))
        varlen = model.has_varlen(q[:, :, 0, 0], dtype)
        attend = model.varlen_attention if varlen else model.packed_attention

        def run(first):
            layout = model.make_layout([first, T - first], scale.device, varlen)
            attend(q, k, v, layout).sum().backward()

        known = scale.seconds(lambda: run(T // 2))
        fresh = scale.seconds(lambda firsts=iter(range(T // 2 + 1, T)): run(next(firsts)), 5)
        figures = {"known s": known, "new s": fresh}
        ok = not scale.on_gpu or fresh < 1.5 * known + 0.005
        if scale.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run(1)
            figures["GiB"] = (logs.peak_memory(scale.device) - before) / 2**30
            ok = ok and figures["GiB"] < 4
        yield {"check": f"attention over {T:,} tokens, {dtype}", "ok": ok, **figures}


def kernel_twins(scale, left):
    """Triton's kernels and their gradients against torch's operations, in bf16."""
    tokens, rows, length = (777, 64, 2048) if scale.on_gpu else (5, 3, 70)
    import fused
    try:
        for name, function, inputs, grad, _, _, _ in bench.kernel_cases(scale.large, tokens, rows, length,
                                                                        torch.bfloat16, scale.device):
            results = []
            ups = []
            for ops in (fused, model):
                model.use_kernels("triton" if ops is fused else "torch", scale.device)
                results.append(bench.run_case(partial(function, ops), inputs, grad, ups))
            error = max(map(distance, *results))
            yield {"check": f"kernel {name}", "ok": error < 2e-2, "error": error}
    finally:
        model.use_kernels("torch", scale.device)


def settings_of(scale, **more):
    """Returns rl.Settings for small models here."""
    return rl.Settings(dtype="bfloat16", context=512, max_new_tokens=48, max_batch=4, lr=1e-4, critic_lr=1e-4,
                       max_row_tokens=4096, **more)


def sampler(scale, left):
    """Log-probs of what an engine samples, in each way that it can, against the trainer's for the same tokens."""
    tokenizer = Tokenizer.of_bytes()
    cfg = settings_of(scale)
    trainer = rl.PPOTrainer(cfg, scale.small, None, tokenizer.size, scale.device)
    scale_weights(trainer.actor)
    net = sampling.make_engine(cfg, trainer.actor, tokenizer).model
    prompts = [[i, *range(5, 25), i, 9] for i in range(6)]
    def compare(kernels, draft, fixed_shapes, name):
        model.use_kernels(kernels, scale.device)
        engine = sample.Engine(net, tokenizer, 4, cfg.context, draft=draft, fixed_shapes=fixed_shapes)
        replies = [group[0] for group in engine.generate(prompts, max_new_tokens=40, temperature=1.0, seed=3)]
        examples = [(prompt + reply.tokens, [False] * len(prompt) + [True] * len(reply.tokens))
                    for prompt, reply in zip(prompts, replies)]
        logp = torch.cat(trainer.logprobs(trainer.actor, examples))
        gap = (logp - torch.tensor([logp for reply in replies for logp in reply.logps])).abs()
        yield {"check": name, "ok": gap.mean().item() < 0.02, "mean gap": gap.mean().item(),
               "largest": gap.max().item(), "tokens": len(gap)}

    for kernels in ("torch", "triton") if scale.on_gpu else ("torch",):
        for fixed_shapes in (False, True):
            for draft in (False, True):
                name = f"sampler against trainer, {kernels}, drafts {draft}, fixed shapes {fixed_shapes}"
                yield from attempt(name, partial(compare, kernels, draft, fixed_shapes, name))
    model.use_kernels("torch", scale.device)


def sft_step(config, device):
    """Returns (weights before, weights after, loss) of an SFT step in fp32."""
    net = distributed.build_model(config, None, device, seed=1, compute=torch.float32)
    before = torch.cat([p.detach().cpu().flatten() for p in net.parameters()])
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, eps=1e-4, weight_decay=0, fused=True)
    texts = [example_of(n, config.vocab_size, n) for n in (90, 30, 200)]
    rows = distributed.packed_rows(texts, range(3), 0, 1, 200)
    loss = sft.nll_gradients(net, rows, 100, 1, device, config.vocab_size)
    distributed.optimizer_step(net, optimizer)
    return before, torch.cat([p.detach().cpu().flatten() for p in net.parameters()]), loss.item()


class Prepared:
    """In place of a RolloutWorker: gives these transitions."""

    def __init__(self, transitions):
        self.transitions = transitions

    def sample_states(self, iteration):
        return []

    def run(self, names, iteration):
        return self.transitions, {}

    def samples_from(self, actor):
        return False

    def refresh(self, actor):
        pass


def transitions_of(config, prefix, branches, num_states):
    """Returns Transitions of random tokens: in each state so many actions of so many tokens, of random rewards."""
    num, length = branches
    generator = torch.Generator().manual_seed(0)
    found = []
    for state in range(num_states):
        prompt = random_tokens(prefix, config.vocab_size, 1000 + state)
        for j in range(num):
            reward = torch.rand((), generator=generator).item()
            step = {"reward": reward, "kind": "scored", "outcome": "ok", "action": "Execute Script", "valid": True}
            tokens = random_tokens(length, config.vocab_size, len(found))
            logps = (-5.0 + torch.randn(length, generator=generator) / 2).tolist()
            found.append(rl.Transition(f"state {state}", state, len(found), prompt, tokens, logps, step, []))
    return found


def ppo_step(config, device):
    """Returns the figures of an iteration of PPO in fp32, with critic and reference, and the actor's weights."""
    cfg = replace(settings_of(None, kl=0.01), dtype="float32")
    trainer = rl.PPOTrainer(cfg, config, None, config.vocab_size, device)
    transitions = transitions_of(config, 40, (3, 20), 2)
    examples = [transition.example for transition in transitions]
    old = trainer.logprobs(trainer.actor, examples)
    for transition, logp in zip(transitions, old):
        transition.logp_sampler = logp.tolist()
    _, stats = rl.iterate(cfg, Prepared(transitions), trainer, 0)
    return stats, torch.cat([p.detach().cpu().flatten() for p in trainer.actor.parameters()])


def steps(scale, left):
    """One step of SFT and one iteration of PPO in fp32, here against a CPU."""
    (before, expected, loss), (_, found, loss_here) = (
        sft_step(scale.small, device) for device in (torch.device("cpu"), scale.device))
    error = distance(found - before, expected - before)
    yield {"check": "an SFT step against the CPU's", "ok": error < 1e-2 and abs(loss_here / loss - 1) < 1e-4,
           "change": error, "loss": loss_here, "CPU's loss": loss}
    (expected, _), (found, _) = (ppo_step(scale.small, device) for device in (torch.device("cpu"), scale.device))
    gaps = {name: abs(found[name] - expected[name])
            for name in ("policy_loss", "value_loss", "entropy", "grad_norm", "kl_k3")}
    worst = max(gap / max(1e-2, abs(expected[name])) for name, gap in gaps.items())
    yield {"check": "an iteration of PPO against the CPU's", "ok": worst < 1e-2, "worst": worst, **gaps}


def whole_run(scale, left):
    """sft.py itself: training, validation, checkpoint, and a run that goes on after its last checkpoint is lost."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        Qwen2.from_scratch(scale.small).save_pretrained(folder / "model")
        Tokenizer.of_bytes().save(folder / "model")
        texts = [[{"role": "user", "content": f"{i} and {i}?"}, {"role": "assistant", "content": f"It is {2 * i}."}]
                 for i in range(20)]
        (folder / "own.jsonl").write_text("\n".join(json.dumps({"messages": text}) for text in texts))
        command = ["--model", f"{folder}/model", "--trajectories", f"{folder}/own.jsonl", "--out", f"{folder}/out",
                   "--batch", "4", "--updates", "4", "--save-every", "2", "--dtype", "bfloat16", "--device",
                   scale.device.type]
        status = sft.main(command)
        shutil.rmtree(folder / "out/checkpoints/step-000004")
        status = status or sft.main(command)
        log = [json.loads(line) for line in (folder / "out/log.jsonl").read_text().splitlines()]
        weights = sample.load(str(folder / "out"), "float32", "cpu", 1, 64).model.parameters()
        finite = all(p.isfinite().all() for p in weights)
    gap = max(abs(first["loss"] - again["loss"]) for first, again in zip(log[2:4], log[4:]))
    ok = status == 0 and len(log) == 6 and gap < 1e-3 and finite
    yield {"check": "sft.py runs, and goes on where it was", "ok": ok, "status": status, "gap of losses": gap}


# -- Measurements

def decode(scale, left):
    """Decoding at the 7B's shape with random weights: milliseconds a pass, and the share of what it would take to read
    weights and cache once."""
    net = Qwen2.from_scratch(scale.large, dtype=torch.bfloat16, device=scale.device).requires_grad_(False)
    tokenizer = Tokenizer.of_bytes()
    tokenizer.eos = set()
    rate = bench.read_bandwidth(scale.device, scale.reads)
    token_bytes = 4 * scale.large.num_hidden_layers * scale.large.num_key_value_heads * scale.large.head_dim
    ways = [("torch", False), ("torch", True)]
    if scale.on_gpu:
        ways += [("triton", False), ("triton", True)]

    def measure(B, kernels, fixed_shapes, name):
        model.use_kernels(kernels, scale.device)
        prompts = [[b, *random_tokens(scale.prompt - 1, 250, b)] for b in range(B)]
        engine = sample.Engine(net, tokenizer, B, scale.prompt + 128, draft=False, fixed_shapes=fixed_shapes)

        def generate(num):
            passes = engine.passes
            engine.generate(prompts, max_new_tokens=num, temperature=1.0)
            return engine.passes - passes

        first = scale.seconds(partial(generate, 1), 1, False)      # reads the prompts
        generate(24)                                               # captures graphs
        start = time.perf_counter()
        fewer = generate(8)
        middle = time.perf_counter()
        more = generate(40)
        each = (time.perf_counter() - middle - (middle - start)) / (more - fewer)
        read = bench.streamed_bytes(net) + B * scale.prompt * token_bytes
        yield {"check": name, "ok": True, "ms a pass": 1000 * each, "tokens/s": B / each,
               "share of the read limit": read / rate / each, "prompts s": first}

    for B in scale.rows:
        for kernels, fixed_shapes in ways:
            if left() > 0:
                name = f"decode, {B} rows, {kernels}{', graphs' if fixed_shapes else ''}"
                yield from attempt(name, partial(measure, B, kernels, fixed_shapes, name))
    model.use_kernels("torch", scale.device)


def trained_model(scale):
    """Returns the model that is trained, with products in bf16 and activations computed again in backward."""
    net = Qwen2.from_scratch(scale.trained, device=scale.device)
    net.compute_dtype = torch.bfloat16
    for block in net.model.layers:
        block.recompute = True
    return net


def train(scale, left, compiled=False):
    """An SFT step at the 7B's width: tokens/s, MFU, and the peak of memory against --plan."""
    net = trained_model(scale)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6, weight_decay=0, fused=True)
    peak = logs.peak_flops(scale.device, torch.bfloat16)
    num_ids = scale.trained.vocab_size
    rows = []
    for length in scale.packed:
        texts = [example_of(length // 4 - i, num_ids, i) for i in range(4)]
        rows += distributed.packed_rows(texts, range(4), 0, 1, length)

    def loss_of(row):
        return sft.nll_gradients(net, [row], len(row.tokens), 1, scale.device, num_ids).item()

    eager = [loss_of(row) for row in rows]
    net.zero_grad()
    if compiled:
        for block in net.model.layers:
            block.compile(backend="inductor" if scale.on_gpu else "eager")
    for row, expected in zip(rows, eager):
        if left() < 0:
            return
        num_tokens = len(row.tokens)
        loss = loss_of(row)
        ok = abs(loss / expected - 1) < 1e-2
        figures = {"loss": loss, "eager loss": expected}

        def step():
            loss_of(row)
            distributed.optimizer_step(net, optimizer)

        step()
        if scale.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = scale.seconds(step)
        figures |= {"tokens/s": num_tokens / seconds,
                    "MFU": logs.flops_of(scale.trained, [row]) / seconds / peak}
        if scale.on_gpu:
            plan = sum(distributed.plan_memory(scale.trained, num_tokens, 1).values())
            found = logs.peak_memory(scale.device)
            figures |= {"peak GiB": found / 2**30, "planned GiB": plan / 2**30}
            ok = ok and found < 1.1 * plan
        name = "compiled" if compiled else "eager"
        yield {"check": f"an SFT step, {name}, {num_tokens:,} tokens, {scale.trained.num_hidden_layers} blocks",
               "ok": ok, **figures}


def train_compiled(scale, left):
    """The same with each block compiled."""
    yield from train(scale, left, compiled=True)


def shared(scale, left):
    """An update of PPO for several actions in one state: with the state once in the row, and with it before each."""
    net = trained_model(scale)
    num, length = scale.branches
    examples = bench.ragged_actions(scale.prefix, length, num, scale.trained.vocab_size)
    results = {}
    seconds = {}
    figures = {"state": scale.prefix, "actions": num, "tokens of each": length}
    for way in bench.WAYS[:2]:
        def step():
            results[way] = bench.update_step(None, way, net, examples)
        step()
        if scale.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        seconds[way] = scale.seconds(step)
        figures |= {f"{way} tokens": results[way][1], f"{way} s": seconds[way]}
        if scale.on_gpu:
            figures[f"{way} GiB"] = (logs.peak_memory(scale.device) - before) / 2**30
    (logp, _) = results["shared"]
    (expected, _) = results["packed"]
    gap = (logp - expected).abs().max().item()
    yield {"check": "an update with the state once", "ok": gap < 0.1, **figures, "gap of log-probs": gap,
           "packed over shared": seconds["packed"] / seconds["shared"]}


def kernel_times(scale, left):
    """Which of Triton's kernels are faster than torch's operations, eager and compiled."""
    if scale.on_gpu:
        for figures in bench.kernels(None):
            if left() < 0:
                return
            yield {"check": f"times of {figures.pop('operation')}", "ok": True, **figures}


PARTS = (machine, parity, attention, kernel_twins, sampler, steps, whole_run, decode, train, shared,
         train_compiled, kernel_times)


def attempt(name, part):
    """Yields what part() yields, and a failed check where it raises."""
    try:
        yield from part()
    except Exception as error:
        traceback.print_exc(limit=-4)
        yield {"check": name, "ok": False, "raised": f"{type(error).__name__}: {error}"[:300]}


def run_parts(dry, seconds):
    """Yields what the parts find. A part that raises is a failed check, and the next one begins; after `seconds` none
    begins any more."""
    scale = scale_of(dry)
    began = time.monotonic()

    def left():
        return seconds - (time.monotonic() - began)
    for part in PARTS:
        start = time.monotonic()
        if left() < 0:
            yield {"check": part.__name__, "ok": False, "why": "no time was left"}
            continue
        yield from attempt(part.__name__, partial(part, scale, left))
        print(f"{part.__name__}: {time.monotonic() - start:.0f} s", flush=True)
        if scale.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
