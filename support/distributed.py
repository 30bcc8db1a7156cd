"""Processes, sharding, packed batches, checkpoints and memory: what sft.py and rl.py share to train a model."""
import contextlib, math, os, re, shutil
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from model import CPU_LOGITS, GPU_LOGITS, IGNORE, Config, Qwen2
from support.cli import RunError, flag_of
from support.files import folder_lock, shorten, sync
from support.pretrained import load_tensors, write_checkpoint
from support.sandbox import SLOTS

RECOMPUTE_ABOVE = 100e6     # weights; larger models compute activations again in backward, which saves memory
ATTENTION_TOKENS = 65_000   # of a text whose attention takes as many operations as the rest of the 7B
PROCESS_BYTES = 1 << 30     # of a process besides weights and activations: libraries, texts, allocator
SMALL_BELOW = 50e6          # weights; the products of a smaller model are too small for several threads

# -- Processes

def choose_device(name):
    """Returns the torch.device that --device names; auto is cuda where there is one. ValueError: cuda, and there is
    none."""
    is_cuda = name != "cpu" and torch.cuda.is_available()
    if name == "cuda" and not is_cuda:
        raise ValueError("--device cuda: there is no GPU that torch can use")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if is_cuda else torch.device("cpu")


def init_distributed(name="auto"):
    """Returns (rank, world size, device) of this process, which joins the others that torchrun has started. name: of
    --device."""
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        # The first process may collect for hours while others wait.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    return rank, world_size, device


def rank_and_size():
    """Returns (rank, world size) in the group that this process has joined."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def joined(cfg, program):
    """Yields (rank, world size, device) of one of a run's processes, which hold cfg.out together. Raises RunError in
    place of what torch raises where another of them has ended. ValueError: cfg.out is the folder of the model."""
    if cfg.model and Path(cfg.model).resolve() == Path(cfg.out).resolve():
        raise ValueError(f"--model and --out are both {cfg.out}, so the model would be overwritten; give two folders")
    rank, world_size, device = init_distributed(cfg.device)
    try:
        with contextlib.ExitStack() as stack:
            rank0_broadcast(lambda: stack.enter_context(folder_lock(cfg.out, program)))
            yield rank, world_size, device
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise RunError(f"rank {rank}: another process of this run has ended, and its own message says why, unless it "
                       f"was killed ({shorten(str(error), 200)})") from None


def rank0_broadcast(work):
    """Runs work() on the first process; returns its result, or raises its ValueError or RunError, on all of them."""
    rank, world_size = rank_and_size()
    result = None
    if rank == 0:
        try:
            result = work()
        except (ValueError, RunError) as error:
            result = error
    if world_size > 1:
        box = [result]
        dist.broadcast_object_list(box)
        result = box[0]
    if isinstance(result, Exception):
        raise result
    return result


def gather(values):
    """Returns the lists of all processes joined."""
    if not dist.is_initialized():
        return values
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, values)
    return sum(lists, [])


def barrier():
    if dist.is_initialized():
        dist.barrier()


# -- The model, whole or sharded

def compute_type(dtype, device, config=None):
    """Returns the torch.dtype that --dtype names: auto is bfloat16 where the hardware multiplies it, but float32 on a
    CPU for a small model, whose products are too small to gain."""
    if dtype == "auto" and device.type == "cuda":
        dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    elif dtype == "auto":
        can = torch.cpu.get_capabilities()
        is_small = num_parameters(config)[-1] < SMALL_BELOW
        dtype = "float32" if is_small or not (can.get("avx512_bf16") or can.get("amx_bf16")) else "bfloat16"
    return getattr(torch, dtype)


def build_model(config, folder, device, seed=0, recompute=None, compute=None, make=Qwen2, kernels="torch"):
    """Returns a model to train, with weights and gradients in float32, sharded over all processes (FSDP2).

    Each process reads its own rows of the checkpoint in `folder`; None: the weights are drawn from the seed. compute:
    dtype of products and activations, by default that of --dtype auto. recompute: backward computes the activations
    of each block again, by default in a large model. make: the class; a critic's head, `score`, begins at zero.
    ValueError: kernels "compiled" in another dtype than bfloat16, where attention has other shapes.
    """
    # 1. Made on the meta device, without memory. The units of FSDP are the blocks, and the rest.
    with torch.device("meta"):
        model = make(config)
    model.compute_dtype = compute or compute_type("auto", device, config)
    if kernels == "compiled" and model.compute_dtype is not torch.bfloat16:
        raise ValueError(f"--kernels compiled needs products in bfloat16; found {model.compute_dtype}")
    for block in model.model.layers:
        block.recompute = num_parameters(config)[-1] > RECOMPUTE_ABOVE if recompute is None else recompute
        if kernels == "compiled":
            block.compile()
    rank, world_size = rank_and_size()
    if world_size > 1:
        mesh = init_device_mesh(device.type, (world_size,))
        # Inputs of a block are not cast: cosines and sines of positions stay in float32.
        policy = MixedPrecisionPolicy(param_dtype=model.compute_dtype, reduce_dtype=torch.float32,
                                      cast_forward_inputs=False)
        for unit in (*model.model.layers, model):
            # By default the root would stay gathered after a forward without a backward: memory that the reference
            # does not need, and parameters that the optimizer does not know.
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    model.to_empty(device=device)
    model.tie()

    # 2. The rows of this process are filled.
    parts = {}      # name -> (rows of this process, index of the first, shape of the whole)
    for name, p in model.named_parameters():
        rows_per_rank = math.ceil(p.shape[0] / world_size)
        parts[name] = local_rows(p), min(rank * rows_per_rank, p.shape[0]), tuple(p.shape)
    with torch.no_grad():
        for name in [name for name in parts if name.startswith("score.")]:
            parts.pop(name)[0].zero_()
        if folder:
            load_tensors(folder, parts)
        else:
            drawn = dict(Qwen2.from_scratch(config, seed).named_parameters())
            for name, (rows, first, _) in parts.items():
                rows.copy_(drawn[name][first:first + len(rows)])
    return model


def local_rows(x):
    """Returns this process's rows of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def full_tensor(x):
    """Returns a tensor whole; where it is sharded, every process must call this."""
    return x.full_tensor() if isinstance(x, DTensor) else x


@torch.no_grad()
def copy_weights(model, copy):
    """Copies a model's weights to one that is not sharded. Every process must call this."""
    copies = dict(copy.named_parameters())
    for name, p in model.named_parameters():
        copies[name].copy_(full_tensor(p))


def export_model(model, tokenizer, folder):
    """Writes a Hugging Face folder, in bfloat16 if the model is on a GPU. Every process must call this."""
    dtype = torch.bfloat16 if next(model.parameters()).is_cuda else torch.float32
    tensors = ((name, full_tensor(p.detach())) for name, p in model.named_parameters())
    if rank_and_size()[0] == 0:
        tokenizer.save(folder)
        write_checkpoint(folder, model.config, tensors, dtype)
    else:
        for _ in tensors:       # gathering takes all processes
            pass
    barrier()


def row_threads(config, device):
    """Returns the threads that compute the rows of a small model on a CPU, one row each, None for any other. OpenMP's
    threads would wait for each other at every small product, which takes long beside a busy program."""
    if device.type != "cpu" or dist.is_initialized() or num_parameters(config)[-1] > SMALL_BELOW:
        return None
    torch.set_num_threads(1)
    return ThreadPoolExecutor(SLOTS.cpus)


def map_rows(function, rows, threads=None):
    """Returns [function(row)], without gradients, in the order of the rows. threads: of row_threads."""
    work = torch.no_grad()(function)
    return list(threads.map(work, rows) if threads else map(work, rows))


def add_gradients(model, rows, loss_of, threads=None):
    """Adds the gradients of a sum over rows to a model. loss_of(row) returns the row's part of the loss, and a tensor
    of statistics. Returns their sum. threads: of row_threads; all is summed in the order of the rows."""
    parameters = list(model.parameters())

    def work(row):
        loss, statistics = loss_of(row)
        return torch.autograd.grad(loss, parameters), statistics

    total = 0
    if threads is None:
        for row in rows:
            loss, statistics = loss_of(row)
            loss.backward()
            total = total + statistics
        return total
    for gradients, statistics in threads.map(work, rows):
        for p, gradient in zip(parameters, gradients):
            p.grad = gradient if p.grad is None else p.grad.add_(gradient)
        total = total + statistics
    return total


def optimizer_step(model, optimizer, max_norm=1.0):
    """Clips a model's gradient, makes a step and clears it. Returns the norm before clipping. RunError: it is not
    finite; no weight was changed."""
    norm = full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm))
    if not torch.isfinite(norm):
        raise RunError(f"gradient norm {norm.item()}")
    optimizer.step()
    optimizer.zero_grad()
    return norm


# -- Batches. An example is (ids, loss_mask): token ids, and for each of them whether it is learned.

@lru_cache(maxsize=4)
def epoch_order(num, seed, epoch):
    """Returns the indices 0 to num - 1 in the random order of an epoch."""
    return torch.randperm(num, generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)).tolist()


def batch_indices(num, step, size, seed):
    """Returns the indices, out of `num`, of the `size` examples of optimizer step `step`."""
    return [epoch_order(num, seed, i // num)[i % num] for i in range(step * size, (step + 1) * size)]


def pack_lengths(lengths, max_row_tokens, multiple=1):
    """Returns lists of indices, one for each packed row, the costliest first: each text, the longest first, goes into
    the row of the least cost among those with room. `multiple` divides the number of rows; some may be empty. A text of
    more than max_row_tokens has a row of its own."""
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    num_tokens = sum(min(length, max_row_tokens) for length in lengths)
    num_rows = multiple * math.ceil(num_tokens / max_row_tokens / multiple)
    while True:
        rows = [[] for _ in range(num_rows)]
        tokens = [0] * num_rows
        cost = [0.0] * num_rows
        for i in longest_first:
            with_room = [r for r in range(num_rows) if not rows[r] or tokens[r] + lengths[i] <= max_row_tokens]
            if not with_room:
                break
            row = min(with_room, key=lambda r: cost[r])
            rows[row].append(i)
            tokens[row] += lengths[i]
            cost[row] += lengths[i] + lengths[i] ** 2 / ATTENTION_TOKENS
        else:
            return [rows[r] for r in sorted(range(num_rows), key=lambda r: -cost[r])]
        num_rows += multiple


class Tree(NamedTuple):
    """Texts that begin alike: in a packed row their beginning stands once, and each text goes on in a branch."""
    prefix: int     # tokens of the beginning; each branch starts with its last token, whose successor may be learned
    texts: list     # of each text the indices of its examples: the last is the text, the others are its beginnings
    lengths: list   # tokens of each text

    @property
    def branches(self):
        return [length - self.prefix for length in self.lengths]

    @property
    def num_tokens(self):
        return self.prefix + sum(self.branches)


class PackedRow(NamedTuple):
    """A row for the model. See Qwen2.forward for the first three."""
    tokens: list
    lengths: list
    targets: list   # the token after each one if it is learned, else IGNORE
    examples: list  # the indices of its examples, in the order of their targets

    def inputs(self, device):
        """Returns tokens (1, T), lengths, and targets (1, T) as numpy: FSDP would move a tensor to the GPU, and
        counting them there waits for it."""
        return torch.tensor([self.tokens], device=device), self.lengths, np.array([self.targets])


EMPTY_ROW = PackedRow([0], [1], [IGNORE], [])       # of a process with nothing left to do
LEAST_SHARED = 16       # tokens that texts have in common before they share them


def pack_trees(examples, indices, max_row_tokens):
    """Returns the Trees of the examples `indices`, none of more tokens than a row may have, but for single texts."""
    # 1. Sorted by their tokens, examples that begin alike are neighbours. One that goes on with another and learns
    # nothing of that part is the same text: the steps of a trajectory, where each prompt holds the step before.
    texts = []
    for i in sorted(indices, key=lambda i: examples[i][0]):
        ids, loss_mask = examples[i]
        before = examples[texts[-1][-1]][0] if texts else None
        if before and ids[:len(before)] == before and not any(loss_mask[:len(before)]):
            texts[-1].append(i)
        else:
            texts.append([i])

    # 2. A text joins the tree of its neighbour, unless the next text is nearer, or the tree would then save less.
    shared = [0, *(shared_tokens(examples, *pair) for pair in zip(texts, texts[1:])), 0]
    trees = []
    for n, text in enumerate(texts):
        num_tokens = len(examples[text[-1]][0]) - 1
        if shared[n] >= max(LEAST_SHARED, shared[n + 1]):
            tree = trees[-1]
            prefix = min(shared[n] - 1, tree.prefix or math.inf)
            joined = Tree(prefix, [*tree.texts, text], [*tree.lengths, num_tokens])
            saved = len(tree.texts) * prefix > (len(tree.texts) - 1) * tree.prefix
            if saved and joined.num_tokens <= max_row_tokens:
                trees[-1] = joined
                continue
        trees.append(Tree(0, [text], [num_tokens]))
    return trees


def shared_tokens(examples, text, other):
    """Returns with how many tokens, that neither learns, two texts begin alike and go on."""
    length = math.inf
    for indices in (text, other):
        ids = examples[indices[-1]][0]
        loss_mask = examples[indices[0]][1]
        first_learned = loss_mask.index(True) if True in loss_mask else len(ids)
        length = min(length, first_learned, len(ids) - 1)
    ids, other_ids = (examples[indices[-1]][0] for indices in (text, other))
    return next((i for i in range(length) if ids[i] != other_ids[i]), length)


def packed_rows(examples, indices, rank, world_size, max_row_tokens):
    """Returns the PackedRows of one process, of the examples `indices` of all processes. Under FSDP these wait for each
    other at a row, so each has as many, some of them empty, of about the same cost."""
    trees = pack_trees(examples, indices, max_row_tokens)
    rows = pack_lengths([tree.num_tokens for tree in trees], max_row_tokens, world_size)[rank::world_size]
    return [lay_out(examples, [trees[t] for t in row]) if row else EMPTY_ROW for row in rows]


def lay_out(examples, trees):
    """Returns the PackedRow of some trees."""
    row = PackedRow([], [], [], [])
    for tree in trees:
        row.tokens.extend(examples[tree.texts[0][-1]][0][:tree.prefix])
        row.targets.extend([IGNORE] * tree.prefix)
        row.lengths.append((tree.prefix, tree.branches) if tree.prefix else tree.num_tokens)
        for text in tree.texts:
            ids, _ = examples[text[-1]]
            row.tokens.extend(ids[tree.prefix:-1])
            targets = [IGNORE] * (len(ids) - 1)
            for i in text:
                for position, is_learned in enumerate(examples[i][1][1:]):
                    if is_learned:
                        targets[position] = ids[position + 1]
            row.targets.extend(targets[tree.prefix:])
            row.examples.extend(text)
    return row


# -- Checkpoints

def check_same(before, after, where, flag="--out"):
    """Raises ValueError unless all that a run hangs on, {what: value}, is as when it began. where: its folder, for
    which `flag` would give another."""
    def show(value):
        return shorten(ascii(value).strip("'"), 200)
    changes = [f"{what} {show(before.get(what))} (now {show(value)})"
               for what, value in after.items() if before.get(what) != value]
    if changes:
        raise ValueError(f"{where} is of a run with {', '.join(changes)}; give these again to go on with it, or "
                         f"another {flag} to begin anew")


def save_state(cfg, step, model, optimizer, origin, keep=2, **more):
    """Writes all that is needed to go on after `step` steps, each process its own part, and `more`, to
    cfg.out/checkpoints/step-N, which has its name when it is whole. The last `keep` stay. origin: {what: value} of all
    that the run hangs on besides its settings."""
    rank, world_size = rank_and_size()
    final = Path(cfg.out, "checkpoints", f"step-{step:06d}")
    part = final.with_suffix(".part")
    if rank == 0:
        for leftover in final.parent.glob("*.part"):        # of a killed process
            shutil.rmtree(leftover)
        part.mkdir(parents=True)
    barrier()
    parameters = dict(model.named_parameters())
    moments = [{key: local_rows(value) for key, value in optimizer.state[p].items()} for p in parameters.values()]
    file = part / f"rank-{rank}.pt"
    try:
        torch.save({"step": step, "settings": vars(cfg), "origin": origin, "rng": torch.get_rng_state(), **more,
                    "model": {name: local_rows(p.detach()) for name, p in parameters.items()}, "optimizer": moments},
                   file)
    except RuntimeError as error:       # so torch says that the disk is full
        raise OSError(f"{file} cannot be written; is the disk full? ({shorten(str(error), 200)})") from None
    sync(file)
    barrier()
    if rank == 0:
        sync(part)
        part.rename(final)
        sync(final.parent)
        for folder in sorted(final.parent.glob("step-??????"))[:-keep]:
            folder.rename(folder.with_suffix(".part"))      # a folder that is half deleted must not look whole
            shutil.rmtree(folder.with_suffix(".part"))
    barrier()


def load_state(cfg, names, model, optimizer, origin):
    """Puts the newest state below cfg.out into model and optimizer and returns the rest of it, None where there is
    none. ValueError: the run had another number of processes, settings of these names or origin."""
    rank, world_size = rank_and_size()
    folders = sorted(Path(cfg.out, "checkpoints").glob("step-??????"))
    if not folders:
        return None
    newest = folders[-1]
    num = len(list(newest.glob("rank-*.pt")))
    check_same({"processes": num}, {"processes": world_size}, newest)
    state = torch.load(newest / f"rank-{rank}.pt", map_location="cpu", weights_only=True)
    before = {flag_of(name): state["settings"].get(name) for name in names}
    check_same(before | state["origin"], {flag_of(name): getattr(cfg, name) for name in names} | origin, newest)
    weights = state.pop("model")            # so that the caller does not keep them
    moments = state.pop("optimizer")
    for (name, p), values in zip(model.named_parameters(), moments):
        local_rows(p.detach()).copy_(weights[name])
        values = {key: value.to(p.device) for key, value in values.items()}
        if isinstance(p, DTensor):
            for key in values.keys() - {"step"}:        # a number, which is never sharded
                values[key] = DTensor.from_local(values[key], p.device_mesh, p.placements, run_check=False,
                                                 shape=p.shape, stride=p.stride())
        optimizer.state[p] = values
    torch.set_rng_state(state["rng"])
    return state


# -- Sizes, and the memory that they take

def num_parameters(config):
    """Returns the weights of (a block, the embedding, the head, which is 0 where it is the embedding, the model)."""
    C = config.hidden_size
    kv = config.num_key_value_heads * config.head_dim
    block = C * (2 * C + 2 * kv + 3 * config.intermediate_size) + 3 * C + 2 * kv
    table = config.vocab_size * C
    head = 0 if config.tie_word_embeddings else table
    return block, table, head, config.num_hidden_layers * block + table + head + C


def shape_of(model):
    """Returns the Config of a folder, of a published Qwen2.5 by its name, or of a preset ("7b", by default "tiny")."""
    if model and Path(model).is_dir():
        return Config.from_pretrained(model)
    named = re.fullmatch(r"(?:.*/)?Qwen2\.5-(?:Coder-|Math-)?([\d.]+b)(?:-Instruct)?", model, re.I)
    return Config.preset(named[1].lower() if named else model or "tiny")


def plan_memory(config, row_tokens, gpus, compute=torch.bfloat16, recompute=True, critic=False, reference=False,
                sampled_tokens=0, max_logits=GPU_LOGITS):
    """Returns {part: bytes} of one GPU at the peak of a training step, without CUDA's, NCCL's and the allocator's own.
    row_tokens: of a packed row, all learned. sampled_tokens: of the KV cache of a sampling copy of the model, 0 for
    none. critic, reference: whether there are a second model that is trained and a frozen one."""
    size = compute.itemsize
    C = config.hidden_size
    F = config.intermediate_size
    L = config.num_hidden_layers
    kv = config.num_key_value_heads * config.head_dim
    block, table, head, total = num_parameters(config)
    trained = 16 * total // gpus                            # weight, gradient and two moments, in float32
    block_token = size * (8 * C + 2 * kv + 4 * F)           # what autograd keeps of a token in a block
    kept = L * row_tokens * (size * C if recompute else block_token)
    backward = row_tokens * (2 * size * (C + F) + (block_token if recompute else 0))
    logits = 12 * min(row_tokens * config.vocab_size, max_logits) + 4 * table   # a piece, and the head's new gradient
    if gpus > 1:
        gathered = size * (table + head + 2 * block)
        backward += (size + 4) * block                      # its gradient before it is shared out
        logits = max(logits, (size + 4) * (table + head) - kept)
    else:
        cast_blocks = 1 if recompute else L
        gathered = 0 if compute is torch.float32 else size * block * cast_blocks
    parts = {"actor": trained, "gathered": gathered, "activations": kept, "backward": max(backward, logits)}
    if critic:
        parts["critic"] = trained
    if reference:
        parts["reference"] = 4 * total // gpus
    if sampled_tokens:
        parts["sampling copy"] = size * total
        parts["KV cache"] = 2 * size * L * kv * sampled_tokens
    return parts


def format_plan(cfg, critic=False, **more):
    """Returns the text of --plan, for which no weights and no GPU are needed: memory of one GPU by part, disk (two
    checkpoints and one that is being written, each of a weight and two moments), and CPUs alone, in float32, where the
    copy for sampling is that of cpu_linear.pack. critic, more: see plan_memory."""
    config = shape_of(cfg.model)
    total = num_parameters(config)[-1]
    memory = partial(plan_memory, config, cfg.max_row_tokens, recompute=total > RECOMPUTE_ABOVE, critic=critic, **more)
    parts = memory(cfg.gpus, getattr(torch, "bfloat16" if cfg.dtype == "auto" else cfg.dtype))
    lines = [f"  {name:<14} {size / 2**30:8.2f}" for name, size in [*parts.items(), ("total", sum(parts.values()))]]
    num_trained = total * (1 + critic)
    ram = sum(memory(1, torch.float32, max_logits=CPU_LOGITS).values()) + PROCESS_BYTES
    fits = "fits" if ram < 24e9 else "does not fit"
    return "\n".join([
        f"{cfg.model}: {total:,} weights; {cfg.gpus} GPUs, rows of {cfg.max_row_tokens:,} tokens", "", "GiB per GPU",
        *lines, "", f"{3 * 12 * num_trained / 2**30:,.0f} GiB of disk in --out, for checkpoints",
        f"On CPUs alone: {ram / 2**30:.1f} GiB of RAM, which {fits} in 24 GB"])


