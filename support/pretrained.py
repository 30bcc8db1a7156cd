"""Folders of published models: config.json, the weights in safetensors files, the files of the tokenizer."""
import hashlib
import json
import re
import shutil
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.files import FLAG, check_form, is_number, parse_json, sync, up_to, write_atomic

MAX_LAYERS = 2**10          # what a config.json may ask for, so that no file starts an endless build
MAX_SIZE = 2**24
SHARD_BYTES = 5 * 10**9     # of the largest file of weights
HASHED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def check_config(config, head_dim, path):
    """Raises ValueError where a Config read from a file is of no model. head_dim: that of the file, or None."""
    forms = {bool: FLAG, int: up_to(MAX_SIZE), float: ("a number above 0", lambda value: is_number(value) and value > 0)}
    form = {field.name: forms[field.type] for field in fields(config)}
    check_form(vars(config), form | {"num_hidden_layers": up_to(MAX_LAYERS)}, path)
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(f"{path}: num_attention_heads {config.num_attention_heads} must be a multiple of "
                         f"num_key_value_heads {config.num_key_value_heads}")
    head_dim = head_dim or config.head_dim
    if config.num_attention_heads * head_dim != config.hidden_size:
        raise ValueError(f"{path}: hidden_size {config.hidden_size} must be num_attention_heads "
                         f"{config.num_attention_heads} times the head width {head_dim}")


def read_json(path):
    if not path.is_file():
        raise ValueError(f"{path.parent} holds no {path.name}; expected the folder of a Qwen2.5 checkpoint")
    return parse_json(path.read_bytes(), {}, path)


def write_checkpoint(folder, config, tensors, dtype, max_shard_bytes=SHARD_BYTES):
    """Writes config.json and model.safetensors, or shards of at most max_shard_bytes with their index.

    tensors: an iterable of (name, tensor), of which one shard is held at a time. The config is removed first and
    written last: a folder whose writing broke off does not load.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    sync(folder)

    weight_map = {}
    total_bytes = 0
    for count, shard in enumerate(split_shards(tensors, dtype, max_shard_bytes), 1):
        path = folder / f"model-{count:05d}.safetensors"
        try:
            save_file(shard, path, metadata={"format": "pt"})
        except SafetensorError as error:        # such as a full disk
            raise OSError(f"{path} cannot be written: {error}") from None
        sync(path)
        weight_map |= dict.fromkeys(shard, path.name)
        total_bytes += sum(tensor.nbytes for tensor in shard.values())
    if count == 1:
        path.rename(folder / "model.safetensors")
    else:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        write_atomic(folder / "model.safetensors.index.json", index)
    sync(folder)
    write_config(config, folder, dtype)
    for path in folder.glob("model*.safetensors"):      # which safetensors makes for their owner alone
        shutil.copymode(folder / "config.json", path)
    sync(folder)


def write_config(config, folder, dtype):
    """Writes config.json as transformers and vLLM expect it."""
    values = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "use_sliding_window": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    write_atomic(Path(folder) / "config.json", {**values, **asdict(config)})


def split_shards(tensors, dtype, max_shard_bytes):
    """Yields {name: tensor} for each file, always the same dictionary, so that one shard is held at a time."""
    shard = {}
    shard_bytes = 0
    for name, tensor in tensors:
        tensor = tensor.to("cpu", dtype).contiguous()
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            yield shard
            shard.clear()
            shard_bytes = 0
        shard[name] = tensor
        shard_bytes += tensor.nbytes
    yield shard


def find_folder(path, files=("*.json", "*.jinja", "*.safetensors", "merges.txt")):
    """Returns the local folder of a checkpoint; `files` of a hub id ("owner/name") are downloaded once into a cache."""
    if str(path).lower().startswith(("http://", "https://")):       # not shown: it may hold a password
        raise ValueError("a server's model has no weights here; give a folder or a hub id")
    if Path(path).is_dir():
        return Path(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise ValueError(f"no model folder {str(path)!r}, and it is not a hub id such as Qwen/Qwen2.5-0.5B-Instruct")
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(str(path), allow_patterns=list(files)))
    except Exception as error:      # the hub's own, and those of the HTTP library below it
        raise ValueError(f"no folder {str(path)!r} here, and the hub did not give it: {error}") from None


def small_files(model):
    """Returns a folder with the small files of the model that --model names, or None."""
    try:
        return None if model in ("", "tiny") else find_folder(model, ("*.json",))
    except ValueError:      # there is no such model; who loads it says so
        return None


def hash_checkpoint(folder):
    """Returns a shortened sha256 of the weights, the config and the tokenizer in a folder."""
    hashes = {}
    for path in sorted(Path(folder).iterdir()):
        if path.is_file() and (path.suffix == ".safetensors" or path.name in HASHED):
            with path.open("rb") as stream:
                hashes[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]


def read_headers(folder):
    """Returns {tensor name: (file, shape)} of model.safetensors, or of the files that the index of a folder names."""
    index = folder / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        files = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    headers = {}
    for file in sorted(files):
        path = folder / file
        if path.name != file or not path.is_file():
            raise ValueError(f"{folder} lacks {file!r:.80}; expected model.safetensors, or {index.name} and its files")
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():
                    headers[name] = path, tuple(tensors.get_slice(name).get_shape())
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); download it again") from None
    return headers


def load_tensors(folder, parameters, slice_bytes=32 * 2**20):
    """Fills parameters from the checkpoint in `folder`, a slice of rows at a time.

    parameters: {name: (tensor, first, shape)}; the tensor receives the rows from `first` on of one of this shape.
    A head in the checkpoint that no parameter takes is left out: of a tied model, or where a critic has another.
    ValueError: missing, unexpected and mis-shaped tensors, before anything is copied.
    """
    headers = read_headers(folder)
    shared = sorted(parameters.keys() & headers.keys())
    faults = {
        "missing": sorted(parameters.keys() - headers.keys()),
        "unexpected": sorted(headers.keys() - parameters.keys() - {"lm_head.weight"}),
        "of another shape": [f"{name} (expected {parameters[name][2]}, found {headers[name][1]})"
                             for name in shared if parameters[name][2] != headers[name][1]],
    }
    text = [f"{len(names)} {fault}: {', '.join(names[:5])}" for fault, names in faults.items() if names]
    if text:
        raise ValueError(f"{folder} does not fit its config.json: {'; '.join(text)}")
    with torch.no_grad():
        for name, (rows, first, _) in parameters.items():
            step = max(1, slice_bytes // max(1, rows[:1].nbytes))
            for start in range(0, len(rows), step):
                stop = min(start + step, len(rows))
                # Opened anew for each slice: the file is mapped, and pages once read count until it is closed.
                with safe_open(headers[name][0], framework="pt") as file:
                    rows[start:stop].copy_(file.get_slice(name)[first + start:first + stop])
