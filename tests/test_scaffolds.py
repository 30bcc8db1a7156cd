"""Other papers' scaffolds: AIDE's search and MLAgentBench's loop."""
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from support import aide

ORIGINAL = json.loads((Path(__file__).parent / "aide_nodes.json").read_text())


# ---- the search

@pytest.mark.parametrize("world", ORIGINAL["worlds"])
def test_the_search_is_that_of_the_original_node_by_node(world):
    """What aideml chose in worlds whose reviewer, scripts and random source followed a list."""
    direction = "down" if world["lower_is_better"] else "up"
    knobs = [world[name] for name in ("num_drafts", "debug_prob", "max_debug_depth")]
    nodes = []
    for step in world["steps"]:
        is_bug, failed, metric, roll, pick, operator, parent, buggy, best = step
        rng = SimpleNamespace(random=lambda: roll, choice=lambda nodes: nodes[int(pick * len(nodes))])
        assert aide.choose(nodes, direction, rng, *knobs) == (operator.capitalize(), parent)
        node = aide.Node(parent, metric=metric, buggy=is_bug or failed or metric is None)
        nodes.append(node)
        assert (node.buggy, aide.best_node(nodes, direction)) == (buggy, best)


def test_the_fixture_has_all_that_was_recorded():
    operators = [step[5] for world in ORIGINAL["worlds"] for step in world["steps"]]
    assert len(operators) == 480
    assert {name: operators.count(name) for name in set(operators)} == {"draft": 89, "debug": 179, "improve": 212}
