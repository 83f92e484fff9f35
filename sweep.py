"""Run many runs, keep their records, print the tables of the README.

    python sweep.py regime            run every missing cell of the sweep "regime", then its table
    python sweep.py regime --table    the table only, from results/regime/*.json
    python sweep.py regime --list     the commands, one a line
    python sweep.py --readme          renew the tables of all sweeps in README.md and docs/*.md

A sweep is a list of rows; a row is a label and a command; a cell is a row with a seed. Each cell is
one process, and its summary.json becomes the record results/SWEEP/LABEL-STREAM-SEED.json. Cells
that have a record are skipped, so a sweep can be stopped and started at any time; cells that do not
are printed as missing. Cells run on one thread each, --jobs of them at a time.
"""

import argparse
import contextlib
import functools
import importlib
import io
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import data
import eval as evaluation
import model

RESULTS, RUNS = Path("results"), Path("runs/sweep")
PAGES = [data.ROOT / "README.md", *sorted((data.ROOT / "docs").glob("*.md"))]
BENCHES = ("bench", "bench_experts")
SEARCH, REPORT = range(5), range(5, 10)  # seeds to choose settings on, and seeds to report

# --------------------------------------------------------------------------------------------------
# The sweeps: name -> (streams, seeds, {label: command})
# --------------------------------------------------------------------------------------------------

SEQUENTIAL, ASR = "baselines.py --method sequential", "asr.py"
RATES = ("2.5e-4", "5e-4", "1e-3", "2e-3", "4e-3")
MLP = "--targets q,v,gate,up,down"
TWICE = {"domains": "4e-3", "vqacl": "1e-3"}  # the learning rate, for {twice} in a command


def search_rows(flags=""):
    """Sequential LoRA; ASR without L_geo at the paper's weight, and at 10 times of it."""
    rows = {"sequential": SEQUENTIAL}
    for skills in ("stream", "parser", "shared"):
        rows[skills] = f"{ASR} --gamma 0 --skills {skills}"
    rows["shared, beta 5, w = 1"] = f"{ASR} --gamma 0 --skills shared --tau inf --beta 5"
    return {label: f"{command} {flags}".strip() for label, command in rows.items()}


def report_rows(flags=""):
    """The four rows of the paper's ablation, for every kind of skills."""
    rows = {"sequential": SEQUENTIAL, "geometry only": f"{ASR} --beta 0"}
    for skills in ("stream", "parser", "shared"):
        rows[f"spectral only, {skills}"] = f"{ASR} --gamma 0 --skills {skills}"
    for skills in ("stream", "parser", "shared"):
        rows[f"both, {skills}"] = f"{ASR} --skills {skills}"
    return {label: f"{command} {flags}".strip() for label, command in rows.items()}


SWEEPS = {
    # what a new user runs first
    "default": (["vqacl"], range(1), {"asr": ASR, "sequential": f"{ASR} --beta 0 --gamma 0"}),
    # are the mini streams in the regime of the papers?
    "regime": (
        ["domains", "vqacl", "vqav2", "clt-vqa"],
        SEARCH,
        {
            "sequential": SEQUENTIAL,
            "zeroshot": "baselines.py --method zeroshot",
            "joint": "baselines.py --method joint --blind",
        },
    ),
    # the learning rate at which sequential LoRA ends best
    "rate": (
        ["domains", "vqacl"],
        SEARCH[:2],
        {f"lr {rate}": f"{SEQUENTIAL} --lr {rate}" for rate in RATES},
    ),
    # Which skills, weight and LoRA targets make the spectral loss help? On two seeds: at the
    # default targets and rate, at twice that rate, at one where sequential LoRA collapses, and on
    # other layers, at the rates that were best for those.
    "search": (["domains", "vqacl"], SEARCH[:2], search_rows()),
    "search-twice": (["domains", "vqacl"], SEARCH[:2], search_rows("--lr {twice}")),
    "search-drift": (["domains"], SEARCH[:2], search_rows("--lr 1e-2")),
    "search-mlp-domains": (["domains"], SEARCH[:2], search_rows(f"{MLP} --lr 2e-3")),
    "search-mlp-vqacl": (["vqacl"], SEARCH[:2], search_rows(f"{MLP} --lr 1e-3")),
    # on seeds not used before, at the default settings and where attention drifts far
    "report": (["domains", "vqacl"], REPORT, report_rows()),
    "report-drift": (["domains"], REPORT, report_rows("--lr 1e-2")),
}


CRAM, MR_LORA = "cram.py", "mllm_cl.py"
SAME_EXPERTS = f"--experts {RUNS}/{MR_LORA}-{{stream}}-{{seed}}"  # of the row without flags
SAME_LAYERS = "--targets q,k,v,o --rank 9 --alpha 18"  # as CRAM's experts (trigap's may have 10)
# Learning rates, for {best}: at which sequential LoRA ends best (whole streams: the sweeps rate,
# rate-cram and rate-mr-lora).
BEST = {"vqacl": "5e-4", "ucit": "2e-3", "trigap": "1e-3", "dcl": "1e-3", "acl": "5e-4"}
SWEEPS |= {
    # what sequential LoRA ends best with on the streams of the other two methods
    "rate-cram": (
        ["ucit", "trigap"],
        range(1),
        {f"lr {rate}": f"{SEQUENTIAL} {SAME_LAYERS} --lr {rate}" for rate in RATES},
    ),
    "rate-mr-lora": (
        ["dcl", "acl"],
        range(1),
        {f"lr {rate}": f"{SEQUENTIAL} --lr {rate}" for rate in RATES[1:]},
    ),
    # CRAM beside what it has to beat; sequential LoRA has the same layers and rank
    "cram": (
        ["ucit", "trigap"],
        range(5),
        {
            "sequential": f"{SEQUENTIAL} {SAME_LAYERS} --lr {{best}}",
            "one LoRA a task, task known": f"{CRAM} --buffer_share 0 --no-reuse --routing oracle",
            "CRAM": CRAM,
            "CRAM, the paper's constants": f"{CRAM} --paper_constants",
        },
    ),
    "cram-ablation": (
        ["ucit", "trigap"],
        range(3),
        {
            "CRAM": CRAM,
            "one expert a task": f"{CRAM} --no-reuse",
            "fixed rank, novelty off": f"{CRAM} --fixed_rank",
            "no orthogonality": f"{CRAM} --lambda_orth 0",
            "no groups": f"{CRAM} --no-grouping",
            "uniform routing": f"{CRAM} --routing uniform",
            "oracle routing": f"{CRAM} --routing oracle",
            "experts shared more": f"{CRAM} --sigma_share 1",
        },
    ),
    "mr-lora": (
        ["dcl", "acl"],
        range(5),
        {
            "sequential": f"{SEQUENTIAL} --lr {{best}}",
            "sequential, MR-LoRA's rate": SEQUENTIAL,
            "zero-shot": "baselines.py --method zeroshot",
            "replay, 20 a task": "baselines.py --method replay --lr {best}",
            "replay, MR-LoRA's rate": "baselines.py --method replay",
            "joint": "baselines.py --method joint",
            "MR-LoRA": MR_LORA,
            "MR-LoRA, all images": f"{MR_LORA} --no-blind_shots {SAME_EXPERTS}",
            "MR-LoRA, generate": f"{MR_LORA} --router generate {SAME_EXPERTS}",
            "MR-LoRA, prototype": f"{MR_LORA} --router prototype {SAME_EXPERTS}",
            "MR-LoRA, oracle": f"{MR_LORA} --router oracle {SAME_EXPERTS}",
        },
    ),
    # how many kept samples does the router need?
    "shots": (  # the router sees 200 samples a task whatever n is
        ["dcl", "acl"],
        range(3),
        {"20 shots": MR_LORA}
        | {
            f"{n} shots": f"{MR_LORA} --shots {n} --router_epochs {200 // n} {SAME_EXPERTS}"
            for n in (1, 5, 10, 50)
        },
    ),
}


# Everything on everything. dcl and acl are whole, as in the sweep mr-lora; the others are cut to 30
# steps a stage, the same for all methods. There MR-LoRA's router takes steps of 4 kept samples, not
# 16: it needs many steps to tell ten tasks apart by their questions (the sweep search-router).
# Where the pictures differ, half of the passes did (a look at seed 5, not recorded).
# Learning rates come from the sweep rate-all, on a seed that is not reported: {best} for methods in
# which every question passes through all that was learned, {fresh} for those that choose among
# adapters, {joint}.
CUT = {name: "--limit 480 --limit_test 40" for name in ("vqacl", "clt-vqa")}
CUT |= {name: "--limit 160 --limit_test 40" for name in ("coin", "ucit", "trigap")}  # three epochs
ALL = [*CUT, "dcl", "acl"]
CUT_RATES = {  # best, fresh, joint
    "vqacl": ("1e-3", "4e-3", "4e-3"),
    "clt-vqa": ("1e-3", "4e-3", "2e-3"),
    "coin": ("5e-4", "4e-3", "4e-3"),
    "ucit": ("2e-3", "4e-3", "4e-3"),
    "trigap": ("5e-4", "4e-3", "2e-3"),
}
ROUTER = {name: "--router_batch 4" for name in ("vqacl", "clt-vqa")}
ROUTER |= {name: "--router_epochs 5 --router_batch 4" for name in ("coin", "ucit", "trigap")}
METHODS = {
    "sequential": f"{SEQUENTIAL} --lr {{best}} {{cut}}",
    "ASR": f"{ASR} --lr {{best}} {{cut}}",
    "CRAM": f"{CRAM} {{fresh}} {{cut}}",
    "MR-LoRA": f"{MR_LORA} {{fresh}} {{router}} {{cut}}",
    "joint": "baselines.py --method joint {joint} {cut}",
}
OLORA, MOELORA = "baselines.py --method olora", "baselines.py --method moelora"
HIDE = "baselines.py --method hide {fresh} {cut}"
OTHERS = {
    "zeroshot": "baselines.py --method zeroshot {cut}",
    "replay": "baselines.py --method replay --lr {best} {cut}",
    "ewc": "baselines.py --method ewc --lr {best} {cut}",
    "lwf": "baselines.py --method lwf --lr {best} {cut}",
    "olora": f"{OLORA} --olora_lambda 0.05 --lr {{best}} {{cut}}",
    "moelora": f"{MOELORA} --alpha 256 --lr {{best}} {{cut}}",
    "hide": f"{HIDE} --hide_sum 2 --hide_temperature 0.03",
}
SWEEPS |= {
    "rate-all": (
        list(CUT),
        [5],
        {
            f"{label}, lr {rate}": f"{command} --lr {rate} {{cut}}"
            for label, command in (
                ("sequential", SEQUENTIAL),
                ("one LoRA a task, task known", f"{MR_LORA} --router oracle"),
                ("joint", "baselines.py --method joint"),
            )
            for rate in RATES[1:]
        },
    ),
    # The weights of the baselines' own losses. MoELoRA's eight gates begin even, so that its first
    # updates are an eighth of a plain LoRA's: alpha 256 makes up for that. HiDe: how much may every
    # LoRA count outside of the last layer, and how sharp is the choice in it?
    "search-baselines": (
        ["vqacl", "dcl"],
        [5],
        {"sequential": METHODS["sequential"]}
        | {f"ewc, lambda {x}": f"{OTHERS['ewc']} --ewc_lambda {x}" for x in (1, 10, 100, 1000)}
        | {f"lwf, lambda {x}": f"{OTHERS['lwf']} --lwf_lambda {x}" for x in (0.25, 1, 4)}
        | {
            f"olora, lambda {x}": f"{OLORA} --lr {{best}} {{cut}} --olora_lambda {x}"
            for x in (0.05, 0.5)
        }
        | {f"moelora, alpha {x}": f"{MOELORA} --alpha {x} --lr {{best}} {{cut}}" for x in (32, 256)}
        | {
            f"hide, W {w}, T {t}": f"{HIDE} --hide_sum {w} --hide_temperature {t}"
            for w, t in ((1, 0.03), (2, 0.03), (4, 0.03), ("inf", 0.03), (2, 0.1), ("inf", 0.1))
        },
    ),
    # How many steps does a router need that has to tell ten kinds of questions apart?
    "search-router": (
        ["vqacl"],
        [5],
        {
            "steps of 16": f"{MR_LORA} {{fresh}} {{cut}}",
            "steps of 4": f"{MR_LORA} {{fresh}} --router_batch 4 {{cut}}",
        },
    ),
    "all": (ALL, range(5), METHODS),
    "all-baselines": (ALL, range(3), {"sequential": METHODS["sequential"]} | OTHERS),
}


# Two further orders of the stages. MR-LoRA's experts do not depend on the order; its ten routers of
# vqacl are left out, they would take as long as all the rest.
for _stream, _left_out in (("vqacl", {"joint", "MR-LoRA"}), ("dcl", {"joint"})):
    _stages = data.STREAMS[_stream].stages
    _orders = {
        "reversed": _stages[::-1],
        "shuffled": random.Random(0).sample(_stages, len(_stages)),
    }
    for _order, _names in _orders.items():
        _flags = f"--order {','.join(_names)}"
        _rows = {k: f"{line} {_flags}" for k, line in METHODS.items() if k not in _left_out}
        SWEEPS[f"{_stream}-{_order}"] = ([_stream], range(3), _rows)


def _number(value):
    return math.nan if value is None else value


def _last(record, key):
    value = record.get(key, math.nan)
    return value[-1] if isinstance(value, list) else value


def _kept(record):
    """Training samples of earlier stages that the last stage goes back to; nan: joint has all."""
    args, T = record["args"], len(record["stages"])
    if record["script"] == "mllm_cl" and args["router"] != "oracle":
        return args["shots"] * (T - 1)
    if args.get("method") == "joint":
        return math.nan
    return args["buffer"] * (T - 1) if args.get("method") == "replay" else 0


EXTRA = {  # sweep -> {head of a further column: function of a record}
    name: {
        "right group (%)": lambda r: _number(r.get("routing_accuracy", {}).get("group")),
        "right expert (%)": lambda r: _number(r.get("routing_accuracy", {}).get("expert")),
        "old experts' weight (%)": lambda r: 100 * np.mean(r.get("old_experts_weight", math.nan)),
        "stored (1000)": lambda r: _last(r, "stored_parameters") / 1e3,
        "of one LoRA a task (%)": lambda r: (
            100
            * _last(r, "stored_parameters")
            / (r.get("per_rank", math.nan) * r["args"]["rank"] * len(r["stages"]))
        ),
    }
    for name in ("cram", "cram-ablation")
}
EXTRA["cram-ablation"]["energy in older outputs (%)"] = lambda r: (
    100 * np.mean([x for x in r["energy"] if x is not None] or [math.nan])
)
EXTRA["mr-lora"] = EXTRA["shots"] = EXTRA["search-router"] = {
    "MFT": lambda r: _number(r["metrics"]["MFT"]),
    "routed right (%)": lambda r: _last(r, "routing_accuracy"),
    "answers": lambda r: r.get("cost", {}).get("generations", math.nan),
    "seconds": lambda r: r["seconds"],
}


def _routed(record):
    """Test questions that got the right expert in the end, in percent; nan: there is no router."""
    routed = record.get("routing_accuracy", [None])
    return _number(routed["expert"] if isinstance(routed, dict) else routed[-1])


for _name in ("all", "all-baselines"):
    EXTRA[_name] = {
        "MFT": EXTRA["mr-lora"]["MFT"],
        "stored (1000)": lambda r: _last(r, "stored_parameters") / 1e3,
        "samples kept": _kept,
        "seconds": lambda r: r["seconds"],
    }
EXTRA["all"]["right expert (%)"] = _routed


def file_name(label: str) -> str:
    """The label as it stands in the names of files."""
    return re.sub(r"\s+", "_", re.sub(r"[,=']", "", label))


def cells(name: str):
    """Yield (record path, command line) of every cell of a sweep."""
    streams, seeds, rows = SWEEPS[name]
    for seed in seeds:  # seed outside: a stopped sweep has more whole comparisons
        for stream in streams:
            for label, command in rows.items():
                stem = f"{file_name(label)}-{stream}-{seed}"
                yield RESULTS / name / f"{stem}.json", command_line(name, command, stream, seed)


def command_line(name: str, command: str, stream, seed) -> str:
    """A row's command for one stream and seed. The run folder is named by the command: two sweeps
    that ask for the same run share it."""
    rates = {"twice": TWICE.get(stream), "best": BEST.get(stream), "cut": CUT.get(stream, "")}
    rates |= {"router": "", "fresh": "", "joint": ""}
    if "{cut}" in command and rates["cut"]:
        rates["best"], fresh, joint = CUT_RATES[stream]
        rates |= {"fresh": f"--lr {fresh}", "joint": f"--lr {joint}", "router": ROUTER[stream]}
    own = " ".join(command.format(stream=stream, seed=seed, **rates).split())
    flags = own.split(" --experts runs")[0].replace("--", "")
    threads = "" if name == "default" else " --threads 1"  # that one is as a user starts it
    out = RUNS / f"{file_name(flags)}-{stream}-{seed}"
    return f"{own} --stream {stream} --seed {seed}{threads} --out {out}"


ONE_AT_A_TIME = threading.RLock()  # several cells may wait for the same experts


def run_cell(record: Path, line: str) -> str:
    """Run one cell unless its record exists; "" or one line that says what went wrong."""
    if record.exists():
        return ""
    # the record of the run that made the experts may be there without its folder
    if needed := re.search(r"--experts (runs/\S+)", line):
        own, experts = line[line.index("--stream") : line.index("--out")], Path(needed[1])
        with ONE_AT_A_TIME:
            if not (experts / "summary.json").exists():
                again = run_cell(experts / "record.json", f"{MR_LORA} {own}--out {experts}")
                if again:
                    return again
    out = Path(shlex.split(line)[-1])
    if (out / "summary.json").exists():  # another sweep has run the same
        if changed := outdated(evaluation.read_run(out), line):
            return f"{out} is not what its command does now ({changed}): delete it"
    else:
        resume = " --resume" if (out / "args.json").exists() else ""
        log = out.with_name(out.name + ".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as file:
            code = subprocess.call(
                [sys.executable, *shlex.split(line + resume)], stdout=file, stderr=file
            )
        if code:
            return f"exit code {code}: python {line}{resume} (see {log})"
    record.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(out / "summary.json", record)
    print(f"{record.stem}: {evaluation.read_json(record)['metrics']}", flush=True)
    return ""


def records_of(name: str, stream: str) -> dict[str, dict]:
    """{file stem: record, with its label} of the cells of a sweep that have run on a stream."""
    found = {}
    for path, line in cells(name):
        if path.exists() and path.stem.rsplit("-", 1)[0].endswith(f"-{stream}"):
            label = path.stem.rsplit("-", 1)[0].removesuffix(f"-{stream}")
            found[path.stem] = evaluation.load_record(path) | {"label": label}
            if found[path.stem]["model_sha256"] != (shipped := _shipped()):
                raise data.InputError(
                    f"{path} was made with another tiny LLaVA than the one in assets, "
                    f"{shipped[:12]}: delete it and run {name} again"
                )
            if changed := outdated(found[path.stem], line):
                raise data.InputError(
                    f"{path} is not what its command does now ({changed}): delete it, and its run "
                    f"folder if it is there, and run {name} again"
                )
    return found


# what an answer does not depend on, and the seed, which is in the record's name
SAME_NUMBERS = {"out", "resume", "eval_batch_size", "seed"}


def outdated(record: dict, line: str) -> str:
    """Which settings of a record its command would not have today, as "lr 0.1, now 0.2"; or ""."""
    now, before = _settings(re.sub(r" --(experts runs/|seed |out )\S+", "", line)), []
    args, same = record["args"], SAME_NUMBERS
    if record["script"] == "mllm_cl":
        same = same | {"experts"}  # the folder of a run; in baselines.py a number
    if record["script"] == "baselines":  # ewc_lambda is read by ewc alone
        others = set(importlib.import_module("baselines").METHODS) - {args["method"]}
        same = same | {key for key in args if key.split("_")[0] in others}
    for key in sorted(now.keys() & args.keys() - same):
        if now[key] is not None and evaluation.jsonable(now[key]) != args[key]:
            before.append(f"{key} {args[key]}, now {now[key]}")
    return "; ".join(before)


@functools.cache
def _settings(line: str) -> dict:
    """All flags of a command line, with the defaults that its script fills in."""
    script, *flags = shlex.split(line)
    module = importlib.import_module(Path(script).stem)
    with contextlib.redirect_stdout(io.StringIO()):  # what was chosen
        args = data.resolve_defaults(module.parse(flags))
        if check := getattr(module, "check_stream", None):
            row = data.STREAMS.get(args.stream, data.Row([]))
            endless = range(10**9)  # training samples
            stages = [types.SimpleNamespace(name=name, train=endless) for name in row.stages]
            check(args, types.SimpleNamespace(stages=stages, descriptions=row.descriptions))
    return vars(args)


@functools.cache
def _shipped() -> str:
    return evaluation.model_sha256(str(data.ROOT / "assets" / "tiny-llava"))


def sweep_table(name: str, markdown: bool) -> str:
    """One table per stream: mean +- std over seeds, paired differences to the first row."""
    streams, seeds, rows = SWEEPS[name]
    parts = []
    for stream in streams:
        found = records_of(name, stream)
        table = "missing: no record yet"
        if found:
            wanted = {label: {"label": file_name(label)} for label in rows}
            first = next(iter(rows))
            table = evaluation.record_table(
                found, wanted, first, list(seeds), markdown, EXTRA.get(name)
            )
        parts.append(f"`--stream {stream}`, {name}, seeds {seeds[0]} to {seeds[-1]}:\n\n{table}")
    return "\n\n".join([*parts, *([commands(name)] if markdown else [])])


def commands(name: str) -> str:
    """The command behind every row of a sweep, with STREAM and SEED to fill in, folded away."""
    streams, _, rows = SWEEPS[name]
    by_stream = re.search("{(twice|best|cut)}", str(rows))
    lines = [
        f"# {label}\npython {command_line(name, command, stream, 'SEED')}"
        for stream in (streams if by_stream or len(streams) == 1 else ["STREAM"])
        for label, command in rows.items()
    ]
    head = "<details><summary>the command behind each row, for one seed</summary>"
    if "--experts" in str(rows):
        head += "\n\nRows with `--experts` need the run that made those, the one without it, first."
    return "\n".join([head, "", "```bash", *lines, "```", "", "</details>"])


def regime_table(markdown: bool) -> str:
    """Are the mini streams like the real ones? Means over seeds, in points, and what is wanted."""
    lines = [["", "wanted", *SWEEPS["regime"][0]]]
    columns = []
    for stream in SWEEPS["regime"][0]:
        rows = {}
        for record in records_of("regime", stream).values():
            rows.setdefault(record["label"], []).append(record)
        if len(rows) < 3:
            columns.append(["missing"] * 8)
            continue
        seeds = set.intersection(*({r["seed"] for r in v} for v in rows.values()))
        if not seeds:
            columns.append(["missing"] * 8)
            continue
        rows = {k: [r for r in v if r["seed"] in seeds] for k, v in rows.items()}
        mean = {k: np.mean([r["metrics"]["AP"] for r in v]) for k, v in rows.items()}
        forgotten = np.mean([r["metrics"]["AF"] for r in rows["sequential"]])
        kinds = [r["blind"]["seeing_blind_by_kind"] for r in rows["joint"]]
        gaps = {k: np.mean([x[k][0] - x[k][1] for x in kinds]) for k in kinds[0] if k != "judge"}
        least = min(gaps, key=gaps.get)
        columns.append([
            ", ".join(map(str, sorted(seeds))),
            f"{mean['zeroshot']:.1f}", f"{mean['joint']:.1f}",
            f"{100 * mean['zeroshot'] / mean['joint']:.0f}%", f"{mean['sequential']:.1f}",
            f"{forgotten:.1f}", f"{mean['joint'] - mean['sequential']:.1f}",
            f"{gaps[least]:.1f} ({least})",
        ])  # fmt: skip
    what = (
        ("seeds so far", f"0 to {SEARCH[-1]}"),
        ("zero-shot AP", ""),
        ("joint AP", ""),
        ("zero-shot / joint", "30% to 90%"),
        ("sequential AP", ""),
        ("sequential AF", "10 to 30"),
        ("joint - sequential", "5 or more"),
        ("joint - blind, smallest kind but yes/no", "20 or more"),
    )
    lines += [[*w, *(c[k] for c in columns)] for k, w in enumerate(what)]
    table = evaluation.grid(lines, markdown)
    return f"{table}\n\n{commands('regime')}" if markdown else table


def default_table(markdown: bool) -> str:
    """The metrics and the cost of the first run of the sweep "default", beside sequential LoRA."""
    found = {record["label"]: record for record in records_of("default", "vqacl").values()}
    if not found:
        return "missing: no record yet"
    record, names = found["asr"], {"asr": "this run", "sequential": "sequential LoRA"}
    runs = {names[label]: found[label] for label in names if label in found}
    table = evaluation.compare(runs, markdown)
    cost = (f"{record['seconds']:.0f} seconds on {record['threads']} threads, "
            f"{record['peak_memory_mb']:.0f} MB, "
            f"{record['trainable_parameters']:,} trained parameters")  # fmt: skip
    return f"{table}\n\n{cost}"


def rows_of(name: str, stream: str) -> dict[str, dict[int, dict]]:
    """{label: {seed: record}} of a sweep's records on a stream."""
    rows = {label: {} for label in SWEEPS[name][2]}
    files = {file_name(label): label for label in rows}
    for record in records_of(name, stream).values():
        rows[files[record["label"]]][record["seed"]] = record
    return rows


def _over_seeds(rows, label, value) -> str:
    """Mean of a number over the seeds of a row."""
    return _mean([value(record) for record in rows[label].values()])


def _apart(rows, label, other, key="AP") -> str:
    """How far a row lies from another, with its interval."""
    seeds = sorted(rows[label].keys() & rows[other].keys())
    if not seeds:
        return "missing"
    a, b = ([rows[x][seed]["metrics"][key] for seed in seeds] for x in (label, other))
    mean, low, high, n = evaluation.paired(a, b)
    return f"{mean:+.1f}" + (f" [{low:+.1f}, {high:+.1f}]" if n > 1 else "")


def _share_of_forgetting(rows) -> str:
    seeds = rows["CRAM"].keys() & rows["sequential"].keys()
    if not seeds:
        return "missing"
    forgotten = [[rows[x][k]["metrics"]["AF"] for k in seeds] for x in ("CRAM", "sequential")]
    return f"{100 * np.mean(forgotten[0]) / np.mean(forgotten[1]):.1f}%"


ONE, ORACLE = "one LoRA a task, task known", "MR-LoRA, oracle"
GOALS = {  # table -> (sweep, [(what, wanted, function of rows_of)])
    "asr-goals": ("report", [
        (f"{what} - {what} of sequential LoRA", wanted,
         lambda r, what=what: _apart(r, "both, parser", "sequential", what))
        for what, wanted in (("AP", "above 0"), ("AF", "below 0"))
    ]),
    "cram-goals": ("cram", [
        ("forgotten (AF), of what sequential LoRA forgets", "below 25%", _share_of_forgetting),
        ("AP - AP of one LoRA a task, task known", "-3.0 or more", lambda r: _apart(
            r, "CRAM", ONE)),
        ("stored, of one LoRA a task (%)", "80 or less", lambda r: _over_seeds(
            r, "CRAM", EXTRA["cram"]["of one LoRA a task (%)"])),
    ]),
    "mr-lora-goals": ("mr-lora", [
        ("routed right in the end (%)", "97 or more on dcl", lambda r: _over_seeds(
            r, "MR-LoRA", lambda x: _last(x, "routing_accuracy"))),
        ("MFN - MFN with the task known", "within 1", lambda r: _apart(r, "MR-LoRA", ORACLE)),
        ("BWT", "within 0.5 of 0", lambda r: _over_seeds(
            r, "MR-LoRA", lambda x: x["metrics"]["BWT"])),
    ]),
}  # fmt: skip


def goals_table(name: str, markdown: bool) -> str:
    """What was hoped for, and what was measured (mean over seeds, differences paired by seed)."""
    sweep, goals = GOALS[name]
    streams = SWEEPS[sweep][0]
    found = [rows_of(sweep, stream) for stream in streams]
    lines = [["", "wanted", *streams]]
    lines += [[what, wanted, *(value(rows) for rows in found)] for what, wanted, value in goals]
    return evaluation.grid(lines, markdown)


def _scores(*keys):
    return lambda record: [_number(record["metrics"][key]) for key in keys]


def _task(i):
    return lambda record: [record["matrix"][-1][i]]


AP_AF, MCL = _scores("AP", "AF"), _scores("MFT", "MFN", "MAA", "BWT")
UCIT = "87.23 92.17 60.55 80.43 70.67 57.35".split()
TRIGAP = "43.60 44.33 16.92 66.00 39.17 91.83 12.83 24.27 79.49 59.53".split()
# table -> (what the numbers are, [(row, published, sweep, stream, label, our numbers)])
BESIDE = {
    "beside-asr": ("AP / AF", [
        ("VQA v2: sequential", "44.1 / 18.3", "regime", "vqav2", "sequential", AP_AF),
        ("VQA v2: joint", "55.0 / 0", "regime", "vqav2", "joint", AP_AF),
        ("VQACL: sequential", "40.2 / 19.5", "report", "vqacl", "sequential", AP_AF),
        ("VQACL: ASR", "48.6 / 5.1", "report", "vqacl", "both, parser", AP_AF),
        ("VQACL: joint", "52.4 / 0", "regime", "vqacl", "joint", AP_AF),
        *((f"CLT-VQA: {label}", paper, "all", "clt-vqa", label, AP_AF) for label, paper in
          (("sequential", "36.8 / 22.5"), ("ASR", "46.2 / 5.5"), ("joint", "49.8 / 0"))),
    ]),
    "beside-asr-last": ("Last / Avg", [
        (f"{stream}: {label}", paper, "all", stream.lower(), label, _scores("AP", "Avg"))
        for stream, papers in (("CoIN", ("49.3 / 47.2", "61.4 / 60.0", "64.5 / 63.1")),
                               ("UCIT", ("41.5 / 39.8", "53.1 / 51.5", "56.2 / 54.8")))
        for label, paper in zip(("sequential", "ASR", "joint"), papers, strict=True)
    ]),
    "beside-cram": ("score of a task after the last stage", [
        *((f"UCIT: {task}", paper, "cram", "ucit", "CRAM", _task(i)) for i, (task, paper)
          in enumerate(zip(data.STREAMS["ucit"].stages, UCIT, strict=True))),
        *((f"TriGap: {task}", paper, "cram", "trigap", "CRAM", _task(i)) for i, (task, paper)
          in enumerate(zip(data.STREAMS["trigap"].stages, TRIGAP, strict=True))),
    ]),
    "beside-mr-lora": ("MFT / MFN / MAA / BWT", [
        ("DCL: zero-shot", "- / 34.85 / - / -", "mr-lora", "dcl", "zero-shot", MCL),
        ("DCL: sequential", "64.98 / 53.00 / 61.13 / -14.97", "mr-lora", "dcl", "sequential", MCL),
        ("DCL: replay, 20 a task", "66.32 / 60.60 / 64.72 / -7.15", "mr-lora", "dcl",
         "replay, 20 a task", MCL),
        ("DCL: MR-LoRA", "69.64 / 69.63 / 71.06 / -0.01", "mr-lora", "dcl", "MR-LoRA", MCL),
        ("ACL: zero-shot", "- / 33.05 / - / -", "mr-lora", "acl", "zero-shot", MCL),
        ("ACL: sequential", "41.28 / 36.41 / 36.58 / -6.49", "mr-lora", "acl", "sequential", MCL),
        ("ACL: replay, 20 a task", "40.32 / 35.41 / 36.32 / -6.55", "mr-lora", "acl",
         "replay, 20 a task", MCL),
        ("ACL: MR-LoRA", "41.89 / 41.88 / 38.86 / -0.02", "mr-lora", "acl", "MR-LoRA", MCL),
    ]),
    "beside-mr-lora-tasks": ("score of every task after the last stage", [
        (f"{stream.upper()} ({', '.join(data.STREAMS[stream].stages)}): {name}", paper,
         "mr-lora", stream, label, lambda record: record["matrix"][-1])
        for stream, rows in (
            ("dcl", (("zero-shot", "32.29 / 28.28 / 15.59 / 35.55 / 62.56"),
                     ("sequential", "69.65 / 41.59 / 25.43 / 40.88 / 87.45"),
                     ("MR-LoRA", "80.87 / 65.32 / 54.12 / 56.71 / 91.12"),
                     ("MR-LoRA, oracle", "-"))),
            ("acl", (("zero-shot", "31.20 / 30.20 / 60.79 / 10.00"),
                     ("sequential", "23.60 / 33.70 / 55.84 / 32.50"),
                     ("MR-LoRA", "33.70 / 36.20 / 65.10 / 32.50"), ("MR-LoRA, oracle", "-"))))
        for label, paper in rows for name in (label.replace("MR-LoRA, oracle", "task known"),)
    ]),
}  # fmt: skip


def beside_table(name: str, markdown: bool) -> str:
    """The papers' numbers, quoted, and ours on the mini stream of the same name."""
    what, rows = BESIDE[name]
    lines = [[what, "published, LLaVA-1.5-7B", "tiny LLaVA, mini stream, ours",
              "LLaVA-1.5-7B, ours"]]  # fmt: skip
    for row, published, sweep, stream, label, numbers in rows:
        found = [numbers(record) for record in rows_of(sweep, stream)[label].values()]
        ours = " / ".join(map(evaluation.show, np.mean(found, 0))) if found else "missing"
        seeds = ", ".join(str(seed) for seed in sorted(rows_of(sweep, stream)[label]))
        ours += f" (seed{'s' * (len(found) > 1)} {seeds})" if found else ""
        lines.append([row, published, ours, "not run yet"])
    return evaluation.grid(lines, markdown)


def tasks_table(sweep: str, stream: str, markdown: bool) -> str:
    """Score of every task after the last stage, a row of a sweep a line: means over the seeds."""
    lines = [["in the end, %", *data.STREAMS[stream].stages]]
    for label, runs in rows_of(sweep, stream).items():
        ends = [record["matrix"][-1] for record in runs.values()]
        lines.append([label, *map(_mean, zip(*ends, strict=True))] if ends else
                     [label, *["missing"] * (len(lines[0]) - 1)])  # fmt: skip
    return evaluation.grid(lines, markdown)


NAMES = {"zeroshot": "zero-shot", "ewc": "EWC", "lwf": "LwF", "olora": "O-LoRA"}
NAMES |= {"moelora": "MoELoRA", "hide": "HiDe"}


def choice_table(markdown: bool) -> str:
    """Which method? AP of every method on every stream of the sweep "all", means over the seeds;
    then what it learns, forgets, stores, keeps and takes, means over the streams."""
    labels = ("sequential", *OTHERS, "ASR", "CRAM", "MR-LoRA", "joint")
    found = {stream: rows_of("all-baselines", stream) | rows_of("all", stream) for stream in ALL}
    seeds = {s: set.intersection(*([set(x) for x in rows.values() if x] or [set()]))
             for s, rows in found.items()}  # fmt: skip
    seconds = {s: {k: r["seconds"] for k, r in found[s]["sequential"].items()} for s in ALL}
    columns = {
        "mean AP": lambda r: r["metrics"]["AP"],
        "MFT": EXTRA["all"]["MFT"],
        "AF": lambda r: _number(r["metrics"]["AF"]),
        **{head: EXTRA["all"][head] for head in ("stored (1000)", "samples kept")},
        "time (sequential: 1)": lambda r: r["seconds"] / seconds[r["stream"]][r["seed"]],
    }
    lines = [["AP", *ALL, *columns]]
    for label in labels:
        runs = [[found[s][label][k] for k in seeds[s] if k in found[s][label]] for s in ALL]
        line = [_mean([r["metrics"]["AP"] for r in some]) for some in runs]
        for value in columns.values():  # of a stream, then of all streams: none counts more
            means = [np.mean([value(r) for r in some]) for some in runs if some]
            line.append(_mean(means) if all(runs) else "missing")
        lines.append([NAMES.get(label, label), *line])
    kept = [", ".join(map(str, sorted(seeds[s]))) or "none" for s in ALL]
    lines.append(["seeds that all rows have", *kept, *[""] * len(columns)])
    return evaluation.grid(lines, markdown)


def _mean(numbers) -> str:
    return evaluation.show(np.mean(numbers)) if len(numbers) else "missing"


def drift_table(markdown: bool) -> str:
    """Correlation of the drift of a skill's spectrum with the points that it has lost."""
    lines = [["runs", "seeds", "r [95%] with L_spec", "without, L_geo alone"]]
    for sweep in ("report", "report-drift"):
        for stream in SWEEPS[sweep][0]:
            found = [r for r in records_of(sweep, stream).values() if "drift" in r]
            line, seeds = [], []
            for spectral in (True, False):
                own = [r for r in found if (r["args"]["beta"] > 0) == spectral]
                if own:
                    _, (r, low, high), n = evaluation.drift_correlation(own)
                    line.append(f"{r:.2f} [{low:.2f}, {high:.2f}]")
                    seeds.append(str(n))
                else:
                    line.append("missing")
            lines.append([f"{sweep}, {stream}", " and ".join(dict.fromkeys(seeds)) or "-", *line])
    return evaluation.grid(lines, markdown)


def deviations(script: str) -> str:
    """The numbered list "Where we differ" in the head of a script."""
    head = Path(f"{script}.py").read_text().split('"""')[1].split("Where we differ")[1]
    title, rest = head.split("\n", 1)
    items = re.sub(r"\n    +(?=\S)", " ", f"\n{rest.strip()}")  # a number, one line
    items = re.sub(r"\n *(?=\d+\. )", "\n", items)
    return f"Where we differ{title}\n" + re.sub(r"\n(?=.* go back with)", "\n\n", items)


def pretrain_table(markdown: bool) -> str:
    """Accuracy per question kind of two pre-training runs that differ in nothing but the seed."""
    folder = Path("assets/tiny-llava")
    runs = [
        evaluation.read_json(folder / name) for name in ("pretrain.json", "pretrain-again.json")
    ]
    lines = [["picture: question", *(f"seed {run['seed']}" for run in runs), "without picture"]]
    for kind, value in runs[0]["accuracy"].items():
        blind = runs[0]["blind"][kind]
        lines.append([kind, f"{value:.1f}", f"{runs[1]['accuracy'][kind]:.1f}", f"{blind:.1f}"])
    means = [np.mean(list(part.values())) for part in
             (runs[0]["accuracy"], runs[1]["accuracy"], runs[0]["blind"])]  # fmt: skip
    lines.append(["mean", *(f"{value:.1f}" for value in means)])
    return evaluation.grid(lines, markdown)


def bench_table(name: str, markdown: bool) -> str:
    """What tests/bench.py or tests/bench_experts.py has measured and saved."""
    if not (path := RESULTS / f"{name}.json").exists():
        return "missing: no record yet"
    tables = evaluation.read_json(path)["tables"]
    return "\n\n".join(evaluation.grid(table, markdown) for table in tables)


def block(name: str, markdown: bool = True) -> str:
    """The table NAME of the README."""
    special = {"regime": regime_table, "default": default_table} | OTHER_TABLES
    return special[name](markdown) if name in special else sweep_table(name, markdown)


OTHER_TABLES = {"drift": drift_table, "choice": choice_table, "pretrain": pretrain_table}
for _function, _names in ((goals_table, GOALS), (beside_table, BESIDE), (bench_table, BENCHES)):
    OTHER_TABLES |= {_name: functools.partial(_function, _name) for _name in _names}


for _sweep in ("cram", "cram-ablation"):
    OTHER_TABLES[f"{_sweep}-tasks"] = functools.partial(tasks_table, _sweep, "ucit")


def line_of(file: str, name: str) -> int:
    """Where `def name` or `class name` stands in a file, from 1."""
    lines = Path(file).read_text().splitlines()
    found = [k for k, x in enumerate(lines) if re.match(rf"(def|class) {name}\b", x)]
    if not found:
        raise data.InputError(f"a page links to {name} in {file}: there is no such function")
    return 1 + found[0]


def write_page(path: Path) -> None:
    """Put tables between the marks <!-- table NAME --> and <!-- end -->: sweeps, memory, hours; and
    line numbers into links like [name](../asr.py#L1)."""
    text = re.sub(
        r"\[(\w+)\]\(\.\./(\w+\.py)#L\d+\)",
        lambda m: f"[{m[1]}](../{m[2]}#L{line_of(m[2], m[1])})",
        path.read_text(),
    )
    written = {"memory": model.memory_table, "hours": model.hours_table}
    written |= {
        f"deviations-{script}": functools.partial(deviations, script)
        for script in ("asr", "cram", "mllm_cl")
    }
    for name in [*SWEEPS, *OTHER_TABLES, *written]:
        start, end = f"<!-- table {name} -->\n", "<!-- end -->"
        if start in text:
            before, rest = text.split(start)
            table = written[name]() if name in written else block(name)
            text = f"{before}{start}\n{table}\n\n{end}{rest.split(end, 1)[1]}"
    path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("name", nargs="?", choices=SWEEPS, help="the sweep to run")
    parser.add_argument("--readme", action="store_true", help="renew the tables of README and docs")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time (default: 2)")
    parser.add_argument("--list", action="store_true", help="print the commands only")
    parser.add_argument("--table", action="store_true", help="print the tables only")
    parser.add_argument("--markdown", action="store_true", help="tables as Markdown")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs} must be 1 or more")
    os.chdir(data.ROOT)
    if args.readme:
        for page in PAGES:
            write_page(page)
        return
    if not args.name:
        parser.error(f"name a sweep: {', '.join(SWEEPS)}")
    todo = list(cells(args.name))
    if args.list:
        print("\n".join(f"python {line}" for _, line in todo))
        return
    if not args.table:
        for stream in SWEEPS[args.name][0]:
            records_of(args.name, stream)  # outdated ones are reported before any work
        errors = []
        for later in (False, True):  # cells that take the experts of another cell wait for it
            part = [cell for cell in todo if ("--experts runs" in cell[1]) == later]
            with ThreadPoolExecutor(args.jobs) as pool:
                errors += [e for e in pool.map(lambda cell: run_cell(*cell), part) if e]
        for error in errors:
            print(f"error: {error}", file=sys.stderr)
        if errors:
            sys.exit(1)
    print(block(args.name, args.markdown))


if __name__ == "__main__":
    try:
        main()
    except data.InputError as error:
        data.fail(error)
