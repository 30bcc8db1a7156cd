"""The tasks: registry, preparation, grading of whatever is handed in, the proofs of `check`, the command line.

Tests on real data need the publisher's files in ../shared/data beside the checkout and are skipped where they are not.
"""
import ast
import filecmp
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import tasks
from common import md5, quiet, sides
from tasks import InvalidSubmission
from tasks.__main__ import main
from tasks.check import check, check_ideas

ROOT = Path(__file__).parent.parent
REAL = ROOT.parent / "shared" / "data"
IDS = ["home-data-for-ml-course", "spaceship-titanic", "leaf-classification"]
MD5 = {     # recorded by MLE-bench: public train, public test, sample submission, private answers
    "leaf-classification": ("02920a969976f89192a3d1c03a30cd2c", "52a1b1a2b6fb392986b9579dd52036c7",
                            "e9fbff4eafce74b4905feffdaa9e5859", "028b4798af4eeafc69ab98b22dc2c70a"),
    "spaceship-titanic": ("564a1614ecef9d9611cec4efdce4c412", "8186bd4048aece25f1ed45708f8f34e1",
                          "5414b5da6ebcff454de1c9ed39b73774", "1cb99c65efecaba968128577722a83ef"),
}
FILES = "public/train.csv", "public/test.csv", "public/sample_submission.csv", "private/test.csv"


def real(id):
    if not (REAL / id).is_dir():
        pytest.skip(f"the publisher's files of {id} are not in {REAL / id}")
    return REAL / id


# ------------------------------------------------------------------------------------------------ a task from elsewhere

TOY_TASK = '''
import csv
import numpy as np
import pandas as pd
from tasks import Task, mae, matched, numbers, raw_csv, write_csv

def prepare(raw, public, private, variant):
    rows = raw_csv(raw, "all.csv")
    train, test = (rows[20:], rows[:20]) if variant == "first" else (rows[:-20], rows[-20:])
    write_csv(train, public / "train.csv")
    write_csv(test[["id", "x"]], public / "test.csv")
    write_csv(test[["id"]].assign(y=50.0), public / "sample_submission.csv")
    write_csv(test[["id", "y"]], private / "test.csv")

def score(answers, submission):
    return mae(numbers(answers, ["y"]), numbers(matched(submission, answers, "id", ["y"]), ["y"]))

def miniature(raw, seed):
    rng = np.random.default_rng(seed)
    x = rng.random(80).round(6)
    write_csv(pd.DataFrame({"id": rng.permutation(80), "x": x, "y": 3 * x + 1}), raw / "all.csv")

TASK = Task(
    id="toy", metric="MAE", direction="down", split="held-in", source="us",
    download="all.csv of the toy competition", size="1 kB", prepare=prepare, miniature=miniature, score=score,
    m_init=None, m_best=0.0, m_best_source="algebra", m_best_miniature=0.0,
    variants=("first", "last"))
'''
TOY_STARTER = '''
import csv
rows = list(csv.DictReader(open("data/train.csv")))
mean = sum(float(row["y"]) for row in rows) / len(rows)
print(f"validation MAE: {mean:.3f}")
with open("submission.csv", "w") as out:
    print("id,y", file=out)
    for row in csv.DictReader(open("data/test.csv")):
        print(f"{row['id']},{mean}", file=out)
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A task in a folder of its own; returns that folder, whose files a test may change."""
    folder = tmp_path / "more" / "toy"
    folder.mkdir(parents=True)
    (folder / "task.py").write_text(TOY_TASK)
    (folder / "train.py").write_text(TOY_STARTER)
    (folder / "problem.md").write_text("# Toy\n\nDraw the line.\n")
    monkeypatch.setattr(tasks, "FOLDERS", [*tasks.FOLDERS, folder.parent])
    return folder


@pytest.fixture
def toy_raw(toy, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    tasks.load("toy").miniature(raw, 7)
    return raw


def test_a_folder_is_all_a_new_task_needs(toy, tmp_path):
    environment = {**os.environ, "ML_AGENT_TASKS": str(toy.parent), "PYTHONPATH": str(ROOT)}

    def command(*words):
        words = [sys.executable, "-m", "tasks", *words]
        run = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return run.stdout
    assert "toy" in command("list", "held-in") and "toy" not in command("list", "held-out")
    assert "All 2 are sound." in command("check", "toy", "toy")
    assert tasks.load("toy").problem.startswith("# Toy")


def test_a_folder_must_be_named_for_its_task(toy):
    toy = toy.rename(toy.parent / "other")
    with pytest.raises(ValueError, match="other/task.py must define TASK, .* whose id is the folder's name"):
        tasks.load("other")
    (toy / "task.py").write_text("")
    with pytest.raises(ValueError, match="must define TASK"):
        tasks.load("other")


# ------------------------------------------------------------------------------------------------------------- registry

def test_groups_of_tasks():
    assert tasks.names() == tasks.names("held-in") + tasks.names("held-out") and set(IDS) <= set(tasks.names("all"))
    assert {"home-data-for-ml-course", "leaf-classification"} <= set(tasks.names("paper"))
    assert "spaceship-titanic" not in tasks.names("paper")          # Table 1 does not have it
    assert tasks.names("spaceship-titanic") == ["spaceship-titanic"] and "spaceship-titanic" in tasks.names("held-in")


def test_an_unknown_task_is_answered_with_near_matches():
    with pytest.raises(ValueError, match="no task 'leaf-clasification'. Did you mean leaf-classification"):
        tasks.load("leaf-clasification")
    with pytest.raises(ValueError, match="Did you mean spaceship-titanic"):
        tasks.names("titanic")


@pytest.mark.parametrize("id", ["../leaf-classification", "leaf-classification/", "/etc", "", ".", None, 3, ["x"], {},
                                "x" * 10 ** 6])
def test_an_id_out_of_a_file_names_a_task_or_nothing(id, tmp_path):
    for use in (tasks.load, tasks.ideas, lambda id: tasks.info(id, tmp_path), lambda id: tasks.grade(id, "s", tmp_path),
                lambda id: tasks.prepare(id, data=tmp_path / "data")):
        with pytest.raises(ValueError, match="There is no task") as caught:
            use(id)
        assert len(str(caught.value)) < 1500
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [
    lambda facts: "[" * 10 ** 5, lambda facts: "3", lambda facts: "{",
    lambda facts: json.dumps({**facts, "m_init": "0"}),
    lambda facts: json.dumps({**facts, "sha256": []}), lambda facts: json.dumps({**facts, "id": "other"}),
    lambda facts: json.dumps({name: facts[name] for name in facts if name != "m_best"})])
def test_a_task_json_that_prepare_did_not_write_is_one_clear_error(toy, tmp_path, change):
    home = tasks.prepare("toy", data=tmp_path, log=quiet)
    (home / "task.json").write_text(change(tasks.info("toy", tmp_path)))
    for use in (tasks.info, tasks.prepare):
        words = "toy/task.json is not what prepare has written. Delete .*/toy and prepare"
        with pytest.raises(ValueError, match=words):
            use("toy", data=tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir])
def test_a_task_json_that_is_no_file_is_not_read(make, toy, tmp_path):
    (tmp_path / "toy").mkdir()
    make(tmp_path / "toy" / "task.json")
    with pytest.raises(ValueError, match="toy is not prepared"):
        tasks.info("toy", tmp_path)


MEASURED = {        # the best of the shipped ideas on the real data
    "leaf-classification": 0.04129, "spaceship-titanic": 0.80333, "spooky-author-identification": 0.38428,
    "home-data-for-ml-course": 16102.8, "feedback-prize-english-language-learning": 0.5417,
    "detecting-insults-in-social-commentary": 0.8625}


@pytest.mark.parametrize("id", tasks.names())
def test_m_best_is_the_best_that_is_known(id):
    task = tasks.load(id)
    known = [score for pair in task.published.values() for score in pair]
    known += [MEASURED[id]] if id in MEASURED else []
    known += [] if task.gold is None else [task.gold]
    assert not any(task.better(score, task.m_best) for score in known)
    assert task.m_best_source and not task.better(task.m_best, task.perfect)
    assert task.m_init is None or task.better(task.m_best, task.m_init)


def weakest(task):
    """The weakest average of Table 1, of a task whose scores should go down."""
    return max(average for average, _ in task.published.values())


def test_table_1_and_the_gold_medal():
    leaf = tasks.load("leaf-classification")
    assert leaf.published["ML-Agent"] == (0.0689, 0.0373) and leaf.gold == 0.0
    assert weakest(leaf) == 0.0786 and weakest(tasks.load("home-data-for-ml-course")) == 21626
    assert tasks.load("spaceship-titanic").published == {}


def test_a_seed_has_a_folder_of_its_own_and_held_out_files_are_known_there_too(toy, tmp_path):
    assert tasks.seeded(tmp_path, 0) == tmp_path and tasks.seeded(str(tmp_path), 2) == tmp_path / "seed-2"
    answers = []
    for seed in (0, 1):
        home = tasks.prepare("toy", data=tasks.seeded(tmp_path, seed), seed=seed, log=quiet)
        answers.append((home / "private" / "test.csv").read_bytes())
    assert answers[0] != answers[1] and tasks.held_out_hashes(tmp_path) == {}
    (toy / "task.py").write_text(TOY_TASK.replace("held-in", "held-out"))
    tasks._load.cache_clear()
    hashes = tasks.held_out_hashes(tmp_path)
    assert {hashlib.sha256(text).hexdigest() for text in answers} < set(hashes)


def test_held_out_tasks_are_refused_by_name_and_by_the_hash_of_their_files(data):
    hashes = tasks.held_out_hashes(data)
    leaf, ship = (tasks.info(id, data)["sha256"] for id in ("leaf-classification", "spaceship-titanic"))
    assert hashes[leaf["private/test.csv"]] == hashes[leaf["public/train.csv"]] == "leaf-classification"
    assert leaf["public/sample_submission.csv"] not in hashes and not set(ship.values()) & set(hashes)
    tasks.refuse_held_out("spaceship-titanic", ship, hashes)
    tasks.refuse_held_out_names(["spaceship-titanic", "cifar-10"])
    with pytest.raises(ValueError, match="leaf-classification is held out"):
        tasks.refuse_held_out("leaf-classification", {}, {})
    with pytest.raises(ValueError, match="a.csv of spaceship-titanic is a file of leaf-classification, which is held"):
        tasks.refuse_held_out("spaceship-titanic", {**ship, "a.csv": leaf["private/test.csv"]}, hashes)
    with pytest.raises(ValueError, match="^leaf-classification: held out, .* held-in tasks are: aerial-cactus"):
        tasks.refuse_held_out_names(["spaceship-titanic", "leaf-classification"])
    with pytest.raises(ValueError, match="There is no task"):
        tasks.refuse_held_out_names(["leaf"])


# ---------------------------------------------------------------------------------------------------------------- ideas

def idea(number, find, replace):
    return {"title": f"Idea {number}", "kind": tasks.IDEA_KINDS[number % 5], "instruction": "Change the line.",
            "edits": [{"find": find, "replace": replace}]}


BETTER = [idea(number, "{mean}\"", f"{{1 + (3 + 0.1 * {number}) * float(row['x'])}}\"") for number in range(6)]
WORSE = [idea(number, "{mean}\"", "{-mean}\"") for number in (7, 8, 9)]
IDEAS = [*BETTER, *WORSE]


def with_ideas(toy, ideas):
    (toy / "ideas.json").write_text(json.dumps(ideas))


def test_ideas_are_read_and_applied(toy):
    assert tasks.ideas("toy") == []
    with_ideas(toy, IDEAS)
    assert tasks.ideas("toy") == IDEAS
    assert tasks.apply(TOY_STARTER, WORSE[0]) == TOY_STARTER.replace("{mean}", "{-mean}")
    twice = {**IDEAS[0], "edits": [{"find": "a", "replace": "bc"}, {"find": "c", "replace": "d"}]}
    assert tasks.apply("a", twice) == "bd"                          # each edit sees what the one before it left
    with pytest.raises(ValueError, match="Edit 2 of the idea 'Idea 0' must find its text once .* there 2 times: 'c'"):
        tasks.apply("ac", twice)
    with pytest.raises(ValueError, match="Edit 1 .* there 0 times"):
        tasks.apply("x", twice)


@pytest.mark.parametrize("change", [
    {"kind": "magic"}, {"title": "Idea 0"}, {"instruction": 3}, {"edits": []}, {"edits": [{"find": "", "replace": ""}]},
    {"edits": [{"find": "x"}]}, {"edits": "x"}])
def test_an_idea_that_is_not_one_is_named_with_its_file(toy, change):
    with_ideas(toy, [IDEAS[0], {**IDEAS[1], **change}])
    with pytest.raises(ValueError, match="ideas.json(, entry 1, |: each idea must have edits, and a title of its own)"):
        tasks.ideas("toy")


def test_a_file_that_is_no_list_of_ideas(toy):
    for text, reason in (("3", "expected a list"), ("[", "ideas.json is not JSON"),
                         ("[3]", "entry 0: expected an object")):
        (toy / "ideas.json").write_text(text)
        with pytest.raises(ValueError, match=reason):
            tasks.ideas("toy")


def test_check_names_an_idea_that_does_not_fit_the_starter(toy, tmp_path):
    with_ideas(toy, [*IDEAS, idea(12, "no such text", "")])
    tasks.prepare("toy", data=tmp_path, log=quiet)
    faults = check("toy", tmp_path, sys.executable)[1]
    assert len(faults) == 1 and re.search("Edit 1 of the idea 'Idea 12' .* there 0 times", faults[0])


def test_running_the_ideas(toy, tmp_path, capsys):
    with_ideas(toy, IDEAS)
    assert main(["check", "--ideas", "toy", "--data", str(tmp_path)]) == 0
    assert "All 1 are sound" in capsys.readouterr().out
    tasks.prepare("toy", data=tmp_path, log=quiet)
    row, failures = check_ideas("toy", tmp_path, sys.executable)
    assert (row["better"], row["ideas"], row["worse"]) == (6, 9, 3) and failures == []
    faulty = [idea(10, "import csv", "import cvs"), idea(11, "{mean}", "{'x'}"), idea(12, "no such text", "")]
    with_ideas(toy, [*IDEAS[:4], *IDEAS[6:], *faulty])
    failures = " ".join(check_ideas("toy", tmp_path, sys.executable)[1])
    assert re.search("(?s)'Idea 10' fails.*No module named 'cvs'", failures)
    assert re.search("'Idea 11' fails.* writes a submission that is not valid", failures)
    assert re.search("'Idea 12' fails. Edit 1 .* there 0 times", failures)
    with_ideas(toy, [*IDEAS[:4], *(idea(number, "{mean}", "{mean + 0}") for number in range(4, 10))])
    failures = " ".join(check_ideas("toy", tmp_path, sys.executable)[1])
    assert "Only 4 of 10 ideas improve" in failures and "No idea makes the score worse" in failures
    assert failures.count("does not change the graded score") == 6


def test_an_idea_about_chance_alone_is_none(toy, tmp_path):
    (toy / "train.py").write_text(TOY_STARTER.replace("mean = sum(", "SEED = 0\nSHIFT = 0\nmean = SEED + SHIFT + sum("))
    with_ideas(toy, [idea(1, "SEED = 0", "SEED = 1"), idea(2, "SHIFT = 0", "SHIFT = 1")])
    tasks.prepare("toy", data=tmp_path, log=quiet)
    failures = check_ideas("toy", tmp_path, sys.executable)[1]
    assert "The idea 'Idea 1' is about the validation rows or a random seed alone." in failures
    assert not any("Idea 2" in failure for failure in failures)


WITH_IDEAS = [id for id in tasks.names() if tasks.ideas(id)]     # a task of one's own need not ship any


@pytest.mark.parametrize("id", WITH_IDEAS)
def test_shipped_ideas_are_diverse_fit_the_starter_and_import_what_the_requirements_name(id):
    starter = (tasks.load(id).folder / "train.py").read_text()
    ideas = tasks.ideas(id)
    assert len(ideas) >= 10 and len({one["kind"] for one in ideas}) >= 5 and len(WITH_IDEAS) >= 19
    assert all(len(one["instruction"]) >= 20 for one in ideas)
    scripts = {starter, *(tasks.apply(starter, one) for one in ideas)}
    assert len(scripts) == len(ideas) + 1
    lines = (ROOT / "tasks" / "requirements.txt").read_text().splitlines()
    packages = {line.split(">")[0] for line in lines if line[0] != "#"}
    modules = {"scikit-learn": "sklearn", "pillow": "PIL"}              # where a package is imported by another name
    allowed = {modules.get(package, package) for package in packages} | sys.stdlib_module_names
    for script in scripts:
        nodes = list(ast.walk(ast.parse(script)))
        found = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
        found |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert {name.split(".")[0] for name in found} <= allowed


@pytest.mark.parametrize("id", ["us-patent-phrase-to-phrase-matching", "denoising-dirty-documents"])
def test_shipped_ideas_run_and_most_but_not_all_beat_the_starter(data, tmp_path, monkeypatch, id):
    """Those that take no time."""
    if id == "denoising-dirty-documents":
        pytest.importorskip("PIL", reason="Pillow is not installed")
    monkeypatch.chdir(tmp_path)
    Path("data").symlink_to(data / id / "public")
    starter = (tasks.load(id).folder / "train.py").read_text()
    task = tasks.load(id)
    scores = []
    quick = [one for one in tasks.ideas(id) if id != "denoising-dirty-documents" or "sklearn" not in json.dumps(one)]
    for script in [starter, *(tasks.apply(starter, one) for one in quick)]:
        exec(compile(script, "train.py", "exec"), {"__name__": "__main__"})
        scores.append(tasks.grade(id, "submission.csv", data))
    num_better = sum(task.better(score, scores[0]) for score in scores[1:])
    assert len(quick) / 2 <= num_better < len(quick)


# -------------------------------------------------------------------------------------------------------------- prepare

def test_prepare_is_a_no_op_until_forced(toy, tmp_path):
    home = tasks.prepare("toy", data=tmp_path / "data", log=quiet)
    before = (home / "task.json").stat().st_mtime_ns
    said = []
    assert tasks.prepare("toy", data=tmp_path / "data", log=said.append) == home and said == []
    assert (home / "task.json").stat().st_mtime_ns == before
    tasks.prepare("toy", data=tmp_path / "data", force=True, log=quiet)
    assert (home / "task.json").stat().st_mtime_ns != before
    num_rows = {name: len(pd.read_csv(home / name)) for name in tasks.info("toy", tmp_path / "data")["sha256"]}
    assert num_rows == {
        "public/sample_submission.csv": 20, "public/test.csv": 20, "public/train.csv": 60, "private/test.csv": 20}


def test_another_seed_or_a_changed_starter_makes_the_miniature_anew(toy, tmp_path):
    def facts(**options):
        tasks.prepare("toy", data=tmp_path / "data", log=quiet, **options)
        return tasks.info("toy", tmp_path / "data")
    first = facts()
    second = facts(seed=1)
    assert first["sha256"] != second["sha256"] and facts()["sha256"] == first["sha256"]
    (toy / "train.py").write_text(TOY_STARTER.replace("/ len(rows)", "/ len(rows) + 9"))
    assert facts()["m_init"] > first["m_init"] + 5


def test_real_data_replace_a_miniature_and_are_kept(toy, toy_raw, tmp_path):
    data = tmp_path / "data"
    said = []
    tasks.prepare("toy", data=data, log=quiet)
    tasks.prepare("toy", raw=toy_raw, data=data, variant="last", log=quiet)
    assert not tasks.info("toy", data)["miniature"]
    tasks.prepare("toy", data=data, log=said.append)
    assert not tasks.info("toy", data)["miniature"] and "keeping the real data" in said[0]
    tasks.prepare("toy", data=data, force=True, log=quiet)
    assert not tasks.info("toy", data)["miniature"]
    tasks.prepare("toy", raw=toy_raw, data=data, log=quiet)
    assert tasks.info("toy", data)["variant"] == "last"             # no variant asked for: what is there may stay
    tasks.prepare("toy", raw=toy_raw, data=data, force=True, log=quiet)
    assert tasks.info("toy", data)["variant"] == "last"
    tasks.prepare("toy", raw=toy_raw, data=data, variant="first", log=quiet)
    assert tasks.info("toy", data)["variant"] == "first"
    with pytest.raises(ValueError, match="no variant 'middle'; it has first, last"):
        tasks.prepare("toy", raw=toy_raw, data=data, variant="middle")
    assert tasks.prepare("toy", data=data, variant="first", log=quiet) == data / "toy"
    with pytest.raises(ValueError, match="holds real data of the variant first; to prepare last give"):
        tasks.prepare("toy", data=data, variant="last", log=quiet)


def test_when_a_public_file_was_written_tells_nothing(data):
    """The publisher's archive of these pictures holds all cats, then all dogs."""
    public = data / "dogs-vs-cats-redux-kernels-edition" / "public"
    files = [path for path in sorted(public.rglob("*")) if path.is_file()]
    assert len(files) > 700 and {path.stat().st_mtime_ns for path in files} == {10**18}
    changes = [path.stat().st_ctime_ns for path in files]
    assert changes == sorted(changes)


def test_real_data_of_an_older_starter_are_said_to_be(toy, toy_raw, tmp_path):
    tasks.prepare("toy", raw=toy_raw, data=tmp_path, log=quiet)
    (toy / "train.py").write_text(TOY_STARTER.replace("/ len(rows)", "/ len(rows) + 9"))
    said = []
    tasks.prepare("toy", data=tmp_path, log=said.append)
    assert "which another version of the code has prepared" in said[0]


@pytest.mark.parametrize("keep", [-1, 0])
def test_damaged_answers_are_no_fault_of_a_submission(toy, tmp_path, keep):
    """Of lines of the file: the last is lost, or all."""
    home = tasks.prepare("toy", data=tmp_path, log=quiet)
    answers = home / "private" / tasks.load("toy").answers
    rewrite = answers.read_text().splitlines(keepends=True)[:keep]
    answers.chmod(0o644)
    answers.write_text("".join(rewrite))
    with pytest.raises(ValueError, match=f"{answers.name} is not what was prepared. Delete .*toy and prepare"):
        tasks.prepare("toy", data=tmp_path, log=quiet)
    if not rewrite:
        with pytest.raises(RuntimeError, match=f"{answers.name} is damaged"):
            tasks.read_answers(tasks.load("toy"), home)
    assert tasks.prepare("toy", data=tmp_path, force=True, log=quiet) == tasks.prepare("toy", data=tmp_path, log=quiet)


def test_a_prepared_folder_may_be_a_link(toy, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    home = tasks.prepare("toy", data=tmp_path / "data", log=quiet)
    home.rename(elsewhere)
    home.symlink_to(elsewhere)
    assert tasks.prepare("toy", data=tmp_path / "data", log=quiet) == home
    tasks.prepare("toy", data=tmp_path / "data", force=True, log=quiet)
    assert not home.is_symlink() and (home / "task.json").is_file() and (elsewhere / "public").is_dir()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_preparation_leaves_what_was_there_or_nothing(toy, toy_raw, tmp_path, monkeypatch, error):
    data = tmp_path / "data"
    def fail(*args):
        raise error
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "run_starter", fail)
        with pytest.raises(error):
            tasks.prepare("toy", data=data, log=quiet)
    assert not (data / "toy").exists() and not (data / ".toy.part").exists()
    home = tasks.prepare("toy", data=data, log=quiet)
    before = (home / "task.json").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "run_starter", fail)
        with pytest.raises(error):
            tasks.prepare("toy", raw=toy_raw, data=data, log=quiet)
    assert (home / "task.json").read_text() == before and (home / "public" / "train.csv").exists()


def test_what_a_killed_process_left_is_cleared(toy, tmp_path):
    data = tmp_path / "data"
    home = tasks.prepare("toy", data=data, log=quiet)
    facts = (home / "task.json").read_text()
    (home / "task.json").unlink()                                   # killed while the old folder was deleted
    (home / "public" / "train.csv").unlink()
    (data / ".toy.part" / "public").mkdir(parents=True)
    tasks.prepare("toy", data=data, log=quiet)
    assert json.loads((home / "task.json").read_text())["sha256"] == json.loads(facts)["sha256"]
    assert (home / "public" / "train.csv").exists() and not (data / ".toy.part").exists()


def test_two_processes_prepare_a_task_once(toy, tmp_path):
    code = f"import tasks; tasks.prepare('toy', data={str(tmp_path / 'data')!r})"
    environment = {**os.environ, "ML_AGENT_TASKS": str(toy.parent)}
    runs = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE)
            for _ in range(2)]
    said = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0] and sum("ready" in text for text in said) == 1


def test_a_missing_raw_file_is_named_with_where_to_get_it(toy, toy_raw, tmp_path):
    (toy_raw / "all.csv").unlink()
    with pytest.raises(ValueError, match="all.csv is not in .* Get all.csv of the toy competition"):
        tasks.prepare("toy", raw=toy_raw, data=tmp_path / "data", log=quiet)
    with pytest.raises(ValueError, match="nowhere cannot be read.*No such file.* Get all.csv of the toy"):
        tasks.prepare("toy", raw=tmp_path / "nowhere", data=tmp_path / "data")
    (toy_raw / "all.zip").write_bytes(b"not a zip")
    with pytest.raises(ValueError, match="all.zip cannot be read, it may be damaged"):
        tasks.prepare("toy", raw=toy_raw, data=tmp_path / "data", log=quiet)
    assert not (tmp_path / "data" / "toy").exists()


@pytest.mark.parametrize("starter, reason", [
    ("import no_such.thing", "(?s)No module named 'no_such'.* pip install -r tasks/requirements.txt"),
    ("raise SystemExit('no luck')", "train.py of toy: error. .*\n.*no luck"),
    ("pass", "not valid. The submission cannot be opened"),
    ("open('submission.csv', 'w').write('id\\n')", "not valid. The column 'y' is missing")])
def test_a_starter_that_fails_is_reported(toy, tmp_path, starter, reason):
    (toy / "train.py").write_text(starter)
    with pytest.raises(RuntimeError, match=reason):
        tasks.prepare("toy", data=tmp_path / "data", log=quiet)


def test_raw_files_are_found_loose_in_zips_and_in_zips_inside_zips(tmp_path):
    (tmp_path / "whole").mkdir()
    with zipfile.ZipFile(tmp_path / "inner.zip", "w") as archive:
        archive.writestr("__MACOSX/._deep.csv", "junk")
        archive.writestr("images/1.jpg", b"one")
        archive.writestr("other/1.jpg", b"not this one")
        archive.writestr("images/2.jpg", b"two")
        archive.writestr("deep.csv", "a\n0.1\n")
    with zipfile.ZipFile(tmp_path / "whole" / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "inner.zip", "nested/inner.zip")
    (tmp_path / "inner.zip").unlink()
    (tmp_path / "whole" / "loose.csv").write_text("b\n1\n")
    assert tasks.raw_csv(tmp_path / "whole", "deep.csv")["a"].tolist() == [0.1]
    assert tasks.raw_csv(tmp_path / "whole", "loose.csv")["b"].tolist() == [1]
    tasks.copy_raw_folder(tmp_path / "whole", "images", tmp_path / "out", {"1.jpg": "a.jpg", "2.jpg": "b.jpg"})
    assert (tmp_path / "out" / "a.jpg").read_bytes() == b"one" and (tmp_path / "out" / "b.jpg").read_bytes() == b"two"
    with pytest.raises(tasks.MissingRaw, match=r"2 of 3 files \(such as 3.jpg\) are not in a folder images of"):
        tasks.copy_raw_folder(tmp_path / "whole", "images", tmp_path / "out", ["1.jpg", "3.jpg", "4.jpg"])


def wrong_folders(id, raw, folder):
    """Yields folders that a user may give in place of raw, the right one of the task, made in `folder`."""
    ids = tasks.names()
    yield raw.parent / ids[ids.index(id) - 1]               # another task's files
    (folder / "empty").mkdir()
    yield folder / "empty"
    for name, spoil in (("emptied", lambda data: b""), ("another", lambda data: b"\x80\0 not what it was" * 9),
                        ("cut", lambda data: data[:len(data) // 2])):
        kept = {".jpg", ".png", ".xyz"}
        if name == "cut":
            kept |= {".csv", ".txt", ".tsv", ".data"}       # half a table is a table
        shutil.copytree(raw, folder / name, copy_function=os.link)      # so what is spoilt is written anew
        spoilt = [path for path in folder.joinpath(name).rglob("*") if path.is_file() and path.suffix not in kept]
        for path in spoilt:
            content = path.read_bytes()
            path.unlink()
            path.write_bytes(spoil(content))
        if {path.name for path in spoilt} - {f"{side}.csv.gz" for side in ("train", "test", "sample_submission")}:
            yield folder / name                             # those are copies that no task reads


@pytest.mark.parametrize("id", tasks.names())
def test_a_wrong_raw_folder_is_one_clear_error(id, data, tmp_path, capsys):
    for folder in wrong_folders(id, data / "raw" / id, tmp_path):
        assert main(["prepare", id, "--raw", str(folder), "--data", str(tmp_path / "data")]) == 2, folder
        said = capsys.readouterr().err
        assert f" Get {tasks.load(id).download} ({tasks.load(id).size}) and put it there as it comes." in said
        assert "Traceback" not in said and said.count("\n") == 1 and len(said) < 800, said
        assert not (tmp_path / "data" / id).exists()


def test_a_raw_folder_that_is_none_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("id\n1\n")
    for raw in (tmp_path / "file", tmp_path / "absent"):
        assert main(["prepare", "leaf-classification", "--raw", str(raw), "--data", str(tmp_path / "data")]) == 2
        said = f"There is no folder {raw}; --raw is the folder of the publisher's files.\n"
        assert capsys.readouterr().err == said


@pytest.mark.parametrize("id", tasks.names())
def test_the_folder_of_all_downloads_is_as_good_as_the_tasks_own(id, data, tmp_path):
    """Many tasks' files have the same names; each finds its own."""
    public, private = sides(id, data / "raw", tmp_path)
    for made, kept in ((public, data / id / "public"), (private, data / id / "private")):
        names = sorted(path.relative_to(made) for path in made.rglob("*") if path.is_file())
        assert names == sorted(path.relative_to(kept) for path in kept.rglob("*") if path.is_file())
        assert filecmp.cmpfiles(made, kept, names, shallow=False)[0] == names


# ------------------------------------------------------------------------------------------------------ the miniatures

SLOW = {"dogs-vs-cats-redux-kernels-edition", "plant-pathology-2020-fgvc7", "statoil-iceberg-classifier-challenge",
        "whale-categorization-playground"}      # to draw: seconds each


@pytest.mark.parametrize("id", sorted({*tasks.names()} - SLOW))
def test_a_miniature_is_the_same_for_the_same_seed_and_another_for_another(id, data, tmp_path):
    def contents(home):
        found = {}
        for path in [*(home / "public").rglob("*"), *(home / "private").rglob("*")]:
            if path.is_file():
                raw = path.read_bytes()
                found[path.relative_to(home)] = gzip.decompress(raw) if path.suffix == ".gz" else raw     # has a date
        return found
    task = tasks.load(id)
    for seed in (0, 1):
        home = tmp_path / str(seed)
        (home / "raw").mkdir(parents=True)
        task.miniature(home / "raw", seed)
        sides(id, home / "raw", home)
        assert (contents(home) == contents(data / id)) == (seed == 0)


@pytest.mark.parametrize("id", [
    "aerial-cactus-identification", "dogs-vs-cats-redux-kernels-edition", "leaf-classification",
    "plant-pathology-2020-fgvc7", "whale-categorization-playground"])
def test_pictures_of_a_miniature_are_all_of_one_size_and_none_comes_twice(data, id):
    paths = list((data / id / "public").rglob("*.jpg"))
    assert len(paths) > 400 and len({path.stat().st_size for path in paths}) == 1
    assert len({tasks.hash_files(path) for path in paths}) == len(paths)


@pytest.mark.parametrize("id", IDS)
def test_miniatures_have_the_publishers_files_and_columns(id, tmp_path):
    raw = real(id)
    tasks.load(id).miniature(tmp_path, 3)
    ours = {path.name for path in tmp_path.iterdir() if path.suffix != ".gz"}
    assert ours == {path.name for path in raw.iterdir()}
    for name in ("train.csv", "test.csv", "sample_submission.csv"):
        mini = tasks.raw_csv(tmp_path, name)
        full = tasks.raw_csv(raw, name)
        assert list(mini) == list(full) and len(mini) <= 3000
        if name == "train.csv":
            texts = [column for column in mini if pd.api.types.is_string_dtype(full[column])]
            assert texts == [column for column in mini if pd.api.types.is_string_dtype(mini[column])]


def test_home_data_hides_the_copies_that_hold_the_answers(data, tmp_path):
    tasks.load("home-data-for-ml-course").miniature(tmp_path, 0)
    public = data / "home-data-for-ml-course" / "public"
    shown = {path.name for path in public.iterdir()}
    assert (tmp_path / "train.csv.gz").exists()
    assert shown == {"train.csv", "test.csv", "sample_submission.csv", "data_description.txt"}
    with gzip.open(tmp_path / "train.csv.gz", "rt") as stream:
        assert (public / "train.csv").read_text() == "".join(stream.readlines()[:451])      # to the byte, "NA" and all
    assert len(pd.read_csv(public / "sample_submission.csv")) == len(pd.read_csv(public / "test.csv")) == 300


def test_public_files_cannot_be_written_by_mistake(data):
    assert all(path.stat().st_mode & 0o222 == 0 for path in data.glob("*/public/**/*") if path.is_file())


def good_models(data):
    """Predictions by better models than the starters': id -> submission."""
    from sklearn.linear_model import LassoCV, LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def read(id):
        public = data / id / "public"
        return pd.read_csv(public / "train.csv"), pd.read_csv(public / "test.csv")

    train, test = read("leaf-classification")
    def leaf(rows):
        margin, shape, texture = (rows.filter(regex=f"^{group}").to_numpy() for group in ("margin", "shape", "texture"))
        outline = np.abs(np.fft.rfft(shape / shape.mean(1, keepdims=True)))[:, 1:10]
        return np.hstack([np.sqrt(margin), outline, np.sqrt(texture)])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=100, max_iter=1000)).fit(leaf(train), train["species"])
    leaves = pd.DataFrame(model.predict_proba(leaf(test)), columns=model.classes_).assign(id=test["id"])

    train, test = read("home-data-for-ml-course")
    rows = pd.concat([train.drop(columns="SalePrice"), test]).drop(columns="Id")
    for name in ("LotArea", "GrLivArea", "1stFlrSF"):
        rows[name] = np.log(rows[name])
    rows = pd.get_dummies(rows, dtype=float).fillna(0).to_numpy()
    model = make_pipeline(StandardScaler(), LassoCV(cv=5)).fit(rows[:len(train)], np.log(train["SalePrice"]))
    homes = pd.DataFrame({"Id": test["Id"], "SalePrice": np.exp(model.predict(rows[len(train):]))})

    train, test = read("spaceship-titanic")
    rows = pd.concat([train, test])
    kinds = rows[["HomePlanet", "CryoSleep", "Destination", "VIP"]].astype(str)
    kinds = kinds.assign(Deck=rows["Cabin"].str[0], Side=rows["Cabin"].str[-1])
    amounts = rows.select_dtypes("number").drop(columns="Age").fillna(0) ** 0.5
    rows = pd.concat([pd.get_dummies(kinds, dtype=float), rows["Age"].fillna(0), amounts], axis=1).to_numpy()
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(rows[:len(train)], train["Transported"])
    ships = pd.DataFrame({"PassengerId": test["PassengerId"], "Transported": model.predict(rows[len(train):])})
    return {"leaf-classification": leaves, "home-data-for-ml-course": homes, "spaceship-titanic": ships}


def test_better_models_beat_the_starters_and_m_best_is_one_of_them(data, tmp_path):
    for id, submission in good_models(data).items():
        submission.to_csv(tmp_path / "submission.csv", index=False)
        task = tasks.load(id)
        m_init = tasks.info(id, data)["m_init"]
        score = tasks.grade(id, tmp_path / "submission.csv", data)
        assert abs(score - task.m_best_miniature) < 0.1 * abs(task.m_best_miniature - m_init), id


@pytest.mark.parametrize("id, num_rows", [
    ("home-data-for-ml-course", (1168, 292)), ("spaceship-titanic", (6954, 1739))])
def test_splits_by_position_are_the_publishers_lines(id, num_rows, tmp_path):
    public, private = sides(id, real(id), tmp_path)
    lines = (real(id) / "train.csv").read_text().splitlines(keepends=True)
    assert (public / "train.csv").read_text() == "".join(lines[:num_rows[0] + 1])
    assert len(pd.read_csv(public / "test.csv")) == len(pd.read_csv(private / "test.csv")) == num_rows[1]


def test_real_data_and_the_starter_reproduce_what_is_recorded(tmp_path):
    task = tasks.load("spaceship-titanic")      # `check` does the same for all tasks whose real data are prepared
    tasks.prepare(task.id, raw=real(task.id), data=tmp_path, log=quiet)
    facts = tasks.info(task.id, tmp_path)
    assert not facts["miniature"] and facts["variant"] == "mlagentbench"
    assert facts["m_init"] == pytest.approx(task.m_init, abs=0.01 * abs(task.m_best - task.m_init))


def test_starters_are_pitched_near_the_weakest_average_of_table_1():
    for id in ("home-data-for-ml-course", "leaf-classification"):
        task = tasks.load(id)
        assert abs(task.m_init - weakest(task)) < 0.1 * weakest(task)


@pytest.mark.parametrize("id", MD5)
def test_the_mle_bench_splits_have_the_recorded_md5_sums(id, tmp_path):
    raw = real(id)
    if id == "leaf-classification":             # the images take most of the time and have no sum
        raw = tmp_path / "raw"
        raw.mkdir()
        shutil.copy(real(id) / "train.csv.zip", raw)
        with pytest.raises(tasks.MissingRaw, match="990 of 990 files"):
            sides(id, raw, tmp_path, "mle-bench")
    else:
        sides(id, raw, tmp_path, "mle-bench")
    assert tuple(md5((tmp_path / name).read_bytes()) for name in FILES) == MD5[id]


# -------------------------------------------------------------------------------------------------------------- grading

def gold(id, data, **changes):
    """The true answers in the sample's columns, as text cells."""
    columns = pd.read_csv(data / id / "public" / "sample_submission.csv", nrows=0).columns
    return pd.DataFrame(tasks.read_answers(tasks.load(id), data / id))[list(columns)].assign(**changes)


def test_graders_go_by_id_and_by_column_name(data, tmp_path):
    for id in IDS:
        rows = gold(id, data)
        rows.sample(frac=1, random_state=0)[list(rows)[::-1]].to_csv(tmp_path / "s.csv", index=False)
        assert tasks.grade(id, tmp_path / "s.csv", data) == pytest.approx(tasks.load(id).perfect, abs=1e-9)


def test_spellings_that_mean_the_same(data, tmp_path):
    rows = gold("spaceship-titanic", data)
    for yes, no in (("1", "0"), ("1.0", "0.0"), ("true", "FALSE")):
        rows.replace({"True": yes, "False": no}).to_csv(tmp_path / "s.csv", index=False)
        assert tasks.grade("spaceship-titanic", tmp_path / "s.csv", data) == 1.0
    rows = gold("home-data-for-ml-course", data)
    rows = rows.assign(Id=rows["Id"] + ".0", note="")
    rows.to_csv(tmp_path / "s.csv", index=False, lineterminator="\r\n", encoding="utf-8-sig")
    assert tasks.grade("home-data-for-ml-course", tmp_path / "s.csv", data) == 0.0


def test_scores_agree_with_the_metric_worked_out_apart(data, tmp_path):
    prices = gold("home-data-for-ml-course", data)["SalePrice"].astype(float)
    gold("home-data-for-ml-course", data, SalePrice=100_000).to_csv(tmp_path / "s.csv", index=False)
    score = tasks.grade("home-data-for-ml-course", tmp_path / "s.csv", data)
    assert score == pytest.approx(abs(prices - 100_000).mean())
    sample = data / "leaf-classification" / "public" / "sample_submission.csv"
    assert tasks.grade("leaf-classification", sample, data) == pytest.approx(np.log(99))


def targets_of(task, sample):
    return list(task.targets) or [name for name in sample if name != task.key]


@pytest.mark.parametrize("id", tasks.names())
def test_every_task_refuses_what_is_incomplete_or_no_number(id, data, tmp_path):
    task = tasks.load(id)
    sample = tasks.read_table(data / id / "public" / task.sample)
    targets = targets_of(task, sample)
    n = len(sample[targets[0]])

    def cells(name, *first):
        return {**sample, name: [*first, *sample[name][len(first):]]}
    wrong = [({"other" if name == targets[-1] else name: column for name, column in sample.items()}, "is missing"),
             ({name: column[:-1] for name, column in sample.items()}, f"{n - 1} rows; {n} were expected"),
             ({name: [*column, column[0]] for name, column in sample.items()}, f"{n + 1} rows; {n} were expected"),
             ({name: [] for name in sample}, f"0 rows; {n} were expected"),
             (cells(targets[0], ""), "not a number|must")]
    if not task.text_targets:
        wrong += [(cells(targets[0], text), "not a number|must be") for text in ("nan", "inf", "very likely")]
    if task.key:
        wrong += [({name: column for name, column in sample.items() if name != task.key}, "is missing"),
                  (cells(task.key, "no-such-id"), "'no-such-id' is not in the test set"),
                  (cells(task.key, sample[task.key][1]), "occurs too often|is missing")]
    for table, reason in wrong:
        pd.DataFrame(table).to_csv(tmp_path / "s.csv", index=False)
        with pytest.raises(InvalidSubmission, match=reason):
            tasks.grade(id, tmp_path / "s.csv", data)


def put(column, value, row=0):
    def change(rows):
        rows.loc[row, column] = value
        return rows
    return change


@pytest.mark.parametrize("id, change, reason", [
    ("leaf-classification", lambda rows: rows.assign(extra="1"), "column 'extra' is not expected"),
    ("leaf-classification", lambda rows: rows.assign(id=range(5000, 5317)), "The id '5000' is not in the test set"),
    ("leaf-classification", put("Acer_Mono", "nan", 3), "Row 4 of column 'Acer_Mono' holds nan"),
    ("leaf-classification", put("Acer_Mono", "inf"), "holds inf; it must be a finite number from 0 to 1"),
    ("leaf-classification", put("Acer_Mono", "1e999"), "holds inf"),
    ("leaf-classification", put("Acer_Mono", "\x1b[31m" + "9" * 90), r"holds '\\x1b\[31m9+...', which is not a number"),
    ("leaf-classification", put("Acer_Mono", "-0.5"), "holds -0.5; it must be a finite number from 0 to 1"),
    ("leaf-classification", put("Acer_Mono", "0.5"), "row 1 sum to 1.5; each row must sum to 1"),
    ("home-data-for-ml-course", put("SalePrice", "1e308"), None),
    ("home-data-for-ml-course", lambda rows: rows.assign(SalePrice="1.7e308"), None),
    ("tabular-playground-series-dec-2021", put("Cover_Type", "2.5"), "holds 2.5; it must be a whole number"),
    ("tabular-playground-series-dec-2021", put("Cover_Type", "1e155"), r"holds 1e\+155; it must be a whole number"),
    ("home-data-for-ml-course", put("SalePrice", "True"), "which is not a number"),     # in a column of numbers
    ("home-data-for-ml-course", put("SalePrice", "$200,000"), "which is not a number"),
    ("spaceship-titanic", put("Transported", "yes"), "holds 'yes'; it must be True or False"),
])
def test_a_spoilt_submission_is_refused_with_its_reason(data, tmp_path, id, change, reason):
    change(gold(id, data)).to_csv(tmp_path / "s.csv", index=False)
    if reason is None:
        assert tasks.grade(id, tmp_path / "s.csv", data) > 1e300
        return
    with pytest.raises(InvalidSubmission, match=reason) as caught:
        tasks.grade(id, tmp_path / "s.csv", data)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def odd_submissions(sample, targets):
    """Tables of as many rows as the sample with predictions that a grader may choke on."""
    n = len(sample[targets[0]])
    extremes = ["1e155", "1e308", "1.7976931348623157e308", "-1.7e308", "1e-200", "5e-324", "-0.0", "0", "1", "-1",
                "2.5", "True", "9007199254740993", "1e16", "0.1", "nan", "-inf", ""]
    for text in extremes:
        yield {**sample, **{name: [text] * n for name in targets}}
        yield {**sample, targets[-1]: [*sample[targets[-1]][1:], text]}
    certain = [("1", rest) for rest in ("0", "-0.0", "1e-200", "5e-324", "0e9")] + [("True", "False")]
    for one, other in [*zip(extremes, extremes[3:]), *certain]:
        yield {**sample, **{name: ([one, other] * n)[:n] for name in targets}}
        one_hot = [[one] + [other] * (len(targets) - 1)] * n
        yield {**sample, **dict(zip(targets, map(list, zip(*one_hot))))}
    yield {**sample, **{name: [f"{10.0 ** (i % 600 - 300)}" for i in range(n)] for name in targets}}
    yield {**sample, **{name: [str(2 ** 53 + i) for i in range(n)] for name in targets}}


@pytest.mark.parametrize("id", tasks.names())
def test_whether_a_submission_is_valid_does_not_depend_on_the_answers(id, data):
    task = tasks.load(id)
    rng = np.random.default_rng(0)
    true = tasks.read_answers(task, data / id)
    sample = tasks.read_table(data / id / "public" / task.sample)
    targets = targets_of(task, sample)
    sample, true = ({name: column[:100] for name, column in table.items()} for table in (sample, true))
    answers = [true]
    num_scored = 0
    for _ in range(2):
        order = rng.permutation(len(true[targets[0]]))
        answers.append({**true, **{name: [true[name][i] for i in order] for name in targets}})

    def outcome(answers, submission):
        """The reason why it is refused, or that it has a score."""
        try:
            return math.isfinite(task.score(answers, submission)) or "not finite"
        except InvalidSubmission as error:
            return str(error)
    for submission in odd_submissions(sample, targets):
        outcomes = {outcome(one, submission) for one in answers}
        assert len(outcomes) == 1, outcomes
        assert outcomes != {"not finite"} or task.metric.startswith("Pearson")     # of a constant
        num_scored += outcomes == {True}
    assert num_scored >= 5


class Payload:
    """What a grader that unpickles would be caught with."""

    def __reduce__(self):
        return os.system, ("touch payload-ran",)


def sparse(path):
    with open(path, "wb") as stream:
        stream.truncate(1 << 30)


@pytest.mark.parametrize("write, reason", [
    (lambda path: None, "no such file"),
    (lambda path: path.mkdir(), "not an ordinary file"),
    (lambda path: os.mkfifo(path), "not an ordinary file"),
    (lambda path: path.symlink_to("/dev/zero"), "symbolic link"),
    (lambda path: path.symlink_to(path.parent / "nowhere"), "symbolic link"),
    (lambda path: path.write_bytes(b""), "empty"),
    (lambda path: path.write_bytes(b"\n\n"), "empty"),
    (lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), "not CSV in UTF-8"),
    (lambda path: path.write_bytes(pickle.dumps(Payload())), "not CSV in UTF-8"),
    (lambda path: path.write_text("id,a\n1,2\n", "utf-16"), "not CSV in UTF-8"),
    (lambda path: path.write_bytes(b"id,a\n\0,1\n"), "is missing"),
    (sparse, "1073741824 bytes; at most"),
    (lambda path: path.write_text("id,a\n" + "9" * 200_000 + ",1\n"), "field larger than"),
    (lambda path: path.write_text('id,a\n"1,2\n'), "not CSV in UTF-8: unexpected end"),
    (lambda path: path.write_text("id,a\n1,2,3\n"), "Line 2 has 3 fields; the first has 2"),
    (lambda path: path.write_text("id,id\n1,2\n"), "column name occurs twice"),
    (lambda path: path.write_text("," * 9_999), "column name occurs twice"),
    (lambda path: path.write_text(",".join(map(str, range(20_000)))), "more than 10000"),
    (lambda path: path.write_text(",".join(map(str, range(20_000))) + '\n"a"'), "more than 10000"),
    (lambda path: path.write_bytes(b" \n\n\t\n"), "empty"),
    (lambda path: path.write_text("{}"), "is missing"),
])
def test_whatever_bytes_are_there_are_an_invalid_submission(data, tmp_path, monkeypatch, write, reason):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "submission.csv")
    with pytest.raises(InvalidSubmission, match=reason):
        tasks.grade("leaf-classification", tmp_path / "submission.csv", data)
    assert not Path("payload-ran").exists()


def test_blank_lines_are_skipped_as_pandas_does(data, tmp_path):
    for id in ("spaceship-titanic", "ogbn-arxiv"):
        sample = data / id / "public" / "sample_submission.csv"
        score = tasks.grade(id, sample, data)
        lines = sample.read_text().splitlines()
        for text in ("\n" + "\n".join(lines), "  \n\n" + "\n \n".join(lines), "\r\n\r\n".join(lines)):
            (tmp_path / "s.csv").write_text(text)
            if id == "ogbn-arxiv" and "\n \n" in text:      # a blank cell of its only column
                with pytest.raises(InvalidSubmission):
                    tasks.grade(id, tmp_path / "s.csv", data)
            else:
                assert tasks.grade(id, tmp_path / "s.csv", data) == score


def test_true_and_false_are_numbers_where_a_column_has_nothing_else(data, tmp_path):
    rows = gold("aerial-cactus-identification", data)
    for yes, no in (("True", "False"), ("TRUE", "false")):
        rows.replace({"has_cactus": {"1": yes, "0": no}}).to_csv(tmp_path / "s.csv", index=False)
        assert tasks.grade("aerial-cactus-identification", tmp_path / "s.csv", data) == 1.0


@pytest.mark.parametrize("id", ["spaceship-titanic", "whale-categorization-playground", "cifar-10", "ogbn-arxiv"])
def test_random_edits_of_a_good_file_give_a_score_or_a_reason(id, data, tmp_path):
    rng = np.random.default_rng(0)
    whole = (data / id / "public" / "sample_submission.csv").read_bytes()
    for _ in range(150):
        junk = bytearray(whole)
        for _ in range(rng.integers(1, 4)):
            at = rng.integers(len(junk))
            kind = rng.integers(3)
            junk[at:at + kind] = rng.choice(list(b'",\n\r\0 x0-\xff'), rng.integers(0, 3)).astype(np.uint8).tobytes()
        (tmp_path / "s.csv").write_bytes(junk)
        try:
            assert 0 <= tasks.grade(id, tmp_path / "s.csv", data) <= 1
        except InvalidSubmission as error:
            assert str(error)


def test_tables_are_read_as_they_stand(tmp_path):
    for text, table in (("a, b\r\n1,2\r\n3,x y", {"a": ["1", "3"], "b": ["2", "x y"]}),
                        ("\ufeffa\né\n", {"a": ["é"]}),
                        ("a,b\n", {"a": [], "b": []}), ('a,b\n"x, ""y""\nz",NA\n', {"a": ['x, "y"\nz'], "b": ["NA"]})):
        (tmp_path / "s.csv").write_bytes(text.encode())
        assert tasks.read_table(tmp_path / "s.csv") == tasks.read_submission(tmp_path / "s.csv", 100) == table
    with pytest.raises(InvalidSubmission, match="has 25 bytes; at most 24 are read"):
        (tmp_path / "s.csv").write_bytes(b"a" * 25)
        tasks.read_submission(tmp_path / "s.csv", 24)


def test_grading_what_is_not_prepared_says_how_to_prepare_it(tmp_path):
    with pytest.raises(ValueError, match="python -m tasks prepare leaf-classification --data"):
        tasks.grade("leaf-classification", "submission.csv", tmp_path)


def test_undefined_metrics_are_refused(toy, tmp_path):
    (toy / "task.py").write_text(TOY_TASK.replace("return mae(", "return float('nan') * mae("))
    with pytest.raises(RuntimeError, match="not a finite number"):
        tasks.prepare("toy", data=tmp_path / "data", log=quiet)


# ---------------------------------------------------------------------------------------------------------------- check

def test_a_miniature_is_sound(data):              # `python -m tasks check` goes through all of them
    row, failures = check("leaf-classification", data, sys.executable)
    assert failures == [] and row["test rows"] == 317


def rewrite(path, change):
    path.chmod(0o644)
    frame = pd.read_csv(path)
    change(frame).to_csv(path, index=False)


def leak_a_row(home):
    test = pd.read_csv(home / "public" / "test.csv")
    rewrite(home / "public" / "train.csv", lambda train: pd.concat([train, test[:1].assign(id=999, y=0.0)]))


def show_the_target(home):
    rewrite(home / "public" / "test.csv", lambda test: test.assign(y=1.0))


def renumber_by_target(home):
    answers = pd.read_csv(home / "private" / "test.csv")
    ids = dict(zip(answers["id"], answers["y"].rank().astype(int)))
    for name in FILES[1:]:
        rewrite(home / name, lambda frame: frame.assign(id=frame["id"].map(ids)))


def sort_by_target(home):
    order = pd.read_csv(home / "private" / "test.csv")["y"].argsort()
    for name in FILES[1:]:
        rewrite(home / name, lambda frame: frame.iloc[order])


def write_by_target(home):
    answers = pd.read_csv(home / "private" / "test.csv").sort_values("y")
    for time, id in enumerate(answers["id"]):
        (home / "public" / f"{id}.txt").write_text("")
        os.utime(home / "public" / f"{id}.txt", (time, time))
    rewrite(home / "public" / "train.csv", lambda train: train[1:])


def good_sample(home):
    answers = pd.read_csv(home / "private" / "test.csv")
    rewrite(home / "public" / "sample_submission.csv", lambda frame: frame.assign(y=answers["y"]))


def lose_the_training_rows(home):
    (home / "public" / "train.csv").unlink()


@pytest.mark.parametrize("harm, found", [
    (leak_a_row, "1 rows are in train and in test"), (show_the_target, "has the target's column"),
    (renumber_by_target, "The id tells of the target"),
    (sort_by_target, "The position in the test file tells of the target"),
    (write_by_target, "The files' time tells of the target"),
    (good_sample, "sample submission scores 0, no worse"), (lose_the_training_rows, "train.py of toy: error")])
def test_check_finds_what_is_wrong_with_the_data(toy, tmp_path, harm, found):
    home = tasks.prepare("toy", data=tmp_path / "data", log=quiet)
    harm(home)
    try:
        failures = check("toy", tmp_path / "data", sys.executable)[1]
        assert any("is not what was prepared" in failure for failure in failures)
    except RuntimeError as error:
        failures = [str(error)]
    assert any(found in failure for failure in failures), failures


def test_what_the_publishers_own_data_tell_can_be_declared(toy, toy_raw, tmp_path):
    def failures(raw, field="", harm=None):
        (toy / "task.py").write_text(TOY_TASK.replace("variants=", f"{field}variants="))
        tasks._load.cache_clear()
        home = tasks.prepare("toy", raw=raw, data=tmp_path / "data", force=True, log=quiet)
        if harm:
            harm(home)
        found = check("toy", tmp_path / "data", sys.executable)[1]
        expected = "what was prepared", "records"
        return " ".join(failure for failure in found if not any(words in failure for words in expected))
    ids = "known_signal='ids by size', "
    assert "The id tells" in failures(None, harm=renumber_by_target)
    assert failures(None, ids, harm=renumber_by_target) == ""
    assert "position in the test file tells" in failures(None, harm=sort_by_target)
    assert failures(None, ids, harm=sort_by_target) == ""
    rows = pd.read_csv(toy_raw / "all.csv")
    pd.concat([rows, rows[:1].assign(id=500)]).to_csv(toy_raw / "all.csv", index=False)
    assert "1 rows are in train and in test, such as row 1 of test" in failures(toy_raw)
    assert failures(toy_raw, "known_twins='so they are', ") == ""


@pytest.mark.parametrize("old, new, found", [
    ("matched(submission,", "matched({name: cells[:20] for name, cells in submission.items()},",
     "a surplus row is not refused"),
    ('numbers(matched(submission, answers, "id", ["y"]), ["y"])',
     'np.nan_to_num([[float(x or 1)] for x in matched(submission, answers, "id", ["y"])["y"]])', "NaN is not refused"),
    ('numbers(matched(submission, answers, "id", ["y"]), ["y"])',
     'np.array([[float(x or 0)] for x in matched(submission, answers, "id", ["y"])["y"]])', "a blank is not refused"),
    ('numbers(matched(submission, answers, "id", ["y"]), ["y"])',
     'np.array([[float(x)] for x in matched(submission, answers, "id", ["y"])["y"]])', "text ends in ValueError"),
    ("return mae(", "return 1 + mae(", "The answers score 1.0, not 0.0"),
    ("return mae(", "return 0 * mae(", "no worse than the starter's 0")])
def test_check_finds_what_is_wrong_with_a_grader(toy, tmp_path, old, new, found):
    (toy / "task.py").write_text(TOY_TASK.replace(old, new))
    tasks.prepare("toy", data=tmp_path / "data", log=quiet)
    failures = check("toy", tmp_path / "data", sys.executable)[1]
    assert any(found in failure for failure in failures), failures


def test_check_finds_a_starter_that_changes_its_score(toy, tmp_path):
    starter = TOY_STARTER.replace("validation MAE", "MAE").replace("/ len(rows)", "* random.random()")
    (toy / "train.py").write_text("import random\n" + starter)
    tasks.prepare("toy", data=tmp_path / "data", log=quiet)
    failures = " ".join(check("toy", tmp_path / "data", sys.executable)[1])
    assert "task.json records" in failures and "prints no line such as" in failures


# --------------------------------------------------------------------------------------------------------- command line

def test_command_line(data, tmp_path, capsys):
    assert main(["list", "--data", str(data)]) == 0
    table = capsys.readouterr().out
    assert all(text in table for text in [*IDS, "0.0689", "0.82066", "miniature", "Get train.csv"])
    assert max(map(len, table.split("\n\n")[0].splitlines())) <= 120
    assert main(["prepare", "spaceship-titanic", "--data", str(data)]) == 0
    assert "spaceship-titanic: miniature in " in capsys.readouterr().out
    sample = data / "spaceship-titanic" / "public" / "sample_submission.csv"
    assert main(["grade", "spaceship-titanic", str(sample), "--data", str(data)]) == 0
    assert "spaceship-titanic (miniature): accuracy 0.5" in capsys.readouterr().out
    assert main(["grade", "spaceship-titanic", str(tmp_path), "--data", str(data)]) == 1
    assert "not valid. The submission is not an ordinary file." in capsys.readouterr().err
    assert main(["prepare", "spaceship-titanic", "--data", str(data), "--raw", str(tmp_path / "no")]) == 2
    assert "There is no folder" in capsys.readouterr().err


def test_check_on_the_command_line_fails_when_something_is_wrong(toy, tmp_path, capsys):
    home = tasks.prepare("toy", data=tmp_path / "data", log=quiet)
    assert main(["check", "toy", "--data", str(tmp_path / "data")]) == 0
    facts = json.loads((home / "task.json").read_text())
    (home / "task.json").write_text(json.dumps({**facts, "m_init": 0.25}))
    assert main(["check", "toy", "--data", str(tmp_path / "data")]) == 1
    assert "task.json records 0.25" in capsys.readouterr().out


def test_check_goes_on_after_a_task_that_has_lost_a_file(toy, tmp_path, capsys):
    home = tasks.prepare("toy", data=tmp_path, log=quiet)
    (home / "public" / tasks.load("toy").sample).unlink()
    assert main(["check", "toy", "toy", "--data", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("toy: [Errno 2] No such file") == 2


def test_a_stale_miniature_is_made_anew_and_stale_data_are_reported(toy, tmp_path, capsys):
    tasks.prepare("toy", data=tmp_path, log=quiet)
    (toy / "train.py").write_text(TOY_STARTER.replace("mean = sum", "mean = 0.1 + sum"))
    assert any("another version of the code" in failure for failure in check("toy", tmp_path, sys.executable)[1])
    assert main(["check", "toy", "--data", str(tmp_path)]) == 0
    assert "All 1 are sound" in capsys.readouterr().out


def test_one_task_that_cannot_be_prepared_does_not_hide_the_others(toy, tmp_path, capsys):
    (toy / "train.py").write_text("import no_such_module")
    assert main(["check", "toy", "toy", "--data", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("toy: train.py of toy: error. ModuleNotFoundError: No module") == 2


@pytest.mark.parametrize("words, hint", [
    (["prepare", "spaceship"], "Did you mean spaceship-titanic"), (["check", "everything"], "There is no task"),
    (["check", "--dta", "x"], "unrecognized arguments: --dta"), (["prepare", "all", "--raw", "x"], "needs one task"),
    (["grade", "all", "x"], "needs one task"), (["grade"], "required"), ([], "required")])
def test_bad_arguments_exit_with_2(words, hint, capsys):
    try:
        status = main(words)
    except SystemExit as error:
        status = error.code
    assert status == 2 and hint in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- images

def test_a_jpeg_shows_what_was_drawn_and_has_the_length_that_was_asked_for():
    y, x = np.mgrid[:37, :50]
    gray = 128 + 90 * np.sin(x / 5) * np.cos(y / 7)
    for pixels in (gray, np.stack([gray, 255 - gray, gray / 2], -1)):
        data = tasks.jpeg(pixels.astype(np.uint8), 6000, step=2)
        read = Image.open(io.BytesIO(data))
        assert read.format == "JPEG" and read.size == (50, 37) and len(data) == 6000
        assert np.abs(np.asarray(read, float) - pixels).mean() < 2
    noise = np.random.default_rng(0).integers(0, 255, (64, 64)).astype(np.uint8)
    with pytest.raises(ValueError, match="bytes and cannot be padded to 300"):
        tasks.jpeg(noise, 300)
