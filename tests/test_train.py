"""Training: equalities that must hold whatever the batching, the packing and the number of processes."""
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sft
from model import Config, Qwen2
from support.tokenizer import Tokenizer
from support import distributed, files, logs
from support.conversations import hold_back
from support.sandbox import Slots

SMALL = Config(vocab_size=267, hidden_size=48, intermediate_size=88, num_hidden_layers=2, num_attention_heads=6,
               num_key_value_heads=2, max_position_embeddings=512)
HERE = Path(__file__).resolve().parent


def texts_of(num=24, seed=0):
    """Conversations in token ids, of 5 to 60 tokens, every third with no chosen token at all but the last."""
    g = torch.Generator().manual_seed(seed)
    texts = []
    for i in range(num):
        n = int(torch.randint(5, 60, (), generator=g))
        chosen = (torch.rand(n, generator=g) < (0.5 if i % 3 else 0.0)).tolist()
        chosen[-1] = True
        texts.append((torch.randint(259, (n,), generator=g).tolist(), chosen))
    return texts


def gradients(texts, chosen, world, rank, longest, compute=None):
    model = Qwen2.from_scratch(SMALL, seed=1)
    model.compute_dtype = compute
    rows = distributed.packed_rows(texts, chosen, rank, world, longest)
    num = sum(sum(texts[i][1]) for i in chosen)
    loss = sft.nll_gradients(model, rows, num, 1, torch.device("cpu"), 259)
    return loss, {name: p.grad for name, p in model.named_parameters()}


def assert_same(one, other, tolerance=1e-6):
    assert torch.allclose(one[0], other[0], rtol=tolerance)
    for name, grad in one[1].items():
        assert (grad - other[1][name]).norm() <= tolerance * max(grad.norm(), 1e-3), name


def test_gradients_do_not_depend_on_how_texts_are_packed():
    texts = texts_of()
    chosen = list(range(12))
    whole = gradients(texts, chosen, 1, 0, longest=10_000)
    for longest in (300, 120, 60):
        assert_same(whole, gradients(texts, chosen, 1, 0, longest))
    assert_same(whole, gradients(texts, chosen[::-1], 1, 0, 120))


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_are_one_batch(parts):
    """The gradients of 12 texts, added up over 2 or 4 micro-batches, are those of one; so is the loss."""
    texts = texts_of()
    chosen = list(range(12))
    num = sum(sum(texts[i][1]) for i in chosen)
    found = []
    for pieces in (1, parts):
        model = Qwen2.from_scratch(SMALL, seed=1)
        loss = 0.0
        for m in range(pieces):
            rows = distributed.packed_rows(texts, chosen[m::pieces], 0, 1, 120)
            loss = loss + sft.nll_gradients(model, rows, num, 1, torch.device("cpu"), 259)
        found.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    assert_same(*found)


def test_packing_loses_nothing_and_keeps_the_limit():
    lengths = [5, 9, 1, 7, 3, 10, 2]
    rows = distributed.pack_lengths(lengths, 10)
    assert sorted(i for row in rows for i in row) == list(range(7))
    assert all(sum(lengths[i] for i in row) <= 10 for row in rows)
    assert rows == [[5], [1], [3, 6], [0, 4, 2]]        # by hand: 3 joins 5, 2 joins 7, 1 joins 5 and 3
    assert distributed.pack_lengths([12, 3, 4], 10) == [[0], [2, 1]]
    assert distributed.pack_lengths([30, 31, 32], 10) == [[2], [1], [0]]        # each too long: no row is empty
    assert distributed.pack_lengths([30, 31, 32], 10, multiple=2) == [[2], [1], [0], []]
    assert distributed.pack_lengths([], 10) == []


@pytest.mark.parametrize("seed", range(5))
def test_rows_of_eight_processes_take_equally_long(seed):
    """64 conversations of log-normal lengths up to 15,000 tokens. In a step of eight rows, all wait for the costliest;
    at least 0.9 of their time is used on average. Nothing is lost, and rows keep the limit."""
    lengths = torch.empty(640).log_normal_(math.log(5000), 0.8, generator=torch.Generator().manual_seed(seed))
    lengths = lengths.long().clamp(50, 15000).tolist()
    used = []
    for start in range(0, 640, 64):
        batch = lengths[start:start + 64]
        rows = distributed.pack_lengths(batch, 15000, multiple=8)
        shares = [rows[rank::8] for rank in range(8)]       # as packed_rows deals them
        assert sorted(i for row in rows for i in row) == list(range(64))
        assert len(set(map(len, shares))) == 1
        assert all(sum(batch[i] for i in row) <= 15000 for row in rows)
        cost = torch.tensor([[sum(batch[i] * (1 + batch[i] / 65000) for i in row) for row in share]
                             for share in shares])
        used.append((cost.mean(0).sum() / cost.max(0).values.sum()).item())
    assert sum(used) / len(used) > 0.9


def test_each_epoch_has_each_text_once_in_an_order_of_its_own():
    seen = [i for step in range(6) for i in distributed.batch_indices(9, step, 3, seed=5)]
    assert sorted(seen[:9]) == sorted(seen[9:]) == list(range(9)) and seen[:9] != seen[9:]
    assert seen == [i for step in range(3) for i in distributed.batch_indices(9, step, 6, seed=5)]


def test_a_seed_may_be_as_large_as_a_date():
    for epoch in range(3):
        assert sorted(distributed.epoch_order(9, 20261129134200, epoch)) == list(range(9))
        assert distributed.epoch_order(9, 20261129134200, epoch) != distributed.epoch_order(9, 20261129134201, epoch)
        expected = torch.randperm(9, generator=torch.Generator().manual_seed(5 * 1_000_003 + epoch))
        assert distributed.epoch_order(9, 5, epoch) == expected.tolist()        # as in runs that have begun


def test_only_what_the_assistant_chose_has_a_gradient():
    """d loss / d logits is 0 at every position but those before a chosen token, the end of turn among them."""
    t = Tokenizer.of_bytes()
    ids, chosen = t.conversation([{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}])
    tokens, lengths, targets = distributed.packed_rows([(ids, chosen)], [0], 0, 1, 1000)[0].inputs("cpu")
    model = Qwen2.from_scratch(SMALL, seed=1)
    kept = {}
    model.model.norm.register_forward_hook(lambda m, i, o: (o.retain_grad(), kept.update(x=o)) and None)
    model(tokens, lengths=lengths, targets=targets, num_token_ids=259)[0].sum().backward()
    nonzero = kept["x"].grad[0].abs().sum(-1) > 0
    assert nonzero.tolist() == chosen[1:] and ids[1:][nonzero.nonzero()[-1].item()] == t.end


WORKER = """
import json, sys, torch
import sft, test_train as t
from torch.distributed.tensor import DTensor
from support import distributed
torch.manual_seed(0)
rank, world, device = distributed.init_distributed()
texts = t.texts_of()
chosen, recompute, compute = json.loads(sys.argv[1])
model = distributed.build_model(t.SMALL, None, device, seed=1, recompute=recompute, compute=getattr(torch, compute))
rows = distributed.packed_rows(texts[:1], [0], rank, world, 120)
sft.validate(model, rows, world, device, 259)
assert all(isinstance(p, DTensor) for p in model.parameters())     # nothing stays gathered
rows = distributed.packed_rows(texts, chosen, rank, world, 120)
num = sum(sum(texts[i][1]) for i in chosen)
loss = sft.nll_gradients(model, rows, num, world, device, 259)
torch.distributed.all_reduce(loss)
norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).full_tensor()
grads = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
if rank == 0:
    torch.save((loss, grads, norm), sys.argv[2])
torch.distributed.destroy_process_group()
"""


def test_products_in_bf16_leave_weights_and_gradients_in_fp32():
    """The gradients are those of fp32 within the rounding of bf16 (2^-9 a product), and are not rounded to bf16."""
    whole = gradients(texts_of(), range(12), 1, 0, 300)
    mixed = gradients(texts_of(), range(12), 1, 0, 300,
                      torch.bfloat16)
    assert_same(whole, mixed, 0.03)
    assert all(grad.dtype is torch.float32 for grad in mixed[1].values())
    grad = mixed[1]["model.layers.0.mlp.up_proj.weight"]        # a sum over several rows of texts
    assert not torch.equal(grad, grad.bfloat16().float())


@pytest.mark.parametrize("world, chosen, recompute, compute, tolerance", [
    (2, range(12), False, "float32", 2e-6), (4, range(3), True, "float32", 2e-6),
    (2, range(12), True, "bfloat16", 0.03)])
def test_gradients_do_not_depend_on_the_number_of_processes(forks, tmp_path, world, chosen, recompute, compute,
                                                            tolerance):
    """Two and four gloo processes with unequal token counts; of four, one has no text at all."""
    forks(WORKER, json.dumps([list(chosen), recompute, compute]), tmp_path / "out.pt", world=world)
    loss, grads, norm = torch.load(tmp_path / "out.pt")
    alone = gradients(texts_of(), list(chosen), 1, 0, 120)
    assert_same(alone, (loss, grads), tolerance)
    assert torch.allclose(norm, torch.stack([g.norm() for g in alone[1].values()]).norm(), rtol=5 * tolerance)


def test_a_process_of_several_joins_the_others_unless_it_has(monkeypatch):
    """What torchrun sets says which of how many it is; alone there is nothing to join."""
    joined = []
    monkeypatch.setattr(sft.dist, "init_process_group", lambda *args, **more: joined.append(args))
    assert distributed.init_distributed()[:2] == (0, 1) and not joined
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(sft.torch.cuda, "is_available", lambda: False)
    assert distributed.init_distributed() == (3, 4, torch.device("cpu")) and joined == [("gloo",)]
    monkeypatch.setattr(sft.dist, "is_initialized", lambda: True)
    assert distributed.init_distributed()[:2] == (3, 4) and len(joined) == 1


def test_device_cpu_is_the_cpu_also_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert distributed.init_distributed("cpu") == (0, 1, torch.device("cpu"))
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert distributed.choose_device("auto") == distributed.choose_device("cuda") == torch.device("cuda", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda: there is no GPU"):
        distributed.init_distributed("cuda")


def test_a_model_is_not_overwritten_by_what_is_made_of_it(tmp_path):
    cfg = SimpleNamespace(model=str(tmp_path), out=f"{tmp_path}/../{tmp_path.name}", device="cpu")
    with pytest.raises(ValueError, match="--model and --out are both .* would be overwritten; give two folders"):
        with distributed.joined(cfg, "rl.py"):
            pass


@pytest.mark.parametrize("has_units, name", [(True, "bfloat16"), (False, "float32")])
def test_products_are_in_bfloat16_where_the_gpu_has_units_for_it(monkeypatch, has_units, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_units)
    assert distributed.compute_type("auto", torch.device("cuda")) is getattr(torch, name)


def test_compiled_blocks_take_bfloat16_alone():
    with pytest.raises(ValueError, match="--kernels compiled needs products in bfloat16; found torch.float32"):
        distributed.build_model(SMALL, None, torch.device("cpu"), kernels="compiled", compute=torch.float32)


# -- the plan

PEAK = """
import os, re, sys, torch
import sft
from model import Config
from support import distributed
torch.set_num_threads(1)
for each in sys.argv[1:]:
    config, length, recompute, compute = eval(each)
    if (child := os.fork()) == 0:
        break
    os.waitpid(child, 0)
else:
    sys.exit()
now = lambda name: int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
def steps(config, length):
    model = distributed.build_model(config, None, torch.device("cpu"), recompute=recompute,
                                    compute=getattr(torch, compute))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    text = torch.arange(length // 4 + 1) % 250
    def row_of(*texts):
        return distributed.packed_rows(texts, range(len(texts)), 0, 1, 10**6)
    long = row_of(*[(text.tolist(), [True] * len(text))] * 4)
    short = row_of(([1, 2, 3], [False, True, True]))
    for rows in (short, short + long):        # the long one meets the optimizer's state and older gradients
        sft.nll_gradients(model, rows, 1, 1, torch.device("cpu"), config.vocab_size)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
steps(Config(num_hidden_layers=1), 64)      # libraries load what they need
before = now("VmRSS")
steps(config, length)
print(now("VmHWM") - before)
"""


PLANNED = [     # shape, tokens of a row, whether activations are computed again, type of the products
    (dict(hidden_size=256, intermediate_size=768), 2048, False, "float32"),
    (dict(vocab_size=20000, hidden_size=448, intermediate_size=2432, num_attention_heads=7, num_key_value_heads=1,
          num_hidden_layers=1), 256, True, "bfloat16")]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from /proc")
def test_planned_memory_is_what_training_takes():
    """A small model with long rows, where activations are nearly all, and a layer half as wide as the 0.5B's
    with a large vocabulary, where weights are: within 15 % of how far the resident set grows, each in a process of its
    own. glibc is told to give back what is freed at once, since it is tensors that are planned."""
    cases = [(Config(**shape), *more) for shape, *more in PLANNED]
    out = subprocess.run([sys.executable, "-c", PEAK, *map(repr, cases)],
                         check=True, capture_output=True, text=True, env={
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), "MALLOC_MMAP_THRESHOLD_": "1000000",
        "MALLOC_TRIM_THRESHOLD_": "1000000", "MALLOC_ARENA_MAX": "1"}).stdout.split()
    assert len(out) == len(cases)
    for (config, length, recompute, compute), grown in zip(cases, out):
        parts = distributed.plan_memory(config, length, 1, getattr(torch, compute), recompute)
        assert sum(parts.values()) == pytest.approx(int(grown), rel=0.15), (compute, parts)


def test_a_plan_needs_neither_gpu_nor_weights(capsys, tmp_path):
    """The 7B's figures by hand: 7,615,616,512 weights of 16 bytes on 8 GPUs are 14.19 GiB. Other flags override the
    preset's."""
    assert sft.main(["--preset", "7b", "--plan", "--trajectories", "nowhere"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in ("7,615,616,512 weights", "actor 14.19", "255 GiB of disk"):
        assert part in said
    assert sft.main(["--gpus", "1", "--preset", "7b", "--plan", "--trajectories", str(tmp_path)]) == 0
    assert "actor 113.48" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit):
        sft.main(["--plan", "--model", "9b"])
    assert "no preset '9b'" in capsys.readouterr().err
    assert sft.main(["--plan", "--trajectories", "nowhere"]) == 0
    assert "tiny: 854,144 weights" in capsys.readouterr().out


def test_weights_are_counted():
    """num_parameters against the model's own."""
    for config in (SMALL, Config(tie_word_embeddings=False)):
        model = Qwen2.from_scratch(config)
        assert distributed.num_parameters(config)[-1] == sum(p.numel() for p in model.parameters())


def test_a_plan_counts_each_model_of_reinforcement_learning():
    """The 7B's parts by hand, on 8 GPUs with 8 rows of 16,384 tokens of 28 layers and 2 * 512 numbers of 2 bytes."""
    num = 7_615_616_512
    parts = distributed.plan_memory(Config.preset("7b"), 16384, 8, critic=True, reference=True,
                                    sampled_tokens=8 * 16384)
    assert parts["actor"] == parts["critic"] == 16 * num // 8 and parts["reference"] == 4 * num // 8
    assert parts["sampling copy"] == 2 * num and parts["KV cache"] == 28 * 2 * 512 * 2 * 8 * 16384
    alone = distributed.plan_memory(Config.preset("7b"), 16384, 8)
    assert set(alone) == {"actor", "gathered", "activations", "backward"}
    assert all(alone[name] == parts[name] for name in alone)


def test_the_peak_of_a_cpu_is_that_of_the_fastest_product_on_each_core(measured_peak, monkeypatch):
    """2 * 512^3 operations; where processes compute rows in threads, on all cores at once."""
    products = []

    def repeat(product, number, repeat):
        products.append(product())
        return [3.0, 2.0, 4.0]
    monkeypatch.setattr(logs.timeit, "repeat", repeat)
    monkeypatch.setattr(logs, "SLOTS", Slots(6))
    for threads, flops in ((None, 2**27), (ThreadPoolExecutor(1), 6 * 2**27)):
        assert measured_peak(torch.device("cpu"), torch.float32, threads) == flops
    assert [product.shape for product in products] == 2 * [(512, 512)]


# -- whole runs

def conversations(path, num=12):
    """A user's own file: questions of different lengths with short answers."""
    path.write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": f"What comes after {i}? " + "Think. " * (i % 5)},
        {"role": "assistant", "content": f"{i + 1} follows {i}."}]}) + "\n" for i in range(num)))
    return path


KILLER = """
import json, os, random, signal, sys
import torch
import sft
torch.set_num_threads(1)
kills, argv, random, save = json.loads(sys.argv[1]), sys.argv[2:], random.Random(0), torch.save
def begin(tear=None):
    moment = random.uniform(0, 1.5)     # steps after the beginning of the second save
    if pid := os.fork():
        return pid
    calls, fatal, at_save = 0, None, []
    def count(frame, event, arg):
        nonlocal calls
        calls += 1
        if calls == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
    def save_or_die(state, path):
        nonlocal fatal
        at_save.append(calls)
        if len(at_save) == 2 and tear is False:
            fatal = calls + 1 + int(moment * (at_save[1] - at_save[0]))
        save(state, path)
        if len(at_save) == 2 and tear:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save = save_or_die
    sys.setprofile(count)
    status = sft.main(argv)
    sys.stdout.flush()
    os._exit(status)
for tear in kills:
    assert os.waitpid(begin(tear), 0)[1] == signal.SIGKILL, "it was not killed"
sys.exit(os.waitstatus_to_exitcode(os.waitpid(begin(), 0)[1]))
"""


def train(forks, tmp_path, out, *flags, kills=()):
    """sft.py in a process of its own that dies at its second save, once for each of `kills`, and is started again; the
    last time it is left alone, always by kill -9. True: the file half written. False: up to one and a half steps later,
    counted in calls of functions, so that no clock has a say. Forked, so that they share the imports."""
    forks(KILLER, json.dumps(kills), "--model", tmp_path / "small", "--trajectories", tmp_path / "own.jsonl",
          "--batch=4", "--lr=1e-3", "--save-every=1", "--out", tmp_path / out, *flags)
    lines = [json.loads(line) for line in (tmp_path / out / "log.jsonl").read_text().splitlines()]
    # a step that was done again after a kill counts as it was done last
    return {line["step"]: [line.get(name) for name in ("loss", "grad_norm", "lr", "valid_loss", "valid_accuracy")]
            for line in lines}, list(Qwen2.from_pretrained(tmp_path / out).parameters())


@pytest.mark.parametrize("flags, kills", [
    (("--updates", "12"), [True, False] * 2), (("--updates", "5", "--dtype", "bfloat16"), [False])])
def test_a_killed_run_goes_on_bit_for_bit(forks, tmp_path, flags, kills):
    """Four deaths, half of them in the middle of a save: curve and weights are those of a run left alone."""
    conversations(tmp_path / "own.jsonl")
    Qwen2.from_scratch(SMALL).save_pretrained(tmp_path / "small")
    Tokenizer.of_bytes().save(tmp_path / "small")
    whole, weights = train(forks, tmp_path, "whole", *flags)
    torn, others = train(forks, tmp_path, "torn", *flags, kills=kills)
    steps = int(flags[1])
    assert torn == whole and sorted(whole) == list(range(1, steps + 1)) and whole[steps][0] < whole[1][0]
    assert all(torch.equal(a, b) for a, b in zip(weights, others))
    assert Tokenizer.from_pretrained(tmp_path / "torn").size == 259
    assert sorted(p.name for p in (tmp_path / "torn/checkpoints").glob("step-*")) == [
        f"step-{steps - 1:06d}", f"step-{steps:06d}"]


GROUP = """
import os, sys
import torch
import sft
save, saves, fatal = torch.save, [], int(sys.argv[1])
def save_or_die(state, path):
    saves.append(path)
    if len(saves) == fatal and rank == 1:       # the other is anywhere around the same save
        os.killpg(0, 9)
    save(state, path)
torch.save = save_or_die
sys.exit(sft.main(sys.argv[2:]))
"""


def test_a_killed_run_of_two_processes_goes_on_bit_for_bit(forks, tmp_path):
    """Each checkpoint follows a validation, a forward without a backward: it holds each process's rows in fp32, and
    their moments. Killed at the second, the run ends as one that was left alone."""
    conversations(tmp_path / "own.jsonl")
    Qwen2.from_scratch(SMALL).save_pretrained(tmp_path / "small")
    Tokenizer.of_bytes().save(tmp_path / "small")
    flags = ["--model", tmp_path / "small", "--trajectories", tmp_path / "own.jsonl", "--batch=4", "--lr=1e-3",
             "--updates=6", "--save-every=2", "--dtype=bfloat16"]
    found = {}
    for name, lives in (("whole", [0]), ("torn", [2, 0])):
        for fatal in lives:
            forks.start(GROUP, fatal, *flags, "--out", tmp_path / name, world=2)
            assert [code for code, _ in forks.end()] == ([-9, -9] if fatal else [0, 0])
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        found[name] = {line["step"]: (line["loss"], line["grad_norm"], line.get("valid_loss")) for line in lines}
    assert found["whole"] == found["torn"] and sorted(found["torn"]) == [*range(1, 7)] and len(lines) > 6
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "torn" / file).read_bytes()
    files = sorted((tmp_path / "torn/checkpoints").glob("step-??????/rank-?.pt"))
    assert len(files) == 4
    for file, other in zip(files, sorted((tmp_path / "whole/checkpoints").glob("step-??????/rank-?.pt"))):
        one = torch.load(file)
        two = torch.load(other)
        assert all(torch.equal(one["model"][name], two["model"][name]) for name in two["model"])
        for (name, rows), moments in zip(one["model"].items(), one["optimizer"]):
            whole = Qwen2.from_scratch(SMALL).get_parameter(name)
            assert rows.shape[0] == -(-whole.shape[0] // 2) - (whole.shape[0] % 2 and "rank-1" in file.name), name
            assert rows.dtype is torch.float32 and moments["step"] == int(file.parent.name.removeprefix("step-"))
            assert moments["exp_avg"].shape == moments["exp_avg_sq"].shape == rows.shape, name


def fine_tune(tmp_path, *flags):
    return sft.main(["--model", "tiny", "--trajectories", str(tmp_path / "own.jsonl"), "--out", str(tmp_path / "out"),
                     "--batch", "4", "--updates", "2", *flags])


def test_a_training_goes_on_with_what_it_began_with(tmp_path, capsys):
    """Other settings, weights, texts or an end elsewhere, which is another learning rate, are refused; so is nothing
    that is the same under another name."""
    own = conversations(tmp_path / "own.jsonl")
    small = tmp_path / "small"
    Qwen2.from_scratch(SMALL).save_pretrained(small)
    Tokenizer.of_bytes().save(small)
    flags = ["--model", str(small)]
    file = tmp_path / "out/log.jsonl"
    file.parent.mkdir()
    file.write_text('{"step": 1, "loss": 9}\n{"st')      # of a run that ended before its first checkpoint
    assert fine_tune(tmp_path, *flags) == 0
    log = file.read_bytes()
    assert [json.loads(line)["step"] for line in log.splitlines()] == [1, 2]
    file.write_bytes(log + b'{"st')         # cut short by a kill

    def refused(words, *more):
        assert fine_tune(tmp_path, *flags, *more) == 2
        said = capsys.readouterr().err
        assert re.search(rf"is of a run with {words}; give these again", said), said
    refused(r"--lr 2e-05 \(now 0.5\)", "--lr", "0.5")
    refused(r"optimizer steps 2 \(now 3\)", "--updates", "3")
    Qwen2.from_scratch(SMALL, seed=1).save_pretrained(small)
    refused(r"--model of sha256 (\w{16}) \(now (?!\1)\w{16}\)")
    Qwen2.from_scratch(SMALL).save_pretrained(small)
    text = own.read_text()
    own.write_text(text.replace("follows 7", "succeeds 7"))
    refused(r"texts of sha256 (\w{16}) \(now (?!\1)\w{16}\)")
    own.write_text(text)
    shutil.copytree(small, tmp_path / "copy")
    assert fine_tune(tmp_path, "--model", str(tmp_path / "copy"), "--save-every", "1") == 0
    assert "already trained, for 2 steps" in capsys.readouterr().out
    assert file.read_bytes() == log


def test_what_a_rename_promises_is_on_the_disk_first(tmp_path, monkeypatch):
    """A checkpoint's file and folder; a model's weights before the config that makes them a model."""
    done = []
    fsync = os.fsync
    rename = Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (fsync(fd), done.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)))
    monkeypatch.setattr(Path, "rename", lambda path, to: (rename(path, to), done.append(f"to {to.name}")))
    model = Qwen2.from_scratch(SMALL)
    distributed.save_state(sft.Settings(out=str(tmp_path)), 3, model, torch.optim.AdamW(model.parameters()), {})
    assert done == ["rank-0.pt", "step-000003.part", "to step-000003", "checkpoints"]
    done.clear()
    model.save_pretrained(tmp_path / "model")
    config, = [name for name in done if name.startswith("config.json.") and name.endswith(".part")]
    assert done == ["model", "model-00001.safetensors", "to model.safetensors", "model", config, "model"]
    done.clear()
    files.write_atomic(tmp_path / "manifest.json", {"a": 1})
    assert len(done) == 1 and done[0].endswith(".part")
    assert json.loads((tmp_path / "manifest.json").read_text()) == {"a": 1}


def test_a_checkpoint_that_cannot_be_written_is_named(tmp_path):
    """As on a full disk: here no file may have more than 100 kB."""
    model = Qwen2.from_scratch(SMALL)
    optimizer = torch.optim.AdamW(model.parameters())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="step-000003.part/rank-0.pt cannot be written; is the disk full?"):
            distributed.save_state(sft.Settings(out=str(tmp_path)), 3, model, optimizer, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    distributed.save_state(sft.Settings(out=str(tmp_path)), 3, model, optimizer, {})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


def test_a_log_is_readied_for_more_lines(tmp_path):
    """Where a run goes on, without a last line that was cut short; where none does, there is none."""
    path = tmp_path / "log.jsonl"
    for goes_on in ({"step": 1}, None):
        files.begin_log(path, goes_on)
        assert not path.exists()
    for text, kept in (('{"step": 1}\n{"step": 2}\n{"st', '{"step": 1}\n{"step": 2}\n'), ('{"st', ""),
                       ('{"step": 1}\n', '{"step": 1}\n')):
        path.write_text(text)
        files.begin_log(path, {"step": 1})
        assert path.read_text() == kept
    files.begin_log(path, None)
    assert not path.exists()


def test_what_was_loaded_does_not_stay(tmp_path):
    """Of a checkpoint nothing is read to a GPU, and its weights and moments are not kept beside the model's own."""
    model = Qwen2.from_scratch(SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    s = sft.Settings(out=str(tmp_path))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    distributed.save_state(s, 1, model, optimizer, {"a": 1}, more=[3])
    load = torch.load
    places = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *args, **more: places.append(more["map_location"]) or load(*args, **more))
        state = distributed.load_state(s, ["lr"], model, optimizer, {"a": 1})
    assert places == ["cpu"] and state["step"] == 1 and state["more"] == [3] and not {"model", "optimizer"} & set(state)


def test_who_validates_is_drawn_by_trajectory():
    """Of 90 texts in trajectories of 9 about 5 % are 1 trajectory, of 100 in ones of 1 exactly 5; all or none of each.
    The steps of a trajectory alone are parted."""
    for size, num, held in ((9, 10, 9), (1, 100, 5), (8, 40, 16), (7, 2, 7)):
        origins = [f"trajectory {i // size}" for i in range(size * num)]
        found = [hold_back(origins, 0.05, seed) for seed in range(4)]
        assert all(len(each) == held for each in found) and (num == 2 or len(set(map(frozenset, found))) > 1)
        for each in found:
            assert not {origins[i] for i in each} & {one for i, one in enumerate(origins) if i not in each}
    assert len(hold_back(["a"] * 40, 0.05, 0)) == 2 and hold_back([], 0.05, 0) == set()
    several = [*"aaabbc"]
    assert all(hold_back(several, 0.01, seed) in ({0, 1, 2}, {3, 4}, {5}) for seed in range(9))


def test_two_trainings_in_one_folder_are_refused(tmp_path, capsys):
    conversations(tmp_path / "own.jsonl")
    with files.folder_lock(tmp_path / "out", "sft.py"):
        assert fine_tune(tmp_path) == 2 and "another sft.py writes to" in capsys.readouterr().err


def test_what_cannot_be_trained_is_said(tmp_path, capsys):
    """Conversations that are cut, that have no reply before the cut, that hold nothing usable, and too few of them."""
    own = conversations(tmp_path / "own.jsonl", num=1)
    assert fine_tune(tmp_path) == 2 and "too few to train on" in capsys.readouterr().err
    conversations(own, num=9)
    lengths = [len(ids) - 1 for ids, _ in sft.build_dataset(sft.Settings(trajectories=str(own)), Tokenizer.of_bytes(),
                                                            log=lambda line: None)[0]]
    longest = max(lengths)
    assert fine_tune(tmp_path, "--max-row-tokens", str(longest - 1)) == 0
    assert f"cut at {longest - 1} tokens: " in (said := capsys.readouterr().out) and f"{own}, line" in said
    assert fine_tune(tmp_path, "--max-row-tokens", "70") == 2
    said = capsys.readouterr()
    assert "left out, no reply before the cut: " in said.out and "too few" in said.err
    own.write_text("\n".join(['{"messages": [{"role": "user", "content": "hm"}]}',
                              '{"messages": [{"role": "tool", "content": "x"}]}', "{"]))
    assert fine_tune(tmp_path) == 2
    said = capsys.readouterr().err
    for why in ("there is nothing to train on", "left out, no turn of the assistant: 1", "unknown role 'tool': 1",
                "left out, not JSON: 1", f"{own}, line 3"):
        assert why in said
    own.write_text("")
    assert fine_tune(tmp_path) == 2 and "there is nothing to train on" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        fine_tune(tmp_path, "--dtype", "float16")
    assert "--dtype must be auto" in capsys.readouterr().err


def test_a_file_without_a_model_that_learns_from_it_is_one_sentence(tmp_path, capsys):
    """The miniature would collect into it."""
    own = conversations(tmp_path / "own.jsonl")
    before = own.read_bytes()
    assert sft.main(["--trajectories", str(own), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    last = said.err.splitlines()[-1]
    assert last.startswith(f"sft.py: {own} is a file of conversations") and "--model DIR, or --model tiny" in last
    assert "Traceback" not in said.err and "1. Collecting" not in said.out and own.read_bytes() == before


def test_a_loss_that_is_no_number_stops_the_run_and_names_step_rank_and_batch(tmp_path, capsys):
    conversations(tmp_path / "own.jsonl")
    model = Qwen2.from_scratch(Config.preset("tiny"))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    model.save_pretrained(tmp_path / "ill")
    Tokenizer.of_bytes().save(tmp_path / "ill")
    assert fine_tune(tmp_path, "--model", str(tmp_path / "ill")) == 1
    said = capsys.readouterr().err
    batch = distributed.batch_indices(11, 0, 4, 0)       # 12 conversations, of which one validates
    assert f"step 1: loss nan, gradient norm nan; rank 0, conversations {sorted(batch)}" in said
    assert not (tmp_path / "out/checkpoints").exists()


def test_a_step_and_the_folder_are_those_of_transformers(tmp_path):
    """On a real checkpoint in fp32: loss and gradient norm of three packed conversations against a plain loop over them
    with transformers and log_softmax; after an update the written folder gives the same logits there."""
    peer = pytest.importorskip("transformers", reason="transformers is the peer this is compared with; pip install it")
    real = os.environ.get("MLAGENT_MODEL", "")
    if not Path(real or "-").is_dir():
        pytest.skip("set MLAGENT_MODEL to the folder of a real Qwen2.5 checkpoint to run this")
    tokenizer = Tokenizer.from_pretrained(real)
    device = torch.device("cpu")
    texts = [tokenizer.conversation([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
             for question, answer in (("Name a prime.", "7"), ("What is 2 + 2?", "It is 4."), ("Say it.", "It! " * 9))]
    num = sum(sum(chosen) for _, chosen in texts)

    def theirs(folder):
        return peer.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def norm_of(model):
        return torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()

    model = theirs(real)
    expected = 0.0
    for ids, chosen in texts:
        logp = model(torch.tensor([ids])).logits[0, :, :tokenizer.size].log_softmax(-1)
        loss = -sum(logp[i, ids[i + 1]] for i in range(len(ids) - 1) if chosen[i + 1]) / num
        loss.backward()
        expected += loss.item()
    norm = norm_of(model)
    del model, logp, loss
    model = distributed.build_model(Config.from_pretrained(real), Path(real), device, compute=torch.float32)
    rows = distributed.packed_rows(texts, range(3), 0, 1, 1000)
    assert len(rows) == 1
    assert sft.nll_gradients(model, rows, num, 1, device, tokenizer.size).item() == pytest.approx(expected, rel=1e-4)
    assert norm_of(model) == pytest.approx(norm, rel=1e-4)
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    model.zero_grad()
    distributed.export_model(model, tokenizer, tmp_path / "out")
    tokens = torch.tensor([texts[2][0]])
    with torch.no_grad():
        ours = model(tokens)
        del model
        other = theirs(tmp_path / "out")(tokens).logits
    assert (ours - other).abs().max() <= 1e-4 * other.abs().max()


def test_the_cosine_by_hand():
    assert sft.cosine(0, 10, 2.0) == 2.0 and sft.cosine(5, 10, 2.0) == pytest.approx(1.0)
    assert sft.cosine(10, 10, 2.0) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("name, value", [("batch", 0), ("max_row_tokens", -1), ("lr", math.nan), ("lr", math.inf),
                                         ("epochs", 0.0), ("updates", 0), ("save_every", 0)])
def test_a_setting_that_cannot_train_is_refused(name, value):
    with pytest.raises(ValueError, match="must be above 0"):
        sft.Settings(**{name: value})


def test_one_folder_for_trajectories_and_model_is_refused(tmp_path, capsys):
    assert sft.main(["--preset=tiny", f"--trajectories={tmp_path}", f"--out={tmp_path}"]) == 2
    assert "give two folders" in capsys.readouterr().err
