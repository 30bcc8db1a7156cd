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
import sample
import sft
import tasks
from common import add_task, quiet
from sample import Endpoint, EndpointError
from support import cli, endpoint

ASK = [{"role": "user", "content": "hello"}]


def good(text="hi", finish="stop", **more):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}],
                       "usage": {"prompt_tokens": 12, "completion_tokens": 1}, **more})


class Server:
    """Answers with each (status, headers, body) scripted in turn, the last for ever. Callables get the handler."""

    def __init__(self, *script):
        self.script, self.seen, self.lock = list(script), [], threading.Lock()
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
        for name, value in {"timeout_s": 5, "retries": 3, "backoff_s": 0.01, **limits}.items():
            setattr(endpoint, name, value)
        return endpoint


@pytest.fixture
def serve(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_API_KEY_CODER"):
        monkeypatch.delenv(name, raising=False)
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
    usage = {"prompt_tokens": 12, "prompt_tokens_details": {"cached_tokens": 8}}
    server = serve((200, {}, good("hello there", usage=usage)))
    endpoint = server.endpoint()
    messages = [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a", "tokens": [1, 2]}]
    reply = endpoint.chat(messages, max_new_tokens=33, temperature=0.25, top_p=0.9, stop=("END",), seed=5)
    assert (reply.text, reply.finish, reply.tokens, reply.logps) == ("hello there", "stop", [], [])
    assert (reply.prompt_tokens, reply.cached_tokens) == (12, 8) and reply.seconds > 0
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
    (200, {}, '{"choices": [{"message": null}]}'), (200, {}, good(None)), (200, {}, good(["part"])),
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
    endpoint = server.endpoint(retries=2)
    with pytest.raises(EndpointError) as error:
        endpoint.chat(ASK)
    assert len(server.seen) == 3
    for word in [endpoint.url, *words]:
        assert word in str(error.value)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405])
def test_what_cannot_get_better_is_not_tried_again(serve, status):
    server = serve((status, {}, '{"error": {"message": "the reason"}}'))
    with pytest.raises(EndpointError, match=f"answered {status}.*the reason.*'some/model' and the key in OPENAI_API_KEY"):
        server.endpoint().chat(ASK)
    assert len(server.seen) == 1


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
    KEY, json.dumps({"error": f"bad key {KEY}"}), urllib.parse.quote(KEY, safe=""), KEY[:14] + "...", "..." + KEY[-12:],
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


def test_what_is_not_of_the_key_is_shown():
    text = "Incorrect API key provided: sk-Proj/*****. You can find your API key at https://example.com/keys."
    assert endpoint.mask_key(text, KEY) == text.replace("sk-Proj/", "********")
    assert endpoint.mask_key("an EMPTY key, empty", "EMPTY") == "an ***** key, empty"
    assert endpoint.mask_key("a", "") == "a" and endpoint.mask_key("", KEY) == ""


def keys_sent(server):
    return [headers.get("Authorization") for _, headers, _ in server.seen]


@pytest.mark.parametrize("keys, same, expected", [
    ({}, False, None), ({"OPENAI_API_KEY": "one"}, False, None), ({"OPENAI_API_KEY": "one"}, True, "Bearer one"),
    ({"OPENAI_API_KEY": "one", "OPENAI_API_KEY_CODER": "two"}, False, "Bearer two"),
    ({"OPENAI_API_KEY": "one", "OPENAI_API_KEY_CODER": "two"}, True, "Bearer two"),
    ({"OPENAI_API_KEY_CODER": "two"}, False, "Bearer two")])
def test_a_coders_server_gets_no_key_of_another_host(keys, same, expected, serve, monkeypatch, tmp_path):
    """As eval.py loads them; another port is another host."""
    for name, key in keys.items():
        monkeypatch.setenv(name, key)
    server, other = serve(OK), serve(OK)
    s = evaluation.Settings(model=server.spec, coder=(server if same else other).spec, out=str(tmp_path))
    policy, coder = evaluation.load_models(s, num_rows=1)
    coder.chat(ASK)
    assert keys_sent(server if same else other) == [expected]
    policy.chat(ASK)
    assert keys_sent(server)[-1] == (f"Bearer {keys['OPENAI_API_KEY']}" if "OPENAI_API_KEY" in keys else None)


def test_which_key_a_coder_gets(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY_CODER", raising=False)
    one = "https://a.example:443/v1#m"
    for coder, model, own in (
            ("https://a.example/v2#n", one, False), ("HTTPS://A.example/v1#n", one, False), (one, "runs/sft", False),
            ("http://a.example/v1#m", one, True), ("https://a.example:444/v1#m", one, True),
            ("https://b.example/v1#m", one, True), ("https://a.example.evil/v1#m", one, True)):
        assert endpoint.coder_key(coder, model) == ("OPENAI_API_KEY_CODER" if own else "OPENAI_API_KEY")


@pytest.mark.parametrize("spec", ["http://user:secret-key@host/v1#m", "http://secret-key@host/v1#m",
                                  "https://host/v1?key=secret-key#m", "http://user:secret-key@/v1#m",
                                  "http://a:secret-key/v1#m", "http://[secret-key/v1#m"])
@pytest.mark.parametrize("cls, flag, fill", [
    (evaluation.Settings, "--model", evaluation.fill), (evaluation.Settings, "--coder", evaluation.fill),
    (sft.Settings, "--expert", sft.fill)])
def test_a_key_in_an_address_is_refused_before_it_is_written_anywhere(spec, cls, flag, fill, capsys):
    with pytest.raises(SystemExit) as end:
        cli.parse(cls, [f"{flag}={spec}"], fill)
    said = capsys.readouterr().err
    assert end.value.code == 2 and "http://host:port/v1#model-name" in said and "secret-key" not in said


def test_a_starter_runs_without_the_key(tmp_path, monkeypatch):
    (tmp_path / "tasks").mkdir()
    add_task(tmp_path / "tasks", "nosy", 10, "held-out", """import os
print(sorted(os.environ))
open("submission.csv", "w").write("id,y\\n1,7\\n2,7\\n")
""")
    monkeypatch.setattr(tasks, "FOLDERS", [tmp_path / "tasks"])
    for name in ("OPENAI_API_KEY", "OPENAI_API_KEY_CODER", "HF_TOKEN", "KAGGLE_KEY"):
        monkeypatch.setenv(name, "secret")
    tasks.prepare("nosy", data=tmp_path / "data", log=quiet)
    seen = tasks.run_starter(tasks.load("nosy"), tmp_path / "data" / "nosy")[2]
    assert "PATH" in seen and not re.search("KEY|TOKEN", seen)


def test_figures_that_are_no_counts_are_left_out(serve):
    for odd in ("many", -1, 1.5, [3], 10**40):
        usage = {"prompt_tokens": odd, "prompt_tokens_details": {"cached_tokens": odd}}
        reply = serve((200, {}, good(usage=usage))).endpoint().chat(ASK)
        assert (reply.prompt_tokens, reply.cached_tokens) == (0, 0)
    reply = serve((200, {}, good("a\ud800b"))).endpoint().chat(ASK)
    assert reply.text == "a?b"      # half a surrogate pair is no character


@pytest.mark.parametrize("header, waited", [("0.3", 0.3), ("7", 5), ("-3", 0), ("soon", 0), ("nan", 0), (None, 0)])
def test_what_retry_after_asks_is_waited_for_up_to_the_limit_of_a_request(serve, monkeypatch, header, waited):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    server = serve((429, {"Retry-After": header} if header else {}, ""), OK)
    assert server.endpoint().chat(ASK).text == "hi"
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
        port = free.getsockname()[1]
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
    assert len(server.seen) == 2


def test_a_server_that_drips(serve):
    def drip(handler):      # always alive, never done
        handler.send_response(200)
        handler.end_headers()
        try:
            for _ in range(100):
                handler.wfile.write(b" ")
                time.sleep(0.05)
        except OSError:
            pass

    with pytest.raises(EndpointError, match="not complete in time.*the limit is 0.3 s"):
        serve(drip).endpoint(timeout_s=0.3, retries=0).chat(ASK)


def test_a_flood_is_cut_off(serve):
    with pytest.raises(EndpointError, match="more than 100000 bytes"):
        serve((200, {}, "x" * 300_000)).endpoint(retries=0, max_bytes=100_000).chat(ASK)


def test_many_threads_share_one_endpoint(serve):
    def echo(handler):  # answers with the question, so that a mix-up shows
        data = good(handler.body["messages"][0]["content"]).encode()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)
    server = serve(echo)
    endpoint, answers = server.endpoint(), {}

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
