"""Runs the agent on tasks and prints what it scored: the means, what it learned, and the layout of the paper's Table 1.

    python eval.py                                                   # what sft.py and rl.py made, on all tasks
    python eval.py --task leaf-classification                        # no model, no data: the starter on the miniature
    python eval.py --task leaf-classification --model DIR --raw RAW  # 8 trajectories of 15 steps on the real data
    python eval.py --task held-out --model http://host:8000/v1#name  # all of them, through an OpenAI-compatible server
    python eval.py --states FILE --record-states 4                   # records states, once
    python eval.py --states FILE --model DIR --samples 8             # single actions in them
    python eval.py --exports runs/rl,runs/episode                    # gain during training: rl.py --export-every
    python eval.py --compare runs/a,runs/b --reference runs/b        # runs nothing: draws what was run before

--out receives results.json (settings, versions, every score), trajectories/TASK-K.jsonl (a line a step, which
`python env.py replay FILE` runs again), blobs/ (the files of every step) and report.html, a page of scores and steps.
Of several agents each has results.json and trajectories/ in a folder of its own there. --states leaves states.json and
actions.jsonl instead.
Ctrl-C keeps what is done; the same command goes on from there.
"""
import functools, json, math, random, re
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import support  # noqa: F401  before torch

import sample
from env import SCAFFOLDS, Env
from support import aide, cli, endpoint, miniature, mlagentbench, tables
from support.cli import RunError, check_choices, check_positive, exit_status, refuse_torchrun, run_main
from support.disclosure import FINAL, disclose
from support.distributed import check_same
from support.files import folder_lock, hash_json, write_atomic
from support.play import AgentSettings, make_env, model_policy, play_trajectory, prepare_tasks, read_agent
from support.pretrained import hash_checkpoint, small_files
from support.parallel import Progress, run_parallel
from support.records import end_reason, read_record, trajectory_files, trajectory_path
from support.report import find_exports, read_exports, read_results, write_report
from support.sandbox import SLOTS
from support.scripts import printed_metric
from support.states import format_states, measure_states, record_states
from support.storage import ResultCache

MADE = {"fine-tuned": "runs/sft", "after RL": "runs/rl"}     # name in the tables -> where sft.py and rl.py leave it
# float64, so that a reply does not depend on which replies are sampled beside it, as rounding would have it
MINIATURE = {       # settings of a run without --task and --model
    "temperature": 1.0, "dtype": "float64", "trajectories": 3}
TOKENS_TOGETHER = 8 * 16_384    # of the conversations that one model holds at the same time
DEFAULTS = {"aide": aide.DEFAULTS, "mlagentbench": mlagentbench.DEFAULTS}      # before agent.json
PACKAGES = ("torch", "tokenizers", "numpy", "pandas", "scikit-learn")
NO_MODEL = """
No --model was given, so only the starter scripts ran. To run an agent, add --model with a folder, a model of the
Hugging Face hub (Qwen/Qwen2.5-0.5B-Instruct), or any OpenAI-compatible server (http://localhost:8000/v1#name)."""


@dataclass
class Settings(AgentSettings):
    task: str = ""  # a task's id, held-in, held-out, paper (those of Table 1) or all; empty: leaf-classification; with
        # --states or --exports all; without --model too the paper in miniature: what sft.py and rl.py have made, on all
    model: str = ""  # a folder, a hub id, tiny (random weights), http://host:port/v1#name, or random-edits: no model,
        # constants changed at random and changed back where the score is no better; empty: starters alone
    coder: str = "model"  # who carries out the (AI) actions: model (the same one), none, or another, as in --model
    out: str = "runs/eval"  # where the results go; a run that is there already is continued
    trajectories: int = 8  # per task
    scaffold: str = SCAFFOLDS[0]  # how the model is asked: ml-agent (the loop of this project), mlagentbench (that of
        # MLAgentBench), or aide (a search over whole scripts, whose output --coder reviews)
    search: str = "aide"  # of the scaffold aide: aide (5 drafts, debugs with probability 0.5, at most 3 deep), or
        # mle-bench (5 drafts, always debugs, at most 20 deep)
    final: str = "best-validation"  # what counts of a trajectory: best-validation (of the starter's and all valid
        # submissions that whose script printed the best score, of equal ones the earliest), or last-valid (the paper's)
    temperature: float = 0.7  # of sampling; 0 always takes the most likely token
    exports: tuple[str, ...] = ()  # evaluates all that rl.py --export-every has left in these --out of rl.py
    compare: tuple[str, ...] = ()  # draws these folders side by side into compare.html in --out, and runs nothing: the
        # --out of eval.py, of training (its log.jsonl), or collected trajectories
    reference: str = ""  # one of --compare: the gains of all are divided by its gain, as in Figure 3 of the paper
    states: str = ""  # a file of recorded states: the reward of single actions in them is measured instead
    samples: int = 8  # actions that are sampled in each state of --states
    record_states: int = 0  # states of each task, from the scripted expert, that are written to --states, once

    def __post_init__(self):
        super().__post_init__()
        check_choices(self, final=tuple(FINAL), scaffold=SCAFFOLDS, search=tuple(aide.SEARCHES))
        check_positive(self, "trajectories", "samples")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"--temperature must be at least 0, found {self.temperature}")
        if self.compare and (self.model or self.task or self.states):
            raise ValueError("--compare takes no --model, --task or --states")
        if self.exports and (self.model or self.compare or self.states):
            raise ValueError("--exports takes no --model, --compare or --states")
        if self.record_states < 0 or self.record_states and not self.states:
            raise ValueError("--record-states must be at least 0, and needs --states FILE to write to")
        if self.states and (self.scaffold != "ml-agent" or self.coder not in ("model", "none")
                            or bool(self.model) == bool(self.record_states)):
            raise ValueError("--states needs either --model or --record-states, takes no --coder, and measures actions "
                             f"of the scaffold ml-agent alone, found {self.scaffold} and --coder {self.coder}")
        for spec in filter(endpoint.is_server, (self.model, self.coder)):
            endpoint.address(spec)
        if self.scaffold != "ml-agent" and self.model in ("", tables.RANDOM) and not self.exports:
            raise ValueError(f"--scaffold {self.scaffold} needs a --model to ask, or --exports")
        if self.search != "aide" and self.scaffold != "aide":
            raise ValueError(f"--search {self.search} is for --scaffold aide alone, found {self.scaffold}")
        tools = mlagentbench.TOOLS
        if self.scaffold == "mlagentbench" and (self.coder == "none" or not tools.keys() >= {*self.actions}):
            raise ValueError(f"--scaffold mlagentbench needs a --coder, and --actions among {', '.join(tools)}")
        if self.reference and self.reference not in self.compare:
            raise ValueError(f"--reference must be one of --compare, found {self.reference}")
        for folder in self.compare:
            files = [Path(folder, name) for name in ("results.json", "log.jsonl")]
            if not any(map(Path.is_file, files)) and not trajectory_files(folder):
                raise ValueError(f"--compare: {folder} holds no results.json, log.jsonl or trajectories")


# -- The evaluation

def run_identity(cfg, infos):
    """Returns all that the trajectories depend on, {name: value}. A run is continued only under the same."""
    # What may differ when a run goes on: where things lie, how many trajectories, how they are counted, how long a
    # reply is waited for, and what other commands alone read.
    free = ("out", "data", "raw", "final", "trajectories", "exports", "compare", "reference", "reply_seconds",
            "states", "samples", "record_states")
    identity = {name: value for name, value in json.loads(json.dumps(asdict(cfg))).items() if name not in free}
    for task, info in infos:
        kind = "miniature" if info["miniature"] else "real"
        identity[f"data of {task.id}"] = f"{kind} {hash_json([info['sha256'], info['m_init']])[:12]}"
    for name in {cfg.model} | ({cfg.coder} - {"model", "none"}):
        if name and Path(name).is_dir():     # a model that was trained anew in the same folder is another model
            identity[f"files of {name}"] = hash_checkpoint(name)
    return identity


def starter_result(cfg, task, info, home, cache):
    """Runs the starter of a task, whose submission is a candidate too, and returns what results.json says of the task
    before an agent plays. home: the folder of blobs/ and cache/."""
    score, run = make_env(cfg, task, home, cache).score()
    if score is None:
        raise RunError(f"the starter of {task.id}: {run.outcome}. {run.detail}\n{run.stderr}")
    return {"metric": task.metric, "direction": task.direction, "split": task.split, "miniature": info["miniature"],
            "published": {} if info["miniature"] else task.published, "m_best": info["m_best"],
            "starter": info["m_init"] if cfg.model else score, "printed": printed_metric(run.stdout, task.metric),
            "seconds": run.seconds}


def load_models(cfg, num_rows, load=sample.load):
    """Returns the model that acts, and the one for the (AI) actions or None. num_rows: conversations at a time.
    load: a function like sample.load."""
    options = {"dtype": cfg.dtype, "device": cfg.device, "kernels": cfg.kernels, "context": cfg.context,
               "rows": num_rows, "timeout_s": cfg.reply_seconds}
    policy = load(cfg.model, **options)
    if policy.context and cfg.max_new_tokens >= policy.context:
        raise ValueError(f"--max-new-tokens {cfg.max_new_tokens} leaves no room in a context of {policy.context}")
    if cfg.coder == "model":
        return policy, policy
    if cfg.coder == "none":
        return policy, None
    key = endpoint.key_name(cfg.coder, cfg.model) if endpoint.is_server(cfg.coder) else None
    return policy, load(cfg.coder, **options, key=key)


def play_tasks(cfg, infos, home, cache, load):
    """Plays all trajectories that are not over, together."""
    folder = Path(cfg.out, "trajectories")
    jobs = [(task, k, trajectory_path(folder, task.id, k)) for k in range(cfg.trajectories) for task, _ in infos]
    records = {path: read_record(path) for *_, path in jobs}
    jobs = [job for job in jobs if not end_reason(records[job[-1]])]
    if not jobs:
        return
    num_rows = min(max(1, TOKENS_TOGETHER // cfg.context), len(jobs))
    model, coder = (None, None) if cfg.model == tables.RANDOM else load_models(cfg, num_rows, load)
    progress = Progress(records, cfg.steps)

    def play(task, k, path):
        draws = f"{cfg.seed} {task.id} {k}"
        if cfg.model == tables.RANDOM:
            policy = miniature.random_policy(cfg, task, random.Random(draws))
        else:
            policy = model_policy(cfg, model)
        search = functools.partial(aide.Env, search=aide.SEARCHES[cfg.search], draws=draws)
        make = {"ml-agent": Env, "mlagentbench": mlagentbench.Env, "aide": search}[cfg.scaffold]
        about = {"model": cfg.model, "coder": cfg.coder, "scaffold": cfg.scaffold}
        play_trajectory(cfg, task, k, path, policy, coder, home, cache, progress, about, make=make)
    try:
        run_parallel(jobs, play, num_rows, progress)
    except ValueError as error:     # with its traceback: it is nothing that settings could put right
        raise RuntimeError("a trajectory could not be played") from error


def evaluate_agent(cfg, home, load):
    """Plays what is left of a run in cfg.out and returns its results, which results.json holds too, also after an
    interruption. home: the folder of blobs/ and cache/. ValueError: a run with other settings is there."""
    folder = Path(cfg.out, "trajectories")
    folder.mkdir(parents=True, exist_ok=True)
    infos = prepare_tasks(cfg)
    identity = run_identity(cfg, infos)
    if any(folder.glob("*.jsonl")):
        before = read_results(cfg.out) or {"settings": {}}
        check_same(before["settings"], identity, cfg.out)
    cache = ResultCache(Path(home, "cache"))
    starters = run_parallel([(cfg, *pair, home, cache) for pair in infos], starter_result, SLOTS.cpus)
    results = {"complete": False, "settings": identity, "final": cfg.final,
               "tasks": {task.id: result for (task, _), result in zip(infos, starters)},
               "versions": {name: version(name) for name in PACKAGES}}
    write_atomic(Path(cfg.out, "results.json"), results)
    try:
        if cfg.model:
            play_tasks(cfg, infos, home, cache, load)
        results["complete"] = True
    finally:
        if cfg.model:
            records = []
            for id, result in results["tasks"].items():
                own = [read_record(trajectory_path(folder, id, k)) for k in range(cfg.trajectories)]
                result |= tables.played_result(own, result)
                records += own
            results["disclosure"] = disclose(records, cfg.model, cfg.coder)
        write_atomic(Path(cfg.out, "results.json"), results)
    return results


def evaluate(cfg, agents=None, load=sample.load, exports=None):
    """Evaluates agents, {name: settings}, by default the one of cfg, and returns [{"name", "results"}]. cfg.out
    receives a report of all, also after an interruption. exports: see tables.build_series."""
    agents = agents or {cfg.model or "starter": cfg}
    folders = {name: agent.out for name, agent in agents.items()}
    trained = cfg.exports or ([] if cfg.task else list(MADE.values()))
    with folder_lock(cfg.out, "eval.py"):
        if exports and (trajectory_files(cfg.out) or any(Path(cfg.out).glob("*/results.json"))):
            raise ValueError(f"{cfg.out} holds an evaluation, whose report.html would be replaced; give another --out")
        try:
            return [{"name": name, "results": evaluate_agent(agent, cfg.out, load)} for name, agent in agents.items()]
        except ValueError:      # what is there may be another model's, and so is the report
            folders = {}
            raise
        finally:
            if folders:
                write_report(Path(cfg.out, "report.html"), folders, trained, exports=exports)


# -- The command

def agents_made(cfg):
    """Returns {name: settings} of random edits and of what sft.py and rl.py have made, for all miniatures."""
    random_agent = replace(cfg, task="all", model=tables.RANDOM, coder="none", out=str(Path(cfg.out, tables.RANDOM)))
    agents = {"random edits": random_agent}
    for name, folder in MADE.items():
        if Path(folder, "agent.json").is_file():
            agents[name] = replace(cfg, task="all", model=folder, out=str(Path(cfg.out, Path(folder).name)))
        else:
            print(f"Not there yet: {name}. Make {folder} with: python {Path(folder).name}.py")
    if len(agents) == 1:
        raise ValueError("there is no agent to evaluate: run python sft.py, then python rl.py. Or run a starter alone: "
                         "python eval.py --task leaf-classification")
    return agents


def agents_exported(cfg):
    """Returns {name: settings} of all exports, and {name: what it took to train}, see read_exports."""
    agents = {}
    taken = {}
    for run in cfg.exports:
        for folder, entries in read_exports(run):
            name = f"{run}, {entries['iteration']}"
            out = Path(cfg.out, re.sub(r"\W+", "-", run), folder.name)
            agents[name] = replace(cfg, task=cfg.task or "all", model=str(folder), out=str(out), exports=())
            taken[name] = entries
    return agents, taken


def fill(values):
    """For cli.parse: returns [(source, settings)] that hold where none was typed; of two sources the first counts."""
    if values["compare"]:
        return []
    model = values["model"]
    scaffold = f"--scaffold {values['scaffold']}", DEFAULTS.get(values["scaffold"], {})
    if values["states"] or not values["exports"] and (values["task"] or model):
        folder = small_files(model) if model != tables.RANDOM else None
        agent = read_agent(folder) if folder else {}
        if values["states"]:
            length = {name: agent[name] for name in agent.keys() & {"max_new_tokens"}}      # a state says the rest
            return [("--states", {"task": "all"}), (f"{model}/agent.json", length)]
        return [scaffold, (f"{model}/agent.json", agent), ("no --task", {"task": "leaf-classification"})]
    folders = [find_exports(run)[0] for run in values["exports"]] or MADE.values()
    agents = {f"{folder}/agent.json": read_agent(folder) for folder in folders}
    if len({str(agent) for agent in agents.values() if agent}) > 1:
        raise ValueError(f"{' and '.join(agents)} differ, so one is of an older run. Train them anew, or evaluate each "
                         "with --model and --task")
    return [scaffold, ("the paper in miniature", {} if values["task"] else MINIATURE), *agents.items()]


def main(argv=None):
    cfg = cli.parse(Settings, argv, fill)

    def work():
        refuse_torchrun("an evaluation")
        if cfg.compare:
            print(f"\nWritten to {compare(cfg)}")
        elif cfg.record_states:
            record_states(cfg)
        elif cfg.states:
            print("\n" + format_states(measure_states(cfg, load_models)))
            print(f"\nWritten to {cfg.out}: states.json, and actions.jsonl with every reply")
        else:
            run(cfg)
    return exit_status("eval.py", work, cfg.out)


def compare(cfg):
    """Writes compare.html, prints its tables, and returns its path."""
    path = Path(cfg.out, "compare.html")
    runs = write_report(path, {folder: folder for folder in cfg.compare}, cfg.compare, cfg.reference)
    print("\n" + tables.format_report(runs, cfg.reference))
    return path


def run(cfg):
    """Runs agents, or starters alone, and prints the tables."""
    agents = None
    taken = None
    if cfg.exports:
        agents, taken = agents_exported(cfg)
    elif not cfg.task:
        agents = agents_made(cfg)
    print("\n" + tables.format_report(evaluate(cfg, agents, exports=taken)))
    if not agents and not cfg.model:
        print(NO_MODEL)
    series = ", exports.json" if cfg.exports else ""
    print(f"\nWritten to {cfg.out}: report.html{series}, and there or below the scores, results.json")


if __name__ == "__main__":
    run_main(main)
