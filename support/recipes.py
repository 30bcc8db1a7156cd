"""Settings that hold where nothing was typed: --preset, and which one fits a model; for sft.py and rl.py."""
import math, os
from pathlib import Path

import torch

from support import miniature
from support.distributed import num_parameters, shape_of
from support.play import read_agent
from support.pretrained import find_folder
from support.prompts import MEDIUM_AGENT

PRESETS_BELOW = {"tiny": 50e6, "0.5b": 1e9, "1.5b": 4e9, "7b": math.inf}    # weights of the models that each is for
SFT_SMALL = {**MEDIUM_AGENT, "num": 4, "steps": 9, "max_row_tokens": 2048, "batch": 16, "warmup": 4, "save_every": 20}
SFT = {     # --preset: what differs from the defaults, which are the paper's figures
    "tiny": miniature.TINY,
    "0.5b": {"model": "Qwen/Qwen2.5-Coder-0.5B-Instruct", **SFT_SMALL},
    "1.5b": {"model": "Qwen/Qwen2.5-Coder-1.5B-Instruct", **SFT_SMALL, "lr": 1e-5},
    "7b": {"model": "Qwen/Qwen2.5-7B"}}

RL_SMALL = dict(advantage="rloo", states=8, samples=8, minibatches=2, lr=3e-6, kl=0.02, max_row_tokens=2048,
                max_batch=16, save_every=5, context=MEDIUM_AGENT["context"],
                max_new_tokens=MEDIUM_AGENT["max_new_tokens"])
RL = {      # --preset: what differs from the defaults, which are those of 7B
    "tiny": dict(advantage="rloo", iterations=12, states=32, samples=8, epochs=2, minibatches=2, lr=4e-4, kl=0.05,
                 max_row_tokens=704, max_batch=64),
    "0.5b": RL_SMALL,
    "1.5b": {**RL_SMALL, "lr": 2e-6, "max_batch": 8},
    "7b": {}}


def check_preset(name):
    if name and name not in PRESETS_BELOW:
        raise ValueError(f"there is no --preset {name}; there is {', '.join(PRESETS_BELOW)}")


def folder_of(values):
    """Returns the folder with the config of --model; for --plan --model itself, which may be a size alone, as 7b."""
    model = values["model"]
    return model if values["plan"] else find_folder(model, ("*.json",))


def fitting_preset(model, folder):
    """Returns the preset for a model's number of weights, and a sentence that says so."""
    num = num_parameters(shape_of(str(folder)))[-1]
    preset = next(name for name, below in PRESETS_BELOW.items() if num < below)
    return preset, f"{model} has {num:,} weights, which --preset {preset} is for"


def fill_sft(values):
    """For cli.parse: the preset, typed or chosen by the model's size or by how the program was started."""
    check_preset(values["preset"])
    if values["preset"]:
        return [(f"--preset {values['preset']}", SFT[values["preset"]])]
    is_file = Path(values["trajectories"]).is_file()        # of one's own, which is not cut to a preset's lengths
    if values["collect"] or values["model"] == "tiny" or values["model"] and is_file:
        return []
    if values["model"]:
        preset, why = fitting_preset(values["model"], folder_of(values))
        if preset not in ("0.5b", "1.5b"):      # the others are typed, or follow how the program was started
            return []
    # torchrun sets the variable
    elif "TORCHELASTIC_RUN_ID" in os.environ and values["device"] != "cpu" and torch.cuda.is_available():
        preset = "7b"
        why = "the paper's run, as torchrun started it and there is CUDA (for the miniature: python sft.py)"
    else:
        preset = "tiny"
        why = "the paper in miniature (for Qwen2.5-7B: torchrun sft.py with CUDA, or --preset 7b)"
    return [(why, {"preset": preset, **SFT[preset]})]


def fill_rl(values):
    """Returns what holds where nothing was typed (see cli.parse): the model's agent.json and the recipe of its size."""
    model = values["model"]
    preset = values["preset"]
    check_preset(preset)
    if model == "runs/sft" and not Path(model, "config.json").exists():     # nor is it asked of the hub
        raise ValueError(f"there is no {model} to go on from; make it with: python sft.py, or give another --model")
    folder = folder_of(values)
    agent = read_agent(folder)
    fitting, why = fitting_preset(model, folder)
    source = f"--preset {preset}; {why}" if preset else f"{why}; another may be typed"
    preset = preset or fitting
    return [(f"{model}/agent.json", agent), (source, {"preset": preset, **RL[preset]})]
