"""What has to be known of a run before its table is believed: what counted, what was out of reach, who answered, and
what it took."""
from collections import Counter
from itertools import chain

from support import aide
from support.files import COUNT, TEXT, one_of
from support.records import steps_of

FINAL = {"last-valid": "the last valid submission",
         "best-validation": "the submission whose script printed the best score, the starter's too, of equal ones the "
                            "earliest,"}
LABELS = "out of reach", "in reach", "not there: no script has run"
GRADED = ("whether a submission is valid, and why it is not; no score, no answer, and no best known score. Printed "
          "scores are the script's own")
TOKENS = {"read": "prompt_tokens", "of these cached": "cached_tokens", "written": "tokens",
          "read by the coder": "coder_prompt_tokens", "written by the coder": "coder_tokens"}
COUNTS = {
    **dict.fromkeys(("replies", "no_replies", "thoughts"), COUNT),
    **dict.fromkeys(("models", "coders", "refused", "tokens", "sandbox"), {str: COUNT})}
FORM = {"labels": one_of(*LABELS), "graded": TEXT, **COUNTS}
MINIATURE_WARNING = "* Miniature data are made up from a seed: scores on them do not compare with published ones."
NOTE = """In brackets: intervals of 95 %, percentiles of a bootstrap of the tasks and of the trajectories of each,
which are somewhat narrow where there are few; one task with fewer than five trajectories has none. Over random: the
difference to random edits on the same tasks. Largest task: its share of the mean gap closed. A trajectory without a
valid submission has failed and counts at the starter's score. (oracle) is no result: the average of the best graded
step of each trajectory, which no agent can know. (paper): Table 1 of the paper, average and best of 8 trajectories."""


def disclose(records, model, coder):
    """Returns what results.json says of a run under "disclosure": counts of steps. records: the lines of each
    trajectory. model, coder: as asked for; what a server says that it is takes their place."""
    steps = steps_of(chain(*records))
    layers = Counter(step["sandbox"] for step in steps if step["sandbox"])      # "": the disk was full before any run
    labels = LABELS[2]
    if layers:
        labels = LABELS[1] if "off" in layers else LABELS[0]
    asked = model if coder == "model" else coder
    return {
        "labels": labels, "sandbox": layers, "graded": GRADED, "replies": len(steps),
        "no_replies": sum("no_reply" in step for step in steps), "thoughts": sum("thought" in step for step in steps),
        "models": Counter(step.get("answered_by", model) for step in steps),
        "coders": Counter(step.get("coder_answered_by", asked) for step in steps if "coder_tokens" in step),
        "refused": Counter(name for step in steps for name in step.get("refused", ())),
        "tokens": {name: sum(step.get(entry, 0) for step in steps) for name, entry in TOKENS.items()}}


def count_work(steps):
    """Returns what recorded steps took, and of the nodes of a search how many there are, are buggy, were judged without
    the reviewer, and work by a score that their output does not show."""
    nodes = [step["node"] for step in steps if step.get("node")]
    return {"scripts": sum(step["outcome"] is not None for step in steps),
            "seconds": sum((step["script_seconds"] for step in steps), 0.0), "nodes": len(nodes),
            "buggy": sum(node.get("buggy", False) for node in nodes),
            "unreviewed": sum(node.get("review") == "script" for node in nodes),
            "unprinted": sum(not node.get("buggy") and not node.get("is_printed") for node in nodes)}


def warnings(runs):
    """Returns the texts that have to be read before any result of these runs."""
    texts = []
    for run in runs:
        results = run["results"]
        if any(part["miniature"] for part in (*results["tasks"].values(), *run.get("trajectories", ()))):
            texts.append(MINIATURE_WARNING)
        if not results.get("complete", True):
            texts.append(f"{run['name']} is not complete; this is what was done when it stopped.")
        if results["settings"].get("sandbox") == "off":
            texts.append(f"{run['name']}: the sandbox was off, so scripts could read the answers.")
    return list(dict.fromkeys(texts))


def notes(runs):
    """Returns the texts below the tables: of each run what counts, how it was asked and what it disclosed, and NOTE."""
    texts = []
    for run in runs:
        results = run["results"]
        ends = Counter()
        work = Counter()
        for result in results["tasks"].values():
            ends.update(trajectory["ended"] for trajectory in result.get("trajectories", ()))
            work.update(result.get("work", {}))
        if ends:
            words = ", ".join(f"{end} {count}" for end, count in ends.most_common())
            is_search = work["nodes"] and results["final"] == "best-validation"
            final = aide.FINAL if is_search else FINAL[results["final"]]
            texts.append(f"{run['name']}: {final} counts. How they ended: {words}. "
                         f"{describe_scaffold(results['settings'], work)}")
        if "disclosure" in results:
            texts.append(describe(run["name"], results["disclosure"]))
    return [*texts, NOTE] if texts else []


def describe_scaffold(settings, work):
    """Returns in words how the model was asked, and what its trajectories took."""
    scaffold = settings.get("scaffold", "ml-agent")
    seconds = settings.get("seconds", 0)
    parts = [f"Scaffold: {scaffold}, at most {settings['steps']} steps and {seconds:g} s a trajectory"]
    if settings.get("clock") == "scripts":
        parts.append("the time that the model took to reply is not counted")
    if scaffold == "aide":
        num_drafts, debug_prob, max_depth = aide.SEARCHES[settings.get("search", "aide")]
        coder = settings.get("coder")
        parts.append(f"{num_drafts} drafts, debugging with probability {debug_prob} to depth {max_depth}, reviewer: "
                     f"{settings['model'] if coder == 'model' else coder}")
        parts.append(f"{work['buggy']} of {work['nodes']} nodes buggy, {work['unreviewed']} judged without a review, "
                     f"{work['unprinted']} with a score that the output does not show")
    parts.append(f"{work['scripts']} scripts run in {work['seconds']:.0f} s")
    return "; ".join(parts) + "."


def describe(name, found):
    """Returns a disclosure as text. name: of the run."""
    texts = [f"{name}: the labels were {found['labels']}. Of grading the agent was shown {found['graded']}"]
    for entry in COUNTS:
        value = found[entry]
        if isinstance(value, dict):
            value = ", ".join(f"{key or 'none'} ({count:,})" for key, count in value.items()) or "none"
        texts.append(f"{entry.replace('_', ' ').capitalize()}: {value}")
    return ". ".join(texts) + "."
