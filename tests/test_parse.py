"""parse: a dataclass becomes a command line."""
from dataclasses import dataclass
from typing import Optional

import pytest

from sample import parse


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


def test_underscores_and_dashes_are_one_flag_and_values_stay_as_they_are():
    assert parse(Flags, ["--task", "a_b", "--max_new_tokens=9"]).max_new_tokens == 9
    assert parse(Flags, ["--task=--a_b"]).task == "--a_b"
    assert parse(Flags, ["--task", "a_b", "--model=x=y_z"]) == Flags("a_b", "x=y_z")


def test_the_command_line_is_read_from_sys_argv(monkeypatch):
    monkeypatch.setattr("sys.argv", ["eval.py", "--task", "leaf"])
    assert parse(Flags).task == "leaf"


def test_unknown_flag_lists_near_ones(capsys):
    said = fails(["--task", "leaf", "--max-new-token", "3"], capsys)
    assert "there is no --max-new-token" in said and "did you mean --max-new-tokens" in said
    assert "see --help" in fails(["--task", "leaf", "--zzzzqq"], capsys)
    assert "there is no stray" in fails(["--task", "leaf", "stray"], capsys)


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
