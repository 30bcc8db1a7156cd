"""The text of a script: its numbered constants and what may be tried with them, its code without comments, and the
difference of two."""
import contextlib, difflib, io, math, re, tokenize

from support.files import shorten

NUMBER = r"(?:0|[1-9]\d{0,14})(?:\.\d{0,15})?(?:[eE][-+]?\d{1,2})?"     # as a script writes it
NAME = r"[A-Z][A-Z0-9_]{0,99}"          # of a constant
FACTORS = ("*2", "/2", "*5", "/5")      # that prompts for small models offer to multiply a constant with
NUMBERS = ("0.1", "0.01")               # that they offer in place of 0.0, which no factor changes
MAX_NAMED = 100                         # constants in the message that there is no such one
MAX_DIFF = 2_000                        # lines of two texts together that are compared, in 0.6 s at worst


class InvalidAction(ValueError):
    """A reply that cannot be read, or an action that cannot be carried out; the message is for the agent."""


def constants(script):
    """Returns [(name, text of the number, its start, its end)] of the numbered constants of a script: its lines
    `NAME = number` in the order of their names, but not how it is seeded and validated."""
    line = rf"^({NAME}) = ({NUMBER})(?=[ \t]{{0,99}}(?:#|$))"
    found = []
    for match in re.finditer(line, script, re.MULTILINE):
        if "SEED" not in match[1] and "VALID" not in match[1]:
            found.append((match[1], match[2], match.start(2), match.end(2)))
    return sorted(found)


def find_constant(script, constant):
    """Returns the number of a constant, from 1. constant: that number or its name."""
    names = [name for name, *_ in constants(script)]
    constant = str(constant).strip()     # or a whole number
    if constant in names:
        return names.index(constant) + 1
    if re.fullmatch("[0-9]{1,9}", constant) and 1 <= int(constant) <= len(names):
        return int(constant)
    listed = ", ".join(f"{i} {name}" for i, name in enumerate(names[:MAX_NAMED], 1))
    raise InvalidAction(f"There is no constant {shorten(constant, 60)}; there is {listed or 'none in the script'}.")


def set_constant(script, constant, value):
    """Returns the script with another value of a constant. InvalidAction: there is no such constant, or it would not
    change. See find_constant and change_number."""
    name, before, start, end = constants(script)[find_constant(script, constant) - 1]
    return script[:start] + change_number(name, before, value) + script[end:]


def change_number(name, before, value):
    """Returns the text of the number in the place of `before`. value: a number, or * or / and a factor, which keeps a
    whole number whole and at least 1, and others at 3 significant digits."""
    parts = re.fullmatch(rf"\s*([*/]?)\s*(-?{NUMBER})\s*", value)
    if not parts or parts[1] and float(parts[2]) <= 0:
        raise InvalidAction("The value must be a number, or a factor above 0 such as *2 or /2; found "
                            f"{shorten(repr(value), 60)}.")
    sign, after = parts.groups()
    if sign:
        number = float(before) * (float(after) if sign == "*" else 1 / float(after))
        after = str(max(1, round(number))) if before.isdigit() else str(float(f"{number:.3g}"))
        if not re.fullmatch(NUMBER, after):
            raise InvalidAction(f"{name} = {after} is out of bounds.")
    if float(after) == float(before):
        raise InvalidAction(f"{name} is {before} already.")
    return after


def without_comments(script):
    """Returns the text of a script without comments, docstrings and empty lines."""
    lines = script.splitlines()
    begins = True       # a statement
    tokens = list(tokenize.generate_tokens(io.StringIO(script).readline))
    inside = {row for token in tokens for row in range(token.start[0], token.end[0])}     # a text goes on after these
    code = [token for token in tokens if token.type not in (tokenize.COMMENT, tokenize.NL)]
    for token, after, then in zip(code, code[1:], code[2:]):
        is_text = begins and token.type == tokenize.STRING and after.type == tokenize.NEWLINE
        if is_text and then.type != tokenize.DEDENT:        # else it may be all that a class has
            lines[token.start[0] - 1:token.end[0]] = [""] * (token.end[0] - token.start[0] + 1)
            inside.difference_update(range(token.start[0], token.end[0]))
        begins = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    for token in tokens:
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "".join(f"{line if row in inside else line.rstrip()}\n" for row, line in enumerate(lines, 1)
                   if line.strip() or row in inside)


def changes(script):
    """Returns [(number of a constant, value)] of what prompts for small models offer: each constant times each of the
    FACTORS (0.0 by one of the NUMBERS) where that changes it, but not a share (a number between 0 and 1) times what
    would make it 1 or more."""
    found = []
    for number, (name, text, *_) in enumerate(constants(script), 1):
        is_zero = float(text) == 0 and "." in text
        for value in NUMBERS if is_zero else FACTORS:
            with contextlib.suppress(InvalidAction):
                after = float(change_number(name, text, value))
                if not 0 < float(text) < 1 <= after:
                    found.append((number, value))
    return found


def untried(script, tried):
    """Returns those of changes(script) that are not in `tried`, arguments of Set Constant."""
    done = [(int(change["constant"]), change["value"]) for change in tried]
    return [change for change in changes(script) if change not in done]


def inverse(change):
    """Returns the arguments of the Set Constant that takes one back; {} where that was not by a factor."""
    if change.get("value", "")[:1] not in ("*", "/"):
        return {}
    sign = "/" if change["value"].startswith("*") else "*"
    return {"constant": change["constant"], "value": sign + change["value"][1:]}


def difference(before, after):
    """Returns the lines of a unified difference of two texts, without its heads."""
    before = before.splitlines()
    after = after.splitlines()
    if len(before) + len(after) > MAX_DIFF:     # difflib takes quadratic time
        return [f"(too long to be shown: {len(before):,} lines before, {len(after):,} after)"]
    return list(difflib.unified_diff(before, after, lineterm="", n=2))[2:]


def printed_metric(stdout, metric=""):
    """Returns the last finite number of the last line that mentions "validation" or the metric's name and has a number
    besides that name, as "MAP@5" has: of those behind the last mention, or of all where none is there."""
    number = r"(?<![\w.])[-+]?(?:nan|inf(?:inity)?|(?:\d+(?:\.\d*)?|\.\d+)(?:e[-+]?\d{1,4})?)(?!\w|\.\d)"
    mention = f"validation|{re.escape(metric)}" if metric else "validation"
    for line in reversed(stdout.splitlines()):
        parts = re.split(mention, line, flags=re.IGNORECASE)
        behind = re.findall(number, parts[-1][-1000:], re.IGNORECASE)
        found = behind or re.findall(number, " ".join(parts)[-1000:], re.IGNORECASE)
        if len(parts) > 1 and found:
            finite = [value for value in map(float, found) if math.isfinite(value)]
            return finite[-1] if finite else None
    return None
