"""Endpoint against a small local server that also misbehaves."""
import email.utils
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import sample
from sample import Endpoint, EndpointError

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
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def endpoint(self, **how):
        how = {"timeout_s": 5, "retries": 3, "backoff_s": 0.01, **how}
        return Endpoint(f"http://127.0.0.1:{self.http.server_port}/v1#some/model", **how)


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
    usage = {"prompt_tokens": 12, "prompt_tokens_details": {"cached_tokens": 8}}
    server = serve((200, {}, good("hello there", usage=usage)))
    endpoint = server.endpoint()
    messages = [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a", "tokens": [1, 2]}]
    reply = endpoint.chat(messages, max_new_tokens=33, temperature=0.25, top_p=0.9, top_k=7, stop=("END",), seed=5)
    assert (reply.text, reply.finish, reply.tokens, reply.logps) == ("hello there", "stop", [], [])
    assert (reply.prompt_tokens, reply.cached_tokens) == (12, 8) and reply.seconds > 0
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret-key"
    assert body == {"model": "some/model", "max_tokens": 33, "temperature": 0.25, "top_p": 0.9, "top_k": 7,
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
    ((500, {}, "oops\n  at line 3"), ["answered 500", "oops at line 3", "server's log", "3 attempts"]),
    ((429, {}, "slow down"), ["answered 429", "slow down", "in parallel"]),
    ((200, {}, "<html>log in</html>"), ["not with a chat completion", "<html>log in</html>", "/v1"]),
    ((200, {}, ""), ["an empty body"]),
    (hang_up, ["cannot be reached"]),
])
def test_a_server_that_stays_bad_gives_one_clear_error(serve, bad, words):
    server = serve(bad)
    endpoint = server.endpoint(retries=2)
    with pytest.raises(EndpointError) as error:
        endpoint.chat(ASK)
    assert len(server.seen) == 3
    for word in [endpoint.url, *words]:
        assert word in str(error.value)


@pytest.mark.parametrize("status, words", [(400, "does not accept this request"), (401, "set OPENAI_API_KEY"),
                                           (403, "OPENAI_API_KEY"), (404, "'some/model'"), (405, "does not accept")])
def test_what_cannot_get_better_is_not_tried_again(serve, status, words):
    server = serve((status, {}, '{"error": {"message": "the reason"}}'))
    with pytest.raises(EndpointError, match=str(status)) as error:
        server.endpoint().chat(ASK)
    assert len(server.seen) == 1 and words in str(error.value) and "the reason" in str(error.value)


@pytest.mark.parametrize("said", ["This model's maximum context length is 4096 tokens", "prompt is too long: 5 > 4",
                                  "the request exceeds the available context size"])
def test_a_prompt_over_the_context_is_named_as_such(serve, said):
    with pytest.raises(sample.ContextFull, match="longer than 'some/model' takes"):
        serve((400, {}, json.dumps({"error": {"message": said}}))).endpoint().chat(ASK)


def test_a_redirect_is_not_followed_with_the_key(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    other = serve(OK)
    for status in (301, 302, 307, 308):
        server = serve((status, {"Location": other.endpoint().url}, ""))
        with pytest.raises(EndpointError, match="give the address it points to"):
            server.endpoint().chat(ASK)
    assert other.seen == []


def test_the_key_is_never_shown(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    with pytest.raises(EndpointError) as error:
        serve((401, {}, "bad key secret-key")).endpoint().chat(ASK)
    assert "secret-key" not in str(error.value) and "***" in str(error.value)
    monkeypatch.setenv("OPENAI_API_KEY", "se\ncret")
    with pytest.raises(ValueError, match="OPENAI_API_KEY") as error:
        Endpoint("http://127.0.0.1:1/v1#m")
    assert "cret" not in str(error.value)


def test_retry_after_is_honoured(serve):
    server = serve((429, {"Retry-After": "0.3"}, ""), OK)
    start = time.monotonic()
    server.endpoint().chat(ASK)
    assert time.monotonic() - start >= 0.3


@pytest.mark.parametrize("header, low, high", [(None, 0, 0), ("7", 7, 7), ("-3", 0, 0), ("soon", 0, 0), ("nan", 0, 0),
                                               (email.utils.formatdate(time.time() + 1e5), 9e4, 1e5),
                                               (email.utils.formatdate(0), 0, 0)])
def test_retry_after_forms(header, low, high):
    assert low <= sample._retry_after(header) <= high


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
    with pytest.raises(EndpointError, match="cannot be reached.*refused.*is the server running there.*2 attempts"):
        Endpoint(f"http://127.0.0.1:{port}/v1#m", retries=1, backoff_s=0.01).chat(ASK)


def test_a_server_that_is_slow(serve):
    done = threading.Event()
    server = serve(lambda handler: done.wait(10))
    with pytest.raises(EndpointError, match=r"did not answer within 0.2 s"):
        server.endpoint(timeout_s=0.2, retries=1).chat(ASK)
    done.set()
    assert len(server.seen) == 2


def drip(handler):  # always alive, never done
    handler.send_response(200)
    handler.end_headers()
    try:
        for _ in range(100):
            handler.wfile.write(b" ")
            time.sleep(0.05)
    except OSError:
        pass


def test_a_server_that_drips(serve):
    with pytest.raises(EndpointError, match="did not answer within 0.3 s"):
        serve(drip).endpoint(timeout_s=0.3, retries=0).chat(ASK)


def test_a_flood_is_cut_off(serve):
    endpoint = serve((200, {}, "x" * 300_000)).endpoint(retries=0)
    endpoint.max_bytes = 100_000
    with pytest.raises(EndpointError, match="more than 100000 bytes"):
        endpoint.chat(ASK)


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
