"""Figures of speed and memory, each beside a named peer in the same run and the physical limit.

    python tests/bench.py decode --model DIR [--json FILE]      # sampling, against transformers' generate
    python tests/bench.py load --model DIR                      # reading a checkpoint, against transformers
    python tests/bench.py sandbox --repeats 50                  # running a script, against a bare subprocess

Ours and the peer's runs alternate and the medians are compared, so that a busy machine slows both. transformers is
optional: without it only our figures and the share of the limit are printed.
"""
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from env import execute, protection
from sample import load, parse, read_bandwidth, streamed_bytes     # sets how threads wait, so it comes before torch

import torch

try:
    import transformers
except ImportError:
    transformers = None


@dataclass
class Settings:
    """Command line of bench.py, after the names of the measurements."""
    model: str = "tiny"             # checkpoint folder; tiny: random weights, without a peer
    json: str = ""                  # also write the figures to this file
    batches: tuple[int, ...] = (1, 8)   # rows decoded together
    prompt_tokens: int = 32         # of each row's prompt
    new_tokens: int = 48            # sampled for each row
    repeats: int = 3                # runs of each; the median counts
    dtype: str = "float32"          # float32 or bfloat16, ours and the peer's
    device: str = "auto"            # auto, cpu or cuda


def alternate(runs, repeats):
    """Median seconds of each callable of {name: callable}, run in turns after one warm-up of each."""
    seconds = {name: [] for name in runs}
    for i in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def decode(s):
    """Greedy tokens/s of whole calls, prompt included: Engine.generate against transformers' generate."""
    engine = load(s.model, s.dtype, s.device, rows=max(s.batches), context=s.prompt_tokens + s.new_tokens)
    engine.tokenizer.eos = set()            # every row samples new_tokens
    limit = read_bandwidth(engine.device) / streamed_bytes(engine.model)       # decoding steps a second
    peer = None
    if transformers and s.model != "tiny":
        peer = transformers.AutoModelForCausalLM.from_pretrained(s.model, dtype=getattr(torch, s.dtype))
        peer = peer.to(engine.device).eval()
        peer.generation_config.eos_token_id = None
    for B in s.batches:
        prompts = torch.randint(1000 if engine.tokenizer.size > 1000 else 256, (B, s.prompt_tokens),
                                generator=torch.Generator().manual_seed(B))

        def ours():
            engine.forget()                 # no prefix cached by an earlier run
            return [g[0].tokens for g in engine.generate(prompts.tolist(), max_new_tokens=s.new_tokens, temperature=0)]

        def theirs():
            return peer.generate(prompts.to(engine.device), attention_mask=torch.ones_like(prompts).to(engine.device),
                                 max_new_tokens=s.new_tokens, do_sample=False, repetition_penalty=1.0,
                                 pad_token_id=0)[:, s.prompt_tokens:].tolist()

        figures = {"batch": B}
        if peer:
            figures["same tokens"] = ours() == theirs()
        seconds = alternate({"ours": ours, **({"transformers": theirs} if peer else {})}, s.repeats)
        rate = {name: B * s.new_tokens / t for name, t in seconds.items()}
        figures |= {f"{name} tokens/s": r for name, r in rate.items()}
        if peer:
            figures["ratio"] = rate["ours"] / rate["transformers"]
        figures |= {"limit tokens/s": B * limit, "share of read bandwidth": rate["ours"] / (B * limit)}
        yield figures


LOADS = {
    "ours": "from model import Qwen2\nm = Qwen2.from_pretrained(sys.argv[1], dtype=dtype)",
    "transformers": "from transformers import AutoModelForCausalLM as M\nm = M.from_pretrained(sys.argv[1], dtype=dtype)",
}


def load_checkpoint(s):
    """Seconds and peak memory (growth of the resident set over the weights' size) of loading on the CPU."""
    for name, code in LOADS.items():
        if s.model == "tiny" or name == "transformers" and not transformers:
            continue
        program = (f"import resource, sys, time, torch\nimport {'model' if name == 'ours' else 'transformers'}\n"
                   f"dtype = torch.{s.dtype}\nkib = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
                   f"before, start = kib(), time.perf_counter()\n{code}\n"
                   "seconds, size = time.perf_counter() - start, sum(p.nbytes for p in m.parameters())\n"
                   "print(seconds, (kib() - before) * 1024 / size)")
        out = [subprocess.run([sys.executable, "-c", program, s.model], capture_output=True, text=True, check=True,
                              cwd=Path(__file__).parent.parent).stdout.split()[-2:] for _ in range(s.repeats)]
        yield {"loader": name, "seconds": statistics.median(float(o[0]) for o in out),
               "peak over weights": statistics.median(float(o[1]) for o in out)}


def line(figures):
    return "  ".join(f"{k}: {v:.3g}" if isinstance(v, float) else f"{k}: {v}" for k, v in figures.items())


def sandbox(s):
    """Milliseconds to run a script that prints one word: a bare subprocess, execute without and with the sandbox."""
    limits = dict(timeout_s=60, memory_bytes=1 << 30)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "one.py").write_text("print('one')")
        ways = {"bare": lambda: subprocess.run([sys.executable, "one.py"], cwd=folder, capture_output=True),
                "sandbox off": lambda: execute("one.py", folder, sandbox="off", **limits),
                "sandbox on": lambda: execute("one.py", folder, **limits)}
        seconds = alternate(ways, s.repeats)
    yield {"layers": "+".join(protection()), **{f"{name} ms": 1000 * t for name, t in seconds.items()},
           "overhead ms": 1000 * (seconds["sandbox on"] - seconds["bare"])}


MEASUREMENTS = {"decode": decode, "load": load_checkpoint, "sandbox": sandbox}


def main():
    names = []
    while len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        names.append(sys.argv.pop(1))
    unknown = [n for n in names if n not in MEASUREMENTS]
    if unknown or not names:
        sys.exit(f"bench.py: expected one or more of {', '.join(MEASUREMENTS)}, found {' '.join(unknown) or 'none'}")
    s = parse(Settings)
    machine = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
               "torch": torch.__version__, "threads": torch.get_num_threads(), "model": s.model, "dtype": s.dtype,
               "read GB/s": read_bandwidth("cuda" if torch.cuda.is_available() and s.device != "cpu" else "cpu") / 1e9}
    print(line(machine))
    report = {"machine": machine}
    for name in names:
        report[name] = []
        for figures in MEASUREMENTS[name](s):
            report[name].append(figures)
            print(name, line(figures), flush=True)
    if s.json:
        Path(s.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
