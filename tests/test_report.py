"""The page that eval.py writes: what it shows, that nothing an agent wrote can break it, and that the same files give
the same bytes. Where node is, its script runs on a small stand-in for a browser; where a Chromium is, also there."""
import base64
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

import eval as evaluation
import reward
import tasks
from common import act, add_task
from test_eval import (
    MINIATURE, ROOT, SCRIPTS, STARTER, Scripted, edit, file_of, play, settings, task)  # noqa: F401  (a fixture)
from support import endpoint, files, report, tables

NODE = shutil.which("node")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_node = pytest.mark.skipif(NODE is None, reason="there is no node here to run the page's script")
browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium or google-chrome here to open the page")


class Elements(HTMLParser):
    """A page as a list of elements, each with its tag, attributes and the text directly in it."""

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.open = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        element = SimpleNamespace(tag=tag, text="", attributes=dict(attributes), inside=list(self.open))
        self.elements.append(element)
        if tag != "meta":
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag       # every element is closed, in order

    def handle_data(self, text):
        if self.open:
            self.open[-1].text += text

    def all(self, tag, inside=None, **attributes):
        return [element for element in self.elements if element.tag == tag
                and all(element.attributes.get(name.rstrip("_")) == value for name, value in attributes.items())
                and (inside is None or any(inside is outer for outer in element.inside))]

    def texts(self, tag, inside=None, **attributes):
        return [element.text for element in self.all(tag, inside, **attributes)]

    def rows(self):
        """The cells of the table."""
        return [self.texts("th", row) + self.texts("td", row) for row in self.all("tr")]

    def figures(self):
        """{(heading of the section, caption): figure}"""
        return {(next(iter(self.texts("h2", section)), ""), self.texts("figcaption", figure)[0]): figure
                for figure in self.all("figure") for section in [next(
                    element for element in figure.inside if element.tag in ("section", "div"))]}

    def points(self, figure, **attributes):
        """Of each line or box of a figure the coordinates."""
        return [[float(number) for number in re.findall(r"[-\d.]+", path.attributes["d"].removesuffix("h0"))]
                for path in self.all("path", figure, **attributes)]


def refuse(name):
    raise ValueError(f"{name} is not JSON")


def shown(path):
    """The data of a page; NaN and the like are refused, as a browser does."""
    text = path.read_text("utf-8")
    return json.loads(Elements(text).all("script", id="data")[0].text, parse_constant=refuse)


def drawn(path, *choices):
    """The page after its script has run in node. choices: "#HASH", and "SELECT=VALUE" for what is picked."""
    done = subprocess.run([NODE, Path(__file__).with_name("dom.js"), path, *choices], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Elements(done.stdout)


@pytest.fixture
def run(tmp_path, task):
    cfg = settings(tmp_path)
    play(cfg, Scripted())
    return cfg


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The page of such a run, which no test changes."""
    folder = tmp_path_factory.mktemp("page")
    add_task(folder / "tasks", "tiny-task", 10, "held-out", STARTER)
    cfg = settings(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "FOLDERS", [folder / "tasks"])
        play(cfg, Scripted())
    return Path(cfg.out, "report.html")


def change(path, how):
    """Lets how(line) change each line of a trajectory's file."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        how(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def compare(tmp_path, *folders):
    return evaluation.compare(settings(tmp_path, "new", model="", task="", compare=tuple(map(str, folders))))


# -- what it shows

@needs_node
def test_the_table_and_the_steps_are_there(path):
    page = drawn(path)
    assert page.rows() == [     # as calculated by hand in test_eval
        ["tasks", "agent", "valid actions", "taken back after worse", "gone on after better"],
        ["held-out", "scripted", "91% of 11", "0% of 2", "33% of 3"],
        ["task", "agent", "metric", "starter", "average", "best", "std. error", "gain %", "gap %", "last-valid gain",
         "failed", "(oracle)"],
        ["tiny-task *", "scripted", "MAE (down)", "7.0000", "3.8750", "0.5000", "1.8071", "+44.6", "+44.6",
         "+32.1", "2/4", "3.8750"]]
    assert page.texts("h2")[:2] == ["What the agents do", "Task by task"]
    assert page.texts("p", class_="bad") == [MINIATURE]
    boxes = page.all("details", class_="trajectory")
    assert [page.texts("b", box) for box in boxes] == [[f"tiny-task-{k}"] for k in range(4)]
    assert [page.texts("span", box)[-1].split(":")[0] for box in boxes] == ["better", "failed", "better", "failed"]
    strips = [page.all("span", box, class_="strip")[0] for box in boxes]
    assert [len(page.all("a", strip)) for strip in strips] == list(map(len, SCRIPTS))
    assert page.texts("a", strips[2]) == ["\u25a0", "\u25a1", "\u25a0"]        # from 9.5 to 6: worse
    assert not page.all("section", class_="step")       # no step is there before it is asked for


@needs_node
def test_a_link_opens_a_trajectory_at_a_step(path):
    page = drawn(path, "#tiny-task-0-1")
    sections = page.all("section", class_="step")
    assert [section.attributes["id"] for section in sections] == [f"tiny-task-0-{i}" for i in range(4)]
    boxes = page.all("details", class_="trajectory")
    assert ["open" in box.attributes for box in boxes] == [True, False, False, False]
    # VALUE 3 becomes 8: the score 7 becomes 2, the script prints 1.5; sigmoid(8 * (7 - 2) / 7) = 0.9967
    chips = [chip.text for chip in page.all("span", sections[0]) if chip.attributes.get("class", "").startswith("chip")]
    assert chips[:3] == ["Replace In Script", "scored, reward 0.997", "score 2.0000, before 7.0000, printed 1.5000"]
    details = {page.texts("summary", part)[0]: part for part in page.all("details", sections[0])}
    assert details["Observation"].attributes["class"] == "diff" and page.texts("pre", details["Thought"]) == ["x"]
    assert page.texts("span", class_="del") == ["-VALUE = 3\n", "-VALUE = 8\n"]
    assert page.texts("span", class_="add") == ["+VALUE = 8\n", "+VALUE = 9\n"]
    page = drawn(path, "#tiny-task-1-0")
    first = page.all("section", id="tiny-task-1-0")[0]
    assert "no action" in page.texts("span", first, class_="chip ")
    assert "Reply, as it came" in page.texts("summary", first) and "no format at all" in page.texts("pre", first)


@needs_node
def test_filters(path):
    def visible(*choices):
        page = drawn(path, *choices)
        boxes = page.all("details", class_="trajectory")
        names = [page.texts("b", box)[0] for box in boxes if "hidden" not in box.attributes]
        assert page.texts("span", page.all("h2")[-1])[0] == f"{len(names)} of {len(boxes)}"
        return names
    assert len(visible("#")) == len(visible("#%")) == len(visible("#none-0")) == 4
    assert visible("#?task=tiny-task&outcome=failed") == ["tiny-task-1", "tiny-task-3"]
    assert visible("#?outcome=better&more=none") == visible("", "outcome=better") == [
        "tiny-task-0", "tiny-task-2"]
    page = drawn(path)
    options = {pick.attributes["name"]: page.texts("option", pick) for pick in page.all("select")}
    assert options == {"task": ["any task", "tiny-task"], "outcome": ["any outcome", "better", "failed"]}


@needs_node
def test_scores_by_step(path):
    page = drawn(path)
    titles = {title: figure for (_, title), figure in page.figures().items()}
    figure = titles["tiny-task, from 7.0000"]
    curves = page.points(figure, class_="line c0 thin")
    y = curves[0][1::2]     # 7, 2, 1, 1, and 1 after the end: on a straight scale, and lower is better
    assert len(y) == 5 and y[2] == y[3] == y[4] and (y[1] - y[0]) / (y[2] - y[0]) == pytest.approx(5 / 6, abs=2e-3)
    mean = page.points(figure, class_="line c0")[0][1::2]
    assert mean == pytest.approx([sum(each) / 4 for each in zip(*(curve[1::2] for curve in curves))], abs=0.11)
    kinds = page.all("p")[-1]
    assert kinds.text == "scripted: "
    assert page.texts("span", kinds, class_="dim") == ["invalid 1", "failed 1", "not an edit 5", "limit 0", "scored 4"]


def test_the_page_knows_every_kind_of_reward(path):
    assert list(shown(path)["shares"].items()) == [
        ("share_invalid", "invalid"), ("share_failed", "failed"), ("share_not_an_edit", "not an edit"),
        ("share_limit", "limit"), ("share_scored", "scored")]
    assert list(shown(path)["shares"].values()) == list(reward.KINDS)


def test_published_figures_stand_beside_real_data_only(tmp_path, task):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "truth.csv").write_text("id,y\n1,10\n2,10\n")
    cfg = settings(tmp_path, raw=str(raw))
    play(cfg, Scripted())
    page = shown(Path(cfg.out, "report.html"))
    assert page["tables"][-1]["rows"][1:] == [
        {"task": "tiny-task", "agent": "ML-Agent (paper)", "average": "0.5000", "best": "0.2500"}]
    assert "iniature" not in json.dumps([page["title"], page["warnings"], page["tables"], page["notes"]])


@needs_node
def test_what_is_not_to_be_trusted_is_loud(run):
    def bad(line):
        if line.get("index") == 1:
            line.update(sandbox="off")
    change(file_of(run, 2), bad)
    play(run, None)
    chips = drawn(Path(run.out, "report.html"), "#tiny-task-2-0").texts("span", class_="chip bad")
    assert "sandbox off" in chips


@needs_node
def test_the_baseline_has_a_page(tmp_path, task):
    cfg = settings(tmp_path, model="", sandbox="off")
    evaluation.evaluate(cfg)
    page = drawn(Path(cfg.out, "report.html"))
    heads, row = page.rows()
    assert heads[3:] == ["starter", "it printed", "seconds"] and row[3:5] == ["7.0000", "6.5000"]
    assert "starter: the sandbox was off, so scripts could read the answers." in page.texts("p", class_="bad")


def test_an_interrupted_run_shows_what_was_done(tmp_path, task, monkeypatch):
    monkeypatch.setattr(evaluation, "TOKENS_TOGETHER", 1)       # one trajectory after the other
    cfg = settings(tmp_path)
    with pytest.raises(endpoint.EndpointError):
        play(cfg, Scripted(fail_at=5, error=endpoint.EndpointError("it is down")))
    path = Path(cfg.out, "report.html")
    data = shown(path)
    assert "not complete" in data["warnings"][1]
    assert data["tables"][-1]["rows"][0]["failed"] == "0/1"    # the first is over, after four steps; the second has one
    played = data["runs"][0]["trajectories"]
    assert [(len(trajectory["steps"]), trajectory["outcome"]) for trajectory in played] == [(4, "better"),
                                                                                            (1, "unfinished")]
    play(cfg, Scripted())
    assert not any("not complete" in text for text in shown(path)["warnings"])


# -- side by side, and training

@needs_node
def test_runs_side_by_side(run, tmp_path, capsys):
    play(settings(tmp_path, "other", model="another", trajectories=1), Scripted())
    cut = file_of(run, 3)
    cut.write_bytes(cut.read_bytes()[:-1])      # as while it is being written
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "log.jsonl").write_text('{"iteration": 1, "reward": 0.5}\n')      # has no columns
    folders = [run.out, str(tmp_path / "other"), str(tmp_path / "training")]
    assert evaluation.main(["--compare", ",".join(folders), "--reference", folders[0], "--out",
                            str(tmp_path / "new")]) == 0
    assert "Written to" in capsys.readouterr().out
    assert all(path.read_bytes() == content for path, content in before.items())
    page = drawn(tmp_path / "new" / "compare.html", "#2/tiny-task-0-1")
    assert [row[:8] for row in page.rows()[3:6]] == [
        ["task", "agent", "metric", "starter", "average", "best", "std. error", "gain %"],
        ["tiny-task *", folders[0], "MAE (down)", "7.0000", "3.8750", "0.5000", "1.8071", "+44.6"],
        ["tiny-task *", folders[1], "MAE (down)", "7.0000", "1.0000", "1.0000", "-", "+85.7"]]
    assert page.rows()[6:] == [         # of four trajectories there is no interval
        ["task", "gain of the reference %", *folders[:2]], ["tiny-task", "+44.6", "-", "-"],
        ["won, of 1", "", "0", "1"]]
    boxes = page.all("details", class_="trajectory")
    assert [page.texts("b", box)[0] for box in boxes] == [
        *(f"{folders[0]}: tiny-task-{k}" for k in range(4)), f"{folders[1]}: tiny-task-0"]
    assert page.all("section", id="2/tiny-task-0-1", class_="step")


@needs_node
def test_the_means_stand_first(run):
    path = Path(run.out, "results.json")
    results = json.loads(path.read_text())
    result = results["tasks"]["tiny-task"]
    for name, score in (("first", 3.5), ("second", 7.0)):       # gains of 50 and 0 %
        trajectories = [trajectory | {"best-validation": score} for trajectory in result["trajectories"]]
        results["tasks"][name] = result | {"trajectories": trajectories}
    del results["tasks"]["tiny-task"]
    path.write_text(json.dumps(results))
    shutil.rmtree(Path(run.out, "trajectories"))
    page = Path(run.out, "means.html")
    report.write_report(page, {"a": run.out}, [])
    page = drawn(page)
    heads, starter, row = page.rows()[:3]
    assert heads[:3] == ["tasks", "agent", "gain %"]
    assert starter[:3] == ["2 held-out", "starter", "+0.0"]
    assert row[:3] == ["2 held-out", "a", "+25.0 (+0.0 to +50.0)"]
    # the figure: an interval from the starter's line on, with the mean in its middle
    figure = page.figures()["", "share of the gap closed, mean of 2 held-out tasks, %"]
    (low, _, high), = page.points(figure, class_="line c0")
    (zero, *_), = page.points(figure, class_="zero")
    mean, = (float(circle.attributes["cx"]) for circle in page.all("circle", figure))
    assert low == zero and mean == pytest.approx((low + high) / 2, abs=0.11) and low < high - 100
    assert page.texts("text", figure)[-1] == "a"


@needs_node
def test_training_logs_are_drawn(tmp_path):
    shares = {f"share_{kind}": share for kind, share in
              zip(("invalid", "failed", "not_an_edit", "limit", "scored"), (0.5, 0.25, 0.0, 0.0, 0.25))}
    for name in ("step", "episode"):
        (tmp_path / name).mkdir()
        lines = [{"iteration": i, "reward": i / 10, "kl": None, "seconds": 60, **shares} for i in (1, 2, 3)]
        lines.insert(1, {**lines[1], "reward": 99.0})       # done, and lost when the run was killed
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = [str(tmp_path / name) for name in ("step", "episode")]
    page = drawn(compare(tmp_path, *names))
    figures = page.figures()
    assert list(figures) == [("", "mean reward"), *(("Training", f"kinds of reward, share: {name}") for name in names)]
    first, second = (page.points(figures["", "mean reward"], class_=f"line c{i}")[0] for i in (0, 1))
    assert len(first) == 6 and first[4] - first[2] == pytest.approx(first[2] - first[0], abs=0.11)
    assert first == second and first[5] - first[3] == pytest.approx(first[3] - first[1], abs=0.11)
    heights = [page.points(figures["Training", f"kinds of reward, share: {names[0]}"], class_=f"line k{i}")[0][1]
               for i in range(5)]
    assert heights[2] == heights[3] and [(heights[2] - height) / (heights[2] - heights[0]) for height in heights] == (
        pytest.approx([1, 0.5, 0, 0, 0.5], abs=2e-3))


@needs_node
def test_a_line_of_one_point_is_a_dot(tmp_path):
    """A path of no length is drawn where its ends are round."""
    (tmp_path / "log.jsonl").write_text('{"iteration": 1, "reward": 0.5}\n')
    path = compare(tmp_path, tmp_path)
    page = drawn(path)
    line, = page.all("path", page.figures()["", "mean reward"], class_="line c0")
    assert re.fullmatch(r"M[\d.]+ [\d.]+h0", line.attributes["d"])
    assert re.search(r"\.line \{.*stroke-linecap: round", path.read_text())


@needs_node
def test_gain_is_drawn_against_updates_and_minutes(tmp_path):
    """A line a run, with thin ones for its interval: the second run takes four times as long for an update."""
    points = [{"run": run, "iteration": i, "updates": 8 * i, "seconds": seconds * i, "scripts": i, "tokens": i,
               "gain": {"held-in": [3 * i, [i, 5 * i]], "held-out": [i, None]}}
              for run, seconds in (("step", 60), ("episode", 240)) for i in (0, 1, 2)]
    report.write_page(tmp_path / "page.html", {"title": "x", "warnings": [], "notes": [], "tables": [], "logs": [],
                                               "runs": [], "exports": points})
    page = drawn(tmp_path / "page.html")
    figures = {title: figure for (_, title), figure in page.figures().items()}
    assert list(figures) == [
        f"{split}, by {axis}" for split in ("held-in", "held-out") for axis in ("updates", "minutes")]
    step, episode = (page.points(figures["held-in, by updates"], class_=f"line c{i}")[0] for i in (0, 1))
    assert len(step) == 6 and step == episode
    step, episode = (page.points(figures["held-in, by minutes"], class_=f"line c{i}")[0] for i in (0, 1))
    assert step[1::2] == episode[1::2] and episode[4] - episode[0] == pytest.approx(4 * (step[4] - step[0]), abs=0.5)
    low, high = page.points(figures["held-in, by minutes"], class_="line c0 thin")
    assert low[1] == high[1] == step[1] and high[5] < step[5] < low[5]      # downwards is less
    assert page.points(figures["held-out, by minutes"], class_="line c0 thin") == []
    assert page.texts("span", figures["held-in, by minutes"], class_="dim") == ["step", "episode"]


def test_the_miniature_finds_how_its_agents_were_trained(tmp_path, task, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/rl").mkdir(parents=True)
    Path("runs/rl/log.jsonl").write_text('{"iteration": 1, "reward": 0.5, "lr": "unused"}\n')
    cfg = settings(tmp_path)
    evaluation.evaluate(settings(tmp_path, "mini", task=""), {"after RL": cfg}, load=lambda spec, **options: Scripted())
    logs = shown(tmp_path / "mini" / "report.html")["logs"]
    assert logs == [{"name": "runs/sft", "lines": []}, {"name": "runs/rl", "lines": [{"reward": 0.5, "iteration": 1}]}]


def test_what_is_not_there_is_said_at_once(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        evaluation.main(["--compare", str(tmp_path / "none")])
    assert end.value.code == 2 and "holds no results.json" in capsys.readouterr().err


def run_script(code):
    """What an expression gives that uses the functions of the page's script."""
    source = re.search("<script>(.*?)</script>", Path(report.__file__).with_suffix(".html").read_text(), re.DOTALL)[1]
    functions = source[:source.index("// ---- the parts of the page")].replace("const data", "const unused")
    stub = ('globalThis.document = {getElementById: id => ({textContent: "{}"})}; '
            'globalThis.data = {runs: [], shares: {}};')
    done = subprocess.run([NODE, "-e", f"{stub} (0, eval)({json.dumps(functions)} + {json.dumps(code)})"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_node
def test_ticks_are_round_and_few():
    spans = [(0, 1), (-0.3, 7.4), (21000, 24900), (0.61, 0.64), (1, 1 + 2e-16), (-1e99, 1e99)]
    ticks = run_script(f"console.log(JSON.stringify({json.dumps(spans)}.map(each => ticks(...each))))")
    assert ticks[:4] == [pytest.approx(expected) for expected in (
        [0, 0.2, 0.4, 0.6, 0.8, 1], [0, 2, 4, 6], [21000, 22000, 23000, 24000], [0.61, 0.62, 0.63, 0.64])]
    assert all(len(each) <= 6 for each in ticks)        # however close the ends are
    assert run_script("console.log(JSON.stringify([[5], [0, 10], [0]].map(span)))") == [
        pytest.approx([4.75, 5.25]), pytest.approx([-0.5, 10.5]), [-0.5, 0.5]]


@needs_node
def test_numbers_are_written_as_in_the_text():
    code = 'console.log(JSON.stringify([number(0.5), number(29166.08), number(null), number("nan"), number(-3.14, 1)]))'
    assert run_script(code) == ["0.5000", "29166.1", "-", "nan", "-3.1"]
    assert [tables.format_number(x) for x in (0.5, 29166.08, None)] == ["0.5000", "29166.1", "-"]


# -- the same bytes, and nothing that an agent writes gets out of its place

def test_a_stored_evaluation_gives_the_same_bytes(run, tmp_path):
    path = Path(run.out, "report.html")
    first = path.read_bytes()
    play(run, None)
    assert path.read_bytes() == first
    copy = tmp_path / "somewhere" / "else"
    shutil.copytree(run.out, copy)
    (copy / "report.html").unlink()
    done = subprocess.run([sys.executable, "eval.py", "--task", "tiny-task", "--model", "scripted", "--coder", "none",
                           "--trajectories", "4", "--steps", "5", "--data", run.data, "--out", str(copy)], cwd=ROOT,
                          capture_output=True, text=True)       # another process hashes strings differently
    assert done.returncode == 0, done.stderr
    assert (copy / "report.html").read_bytes() == first


HOSTILE = ("</script><script>document.title = 'broken'</script><!--<script>",
           "<img src=x onerror=\"document.title=1\">", "\0\x07\x1b[31m\x7f", "\u2028\u2029\ufeff",
           "&lt;&amp;\\u003c", "]]></textarea></style>{{data}}{{policy}}", "x" * 300_000)


def hostile(line):
    if line["type"] == "step":
        text = "\n".join(HOSTILE)
        line.update(fields={"Thought": text, "</pre>": text, "__proto__": text}, observation=text + "\n@@ -1 +1 @@",
                    reply=text, detail=text, action=HOSTILE[0], args={HOSTILE[0]: text}, printed=math.nan, coder=[text],
                    valid=False)
    else:
        line["ideas"] = list(HOSTILE[:6])


def test_hostile_text_stays_text(run):
    path = Path(run.out, "report.html")
    for k in range(4):
        change(file_of(run, k), hostile)
    play(run, None)
    page = Elements(path.read_text("utf-8"))
    assert len(page.all("script")) == 2 and not page.all("img") and not page.open
    step = shown(path)["runs"][0]["trajectories"][0]["steps"][0]
    assert step["action"] == HOSTILE[0] and step["printed"] == "nan"
    thought = step["fields"]["Thought"]
    assert thought.startswith("\n".join(HOSTILE[:6])) and len(thought) < 21_000
    assert path.stat().st_size < 11 * 8 * 30_000
    if NODE:
        page = drawn(path, "#tiny-task-0-0")
        assert not page.all("img") and not page.all("script")
        chips = page.texts("span", page.all("section", id="tiny-task-0-0")[0])
        assert HOSTILE[0] in chips and any(chip.endswith("printed nan") for chip in chips)
        assert "__proto__" in page.texts("summary") and "</pre>" in page.texts("summary")


def test_what_no_browser_reads_is_written_as_text(tmp_path):
    data = {"title": "\ud800<", "runs": [], "values": [math.nan, -math.inf, 0.5, 3, True, None, ("x" * 30_000,)]}
    report.write_page(tmp_path / "page.html", data)
    page = shown(tmp_path / "page.html")
    *values, (text,) = page["values"]
    assert page["title"] == "?<" and values == ["nan", "-inf", 0.5, 3, True, None]
    assert len(text) < 21_000 and "characters cut" in text


BREAKING = '"></script></title></svg><script>document.title = 1</script><img src=x onerror=alert(1)>\'\u2028'
NO_FORM = (BREAKING, [BREAKING], {BREAKING: BREAKING}, None, -1.5, math.nan, math.inf, -1e308, 5e-324, True)


def places(value, path=()):
    """The paths of all that is in a value of JSON, of the value itself too."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def put(value, path, new):
    """A copy of the value with something else at that path; with new=BREAKING in the keys of an object there, too."""
    if not path:
        return {**value, BREAKING: BREAKING} if new == {BREAKING: BREAKING} and isinstance(value, dict) else new
    copied = value.copy()
    copied[path[0]] = put(value[path[0]], path[1:], new)
    return copied


def test_whatever_stands_in_others_files_breaks_nothing(tmp_path, task):
    """At every place of results.json, a trajectory and a log in turn: the page has no element or attribute that it has
    not without it, or one sentence says which file was not written by us. Of the pages every twentieth is drawn."""
    folder = tmp_path / "out'\"><img src=x>&lt;"
    replies = [edit(3, 8), act("List Files", dir_path=".")]
    play(settings(tmp_path, folder.name, trajectories=1, steps=2), Scripted([replies]))
    (folder / "log.jsonl").write_text(json.dumps(
        {"iteration": 1, "reward": 0.5, "kl": None, "seconds": 2.0, "share_scored": 1.0, "share_failed": 0}) + "\n")
    played = folder / "trajectories"
    shutil.copy(played / "tiny-task-0.jsonl", played / f"{BREAKING.replace('/', '')}-0.jsonl")
    counts = Counter()
    benign = None

    def look():
        nonlocal benign
        try:
            page = compare(tmp_path, folder)
        except ValueError as error:
            assert str(folder) in str(error) and len(str(error)) < 1000 and str(error).isprintable(), error
            counts["refused"] += 1
            return
        counts["shown"] += 1
        elements = Elements(page.read_text()).elements
        elements = Counter((element.tag, *sorted(element.attributes)) for element in elements)
        benign = benign or elements
        assert elements == benign
        shown(page)
        if NODE and counts["shown"] % 20 == 1:
            assert not drawn(page, "#tiny-task-0-0").all("img")
    look()
    others = itertools.cycle(NO_FORM[1:])
    for path in (folder / "results.json", played / "tiny-task-0.jsonl", folder / "log.jsonl"):
        whole = path.read_text()
        lines = [json.loads(line) for line in ([whole] if path.suffix == ".json" else whole.splitlines())]
        for i, line in enumerate(lines):
            for place in places(line):
                for new in (BREAKING, next(others)):
                    path.write_text("".join(json.dumps(put(each, place, new) if i == j else each) + "\n"
                                            for j, each in enumerate(lines)))
                    look()
        for bad in (b"", b"null", b"[]", b"[" * 100_000, b"{" * 100_000, b'{"type":' * 10_000, b"\xff\xfe", b"\0" * 99,
                    b'{"complete": 1' + b"0" * 5000 + b"}", b'{"type": "header"}\n'):
            path.write_bytes(bad + b"\n")
            look()
        path.write_text(whole)
    assert counts["shown"] > 100 and counts["refused"] > 100


@pytest.mark.parametrize("name, make, words", [
    ("trajectories/tiny-task-1.jsonl", "link", "leads out of"), ("results.part", "link", "leads out of"),
    ("checkpoints", "link", "leads out of"), ("log.jsonl", "pipe", "neither a file")])
def test_a_folder_that_leads_elsewhere_is_neither_written_nor_shown(name, make, words, tmp_path, task):
    cfg = settings(tmp_path, trajectories=2)
    mine = tmp_path / "mine"
    play(settings(tmp_path, trajectories=1), Scripted())
    mine.write_text("without an end of line")
    path = Path(cfg.out, name)
    path.symlink_to(mine) if make == "link" else os.mkfifo(path)
    for work in (lambda: play(cfg, Scripted()), lambda: compare(tmp_path, cfg.out)):
        with pytest.raises(ValueError, match=words):
            work()
    assert mine.read_text() == "without an end of line"
    link = tmp_path / "results.part"
    link.symlink_to(mine)
    files.write_atomic(tmp_path / "results.json", {})
    assert mine.read_text() == "without an end of line" and (tmp_path / "results.json").read_text() == "{}\n"


def test_the_page_allows_its_own_script_and_style_alone(path):
    text = path.read_text("utf-8")
    policy = Elements(text).all("meta", **{"http-equiv": "Content-Security-Policy"})[0].attributes["content"]
    own = [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode()
           for each in (text.split("<script>")[1].split("</script>")[0], text.split("<style>")[1].split("</style>")[0])]
    assert policy == (f"default-src 'none'; script-src 'sha256-{own[0]}'; style-src 'sha256-{own[1]}'; "
                      "base-uri 'none'; form-action 'none'")


def test_nothing_is_loaded_from_anywhere(path):
    text = path.read_text("utf-8")
    for element in Elements(text).elements:
        assert element.tag not in ("link", "img", "iframe", "object", "base", "source", "image", "use")
        assert not {"href", "src", "style"} & element.attributes.keys()
        assert not [name for name in element.attributes if name.startswith("on")]
    namespace = "http://www.w3.org/2000/svg"        # a name, from which nothing is loaded
    assert not re.search(r"url\(|@import|fetch|HTML\b.*=|eval\(|https?:|\.style|import\(", text.replace(
        namespace, "").replace("read as HTML", ""))
    assert "noscript" in text


# -- in a browser

def opened(path, at="", *flags):
    """(the page after its script has run, what the browser's console said)."""
    done = subprocess.run([CHROMIUM, "--headless", f"--user-data-dir={path.parent / 'profile'}", "--no-first-run",
                           "--disable-gpu", "--no-sandbox", "--virtual-time-budget=5000", "--enable-logging=stderr",
                           *flags, "--dump-dom", path.as_uri() + at], capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    said = [line for line in done.stderr.decode(errors="replace").splitlines() if "CONSOLE" in line]
    return Elements(done.stdout.decode(errors="replace")), said


def outline(page):
    """What a page shows, as (tag, class, text) of each element below main."""
    main, = page.all("main")
    return [(element.tag, element.attributes.get("class") or "", element.text) for element in page.elements
            if main in element.inside]


@browser
@needs_node
def test_a_browser_shows_what_node_shows(path):
    for at in ("#?outcome=failed", "#tiny-task-0-1"):
        page, said = opened(path, at)
        assert said == [] and outline(page) == outline(drawn(path, at))
    assert len(page.all("section", class_="step")) == 4


@browser
def test_a_browser_shows_hostile_text_as_text(run):
    path = Path(run.out, "report.html")
    change(file_of(run, 0), hostile)
    play(run, None)
    page, said = opened(path, "#tiny-task-0-0")
    assert said == [] and len(page.all("section", class_="step")) == 4 and not page.all("img")
    assert page.texts("title")[0] == "ML-Agent: scripted"
    assert HOSTILE[0] in page.texts("span", class_="chip ")


@browser
def test_the_page_is_no_wider_than_the_window(path, tmp_path):
    """A frame of that width says how wide its page is; a window of the browser itself cannot be so narrow."""
    shutil.copy(path, tmp_path)
    (tmp_path / "frame.html").write_text(
        '<iframe id=f src="report.html#tiny-task-0-1" style="border:0;width:390px;height:800px"></iframe>'
        '<p id=p></p><script>f.onload = () => p.textContent = f.contentDocument.documentElement.scrollWidth</script>')
    page, _ = opened(tmp_path / "frame.html", "", "--allow-file-access-from-files")
    assert 0 < int(page.all("p", id="p")[0].text) <= 390
