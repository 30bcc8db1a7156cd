"""Prompts for small models, which are shown the state itself in place of the conversation: the short one, for a few
million weights, and the medium one, for some hundred million. Any record of a step can give them again."""
import json

from support.scripts import change_number, changes, constants, untried

SHORT_CONSTANTS = 20                    # constants in a short prompt
SHORT_NEWS = 100                        # characters of the news in a short prompt, and of a try in a medium one
NUM_TRIES = 6                           # in a medium prompt
SCRIPT_ROOM = 1_350                     # characters of the script in a medium prompt, about 380 tokens
SHORT = """{metric}, {better} is better, {steps_left} steps left
Best: {best}
{constants}
Last: {news}"""
MEDIUM_SYSTEM = """You improve a script that trains a model. After a change it is run, and you are told the score \
that it printed. Undo a change that is no better, then try something else.

Your tools, with examples of whole replies:

{examples}"""
MEDIUM = """The score is {metric}; {better} is better. {steps_left} steps left. Best score: {best}.
Tries so far:
{tries}

{entry} now:
```python
{script}
```
Use one tool, with names and lines of this script, and reply in this form:
{form}"""
MEDIUM_AGENT = {        # settings of an agent that is shown medium prompts
    "prompt_format": "medium", "fields": ("Thought", "Action", "Action Input"), "context": 1280, "max_new_tokens": 160,
    "actions": ("Set Constant", "Replace In Script", "Undo Edit Script", "Execute Script", "Final Answer")}
MEDIUM_FORM = {         # entry of a reply -> what is asked of it, in place of env.EXPLAIN
    "Thought": "(why, in one short sentence)", "Action": "(the name of the tool)", "Action Input": "(its JSON)"}
MEDIUM_EXAMPLES = {     # the Thought and the Action Input; of edits see medium_edits
    "Undo Edit Script": ("The score got worse.", {"script_name": "train.py"}),
    "Execute Script": ("I need the score to beat.", {"script_name": "train.py"}),
    "Final Answer": ("Nothing is left to improve.", {"final_answer": "done"})}


def short_prompt(task, seen, script, is_best, steps_left):
    """Returns the one message that a small model is shown: the best printed score, the numbered constants of the
    script, each with the changes that are still to be tried, and what the last step brought. seen: see
    env.NOTHING; is_best: whether that score is of this script."""
    offered = untried(script, seen["tried"])
    lines = []
    for number, (name, text, *_) in enumerate(constants(script)[:SHORT_CONSTANTS], 1):
        values = [value for which, value in offered if which == number]
        lines.append(" ".join([f"{number} {name} = {text}", *values]))
    content = SHORT.format(metric=task.metric, better=better_word(task), steps_left=steps_left, news=seen["news"],
                           best=best_text(seen, is_best), constants="\n".join(lines))
    return [{"role": "user", "content": content}]


def medium_prompt(task, seen, script, is_best, steps_left, actions, fields):
    """Returns the two messages for a model of some hundred million weights. See short_prompt. actions: {name: its
    arguments}; fields: {entry of a reply: its explanation}."""
    thoughts_and_args = MEDIUM_EXAMPLES | medium_edits(script, steps_left)
    examples = []
    for name in actions:
        thought, args = thoughts_and_args.get(name, ("I need this tool.", actions[name]))
        values = dict.fromkeys(fields, thought) | {"Action": name, "Action Input": json.dumps(args)}
        examples.append("\n".join(f"{field}: {values[field]}" for field in fields))
    shown = shown_script(script).rstrip("\n")
    if shown != script.rstrip("\n"):
        shown += "\n... (the rest is not shown)"
    form = fields | MEDIUM_FORM
    content = MEDIUM.format(metric=task.metric, better=better_word(task), steps_left=steps_left, entry=task.entry,
                            best=best_text(seen, is_best), tries="\n".join(seen["tries"]) or "none", script=shown,
                            form="\n".join(f"{field}: {form[field]}" for field in fields))
    return [{"role": "system", "content": MEDIUM_SYSTEM.format(examples="\n\n".join(examples))},
            {"role": "user", "content": content}]


def medium_edits(script, steps_left):
    """Returns examples of edits of this script, {} where it has no constant: a small model that sees another script's
    names copies those. Each step has others, so that what is copied is not always the same."""
    offered = changes(script)
    if not offered:
        return {}
    examples = {}
    for shift, action in enumerate(("Set Constant", "Replace In Script")):
        number, factor = offered[(7 * steps_left + 5 * shift) % len(offered)]
        name, value, *_ = constants(script)[number - 1]
        new_value = change_number(name, value, factor)
        args = {"constant": name, "value": new_value}
        if action == "Replace In Script":
            args = {"script_name": "train.py", "find": f"{name} = {value}", "replace": f"{name} = {new_value}"}
        examples[action] = f"Another {name} may help.", args
    return examples


def shown_script(script):
    """Returns what a medium prompt shows of a script: whole lines of its first SCRIPT_ROOM characters."""
    return script if len(script) <= SCRIPT_ROOM else script[:SCRIPT_ROOM].rpartition("\n")[0]


def best_text(seen, is_best):
    if seen["best_printed"] is None:
        return "none"
    return f"{seen['best_printed']:.5g}, by {'this' if is_best else 'an earlier'} script"


def better_word(task):
    return "higher" if task.direction == "up" else "lower"
