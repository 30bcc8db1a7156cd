"""Endpoint against a small local server that also misbehaves."""
import json
import re
import socket
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import eval as evaluation
import rl
import sample
import sft
import tasks
from common import add_task, quiet
from sample import Endpoint
from support import cli, endpoint, recipes
from support.endpoint import EndpointError
from support.pretrained import find_folder
from test_execute import wait_until

ASK = [{"role": "user", "content": "hello"}]


def good(text="hi", finish="stop", **more):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}],
                       "usage": {"prompt_tokens": 12, "completion_tokens": 1}, **more})


class Server:
    """Answers with each (status, headers, body) scripted in turn, the last for ever. Callables get the handler."""

    def __init__(self, *script):
        self.script = list(script)
        self.seen = []
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                self.body = body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    step = outer.script[min(len(outer.seen), len(outer.script) - 1)]
                    outer.seen.append((self.path, dict(self.headers), body))
                if callable(step):
                    return step(self)
                status, headers, text = step
                data = text if isinstance(text, bytes) else text.encode()
                self.send_response(status)
                for key, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST  # what a followed redirect would turn into

            def log_message(self, *_):
                pass

        class Http(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

        self.http = Http(("127.0.0.1", 0), Handler)
        self.spec = f"http://127.0.0.1:{self.http.server_port}/v1#some/model"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def endpoint(self, **limits):
        endpoint = Endpoint(self.spec)
        for name, value in {"timeout_s": 60, "retries": 3, "busy_retries": 3, "backoff_s": 0.01, **limits}.items():
            setattr(endpoint, name, value)
        return endpoint


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def start(*script):
        servers.append(Server(*script))
        return servers[-1]
    yield start
    for server in servers:
        server.close()


OK = (200, {}, good())


def test_reply_and_everything_that_is_sent(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    usage = {"prompt_tokens": 12, "prompt_tokens_details": {"cached_tokens": 8}, "completion_tokens": 3}
    server = serve((200, {}, good("hello there", usage=usage, model="some/model-2026")))
    endpoint = server.endpoint()
    messages = [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a", "tokens": [1, 2]}]
    reply = endpoint.chat(messages, max_new_tokens=33, temperature=0.25, top_p=0.9, stop=("END",), seed=5)
    assert (reply.text, reply.finish, reply.tokens, reply.logps) == ("hello there", "stop", [], [])
    assert (reply.prompt_tokens, reply.cached_tokens, reply.num_tokens) == (12, 8, 3) and reply.seconds > 0
    assert (reply.answered_by, reply.thought, reply.no_reply, reply.refused) == ("some/model-2026", "", "", ())
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret-key"
    assert body == {"model": "some/model", "max_tokens": 33, "temperature": 0.25, "top_p": 0.9,
                    "stop": ["END"], "seed": 5,
                    "messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]}
    assert endpoint.name == "some/model" and endpoint.context is None


def test_without_a_key_none_is_sent_and_plain_openai_fields_only(serve):
    server = serve(OK)
    server.endpoint().chat(ASK)
    _, headers, body = server.seen[0]
    assert "Authorization" not in headers
    assert set(body) == {"model", "messages", "max_tokens", "temperature", "top_p", "seed"}


@pytest.mark.parametrize("theirs, ours", [("stop", "stop"), ("length", "length"), (None, "stop"), ("eos", "stop")])
def test_finish_reason(serve, theirs, ours):
    assert serve((200, {}, good("x", theirs))).endpoint().chat(ASK).finish == ours


def test_stop_strings_are_cut_here_too_at_the_earliest(serve):
    server = serve((200, {}, good("one\nObservation: two END", "length")))
    reply = server.endpoint().chat(ASK, stop=["END", "\nObservation:"])
    assert (reply.text, reply.finish) == ("one", "stop")
    assert serve((200, {}, good("a|b"))).endpoint().chat(ASK, stop="|").text == "a"


def test_an_empty_reply_is_a_reply(serve):
    assert serve((200, {}, good(""))).endpoint().chat(ASK).text == ""


# -- what a model thinks, and replies that are none

REPLY = "Action: x\nAction Input: {}"


@pytest.mark.parametrize("content, thought, text", [
    (f"<think>I look.</think>\n\n{REPLY}", "I look.", REPLY), (f"\n<think>\n\n</think>\n\n{REPLY}", "", REPLY),
    (f"I look.\n</think>\n{REPLY}", "I look.", REPLY), ("<think>I look and", "I look and", ""),
    (f"<think>\nSay {REPLY}\nObservation: 3\n</think>{REPLY}\nObservation: 4", f"Say {REPLY}\nObservation: 3", REPLY),
    ("a <think> in a text", "", "a <think> in a text")])
def test_a_thought_is_cut_off_before_stop_strings_are_looked_for(content, thought, text, serve):
    reply = serve((200, {}, good(content))).endpoint().chat(ASK, stop="\nObservation:")
    assert (reply.thought, reply.text) == (thought, text)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_a_thought_that_the_server_has_cut_off_is_kept(name, serve):
    message = {"role": "assistant", "content": "find </think>", name: "I look."}
    reply = serve((200, {}, good(choices=[{"message": message}]))).endpoint().chat(ASK)
    assert (reply.thought, reply.text) == ("I look.", "find </think>")


@pytest.mark.parametrize("message, finish, words", [
    ({"content": None}, "length", "before its tokens were used up"),
    ({"content": None, "reasoning_content": "hm"}, "length", "before its tokens were used up"),
    ({"content": "<think>hm"}, "length", "before its tokens were used up"),
    ({"content": None, "refusal": "I may not."}, "stop", "The model refused: 'I may not.'"),
    ({"content": None, "tool_calls": [{"function": {"name": "f"}}]}, "tool_calls", "reply was empty ('tool_calls')"),
    ({"content": ""}, "content_filter", "content_filter"), ({"content": " \n"}, "stop", "reply was empty"),
    ({"content": [{"type": "thinking", "thinking": []}]}, "stop", "reply was empty"), ({}, None, "reply was empty")])
def test_an_answer_without_text_is_a_reply_that_says_why(message, finish, words, serve):
    server = serve((200, {}, good(choices=[{"message": message, "finish_reason": finish}])))
    reply = server.endpoint().chat(ASK)
    assert not reply.text.strip() and words in reply.no_reply and len(server.seen) == 1


def test_a_text_in_parts_is_joined(serve):
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "Action: x"},
             {"type": "text", "text": "\nObservation: y"}]
    reply = serve((200, {}, good(parts))).endpoint().chat(ASK, stop="\nObservation:")
    assert (reply.text, reply.no_reply) == ("Action: x", "")


def test_a_stop_string_that_a_server_finds_in_a_thought_is_sent_no_more(serve, capsys):
    thought = "I say\nObservation: then yes"

    def think(handler):
        cut = "stop" in handler.body
        message = {"content": None if cut else "yes\nObservation: no", "reasoning_content": "I say" if cut else thought}
        data = good(choices=[{"message": message, "finish_reason": "stop"}]).encode()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)
    server = serve(think)
    endpoint = server.endpoint()
    for _ in range(2):
        reply = endpoint.chat(ASK, stop="\nObservation:")
        assert (reply.text, reply.thought, reply.refused) == ("yes", thought, ("stop: left out",))
    assert [("stop" in body) for *_, body in server.seen] == [True, False, False]
    assert capsys.readouterr().err.count("stop is left out from now on") == 1


def test_a_model_that_writes_nothing_without_a_stop_string_either_is_sent_it_again(serve, capsys):
    thought = (200, {}, good(choices=[{"message": {"content": "<think>hm</think>"}, "finish_reason": "stop"}]))
    server = serve(thought, thought, OK)
    client = server.endpoint()
    replies = [client.chat(ASK, stop="END") for _ in range(2)]
    assert [(reply.no_reply, reply.refused) for reply in replies] == [(endpoint.ONLY_THOUGHT, ()), ("", ())]
    assert [("stop" in body) for *_, body in server.seen] == [True, False, True]
    assert "from now on" not in capsys.readouterr().err


def test_a_refusal_of_stop_strings_is_kept_where_the_model_then_only_thinks(serve):
    refused = (400, {}, '{"error": "stop is not supported"}')
    thought = (200, {}, good(choices=[{"message": {"content": "<think>hm</think>"}, "finish_reason": "stop"}]))
    server = serve(refused, thought, OK)
    client = server.endpoint()
    for _ in range(2):
        assert client.chat(ASK, stop="END").refused == ("stop: left out",)
    assert [("stop" in body) for *_, body in server.seen] == [True, False, False]


# -- parameters that a server refuses

class Choosy:
    """Answers 400 to each of its parameters, as OpenAI does, and then replies."""

    def __init__(self, *refused, status=400):
        self.refused = refused
        self.status = status

    def __call__(self, handler):
        status = 200
        data = good().encode()
        for name in self.refused:
            if name in handler.body:
                status = self.status
                data = json.dumps({"error": {"message": f"Unsupported parameter: '{name}' is not supported with this "
                                             "model. Use 'max_completion_tokens' instead.", "param": name}}).encode()
                break
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)


@pytest.mark.parametrize("name", endpoint.PARAMETERS)
def test_a_parameter_that_is_refused_is_renamed_or_left_out_once(name, serve, capsys):
    server = serve(Choosy(name))
    client = server.endpoint()
    replies = [client.chat(ASK, max_new_tokens=7, stop="END") for _ in range(2)]
    bodies = [body for *_, body in server.seen]
    assert len(bodies) == 3 and name in bodies[0] and name not in bodies[1] and bodies[1] == bodies[2]
    new = "max_completion_tokens" if name == "max_tokens" else None
    expected = bodies[0] | ({new: 7} if new else {})
    del expected[name]
    assert bodies[1] == expected
    became = f"sent as {new}" if new else "left out"
    assert [reply.refused for reply in replies] == [(f"{name}: {became}",)] * 2
    assert capsys.readouterr().err.count(f"{name} is {became} from now on") == 1


def test_each_change_of_a_parameter_is_announced(serve, capsys):
    """It is sent under another name, and a later request without it."""
    refused = (400, {}, '{"error": "max_completion_tokens is not supported"}')
    client = serve((400, {}, '{"error": "max_tokens is not supported"}'), OK, refused, OK, OK).endpoint()
    for _ in range(3):
        client.chat(ASK)
    assert re.findall("max_tokens is (.*)", capsys.readouterr().err) == [
        "sent as max_completion_tokens from now on", "left out from now on"]


def test_all_parameters_may_be_refused(serve):
    server = serve(Choosy(*endpoint.PARAMETERS, "max_completion_tokens", status=422))
    reply = server.endpoint().chat(ASK, stop="END")
    assert reply.text == "hi" and set(server.seen[-1][-1]) == {"model", "messages"}
    assert len(server.seen) == 7 and len(reply.refused) == 5


def test_of_two_parameters_that_do_not_go_together_temperature_stays(serve):
    both = (400, {}, '{"error": "temperature and top_p cannot both be specified"}')
    server = serve(both, OK)
    assert server.endpoint().chat(ASK, temperature=0.5).refused == ("top_p: left out",)
    assert server.seen[1][-1]["temperature"] == 0.5


def test_messages_of_one_role_are_joined_as_some_servers_want_turns(serve):
    server = serve(OK)
    talk = [{"role": role, "content": content} for role, content in (
        ("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("user", "d"), ("user", "e"))]
    assert server.endpoint().chat(talk).refused == ()
    assert server.seen[0][-1]["messages"] == [*talk[:3], {"role": "user", "content": "c\n\nd\n\ne"}]


def test_an_answer_that_names_all_parameters_changes_none(serve):
    """Such as one that repeats the request: it may be refused for another reason."""
    refused = (400, {}, json.dumps({"error": "odd", "input": dict.fromkeys(endpoint.PARAMETERS)}))
    server = serve(*[refused] * 6, OK, OK)
    client = server.endpoint()
    assert "answered 400" in client.chat(ASK, stop="END").no_reply
    assert client.changed == {} and client.chat(ASK).refused == ()


# -- one conversation, or the server

def only_long(status, text):
    """Answers the short question, and nothing else."""
    def answer(handler):
        is_short = handler.body["messages"] == endpoint.QUESTION
        code, data = (200, good().encode()) if is_short else (status, text.encode())
        handler.send_response(code)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)
    return answer


@pytest.mark.parametrize("status, text, num_asked", [
    (400, "the content was flagged", 1), (403, "moderation", 1), (500, "tokenizer error", 4), (200, "{}", 4)])
def test_what_a_server_cannot_answer_is_no_reply_where_it_answers_others(status, text, num_asked, serve):
    server = serve(only_long(status, text))
    reply = server.endpoint().chat(ASK)
    assert reply.text == "" and server.spec.partition("#")[0] in reply.no_reply
    assert len(server.seen) == num_asked + 1


def test_a_server_that_is_busy_at_the_short_question_is_asked_it_again(serve):
    server = serve((400, {}, "the content was flagged"), (429, {}, "later"), OK)
    reply = server.endpoint().chat(ASK)
    assert reply.text == "" and "the content was flagged" in reply.no_reply
    assert [body["messages"] for *_, body in server.seen] == [ASK, endpoint.QUESTION, endpoint.QUESTION]


def test_a_reply_that_takes_too_long_is_asked_for_once(serve):
    done = threading.Event()

    def think(handler):
        if handler.body["messages"] != endpoint.QUESTION:
            done.wait(60)
            return handler.connection.shutdown(socket.SHUT_RDWR)
        only_long(200, "")(handler)
    server = serve(think)
    assert "the limit is 2 s" in server.endpoint(timeout_s=2).chat(ASK).no_reply     # enough for the short question
    done.set()
    assert wait_until(lambda: len(server.seen) >= 2) and len(server.seen) == 2


def test_a_server_that_is_busy_is_waited_for_longer(serve, monkeypatch, capsys):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    busy = [(status, {}, "later") for status in (429, 503, 529, 408)] * 3
    server = serve(*busy, OK)
    assert server.endpoint(retries=5, busy_retries=12).chat(ASK).text == "hi"
    assert len(server.seen) == 13 and capsys.readouterr().err.count("asked again for some minutes") == 1
    with pytest.raises(EndpointError, match="answered 429"):
        serve((429, {}, "later")).endpoint(busy_retries=12).chat(ASK)


def test_a_long_reply_is_cut(serve):
    reply = serve((200, {}, good("a" * 10_000_000))).endpoint().chat(ASK)
    assert len(reply.text) == endpoint.MAX_TEXT
    reply = serve((200, {}, good(f"{'a' * 10_000_000}</think>yes"))).endpoint().chat(ASK)
    assert reply.text == "yes" and len(reply.thought) < endpoint.MAX_THOUGHT + 100


# -- servers that fail

def cut_short(handler):  # promises more than it sends
    handler.send_response(200)
    handler.send_header("Content-Length", "5000")
    handler.end_headers()
    handler.wfile.write(good().encode()[:40])
    handler.close_connection = True


def hang_up(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def not_http(handler):
    handler.wfile.write(b"garbage that is no status line\r\n\r\n")
    handler.close_connection = True


@pytest.mark.parametrize("bad", [
    (429, {}, "slow down"), (500, {}, "oops"), (502, {}, "<html>bad gateway</html>"), (503, {}, ""), (529, {}, "busy"),
    (200, {}, "{not json"), (200, {}, "<html>log in</html>"), (200, {}, ""), (200, {}, "[]"), (200, {}, "null"),
    (200, {}, "3"), (200, {}, b"\xff\xfe\x00"), (200, {}, "[" * 100_000), (200, {}, '{"error": "busy"}'),
    (200, {}, '{"choices": []}'), (200, {}, '{"choices": null}'), (200, {}, '{"choices": [3]}'),
    (200, {}, '{"choices": [{"message": null}]}'), (200, {}, good(["part"])),
    cut_short, hang_up, not_http,
])
def test_one_bad_answer_is_tried_again(serve, bad):
    server = serve(bad, OK)
    assert server.endpoint().chat(ASK).text == "hi"
    assert len(server.seen) == 2


@pytest.mark.parametrize("bad, words", [
    ((500, {}, "oops\n  at line 3"), ["answered 500", "oops at line 3"]),
    ((429, {}, "slow down"), ["answered 429", "slow down"]),
    ((200, {}, "<html>log in</html>"), ["not with a chat completion", "<html>log in</html>", "/v1"]),
    ((200, {}, ""), ["not with a chat completion"]),
    (hang_up, ["gave no answer"]),
])
def test_a_server_that_stays_bad_gives_one_clear_error(serve, bad, words):
    server = serve(bad)
    endpoint = server.endpoint(retries=2, busy_retries=2)
    with pytest.raises(EndpointError) as error:
        endpoint.chat(ASK)
    assert len(server.seen) == 4        # the last asks whether it answers anything
    for word in [endpoint.url, *words]:
        assert word in str(error.value)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405])
def test_what_cannot_get_better_is_not_tried_again(serve, status):
    server = serve((status, {}, '{"error": {"message": "the reason"}}'))
    words = f"answered {status}.*the reason.*'some/model' and the key in OPENAI_API_KEY"
    with pytest.raises(EndpointError, match=words):
        server.endpoint().chat(ASK)
    assert [body["messages"] for *_, body in server.seen] == [ASK, endpoint.QUESTION]


@pytest.mark.parametrize("said", ["This model's maximum context length is 4096 tokens", "prompt is too long: 5 > 4",
                                  "the request exceeds the available context size"])
def test_a_prompt_over_the_context_is_named_as_such(serve, said):
    with pytest.raises(cli.ContextFull, match="longer than 'some/model' takes"):
        serve((400, {}, json.dumps({"error": {"message": said}}))).endpoint().chat(ASK)


def test_a_redirect_is_not_followed_with_the_key(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    other = serve(OK)
    for status in (301, 302, 307, 308):
        server = serve((status, {"Location": other.endpoint().url}, ""))
        with pytest.raises(EndpointError, match=f"answered {status}.*check the server"):
            server.endpoint().chat(ASK)
    assert other.seen == []


KEY = "sk-Proj/4f+8b1c2-9Zq_77xyz"


def test_a_key_that_cannot_be_sent_is_not_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "se\ncret")
    with pytest.raises(ValueError, match="OPENAI_API_KEY") as error:
        Endpoint("http://127.0.0.1:1/v1#m")
    assert "cret" not in str(error.value)


@pytest.mark.parametrize("said", [
    KEY, json.dumps({"error": f"bad key {KEY}"}), urllib.parse.quote(KEY, safe=""),
    f"Bearer {KEY}!" * 50, "x" * 290 + KEY, "x" * 4090 + KEY, f"\x1b]0;{KEY}\x07"])
@pytest.mark.parametrize("where", ["body", "error", "redirect", "status line"])
def test_a_key_that_a_server_sends_back_is_not_shown(said, where, serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    header = said.encode("unicode_escape").decode()

    def odd(handler):
        handler.wfile.write(f"{header}\r\n\r\n".encode())
        handler.close_connection = True
    answer = {"body": (200, {}, said), "error": (400, {}, said), "redirect": (302, {"Location": header}, said),
              "status line": odd}[where]
    with pytest.raises(EndpointError) as error:
        serve(answer).endpoint(retries=0).chat(ASK)
    shown = str(error.value)
    assert shown.isprintable() and len(shown) < 1000 and shown.isascii()
    for form in (KEY, urllib.parse.quote(KEY, safe="")):
        assert not any(form[i:i + 8] in shown for i in range(len(form) - 7)), shown


def test_a_key_does_not_get_into_a_reply(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    reply = serve((200, {}, good(f"print('{KEY}')"))).endpoint().chat(ASK)
    assert reply.text == f"print('{'*' * len(KEY)}')"
    monkeypatch.setenv("OPENAI_API_KEY", "token")       # what a server without keys is given
    assert serve((200, {}, good("a token"))).endpoint().chat(ASK).text == "a token"


def keys_sent(server):
    return [headers.get("Authorization") for _, headers, _ in server.seen]


@pytest.mark.parametrize("keys, same, expected", [
    ({}, False, None), ({"": "one"}, False, None), ({"": "one"}, True, "Bearer one"),
    ({"": "one", "_127_0_0_1_OTHER": "two"}, False, "Bearer two"),
    ({"": "one", "_127_0_0_1_OTHER": "two"}, True, "Bearer one"),
    ({"_127_0_0_1_OTHER": "two"}, False, "Bearer two")])
def test_a_coders_server_gets_no_key_of_another_host(keys, same, expected, serve, monkeypatch, tmp_path):
    """As eval.py loads them; another port is another host. The names begin with OPENAI_API_KEY and end with a port."""
    server = serve(OK)
    other = serve(OK)
    keys = {f"OPENAI_API_KEY{end.replace('OTHER', str(other.http.server_port))}": key for end, key in keys.items()}
    for name, key in keys.items():
        monkeypatch.setenv(name, key)
    s = evaluation.Settings(model=server.spec, coder=(server if same else other).spec, out=str(tmp_path))
    policy, coder = evaluation.load_models(s, num_rows=1)
    coder.chat(ASK)
    assert keys_sent(server if same else other) == [expected]
    policy.chat(ASK)
    assert keys_sent(server)[-1] == (f"Bearer {keys['OPENAI_API_KEY']}" if "OPENAI_API_KEY" in keys else None)


def test_which_key_a_server_gets(monkeypatch):
    one = "https://a.example:443/v1#m"
    own = "OPENAI_API_KEY_A_EXAMPLE"
    for spec, model, name in (
            ("https://a.example/v2#n", one, "OPENAI_API_KEY"), ("HTTPS://A.example/v1#n", one, "OPENAI_API_KEY"),
            (one, "runs/sft", own), ("http://a.example/v1#m", one, own + "_80"),
            ("https://a.example:444/v1#m", one, own + "_444"),
            ("https://a-example/v1#m", one, "OPENAI_API_KEY_A__EXAMPLE"),
            ("https://a.example.evil/v1#m", one, own + "_EVIL")):
        assert endpoint.key_name(spec, model) == name
    monkeypatch.setenv(own, "its own")
    assert endpoint.key_name(one, one) == Endpoint(one).key_name == own


@pytest.mark.parametrize("spec", ["http://user:secret-key@host/v1#m", "http://secret-key@host/v1#m",
                                  "https://host/v1?key=secret-key#m", "http://user:secret-key@/v1#m",
                                  "http://a:secret-key/v1#m", "http://[secret-key/v1#m"])
@pytest.mark.parametrize("cls, flag, fill", [
    (evaluation.Settings, "--model", evaluation.fill), (evaluation.Settings, "--coder", evaluation.fill),
    (sft.Settings, "--expert", recipes.fill_sft), (sample.Settings, "--model", None)])
def test_a_key_in_an_address_is_refused_before_it_is_written_anywhere(spec, cls, flag, fill, capsys):
    prompt = ["--prompt=hi"] if cls is sample.Settings else []
    with pytest.raises(SystemExit) as end:
        cli.parse(cls, [f"{flag}={spec}", *prompt], fill)
    said = capsys.readouterr().err
    assert end.value.code == 2 and "http://host:port/v1#model-name" in said and "secret-key" not in said


@pytest.mark.parametrize("fill", [recipes.fill_sft, recipes.fill_rl])
def test_what_is_trained_is_no_server(fill, capsys):
    cls = sft.Settings if fill is recipes.fill_sft else rl.Settings
    with pytest.raises((SystemExit, ValueError)) as end:
        find_folder(cli.parse(cls, ["--model=http://user:secret-key@host/v1#m"], fill).model)
    assert "secret-key" not in str(end.value) and "a server's model has no weights" in (
        str(end.value) + capsys.readouterr().err)


def test_a_starter_runs_without_the_key(tmp_path, monkeypatch):
    (tmp_path / "tasks").mkdir()
    add_task(tmp_path / "tasks", "nosy", 10, "held-out", """import os
print(sorted(os.environ))
open("submission.csv", "w").write("id,y\\n1,7\\n2,7\\n")
""")
    monkeypatch.setattr(tasks, "FOLDERS", [tmp_path / "tasks"])
    for name in ("OPENAI_API_KEY", "OPENAI_API_KEY_A_EXAMPLE", "HF_TOKEN", "KAGGLE_KEY"):
        monkeypatch.setenv(name, "secret")
    tasks.prepare("nosy", data=tmp_path / "data", log=quiet)
    seen = tasks.run_starter(tasks.load("nosy"), tmp_path / "data" / "nosy")[2]
    assert "PATH" in seen and not re.search("KEY|TOKEN", seen)


def test_figures_that_are_no_counts_are_left_out(serve):
    for odd in ("many", -1, 1.5, [3], 10**40):
        usage = {"prompt_tokens": odd, "prompt_tokens_details": {"cached_tokens": odd}, "completion_tokens": odd}
        reply = serve((200, {}, good(usage=usage, model=odd))).endpoint().chat(ASK)
        assert (reply.prompt_tokens, reply.cached_tokens, reply.num_tokens) == (0, 0, 0)
    reply = serve((200, {}, good("a\ud800b"))).endpoint().chat(ASK)
    assert reply.text == "a?b"      # half a surrogate pair is no character


@pytest.mark.parametrize("header, waited", [("0.3", 0.3), ("7", 5), ("-3", 0), ("soon", 0), ("nan", 0), (None, 0)])
def test_what_retry_after_asks_is_waited_for_up_to_the_limit_of_a_request(serve, monkeypatch, header, waited):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    server = serve((429, {"Retry-After": header} if header else {}, ""), OK)
    assert server.endpoint(timeout_s=5).chat(ASK).text == "hi"
    assert waits == [waited] or (waited == 0 and waits[0] <= 0.01)


def test_waits_double_with_jitter(serve, monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(EndpointError):
        serve((500, {}, "")).endpoint(retries=5, backoff_s=1.0).chat(ASK)
    assert len(waits) == 5
    for attempt, wait in enumerate(waits):
        assert 0.5 * 2 ** attempt <= wait <= 2 ** attempt


def test_a_server_that_is_down():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]        # nobody listens there, and nobody else can take it
        with pytest.raises(EndpointError, match="gave no answer.*refused.*is the server running there"):
            endpoint = Endpoint(f"http://127.0.0.1:{port}/v1#m")
            endpoint.retries = 0
            endpoint.chat(ASK)


def test_a_server_that_is_slow(serve):
    done = threading.Event()
    server = serve(lambda handler: done.wait(10))
    with pytest.raises(EndpointError, match="timed out.* the limit is 0.2 s"):
        server.endpoint(timeout_s=0.2, retries=1).chat(ASK)
    done.set()
    # the second is the question whether it answers anything
    assert wait_until(lambda: len(server.seen) >= 2) and len(server.seen) == 2


def test_many_threads_share_one_endpoint(serve):
    def echo(handler):  # answers with the question, so that a mix-up shows
        data = good(handler.body["messages"][0]["content"]).encode()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)
    server = serve(echo)
    endpoint = server.endpoint()
    answers = {}

    def ask(i):
        answers[i] = endpoint.chat([{"role": "user", "content": str(i)}]).text
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {i: str(i) for i in range(32)}


@pytest.mark.parametrize("spec", ["http://127.0.0.1:1/v1", "127.0.0.1:1/v1#m", "ftp://host/v1#m", "http:///v1#m",
                                  "http://host/v1#"])
def test_a_wrong_address_says_the_right_form(spec):
    with pytest.raises(ValueError, match=r"http://host:port/v1#model-name"):
        Endpoint(spec)


def test_the_full_path_is_taken_too():
    for spec in ("http://h/v1/chat/completions#m", "http://h/v1/#m", "http://h/v1#m"):
        assert Endpoint(spec).url == "http://h/v1/chat/completions"
