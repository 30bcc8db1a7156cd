"""The byte-level BPE tokenizer of a Qwen2.5 checkpoint, and the chat format."""
import codecs
import hashlib
import json
import re
from collections import defaultdict
from pathlib import Path

import tokenizers

from model import Config
from support.files import write_atomic
from support.pretrained import find_folder, read_json

# What transformers and vLLM read of Qwen's chat format.
CHAT_TEMPLATE = (r"{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
                 r"{% endfor %}"
                 r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
SYSTEM_TEMPLATE = ("{% if messages[0]['role'] != 'system' %}"
                   r"{{ '<|im_start|>system\nSYSTEM<|im_end|>\n' }}{% endif %}")
SYSTEM_IN_TEMPLATE = r"<\|im_start\|>system\\n(You are[^'<{]*)<\|im_end\|>"


class Tokenizer:
    """A byte-level BPE tokenizer (tokenizer.json) with Qwen's chat format.

    size: the number of token ids; the model's spare ones are never sampled. eos: the ids that end a turn. bytes: of
    each id, with which text grows token by token.
    """
    TURN = "<|im_start|>"
    END = "<|im_end|>"
    TEXT_END = "<|endoftext|>"
    SYSTEM = "You are a helpful assistant."

    def __init__(self, bpe, eos=(), system=SYSTEM, folder=None):
        """system: the message that a conversation without a system message gets, or None."""
        self.bpe = bpe
        self.system = system
        self.folder = folder
        self.bpe.no_truncation()                    # as a tokenizer.json may ask for, in silence
        self.bpe.no_padding()
        self.bpe.encode_special_tokens = True       # "<|im_end|>" in a script's output stays text and ends no turn
        self.turn = bpe.token_to_id(self.TURN)
        self.end = bpe.token_to_id(self.END)
        self.bytes = defaultdict(bytes)
        added = bpe.get_added_tokens_decoder()
        byte_of = {char: byte for byte, char in enumerate(byte_alphabet())}
        try:
            for text, i in bpe.get_vocab(with_added_tokens=True).items():
                self.bytes[i] = text.encode() if i in added else bytes(byte_of[char] for char in text)
            is_special = added[self.turn].special and added[self.end].special       # else a text could end a turn
        except KeyError:
            is_special = False
        if not is_special:
            raise ValueError(f"expected the tokenizer of a Qwen2.5 checkpoint: one of bytes, with {self.TURN} and "
                             f"{self.END} as special tokens")
        self.size = max(self.bytes) + 1
        self.eos = {*eos, self.end}
        self.control = {i for i, token in added.items() if token.special} | self.eos | {self.turn}

    @classmethod
    def from_pretrained(cls, folder):
        """Reads a checkpoint folder. ValueError: tokenizer.json is missing or damaged."""
        folder = Path(folder)
        try:
            bpe = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:      # the library raises bare Exception for a missing and for every malformed file
            raise ValueError(f"{folder / 'tokenizer.json'} cannot be read ({error}); copy it from the checkpoint that "
                             "the model came from") from None
        generation, model, config = (read_json(folder / name) if (folder / name).is_file() else {} for name in (
            "generation_config.json", "config.json", "tokenizer_config.json"))
        eos = generation.get("eos_token_id") or model.get("eos_token_id") or []
        eos = eos if isinstance(eos, list) else [eos]
        if not all(isinstance(token, int) for token in eos):
            raise ValueError(f"{folder}: eos_token_id must be numbers, found {str(eos):.80}")
        template = str(config.get("chat_template") or "")
        if not template and (folder / "chat_template.jinja").is_file():     # where newer tools put it
            template = (folder / "chat_template.jinja").read_text()
        system = cls.SYSTEM
        if template:
            match = re.search(SYSTEM_IN_TEMPLATE, template)
            system = match[1] if match else None
        return cls(bpe, eos, system, folder)

    @classmethod
    def of_bytes(cls):
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE({char: i for i, char in enumerate(byte_alphabet())}, []))
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.decoder = tokenizers.decoders.ByteLevel()
        bpe.add_special_tokens([cls.TEXT_END, cls.TURN, cls.END])
        return cls(bpe)

    def check_fits(self, config, name):
        if self.size > config.vocab_size:
            raise ValueError(f"{name}: the tokenizer has {self.size} ids and the model rows for {config.vocab_size}; "
                             "they are not of one checkpoint")

    def save(self, folder):
        """Writes the tokenizer's files beside a saved model."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        generation = {}
        if not self.folder:
            system = "" if self.system is None else SYSTEM_TEMPLATE.replace("SYSTEM", self.system)
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.END, "pad_token": self.TEXT_END,
                        "clean_up_tokenization_spaces": False, "chat_template": system + CHAT_TEMPLATE}
            write_atomic(folder / "tokenizer_config.json", settings)
        else:
            if (self.folder / "generation_config.json").is_file():
                generation = read_json(self.folder / "generation_config.json")
            for name in ("tokenizer_config.json", "chat_template.jinja"):
                if (self.folder / name).is_file():
                    write_atomic(folder / name, (self.folder / name).read_bytes())
        # a base model's names <|endoftext|> alone, and a turn ends with <|im_end|>
        write_atomic(folder / "generation_config.json", generation | {"eos_token_id": sorted(self.eos)})
        write_atomic(folder / "tokenizer.json", json.loads(self.bpe.to_str()))

    def fingerprint(self):
        """Returns 16 hex digits that tell tokenizers apart."""
        return hashlib.sha256(self.bpe.to_str().encode()).hexdigest()[:16]

    def encode(self, text):
        return self.bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """Returns the text of token ids. Bytes that are no valid UTF-8 become U+FFFD."""
        return b"".join(self.bytes[i] for i in ids).decode("utf-8", "replace")

    def spelling(self, ids, text):
        """Returns those of the sampled ids that spell exactly the text, without what ended it; None where they do not,
        or are no ids: they may come from a file."""
        if not isinstance(ids, list):
            return None
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pos = 0
        for n, i in enumerate(ids):
            if pos == len(text) and not decoder.getstate()[0]:
                return ids[:n]
            raw = self.bytes.get(i, b"") if type(i) is int and i not in self.control else b""
            piece = decoder.decode(raw)
            if not raw or not text.startswith(piece, pos):
                return None
            pos += len(piece)
        return ids if text[pos:] == decoder.decode(b"", final=True) else None

    def chat(self, messages):
        """Returns the ids of a conversation, up to where the assistant speaks next."""
        ids, _ = self.conversation(messages)
        return [*ids, self.turn, *self.encode("assistant\n")]

    def conversation(self, messages, assistant_turns=None):
        """Returns (ids, loss_mask) of a conversation, [{"role", "content"}]. The default system message comes first
        where it has none. The ids that were sampled for a reply, its "tokens", stand for its content where they spell
        it, because encoding the text may give others.

        The loss mask is True for the assistant's replies, and the token that ends each. assistant_turns: the indices
        of the messages that count; None: all of the assistant's.
        """
        numbered = list(enumerate(messages))
        if self.system is not None and (not messages or messages[0].get("role") != "system"):
            numbered.insert(0, (-1, {"role": "system", "content": self.system}))
        ids = []
        loss_mask = []
        newline = self.encode("\n")
        for i, message in numbered:
            role = message.get("role")
            content = message.get("content")
            if role not in ("system", "user", "assistant") or not isinstance(content, str):
                raise ValueError(f"message {i}: expected a role of system, user or assistant and a text as content, "
                                 f"found {str(message):.80}")
            is_reply = role == "assistant"      # which is encoded apart from its header, as when it was sampled
            header = self.encode(f"{role}\n" if is_reply else f"{role}\n{content}")
            reply = (self.spelling(message.get("tokens"), content) or self.encode(content)) if is_reply else []
            learned = is_reply and (assistant_turns is None or i in assistant_turns)
            ids += [self.turn, *header, *reply, self.end, *newline]
            loss_mask += [False] * (1 + len(header)) + [learned] * (len(reply) + 1) + [False] * len(newline)
        return ids, loss_mask


def open_checkpoint(spec):
    """Returns (folder, Config, Tokenizer) of a checkpoint, a folder or an id of the hub."""
    folder = find_folder(spec)
    config = Config.from_pretrained(folder)
    tokenizer = Tokenizer.from_pretrained(folder)
    tokenizer.check_fits(config, spec)
    return folder, config, tokenizer


def byte_alphabet():
    """Returns GPT-2's character for each of the 256 bytes: printable Latin-1 stays, the rest is U+0100 onwards."""
    plain = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    spare = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(spare)) for b in range(256)]
