"""Exploration-enriched fine-tuning: collects trajectories of a diverse expert, and trains a model on them.

    python sft.py                                               # all in miniature: collects, trains a tiny model
    torchrun --nproc_per_node 8 sft.py                          # with CUDA the paper's recipe for Qwen2.5-7B
    python sft.py --collect --expert http://host:8000/v1#name   # an expert behind an OpenAI-compatible server
    python sft.py --model DIR                                   # fine-tunes a checkpoint on what was collected

Collecting: of the ideas that the expert writes (or that are shipped with a task) the 10 that differ most are kept, and
1 to 3 of them stand in the expert's first prompt of each trajectory. The recorded prompt does not have them, so that
the model learns to have the idea itself. Held-out tasks are refused, by name and by the hashes of those in --data.

The folder --trajectories receives TASK-K.jsonl (a header, then a line a step), blobs/ (the files of every state),
ideas/TASK.json and manifest.json. A killed run goes on with the same command; a larger --num or another --task adds.
"""
import math, random, time
from array import array
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import support  # noqa: F401  before torch

import torch
import torch.distributed as dist

import sample
import tasks
from model import use_kernels
from support import cli, collection, endpoint, logs, miniature, recipes
from support.cli import RunError, exit_status, refuse_torchrun, run_main
from support.conversations import hash_examples, hold_back, named, read_conversations
from support.distributed import (
    add_gradients, batch_indices, build_model, compute_type, export_model, format_plan, init_distributed,
    joined, load_state, map_rows, optimizer_step, packed_rows, rank0_broadcast, row_threads, save_state)
from support.files import folder_lock, write_atomic
from support.ideas import choose_ideas
from support.parallel import Progress, run_parallel
from support.play import LEARNED_SEEDS, AgentSettings, model_policy, play_trajectory, prepare_tasks, write_agent
from support.pretrained import hash_checkpoint
from support.records import end_reason, read_record, trajectory_path
from support.storage import ResultCache

PARALLEL = 8                # trajectories that are collected at the same time
VALIDATION_SHARE = 0.05     # of the examples


@dataclass
class Settings(AgentSettings):
    collect: bool = False  # collect trajectories of an expert
    expert: str = "scripted"  # who acts: scripted (no model: it tries the ideas shipped with a task, with short
        # prompts the constants of the script), a folder, a hub id, tiny, or http://host:port/v1#name
    task: str = "held-in"  # a task's id, or held-in for all that may be trained on
    trajectories: str = "runs/trajectories"  # what is collected goes here, and what is trained on comes from here: that
        # folder, or your own file (.json or .jsonl) of "messages" or ShareGPT "conversations"
    model: str = ""  # what is fine-tuned: a folder, a hub id, or tiny (from scratch); empty: that of --preset
    out: str = "runs/sft"  # the model as a Hugging Face folder, log.jsonl and checkpoints; a run there is continued
    preset: str = ""  # tiny (the paper in miniature), 0.5b, 1.5b or 7b (the paper's); each collects first, and other
        # flags override it. Empty: that for the size of --model; without it 7b under torchrun with CUDA, else tiny
    plan: bool = False  # print memory per GPU by part, and end; --model may be a size alone, such as 7b
    gpus: int = 8  # that --plan plans for; torchrun --nproc_per_node decides how many there really are
    epochs: float = 2.0  # times that training sees each conversation
    updates: int | None = None  # optimizer steps; none: as many as the epochs take
    batch: int = 64  # conversations of one update, over all processes
    max_row_tokens: int = 15000  # tokens of a conversation, which is cut there, and of a packed row
    lr: float = 2e-5  # peak learning rate; it falls along half a cosine from the first update on
    warmup: int = 0  # updates over which it rises, besides
    beta2: float = 0.999  # of AdamW
    save_every: int = 50  # updates between checkpoints, at which the model is validated
    num: int = 8  # trajectories per task
    ideas: int = 100  # candidates that the expert writes for each task; 0: the ideas shipped with it
    coder: str = "expert"  # who carries out the (AI) actions: expert (the same model), or none
    temperature: float = 1.0  # of the expert

    def __post_init__(self):
        super().__post_init__()
        cli.check_choices(self, coder=("expert", "none"))
        if not self.collect:        # an expert may compute in float64
            cli.check_choices(self, dtype=("auto", "float32", "bfloat16"))
        cli.check_positive(self, "gpus", "epochs", "updates", "batch", "max_row_tokens", "lr", "save_every", "num")
        cli.check_range(self, math.inf, "warmup", "ideas", "temperature")
        if endpoint.is_server(self.expert):
            endpoint.address(self.expert)
        if self.model and not self.preset and (self.collect or self.expert != "scripted"):
            raise ValueError("--expert acts with --collect, and --model is trained without it; give one of the two")


# -- Collecting

def collect(cfg, load=sample.load):
    """Collects cfg.num trajectories of each task of cfg.task and returns what manifest.json then holds."""
    tasks.refuse_held_out_names(tasks.names(cfg.task))
    missing = set(miniature.SCRIPTED_ACTIONS[cfg.prompt_format]) - set(cfg.actions)
    if cfg.expert == "scripted" and missing:
        raise ValueError(f"the scripted expert needs --actions with {', '.join(sorted(missing))} too")
    folder = Path(cfg.trajectories)
    with folder_lock(folder, "sft.py --collect"):
        # 1. The data, nothing of them held out, and what is there already.
        infos = defaultdict(list)       # id of a task -> task.json of each of its seeds
        prepared = prepare_tasks(cfg, LEARNED_SEEDS)
        held_out = tasks.held_out_hashes(cfg.data)
        for task, info in prepared:
            tasks.refuse_held_out(task.id, info["sha256"], held_out)
            infos[task.id].append(info)
        manifest = collection.open_manifest(cfg, infos)
        jobs = [(tasks.load(id), trajectory_path(folder, id, k), k) for k in range(cfg.num) for id in infos]
        records = {path: read_record(path) for _, path, _ in jobs}
        jobs = [(task, path, k) for task, path, k in jobs if not end_reason(records[path])]

        # 2. The expert, and the ideas of each task.
        expert = None
        if jobs and cfg.expert != "scripted":
            expert = load(cfg.expert, dtype=cfg.dtype, device=cfg.device, rows=min(PARALLEL, len(jobs)),
                          context=cfg.context, timeout_s=cfg.reply_seconds, kernels=cfg.kernels)
            if expert.context and cfg.max_new_tokens >= expert.context:
                raise ValueError(f"--max-new-tokens {cfg.max_new_tokens} leaves no room in --context {expert.context}")
        lacking = [id for id in infos if "ideas" not in manifest["tasks"][id]]
        chosen = run_parallel([(cfg, tasks.load(id), expert) for id in lacking], choose_ideas, PARALLEL)
        for id, ideas in zip(lacking, chosen):
            manifest["tasks"][id]["ideas"] = ideas
        write_atomic(folder / "manifest.json", {**manifest, "complete": False})

        # 3. The trajectories.
        cache = ResultCache(folder / "cache")
        progress = Progress(records, cfg.steps)
        jobs = [(cfg, task, path, k, manifest["tasks"][task.id]["ideas"], infos[task.id][k % len(infos[task.id])])
                for task, path, k in jobs]
        run_parallel(jobs, partial(collect_one, expert, cache, progress), PARALLEL, progress)
        collection.count_trajectories(manifest, folder)
        write_atomic(folder / "manifest.json", manifest)
        return manifest


def collect_one(expert, cache, progress, cfg, task, path, k, ideas, info):
    """Plays trajectory k of a task to its end. expert: None for the scripted one. info: task.json of its data."""
    rng = random.Random(f"{cfg.seed} {task.id} {k}")
    drawn = rng.sample(ideas, min(rng.randint(1, 3), len(ideas)))
    if expert:
        hints = "".join(f"\n- {idea['title']}: {idea['instruction']}" for idea in drawn)
        policy = model_policy(cfg, expert, f"\n\nIdeas that may be worth trying:{hints}")
    else:
        policy = miniature.scripted_policy(cfg, task, drawn, rng)
    tokenizer = getattr(expert, "tokenizer", None)
    header = {"expert": cfg.expert, "ideas": [idea["title"] for idea in drawn], "data_sha256": info["sha256"],
              "tokenizer": tokenizer and tokenizer.fingerprint()}
    coder = expert if cfg.coder == "expert" else None
    play_trajectory(cfg, task, k, path, policy, coder, cfg.trajectories, cache, progress, header, info.get("seed", 0))


# -- The data set. An example is (ids, loss_mask): token ids, and for each of them whether it is learned.

def build_dataset(cfg, tokenizer, log=print):
    """Returns (examples to train on, examples to validate with) from cfg.trajectories. ValueError: nothing is left."""
    # 1. Conversations become examples.
    conversations, _ = read_conversations(cfg.trajectories, cfg.data, tokenizer, log)
    limit = cfg.max_row_tokens + 1
    examples = []
    origins = []    # of each example
    cut = defaultdict(list)     # what happened -> sources
    for conversation in conversations:
        ids, loss_mask = tokenizer.conversation(conversation.messages, set(conversation.assistant_turns))
        if len(ids) > limit:
            cut[f"cut at {cfg.max_row_tokens} tokens"].append(conversation.source)
        if any(loss_mask[:limit]):
            examples.append((array("i", ids[:limit]), bytes(loss_mask[:limit])))    # 5 bytes a token; lists take 44
            origins.append(conversation.origin)
        else:
            cut["left out, no reply before the cut"].append(conversation.source)
    for what, sources in cut.items():
        log(named(what, sources))

    # 2. Some of them validate; the others are trained on.
    held_back = hold_back(origins, VALIDATION_SHARE, cfg.seed)
    valid = [example for i, example in enumerate(examples) if i in held_back]
    train = [example for i, example in enumerate(examples) if i not in held_back]
    if not train or not valid:
        raise ValueError(f"{len(examples)} conversations are too few to train on and to validate with; collect more, "
                         "or cut fewer with a larger --max-row-tokens")
    if cfg.model == "tiny" and cfg.prompt_format == "short" and cfg.show_scores:
        for conversation in miniature.imagined_conversations(cfg):
            ids, loss_mask = tokenizer.conversation(conversation.messages, {conversation.assistant_turns[-1]})
            train.append((array("i", ids), bytes(loss_mask)))
    return train, valid


# -- Training

SCHEDULE = ("batch", "max_row_tokens", "lr", "warmup", "beta2", "dtype", "kernels", "seed")   # of a run that goes on


def cosine(step, steps, peak):
    """Returns the learning rate of a step: half a cosine from `peak` at step 0 towards 0 at step `steps`."""
    return peak * 0.5 * (1 + math.cos(math.pi * step / steps))


def nll_gradients(model, rows, num_targets, world_size, device, num_ids, threads=None):
    """Adds the gradients of the mean negative log-prob over all `num_targets` targets of the step, of all processes.
    Returns this process's part of that mean. num_ids: of the tokenizer. threads: see add_gradients."""
    def loss_of(row):
        tokens, lengths, targets = row.inputs(device)
        logp, _, _ = model(tokens, lengths=lengths, targets=targets, num_token_ids=num_ids)
        loss = -logp.sum() / num_targets
        return loss * world_size, loss.detach()     # FSDP averages over the processes; this is a sum
    return add_gradients(model, rows, loss_of, threads)


def validate(model, rows, world_size, device, num_ids, threads=None):
    """Returns (mean negative log-prob, share of targets that were the most likely token), of all processes."""
    def sums_of(row):
        tokens, lengths, targets = row.inputs(device)
        logp, _, is_most_likely = model(tokens, lengths=lengths, targets=targets, num_token_ids=num_ids)
        return torch.stack([-logp.double().sum(), is_most_likely.sum(), torch.ones_like(logp).sum()])
    sums = sum(map_rows(sums_of, rows, threads))
    if world_size > 1:
        dist.all_reduce(sums)
    loss, num_right, count = sums.tolist()
    return loss / count, num_right / count


def train(cfg, examples, valid, tokenizer, config, folder):
    """Fine-tunes on examples and writes cfg.out; goes on from the newest checkpoint there. folder: of the model that it
    begins with, None for random weights."""
    rank, world_size, device = init_distributed(cfg.device)
    use_kernels(cfg.kernels, device)
    model = build_model(config, folder, device, cfg.seed, compute=compute_type(cfg.dtype, device, config),
                        kernels=cfg.kernels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, cfg.beta2), weight_decay=0, fused=True)
    num_updates = cfg.updates or math.ceil(cfg.epochs * len(examples) / cfg.batch)
    products = f"{model.compute_dtype} on {device.type}".removeprefix("torch.")
    origin = {"optimizer steps": num_updates, "products in": products}
    origin |= rank0_broadcast(lambda: {"--model of sha256": hash_checkpoint(folder) if folder else "none",
                                       "texts of sha256": hash_examples(examples, valid)})
    state = load_state(cfg, SCHEDULE, model, optimizer, origin)
    threads = row_threads(config, device)
    valid_rows = packed_rows(valid, range(len(valid)), rank, world_size, cfg.max_row_tokens)
    log = logs.Log(cfg, "step", num_updates, state, model, threads)

    for step in range(log.first, num_updates):
        start = time.monotonic()

        # 1. The examples of this step, and of them the packed rows of this process.
        batch = batch_indices(len(examples), step, cfg.batch, cfg.seed)
        rows = packed_rows(examples, batch, rank, world_size, cfg.max_row_tokens)

        # 2. Forward and backward.
        num_targets = sum(sum(examples[i][1]) for i in batch)
        loss_part = nll_gradients(model, rows, num_targets, world_size, device, tokenizer.size, threads)
        loss = loss_part.double()
        if world_size > 1:
            dist.all_reduce(loss)

        # 3. The update.
        lr = cosine(step, num_updates, cfg.lr) * min(1.0, (step + 1) / (cfg.warmup or 1))
        optimizer.param_groups[0]["lr"] = lr
        try:
            norm = optimizer_step(model, optimizer).item()
        except RunError as error:       # each process names its part
            numbers = sorted(i for row in rows for i in row.examples)
            raise RunError(f"step {step + 1}: loss {loss_part.item()}, {error}; rank {rank}, conversations {numbers}. "
                           f"The checkpoints in {cfg.out} are from before") from None

        if threads is None:     # a small model would spend a fifth of its time on getting the pages back
            logs.trim_memory()
        seconds = time.monotonic() - start

        # 4. The log, with a validation where a checkpoint follows.
        num_tokens = sum(len(examples[i][0]) - 1 for i in batch)
        figures = {"step": step + 1, "loss": loss.item(), "grad_norm": norm, "lr": lr, "tokens_s": num_tokens / seconds,
                   **log.work(logs.flops_of(config, rows), seconds), "seconds": seconds}
        is_saved = step + 1 == num_updates or (step + 1) % cfg.save_every == 0
        if is_saved:
            figures["valid_loss"], figures["valid_accuracy"] = validate(
                model, valid_rows, world_size, device, tokenizer.size, threads)
        log.write(figures)

        # 5. The checkpoint.
        if is_saved:
            save_state(cfg, step + 1, model, optimizer, origin)
    export_model(model, tokenizer, cfg.out)


def fine_tune(cfg):
    """Trains cfg.model on cfg.trajectories and writes cfg.out."""
    with joined(cfg, "sft.py") as (rank, world_size, device):
        log = print if rank == 0 else lambda line: None
        if cfg.preset:
            rank0_broadcast(partial(collect_first, cfg))
        learned = collection.collected_format(cfg)
        cfg = replace(cfg, **learned)       # whatever was typed here: imagined states are of the same form
        folder, config, tokenizer = miniature.starting_point(cfg)
        examples, valid = build_dataset(cfg, tokenizer, log)
        num_tokens = sum(len(ids) for ids, _ in examples)
        log(f"{cfg.model}: training on {len(examples)} conversations of {num_tokens:,} tokens; {len(valid)} to "
            f"validate; {world_size} processes, {device}")
        train(cfg, examples, valid, tokenizer, config, folder)
        agent = collection.agent_of(cfg, learned, folder)       # eval.py and rl.py read it
        if rank == 0 and agent:
            write_agent(cfg.out, agent)
        log(f"Written to {cfg.out}: the model, log.jsonl, checkpoints")
        if cfg.preset == "tiny":
            log("\nNext: python rl.py")


# -- The command

def collect_first(cfg):
    """Collects for a preset: the miniature what is lacking, the others where nothing was collected, by any expert."""
    if cfg.preset == "tiny" and Path(cfg.trajectories).is_file():
        raise ValueError(f"{cfg.trajectories} is a file of conversations, and the miniature collects its own; say what "
                         "is trained on the file: --model DIR, or --model tiny")
    if Path(cfg.out).resolve() == Path(cfg.trajectories).resolve():
        raise ValueError(f"--out and --trajectories are both {cfg.out}; give two folders")
    if cfg.preset == "tiny" or not collection.is_collected(Path(cfg.trajectories)):
        print(f"1. Collecting: an expert edits and runs the starters of --task {cfg.task}.")
        print(collection.report(collect(cfg)))
        print(f"\n2. Training {cfg.model} on what it did.", flush=True)
    elif Path(cfg.trajectories).is_dir():
        print(f"{cfg.trajectories} is trained on as it is; --collect with --num or --task adds to it", flush=True)


def run(cfg):
    if cfg.plan:
        print(format_plan(cfg))
        return
    if cfg.collect:
        refuse_torchrun("collecting")
        print("\n" + collection.report(collect(cfg)))
        print(f"Written to {cfg.trajectories}: manifest.json, trajectories, blobs")
    else:
        fine_tune(cfg)


def main(argv=None):
    cfg = cli.parse(Settings, argv, recipes.fill_sft)
    folder = cfg.out
    if cfg.collect or cfg.preset:
        folder = f"{cfg.trajectories} and {cfg.out}"
    return exit_status("sft.py", partial(run, cfg), folder)


if __name__ == "__main__":
    run_main(main)
