"""Processes, sharding, packed batches and checkpoints: what sft.py and rl.py train with."""
import contextlib, hashlib, math, os, re, resource, shutil, time
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from model import IGNORE, Config, Qwen2, load_tensors, write_checkpoint
from support.cli import RunError
from support.files import shorten, sync


def init_distributed():
    """(rank, world size, device) of this process, alone or under torchrun; joins the group of all of them."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized() and world > 1:
        # A script may run for half an hour while others wait. Who dies is noticed by torchrun, or by a lost connection.
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=3))
    return rank, world, device


@contextlib.contextmanager
def explain_dist_errors(rank):
    """RunError in place of what torch raises where another process of the run has ended."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise RunError(f"rank {rank}: another process of this run has ended, and its own message says why, unless it was "
                     f"killed ({shorten(str(error), 200)})") from None


def rank0_broadcast(work):
    """What work() returns on the first process, or the ValueError or RunError that it raises, on all."""
    done = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            done = work()
        except (ValueError, RunError) as error:
            done = error
    if dist.is_initialized():
        box = [done]
        dist.broadcast_object_list(box)
        done = box[0]
    if isinstance(done, Exception):
        raise done
    return done


def compute_type(dtype, device):
    """The torch.dtype that --dtype names for training: auto is bfloat16 on a GPU and float32 on a CPU."""
    if dtype not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"expected --dtype auto, float32 or bfloat16, found {dtype!r}")
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, dtype)


def build_model(config, folder, device, seed=0, recompute=False, compute=None, make=Qwen2,
          copying=False):
    """A model to train, with fp32 master weights and gradients, sharded over all processes where there are several.

    Made on the meta device; each process then reads its own rows of the checkpoint in `folder`, or draws them where
    folder is None. compute: the dtype of the products and activations; None: see compute_type. The units of FSDP2 are
    the blocks, and the rest; they are gathered in that dtype and gradients reduced in fp32. A process alone casts each
    weight where it is used. recompute: activation checkpointing, block by block. make: the class; a head `score` that
    it adds begins at zero. copying: the weights that are drawn are those of Qwen2.draw_copying.
    """
    with torch.device("meta"):
        model = make(config)
    model.compute = compute or compute_type("auto", device)
    for block in model.model.layers:
        block.recompute = recompute
    rank, world = 0, 1
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
        mesh = init_device_mesh(device.type, (world,))
        # FSDP must not cast what the blocks are given: cosines and sines of positions stay fp32
        policy = MixedPrecisionPolicy(param_dtype=model.compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for unit in (*model.model.layers, model):
            fully_shard(unit, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    model.tie()
    own = {}    # name -> (this process's rows, the index of the first, the whole shape)
    for name, p in model.named_parameters():
        own[name] = local_rows(p), min(rank * -(-p.shape[0] // world), p.shape[0]), tuple(p.shape)
    with torch.no_grad():
        for name in [name for name in own if name.startswith("score.")]:
            own.pop(name)[0].zero_()
    if folder:
        load_tensors(folder, own, unused=() if hasattr(model, "lm_head") else ("lm_head.weight",))
    else:
        drawn = Qwen2.from_scratch(config, seed)
        drawn = dict((drawn.draw_copying(seed) if copying else drawn).named_parameters())
        with torch.no_grad():
            for name, (rows, first, _) in own.items():
                rows.copy_(drawn[name][first:first + len(rows)])
    return model


def sharded_parameters(model):
    """Name and parameter of all that this process holds of a model, as model.named_parameters(). Where it is sharded,
    these are the shards: after a forward without a backward the root of FSDP2 stays gathered, and its parameters are
    until then other tensors, whole, in the dtype of the products and unknown to the optimizer."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return model.named_parameters()


def local_rows(x):
    """This process's rows of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def full_tensor(x):
    """A tensor whole on every process; where it is sharded all of them must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def export_model(model, tokenizer, folder, dtype):
    """Write an ordinary Hugging Face folder from a model that may be sharded, without a critic's head `score`; every
    process must call it."""
    tensors = ((name, full_tensor(p.detach())) for name, p in sharded_parameters(model) if not name.startswith("score."))
    if not dist.is_initialized() or dist.get_rank() == 0:
        tokenizer.save(folder)
        write_checkpoint(folder, model.config, tensors, dtype)
    else:
        for _ in tensors:       # gathering takes all of them
            pass
    barrier()


def barrier():
    if dist.is_initialized():
        dist.barrier()


def hash_texts(*parts):
    """The sha256, shortened, of lists of texts, [(ids, chosen)]."""
    sha = hashlib.sha256()
    for texts in parts:
        sha.update(f"{len(texts)} texts".encode())
        for ids, chosen in texts:
            sha.update(f"{len(ids)} ids".encode())
            sha.update(np.array(ids, np.int32))
            sha.update(np.array(chosen, np.bool_))
    return sha.hexdigest()[:16]


def save_state(s, step, model, optimizer, origin, keep=2, **more):
    """Write everything a later process needs to go on exactly after `step` steps, each process its own part. origin:
    {what: value} of all that the run hangs on besides its settings.

    Written aside and renamed when all are done, so a folder s.out/checkpoints/step-N is whole. The last `keep` stay.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    final = Path(s.out, "checkpoints", f"step-{step:06d}")
    part = final.with_suffix(".part")
    if rank == 0:
        for left in final.parent.glob("*.part"):        # by a kill
            shutil.rmtree(left)
        part.mkdir(parents=True)
    barrier()
    own = dict(sharded_parameters(model))
    file = part / f"rank-{rank}.pt"
    torch.save({"step": step, "world": world, "settings": vars(s), "origin": origin, "rng": torch.get_rng_state(),
                **more, "model": {name: local_rows(p.detach()) for name, p in own.items()},
                "optimizer": [{key: local_rows(value) for key, value in optimizer.state[p].items()}
                              for p in own.values()]}, file)
    sync(file)
    barrier()
    if rank == 0:
        sync(part)
        part.rename(final)
        sync(final.parent)
        for old in sorted(final.parent.glob("step-??????"))[:-keep]:
            old.rename(old.with_suffix(".part"))        # a folder that is half deleted must not look whole
            shutil.rmtree(old.with_suffix(".part"))
    barrier()


def load_state(s, names, model, optimizer, origin):
    """The newest complete state below s.out, put into model and optimizer: what else it holds, as a dict; None where
    there is none. ValueError: it is of a run of another number of processes, or that had other settings of these names
    or another origin, see save_state."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    found = sorted(Path(s.out, "checkpoints").glob("step-??????"))
    if not found:
        return None
    num = len(list(found[-1].glob("rank-*.pt")))
    if num != world:
        raise ValueError(f"{found[-1]} was written by {num} processes and this run has {world}; start {num}, or give "
                         "another --out")
    state = torch.load(found[-1] / f"rank-{rank}.pt", map_location="cpu", weights_only=True)
    flags = {f"--{name.replace('_', '-')}": (state["settings"].get(name), getattr(s, name)) for name in names}
    given = {what: (state.get("origin", {}).get(what), now) for what, now in origin.items()}
    if other := [f"{what} {then} (now {now})" for what, (then, now) in {**flags, **given}.items() if then != now]:
        raise ValueError(f"{found[-1]} is of a run with {', '.join(other)}; give these again to go on with it, or "
                         "another --out to begin anew")
    weights = state.pop("model")            # the caller must not keep them alive
    moments = state.pop("optimizer")
    own = dict(sharded_parameters(model))
    with torch.no_grad():
        for name, p in own.items():
            local_rows(p).copy_(weights[name])
    for p, values in zip(own.values(), moments):
        optimizer.state[p] = {}
        for key, value in values.items():
            value = value.to(p.device)
            if isinstance(p, DTensor) and key != "step":
                value = DTensor.from_local(value, p.device_mesh, p.placements, run_check=False, shape=p.shape,
                                           stride=p.stride())
            optimizer.state[p][key] = value
    torch.set_rng_state(state["rng"])
    return state


def pack_lengths(lengths, longest):
    """Indices of texts in rows of at most `longest` tokens: each text goes into the first row with room, in order."""
    rows, room = [], []
    for i, n in enumerate(lengths):
        for r, free in enumerate(room):
            if n <= free:
                rows[r].append(i)
                room[r] -= n
                break
        else:
            rows.append([i])
            room.append(longest - n)
    return rows


def batch_indices(num, step, size, seed):
    """Indices of the texts, out of `num`, of optimizer step `step`: the epochs' shuffled orders, one after the other,
    cut into runs of `size`. It depends on nothing else, so a resumed run needs no memory of what it has seen."""
    places = range(step * size, (step + 1) * size)
    return [epoch_order(num, seed, place // num)[place % num] for place in places]


@lru_cache(maxsize=4)
def epoch_order(num, seed, epoch):
    return torch.randperm(num, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def collate_packed(texts, device):
    """(tokens (1, T), lengths, targets (1, T)) of one packed row; targets[i] is the token after i if that was chosen.

    An empty list gives a row of one token and no target, for a process that has nothing left to do in a step.
    """
    texts = texts or [([0, 0], [False, False])]
    tokens = [t for ids, _ in texts for t in ids[:-1]]
    targets = [t if c else IGNORE for ids, chosen in texts for t, c in zip(ids[1:], chosen[1:])]
    return (torch.tensor([tokens], device=device), [len(ids) - 1 for ids, _ in texts],
            torch.tensor([targets], device=device))


def peak_memory(device):
    """Bytes: what the GPU has held at most, or the resident set of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def shard_across_ranks(lengths, chosen, rank, world, longest):
    """The packed rows of one process for the texts `chosen`, as lists of their indices; lengths: tokens of every text.
    As many rows for every process, because FSDP gathers and reduces for all of them together."""
    packed = [pack_lengths([lengths[i] for i in chosen[r::world]], longest) for r in range(world)]
    rows = [[chosen[rank::world][j] for j in row] for row in packed[rank]]
    return rows + [[]] * (max(map(len, packed)) - len(rows))


def packed_micro_batches(texts, chosen, rank, world, longest):
    """The packed rows, lists of texts, of one process; see shard_across_ranks."""
    rows = shard_across_ranks([len(ids) - 1 for ids, _ in texts], chosen, rank, world, longest)
    return [[texts[i] for i in row] for row in rows]


def peak_flops(device):
    """Floating-point operations a second this device can do: the vendor's figure for known GPUs, else measured."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = {"H100": 989e12, "H200": 989e12, "A100": 312e12}        # dense bf16
        return next((flops for key, flops in known.items() if key in name), None)
    x, best = torch.randn(1024, 1024), 0.0
    for _ in range(5):
        start = time.perf_counter()
        x @ x
        best = max(best, 2 * 1024**3 / (time.perf_counter() - start))
    return best


def flops_of(config, rows):
    """Floating-point operations of a training step over packed rows: 6 a token for each weight of the products, 12 a
    pair of tokens that see each other for each unit of width and layer (PaLM, arXiv 2204.02311, appendix B)."""
    c = config
    block = c.hidden_size * (2 * c.hidden_size + 2 * c.num_key_value_heads * c.head_dim + 3 * c.intermediate_size)
    lengths = [len(ids) - 1 for row in rows for ids, _ in row]
    heads = sum(sum(chosen) for row in rows for _, chosen in row)
    return (6 * sum(lengths) * block * c.num_hidden_layers + 6 * heads * c.vocab_size * c.hidden_size
            + 12 * sum(n * n / 2 for n in lengths) * c.hidden_size * c.num_hidden_layers)


def num_weights(config):
    """(of a block, of the embedding, of the head: 0 where it is the embedding, of all)."""
    c, kv = config, config.num_key_value_heads * config.head_dim
    block = c.hidden_size * (2 * c.hidden_size + 2 * kv + 3 * c.intermediate_size) + 3 * c.hidden_size + 2 * kv
    table = c.vocab_size * c.hidden_size
    head = 0 if c.tie_word_embeddings else table
    return block, table, head, c.num_hidden_layers * block + table + head + c.hidden_size


def memory_of(config, length, gpus=1, targets=None, recompute=True, compute=torch.bfloat16,
              device="cuda"):
    """{part: bytes} of one process at the peak of a training step of more than one packed row; the sum is the peak.

    length: tokens of a row; targets: how many of them are learned, by default all. Weights, gradients and the optimizer
    are shared out over `gpus`. "gathered" is what FSDP2 collects of the others' weights, or the copies in `compute` of
    a process alone. Activations are what autograd keeps, counted operation by operation (Block), and the work of one
    block's backward. "logits" is what the head takes beyond that work: pieces of the logits, and its new gradient
    beside the old one. It counts tensors: an allocator's own waste, the CUDA context and NCCL's buffers come on top.
    """
    c, size = config, compute.itemsize
    C, F, kv, L = c.hidden_size, c.intermediate_size, c.num_key_value_heads * c.head_dim, c.num_hidden_layers
    block, table, head, total = num_weights(c)
    targets = length if targets is None else targets
    norm = 2 * size if device == "cuda" else 8 + size       # fused on a GPU; else its input and quotient in fp32
    token = C * (2 * norm + 3 * size) + size * (2 * kv + 4 * F) + 4 * c.num_attention_heads + 8
    kept = L * length * (size * C if recompute else token)
    work = length * size * (2 * F + 2 * C) + (length * token if recompute else 0)       # of a block's backward
    gathered = size * (table + head + 2 * block) if gpus > 1 else (0 if size == 4 else size * block * (
        1 if recompute else L))
    if gpus > 1:        # gradients before they are shared out: of a block, and at the end of embedding and head
        work = max(work + (size + 4) * block, (size + 4) * (table + head) - kept)
    piece = targets * max(64, min(c.vocab_size, (2**27 if device == "cuda" else 2**24) // max(1, targets)))
    logits = piece * (8 + (size if size < 4 else 4)) + targets * C * (size + 4) + length * C * norm
    new = (size if gpus > 1 else 4) * table
    work += new if c.tie_word_embeddings else 0             # there it waits for the embedding's, which is dense
    work = max(work, new * (2 if c.tie_word_embeddings else 1) - kept)
    return {"weights": 4 * total // gpus, "gradients": 4 * total // gpus, "optimizer": 8 * total // gpus,
            "gathered": gathered, "activations": kept + work, "logits": max(0, logits + new - work)}


def shape_of(model):
    """The Config of a folder, a published Qwen2.5 by its name, or a preset ("7b"); reads no weights."""
    named = re.fullmatch(r"(?:.*/)?Qwen2\.5-(?:Coder-|Math-)?([\d.]+b)(?:-Instruct)?", model, re.I)
    return (Config.from_pretrained(model) if Path(model).is_dir() else
            Config.preset(named[1].lower() if named else model or "tiny"))


def gib(parts):
    """{part: bytes} as lines, the sum last."""
    return [f"  {name:<14} {size / 2**30:8.2f}" for name, size in [*parts.items(), ("total", sum(parts.values()))]]
