"""What has to be known of a run before its table is believed: what was out of reach, who answered, and what it took."""
from collections import Counter

from support.files import COUNT, TEXT, one_of

LABELS = "out of reach", "in reach", "not there: no script has run"
GRADED = ("whether a submission is valid, and why it is not; no score, no answer, and no best known score. Printed "
          "scores are the script's own")
TOKENS = {"read": "prompt_tokens", "of these cached": "cached_tokens", "written": "tokens",
          "read by the coder": "coder_prompt_tokens", "written by the coder": "coder_tokens"}
FORM = {
    "labels": one_of(*LABELS), "sandbox": {str: COUNT}, "graded": TEXT, "replies": COUNT, "no_replies": COUNT,
    "thoughts": COUNT, "models": {str: COUNT}, "coders": {str: COUNT}, "refused": {str: COUNT}, "tokens": {str: COUNT}}


def disclose(records, model, coder):
    """Returns what results.json says of a run under "disclosure".

    records: the lines of each trajectory. model, coder: as asked for; what a server says that it is takes their place.
    The counts are of steps: layers of the sandbox around the scripts that ran, replies, who gave them, parameters that
    a server refused, tokens.
    """
    steps = [line for lines in records for line in lines if line["type"] == "step"]
    layers = Counter(step["sandbox"] for step in steps if step["outcome"] is not None)
    labels = LABELS[2]
    if layers:
        labels = LABELS[1] if layers.keys() & {"off", ""} else LABELS[0]
    asked = model if coder == "model" else coder
    coders = Counter(step.get("coder_answered_by", asked) for step in steps if "coder_tokens" in step)
    refused = Counter(name for step in steps for name in step.get("refused", ()))
    return {
        "labels": labels, "sandbox": dict(layers), "graded": GRADED, "replies": len(steps),
        "no_replies": sum("no_reply" in step for step in steps), "thoughts": sum("thought" in step for step in steps),
        "models": dict(Counter(step.get("answered_by", model) for step in steps)), "coders": dict(coders),
        "refused": dict(refused),
        "tokens": {name: sum(step.get(entry, 0) for step in steps) for name, entry in TOKENS.items()}}


def describe(name, found):
    """Returns a disclosure as text. name: of the run."""
    def listed(counts):
        return ", ".join(f"{key or 'none'} ({count:,})" for key, count in counts.items()) or "nobody"
    texts = [
        f"{name}: the labels were {found['labels']}; scripts that ran, by the layers around them: "
        f"{listed(found['sandbox'])}. Of grading the agent was shown {found['graded']}.",
        f"Answered by {listed(found['models'])}; of {found['replies']:,} replies {found['no_replies']:,} were none and "
        f"{found['thoughts']:,} came after a thought. Coder: {listed(found['coders'])}.",
        f"Tokens: {', '.join(f'{count:,} {what}' for what, count in found['tokens'].items() if count) or 'unknown'}."]
    if found["refused"]:
        texts.append(f"Parameters that the server was not given as asked for: {listed(found['refused'])}.")
    return " ".join(texts)
