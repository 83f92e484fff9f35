"""From answers to numbers: the accuracy matrix, its metrics, run folders, tables.

    python eval.py RUN             one run: its accuracy matrix and its metrics
    python eval.py RUN RUN ...     compare runs: mean ± std over seeds, paired differences

Both also score the saved predictions again, which must reproduce the matrix.

The numbers of continual learning. T tasks are learned one after the other; A[t,i] is the accuracy
(%) on task i after training stage t. Every run is one T x T matrix whose lower triangle counts:

                       task 1  task 2  task 3
        after stage 1    80       .       .
        after stage 2    85      71       .
        after stage 3    65      74      89

    AP   mean_i A[T,i]                          (65+74+89)/3 = 76   final accuracy; also Last, MFN
    AF   mean_{i<T} max_{t>=i} A[t,i] - A[T,i]      (20+0)/2 = 10   forgetting, ASR's code
    AF_vqacl    the same, but max over t < T       (20-3)/2 = 8.5   forgetting, VQACL's code
    Avg  mean_t mean_{i<=t} A[t,i]              (80+78+76)/3 = 78   mean over stages; also MAA
    MFT  mean_i A[i,i]                          (80+71+89)/3 = 80   each task after its own stage
    BWT  mean_{i<T} A[T,i] - A[i,i]                (-15+3)/2 = -6   (MFN - MFT) * T / (T - 1)

The two AF differ where a task ends better than it ever was (task 2: 74 after 71): ASR's maximum
includes the last row, so the task counts 0; VQACL's does not, so it counts -3. Papers also differ
in what they call Avg (HiDe-LLaVA averages per task first): compare definitions, then numbers.
"""

import argparse
import io
import json
import math
import os
import shlex
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch

import report
from files import (
    InputError,
    damaged,
    git_commit,
    input_errors,
    jsonable,
    lock,
    peak_memory,
    predictions_file,
    progress,
    read_json,
    settle,
    silent,
    versions,
    write_bytes,
    write_json,
    write_text,
)
from model import (
    check_finite,
    gather,
    processes,
    random_state,
    set_random_state,
    share_out,
    write_state,
)
from scorers import caption_scores, score

# ---- 1. One cell of the matrix: answer and score the test samples of one stage -------------------


def evaluate(answer, samples, metric, batch_size, title="test", whole=False):
    """Answer and score every sample: (rows, facts).

    answer: samples -> texts, or (texts, facts) with a dict {name: array or number} per sample: what
    the method notes about it. Batches hold questions of similar length, longest first: little
    padding, and if memory runs out, then in the first batch. whole: every process calls `answer`
    once with all samples; it makes its own batches.

    rows: what predictions/ holds, one per sample, in the order of `samples`: {question_id, prompt,
    image, text, answers, score, skill}. facts: {name: stack over the samples with that name}.
    """
    if whole:
        batches = [range(len(samples))]
        replies = [answer(samples)]
    else:
        order = sorted(range(len(samples)), key=lambda k: -len(samples[k].question))
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        bar = progress(batches, title)
        replies = share_out(lambda batch: answer([samples[k] for k in batch]), bar)
    rows = [None] * len(samples)
    notes = [None] * len(samples)
    for batch, reply in zip(batches, replies):
        texts, facts = reply if isinstance(reply, tuple) else (reply, [{}] * len(batch))
        for k, text, note in zip(batch, texts, facts, strict=True):  # an answer lost is an error
            s = samples[k]
            rows[k] = {"question_id": s.id, "prompt": s.question, "text": text, "skill": s.skill}
            rows[k] |= {"answers": list(s.answers), "image": s.image and Path(s.image).name}
            rows[k]["score"] = score(metric, text, rows[k]["answers"], rows[k])
            notes[k] = note
    names = dict.fromkeys(name for note in notes for name in note)
    return rows, {name: np.stack([note[name] for note in notes if name in note]) for name in names}


def accuracy(rows: list[dict], metric: str = "") -> float:
    """One cell A[t,i]: the mean score of the rows in percent; of captions their BLEU-ROUGE."""
    if not rows:
        raise InputError("no predictions, hence no accuracy: is the stage's test set empty?")
    if metric == "caption":
        return caption_scores(rows)["BLEU-ROUGE"]
    return 100 * sum(row["score"] for row in rows) / len(rows)


# ---- 2. The matrix and its metrics (definitions and worked example: head of this file) -----------


def metrics(matrix) -> dict[str, float]:
    """AP, AF, AF_vqacl, Last, Avg, MAA, MFT, MFN, BWT of a T x T matrix [stage, task].

    Cells above the diagonal are ignored. What needs a cell that is nan (not evaluated) is nan:
    joint training fills only the last row, so it has an AP and no Avg. T = 1: AF = BWT = 0.
    """
    a = np.asarray(matrix, dtype=float)
    if a.ndim != 2 or a.shape[0] != a.shape[1] or a.size == 0:
        raise ValueError(f"an accuracy matrix is T x T [stage, task], but this one is {a.shape}")
    last, old = a[-1], range(len(a) - 1)  # old: all tasks but the newest
    ap, avg = np.mean(last), np.mean([np.mean(row[: t + 1]) for t, row in enumerate(a)])
    values = {
        **{"AP": ap, "Last": ap, "MFN": ap, "Avg": avg, "MAA": avg, "MFT": np.mean(np.diag(a))},
        "AF": np.mean([a[i:, i].max() - last[i] for i in old] or [0]),
        "AF_vqacl": np.mean([a[i:-1, i].max() - last[i] for i in old] or [0]),
        "BWT": np.mean([last[i] - a[i, i] for i in old] or [0]),
    }
    return {name: float(value) for name, value in values.items()}


def interference(matrix) -> np.ndarray:
    """A[a,b] - max_t A[t,b] (ASR, Fig. 8), <= 0: what task b misses after stage a. Upper part nan.

    A task that was never tested (the run is unfinished) is a column of nan.
    """
    a = np.array(matrix, dtype=float)
    a[np.triu_indices(len(a), 1)] = np.nan
    return a - np.fmax.reduce(a)  # fmax passes over nan


# t with P(|x| < t) = 0.95 in Student's distribution with 1, 2, ... degrees of freedom
T95 = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157)


def paired(a, b) -> tuple[float, float, float, int]:
    """Differences a - b, pair by pair (same seeds): (mean, low, high, n), a 95% t interval.

    Two runs of one seed share data order and initial weights, so their difference varies less than
    the runs do. One pair has no interval: low and high are nan. InputError beyond ten pairs.
    """
    d = np.array([x - y for x, y in zip(a, b, strict=True)], dtype=float)
    n = len(d)
    if n > len(T95) + 1:
        raise InputError(f"{n} pairs, but the table T95 in eval.py ends at ten: extend it")
    mean = float(d.mean()) if n else math.nan
    half = T95[n - 2] * float(d.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return mean, mean - half, mean + half, n


# ---- 3. The run folder: --out IS the run ---------------------------------------------------------

MAY_DIFFER = ("resume", "out", "plot", "report")  # flags that do not change what is computed
ANEW = "; start the run anew with another --out"
NOT_IN_THE_BAR = ("lr", "gradient_norm", "task", "distance", "weight", "phase")
SAVE_EVERY = 100  # steps between two checkpoints inside a stage


class Run:
    """The folder of a run and the chores around it: log, tests, checkpoint, record.

        args.json       the flags, with script, commit and command of the start
        metrics.jsonl   one line per training step
        matrix.json     stages, scorers, accuracy matrix; nothing that changes between equal runs
        predictions/    after-<t>-on-<i>.jsonl: the answers behind A[t, i], counted from 1
        facts.npz       what a method noted about every test question: "<t>-<i>-<name>" [N, ...]
        checkpoint.pt   the last state; --resume continues from it
        figures/, report.html    what the run has shown
        summary.json    written last: marks the run as finished, and is its record

    `lock` keeps a second process out. Under torchrun the first process alone writes.
    """

    def __init__(self, args, stream, script):
        """Make the folder (args.out or runs/SCRIPT-STREAM-SEED); what can be wrong: start_run."""
        if silent():
            sys.stdout = open(os.devnull, "w")
        self.folder = start_run(args, script)
        self.args, self.stages, self.novel = args, stream.stages, stream.novel or []
        self.configuration = configuration(args, script)
        self.plan, self.done = self.stages, 0  # what is trained one after the other; see `left`
        self.skipped = stream.skipped  # "stage split" -> records whose image is missing
        T = len(self.stages)
        self.matrix, self.matrix_novel = np.full((2, T, T), np.nan)
        self.facts, self.step, self.bar = {}, 0, None
        self.seconds, self.clock = {}, time.perf_counter()
        sizes = (f"{stage.name} {len(stage.train)} + {len(stage.test)}" for stage in self.stages)
        print(f"{self.folder}: {T} stages, training + test samples: {', '.join(sizes)}")
        micro = args.batch_size // args.accumulate
        print(f"{args.batch_size} samples per step, {micro} at a time; epochs: {args.epochs}")

    def lap(self, name):
        """Book the time since the last call under this name; the record has the sums."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.clock
        self.clock = now

    def resume(self):
        """The state that `save` wrote last, {} if there is none; the log is cut back to it."""
        path, state = self.folder / "checkpoint.pt", {}
        log, facts = self.folder / "metrics.jsonl", self.folder / "facts.npz"
        if self.args.resume and path.exists():
            with damaged(path, ANEW):
                if zipfile.ZipFile(path).testzip():  # torch does not look at its checksums
                    raise ValueError("a checksum is wrong")
                state = torch.load(path, map_location="cpu", weights_only=True)
                if state["configuration"] != self.configuration:
                    raise ValueError("it belongs to another run")
                self.step, self.seconds = state["run_step"], state["seconds"]
                self.matrix, self.matrix_novel = state["matrix"].numpy()
                torch.set_num_threads(state["threads"])  # another number would round differently
                set_random_state(state["random"])
            with damaged(facts, ANEW):
                content = np.load(facts) if state["facts"] else {}
                self.facts = {key: content[key] for key in state["facts"]}  # it may hold more
            print(f"resumed in stage {state['at'][0] + 1}, after {self.step} steps")
        elif self.args.resume:
            print("no checkpoint yet: the run starts from the beginning")
        with damaged(log, ANEW):
            lines = log.read_text().splitlines(keepends=True) if self.step else []
            lines = lines[: self.step]  # a kill can tear what comes after
            if [json.loads(line)["step"] for line in lines] != list(range(1, self.step + 1)):
                raise ValueError(f"it has not the lines of steps 1 to {self.step}")
        write_text(log, "".join(lines))
        self.lap("start")
        return state

    def save(self, at, optimizer=None, **state):
        """Write a checkpoint, whole or not at all. at: (stage, step inside it) to continue from.

        InputError, and no checkpoint, if what is trained is no longer finite.
        """
        if optimizer:
            check_finite(p for group in optimizer.param_groups for p in group["params"])
            state["optimizer"] = optimizer.state_dict()
        state |= {"at": at, "run_step": self.step, "seconds": self.seconds}
        state |= {"matrix": torch.tensor(np.stack([self.matrix, self.matrix_novel]))}
        state |= {"threads": torch.get_num_threads(), "random": random_state()}
        state |= {"facts": list(self.facts), "configuration": self.configuration}
        if self.step:
            settle(self.folder / "metrics.jsonl")
        write_state(self.folder / "checkpoint.pt", state)
        self.lap("saving")

    def steps(self, t, total, begin=0, title=""):
        """The numbers of the steps of plan[t] that are still to do, behind a progress bar."""
        title = f"stage {t + 1}/{len(self.plan)} {title or self.plan[t].name}"
        self.before = self.step - begin  # steps before this stage
        options = {"total": total, "initial": begin, "leave": True}
        self.bar = progress(range(begin, total), title, **options)
        return self.bar

    def left(self, t):
        """The time that the whole run still needs, in words: as long for a sample, trained or
        tested, as so far."""
        T, last = len(self.stages), len(self.plan) - 1
        train = [len(stage.train) * stage.epochs for stage in self.plan]
        test = [len(stage.test) for stage in self.stages]
        test = [sum(test[: k + 1 if last else T]) for k in range(last + 1)]
        done = sum(train[:t] + test[:t]) + train[t] * (self.step - self.before) / self.bar.total
        self.done = max(self.done, done, 1)  # two halves of a stage both count from 0
        left = sum(self.seconds.values()) * (sum(train + test) / self.done - 1)
        return f"about {left / 60:.0f} min left in all" if left > 60 else f"about {left:.0f} s left"

    def log(self, t, **values):
        """A line of metrics.jsonl. InputError if the loss is not finite; the checkpoint stays."""
        self.step += 1
        if not math.isfinite(values["loss"] + values["gradient_norm"]):
            raise InputError(
                f"step {self.step}: loss {values['loss']}, gradient norm {values['gradient_norm']};"
                f" stopped, {self.folder} keeps what was there before; try a lower --lr (now "
                f"{self.args.lr}) with another --out"
            )
        line = jsonable({"step": self.step, "stage": t + 1, **values})
        if not silent():
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self.lap(values.get("phase", "train"))
        parts = [f"{key} {x:.3f}" for key, x in values.items() if key not in NOT_IN_THE_BAR and x]
        self.bar.set_postfix_str(f"{', '.join(parts)}; {self.left(t)}", refresh=False)

    def test(self, t, answer, whole=False):
        """Fill row t of the matrix: answer(samples) on every stage seen so far; see `evaluate`.

        With --hold_out the object group that was left out of training is tested as well.
        """
        size, novel = self.args.eval_batch_size, (self.novel, self.matrix_novel, "novel-")
        for stages, matrix, kind in (self.stages, self.matrix, ""), novel:
            for i, stage in enumerate(stages[: t + 1]):
                title = f"test {kind}{stage.name}"
                rows, facts = evaluate(answer, stage.test, stage.metric, size, title, whole)
                matrix[t, i] = accuracy(rows, stage.metric)
                write_predictions(self.folder, t, f"{kind}{i + 1}" if kind else i, rows)
                self.facts |= {f"{t + 1}-{kind}{i + 1}-{name}": x for name, x in facts.items()}
        self.note()
        content = {"stages": [stage.name for stage in self.stages], "matrix": self.matrix}
        content |= {"scorers": [stage.metric for stage in self.stages]}
        write_json(self.folder / "matrix.json", content)
        gather(None)  # under torchrun: from here on every process can read these files
        scores = [f"{stage.name} {show(x)}" for stage, x in zip(self.stages, self.matrix[t])]
        mean = show(np.mean(self.matrix[t, : t + 1]))
        print(f"after {self.stages[t].name}: mean {mean} | {', '.join(scores[: t + 1])}")
        self.lap("evaluation")

    def note(self, **facts):
        """Add arrays to facts.npz."""
        self.facts |= facts
        if self.facts:
            content = io.BytesIO()
            np.savez(content, **self.facts)
            write_bytes(self.folder / "facts.npz", content.getbuffer())

    def finish(self, draw, **facts):
        """Print the result, draw the figures, write report and record; torchrun's other processes
        end here. draw: a function of plot.py."""
        if silent():
            raise SystemExit(0)
        names = [stage.name for stage in self.stages]
        print("\n" + table(self.matrix, names) + "\n")
        if self.novel:
            print("object group left out of training:\n" + table(self.matrix_novel, names) + "\n")
            novel = {"matrix": self.matrix_novel, "metrics": metrics(self.matrix_novel)}
            facts["novel"] = novel
        self.lap("end")
        facts |= {"seconds": sum(self.seconds.values()), "seconds_by_part": self.seconds}
        facts |= {"peak_memory_mb": peak_memory()}
        facts |= {"threads": torch.get_num_threads(), "versions": versions()}
        facts |= {"skipped": self.skipped} if self.skipped else {}
        facts |= read_run(self.folder)
        if captions := all_caption_scores(self.folder, facts):
            facts["captions"] = captions
        print("figures:", draw([facts]))
        if self.args.report != "none":
            pictures = self.args.report == "pictures" or not (self.args.report or self.args.data)
            print("report:", report.write(facts, self.stages, pictures))
        del facts["folder"]
        write_json(self.folder / "summary.json", facts)
        print("seconds: " + ", ".join(f"{k} {value:.1f}" for k, value in self.seconds.items()))
        print(f"peak memory {facts['peak_memory_mb']:,.0f} MB; everything is in {self.folder}")


# ---- 4. Files of a run folder --------------------------------------------------------------------


def configuration(args, script):
    """What must not change in a run, as JSON: its script and the flags that change numbers."""
    flags = {key: value for key, value in vars(args).items() if key not in MAY_DIFFER}
    return jsonable(flags | {"script": script})


def start_run(args, script):
    """Make the run folder (args.out or runs/SCRIPT-STREAM-SEED) with its args.json; return it.

    A finished run says so and ends the program. InputError: the folder holds another configuration,
    an unfinished run and --resume is off, or files that are no run; another process has it; or
    --resume finds no run. What a start that went wrong has left, args.json alone, is taken over.
    """
    run = Path(args.out or f"runs/{script}-{Path(args.stream).resolve().name}-{args.seed}")
    if silent():
        return run
    now = configuration(args, script)
    now |= {"commit": git_commit(), "command": shlex.join(["python", *sys.argv])}
    try:
        inside = {path.name for path in run.iterdir()} if run.exists() else set()
        inside = {name for name in inside if name != "lock" and not name.endswith(".part")}
        if "args.json" in inside and (args.resume or len(inside) > 1):
            lock(run)
            return _existing_run(run, now, args.resume)
        if args.resume:
            raise InputError(f"--resume: no run in {run}; start without --resume, or correct --out")
        if inside - {"args.json"}:
            raise InputError(f"{run} holds files that are no run: choose another --out")
        run.mkdir(parents=True, exist_ok=True)
        lock(run)
        write_json(run / "args.json", now)
    except OSError as error:
        raise InputError(f"--out {run}: cannot use this folder ({error.strerror})") from None
    return run


def _existing_run(run, now, resume):
    """start_run for a folder that holds a run already; now: its args.json as it would be today."""
    was = read_json(run / "args.json", dict)
    keys = (was.keys() | now.keys()) - {"commit", "command"}
    for key in sorted(keys, key=lambda key: (f"--{key} " not in now["command"], key)):
        old, new = was.get(key, "absent"), now.get(key, "absent")
        if old != new:
            flag = key if key == "script" else f"--{key}"
            raise InputError(
                f"{run} holds a run with {flag} {old}, and now {flag} is {new}: "
                "choose another --out, or the old value"
            )
    if (run / "summary.json").is_file():
        print(f"The run in {run} is finished. Its tables: python eval.py {run}")
        print(f"Its figures: python plot.py {run}")
        raise SystemExit(int(processes()[1] > 1))  # under torchrun the others would wait
    if not resume:
        raise InputError(f"{run} holds an unfinished run: add --resume or choose another --out")
    before = str(was.get("commit"))
    if now["commit"] not in before:  # two versions of the code
        write_json(run / "args.json", was | {"commit": f"{before}, then {now['commit']}"})
    return run


def write_predictions(run, trained, tested, rows):
    """Save the rows of `evaluate` in predictions_file(run, trained, tested)."""
    lines = [json.dumps(jsonable(row), sort_keys=True) + "\n" for row in rows]
    write_text(predictions_file(run, trained, tested), "".join(lines))


def read_run(folder):
    """The record of a run with its "folder": its summary.json, or what an unfinished run has.

    InputError if this is no run folder, or if its matrix does not fit its stages.
    """
    folder = Path(folder)
    if not (folder / "args.json").is_file():
        raise InputError(f"{folder} is no run folder: there is no args.json in it")
    finished = (folder / "summary.json").is_file()
    if not finished and not (folder / "matrix.json").is_file():
        raise InputError(f"{folder} has no matrix.json: its first stage is not finished")
    record = read_json(folder / ("summary.json" if finished else "matrix.json"), dict)
    with damaged(folder):
        if not finished:
            args = read_json(folder / "args.json", dict)
            record |= {key: args.pop(key) for key in ("script", "commit", "command")}
            record |= {"args": args, "stream": args["stream"], "seed": args["seed"]}
        check_record(record)
        return record | {"metrics": metrics(record["matrix"]), "folder": folder}


def check_record(record):
    """Raise ValueError, KeyError or TypeError unless the record is one of T stages."""
    stages, matrix = record["stages"], np.array(record["matrix"], dtype=float)
    T = len(stages)
    if not T or matrix.shape != (T, T) or len(record["scorers"]) != T:
        raise ValueError(f"{T} stages, but the matrix is {matrix.shape}")
    if not all(isinstance(name, str) for name in [*stages, record["script"], record["stream"]]):
        raise TypeError("a name of script, stream or stage is no text")
    if not all(math.isnan(x) or 0 <= x <= 100 for x in matrix.flat):
        raise ValueError("an accuracy is not between 0 and 100")
    float(record.get("seconds", 0)), record["args"]["seed"], record["seed"], kind_of(record)


def all_caption_scores(run, record):
    """{stage: every caption score} of the last row of the matrix; the matrix has their mean."""
    end = len(record["stages"]) - 1
    stages = [i for i, scorer in enumerate(record["scorers"]) if scorer == "caption"]
    rows = {i: read_json(predictions_file(run, end, i)) for i in stages}
    return {record["stages"][i]: caption_scores(rows[i]) for i in stages}


def rescore(run):
    """Score saved predictions again; a sentence for each cell of its record that differs."""
    record, wrong = read_run(run), []
    matrix = np.array(record["matrix"], dtype=float)
    for t, i in np.ndindex(matrix.shape):
        path, scorer = predictions_file(run, t, i), record["scorers"][i]
        if np.isnan(matrix[t, i]) and not ("seconds" in record and path.is_file()):
            continue  # not tested, or the run was killed before it had the row
        rows = read_json(path, list)
        with damaged(path):
            rows = [r | {"score": score(scorer, r["text"], r["answers"], r)} for r in rows]
            again = accuracy(rows, scorer)
        if not np.isclose(again, matrix[t, i], rtol=0, atol=1e-9, equal_nan=True):
            cell = f"{run}: after stage {t + 1} on task {i + 1} ({record['stages'][i]})"
            wrong.append(f"{cell} the predictions give {again:.4f}, the record {matrix[t, i]:.4f}")
    return wrong


# ---- 5. Tables -----------------------------------------------------------------------------------

COLUMNS = {"AP": "AP", "AF": "AF", "AF_vqacl": "AF (VQACL)", "Last": "Last", "Avg": "Avg"}
COLUMNS |= {"MFT": "MFT", "BWT": "BWT"}  # metric -> head of its column


def grid(rows: list[list[str]], markdown: bool = False) -> str:
    """Rows of strings as an aligned table, in plain text or Markdown; the first row is the head.

    Markdown: cells with an error or an interval get no-break spaces, which browsers do not wrap.
    """
    if markdown:
        rows = [[c.replace(" ", "\u00a0") if "±" in c or "[" in c else c for c in r] for r in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append("| " + " | ".join(cells) + " |" if markdown else "  ".join(cells).rstrip())
    if markdown:
        lines.insert(1, "|---" + "|---:" * (len(widths) - 1) + "|")
    return "\n".join(lines)


def show(value) -> str:
    """A number for a table; "-" where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.1f}"


def mean_std(values) -> str:
    """Mean and sample standard deviation as "53.0 ± 1.6"; "-" without values or if one is nan."""
    if len(values) == 0 or np.isnan(values).any():
        return "-"
    return show(np.mean(values)) + (f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def difference(pairs) -> str:
    """Mean of a - b over pairs (a, b) and its 95% interval (`paired`) as "+1.2 [+0.3, +2.1]"."""
    mean, low, high, n = paired([a for a, _ in pairs], [b for _, b in pairs])
    if math.isnan(mean):
        return "-"
    return f"{mean:+.1f}" + (f" [{low:+.1f}, {high:+.1f}]" if n > 1 else "")


def table(matrix, stages: list[str], markdown: bool = False) -> str:
    """One run: accuracy matrix (row: after stage t, column: task i, numbered) and metrics."""
    a, values = np.array(matrix, dtype=float), metrics(matrix)
    rows = [["accuracy (%) on task", *(str(i + 1) for i in range(len(stages)))]]
    for t, name in enumerate(stages):
        cells = [show(value) for value in a[t, : t + 1]]
        rows.append([f"after {t + 1} {name}", *cells, *[""] * (len(stages) - t - 1)])
    numbers = [list(COLUMNS.values()), [show(values[key]) for key in COLUMNS]]
    return grid(rows, markdown) + "\n\n" + grid(numbers, markdown)


# flags that change no number except by rounding, and the seed, over which runs are averaged
NO_LABEL = set("seed out resume plot report data device threads eval_batch_size".split())


def kind_of(record):
    """The name of the method of a run."""
    args, script = record["args"], record["script"]
    if script == "asr":
        kinds = [["sequential LoRA", "geometry only"], ["spectral only", "ASR"]]
        return kinds[args["beta"] > 0][args["gamma"] > 0]
    name = args["method"] if script == "baselines" else script
    return {"sequential": "sequential LoRA", "cram": "CRAM", "mllm_cl": "MR-LoRA"}.get(name, name)


def group(records: list[dict]) -> dict[str, dict[int, dict]]:
    """{label: {seed: record}}: runs that differ in nothing but the seed. A label is the method and
    the flags in which these runs of it differ."""
    groups = {}
    for record in records:
        alike = [r["args"] for r in records if kind_of(r) == kind_of(record)]
        skip = NO_LABEL | ({"experts"} if record["script"] == "mllm_cl" else set())  # a folder
        flags = {key: value for key, value in record["args"].items() if key not in skip}
        differing = [k for k, v in flags.items() if any(args.get(k, v) != v for args in alike)]
        label = ", ".join([kind_of(record), *(f"{key} {flags[key]}" for key in differing)])
        if record["seed"] in groups.get(label, ()):
            label += f" ({record['folder']})"  # perhaps the code was edited between two runs
        groups.setdefault(label, {})[record["seed"]] = record
    return groups


def compared(values: dict[int, dict], first: dict[int, dict], names) -> list[str]:
    """Cells of one line, for numbers {seed: {name: number}}: mean ± std over seeds, and beside AP
    and AF the difference to the first line, paired by seed ("" in the first line itself)."""
    cells = []
    for name in names:
        cells.append(mean_std([numbers[name] for numbers in values.values()]))
        if name in ("AP", "AF"):
            pairs = [(values[seed][name], first[seed][name]) for seed in values if seed in first]
            cells.append("" if values is first else difference(pairs))
    return cells


def compare(records: list[dict], markdown: bool = False) -> str:
    """A line per group of runs, over its finished seeds; see `compared`."""
    head = ["AP", "- first [95%]", "AF", "- first [95%]", "Avg", "BWT", "minutes"]
    rows, first = [["", "finished", *head]], None
    for label, runs in group(records).items():
        done = {seed: run for seed, run in runs.items() if "seconds" in run}
        values = {s: metrics(r["matrix"]) | {"minutes": r["seconds"] / 60} for s, r in done.items()}
        first = values if first is None else first
        cells = compared(values, first, ("AP", "AF", "Avg", "BWT", "minutes"))
        rows.append([label, f"{len(done)} of {len(runs)}", *cells])
    return grid(rows, markdown)


# ---- 6. Command line -----------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Print the tables; 1 if the saved predictions do not give the saved matrix, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--markdown", action="store_true", help="tables as Markdown")
    args = parser.parse_args(argv)
    records = [read_run(folder) for folder in args.runs]
    if len(records) == 1:
        print(table(records[0]["matrix"], records[0]["stages"], args.markdown) + "\n")
    else:
        for stream in dict.fromkeys(record["stream"] for record in records):
            runs = [record for record in records if record["stream"] == stream]
            print(f"{stream}:\n\n{compare(runs, args.markdown)}\n")
    wrong = [sentence for folder in args.runs for sentence in rescore(folder)]
    right = f"The saved predictions of {len(records)} run(s) give the saved matrix."
    print("\n".join(wrong) or right)
    return 1 if wrong else 0


if __name__ == "__main__":
    with input_errors():
        sys.exit(main())
