"""The Triton kernels against their plain twins in model.py, on a GPU or else in Triton's interpreter; and compiled for
an H100."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton, which comes with torch for CUDA; for a CPU: pip install triton")

import torch

import bench
import fused
import model
import sample
from model import Config, LinearLogProb, Qwen2
from support.tokenizer import Tokenizer

ODD = Config(vocab_size=301, hidden_size=48, intermediate_size=88, num_hidden_layers=2, num_attention_heads=6,
             num_key_value_heads=2, tie_word_embeddings=False)
DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
DEVICE = "cpu" if fused.INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def device():
    with torch.device(DEVICE):
        yield


@pytest.fixture
def triton():
    model.use_kernels("triton", DEVICE)
    yield
    model.use_kernels("torch", DEVICE)


def generator(seed):
    return torch.Generator(DEVICE).manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed + sum(shape))).to(dtype)


def assert_close(ours, plain, tolerance):
    assert ours.shape == plain.shape
    assert (ours.float() - plain.float()).abs().max() <= tolerance * max(1.0, plain.float().abs().max())


def assert_twins(name, inputs, rest, dtype, tolerance):
    """Results and gradients, with an upstream gradient that differs everywhere, of the kernel in dtype and of the plain
    function in fp32 on the same numbers."""
    results = []
    for function, kind in ((getattr(fused, name), dtype), (getattr(model, name), torch.float32)):
        given = [x.to(dtype).to(kind).requires_grad_() for x in inputs]
        out = function(*given, *rest)
        out = out if isinstance(out, tuple) else (out,)
        up = [normal(*y.shape, seed=i + 9).to(dtype).to(kind) for i, y in enumerate(out)]
        results.append((*out, *torch.autograd.grad(out, given, up)))
        if kind is dtype:
            assert all(y.dtype is dtype for y in results[-1])
    for ours, plain in zip(*results):
        assert_close(ours, plain, tolerance)


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5, 123), (2, 3, 48), (1, 1, 1)])
def test_norms(shape, dtype, tolerance):
    weight = 1 + normal(shape[-1])
    assert_twins("norm", [3 * normal(*shape), weight], [1e-6], dtype, tolerance)
    assert_twins("add_norm", [3 * normal(*shape), normal(*shape, seed=1), weight], [1e-6], dtype, tolerance)


def test_norms_of_more_rows_than_programs():
    """Backward has 264 programs: some sum two rows' gradients of the weight."""
    assert_twins("norm", [normal(266, 3), 1 + normal(3)], [1e-6], torch.float32, 1e-5)


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("B, T, H, K, D", [(1, 7, 6, 2, 8), (2, 3, 7, 1, 6), (1, 1, 14, 2, 64)])
def test_rope(B, T, H, K, D, dtype, tolerance):
    for positions in (torch.tensor([[0, 3, 1, 900, 4, 5, 31000]])[:, :T], torch.arange(B * T).view(B, T)):
        angles = model.rotary(positions, D, 1e6)
        assert_twins("rope", [normal(B, T, H, D), normal(B, T, K, D)], angles, dtype, tolerance)


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 123), (1, 1, 1), (2, 5000)])
def test_swiglu(shape, dtype, tolerance):
    assert_twins("swiglu", [4 * normal(*shape), normal(*shape, seed=1)], [], dtype, tolerance)


def test_strided_inputs_and_gradients():
    gate = torch.cat((normal(5, 24), normal(5, 24, seed=1)), 1).requires_grad_()
    for function in (fused.swiglu, model.swiglu):
        out = function(*gate.chunk(2, -1))
        grad, = torch.autograd.grad(out.sum(), gate)        # the upstream gradient is one number, expanded
        first = (out, grad) if function is fused.swiglu else first
    assert_close(first[0], out, 1e-6)
    assert_close(first[1], grad, 1e-6)


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("N, C, V, size, words", [(5, 7, 41, 41, 16), (9, 3, 23, 19, 4), (1, 2, 5, 5, 64),
                                                 (0, 3, 7, 7, 2), (3, 5, 9000, 8999, 9000)])
@pytest.mark.parametrize("with_entropy", [True, False])
def test_log_probs_and_entropies(triton, N, C, V, size, words, dtype, tolerance, with_entropy):
    """Against log_softmax, with the logits rounded as the product in dtype rounds them; 9,000 words take three steps of
    a program."""
    x = normal(N, C).to(dtype).requires_grad_()
    weight = normal(V, C, seed=3).to(dtype).requires_grad_()
    targets = torch.randint(size, (N,), generator=generator(N))
    up = normal(N), normal(N, seed=1) * with_entropy
    logp, entropy, first = LinearLogProb.apply(x, weight, targets, 0.7, size, words)
    grads = torch.autograd.grad((logp, entropy)[:1 + with_entropy], (x, weight), up[:1 + with_entropy])
    y = x.detach().float().requires_grad_()
    w = weight.detach().float().requires_grad_()
    logits = y @ w[:size].T
    logits = logits + (logits.to(dtype).float() - logits).detach()
    logq = (logits / 0.7).log_softmax(-1)
    plain = logq.gather(1, targets[:, None])[:, 0], -(logq.exp() * logq).sum(-1)
    expected = torch.autograd.grad(plain, (y, w), up)
    for ours, theirs in zip((logp, entropy, *grads), (*plain, *expected)):
        if ours.numel():
            assert_close(ours, theirs, tolerance)
    assert torch.equal(first, plain[0] >= logq.amax(-1))


@pytest.mark.parametrize("dtype, tolerance", DTYPES)
@pytest.mark.parametrize("B, T, H, K, D, S", [(3, 1, 6, 2, 8, 900), (2, 3, 7, 1, 24, 300), (1, 5, 4, 4, 64, 70),
                                              (1, 40, 6, 2, 8, 50)])
def test_attention_over_a_ragged_cache(B, T, H, K, D, S, dtype, tolerance):
    """Rows of length 1 to S, and beyond them what no one may read; the first two are cut into parts, and the second and
    the last take several blocks of queries."""
    q = normal(B, T, H, D)
    k = normal(B, K, S + 9, D)
    v = normal(B, K, S + 9, D, seed=1)
    last = torch.linspace(T - 1, S - 1, B).long() if B > 1 else torch.tensor([S - 1])
    places = last[:, None] - torch.arange(T).flip(0)
    for row, n in enumerate(last.tolist()):
        k[row, :, n + 1:] = 1e4
        v[row, :, n + 1:] = -1e4
    q, k, v = (x.to(dtype) for x in (q, k, v))
    k = k[:, :, :S]
    v = v[:, :, :S]
    ours = fused.attend(q, k, v, fused.attention_mask(places, S, H // K, dtype))
    plain = model.attend(q.float(), k.float(), v.float(), model.attention_mask(places, S, H // K, torch.float32))
    assert ours.dtype is dtype
    assert_close(ours, plain, tolerance)


def loss_and_gradients(net, tokens, targets):
    net.zero_grad()
    logp, entropy, _ = net(tokens, lengths=[9, 4], targets=targets, num_token_ids=290)
    loss = -(logp * normal(len(logp)).abs()).sum() - 0.1 * entropy.sum()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in net.parameters())]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_whole_model_with_kernels_is_the_plain_one(recompute):
    net = Qwen2.from_scratch(ODD, seed=2, device=DEVICE)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(normal(*p.shape, seed=p.numel()) * 0.1)
    tokens = torch.randint(290, (1, 13), generator=generator(1))
    plain = loss_and_gradients(net, tokens, tokens.roll(-1))
    for block in net.model.layers:
        block.recompute = recompute
    model.use_kernels("triton", DEVICE)
    try:
        ours = loss_and_gradients(net, tokens, tokens.roll(-1))
    finally:
        model.use_kernels("torch", DEVICE)
    for ours, theirs in zip(ours, plain):
        assert (ours - theirs).abs().max() <= 1e-5 * max(theirs.abs().max(), 1e-3)


def test_a_frame_with_kernels_samples_what_plain_passes_sample():
    config = Config(**{**vars(ODD), "num_hidden_layers": 1})
    net = Qwen2.from_scratch(config, seed=2, device=DEVICE).requires_grad_(False)
    replies = []
    for name in ("torch", "triton"):
        engine = sample.Engine(net, Tokenizer.of_bytes(), rows=2, context=64, draft=False,
                               fixed_shapes=name == "triton")
        model.use_kernels(name, DEVICE)
        try:
            replies += [g[0] for g in engine.generate([[1, 2, 3], [4]], max_new_tokens=3, seed=3)]
        finally:
            model.use_kernels("torch", DEVICE)
    for plain, framed in zip(replies[:2], replies[2:]):
        assert framed.tokens == plain.tokens
        assert (torch.tensor(framed.logps) - torch.tensor(plain.logps)).abs().max() < 1e-5


def test_the_benchmark_measures_the_same_computation_three_times(triton):
    """At small sizes: what Triton's, torch's and the function for torch.compile give is one result, and its
    gradients."""
    torch.manual_seed(0)
    seen = []
    for name, function, inputs, grad, amount, unit, simple in bench.kernel_cases(ODD, 5, 3, 40, torch.float32, DEVICE):
        ups = []
        ways = [lambda *x, ops=ops: function(ops, *x) for ops in (model, fused)] + [simple] * (simple is not None)
        plain, *others = [bench.run_case(way, inputs, grad, ups) for way in ways]
        assert amount > 0 and len(plain) == (len(inputs) if grad else len(others[0])), name
        for other in others:
            for a, b in zip(plain, other):
                assert_close(b, a, 1e-4)        # logits of up to 20, in fp32
        seen.append(name)
    assert len(seen) == 12 and model.KERNELS.attend is fused.attend


def test_a_device_that_cannot_run_them_is_refused(monkeypatch):
    monkeypatch.setattr(fused, "INTERPRETED", False)
    with pytest.raises(ValueError, match="need a CUDA device, found 'cpu'"):
        model.use_kernels("triton", "cpu")
    assert vars(model.KERNELS) == model.PLAIN


COMPILE = """
import subprocess, sys
sys.path.insert(0, sys.argv[1])
import torch, triton
from triton.backends.compiler import GPUTarget
import fused, model
CUOBJDUMP = triton.knobs.nvidia.cuobjdump.path
class H100:                                                                 # stands in for the driver
    get_current_device = get_current_stream = lambda self, *_: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
triton.runtime.driver.set_active(H100())
run = triton.runtime.JITFunction.run
def compile_only(kernel, *args, grid, warmup, **options):
    made = run(kernel, *args, grid=grid, warmup=True, **options)
    open("cubin", "wb").write(made.asm["cubin"])
    used = subprocess.run([CUOBJDUMP, "-res-usage", "cubin"], capture_output=True, text=True, check=True).stdout
    print(kernel.__name__, made.metadata.shared, ".target sm_90" in made.asm["ptx"], "STACK:0 " in used)
triton.runtime.JITFunction.run = compile_only
new = lambda *shape, dtype=torch.bfloat16: torch.empty(
    shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)
x, row = new(1, 1024, 3584), lambda: new(1024, dtype=torch.float32).detach()
fused.norm(x, new(3584), 1e-6).backward(x)
sum(fused.add_norm(x, x, new(3584), 1e-6)).backward(x)
q, k = fused.rope(new(1, 1024, 28, 128), new(1, 1024, 4, 128), *[new(1, 1024, 1, 128, dtype=torch.float32)] * 2)
q.backward(q)
fused.swiglu(new(1, 1024, 18944), new(1, 1024, 18944)).sum().backward()
logits, targets = new(1024, 131072).detach(), new(1024, dtype=torch.int64)
fused.logprob_stats(logits, targets, 0.7, row(), row(), row(), row())
for entropy in (None, row()):
    fused.logprob_backward(logits, targets, 0.7, row(), row(), row(), entropy)
cache = new(64, 4, 16384, 128).detach()
for B, T in ((1, 1), (64, 1), (1, 16), (1, 1000)):
    fused.attend(new(B, T, 28, 128).detach(), cache[:B], cache[:B], new(B, T, dtype=torch.int64))
"""


def test_every_kernel_compiles_for_an_h100_at_the_shapes_of_the_7b(tmp_path):
    """Without a register that spills to memory, and with shared memory of at most 227 KiB, what a block may have there
    (CUDA's table of compute capabilities, 9.0)."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", COMPILE, root], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, *_ in made} == {name for name, value in vars(fused).items() if name.startswith("_")
                                           and hasattr(value, "arg_names")} - {"_rotate", "_dot"}
    for name, shared, for_hopper, stays_in_registers in made:
        assert int(shared) <= 232448 and for_hopper == stays_in_registers == "True", name
