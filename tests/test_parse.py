"""parse: a dataclass becomes a command line."""
from dataclasses import dataclass, replace
from typing import Optional

import pytest
import torch

import rl
import sft
from model import Config
from support import miniature, recipes
from support.cli import parse
from support.pretrained import write_config


@dataclass
class Flags:
    task: str  # which task, e.g. leaf
    model: str = "http://host/v1#name"  # a folder or URL#name
    max_new_tokens: int = 256  # tokens a reply may have, at most 100 % of them
    temperature: float = 0.5  # 0 takes
        # the likeliest token
    verbose: bool = False  # say more
    cache: bool = True  # keep results
    limit: int | None = None  # stop after so many
    seconds: Optional[float] = 1.5
    actions: tuple[str, ...] = ("a", "b")  # comma list
    sizes: tuple[int, ...] = ()  # more numbers

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, found {self.max_new_tokens}")


def fails(argv, capsys):
    with pytest.raises(SystemExit) as end:
        parse(Flags, argv)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_defaults_stand_where_nothing_is_given():
    assert parse(Flags, ["--task", "leaf"]) == Flags("leaf")


def test_every_type_is_read():
    got = parse(Flags, ["--task=leaf", "--model", "runs/sft", "--max-new-tokens", "7", "--temperature=1e-1",
                        "--verbose", "--no-cache", "--limit", "-3", "--seconds", "none",
                        "--actions", "List Files, Final Answer", "--sizes=1,2"])
    assert got == Flags("leaf", "runs/sft", 7, 0.1, True, False, -3, None, ("List Files", "Final Answer"), (1, 2))
    assert type(got.temperature) is float and type(got.max_new_tokens) is int


def test_values_stay_as_they_are():
    assert parse(Flags, ["--task=--a_b"]).task == "--a_b"
    assert parse(Flags, ["--task", "a_b", "--model=x=y_z"]) == Flags("a_b", "x=y_z")


def test_the_command_line_is_read_from_sys_argv(monkeypatch):
    monkeypatch.setattr("sys.argv", ["eval.py", "--task", "leaf"])
    assert parse(Flags).task == "leaf"


def test_unknown_flag_lists_near_ones(capsys):
    said = fails(["--task", "leaf", "--max-new-token", "3"], capsys)
    assert "there is no --max-new-token" in said and "did you mean --max-new-tokens" in said
    assert said.count("\n") == 2        # how it is used, and what is wrong
    assert "see --help" in fails(["--task", "leaf", "--zzzzqq"], capsys)
    assert "there is no stray" in fails(["--task", "leaf", "stray"], capsys)
    assert "did you mean --max-new-tokens" in fails(["--task", "leaf", "--max_new_tokens=9"], capsys)


@pytest.mark.parametrize("argv, words", [
    (["--max-new-tokens", "many"], "--max-new-tokens: expected int, found 'many'"),
    (["--temperature", "hot"], "--temperature: expected float, found 'hot'"),
    (["--limit", "x"], "--limit: expected int, found 'x'"),
    (["--sizes", "1,b"], "--sizes: expected int, found 'b'"),
    (["--max-new-tokens"], "expected one argument"),
    (["--max-new-tokens", "0"], "max_new_tokens must be at least 1, found 0"),
])
def test_wrong_value_says_what_was_expected(argv, words, capsys):
    assert words in fails(["--task", "leaf", *argv], capsys)


def test_missing_required_flag_is_named(capsys):
    assert "--task" in fails([], capsys)


def test_a_shortened_flag_is_not_guessed(capsys):
    assert "--temperature" in fails(["--task", "leaf", "--temp", "1"], capsys)


def test_help_shows_comments_and_defaults(capsys):
    with pytest.raises(SystemExit) as end:
        parse(Flags, ["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for piece in ("which task, e.g. leaf (required)", "a folder or URL#name (default: http://host/v1#name)",
                  "100 % of them (default: 256)", "0 takes the likeliest token (default: 0.5)",
                  "comma list (default: a,b)", "--no-cache", "say more (default: False)"):
        assert piece in text, piece


# -- what holds where nothing was typed

def test_what_is_typed_comes_before_what_fills_and_what_fills_first_before_the_rest(capsys):
    asked = []

    def fill(values):
        asked.append(values)
        return [("first", {"limit": 3, "temperature": 0.1, "unknown": 1}),
                ("second", {"limit": 4, "cache": False, "actions": ("x", "y"), "verbose": False})]
    got = parse(Flags, ["--task", "leaf", "--temperature=0.5"], fill)
    assert got == Flags("leaf", temperature=0.5, limit=3, cache=False, actions=("x", "y"))
    assert asked[0]["temperature"] == 0.5 and asked[0]["max_new_tokens"] == 256     # all settings, typed or not
    assert capsys.readouterr().err == ("typed: --task leaf, --temperature 0.5\nfirst: --limit 3\n"
                                       "second: --no-cache, --actions x,y\n")
    got = parse(Flags, ["--task=leaf", "--limit=none", "--cache", "--no-verbose", "--actions=a,b"], fill)
    assert got == Flags("leaf", temperature=0.1)


def test_what_fills_may_be_refused(capsys):
    def fill(values):
        raise ValueError("the file is odd")
    with pytest.raises(SystemExit) as end:
        parse(Flags, ["--task=leaf"], fill)
    assert end.value.code == 2 and "error: the file is odd" in capsys.readouterr().err


def test_the_miniature_fills_what_is_not_typed():
    s = parse(sft.Settings, ["--lr=2e-5", "--no-plan", "--epochs", "2"], recipes.fill_sft)
    tiny = miniature.TINY
    assert (s.lr, s.plan, s.epochs) == (2e-5, False, 2)
    assert (s.num, s.steps, s.preset) == (tiny["num"], tiny["steps"], "tiny")
    assert parse(sft.Settings, ["--preset=tiny", "--epochs=2"], recipes.fill_sft) == replace(s, lr=tiny["lr"])
    assert parse(sft.Settings, ["--model=tiny"], recipes.fill_sft) == sft.Settings(model="tiny")
    assert parse(sft.Settings, ["--preset=7b", "--epochs=3"], recipes.fill_sft).epochs == 3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models of four sizes, by their config.json alone."""
    folder = tmp_path_factory.mktemp("models")
    for name, size in (("small", "tiny"), ("half", "0.5b"), ("three", "3b"), ("large", "7b")):
        (folder / name).mkdir()
        write_config(Config.preset(size), folder / name, torch.float32)
    return folder


def test_the_recipe_of_rl_follows_the_model(models, capsys):
    small, large = (["--model", str(models / name)] for name in ("small", "large"))
    s = parse(rl.Settings, large, recipes.fill_rl)
    assert (s.lr, s.kl, s.max_row_tokens, s.advantage, s.preset) == (1e-6, 1e-3, 16384, "gae", "7b")
    said = capsys.readouterr().err
    assert "7,615,616,512 weights, which --preset 7b is for; another may be typed: --preset 7b" in said
    s = parse(rl.Settings, small, recipes.fill_rl)
    assert (s.lr, s.kl, s.max_row_tokens, s.advantage, s.preset) == (4e-4, 0.05, 704, "rloo", "tiny")
    assert "weights, which --preset tiny is for; another may be typed: --preset tiny" in capsys.readouterr().err
    s = parse(rl.Settings, [*large, "--preset=tiny"], recipes.fill_rl)
    assert (s.lr, s.kl, s.preset) == (4e-4, 0.05, "tiny")
    said = capsys.readouterr().err
    assert "--preset tiny; " in said and "weights, which --preset 7b is for: --advantage rloo" in said
    s = parse(rl.Settings, [*small, "--preset=7b"], recipes.fill_rl)
    assert (s.lr, s.advantage, s.max_batch) == (1e-6, "gae", 8)
    s = parse(rl.Settings, [*small, "--lr=1e-6", "--samples=4"], recipes.fill_rl)
    assert (s.lr, s.samples, s.minibatches) == (1e-6, 4, 2)
    # of a plan, without files
    for model, name in (("7b", "7b"), ("Qwen/Qwen2.5-0.5B", "0.5b"), ("3b", "1.5b"), ("tiny", "tiny")):
        assert parse(rl.Settings, ["--plan", "--model", model], recipes.fill_rl).preset == name


def test_a_small_published_model_gets_the_preset_of_its_size(models, tmp_path, capsys):
    for name, preset in (("half", "0.5b"), ("three", "1.5b")):
        model = f"--model={models / name}"
        s = parse(sft.Settings, [model, f"--trajectories={tmp_path / 'none'}", "--num=2"], recipes.fill_sft)
        assert (s.preset, s.prompt_format, s.num, s.model) == (preset, "medium", 2, str(models / name))
        assert f"weights, which --preset {preset} is for" in capsys.readouterr().err
        assert parse(rl.Settings, [model], recipes.fill_rl).preset == preset
    large = parse(sft.Settings, [f"--model={models / 'large'}"], recipes.fill_sft)
    assert large == sft.Settings(model=str(models / "large"))
    own = tmp_path / "own.jsonl"        # a file of one's own is not cut to the length of medium prompts
    own.write_text("{}")
    s = parse(sft.Settings, [f"--model={models / 'half'}", f"--trajectories={own}"], recipes.fill_sft)
    assert s.max_row_tokens == 15000


@pytest.mark.parametrize("size, words", [("0.5b", "fits in 24 GB"), ("1.5b", "does not fit in 24 GB")])
def test_plans_say_what_fits_without_a_gpu(size, words, capsys):
    """Weights, gradients and two moments in float32 take 16 bytes a weight, a reference and a sampler 4 each."""
    num = {"0.5b": 494_032_768, "1.5b": 1_543_714_304}[size]
    for program, flags, least in ((sft, ["--preset", size], 16 * num), (rl, ["--model", size], 24 * num)):
        assert program.main(["--plan", *flags]) == 0
        [line] = [line for line in capsys.readouterr().out.splitlines() if "of RAM" in line]
        figure = float(line.partition(": ")[2].partition(" ")[0])
        assert line.endswith(words) and least / 2**30 < figure < least / 2**30 + 5


def test_an_agent_json_cannot_choose_the_recipe(models, capsys):
    """A large model that says it acts as the miniature does is trained as a large one all the same."""
    (models / "large" / "agent.json").write_text('{"prompt": "short", "steps": 5, "preset": "tiny", "lr": 1.0}')
    s = parse(rl.Settings, ["--model", str(models / "large")], recipes.fill_rl)
    assert (s.preset, s.lr, s.steps) == ("7b", 1e-6, 5)
    (models / "large" / "agent.json").unlink()


@pytest.mark.parametrize("cls, fill, argv, words", [
    (sft.Settings, recipes.fill_sft, ["--collect", "--model=tiny"], "--expert acts with --collect"),
    (sft.Settings, recipes.fill_sft, ["--expert=tiny", "--model=tiny"], "--expert acts with --collect"),
    (rl.Settings, recipes.fill_rl, ["--preset=8b"], "there is no --preset 8b; there is tiny, 0.5b, 1.5b, 7b"),
    (sft.Settings, recipes.fill_sft, ["--preset=8b"], "there is no --preset 8b; there is tiny, 0.5b, 1.5b, 7b")])
def test_flags_that_contradict_each_other_are_refused(cls, fill, argv, words, capsys):
    with pytest.raises(SystemExit) as end:
        parse(cls, argv, fill)
    assert end.value.code == 2 and words in capsys.readouterr().err


def test_training_on_a_gpu_that_is_not_there_is_refused(monkeypatch, capsys, tmp_path):
    """What --device cpu does beside one: test_train.py."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    own = [f"--trajectories={tmp_path}", f"--out={tmp_path}", "--model=tiny", "--device=cuda"]
    assert sft.main(own) == 2 and "there is no GPU" in capsys.readouterr().err
