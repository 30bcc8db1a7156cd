"""Training: equalities that must hold whatever the batching, the packing and the number of processes."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sft
from model import Config, Qwen2
from sample import Tokenizer

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
    model.compute = compute
    rows = sft.rows_of(texts, chosen, rank, world, longest)
    num = sum(sum(texts[i][1]) for i in chosen)
    loss = sft.add_gradients(model, rows, num, 1, torch.device("cpu"), 259)
    return loss, {name: p.grad for name, p in model.named_parameters()}


def assert_same(one, other, tolerance=1e-6):
    assert torch.allclose(one[0], other[0], rtol=tolerance)
    for name, grad in one[1].items():
        assert (grad - other[1][name]).norm() <= tolerance * max(grad.norm(), 1e-3), name


def test_gradients_do_not_depend_on_how_texts_are_packed():
    texts, chosen = texts_of(), list(range(12))
    whole = gradients(texts, chosen, 1, 0, longest=10_000)
    for longest in (300, 120, 60):
        assert_same(whole, gradients(texts, chosen, 1, 0, longest))
    assert_same(whole, gradients(texts, chosen[::-1], 1, 0, 120))


def test_packing_loses_nothing_and_keeps_the_limit():
    lengths = [5, 9, 1, 7, 3, 10, 2]
    rows = sft.pack(lengths, 10)
    assert sorted(i for row in rows for i in row) == list(range(7))
    assert all(sum(lengths[i] for i in row) <= 10 for row in rows)
    assert rows == [[0, 2, 4], [1], [3, 6], [5]]        # first fit, by hand


def test_each_epoch_has_each_text_once_in_an_order_of_its_own():
    seen = [i for step in range(6) for i in sft.batch_of(9, step, 3, seed=5)]
    assert sorted(seen[:9]) == sorted(seen[9:]) == list(range(9)) and seen[:9] != seen[9:]
    assert seen == [i for step in range(3) for i in sft.batch_of(9, step, 6, seed=5)]


def test_only_what_the_assistant_chose_has_a_gradient():
    """d loss / d logits is 0 at every position but those before a chosen token, the end of turn among them."""
    t = Tokenizer.of_bytes()
    ids, chosen = t.conversation([{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}])
    tokens, lengths, targets = sft.row_of([(ids, chosen)], "cpu")
    model = Qwen2.from_scratch(SMALL, seed=1)
    kept = {}
    model.model.norm.register_forward_hook(lambda m, i, o: (o.retain_grad(), kept.update(x=o)) and None)
    model(tokens, lengths=lengths, targets=targets, size=259)[0].sum().backward()
    nonzero = kept["x"].grad[0].abs().sum(-1) > 0
    assert nonzero.tolist() == chosen[1:] and ids[1:][nonzero.nonzero()[-1].item()] == t.end


WORKER = """
import json, os, sys, torch
import sft, test_train as t
torch.manual_seed(0)
rank, world, device = sft.processes()
texts = t.texts_of()
chosen = list({chosen!r})
model = sft.build(t.SMALL, None, device, seed=1, recompute={recompute}, compute=torch.{compute})
rows = sft.rows_of(texts, chosen, rank, world, 120)
num = sum(sum(texts[i][1]) for i in chosen)
loss = sft.add_gradients(model, rows, num, world, device, 259)
torch.distributed.all_reduce(loss)
norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).full_tensor()
grads = {{name: p.grad.full_tensor() for name, p in model.named_parameters()}}
if rank == 0:
    torch.save((loss, grads, norm), sys.argv[1])
torch.distributed.destroy_process_group()
"""


def test_products_in_bf16_leave_weights_and_gradients_in_fp32():
    """The gradients are those of fp32 within the rounding of bf16 (2^-9 a product), and are not rounded to bf16."""
    whole, mixed = gradients(texts_of(), range(12), 1, 0, 300), gradients(texts_of(), range(12), 1, 0, 300,
                                                                          torch.bfloat16)
    assert_same(whole, mixed, 0.03)
    assert all(grad.dtype is torch.float32 for grad in mixed[1].values())
    grad = mixed[1]["model.layers.0.mlp.up_proj.weight"]        # a sum over several rows of texts
    assert not torch.equal(grad, grad.bfloat16().float())


@pytest.mark.parametrize("world, chosen, recompute, compute, tolerance", [
    (2, range(12), False, "float32", 2e-6), (4, range(3), True, "float32", 2e-6), (2, range(12), True, "bfloat16", 0.03)])
def test_gradients_do_not_depend_on_the_number_of_processes(tmp_path, world, chosen, recompute, compute, tolerance):
    """Two and four gloo processes with unequal token counts; of four, one has no text at all."""
    code = WORKER.format(chosen=list(chosen), recompute=recompute, compute=compute)
    (tmp_path / "worker.py").write_text(code)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world),
                    str(tmp_path / "worker.py"), str(tmp_path / "out.pt")], check=True, timeout=240,
                   env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}:{HERE.parent}"},
                   capture_output=True)
    loss, grads, norm = torch.load(tmp_path / "out.pt")
    alone = gradients(texts_of(), list(chosen), 1, 0, 120)
    assert_same(alone, (loss, grads), tolerance)
    assert torch.allclose(norm, torch.stack([g.norm() for g in alone[1].values()]).norm(), rtol=5 * tolerance)


# -- whole runs

def conversations(path, num=12):
    """A user's own file: questions of different lengths with short answers."""
    path.write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": f"What comes after {i}? " + "Think. " * (i % 5)},
        {"role": "assistant", "content": f"{i + 1} follows {i}."}]}) + "\n" for i in range(num)))
    return path


def run(tmp_path, out, *flags, kill_after=None, **options):
    command = [sys.executable, str(HERE.parent / "sft.py"), "--model", "tiny", "--trajectories",
               str(tmp_path / "own.jsonl"), "--out", str(tmp_path / out), "--batch", "4", "--steps", "8", "--lr", "1e-3",
               "--save-every", "1", "--validate-every", "4", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)
    if kill_after is not None:
        deadline = time.monotonic() + 120
        while not Path(tmp_path, out, f"checkpoints/step-{kill_after:06d}").exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()
    return process.communicate(timeout=200)[0], process.returncode


def curve(folder):
    """{step: (loss, norm, lr)} of a log; a step that was done again after a kill counts as it was done last."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines() if line.endswith("}")]
    return {line["step"]: (line["loss"], line["grad_norm"], line["lr"]) for line in lines}


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    """kill -9 as soon as checkpoints 1, 3 and 6 are there, which is in the step after, then to the end: the curve and
    the weights are those of a run that was left alone; the result loads as an ordinary folder and has learned."""
    conversations(tmp_path / "own.jsonl")
    out, code = run(tmp_path, "whole")
    assert code == 0, out
    for step in (1, 3, 6):
        run(tmp_path, "torn", kill_after=step)
    out, code = run(tmp_path, "torn")
    assert code == 0, out
    whole, torn = curve(tmp_path / "whole"), curve(tmp_path / "torn")
    assert torn == whole and len(whole) == 8 and whole[8][0] < whole[1][0]
    models = [Qwen2.from_pretrained(tmp_path / name) for name in ("whole", "torn")]
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models)))
    assert Tokenizer.from_pretrained(tmp_path / "whole").size == 259
    assert sorted(p.name for p in (tmp_path / "whole/checkpoints").iterdir()) == ["step-000007", "step-000008"]


def test_what_cannot_be_trained_is_said(tmp_path):
    conversations(tmp_path / "own.jsonl", num=1)
    out, code = run(tmp_path, "out")
    assert code == 2 and "too few to train on" in out
    conversations(tmp_path / "own.jsonl", num=9)
    out, code = run(tmp_path, "out", "--length", "90", "--steps", "1")
    assert "cut at 90 tokens" in out or "no reply before the cut" in out
    out, code = run(tmp_path, "out", "--lr", "1e30", "--steps", "3")
    assert code == 1 and ("rank 0: loss nan" in out or "rank 0: loss inf" in out)


def test_the_cosine_by_hand():
    assert sft.cosine(0, 10, 2.0) == 2.0 and sft.cosine(5, 10, 2.0) == pytest.approx(1.0)
    assert sft.cosine(10, 10, 2.0) == pytest.approx(0.0, abs=1e-12)
