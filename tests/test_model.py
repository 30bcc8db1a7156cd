"""The architecture and its checkpoints: against transformers where it is installed, and against plain restatements."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import model
import sample
from model import IGNORE, Config, Linear, LinearLogProb, Qwen2
from support.pretrained import find_folder, hash_checkpoint
from support.tokenizer import Tokenizer
from support import cpu_linear

ODD = Config(vocab_size=301, hidden_size=48, intermediate_size=88, num_hidden_layers=2, num_attention_heads=6,
             num_key_value_heads=2, tie_word_embeddings=False)
REAL = os.environ.get("MLAGENT_MODEL", "")


@pytest.fixture
def real():
    if not Path(REAL or "-").is_dir():
        pytest.skip("set MLAGENT_MODEL to the folder of a real Qwen2.5 checkpoint to run this")
    return REAL


@pytest.fixture
def peer():
    return pytest.importorskip("transformers", reason="transformers is the peer this is compared with; pip install it")


def tokens_of(config, B, T, seed=0):
    return torch.randint(config.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name, count", [           # the counts published with each size
    ("0.5b", 494_032_768), ("1.5b", 1_543_714_304), ("3b", 3_085_938_688), ("7b", 7_615_616_512),
    ("14b", 14_770_033_664), ("32b", 32_763_876_352)])
def test_presets_have_the_published_number_of_parameters(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in Qwen2(Config.preset(name)).parameters()) == count


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers_on_random_weights(peer, tmp_path, tied):
    config = Config(**{**vars(ODD), "tie_word_embeddings": tied})
    model = Qwen2.from_scratch(config, seed=1)
    with torch.no_grad():
        for name, p in model.named_parameters():       # biases and norms too, so that none can be forgotten
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    model.save_pretrained(tmp_path)
    theirs = peer.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = tokens_of(config, 3, 70)
    with torch.no_grad():
        assert (model(tokens) - theirs(tokens).logits).abs().max() < 2e-5


def test_a_token_sees_no_later_one():
    model = Qwen2.from_scratch(ODD)
    tokens = tokens_of(ODD, 1, 12)
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % ODD.vocab_size
    with torch.no_grad():
        before = model(tokens)[0]
        after = model(changed)[0]
    assert torch.equal(before[:8], after[:8]) and not torch.allclose(before[8:], after[8:])


@pytest.mark.parametrize("shard_bytes", [10**9, 40_000])
@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load_give_the_same_model(tmp_path, tied, shard_bytes):
    config = Config(**{**vars(ODD), "tie_word_embeddings": tied})
    model = Qwen2.from_scratch(config, seed=3)
    model.save_pretrained(tmp_path, max_shard_bytes=10_000)         # shards of an earlier save must not stay behind
    model.save_pretrained(tmp_path, max_shard_bytes=shard_bytes)
    again = Qwen2.from_pretrained(tmp_path)
    files = sorted(f.name for f in tmp_path.glob("*.safetensors"))
    assert again.config == config and all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    if shard_bytes == 10**9:
        assert files == ["model.safetensors"]
    else:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert len(files) > 1 and set(index["weight_map"].values()) == set(files)
        assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
        largest = max(p.nbytes for p in model.parameters())
        assert all(sum(t.nbytes for t in load_file(tmp_path / f).values()) <= max(shard_bytes, largest) for f in files)


@pytest.mark.parametrize("shard_bytes", [10**9, 40_000])
def test_who_may_read_a_saved_config_may_read_its_weights(tmp_path, shard_bytes):
    before = os.umask(0o027)
    try:
        Qwen2.from_scratch(ODD).save_pretrained(tmp_path, max_shard_bytes=shard_bytes)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert set(modes.values()) == {0o640} and (len(modes) == 2) == (shard_bytes == 10**9)


def test_loading_converts_to_the_dtype_asked_for_and_leaves_nothing_on_meta(tmp_path):
    Qwen2.from_scratch(ODD).save_pretrained(tmp_path)
    model = Qwen2.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "cpu")}


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_head_beside_tied_weights_is_left_out(tmp_path):
    """As some tools write it; the config says that the embedding is the head."""
    model = Qwen2.from_scratch(Config(**{**vars(ODD), "tie_word_embeddings": True}), seed=3)
    model.save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBED].clone()}))
    again = Qwen2.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


K = "model.layers.1.self_attn.k_proj.bias"
EMBED = "model.embed_tokens.weight"
DAMAGES = {
    "missing": (lambda f: edit_tensors(f, lambda t: t.pop(K)), ["1 missing", K]),
    "extra": (lambda f: edit_tensors(f, lambda t: t.update(bonus=torch.zeros(2))), ["1 unexpected: bonus"]),
    "shape": (lambda f: edit_tensors(f, lambda t: t.update({K: torch.zeros(9)})), [K, "expected (16,), found (9,)"]),
    "two at once": (lambda f: edit_tensors(f, lambda t: (t.pop(K), t.update({EMBED: torch.zeros(2, 2)}))),
                    ["1 missing", K, "1 of another shape", EMBED]),
    "no config": (lambda f: (f / "config.json").unlink(), ["holds no config.json"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["lacks 'model.safetensors'"]),
    "torn file": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
                  ["model.safetensors is damaged"]),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), ["is not JSON"]),
    "other family": (lambda f: edit_config(f, model_type="llama"), ["'llama'", "'qwen2'"]),
    "scaled rope": (lambda f: edit_config(f, rope_scaling={"type": "yarn", "factor": 4}), ["scaled rotary"]),
    "lost shard": (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
                   ["lacks 'b.safetensors'"]),
    "a list for a config": (lambda f: (f / "config.json").write_text("[]"),
                            ["config.json: expected an object, found a list"]),
    "deep config": (lambda f: (f / "config.json").write_text("[" * 100_000), ["is not JSON"]),
    "a text for a number": (lambda f: edit_config(f, hidden_size="96"), ["'hidden_size': expected a whole number", "found '96'"]),
    "no heads": (lambda f: edit_config(f, num_attention_heads=0), ["'num_attention_heads': expected a whole number from 1"]),
    "key heads": (lambda f: edit_config(f, num_key_value_heads=4),
                  ["config.json: num_attention_heads 6 must be a multiple of num_key_value_heads 4"]),
    "layers for ever": (lambda f: edit_config(f, num_hidden_layers=10**12), ["'num_hidden_layers': expected a whole number from 1 to 1024"]),
    "no float": (lambda f: edit_config(f, rope_theta=10**400), ["'rope_theta': expected a number above 0"]),
    "odd rope": (lambda f: edit_config(f, rope_scaling=[1]), ["scaled rotary"]),
    "odd index": (lambda f: (f / "model.safetensors.index.json").write_text("[1]"),
                  ["index.json: expected an object, found a list"]),
    "an index without a map": (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": [1]}'),
                               ["missing: "]),
    "a number for a file": (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": [1]}}'),
                            ["lacks '[1]'"]),
    "a file elsewhere": (lambda f: (f / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {"a": str(f / "model.safetensors")}})), ["lacks '/"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_clear_error(tmp_path, damage):
    Qwen2.from_scratch(ODD).save_pretrained(tmp_path)
    spoil, said = DAMAGES[damage]
    spoil(tmp_path)
    with pytest.raises(ValueError) as error:
        Qwen2.from_pretrained(tmp_path)
    assert all(words in str(error.value) for words in said), str(error.value)


def test_only_files_count_as_what_a_model_is_read_from(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    sha = hash_checkpoint(tmp_path)
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "link.safetensors").symlink_to("nowhere")
    assert hash_checkpoint(tmp_path) == sha


def test_a_name_that_is_neither_folder_nor_hub_id_is_refused():
    with pytest.raises(ValueError, match="no model folder"):
        find_folder("/nowhere/at/all")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 64, 65])
def test_every_form_of_the_linear_layer_is_the_same_product(dtype, tolerance, rows):
    g = torch.Generator().manual_seed(rows)
    layer = Linear(123, 41, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(41, 123, generator=g))
        layer.bias.copy_(torch.randn(41, generator=g))
    x = torch.randn(rows, 1, 123, generator=g).to(dtype)
    plain = x.double() @ layer.weight.double().T + layer.bias.double()
    with torch.no_grad():
        unpacked = layer(x)
        cpu_linear.pack(layer)
        packed = layer(x)
    for y in (unpacked, packed):
        assert y.shape == (rows, 1, 41) and (y - plain).abs().max() <= tolerance * plain.abs().max()
    assert layer(x).requires_grad       # with gradients on, the differentiable form


def test_a_weight_that_is_no_number_is_packed_and_spoils_its_own_output_alone():
    layer = Linear(16, 8)
    x = torch.ones(4, 16)
    with torch.no_grad():
        layer.weight.fill_(0.5)
        layer.bias.fill_(1)
        layer.weight[3, 5] = torch.nan
        cpu_linear.pack(layer)
        y = layer(x)
    others = [0, 1, 2, 4, 5, 6, 7]
    assert y[:, 3].isnan().all() and torch.equal(y[:, others], torch.full((4, 7), 9.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_with_packed_weights_scores_targets_and_trains_as_before(dtype):
    model = Qwen2.from_scratch(ODD, seed=4, dtype=dtype)
    tokens = tokens_of(ODD, 1, 9)
    results = []
    for packed in (False, True):
        if packed:
            cpu_linear.pack(model)
        logp, entropy, is_argmax = model(tokens, targets=tokens.roll(-1), num_token_ids=290)
        grads = torch.autograd.grad(logp.sum() + entropy.sum(), list(model.parameters()))
        results.append((logp, entropy, is_argmax, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_kernels_that_cannot_run_are_refused_and_torchs_stay(monkeypatch):
    with pytest.raises(ValueError, match="torch, compiled or triton, found 'cuda'"):
        model.use_kernels("cuda", "cpu")
    monkeypatch.setitem(sys.modules, "triton", None)        # as where it is not installed
    monkeypatch.delitem(sys.modules, "fused", raising=False)
    with pytest.raises(ValueError, match="need triton"):
        sample.load("tiny", kernels="triton")
    assert vars(model.KERNELS) == model.PLAIN


# -- what training needs

@pytest.mark.parametrize("N, C, V, size, rows", [
    (5, 7, 41, 41, 3), (9, 3, 23, 19, 4), (1, 2, 5, 5, 1), (0, 3, 7, 7, 2)])
def test_fused_log_probs_and_entropies_are_those_of_a_softmax(N, C, V, size, rows):
    """Forward against log_softmax; backward by finite differences, each row with an upstream gradient of its own."""
    g = torch.Generator().manual_seed(N)
    x = torch.randn(N, C, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, C, generator=g, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(size, (N,), generator=g)
    logp, entropy, first = LinearLogProb.apply(x, weight, targets, 0.7, size, rows)
    logq = (x @ weight[:size].T / 0.7).log_softmax(-1)
    assert torch.allclose(logp, logq.gather(1, targets[:, None])[:, 0])
    assert torch.allclose(entropy, -(logq.exp() * logq).sum(-1))
    assert torch.equal(first, logq.argmax(-1) == targets)
    if N:
        assert torch.autograd.gradcheck(lambda *p: LinearLogProb.apply(*p, targets, 0.7, size, rows)[:2], (x, weight))
    else:       # a process without a token still takes part in the backward pass
        (logp.sum() + entropy.sum()).backward()
        assert weight.grad.abs().sum() == 0


def loss_and_gradients(model, *batches):
    model.zero_grad()
    loss = torch.zeros(())
    for tokens, lengths, targets in batches:
        logp, entropy, _ = model(tokens, lengths=lengths, targets=targets, num_token_ids=290)
        loss = loss - logp.sum() - 0.1 * entropy.sum()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(one, other):
    assert torch.allclose(one[0], other[0], rtol=1e-6)
    for name, grad in one[1].items():
        assert (grad - other[1][name]).abs().max() <= 1e-5 * grad.abs().max(), name


def test_texts_packed_in_one_row_are_the_texts_apart_and_blocks_can_be_computed_again():
    model = Qwen2.from_scratch(ODD, seed=2)
    lengths = [3, 11, 1, 7]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
    tokens = tokens_of(ODD, 1, 22)
    targets = torch.randint(290, (1, 22), generator=torch.Generator().manual_seed(7))
    targets[0, [0, 5, 14, 21]] = IGNORE
    packed = loss_and_gradients(model, (tokens, lengths, targets))
    apart = [(t, None, u) for t, u in zip(tokens.split(lengths, 1), targets.split(lengths, 1))]
    assert_same(packed, loss_and_gradients(model, *apart))
    for block in model.model.layers:
        block.recompute = True
    assert_same(packed, loss_and_gradients(model, (tokens, lengths, targets)))


# -- the real checkpoint

TEXTS = ["The capital of France is", "def fibonacci(n):\n    if n < 2:\n        return n\n" * 4,
         "Machine learning engineering is a loop: read, edit, run, look at the score, again. " * 8,
         "漢字とかな、emoji 🙂 and ASCII in one line. " * 9,
         "import pandas as pd\ntrain = pd.read_csv('data/train.csv')\n" * 30]


def test_real_checkpoint_has_the_logits_and_greedy_tokens_of_transformers(real, peer, tmp_path):
    """Logits of three prompts of 50 to 500 tokens within 1e-3, 32 greedy tokens of two of them identical, and a folder
    that we save has the same logits there. Their greedy tokens are ours if after each token theirs is our next one."""
    from sample import Engine
    model = Qwen2.from_pretrained(real)
    tokenizer = Tokenizer.from_pretrained(real)
    theirs = peer.AutoModelForCausalLM.from_pretrained(real, dtype=torch.float32).eval()
    prompts = [tokenizer.encode(text * 12)[:length] for text, length in zip(TEXTS, (50, 160, 500))]
    assert [len(ids) for ids in prompts] == [50, 160, 500]
    engine = Engine(model.requires_grad_(False), tokenizer, rows=2, context=256)
    ours = [group[0].tokens for group in engine.generate(prompts[:2], max_new_tokens=32, temperature=0)]
    assert all(len(reply) == 32 or reply[-1] in tokenizer.eos for reply in ours)
    with torch.no_grad():
        expected = [theirs(torch.tensor([ids + reply])).logits for ids, reply in zip(prompts, [*ours, []])]
        for ids, logits in zip(prompts, expected):
            assert (model(torch.tensor([ids])) - logits[:, :len(ids)]).abs().max() < 1e-3
    for ids, reply, logits in zip(prompts, ours, expected):
        assert logits[0, len(ids) - 1:-1].argmax(-1).tolist() == reply
    precision = getattr(torch, json.loads((Path(real) / "config.json").read_text())["torch_dtype"])
    model.to(precision).save_pretrained(tmp_path, max_shard_bytes=10**9)
    tokenizer.save(tmp_path)
    reopened = peer.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert peer.AutoTokenizer.from_pretrained(tmp_path).encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])
    with torch.no_grad():
        assert torch.equal(reopened(torch.tensor([prompts[0] + ours[0]])).logits, expected[0])


def test_real_chat_template_gives_the_ids_of_transformers(real, peer):
    theirs = peer.AutoTokenizer.from_pretrained(real)
    ours = Tokenizer.from_pretrained(real)
    talk = [{"role": "user", "content": "\n Improve `train.py`.\n\n"},
            {"role": "assistant", "content": "Thought: I look.\nAction: x"},
            {"role": "user", "content": "Observation:\n```\n1.5e-3 \t 漢字 🙂\n```"}]
    for messages in (talk, talk[:1], [{"role": "system", "content": "You edit scripts."}, *talk]):
        for prompt in (True, False):
            text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            ids = ours.chat(messages) if prompt else ours.conversation(messages)[0]
            assert ids == theirs.encode(text, add_special_tokens=False)
    for text in TEXTS:
        assert ours.decode(ours.encode(text)) == text == theirs.decode(ours.encode(text))


LOAD = """
import resource, sys, torch
from model import Qwen2
kib = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = kib()
for dtype in (torch.bfloat16, torch.float32):
    model = Qwen2.from_pretrained(sys.argv[1], dtype=dtype)
    print((kib() - before) * 1024 / sum(p.nbytes for p in model.parameters()))
    del model
"""


def test_real_loading_peaks_below_1_15_times_the_weights(real):
    """In the checkpoint's own type, and then in a wider one."""
    out = subprocess.run([sys.executable, "-c", LOAD, real], capture_output=True, text=True, check=True,
                         cwd=Path(__file__).parent.parent)
    narrow, wide = map(float, out.stdout.split())
    assert narrow < 1.15 and wide < 1.15


@pytest.mark.parametrize("recompute", [False, True])
def test_a_block_compiles_without_a_break_and_soon_for_any_texts(recompute):
    """As on CUDA, where the offsets of texts are tensors; fake tensors stand for all others. The first row fixes all
    sizes, others let the number of tokens and then that of texts vary; from there on, and for the next block, forward
    and backward need no other graph."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    with FakeTensorMode():
        blocks = [model.Block(Config()) for _ in range(2)]
        for block in blocks:
            block.compile(backend=counter)
            block.recompute = recompute
        frames = []
        for lengths in ([10, 20], [11, 20], [5, 6, 7], [(40, [3, 4]), 6, 7, 8], [9] * 20, [(30, [1] * 8), (7, [2, 3])]):
            layout = model.make_layout(lengths, "cpu", varlen=True)
            cos, sin = model.rotary(layout.positions, Config().head_dim, 1e6)
            x = torch.empty(1, len(cos[0]), Config().hidden_size, dtype=torch.bfloat16, requires_grad=True)
            for layer, block in enumerate(blocks):
                block(x, cos, sin, None, layer, layout).sum().backward()
            assert x.grad.shape == x.shape
            frames.append(counter.frame_count)
    assert frames[0] == 1 and frames[2:] == [3] * 4
