"""Many runs, their records, and the tables made from them.

    python results/run.py NAME            run the missing cells of sweep NAME, then print its tables
    python results/run.py NAME --table    its tables only (Markdown)
    python results/run.py NAME --list     its commands, one per line
    python results/run.py choice          or best, beside, drift, experts, asr, routers: more tables
    python results/run.py figures         the pictures of README and docs that come from records
    python results/run.py --again N       run N random cells anew: how far from their records?
    python results/run.py --script FILE   a script of yours beside sequential LoRA, in runs/own

A sweep (sweeps.py) combines rows, which are a label and a command, with streams and seeds. Each
combination is a cell: one process, whose summary.json becomes a line of results/NAME.jsonl. Cells
that have a line are skipped, so a sweep can be stopped and started again. A line whose settings are
not those that its command has today is dropped, and its cell run again. After a change of the code,
delete a line and its folder in runs/sweep/NAME by hand.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tables  # noqa: E402
from sweeps import SWEEPS, Sweep, cells, folder_of, source  # noqa: E402

from benchmarks import STREAMS  # noqa: E402
from data import count, ordered  # noqa: E402
from eval import configuration  # noqa: E402
from files import InputError, input_errors, read_json, write_text  # noqa: E402

LOCK = threading.Lock()  # two cells may finish at the same time
# what a record keeps of summary.json, where a run has it
KEYS = """stream seed script command commit args stages scorers matrix metrics seconds
    seconds_by_part threads versions peak_memory_mb trainable_parameters stored_parameters cost
    drift routing_accuracy groups energy per_rank old_experts_weight blind novel captions""".split()
# flags that are younger than some records (add new ones), with their value there; None: as today
EARLIER = """script model system device dtype threads skip_missing published match cross
    weight_decay router_steps reglora_lambda hide_sum""".split()
EARLIER = dict.fromkeys(EARLIER) | {"prototype_samples": "inf"}
OWN_SWEEPS = Path("runs/own")  # of --script


def line_of(row: str, record: dict) -> dict:
    """The record of a finished run as a line of its sweep, without the flags that were not set."""
    line = {"row": row} | {key: record[key] for key in KEYS if key in record}
    return line | {"args": {key: x for key, x in record["args"].items() if x is not None}}


def read(name: str) -> dict[tuple, dict]:
    """{(row, stream, seed): record} of the cells of a sweep that have been run."""
    path = SWEEPS[name].records / f"{name}.jsonl"
    lines = read_json(path) if path.exists() else []
    return {(r["row"], r["stream"], r["seed"]): r for r in lines}


def load(name: str) -> dict:
    """{stream: {row: {seed: record}}} of a sweep; a cell that has not been run is None."""
    done, nested = read(name), {stream: {} for stream in SWEEPS[name].streams}
    for row, stream, seed in cells(name):
        nested[stream].setdefault(row, {})[seed] = done.get((row, stream, seed))
    return nested


def position(name: str, cell: tuple) -> tuple:
    """Records are sorted by row, stream and seed; those that the sweep no longer has come last."""
    (row, stream, seed), streams, rows = cell, SWEEPS[name].streams, SWEEPS[name].rows
    return [*rows, row].index(row), [*streams, stream].index(stream), seed


def add(name: str, cell: tuple, folder: Path) -> None:
    """Add a finished run to its sweep. InputError if it is the run of another cell, or none."""
    with LOCK:
        done = read(name)
        if cell in done:  # it was run again for its experts
            return
        done[cell] = line_of(cell[0], read_json(folder / "summary.json", dict))
        if cell[1:] != (was := (done[cell]["stream"], done[cell]["seed"])):
            raise InputError(f"{folder} has stream and seed {was}: the script must heed its flags")
        write(name, done)


def write(name: str, done: dict) -> None:
    """Write the records of a sweep, sorted."""
    lines = [json.dumps(done[key]) + "\n" for key in sorted(done, key=lambda x: position(name, x))]
    write_text(SWEEPS[name].records / f"{name}.jsonl", "".join(lines))


def changed(record: dict, command: str) -> bool:
    """Whether a command has other settings today than its record: a row or a default was edited."""
    script, *flags = shlex.split(command)
    module = importlib.import_module(Path(script).stem)
    with contextlib.redirect_stdout(None):
        args = module.parse(flags)
    now, was = configuration(args, module.__name__), dict(record["args"])
    for settings in (now, was):
        if order := settings.get("order"):  # "reverse", or the names of the stages
            settings["order"] = ordered(list(STREAMS[args.stream].stages), order)
    for flag, (methods, *_) in getattr(module, "OWN_FLAGS", {}).items():
        if args.method not in methods.split(", ") and (flag != "buffer" or now[flag] is None):
            del now[flag]  # of another method
    for key in ("eval_batch_size", "experts" if module.__name__ == "mllm_cl" else ""):
        now.pop(key, None)  # how many answers at once; a path
    if now["epochs"] is None:  # of a folder; the run sets them
        del now["epochs"]
    then = {key: now.get(key) if x is None else x for key, x in EARLIER.items()} | was
    return any(then.get(key) != value for key, value in now.items())


def drop_changed(name: str) -> None:
    """Drop the records and run folders of cells whose settings have changed."""
    done, commands = read(name), cells(name)
    known = [cell for cell in done if cell in commands]
    stale = [cell for cell in known if changed(done[cell], commands[cell])]
    for cell in stale:
        print("its settings have changed since:", *cell, flush=True)
        shutil.rmtree(folder_of(name, *cell), ignore_errors=True)
        del done[cell]
    if stale:
        write(name, done)


def start(command: str) -> str:
    """Run a command, whose last word is the run folder; returns "" or what went wrong. The scripts
    resume a killed run, end immediately if it is finished and refuse one with other settings."""
    words = shlex.split(command)
    folder = Path(words[-1])
    if (folder / "args.json").exists():
        words.append("--resume")
    folder.parent.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # a script may lie anywhere
    with open(f"{folder}.log", "a") as log:
        code = subprocess.call([sys.executable, *words], stdout=log, stderr=log, env=env)
    if not code:
        return ""
    last = Path(f"{folder}.log").read_text(errors="replace").strip().splitlines()[-1:]
    print("failed:", *last, flush=True)
    return f"python {command}\n  ended with exit code {code}, see {folder}.log"


def run_cell(name: str, cell: tuple, command: str) -> str:
    """Run a cell and add its record; returns "" or what went wrong."""
    if wrong := start(command):
        return wrong
    add(name, cell, Path(shlex.split(command)[-1]))
    print("done:", *cell, flush=True)
    return ""


def run_sweep(name: str) -> None:
    """Run the missing cells, two at a time. InputError names those that failed."""
    if SWEEPS[name].records != OWN_SWEEPS:  # their names stand for their settings
        drop_changed(name)
    done, commands = read(name), cells(name)
    missing = [cell for cell in commands if cell not in done]
    later = [cell for cell in missing if "--experts " in commands[cell]]
    needed = {(source(name), stream, seed) for _, stream, seed in later}
    first = [c for c in commands if c in needed or (c in missing and c not in later)]
    failed = []
    for batch in (first, later):
        with ThreadPoolExecutor(2) as pool:
            failed += pool.map(lambda cell: run_cell(name, cell, commands[cell]), batch)
    if any(failed):
        raise InputError("\n".join(filter(None, failed)))


def again(n: int) -> None:
    """Run n randomly chosen cells of all sweeps anew, two at a time, and print how far they are
    from their records. Cells that take the experts of another run are left out."""
    commands = {(name, *cell): line for name in SWEEPS for cell, line in cells(name).items()}
    done = {(name, *cell): record for name in SWEEPS for cell, record in read(name).items()}
    known = [key for key in done if key in commands and "--experts " not in commands[key]]
    known = [key for key in known if not changed(done[key], commands[key])]
    chosen, home, lines = random.sample(known, min(n, len(known))), Path("runs/again"), {}
    for key in chosen:
        *words, folder = shlex.split(commands[key])
        lines[key] = shlex.join([*words, str(home / Path(folder).relative_to("runs/sweep"))])
    for key in lines:
        shutil.rmtree(shlex.split(lines[key])[-1], ignore_errors=True)
    with ThreadPoolExecutor(2) as pool:
        failed = list(filter(None, pool.map(start, lines.values())))
    files = {key: Path(shlex.split(line)[-1]) / "summary.json" for key, line in lines.items()}
    print(tables.again(done, {key: read_json(x, dict) for key, x in files.items() if x.exists()}))
    if failed:
        raise InputError("\n".join(failed))


OWN = ("--flags", "--shared", "--streams", "--seeds")  # belong to --script
DATA = """--data --model --order --limit --limit_test --skip_missing --hold_out --imbalance
    --object_groups""".split()


def own(script: str, flags="", shared="", streams="domains", seeds="0-2") -> str:
    """Add the sweep of a script beside sequential LoRA; returns its name, in which a digest stands
    for the script's content and all flags. InputError if one of them makes no sense."""
    path, names = Path(script), list(dict.fromkeys(streams.split(",")))
    if path.suffix != ".py" or not path.is_file():
        raise InputError(f"--script {script} is no Python file (.py): give its path from {ROOT}")
    try:
        flags, shared = (shlex.join(shlex.split(text)) for text in (flags, shared))
    except ValueError as error:
        raise InputError(f"--flags {flags!r}, --shared {shared!r}: {error}") from None
    if unfair := set(DATA).intersection(re.split("[ =]", flags)):
        raise InputError(f"--flags has {min(unfair)}: both rows need it, so move it to --shared")
    if unknown := [name for name in names if not (name in STREAMS or os.path.isdir(name))]:
        raise InputError(f"--streams has {unknown[0]!r}: use {', '.join(STREAMS)}, or folders")
    parts = [re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part) for part in seeds.split(",")]
    spans = [range(int(p[1]), int(p[2] or p[1]) + 1) if p else () for p in parts]
    numbers = sorted(set().union(*spans))
    if not all(spans) or len(numbers) > 10:  # eval.paired ends there
        raise InputError(f"--seeds {seeds!r} must be like 0-4 or 0,2,5, and at most ten")
    row = f"{path.name} {flags}".strip()
    rows = {"sequential": f"baselines.py {shared} --method sequential"}
    rows[row] = f"{shlex.quote(script)} {shared} {flags}"
    rows = {label: line.replace("{", "{{").replace("}", "}}") for label, line in rows.items()}
    digest = hashlib.sha256(f"{row}\n{shared}\n".encode() + path.read_bytes()).hexdigest()
    name = re.sub(r"[^\w.]+", "-", f"{path.stem} {flags}".strip())[:40] + f"-{digest[:8]}"
    SWEEPS[name] = Sweep(names, numbers, rows, records=OWN_SWEEPS, runs=OWN_SWEEPS)
    return name


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    names = [*SWEEPS, *tables.TABLES]
    parser.add_argument("name", nargs="?", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--table", action="store_true", help="print the tables only")
    parser.add_argument("--list", action="store_true", help="print the commands only")
    about = "run N randomly chosen cells of all sweeps anew and compare them with their records"
    parser.add_argument("--again", type=count, metavar="N", help=about)
    add = parser.add_argument_group("your own script (docs/baselines.md)").add_argument
    about = "compare it with sequential LoRA; it must know --stream --seed --threads --out --resume"
    add("--script", metavar="FILE", help=about)
    add("--flags", help='its flags, such as "--method ewc"')
    add("--shared", metavar="FLAGS", help='flags of both rows, such as "--limit 160"')
    add("--streams", metavar="A,B", help="names or folders (default: domains)")
    add("--seeds", help="such as 0-4 or 0,2,5 (default: 0-2)")
    words = ["", *(sys.argv[1:] if argv is None else argv)]
    # behind a blank argparse takes "--blind" for the text of --flags
    args = parser.parse_args([" " * (a in OWN[:2]) + b for a, b in zip(words, words[1:])])
    given = {flag[2:]: x for flag in OWN if (x := getattr(args, flag[2:])) is not None}
    what = [x for x in (args.name, args.script, args.again) if x is not None]
    if len(what) != 1 or (given and not args.script) or (args.again and args.table | args.list):
        parser.error(f"give NAME, or --again N alone, or --script with any of {', '.join(OWN)}")
    if args.again:
        return again(args.again)
    args.name = args.name or own(args.script, **given)
    if args.name in tables.TABLES:
        print(tables.TABLES[args.name]({name: load(name) for name in SWEEPS}))
    elif args.list:
        print("\n".join(f"python {command}" for command in cells(args.name).values()))
    else:
        if not args.table:
            run_sweep(args.name)
        print(tables.sweep_tables(args.name, load(args.name)))


if __name__ == "__main__":
    os.chdir(ROOT)
    with input_errors():
        main()
