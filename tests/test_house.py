"""The house: who imports whom, how long it is, how many settings it has.

    python tests/test_house.py      # prints lines and bytes of each file, imports, settings, and habits to look at
"""
import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
READING_PATH = ("model", "fused", "sample", "env", "reward", "sft", "rl", "eval")
PROGRAMS = {"sft", "rl", "eval"}
FILES = [*(ROOT / f"{name}.py" for name in READING_PATH), *sorted((ROOT / "support").glob("*.py")),
         *sorted((ROOT / "tasks").glob("*.py"))]


def module_of(path):
    """Returns a file's name as it is imported; the files of tasks/ are one module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "tasks" if parts[0] == "tasks" else ".".join(parts)


def imports():
    """Returns {module: the modules of this repository that it imports, wherever in its text}."""
    modules = {module_of(path) for path in FILES}
    table = {}
    for path in FILES:
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        if any(name.split(".")[0] == "tasks" for name in names):
            names.add("tasks")
        table.setdefault(module_of(path), set()).update(names & modules - {module_of(path)})
    return table


def settings():
    """Returns {class of settings: its own fields}."""
    fields = {}
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Settings"):
                own = [field.target.id for field in node.body if isinstance(field, ast.AnnAssign)]
                fields[f"{module_of(path)}.{node.name}"] = own
    return fields


def test_the_three_programs_do_not_know_each_other():
    table = imports()
    assert {name: table[name] & PROGRAMS for name in PROGRAMS} == {name: set() for name in PROGRAMS}
    users = {name for name, imported in table.items() if imported & PROGRAMS}
    assert users == set()       # nor does anything below them


def test_no_import_leads_back_to_where_it_came_from():
    table = imports()
    order = []
    while len(order) < len(table):
        ready = sorted(name for name in table if name not in order and table[name] <= set(order))
        assert ready, f"a circle among {sorted(set(table) - set(order))}"
        order += ready


def test_architecture_and_environment_stand_alone():
    """model.py knows no processes and no sampler, env.py no model; support knows none of the programs' files."""
    table = imports()
    assert not table["model"] & {"sample", "env", "support.distributed", "support.cli"}
    assert not table["env"] & {"model", "sample", "fused", "support.distributed"}
    assert table["reward"] == set()
    assert "torch" not in re.findall(r"^(?:import|from) (\w+)", (ROOT / "env.py").read_text(), re.M)


def test_threads_that_wait_for_each_other_sleep():
    """Every OpenMP library, torch's among them, is loaded after its setting is made: it is read then alone."""
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    result = subprocess.run([sys.executable, "-c", "import eval"], cwd=ROOT, capture_output=True, text=True,
                            check=True, env=environment | {"OMP_DISPLAY_ENV": "verbose"})
    counts = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", result.stderr)
    if not counts and "libgomp" not in Path("/proc/self/maps").read_text():
        pytest.skip("this torch has another OpenMP library")
    assert set(counts) == {"10000"}


@pytest.mark.parametrize("name", ["model", "sample", "sft", "rl", "eval"])
def test_that_setting_is_made_before_anything_else_is_imported(name):
    """The first import that is not of Python itself is support, which makes it."""
    statements = ast.parse((ROOT / f"{name}.py").read_text()).body
    names = []
    for statement in statements:
        if isinstance(statement, ast.Import):
            names += [alias.name.split(".")[0] for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            names.append(statement.module.split(".")[0])
    others = [name for name in names if name not in sys.stdlib_module_names]
    assert others[0] == "support"


def habits(text):
    """Returns the lines of a file that a reader may stumble over: three things assigned at once, a text times a
    condition, a comprehension with two loops and a condition."""
    lines = []
    for node in ast.walk(ast.parse(text)):
        many = (isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
                and isinstance(node.targets[0], ast.Tuple) and len(node.value.elts) >= 3)
        product = (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)
                   and isinstance(node.right, (ast.Compare, ast.BoolOp, ast.UnaryOp))
                   and not (isinstance(node.right, ast.UnaryOp) and not isinstance(node.right.op, ast.Not)))
        nested = (isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp))
                  and len(node.generators) > 1 and any(loop.ifs for loop in node.generators))
        if many or product or nested:
            lines.append(node.lineno)
    return lines


if __name__ == "__main__":
    total = {"reading path": [0, 0], "all": [0, 0]}
    for path in FILES:
        text = path.read_text()
        size = [text.count("\n"), len(text.encode())]
        groups = ["all", "reading path"] if path.parent == ROOT else ["all"]
        for group in groups:
            total[group] = [a + b for a, b in zip(total[group], size)]
        print(f"{size[0]:6,} lines {size[1]:8,} bytes  {path.relative_to(ROOT)}  to look at: {habits(text) or '-'}")
    for group, size in total.items():
        print(f"{size[0]:6,} lines {size[1]:8,} bytes  {group}")
    for name, imported in imports().items():
        print(f"{name}: {', '.join(sorted(imported)) or '-'}")
    own = settings()
    for name, fields in own.items():
        print(f"{name}: {len(fields)} settings")
    print(f"{sum(map(len, own.values()))} settings in all")
