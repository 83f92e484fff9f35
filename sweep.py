"""Run many runs, keep their records, print the tables of the README.

    python sweep.py regime            run every missing cell of the sweep "regime", then its table
    python sweep.py regime --table    the table only, from results/regime/*.json
    python sweep.py regime --list     the commands, one a line

A sweep is a list of rows; a row is a label and a command; a cell is a row with a seed. Each cell is
one process, and its summary.json becomes the record results/SWEEP/LABEL-STREAM-SEED.json. Cells
that have a record are skipped, so a sweep can be stopped and started at any time; cells that do not
are printed as missing. Every cell runs on one thread, --jobs of them at a time.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import data
import eval as evaluation

RESULTS, RUNS = Path("results"), Path("runs/sweep")
SEARCH, REPORT = range(5), range(5, 10)  # seeds to choose settings on, and seeds to report

# --------------------------------------------------------------------------------------------------
# The sweeps: name -> (streams, seeds, {label: command})
# --------------------------------------------------------------------------------------------------

SWEEPS = {
    "regime": (
        ["vqacl", "vqav2", "clt-vqa", "domains"],
        SEARCH,
        {
            "sequential": "baselines.py --method sequential",
            "zeroshot": "baselines.py --method zeroshot",
            "joint": "baselines.py --method joint --blind",
        },
    ),
}


def cells(name: str):
    """Yield (record path, command line) of every cell of a sweep."""
    streams, seeds, rows = SWEEPS[name]
    for seed in seeds:  # seed outside: a stopped sweep has whole comparisons, not half of the rows
        for stream in streams:
            for label, command in rows.items():
                stem = f"{label}-{stream}-{seed}"
                out = RUNS / name / stem
                line = f"{command} --stream {stream} --seed {seed} --threads 1 --out {out}"
                yield RESULTS / name / f"{stem}.json", line


def run_cell(record: Path, line: str) -> str:
    """Run one cell unless its record exists; "" or one line that says what went wrong."""
    if record.exists():
        return ""
    out = Path(shlex.split(line)[-1])
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


def print_tables(name: str, markdown: bool) -> None:
    """One table per stream: mean +- std over seeds, paired differences to the first row."""
    streams, seeds, rows = SWEEPS[name]
    for stream in streams:
        found = {}
        for record, _ in cells(name):
            if record.exists() and record.stem.rsplit("-", 1)[0].endswith(f"-{stream}"):
                found[record.stem] = evaluation.load_record(record)
                found[record.stem]["label"] = record.stem[: -len(f"-{stream}-0")]
        print(f"\n{name}, {stream}\n")
        if not found:
            print("missing: no record yet")
            continue
        wanted = {label: {"label": label} for label in rows}
        print(evaluation.record_table(found, wanted, next(iter(rows)), list(seeds), markdown))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("name", choices=SWEEPS)
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time (default: 2)")
    parser.add_argument("--list", action="store_true", help="print the commands only")
    parser.add_argument("--table", action="store_true", help="print the tables only")
    parser.add_argument("--markdown", action="store_true", help="tables as Markdown")
    args = parser.parse_args()
    todo = list(cells(args.name))
    if args.list:
        print("\n".join(f"python {line}" for _, line in todo))
        return
    if not args.table:
        with ThreadPoolExecutor(args.jobs) as pool:
            errors = [e for e in pool.map(lambda cell: run_cell(*cell), todo) if e]
        for error in errors:
            print(f"error: {error}", file=sys.stderr)
        if errors:
            sys.exit(1)
    print_tables(args.name, args.markdown)


if __name__ == "__main__":
    try:
        main()
    except data.InputError as error:
        data.fail(error)
