"""A client for servers that speak OpenAI's chat protocol, with the same chat() as the engine in sample.py."""
import http.client
import itertools
import json
import os
import random
import re
import threading
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass

from support.cli import ContextFull, RunError, announce
from support.files import shorten

PARAMETERS = "max_tokens", "seed", "top_p", "stop", "temperature"   # that a server may refuse, the dearest last
INSTEAD = {"max_tokens": "max_completion_tokens"}       # what is sent in place of one, before it is left out
TOO_LONG = r"context.{0,12}(length|window|size)|too long|too many tokens"       # said of a conversation
QUESTION = [{"role": "user", "content": "Answer with the word yes."}]
ONLY_THOUGHT = "The model thought and wrote nothing."
MAX_TEXT = 1 << 21      # characters of a reply that are read
MAX_THOUGHT = 50_000    # characters of a thought that are kept


@dataclass
class Completion:
    """One sampled reply. `tokens` hold what ended it, an end of turn or a stop string, and `text` does not. `logps[i]`
    is the log-prob of `tokens[i]` under the distribution it was drawn from."""
    text: str
    tokens: list        # of int
    logps: list         # of float, in nats
    finish: str         # "stop": end of turn or stop string; "length": max_new_tokens reached
    prompt_tokens: int = 0
    cached_tokens: int = 0      # of the prompt's tokens, how many needed no computation
    seconds: float = 0.0
    # of a server alone, which keeps tokens and logps
    num_tokens: int = 0         # that it sampled, those of a thought too
    thought: str = ""           # what came before the reply
    no_reply: str = ""          # why there is no text
    answered_by: str = ""       # the model that it says it is
    refused: tuple = ()         # parameters that it refused, and what became of them


class EndpointError(RunError):
    """A server gave no usable answer. tries: how often the same is worth asking. pause_s: to wait before, at least."""

    def __init__(self, message, tries=1, pause_s=0.0):
        super().__init__(message)
        self.tries = tries
        self.pause_s = pause_s


def is_server(spec):
    return str(spec).lower().startswith(("http://", "https://"))


def address(spec):
    """Returns ((scheme, host, port), the URL to post to, the model's name) of "http://host:port/v1#name". ValueError:
    another form, or one with a key, because addresses stand in messages and results."""
    url, _, name = str(spec).partition("#")
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        parts = None
    if not (parts and is_server(url) and parts.hostname and name) or "@" in parts.netloc or parts.query:
        raise ValueError("expected an endpoint like http://host:port/v1#model-name, without a password or a query; a "
                         "key belongs in OPENAI_API_KEY")
    url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    return (parts.scheme, parts.hostname, port), url, name


def key_name(spec, model):
    """Returns the name of the environment variable that holds the key for the server `spec`: OPENAI_API_KEY for the
    host of `model` alone, and for another, or where it is set, its own, such as OPENAI_API_KEY_API_DEEPSEEK_COM or, for
    http://localhost:8001, OPENAI_API_KEY_LOCALHOST_8001."""
    scheme, host, port = address(spec)[0]
    if (scheme, port) != ("https", 443):
        host += f".{port}"
    own = "OPENAI_API_KEY_" + re.sub("[^A-Z0-9]", "_", host.upper().replace("-", "__"))
    same_host = is_server(model) and address(spec)[0] == address(model)[0]
    return "OPENAI_API_KEY" if same_host and not os.environ.get(own) else own


class AnyStatus(urllib.request.HTTPErrorProcessor):
    """Hands over answers of any status, and follows no redirect, which would take the conversation to another host."""

    def http_response(self, request, response):
        return response

    https_response = http_response


class Endpoint:
    """A server that speaks /v1/chat/completions, at "http://host:port/v1#model-name". Threads may share it.

    key: the environment variable that holds the server's key, which is sent to that host alone and stands in no
    message. timeout_s: that it may be silent.
    """
    context = None              # in tokens; only the server knows
    retries = 5                 # of a request that a server failed to answer
    busy_retries = 12           # of one that it had no time for, which takes six minutes
    backoff_s = 1.0             # the first pause; each is twice as long as the one before

    def __init__(self, spec, key=None, timeout_s=600.0):
        _, self.url, self.name = address(spec)
        self.key_name = key or key_name(spec, spec)
        self.timeout_s = timeout_s
        self.changed = {}       # what the server does not take -> what it is sent instead, None: nothing
        self._lock = threading.Lock()
        self._key = os.environ.get(self.key_name, "").strip()
        if not self._key.isascii() or not self._key.isprintable():
            raise ValueError(f"{self.key_name} holds characters that cannot be sent in a header; set it again")
        self._opener = urllib.request.build_opener(AnyStatus)

    def chat(self, messages, *, max_new_tokens=1024, temperature=1.0, top_p=1.0, stop=(), seed=0):
        """Returns a Completion without tokens and logps. messages: [{"role", "content"}]; several of one role in a row,
        as where an unreadable reply was dropped between them, are sent as one, because some servers want turns.

        What a model thinks is cut off before stop strings are looked for. no_reply says why a text is empty, also where
        the server answers other conversations alone. Raises ContextFull where the server says so, and EndpointError
        where it answers nothing.
        """
        stop = [stop] if isinstance(stop, str) else [text for text in stop if text]
        turns = [{"role": role, "content": "\n\n".join(message["content"] for message in group)}
                 for role, group in itertools.groupby(messages, lambda message: message["role"])]
        body = {"model": self.name, "messages": turns, "max_tokens": max_new_tokens, "temperature": temperature,
                "top_p": top_p, "seed": seed}
        if stop:
            body["stop"] = stop
        start = time.perf_counter()
        try:
            completion = self._ask_again(body)
        except EndpointError as error:
            try:        # does the server answer anything?
                ask = self._ask_again if error.tries == 1 else self._ask        # it may be busy just now
                ask(body | {"messages": QUESTION})
            except (EndpointError, ContextFull):
                raise error from None
            completion = Completion("", [], [], "stop", no_reply=str(error))
        cut = find_stop(completion.text, stop, len(completion.text))
        if cut is not None:     # the server ignores `stop`, or returns the string with the text
            completion.text = completion.text[:cut]
            completion.finish = "stop"
        completion.seconds = time.perf_counter() - start
        return completion

    def _ask_again(self, body):
        """Returns the Completion of a request, made as often as it is worth."""
        for attempt in itertools.count(1):
            try:
                return self._ask(body)
            except EndpointError as error:
                if attempt >= error.tries:
                    raise
                if attempt == self.retries + 1:
                    announce(f"{error}; it is asked again for some minutes")
                pause = min(60.0, self.backoff_s * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
                time.sleep(max(pause, min(error.pause_s, self.timeout_s)))

    def _ask(self, body):
        """Returns the Completion of a request, made again for each parameter that the server does not take."""
        changed = dict(self.changed)
        tried_without_stop = False
        while True:
            sent = {changed.get(name, name): value for name, value in body.items()}
            sent.pop(None, None)
            status, retry_after, said = self._post(json.dumps(sent).encode())
            completion = self._read(said) if status == 200 else None
            if completion:      # a thought alone may have ended at a stop string in it
                name = "stop" if completion.no_reply == ONLY_THOUGHT and "stop" in sent else None
                tried_without_stop = tried_without_stop or name == "stop"
            elif status in (400, 413, 422) and re.search(TOO_LONG, said[:4096], re.I):
                raise ContextFull(f"{self.url} answered {status}: {self._excerpt(said)}; the conversation is longer "
                                  f"than {self.name!r} takes")
            else:
                name = refused_parameter(status, said, changed, sent)
            if not name:
                break
            changed[name] = None if name in changed else INSTEAD.get(name)
        if not completion:
            raise self._failure(status, retry_after, said)
        if completion.no_reply == ONLY_THOUGHT and tried_without_stop:     # there was no text without them either
            del changed["stop"]
        became = {name: f"sent as {new}" if new else "left out" for name, new in sorted(changed.items())}
        with self._lock:
            for name, new in changed.items():
                if self.changed.get(name, name) != new:
                    announce(f"{self.url}: {name} is {became[name]} from now on")
            self.changed |= changed
        completion.refused = tuple(f"{name}: {text}" for name, text in became.items())
        return completion

    def _failure(self, status, retry_after, said):
        message = (f"{self.url} answered {status}: {self._excerpt(said)}; check the server, the model's name "
                   f"{self.name!r} and the key in {self.key_name}")
        seconds = re.fullmatch(r"\d{1,9}(\.\d+)?", retry_after)
        pause_s = float(seconds[0]) if seconds else 0.0
        if status in (408, 409, 425, 429, 503, 529):
            return EndpointError(message, self.busy_retries + 1, pause_s)
        return EndpointError(message, self.retries + 1 if status >= 500 else 1, pause_s)

    def _read(self, said):
        try:
            answer = json.loads(said)
            choice = answer["choices"][0]
            message = choice["message"]
            text = message.get("content") or ""
            if isinstance(text, list):      # parts, such as {"type": "text", "text": "..."}
                text = [part["text"] for part in text if part["type"] == "text"]
            text = "".join(text)
            usage = answer.get("usage") or {}
            counts = [usage.get("prompt_tokens"), (usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
                      usage.get("completion_tokens")]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise EndpointError(f"{self.url} answered, but not with a chat completion: {self._excerpt(said)}; is it an "
                                "OpenAI-compatible /v1?", self.retries + 1) from None
        thought = message.get("reasoning_content") or message.get("reasoning") or ""
        if not thought:
            thought, text = split_thought(text)
        no_reply = "" if text.strip() else missing_text(choice, message, bool(thought))
        answered_by = "".join(filter(str.isprintable, str(answer.get("model") or "")[:100]))
        texts = [text[:MAX_TEXT], shorten(str(thought), MAX_THOUGHT), answered_by, no_reply]
        # Half of a surrogate pair, which no file takes, becomes "?".
        text, thought, answered_by, no_reply = [
            self._hide_key(each.encode("utf-8", "replace").decode()) for each in texts]
        prompt_tokens, cached_tokens, num_tokens = [
            count if type(count) is int and 0 <= count < 2**31 else 0 for count in counts]
        finish = "length" if choice.get("finish_reason") == "length" else "stop"
        return Completion(text, [], [], finish, prompt_tokens, cached_tokens, num_tokens=num_tokens, thought=thought,
                          no_reply=no_reply, answered_by=answered_by)

    def _post(self, body):
        """Returns (status, Retry-After, text) of the server's answer to one request."""
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json", "User-Agent": "ml-agent"})
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        try:
            with self._opener.open(request, timeout=self.timeout_s) as response:
                raw = response.read()
        except (OSError, ValueError, http.client.HTTPException) as error:       # ValueError: no host has such a name
            is_slow = isinstance(getattr(error, "reason", error), TimeoutError)
            raise EndpointError(f"{self.url} gave no answer ({self._excerpt(str(error))}; the limit is "
                                f"{self.timeout_s:g} s); is the server running there, and is it overloaded?",
                                1 if is_slow else self.retries + 1) from None
        return response.status, response.headers.get("Retry-After", ""), raw.decode("utf-8", "replace")

    def _excerpt(self, said):
        """Returns the beginning of a text, in printable ASCII and without the key."""
        return ascii(" ".join(self._hide_key(said)[:4096].split())[:300])

    def _hide_key(self, text):
        if len(self._key) >= 16:        # a shorter one, such as EMPTY, is a word that a reply may well hold
            for spelling in (self._key, json.dumps(self._key)[1:-1], urllib.parse.quote(self._key, safe="")):
                text = text.replace(spelling, "*" * len(spelling))
        return text


def split_thought(text):
    """Returns (thought, reply) of a text. The thought's opening tag may have stood in the prompt."""
    thought, tag, reply = text.partition("</think>")
    if not tag and not thought.lstrip().startswith("<think>"):
        return "", text
    return thought.strip().removeprefix("<think>").strip(), reply.lstrip()


def missing_text(choice, message, has_thought):
    if message.get("refusal"):
        return f"The model refused: {ascii(str(message['refusal'])[:200])}"
    if choice.get("finish_reason") == "length":
        return "The model wrote no reply before its tokens were used up (max_new_tokens)."
    return ONLY_THOUGHT if has_thought else f"The reply was empty ({ascii(choice.get('finish_reason')):.40})."


def refused_parameter(status, said, changed, sent):
    """Returns the one of PARAMETERS that an answer complains of, or None."""
    if status not in (400, 422):
        return None
    return next((name for name in PARAMETERS if (now := changed.get(name, name)) in sent
                 and re.search(rf"\b{now}\b", said[:4096])), None)


def find_stop(text, stops, num_new):
    """Returns where the earliest stop string begins in a text, or None. Only its last num_new characters are new."""
    starts = [text.find(stop, max(0, len(text) - num_new - len(stop) + 1)) for stop in stops]
    return min((start for start in starts if start >= 0), default=None)
