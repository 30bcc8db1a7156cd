"""MLAgentBench's own loop, as a scaffold (eval.py --scaffold mlagentbench).

Each request is one user message: the tools, the research problem, nine rules, the form of a reply, and the last three
steps. A reply without the entries or with an unknown tool is asked for again at no cost, five replies in all; then the
run ends. Of an Action Input that is no JSON the texts between its keys are taken; without these the step shows the
error, and is forgotten, also by the count of steps, as soon as another succeeds. An edit runs nothing: what counts is
the last executed script. What differs from snap-stanford/MLAgentBench:

- The words of the prompt. The data are in data/, the answers out of reach, and scripts in the sandbox with its limits.
- Read File, Write File, Append File, Python REPL, Reflection and Edit Script Segment (AI), which its prompt does not
  name but its loop accepts, are unknown tools.
- The texts between the keys are taken as they are: slashes, backslashes and line breaks stay.
- Undo Edit Script takes back the last edit of the file that was written, not of the file that an edit started from.
- A difference has two lines around each change. Lists of files are sorted by the bytes of their names.
- A script has the task's limits; its output says which one it has passed.
- The last valid submission counts, also where a later script has spoiled it.
- Understand File and summaries are asked for at the agent's temperature, not at 0.01.
- Of a long text the coder reads the first 100,000 characters. Long observations without a coder lose their middle.
- An argument of a wrong type is an error that stays in the history. A reply of more than 50,000 characters is not read.
"""
import contextlib, json, re

import env
from env import EXPLAIN, read_args
from support import workspace
from support.files import shorten
from support.scripts import InvalidAction, difference
from support.workspace import script_text

WINDOW = 3          # steps that the prompt shows
BLOCK = 10_000      # characters of a text, in whole lines, that the coder reads at a time
MAX_TEXT = 10 * BLOCK       # that it reads of a text
MAX_LINES = 100     # of one Inspect Script Lines
FILE = "a valid file name, relative to the current folder"
TOOLS = {       # tool -> (what it is for, {argument: what it is}, what comes back)
    "List Files": (
        "Use this to see which files there are.",
        {"dir_path": 'a valid relative path of a folder, such as "." or "a/b"'},
        "a list of the files and folders in dir_path, or an error message."),
    "Copy File": (
        "Use this to copy a file to a new place under a new name.", {"source": FILE, "destination": FILE},
        "a message that the file was copied, or an error message."),
    "Undo Edit Script": (
        "Use this to take back the last edit of a Python script.", {"script_name": FILE},
        "the content of the script before the last edit, or an error message."),
    "Execute Script": (
        "Use this to execute a Python script, which must exist.", {"script_name": FILE},
        "the output of the script, or its errors."),
    "Final Answer": (
        "Use this to give the final answer to the task.",
        {"final_answer": "a detailed description of the final answer"}, "empty."),
    "Understand File": (
        "Use this to read a whole file and understand certain aspects of it. Inspect Script Lines shows a part "
        "exactly.",
        {"file_name": FILE, "things_to_look_for": "a detailed description of what to look for and what to return"},
        "a description of the relevant content and lines of the file, or an error message."),
    "Inspect Script Lines": (
        f"Use this to see at most {MAX_LINES} lines of a Python script exactly, above all in debugging.",
        {"script_name": FILE, "start_line_number": "a valid line number", "end_line_number": "a valid line number"},
        "the script from start_line_number to end_line_number, or an error message."),
    "Edit Script (AI)": (
        "Use this for a rather large but coherent edit of a Python script. Do not edit it yourself, but describe the "
        "edit, so that another AI can carry it out.",
        {"script_name": FILE + "; it is created empty if there is none",
         "edit_instruction": "a detailed description of the edit, step by step", "save_name": FILE},
        "the edit. Always check whether it is right; if it is far from that, use Undo Edit Script.")}
DEFAULTS = {
    "actions": tuple(TOOLS), "temperature": 0.2, "final": "last-valid", "max_new_tokens": 1024, "context": 16_384}
PROMPT = """You are a helpful research assistant. You can use these tools:
{tools}
Research Problem: {problem}

You know nothing about this problem yet.

Follow these instructions, and do not forget them:
- First make a high-level plan from what you know of the problem and the tools, and record it in the Research Plan and \
Status. You may revise it later.
- The Research Plan and Status keeps track, in order and in few words, of the plan, the steps that are done and those \
in progress, and the results and conclusions of each step that was carried out.
- It holds only progress that was made by earlier steps, and no result that the last observation has not confirmed.
- Figures and estimates of performance can only be confirmed by running the code and seeing its output.
- Design good experiments, and measure the baseline before you attempt to improve it.
- Follow the plan, and reach the goal as straightforwardly as possible.
- Show the results and reasons that support a conclusion before you draw it.
- Do not try to install packages or libraries.
- If you believe that the problem is solved, submit with Final Answer. You can submit only once, so make sure before \
that the goal is reached.

Always answer in exactly this form:
{entries}
Observation:
```
the result of the action
```

"""
MORE = {        # what is asked of an entry beyond env.EXPLAIN
    "Research Plan and Status": ". Enclose what is new in double asterisks **like this**. If nothing is new, copy the "
                                "entry of the step before; keep its plan whole unless you revise it on purpose.",
    "Action Input": ", as valid JSON"}
PARSING = "ActionInputParsingError: "


def describe_tool(name):
    purpose, args, result = TOOLS[name]
    usage = ",\n    ".join(f'"{key}": [{text}]' for key, text in args.items())
    return (f"- {name}:\n{purpose}\nUsage:\n```\nAction: {name}\nAction Input: {{\n    {usage}\n}}\n"
            f"Observation: [{result}]\n```\n")


def read_entries(reply, fields):
    """Returns {entry: text} of a reply: of a repeated header the last counts, of the first entry the first.
    InvalidAction: one is missing."""
    values = {}
    end = len(reply)
    for name in reversed(fields):
        header = f"{name}:"
        start = reply.find(header, 0, end) if name == fields[0] else reply.rfind(header, 0, end)
        if start < 0:
            raise InvalidAction(f'The entry "{header}" is missing.')
        values[name] = reply[start + len(header):end]
        end = start
    return values


def read_input(text, keys):
    """Returns the arguments of an Action Input that is JSON, else what lies between its keys, in their order.
    ValueError: it has neither."""
    text = re.sub(r"^```(?:json)?|```$", "", text.strip()).strip()
    reason = "Argument mismatch"
    try:
        args = json.JSONDecoder(strict=False).decode(text)
        if isinstance(args, dict) and set(args) == set(keys):
            return args
    except (ValueError, RecursionError) as error:
        reason = str(error)
    text = text[text.find("{") + 1:]
    end = text.rfind("}")       # without one the last character goes, as in the original
    args = {}
    for i, key in reversed(list(enumerate(keys))):
        comma = r",\s*" if i else ""
        headers = list(re.finditer(f'{comma}"{key}":', text[:end]))
        if not headers:
            raise ValueError(reason)
        header = headers[-1 if i else 0]
        args[key] = text[header.end():end].strip().strip('"')
        end = header.start()
    return args


class Env(env.Env):
    """One trajectory in MLAgentBench's loop."""
    stop = ("Observation:",)
    num_tries = 5

    @property
    def reminder(self):
        return (f"\n\nYour response was not in the right form. Give a valid response with all entries: "
                f"{', '.join(self.fields)}\n\n")

    def reset(self):
        super().reset()
        self.messages = self.prompt()
        return self.messages

    def restore(self, snapshot, messages=None, *, past=(), **options):
        super().restore(snapshot, messages, **options)
        self.history = []       # (the reply, the observation) of the steps that are not forgotten
        for line in past:
            self.remember(line["fields"], line["observation"])

    def remember(self, fields, observation):
        if not observation.startswith(PARSING):
            self.history = [step for step in self.history if not step[1].startswith(PARSING)]
        entries = "".join(f"{name}: {fields.get(name, '')}" for name in self.fields)
        self.history.append((entries, observation))

    @property
    def steps_left(self):
        return self.steps - len(self.history)

    def prompt(self):
        tools = "".join(describe_tool(name) for name in TOOLS if name in self.actions)
        entries = "\n".join(f"{name}: {EXPLAIN[name]}{MORE.get(name, '')}" for name in self.fields)
        text = PROMPT.format(tools=tools, problem=self.task.problem.strip(), entries=entries)
        if len(self.history) <= WINDOW:
            text += "\nNow let's start!\n\n"
        for reply, observation in self.history[-WINDOW:]:
            text += f"\n\nAssistant:\n{reply}\nObservation:\n```\n{observation}\n```\n\n"
        return [{"role": "user", "content": text}]

    # Reading a reply

    def read(self, reply):
        fields = {}
        action = None
        try:
            if len(reply) > env.MAX_REPLY:
                raise InvalidAction(f"The reply is longer than {env.MAX_REPLY:,} characters.")
            fields = read_entries(reply.partition("Observation:")[0], self.fields)
            if "Research Plan and Status" in fields:
                fields["Research Plan and Status"] = fields["Research Plan and Status"].replace("**", "")
            name = fields["Action"].strip()
            if name not in TOOLS or name not in self.actions:
                raise InvalidAction("There is no such tool.")
            action = name
            args = read_input(fields["Action Input"], TOOLS[action][1])
            return fields, action, read_args(action, json.dumps(args)), ""      # which checks the types
        except InvalidAction as problem:
            error = str(problem)
        except ValueError as problem:
            usage = json.dumps(TOOLS[action][1], indent=1, ensure_ascii=False)
            error = (f"{PARSING}{problem}\nThe input of {action} must be valid JSON with the right entries: a comma "
                     f"may be missing, and triple quotes are none. Try again in this form:\n{usage}")
        return fields, action, {}, error

    def is_readable(self, reply):
        return self.read(reply)[1] is not None

    def act(self, step, parse_error):
        super().act(step, parse_error)
        if step.action is None:
            self.ended = "no valid reply"
        elif step.error:
            step.observation = step.error if step.error.startswith(PARSING) else f"EnvError: {step.error}"
        if len(step.observation) > env.MAX_OBSERVATION and self.coder:
            question = (f"Summarize what is relevant in this observation of {step.action} {json.dumps(step.args)}, "
                        "objectively and in few words. Nothing that it does not confirm, and no suggestions.")
            with contextlib.suppress(InvalidAction):        # too long for the coder
                step.observation = self.read_in_blocks(step, step.observation, question)
        step.observation = shorten(step.observation, env.MAX_OBSERVATION)
        self.remember(step.fields, step.observation)

    def complete_observation(self, step):
        return step.observation

    def read_in_blocks(self, step, text, question):
        """Returns what the coder says of a text, and of what it has said of each block if there are several."""
        answers = []
        text = text[:MAX_TEXT]
        for block in re.finditer(rf"(?s).{{1,{BLOCK - 1}}}(?:\n|\Z)|.{{{BLOCK}}}|\A\Z", text):     # or of a longer line
            first, last = (text.count("\n", 0, end) + 1 for end in (block.start(), block.end() - 1))
            lines = f"Lines {first} to {last}:\n```\n{block[0]}\n```"
            answers.append(self._ask_coder(step, f"{question}\n\n{lines}"))
        if len(answers) == 1:
            return answers[0]
        return self._ask_coder(step, "\n\n".join([question, "Make one answer of these, for its segments:", *answers]))

    # Actions

    def _list_files(self, step, dir_path):
        return "\n".join(sorted(self._contents(self._path(dir_path))))

    def _inspect_script_lines(self, step, script_name, start_line_number, end_line_number):
        first = int(start_line_number)
        last = int(end_line_number)
        if last - first > MAX_LINES:
            raise InvalidAction(f"At most {MAX_LINES} lines can be shown.")
        text, size = self._text(self._path(script_name))
        lines = text.split("\n")
        known = "the file"
        if size > workspace.MAX_READ:
            known = f"what is read of the file, its first {workspace.MAX_READ >> 20} MiB,"
        shown = "\n".join(lines[max(first - 1, 0):last])
        return f"Here are the lines ({known} ends at line {len(lines)}):\n\n{shown}"

    def _understand_file(self, step, file_name, things_to_look_for):
        text = self._text(self._path(file_name))[0]
        return self.read_in_blocks(
            step, text, "Here is a part of a file. Report shortly, name the lines that matter, guess nothing, and say "
                        f"what you cannot find in it. Look for: {things_to_look_for}")

    def _edit_script_ai(self, step, script_name, edit_instruction, save_name):
        path = self._path(script_name, write=True)
        if path not in self.files:
            self._write(path, b"")
        source = script_text(self.blobs, self.files[path])
        observation = super()._edit_script_ai(step, script_name, edit_instruction, save_name)
        target = self._path(save_name)
        if target == path or not observation.startswith(f"{target} is "):       # the coder returned no script
            return observation
        lines = difference(source, script_text(self.blobs, self.files[target]))
        return "\n".join([f"{target} is saved. The difference to {path}:", *lines])

    def _score_edit(self, step):
        return []       # an edit runs nothing

    def _undo_edit_script(self, step, script_name):
        super()._undo_edit_script(step, script_name)
        path = self._path(script_name)
        return f"Content of {path} after the last edit was taken back:\n{script_text(self.blobs, self.files[path])}"

    def _execute_script(self, step, script_name):
        text = super()._execute_script(step, script_name)
        if step.score is not None:
            step.kind = "scored"        # only here are submissions graded
        return text

    def _describe_run(self, path, result):
        text = result.stdout or result.stderr
        if result.exit_code != 0:
            text = result.stderr
        if result.limit or result.outcome == "disk full":
            text += f"\n{result.detail}"
        return f"The script has been executed. Here is the output:\n{text}"
