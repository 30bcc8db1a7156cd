"""The page that eval.py writes: what it shows, that nothing an agent wrote can break it, that the same files give the
same bytes, and, where there is a Chromium, that a browser opens it, filters and follows links."""
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
import sample
from common import act
from test_eval import MINIATURE, ROOT, SCRIPTS, Scripted, edit, file_of, play, settings, task  # noqa: F401  (a fixture)
from support import files

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium or google-chrome here to open the page")


class Elements(HTMLParser):
    """A page as a list of elements, each with its tag, attributes and the text directly in it."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        element = SimpleNamespace(tag=tag, text="", **{"at": dict(attributes)})
        self.found.append(element)
        if tag not in ("meta", "path", "circle"):
            self.open.append(element)

    def handle_endtag(self, tag):
        if tag not in ("path", "circle"):
            assert self.open.pop().tag == tag       # every element is closed, in order

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)

    def handle_data(self, text):
        if self.open:
            self.open[-1].text += text

    def all(self, tag, **at):
        return [one for one in self.found if one.tag == tag
                and all(one.at.get(name.rstrip("_")) == value for name, value in at.items())]


def refuse(name):
    raise ValueError(f"{name} is not JSON")


def steps_of(text):
    """{trajectory: its steps as the page has them}; NaN and the like are refused, as a browser does."""
    return {one.at["id"]: json.loads(data.text, parse_constant=refuse)
            for one, data in zip(Elements(text).all("details", class_="t"),
                                 Elements(text).all("script", type="application/json"))}


def read(out, name="report.html"):
    return Path(out, name).read_text("utf-8")


def rows(text):
    """The cells of the table."""
    table = text[text.index("<table>"):text.index("</table>")]
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row, re.S) for row in table.split("</tr>")]


def points(path):
    """The numbers of an SVG path."""
    return [float(number) for number in re.findall(r"[-\d.]+", path)]


@pytest.fixture
def run(tmp_path, task):
    s = settings(tmp_path)
    play(s, Scripted())
    return s


def change(path, how):
    """Lets how(line) change each line of a trajectory's file."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        how(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


# ---- what it shows

def test_the_table_and_the_steps_are_there(run):
    text = read(run.out)
    assert rows(text)[0] == ["task (miniature)", "metric", "starter", "average", "best", "gain %", "95 % interval",
                             "best gain %", "std. error", "failed"]
    assert rows(text)[1] == ["tiny-task", "MAE (down)", "7.0000", "4.7500", "1.0000", "+32.1", "+0.0 to +64.3", "+85.7",
                             "1.4361", "2/4"]        # as calculated by hand in test_eval
    page = Elements(text)
    assert [one.text for one in page.all("p", class_="loud")] == [MINIATURE]
    assert [one.at["data-outcome"] for one in page.all("details", class_="t")] == [
        "|better|script: ok|", "|failed|script: error|", "|better|script: ok|", "|failed|"]
    assert [one.at["data-reward"] for one in page.all("details", class_="t")] == [
        "|an edit above 0.5|not an edit|scored|", "|failed|invalid|not an edit|",
        "|an edit above 0.5|an edit below 0.5|not an edit|scored|", "|not an edit|"]
    steps = steps_of(text)
    assert [len(each) for each in steps.values()] == list(map(len, SCRIPTS))
    chips, parts = steps["tiny-task-0"][0]      # VALUE 3 becomes 8: the score 7 becomes 2, the script prints 1.5
    # sigmoid(8 * (7 - 2) / 7) = 1 / (1 + exp(-5.714)) = 0.9967
    assert [text for _, text in chips][:4] == ["Replace In Script", "scored, reward 0.997",
                                               "score 2.0000, before 7.0000", "printed 1.5000"]
    observation = next(part for part in parts if part[0] == "Observation")
    assert observation[1] == "diff" and "\n-VALUE = 3\n+VALUE = 8\n" in observation[2]
    assert ["Thought", "text", "x"] in parts
    assert [look for look, _ in steps["tiny-task-2"][1][0]][1] == "bad"         # from 9.5 to 6: worse
    assert ["&#9632;", "&#9633;", "&#9632;"] == re.findall(
        r">(&#\d+;)<", text[text.index('id="tiny-task-2"'):text.index('id="tiny-task-3"')])
    chips, parts = steps["tiny-task-1"][0]
    assert chips[0][1] == "no action" and ["Reply, as it came", "text", "no format at all"] in parts


def test_scores_by_step_and_printed_against_graded(run):
    page = Elements(read(run.out))
    names = [each.text for each in page.all("title")][1:]
    assert [name for name in names if "printed" in name] == [
        "tiny-task 0, step 0: printed 1.5000, graded 2.0000", "tiny-task 0, step 1: printed 0.5000, graded 1.0000",
        "tiny-task 0, step 2: printed 0.5000, graded 1.0000", "tiny-task 2, step 0: printed 0.0000, graded 0.5000",
        "tiny-task 2, step 1: printed 3.5000, graded 4.0000"]
    assert [each.at["href"] for each in page.all("a") if "class" not in each.at] == [
        "#tiny-task-0-0", "#tiny-task-0-1", "#tiny-task-0-2", "#tiny-task-2-0", "#tiny-task-2-1"]
    curve = points(next(each for each in page.all("path") if each.at["class"] == "is c0 thin").at["d"])
    y = curve[1::2]     # 7, 2, 1, 1, and 1 after the end: on a straight scale, and lower is better
    assert len(y) == 5 and y[2] == y[3] == y[4] and (y[1] - y[0]) / (y[2] - y[0]) == pytest.approx(5 / 6, abs=2e-3)


def test_published_figures_stand_beside_real_data_only(tmp_path, task):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "truth.csv").write_text("id,y\n1,10\n2,10\n")
    play(settings(tmp_path, raw=str(raw)), Scripted())
    text = read(tmp_path / "out")
    assert [row[-1] for row in rows(text)[:3]] == ["published", "ML-Agent", "0.5000 / 0.2500"]
    assert "iniature" not in text


def test_flags_are_loud(run):
    def bad(line):
        if line.get("index") == 1:
            line.update(canary_p=1e-9, sandbox="off")
    change(file_of(run, 2), bad)
    results = play(run, None)
    assert results["tasks"]["tiny-task"]["flagged"] == 1
    text = read(run.out)
    assert "FLAGGED: submissions that hold answers" in Elements(text).all("p", class_="loud")[1].text
    assert rows(text)[1][0] == "tiny-task (FLAGGED)"
    assert "flagged" in Elements(text).all("details", id="tiny-task-2")[0].at["data-outcome"]
    chips = [text for _, text in steps_of(text)["tiny-task-2"][1][0]]
    assert "FLAGGED: holds planted answers" in chips and "sandbox off" in chips


def test_the_baseline_has_a_page(tmp_path, task):
    evaluation.evaluate(settings(tmp_path, model="", sandbox="off"))
    text = read(tmp_path / "out")
    assert rows(text)[0][2:] == ["starter", "it printed", "seconds"] and rows(text)[1][2:4] == ["7.0000", "6.5000"]
    assert "The sandbox was off" in text


def test_an_interrupted_run_shows_what_was_done(tmp_path, task):
    s = settings(tmp_path, parallel=1)
    with pytest.raises(sample.EndpointError):
        play(s, Scripted(fail_at=5, error=sample.EndpointError("it is down")))
    text = read(s.out)
    assert "not complete" in Elements(text).all("p", class_="loud")[1].text
    assert rows(text)[1][-1] == "0/1"       # four steps of the first, which is done; one of the second, which is not
    assert {id: len(steps) for id, steps in steps_of(text).items()} == {"tiny-task-0": 4, "tiny-task-1": 1}
    assert "unfinished" in Elements(text).all("details", id="tiny-task-1")[0].at["data-outcome"]
    play(s, Scripted())
    assert "not complete" not in read(s.out)


# ---- side by side, and training

def test_runs_side_by_side(run, tmp_path, capsys):
    play(settings(tmp_path, "other", model="another", trajectories=1), Scripted())
    cut = file_of(run, 3)
    cut.write_bytes(cut.read_bytes()[:-1])      # as while it is being written
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    folders = [run.out, str(tmp_path / "other")]
    assert evaluation.main(["--compare", ",".join(folders), "--out", str(tmp_path / "new")]) == 0
    assert "Written to" in capsys.readouterr().out
    assert all(path.read_bytes() == content for path, content in before.items())
    text = read(tmp_path / "new", "compare.html")
    heads = ["average", "best", "gain %", "95 % interval"]
    assert rows(text)[0] == ["", "", "", folders[0], "", "", "", folders[1], "", "", ""]
    assert rows(text)[1][3:] == heads * 2
    assert rows(text)[2] == ["tiny-task", "MAE (down)", "7.0000", "4.7500", "1.0000", "+32.1", "+0.0 to +64.3",
                             "1.0000", "1.0000", "+85.7", "-"]
    assert set(steps_of(text)) == {"1/tiny-task-0", "1/tiny-task-1", "1/tiny-task-2", "1/tiny-task-3", "2/tiny-task-0"}
    figure = text[text.index("Gain over the starter"):]
    assert [float(x) for x in re.findall(r'text-anchor="end">([-+\d.]+)', figure)[:2]] == [32.1, 85.7]


def test_other_data_stand_in_a_row_of_their_own(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run.out, other)
    results = json.loads((other / "results.json").read_text())
    results["tasks"]["tiny-task"]["starter"] = 6.0
    (other / "results.json").write_text(json.dumps(results))
    table, _, (gains,) = evaluation.table([evaluation.read_run(run.out, "a"), evaluation.read_run(other, "b")])
    assert [row[2:] for row in table[2:]] == [      # the other's interval, 2.5 to 7, is of gains of 3.5 and -1 of 6
        ["7.0000", "4.7500", "1.0000", "+32.1", "+0.0 to +64.3", "-", "-", "-", "-"],
        ["6.0000", "-", "-", "-", "-", "4.7500", "1.0000", "+32.1", "-16.7 to +58.3"]]
    assert [list(bars) for _, bars in gains] == [[0], [1]]


def test_a_mean_of_gains_is_over_the_tasks_that_all_runs_have(run):
    run = evaluation.read_run(run.out, "a")
    one = run["results"]["tasks"]["tiny-task"]
    run["results"]["tasks"]["second"] = {
        **one, "trajectories": [{**each, "score": 3.5} for each in one["trajectories"]],
        "score_summary": evaluation.summary([3.5] * 4, 7, "down")}
    other = {**run, "results": {**run["results"], "tasks": {"tiny-task": one}}}
    rows, _, (gains,) = evaluation.table([run])
    title, means = gains[-1]        # a gain of 50 % that does not vary, and one of 0 to 4.5 / 7 around 2.25 / 7
    assert title == "mean of 2 held-out tasks"
    assert means == {0: pytest.approx(((50 + 225 / 7) / 2, 25, (50 + 450 / 7) / 2))}
    assert rows[-1] == [title, "", "", "", "", "+41.1", "+25.0 to +57.1", "", "", ""]
    assert [title for title, _ in evaluation.table([run, other])[2][0]] == ["tiny-task", "second"]


def test_training_logs_are_drawn(tmp_path, run):
    shares = {f"share_{kind}": share for kind, share in
              zip(("invalid", "failed", "not_an_edit", "limit", "scored"), (0.5, 0.25, 0.0, 0.0, 0.25))}
    logs = []
    for name, seconds in (("step", 60), ("episode", 180)):
        (tmp_path / name).mkdir()
        logs.append(tmp_path / name / "log.jsonl")
        lines = [{"iteration": i, "reward": i / 10, "kl": None, "seconds": seconds, **shares} for i in (1, 2, 3)]
        lines.insert(1, {**lines[1], "reward": 99.0})        # done, and lost when the run was killed
        logs[-1].write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation.write_report(settings(tmp_path, log=tuple(map(str, logs))))
    text = read(run.out)
    figures = re.findall(r"<figure>.*?</figure>", text[text.index("<h2>Training"):text.index("<h2>Score by step")])
    assert [re.search("<b>(.*?)</b>", figure)[1] for figure in figures] == [
        "mean reward", "mean reward", f"kinds of reward: {tmp_path}/step", f"kinds of reward: {tmp_path}/episode"]
    first, second = (points(re.search(rf'class="is c{i}" d="(.*?)"', figures[0])[1]) for i in (0, 1))
    assert first == second and first[4] - first[2] == pytest.approx(first[2] - first[0], abs=0.11)
    assert first[5] - first[3] == pytest.approx(first[3] - first[1], abs=0.11)
    first, second = (points(re.search(rf'class="is c{i}" d="(.*?)"', figures[1])[1])[::2] for i in (0, 1))
    assert first[2] == second[0]            # minutes 1, 2, 3 and 3, 6, 9
    heights = [sum(top[1] - top[2] for top in [points(box) for box in path.split("z")[:1]]) if path else 0
               for path in re.findall(r'class="of k\d" d="(.*?)"', figures[2])]
    assert [height / sum(heights) for height in heights] == pytest.approx([0.5, 0.25, 0, 0, 0.25], abs=2e-3)


@pytest.mark.parametrize("flag, words", [("--log", "--log: there is no file"), ("--compare", "holds no results.json")])
def test_what_is_not_there_is_said_at_once(flag, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        evaluation.main([flag, str(tmp_path / "none")])
    assert end.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("low, high, expected", [
    (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-0.3, 7.4, [0, 2, 4, 6]), (21000, 24900, [21000, 22000, 23000, 24000]),
    (0.61, 0.64, [0.61, 0.62, 0.63, 0.64])])
def test_ticks_are_round(low, high, expected):
    assert evaluation.ticks(low, high) == pytest.approx(expected)


def test_what_is_no_number_is_left_out_of_a_chart():
    figure = evaluation.chart("t", "x", [("c0", "a", [(0, 1.0), (1, math.nan), (2, None), (3, math.inf), (4, 2.0)])])
    assert len(points(re.search('class="is c0" d="(.*?)"', figure)[1])) == 4
    assert evaluation.chart("t", "x", [("c0", "a", [(0, math.nan)])]) == ""
    assert evaluation.chart("t", "x", [("c0", "a", [(3, 5.0)])])        # one point: axes of some length


# ---- the same bytes, and nothing that an agent writes gets out of its place

def test_a_stored_evaluation_gives_the_same_bytes(run, tmp_path):
    first = Path(run.out, "report.html").read_bytes()
    play(run, None)
    assert Path(run.out, "report.html").read_bytes() == first
    copy = tmp_path / "somewhere" / "else"
    shutil.copytree(run.out, copy)
    (copy / "report.html").unlink()
    done = subprocess.run([sys.executable, "eval.py", "--task", "tiny-task", "--model", "scripted", "--coder", "none",
                           "--trajectories", "4", "--steps", "5", "--data", run.data, "--out", str(copy)], cwd=ROOT,
                          capture_output=True, text=True)       # another process hashes strings differently
    assert done.returncode == 0, done.stderr
    assert (copy / "report.html").read_bytes() == first


HOSTILE = ("</script><script>document.title = 'broken'</script><!--<script>",
           "<img src=x onerror=\"document.title=1\">", "\0\x07\x1b[31m\x7f", "\u2028\u2029\ufeff\ud800",
           "&lt;&amp;\\u003c", "]]></textarea></style>", "x" * 300_000)


def hostile(line):
    if line["type"] == "step":
        text = "\n".join(HOSTILE)
        line.update(fields={"Thought": text, "</pre>": text}, observation=text + "\n@@ -1 +1 @@", reply=text,
                    detail=text, action=HOSTILE[0], args={HOSTILE[0]: text}, printed=math.nan, coder=[text],
                    valid=False)
    else:
        line["ideas"] = list(HOSTILE[:6])


def test_hostile_text_stays_text(run):
    for k in range(4):
        change(file_of(run, k), hostile)
    path = evaluation.write_report(run)
    page = Elements(read(run.out))
    assert len(page.all("script")) == 4 + 1 and not page.all("img") and not page.open
    chips, parts = steps_of(read(run.out))["tiny-task-0"][0]
    assert chips[0][1] == HOSTILE[0] and "printed nan" in [text for _, text in chips]
    thought = next(text for name, _, text in parts if name == "Thought")
    assert thought.startswith("\n".join(HOSTILE[:6]).replace("\ud800", "?")) and len(thought) < 21_000
    assert path.stat().st_size < 11 * 5 * 30_000


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
    not without it, or one sentence says which file was not written by us."""
    folder = tmp_path / "out'\"><img src=x>&lt;"
    replies = [edit(3, 8), act("List Files", dir_path=".")]
    play(settings(tmp_path, folder.name, trajectories=1, steps=2), Scripted([replies]))
    (folder / "log.jsonl").write_text(json.dumps(
        {"iteration": 1, "reward": 0.5, "kl": None, "seconds": 2.0, "share_scored": 1.0, "share_failed": 0}) + "\n")
    played = folder / "trajectories"
    shutil.copy(played / "tiny-task-0.jsonl", played / f"{BREAKING.replace('/', '')}-0.jsonl")
    s, counts, benign = settings(tmp_path, "new", model="", task="", compare=(str(folder),)), Counter(), None

    def look():
        nonlocal benign
        try:
            text = evaluation.write_report(s).read_text("utf-8")
        except ValueError as error:
            assert str(folder) in str(error) and len(str(error)) < 1000 and str(error).isprintable(), error
            counts["refused"] += 1
            return
        counts["shown"] += 1
        found = Counter((one.tag, *sorted(one.at)) for one in Elements(text).found)
        benign = benign or found
        assert found.keys() <= benign.keys() | {("b", "class")} and found["script",] == benign["script",], found
        steps_of(text)
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
    s, mine = settings(tmp_path, trajectories=2), tmp_path / "mine"
    play(settings(tmp_path, trajectories=1), Scripted())
    mine.write_text("without an end of line")
    path = Path(s.out, name)
    path.symlink_to(mine) if make == "link" else os.mkfifo(path)
    for work in (lambda: play(s, Scripted()), lambda: evaluation.write_report(settings(
            tmp_path, "new", model="", task="", compare=(s.out,)))):
        with pytest.raises(ValueError, match=words):
            work()
    assert mine.read_text() == "without an end of line"
    link = tmp_path / "results.part"
    link.symlink_to(mine)
    files.write_atomic(tmp_path / "results.json", {})
    assert mine.read_text() == "without an end of line" and (tmp_path / "results.json").read_text() == "{}\n"


def test_the_page_allows_its_own_script_and_style_alone(run):
    text = read(run.out)
    policy = Elements(text).all("meta", **{"http-equiv": "Content-Security-Policy"})[0].at["content"]
    own = [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode()
           for each in (text.split("<script>")[1].split("</script>")[0], text.split("<style>")[1].split("</style>")[0])]
    assert policy == (f"default-src 'none'; script-src 'sha256-{own[0]}'; style-src 'sha256-{own[1]}'; "
                      "base-uri 'none'; form-action 'none'")


def test_nothing_is_loaded_from_anywhere(run):
    text = read(run.out)
    for one in Elements(text).found:
        assert one.tag not in ("link", "img", "iframe", "object", "base", "source", "image", "use")
        assert one.at.get("href", "#").startswith("#") and "src" not in one.at
        assert not [name for name in one.at if name.startswith("on")]
    assert not re.search(r"url\(|@import|fetch|innerHTML|eval\(|https?:", text)


# ---- in a browser

def opened(path, at="", *flags):
    """(the page after its script has run, what the browser's console said)."""
    done = subprocess.run([CHROMIUM, "--headless", f"--user-data-dir={path.parent / 'profile'}", "--no-first-run",
                           "--disable-gpu", "--no-sandbox", "--virtual-time-budget=5000", "--enable-logging=stderr",
                           *flags, "--dump-dom", path.as_uri() + at], capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    said = [line for line in done.stderr.decode(errors="replace").splitlines() if "CONSOLE" in line]
    return Elements(done.stdout.decode(errors="replace")), said


@browser
def test_a_browser_opens_filters_and_follows_links(run):
    path = Path(run.out, "report.html")
    page, said = opened(path)
    assert said == [] and not page.all("section")       # no step is there before it is asked for
    assert page.all("span", id="count")[0].text == "4 of 4"
    page, said = opened(path, "#?task=tiny-task&outcome=failed")
    assert said == [] and page.all("span", id="count")[0].text == "2 of 4"
    assert [one.at["id"] for one in page.all("details", class_="t") if "hidden" in one.at] == ["tiny-task-0",
                                                                                               "tiny-task-2"]
    page, said = opened(path, "#?reward=an%20edit%20below%200.5")
    assert [one.at["id"] for one in page.all("details", class_="t") if "hidden" not in one.at] == ["tiny-task-2"]
    page, said = opened(path, "#tiny-task-0-1")
    assert said == [] and [one.at["id"] for one in page.all("section")] == [f"tiny-task-0-{i}" for i in range(4)]
    assert [one.at["id"] for one in page.all("section", class_="step here")] == ["tiny-task-0-1"]
    assert [one.text for one in page.all("span", class_="del")] == ["-VALUE = 3\n", "-VALUE = 8\n"]
    assert [one.text for one in page.all("span", class_="add")] == ["+VALUE = 8\n", "+VALUE = 9\n"]


@browser
def test_a_browser_shows_hostile_text_as_text(run):
    change(file_of(run, 0), hostile)
    path = evaluation.write_report(run)
    page, said = opened(path, "#tiny-task-0-0")
    assert said == [] and len(page.all("section")) == 4 and not page.all("img")
    assert page.all("title")[0].text == "ML-Agent: scripted on tiny-task"
    assert HOSTILE[0] in [one.text for one in page.all("span", class_="chip ")]


@browser
def test_two_hundred_trajectories_wait_as_text(run):
    source = file_of(run, 0).read_text()
    for k in range(200):
        file_of(run, k).write_text(source)
    page, said = opened(evaluation.write_report(run))
    assert said == [] and page.all("span", id="count")[0].text == "200 of 200"
    assert len(page.all("script", type="application/json")) == 200 and not page.all("section")


@browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_is_no_wider_than_the_window(width, run, tmp_path):
    """A frame of that width says how wide its page is; a window of the browser itself cannot be so narrow."""
    shutil.copy(Path(run.out, "report.html"), tmp_path)
    (tmp_path / "frame.html").write_text(
        f'<iframe id=f src="report.html#tiny-task-0-1" style="border:0;width:{width}px;height:800px"></iframe>'
        '<p id=p></p><script>f.onload = () => p.textContent = f.contentDocument.documentElement.scrollWidth</script>')
    page, _ = opened(tmp_path / "frame.html", "", "--allow-file-access-from-files")
    assert 0 < int(page.all("p", id="p")[0].text) <= width
