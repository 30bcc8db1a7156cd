"""How long each part of docs/real-run.sh takes on this machine, about.

    python docs/plan.py MODEL STATES SAMPLES TRAJECTORIES ITERATIONS
"""
import sys, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sample
from support.cli import format_table
from support.sandbox import SLOTS

PROMPT_TOKENS = 800     # of a medium prompt with tries
ACTION_TOKENS = 70
SCRIPT_S = 2.0          # seconds of a script on a miniature
LEARNED = 324           # expert states: 9 tasks, 4 trajectories, 9 steps


def plan_parts(model, num_states, num_samples, num_trajectories, num_iterations):
    """Returns in words how long the parts of docs/real-run.sh take here, by how fast prompts are read and replies are
    sampled. A trained token costs three that are read, an update and its reference four."""
    # 1. Seconds a token.
    engine = sample.load(model, rows=8, context=1280)
    words = engine.tokenizer.encode("x = rows['size'] * 2\n" * 100)

    def measure(start, n, length):
        began = time.monotonic()
        engine.generate([words[start:start + PROMPT_TOKENS]], n=n, max_new_tokens=length, temperature=1.0)
        return time.monotonic() - began
    measure(2, 1, 1)        # the first pass is slower
    read_s = measure(0, 1, 1) / PROMPT_TOKENS
    write_s = max(1e-9, measure(1, 8, 16) - read_s * PROMPT_TOKENS) / (8 * 16)

    # 2. Seconds of the parts.
    script_s = SCRIPT_S / SLOTS.cpus
    state_s = PROMPT_TOKENS * read_s
    action_s = ACTION_TOKENS * write_s + script_s
    measure_s = 19 * num_states * (state_s + num_samples * action_s)     # of an agent on all tasks
    learn_s = 8 * (PROMPT_TOKENS + 8 * ACTION_TOKENS) * 4 * read_s
    parts = {
        "states, expert": (19 * 2 * 9 + LEARNED) * script_s,
        "gate": measure_s * 9 / 19,
        "fine-tuning": 2 * LEARNED * (PROMPT_TOKENS + ACTION_TOKENS) * 3 * read_s,
        "RL": num_iterations * (8 * (state_s + 8 * action_s) + learn_s),
        "states of four agents": 4 * measure_s,
        "trajectories of four agents": 4 * 19 * 9 * num_trajectories * (state_s + action_s)}
    rows = [[name, f"{seconds / 60:.0f}"] for name, seconds in [*parts.items(), ("all", sum(parts.values()))]]
    return (f"It reads {1 / read_s:.0f} and samples {1 / write_s:.0f} tokens a second. Minutes, about:\n"
            + format_table(rows))


if __name__ == "__main__":
    if len(sys.argv) != 6:
        sys.exit(__doc__)
    print(plan_parts(sys.argv[1], *map(int, sys.argv[2:])))
