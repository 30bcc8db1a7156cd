"""A client for servers that speak OpenAI's chat protocol, with the same chat() as the engine in sample.py."""
import http.client
import json
import os
import random
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass

from support.cli import ContextFull, RunError, announce


@dataclass
class Completion:
    """One sampled reply. `tokens` hold the end-of-turn token, or the last token of a stop string, where one ended it;
    `text` does not. `logps[i]` is the log-prob of `tokens[i]` under the distribution it was drawn from."""
    text: str
    tokens: list        # of int
    logps: list         # of float, in nats
    finish: str         # "stop": end of turn or stop string; "length": max_new_tokens reached
    prompt_tokens: int = 0
    cached_tokens: int = 0      # of the prompt's tokens, how many needed no computation
    seconds: float = 0.0


class EndpointError(RunError):
    """A server gave no usable answer. retry_s: seconds to wait before asking again; None: asking again cannot help."""

    def __init__(self, message, retry_s=None):
        super().__init__(message)
        self.retry_s = retry_s


def is_server(spec):
    """Returns whether a --model value is the address of a server."""
    return str(spec).lower().startswith(("http://", "https://"))


def address(spec):
    """Returns ((scheme, host, port), the URL to post to, the model's name) of "http://host:port/v1#name".

    Raises ValueError for another form, and for a key in it, because addresses stand in messages and results.
    """
    expected = "expected an endpoint like http://host:port/v1#model-name"
    url, _, name = str(spec).partition("#")
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        raise ValueError(f"{expected}, found one whose host or port cannot be read") from None
    if "@" in parts.netloc or parts.query:
        raise ValueError(f"{expected}, found one with a password or a query in it; a key belongs in OPENAI_API_KEY")
    if not is_server(url) or not parts.hostname or not name or not url.isprintable() or " " in url:
        raise ValueError(f"{expected}, found {spec!r}")
    url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    return (parts.scheme, parts.hostname, port), url, name


def coder_key(coder, model):
    """Returns the name of the environment variable that holds the key for the server `coder`.

    OPENAI_API_KEY is for the host of `model`: a coder on another host has OPENAI_API_KEY_CODER, and so has any coder
    where that is set.
    """
    other_host = is_server(coder) and is_server(model) and address(coder)[0] != address(model)[0]
    if other_host or os.environ.get("OPENAI_API_KEY_CODER"):
        return "OPENAI_API_KEY_CODER"
    return "OPENAI_API_KEY"


def mask_key(text, key):
    """Returns the text with * for each piece of eight or more characters of the key (a server may have cut it)."""
    if not key:
        return text
    spellings = "\n".join((key, json.dumps(key), urllib.parse.quote(key, safe="")))
    size = min(8, len(key))
    masked = list(text)
    for i in range(len(text) - size + 1):
        if text[i:i + size] in spellings:
            masked[i:i + size] = "*" * size
    return "".join(masked)


class AnyStatus(urllib.request.HTTPErrorProcessor):
    """Hands over answers of any status, and so follows no redirect: it would take the conversation to another host."""

    def http_response(self, request, response):
        return response

    https_response = http_response


class Endpoint:
    """The same `chat` as Engine's, answered by any server that speaks /v1/chat/completions. Threads may share it.

    spec is "http://host:port/v1#model-name". key: the environment variable that holds the server's key, which is sent
    to that host alone and stands in no message. What may get better is tried again, after pauses that double.
    """
    context = None              # in tokens; only the server knows
    timeout_s = 120.0           # of one request
    retries = 5
    backoff_s = 1.0             # the first pause
    max_bytes = 16 * 2**20      # of one answer

    def __init__(self, spec, key="OPENAI_API_KEY"):
        (scheme, host, _), self.url, self.name = address(spec)
        self.key_name = key
        self._key = os.environ.get(key, "").strip()
        if not self._key.isascii() or not self._key.isprintable():
            raise ValueError(f"{key} holds characters that cannot be sent in a header; set it again")
        if self._key and scheme == "http" and host not in ("localhost", "127.0.0.1", "::1"):
            announce(f"{self.url}: the key in {key} goes there unencrypted; is there no https?")
        self._opener = urllib.request.build_opener(AnyStatus)

    def chat(self, messages, *, max_new_tokens=1024, temperature=1.0, top_p=1.0, stop=(), seed=0):
        """Returns a Completion without tokens and logps, which the server keeps. messages: [{"role", "content"}].

        Raises ContextFull where the server says so, and EndpointError for any other answer that is no reply.
        """
        stop = [stop] if isinstance(stop, str) else [text for text in stop if text]
        body = {"model": self.name, "messages": [{"role": m["role"], "content": m["content"]} for m in messages],
                "max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        if stop:
            body["stop"] = stop
        start = time.perf_counter()
        for attempt in range(self.retries + 1):
            try:
                completion = self._ask(json.dumps(body).encode())
                break
            except EndpointError as error:
                if error.retry_s is None or attempt == self.retries:
                    raise
                pause = min(60.0, self.backoff_s * 2 ** attempt) * random.uniform(0.5, 1.0)
                time.sleep(max(pause, min(error.retry_s, self.timeout_s)))
        cut = find_stop(completion.text, stop, len(completion.text))
        if cut is not None:     # the server ignores `stop`, or returns the string with the text
            completion.text = completion.text[:cut]
            completion.finish = "stop"
        completion.seconds = time.perf_counter() - start
        return completion

    def _ask(self, body):
        status, retry_after, said = self._post(body)
        answered = f"{self.url} answered {status}: {self._excerpt(said)}"
        too_long = re.search(r"context.{0,12}(length|window|size)|too long|too many tokens", said[:4096], re.I)
        if too_long and status in (400, 413, 422):
            raise ContextFull(f"{answered}; the conversation is longer than {self.name!r} takes")
        if status != 200:
            retry_s = None
            if status in (408, 409, 425, 429) or status >= 500:     # busy or broken, for now
                seconds = re.fullmatch(r"\d{1,9}(\.\d+)?", retry_after)
                retry_s = float(seconds[0]) if seconds else 0.0
            raise EndpointError(f"{answered}; check the server, the model's name {self.name!r} and the key in "
                                f"{self.key_name}", retry_s)
        try:
            answer = json.loads(said)
            choice = answer["choices"][0]
            text = choice["message"]["content"].encode("utf-8", "replace").decode()     # half a surrogate pair: "?"
            finish = "length" if choice.get("finish_reason") == "length" else "stop"
            usage = answer.get("usage") or {}
            counts = [usage.get("prompt_tokens"), (usage.get("prompt_tokens_details") or {}).get("cached_tokens")]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise EndpointError(f"{self.url} answered, but not with a chat completion: {self._excerpt(said)}; is it an "
                                "OpenAI-compatible /v1?", 0.0) from None
        if len(self._key) >= 16:        # a shorter one, such as EMPTY, is a word that a reply may well hold
            text = mask_key(text, self._key)
        counts = [count if isinstance(count, int) and 0 <= count < 2**31 else 0 for count in counts]
        return Completion(text, [], [], finish, *counts)

    def _post(self, body):
        """Returns (status, Retry-After, text) of the server's answer to one request."""
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json", "User-Agent": "ml-agent"})
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        raw = bytearray()
        deadline = time.monotonic() + self.timeout_s        # the socket's own limit is for each piece of an answer
        try:
            with self._opener.open(request, timeout=self.timeout_s) as response:
                while part := response.read1(65536):
                    raw += part
                    if len(raw) > self.max_bytes:
                        raise OSError(f"more than {self.max_bytes} bytes")
                    if time.monotonic() > deadline:
                        raise TimeoutError("not complete in time")
        except (OSError, http.client.HTTPException) as error:
            reason = self._excerpt(str(error))
            raise EndpointError(f"{self.url} gave no answer ({reason}; the limit is {self.timeout_s:g} "
                                "s); is the server running there, and is it overloaded?", 0.0) from None
        return response.status, response.headers.get("Retry-After", ""), raw.decode("utf-8", "replace")

    def _excerpt(self, said):
        """Returns the beginning of what a server said, in printable ASCII and without the key."""
        text = " ".join(said[:4096].split())
        return ascii(mask_key(text, self._key)[:300])


def find_stop(text, stops, num_new):
    """Returns where the earliest stop string begins in a text, or None. Only its last num_new characters are new."""
    starts = [text.find(stop, max(0, len(text) - num_new - len(stop) + 1)) for stop in stops]
    return min((start for start in starts if start >= 0), default=None)
