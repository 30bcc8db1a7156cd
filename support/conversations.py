"""Conversations to learn from: trajectories that an expert has played, and files of a user."""
import hashlib, json, re
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import tasks
from env import SCAFFOLDS, recorded_prompt
from support.files import TEXT, parse_json, shorten
from support.records import end_reason, read_records, steps_of
from support.storage import Blobs, MissingBlob

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}


@dataclass
class Conversation:
    """The source of one training example."""
    messages: list      # [{"role", "content"}], with sampled ids as "tokens" where they are used; the last is learned
    assistant_turns: list       # of int: indices of the messages that are learned
    source: str         # file, and line or entry, for messages to the user
    origin: str         # all of one origin, such as a trajectory, validate together or not at all
    is_miniature: bool = False      # the data of the task are


class InvalidConversation(ValueError):
    """A conversation that cannot be used; the message says why."""


def read_conversations(path, data="data", tokenizer=None, log=print):
    """Returns ([Conversation, ...], {reason: sources that were left out}) of a folder of trajectories, or of a file: a
    trajectory, or a user's conversations. data: where prepared tasks are, for the hashes of the held-out ones.
    tokenizer: of the model to be trained; the ids that an expert sampled are used if it had the same one. ValueError:
    something held out, a file that is broken as a whole, or nothing to train on."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"there is no {path}; collect it with: python sft.py --collect --trajectories {path}")
    held_out = tasks.held_out_hashes(data)
    if path.is_file() and not path.read_bytes().startswith(b'{"type": "header"'):
        readers = [(source, partial(read_own, entry, source)) for source, entry in read_entries(path)]
    else:
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        tokenizer_id = tokenizer.fingerprint() if tokenizer else None
        readers = [(str(file), partial(read_trajectory, file, held_out, tokenizer_id)) for file in files]

    conversations = []
    left_out = defaultdict(list)        # reason -> sources
    for source, read in readers:
        try:
            conversations += read()
        except InvalidConversation as error:
            left_out[str(error)].append(source)
        except MissingBlob:     # of a script that a prompt shows
            left_out["a missing blob"].append(source)
    for conversation in conversations:
        refuse_held_out_prompts(conversation)
    num_turns = sum(len(conversation.assistant_turns) for conversation in conversations)
    lines = [f"{path}: {len(conversations)} conversations with {num_turns} replies to learn"]
    lines += [named(f"left out, {reason}", sources) for reason, sources in left_out.items()]
    if not conversations:
        raise ValueError("there is nothing to train on. " + "\n".join(lines))
    if num := sum(conversation.is_miniature for conversation in conversations):
        lines.append(f"  {num} are of MINIATURE data, which stand in for the real ones")
    log("\n".join(lines))
    return conversations, dict(left_out)


def named(what, sources):
    """Returns a line of a log: how many there are, and the first of them."""
    return f"  {what}: {len(sources)} ({', '.join(sources[:5])}{', ...' if len(sources) > 5 else ''})"


def read_entries(file):
    """Returns [(source, entry)] of a user's file: a list as JSON or, if named .jsonl, JSON lines, which stay bytes."""
    raw = file.read_bytes()
    if file.suffix == ".jsonl":
        lines = enumerate(raw.split(b"\n"), 1)
        return [(f"{file}, line {i}", line) for i, line in lines if line.strip()]
    entries = parse_json(raw, ("a list of conversations", lambda value: isinstance(value, list)), file)
    return [(f"{file}, entry {i}", entry) for i, entry in enumerate(entries, 1)]


def read_own(entry, source):
    """Returns [the Conversation] of an entry of a user's file, {"messages": [{"role", "content"}]} or ShareGPT's
    {"conversations": [{"from", "value"}]}, with or without a "system". Every turn of the assistant is learned."""
    if isinstance(entry, bytes):
        try:
            entry = json.loads(entry)
        except (ValueError, RecursionError):
            raise InvalidConversation("not JSON") from None
    turns = entry.get("messages", entry.get("conversations")) if isinstance(entry, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise InvalidConversation('no list "messages" or "conversations"')
    if entry.get("system"):
        turns = [{"role": "system", "content": entry["system"]}, *turns]
    messages = []
    for turn in turns:
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if role not in list(ROLES):     # it may be of any type
            raise InvalidConversation(f"unknown role {shorten(repr(role), 40)}")
        if not TEXT[1](content):
            raise InvalidConversation("a content that is no text")
        messages.append({"role": ROLES[role], "content": content})
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and message["content"].strip()]
    return [conversation_of(messages, turns, source, source)]


def conversation_of(messages, assistant_turns, source, origin, is_miniature=False):
    """Returns a Conversation that ends in the last turn of the assistant that is learned."""
    if not assistant_turns:
        raise InvalidConversation("no turn of the assistant")
    return Conversation(messages[:assistant_turns[-1] + 1], assistant_turns, source, origin, is_miniature)


def read_learnable(file, held_out, tokenizer_id):
    """Returns the lines of a trajectory, without ids of another tokenizer, which say nothing to the model that learns.
    ValueError: it is of a held-out task. held_out: see tasks.held_out_hashes. tokenizer_id: the fingerprint of the
    model's tokenizer."""
    try:
        lines = read_records(file)
    except ValueError as error:
        raise InvalidConversation(str(error)) from None
    if not lines:
        raise InvalidConversation("empty")
    head = lines[0]
    tasks.refuse_held_out(head["task"], head.get("data_sha256", {}), held_out)
    if head.get("scaffold", SCAFFOLDS[0]) != SCAFFOLDS[0]:      # which shows a state in other words
        raise InvalidConversation(f"of the scaffold {head['scaffold']}")
    if head.get("tokenizer") != tokenizer_id:
        for line in lines:
            for message in line.get("messages", ()):
                message.pop("tokens", None)
    return lines


def read_trajectory(file, held_out, tokenizer_id):
    """Returns [Conversation, ...] of a trajectory: one, or with shorter prompts one for each reply. Only replies that
    were carried out are learned, and under medium prompts only edits whose run did not fail. See read_learnable."""
    lines = read_learnable(file, held_out, tokenizer_id)
    if not end_reason(lines):
        raise InvalidConversation("not finished: collect again to go on with it")
    head = lines[0]
    steps = steps_of(lines)
    folder = next((parent for parent in file.resolve().parents if (parent / "blobs").is_dir()), file.parent)
    blobs = Blobs(folder / "blobs")

    is_full = head["prompt_format"] == "full"
    is_miniature = head["miniature"]
    messages = []       # of a reply that could not be read there is none of the assistant
    before = head
    assistant_turns = []
    conversations = []
    for line in (head, *steps):
        if line["type"] == "step" and line["valid"] and line["messages"][0]["role"] == "assistant":
            assistant_turns.append(len(messages))
            if not is_full and not (head["prompt_format"] == "medium" and line["kind"] == "failed"):
                prompt = recorded_prompt(head, tasks.load(head["task"]), before, before["snapshot"], blobs,
                                         head["steps"] - line["index"])
                conversations.append(conversation_of([*prompt, line["messages"][0]], [len(prompt)],
                                                     f"{file}, message {len(messages)}", str(file), is_miniature))
        messages += line["messages"]
        before = line
    whole = conversation_of(messages, assistant_turns, str(file), str(file), is_miniature)
    return [whole] if is_full else conversations


def refuse_held_out_prompts(conversation):
    """Raises ValueError where a conversation is about a held-out task by the first line of a prompt."""
    for message in conversation.messages:
        match = re.match(r"Task: (\S+)\n", message["content"]) if message["role"] == "user" else None
        if match and match[1] in tasks.names("held-out"):
            raise ValueError(f"{conversation.source} is about {match[1]}, which is held out: it may not be trained on")


def hold_back(origins, share, seed):
    """Returns the indices of about that share of the examples, at least one: all of some origins, as neighbouring
    states of a trajectory are nearly alike. origins: that of each example."""
    if len(set(origins)) == 1:
        origins = range(len(origins))
    wanted = max(1, round(share * len(origins)))
    groups = defaultdict(list)
    for i, origin in enumerate(origins):
        groups[origin].append(i)
    groups = list(groups.values())
    chosen = []
    for g in torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist():
        if chosen and len(chosen) + len(groups[g]) - wanted >= wanted - len(chosen):
            break
        chosen += groups[g]
    return set(chosen)


def hash_examples(*lists):
    """Returns the sha256, shortened, of lists of examples."""
    sha = hashlib.sha256()
    for examples in lists:
        for part in (len(examples), *examples):
            sha.update(repr(part).encode())
    return sha.hexdigest()[:16]
