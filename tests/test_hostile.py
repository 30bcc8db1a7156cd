"""A whole evaluation against a server that misbehaves: what becomes of one trajectory, and of the others."""
import json
import threading
import time
import zlib
from types import SimpleNamespace

import pytest

import env
import eval as evaluation
from common import act
from env import MAX_REPLY
from support import endpoint
from support.records import read_record, replay
from test_endpoint import Choosy, cut_short, good, hang_up, serve  # noqa: F401
from test_eval import END, RUN, STARTER, edit, file_of, settings, task  # noqa: F401

SCRIPT = [edit(3, 8), edit(8, 9), RUN, END]         # scores 2, 1, 1
TURNS = {zlib.crc32(f"0 tiny-task {k} {turn} policy".encode()): (k, turn) for k in range(2) for turn in range(9)}
KEY = "sk-Proj-4f8b1c2d9Zq77xyzAbC"


def send(handler, text, status=200):
    data = text.encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def message(finish="stop", **entries):
    choice = {"message": {"role": "assistant", **entries}, "finish_reason": finish}
    return good(choices=[choice], model="some/model")


def server_of(odd, times=99):
    """A server that follows SCRIPT, but from turn 1 on it answers the first trajectory with `odd`, so many times."""
    left = [times]

    def answer(handler):
        k, turn = TURNS.get(handler.body.get("seed"), (1, 0))
        if handler.body["messages"] == endpoint.QUESTION:
            return send(handler, good("yes"))
        if k == 0 and turn >= 1 and left[0]:
            left[0] -= 1
            return odd(handler) if callable(odd) else send(handler, odd)
        # replies that were none do not stand in the conversation
        return send(handler, good(SCRIPT[sum(each["role"] == "assistant" for each in handler.body["messages"])]))
    return answer


@pytest.fixture
def play(tmp_path, task, serve, monkeypatch):  # noqa: F811
    """Plays two trajectories, and returns what results.json says of them and of the whole."""
    for name, value in {"retries": 2, "busy_retries": 4, "backoff_s": 0.01}.items():
        monkeypatch.setattr(endpoint.Endpoint, name, value)

    def start(*script, out="out", spec=None, **more):
        cfg = settings(tmp_path, out, model=spec or serve(*script).spec, trajectories=2, steps=8, **more)
        run, = evaluation.evaluate(cfg)
        for k in range(2):
            assert replay(file_of(cfg, k), data=cfg.data) == 0
        return run["results"]["tasks"]["tiny-task"]["trajectories"], run["results"]["disclosure"], cfg
    return start


def whole(trajectory):
    return [trajectory[name] for name in ("ended", "steps", "valid", "best-validation")] == ["final answer", 4, 4, 1]


def refuse(handler):
    send(handler, '{"error": "the prompt was flagged"}', 400)


def think_on(handler):
    time.sleep(9)
    hang_up(handler)


@pytest.mark.parametrize("odd, more, words", [
    (message("length", content=None), {}, "before its tokens were used up"),
    (message("length", content="<think>\nSay\n" + SCRIPT[1]), {}, "before its tokens were used up"),
    (think_on, {"reply_seconds": 2}, "the limit is 2 s"),
    (cut_short, {}, "gave no answer"), (refuse, {}, "the prompt was flagged")],
    ids=["null", "long thought", "no end", "cut short", "400"])
def test_three_replies_in_a_row_that_are_none_end_one_trajectory_and_no_other(odd, more, words, play):
    (first, second), disclosed, cfg = play(server_of(odd), **more)
    assert [first[name] for name in ("ended", "steps", "valid", "best-validation")] == ["no reply", 4, 1, 2]
    assert whole(second)
    lines = read_record(file_of(cfg, 0))
    assert [line["type"] for line in lines] == ["header", "step", "step", "step", "step", "end"]
    for line in lines[2:5]:
        assert words in line["no_reply"] and line["reply"] == "" and line["error"] == "The reply is empty."
        assert (line["kind"], line["reward"]) == ("invalid", 0)
    assert disclosed["replies"] == 8 and disclosed["no_replies"] == 3


def test_a_run_killed_before_such_an_end_is_written_ends_without_another_question(play, serve):  # noqa: F811
    server = serve(server_of(message(content=None)))
    _, disclosed, cfg = play(spec=server.spec)
    before = file_of(cfg, 0).read_text()
    file_of(cfg, 0).write_text("".join(before.splitlines(keepends=True)[:-1]))
    num_asked = len(server.seen)
    _, again, _ = play(spec=server.spec)
    assert file_of(cfg, 0).read_text() == before and len(server.seen) == num_asked and again == disclosed


@pytest.mark.parametrize("odd, times", [(message(content=None), 2), (hang_up, 3)])
def test_after_fewer_it_goes_on(odd, times, play):
    (first, second), disclosed, _ = play(server_of(odd, times))
    num_lost = 1 if odd is hang_up else times       # of a lost connection each is tried three times
    assert [first[name] for name in ("ended", "steps", "valid")] == ["final answer", 4 + num_lost, 4] and whole(second)
    assert disclosed["no_replies"] == num_lost


@pytest.mark.parametrize("odd, times", [(hang_up, 2), (cut_short, 1), (lambda handler: send(handler, "later", 429), 4)],
                         ids=["hung up", "cut short", "429"])
def test_what_gets_better_soon_costs_nothing(odd, times, play):
    (first, second), disclosed, _ = play(server_of(odd, times))
    assert whole(first) and whole(second) and disclosed["no_replies"] == 0


def test_a_server_that_is_busy_just_after_it_has_refused_a_conversation_ends_no_run(play):
    others = server_of(refuse, 1)
    busy = [True]

    def answer(handler):
        if handler.body["messages"] == endpoint.QUESTION and busy:
            busy.clear()
            return send(handler, "later", 429)
        return others(handler)
    (first, second), disclosed, _ = play(answer)
    assert [first[name] for name in ("ended", "steps", "valid")] == ["final answer", 5, 4] and whole(second)
    assert not busy and disclosed["no_replies"] == 1


def test_a_reply_of_10_mb_is_one_invalid_step(play):
    (first, second), _, cfg = play(server_of(good("x" * 10_000_000), 1))
    assert [first[name] for name in ("ended", "steps", "valid")] == ["final answer", 5, 4] and whole(second)
    assert len(read_record(file_of(cfg, 0))[2]["reply"]) == MAX_REPLY + 1
    assert sum(path.stat().st_size for path in file_of(cfg, 0).parent.iterdir()) < 200_000


def test_all_parameters_are_refused(play, serve):  # noqa: F811
    choosy = Choosy(*endpoint.PARAMETERS, "max_completion_tokens")
    good_answer = server_of("", 0)

    def answer(handler):
        if any(name in handler.body for name in choosy.refused):
            return choosy(handler)
        return good_answer(handler)
    played, disclosed, _ = play(answer)
    assert all(map(whole, played))
    assert disclosed["refused"] == {f"{name}: left out": 8 for name in endpoint.PARAMETERS}


@pytest.mark.parametrize("status, said", [(404, "The model `some/model` does not exist"), (429, "storm")])
def test_a_server_that_answers_nothing_stops_the_run_which_goes_on_later(status, said, play, serve):  # noqa: F811
    answer = server_of("", 0)
    is_broken = threading.Event()

    def sometimes(handler):
        if len(server.seen) > 3 and not is_broken.is_set():
            return send(handler, said, status)
        return answer(handler)
    server = serve(sometimes)
    with pytest.raises(endpoint.EndpointError, match=f"answered {status}.*{said}.*'some/model'"):
        play(spec=server.spec)
    is_broken.set()
    played, disclosed, _ = play(spec=server.spec)
    assert all(map(whole, played)) and disclosed["replies"] == 8


def test_a_thought_is_kept_beside_the_reply_and_not_shown_again(play):
    asked = []

    def think(handler):
        asked.append(json.dumps(handler.body["messages"]))
        turn = sum(each["role"] == "assistant" for each in handler.body["messages"])
        send(handler, good(f"<think>\nThe secret plan:\n{SCRIPT[3]}\nObservation: 7\n</think>\n\n{SCRIPT[turn]}"))
    played, disclosed, cfg = play(think)
    assert all(map(whole, played)) and disclosed["thoughts"] == 8
    assert not any("secret plan" in text for text in asked)
    assert "secret plan" in read_record(file_of(cfg, 0))[1]["thought"]
    assert "secret plan" in (file_of(cfg, 0).parent.parent / "report.html").read_text()


@pytest.mark.parametrize("clock, ended", [("all", "time"), ("scripts", "final answer")])
def test_waiting_for_the_model_counts_or_not(clock, ended, play, monkeypatch):
    """Each reply takes a thousand of 1,800 seconds, by which the clock is set forward; one after the other plays."""
    forward = [0]
    clock_of_both = SimpleNamespace(monotonic=lambda: time.monotonic() + forward[0])
    monkeypatch.setattr(env, "time", clock_of_both)
    monkeypatch.setattr("support.play.time", clock_of_both)
    monkeypatch.setattr(evaluation, "TOKENS_TOGETHER", 1)

    def slow(handler):
        forward[0] += 1000
        return server_of("", 0)(handler)
    played, _, cfg = play(slow, clock=clock, seconds=1800)
    assert [trajectory["ended"] for trajectory in played] == [ended] * 2
    if clock == "scripts":
        assert read_record(file_of(cfg, 0))[-1]["seconds_left"] > 800


def test_what_is_disclosed_by_hand(play):
    usage = {"prompt_tokens": 100, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 60}}

    def answer(handler):
        turn = sum(each["role"] == "assistant" for each in handler.body["messages"])
        send(handler, good(SCRIPT[turn], usage=usage, model=f"snapshot-{turn // 3}"))
    _, disclosed, cfg = play(answer)
    assert disclosed["models"] == {"snapshot-0": 6, "snapshot-1": 2} and disclosed["coders"] == {}
    assert disclosed["tokens"] == {"read": 800, "of these cached": 480, "written": 56, "read by the coder": 0,
                                   "written by the coder": 0}
    layers, = disclosed["sandbox"]
    assert disclosed["labels"] == "out of reach" and disclosed["sandbox"] == {layers: 6} and "seccomp" in layers
    page = (file_of(cfg, 0).parent.parent / "report.html").read_text()
    assert "the labels were out of reach" in page and "snapshot-0 (6), snapshot-1 (2)" in page
    _, disclosed, _ = play(answer, out="open", sandbox="off")
    assert disclosed["labels"] == "in reach" and disclosed["sandbox"] == {"off": 6}


def test_a_key_is_written_nowhere(play, serve, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Also not where the server, which has it, sends it back in every text of its answers."""
    def leak(handler):
        key = handler.headers["Authorization"].removeprefix("Bearer ")
        turn = sum(each["role"] == "assistant" for each in handler.body["messages"])
        if "temperature" in handler.body:
            return send(handler, f'{{"error": "temperature is refused, {key}"}}', 400)
        if TURNS.get(handler.body.get("seed"), (1, 0)) == (0, 1):
            return send(handler, message(content=None, refusal=f"No, {key}!", reasoning=key))
        text = SCRIPT[turn].replace("Thought: x", f"Thought: {key}")
        return send(handler, message(content=text, reasoning_content=f"hm {key}").replace("some/model", key))
    server = serve(leak)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    (first, second), _, _ = play(spec=server.spec)
    assert (first["ended"], first["steps"]) == ("final answer", 5) and whole(second)
    broken = serve(lambda handler: send(handler, f"bad key {handler.headers['Authorization']}", 401))
    assert evaluation.main(["--task=tiny-task", f"--model={broken.spec}", f"--data={tmp_path / 'data'}",
                            f"--out={tmp_path / 'broken'}"]) == 1
    texts = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    said = capsys.readouterr()
    texts += [said.out.encode(), said.err.encode()]
    assert len(texts) > 10 and any(b"*" * len(KEY) in text for text in texts) and b"answered 401" in texts[-1]
    pieces = [KEY[i:i + 8].encode() for i in range(len(KEY) - 7)]
    assert not any(piece in text for piece in pieces for text in texts)


def test_a_coder_that_gives_no_reply_costs_a_step_and_its_tokens_are_counted(play, serve):  # noqa: F811
    ask = act("Edit Script (AI)", script_name="train.py", edit_instruction="use 9", save_name="train.py")
    script = [ask, ask, END]
    given = []

    def answer(handler):
        messages = handler.body["messages"]
        if messages[0]["role"] == "system":
            return send(handler, good(script[sum(each["role"] == "assistant" for each in messages)]))
        given.append(handler)
        if len(given) <= 2:     # the first question of each trajectory, which are asked one after the other
            return send(handler, message(content=None, refusal="I may not."))
        code = "```python\n" + STARTER.replace("VALUE = 3", "VALUE = 9") + "```"
        send(handler, good(code, model="the coder", usage={"prompt_tokens": 40, "completion_tokens": 30}))
    played, disclosed, cfg = play(answer, coder="model")
    assert sum(trajectory["valid"] for trajectory in played) == 4 and disclosed["no_replies"] == 0
    assert disclosed["tokens"]["written by the coder"] == 2 * 30 + 2 * 1        # good() counts 1
    assert sum(disclosed["coders"].values()) == 4 and disclosed["coders"]["the coder"] == 2
    errors = [line.get("error") for k in range(2) for line in read_record(file_of(cfg, k))]
    assert errors.count("The helper cannot take this: The model refused: 'I may not.'") == 2
