"""Many runs, their records, and the tables made from them.

    python results/run.py NAME            run the missing cells of sweep NAME, then print its tables
    python results/run.py NAME --table    its tables only (Markdown)
    python results/run.py NAME --list     its commands, one per line
    python results/run.py choice          other tables: choice, beside, drift; figures of the docs

A sweep (sweeps.py) combines rows, which are a label and a command, with streams and seeds. Each
combination is a cell: one process, whose summary.json becomes a line of results/NAME.jsonl. Cells
that have a line are skipped, so a sweep can be stopped and started again. To run a cell again,
delete its line and its folder in runs/sweep/NAME.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tables  # noqa: E402
from sweeps import SWEEPS, cells, source  # noqa: E402

from files import InputError, input_errors  # noqa: E402

RESULTS = ROOT / "results"
LOCK = threading.Lock()  # two cells may finish at the same time
# what a record keeps of summary.json, where a run has it
KEYS = """stream seed script command commit args stages scorers matrix metrics seconds
    seconds_by_part threads peak_memory_mb trainable_parameters stored_parameters drift cost
    routing_accuracy groups energy per_rank old_experts_weight blind novel captions""".split()


def line_of(row: str, record: dict) -> dict:
    """The record of a finished run as a line of its sweep, without the flags that were not set."""
    line = {"row": row} | {key: record[key] for key in KEYS if key in record}
    return line | {"args": {key: x for key, x in record["args"].items() if x is not None}}


def read(name: str) -> dict[tuple, dict]:
    """{(row, stream, seed): record} of the cells of a sweep that have been run."""
    path = RESULTS / f"{name}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {(r["row"], r["stream"], r["seed"]): r for r in map(json.loads, lines)}


def load(name: str) -> dict:
    """{stream: {row: {seed: record}}} of a sweep; a cell that has not been run is None."""
    done, nested = read(name), {stream: {} for stream in SWEEPS[name].streams}
    for row, stream, seed in cells(name):
        nested[stream].setdefault(row, {})[seed] = done.get((row, stream, seed))
    return nested


def position(name: str, cell: tuple) -> tuple:
    """Records are sorted by row, stream and seed."""
    row, stream, seed = cell
    return list(SWEEPS[name].rows).index(row), SWEEPS[name].streams.index(stream), seed


def add(name: str, cell: tuple, folder: Path) -> None:
    """Add a finished run to its sweep. The file is replaced as a whole: a kill cannot tear it."""
    with LOCK:
        done = read(name)
        if cell in done:  # it was run again for its experts
            return
        done[cell] = line_of(cell[0], json.loads((folder / "summary.json").read_text()))
        lines = [json.dumps(done[key]) for key in sorted(done, key=lambda key: position(name, key))]
        part = RESULTS / f"{name}.jsonl.part"
        part.write_text("\n".join(lines) + "\n")
        os.replace(part, RESULTS / f"{name}.jsonl")


def run_cell(name: str, cell: tuple, command: str) -> str:
    """Run a cell and add its record; returns "" or what went wrong.

    A killed run is resumed, a finished one ends immediately, and one with other settings is
    refused: the scripts do that.
    """
    words = shlex.split(command)
    folder = Path(words[-1])
    if (folder / "args.json").exists():
        words.append("--resume")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "a") as log:
        code = subprocess.call([sys.executable, *words], stdout=log, stderr=log)
    if code:
        return f"python {command}\n  ended with exit code {code}, see {folder}.log"
    add(name, cell, folder)
    print("done:", *cell, flush=True)
    return ""


def run_sweep(name: str) -> None:
    """Run the missing cells, two at a time. InputError names those that failed."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    names = [*SWEEPS, *tables.TABLES]
    parser.add_argument("name", choices=names, metavar="NAME", help=f"one of {', '.join(names)}")
    parser.add_argument("--table", action="store_true", help="print the tables only")
    parser.add_argument("--list", action="store_true", help="print the commands only")
    args = parser.parse_args()
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
