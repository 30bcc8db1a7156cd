"""bench.py gpu: its code at tiny shapes, and that a fault is found and told."""
import json
import sys

import pytest

import bench
import bench_gpu
import fused


def run(monkeypatch, tmp_path, parts):
    """Runs the command with these parts. Returns (what it ends with, what the file holds)."""
    monkeypatch.setattr(bench_gpu, "PARTS", parts)
    argv = ["bench.py", "gpu", "--dry", "--seconds=1e9", "--json", str(tmp_path / "found.json")]
    monkeypatch.setattr(sys, "argv", argv)
    message = None
    try:
        bench.main()
    except SystemExit as end:
        message = end.code
    return message, json.loads((tmp_path / "found.json").read_text())["gpu"]


def test_all_that_a_gpu_is_asked_runs_on_a_cpu(monkeypatch, tmp_path):
    message, found = run(monkeypatch, tmp_path, bench_gpu.PARTS)
    assert message is None and all(figures["ok"] for figures in found)
    said = " ".join(figures["check"] for figures in found)
    for part in ("logits", "gradients", "kernel attend", "sampler", "SFT step", "PPO", "sft.py runs", "decode, 2 rows",
                 "the state once"):
        assert part in said


def test_a_part_that_fails_is_said_and_loses_nothing(monkeypatch, tmp_path):
    def broken(scale, left):
        yield {"check": "first", "ok": True}
        raise RuntimeError("no such kernel")

    def last(scale, left):
        before = json.loads((tmp_path / "found.json").read_text())["gpu"]      # a cut run has what came before
        yield {"check": "last", "ok": len(before) == 2}
    message, found = run(monkeypatch, tmp_path, (broken, last))
    assert [figures["ok"] for figures in found] == [True, False, True]
    assert "no such kernel" in found[1]["raised"] and message == "failed:\nbroken"


def test_a_kernel_that_is_wrong_is_found(monkeypatch, tmp_path):
    swiglu = fused.swiglu
    monkeypatch.setattr(fused, "swiglu", lambda gate, up: 1.03 * swiglu(gate, up))
    message, found = run(monkeypatch, tmp_path, (bench_gpu.kernel_twins,))
    assert message == "failed:\nkernel swiglu\nkernel swiglu and gradients"


def test_without_a_gpu_the_command_says_so(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", "gpu"])
    with pytest.raises(SystemExit, match="no CUDA device"):
        bench.main()
