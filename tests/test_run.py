"""The run folder of eval.py. Nothing here needs a model."""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import eval as ev
from data import InputError, Sample, Stage

ANSWERS = {"color": "red", "count": "2"}


def flags(out, **changes):
    values = {"stream": "vqacl", "seed": 0, "lr": 1e-3, "tau": float("inf"), "targets": ("q", "v")}
    values |= {"epochs": 1, "batch_size": 4, "accumulate": 1, "eval_batch_size": 2}
    values |= {"out": out and str(out), "resume": False, "plot": None}
    values |= {"report": None, "data": None, "beta": 0.5, "gamma": 0.05}
    return argparse.Namespace(**(values | changes))


def stream(metric="exact", novel=False):
    def test(name, n):
        gold = ANSWERS[name]
        return [Sample(str(k), None, "?" * k, gold, (gold,), name, name) for k in range(n)]

    stages = [Stage(name, [], test(name, 4), metric) for name in ANSWERS]
    held = [Stage(name, [], test(name, 2), metric) for name in ANSWERS] if novel else None
    return SimpleNamespace(stages=stages, novel=held, skipped={})


def answer(samples):
    """One question in four is answered wrong; a fact is noted about every question."""
    texts = ["no" if s.id == "3" else s.answer for s in samples]
    return texts, [{"length": len(s.question)} for s in samples]


def finished(out, **kind):
    run = ev.Run(flags(out), stream(**kind), "asr")
    run.resume()
    for t in range(2):
        list(run.steps(t, 1))
        run.log(t, loss=0.5, gradient_norm=1.0)
        run.test(t, answer)
        run.save((t + 1, 0))
    run.finish(
        lambda records: None, drift=np.float32(0.5), skills=[Path("x"), np.int64(3), float("nan")]
    )
    return run.folder


def test_a_finished_run_is_its_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["asr.py", "--stream", "my stream"])
    run = finished(tmp_path / "run", novel=True)
    record = ev.read_run(run)
    assert record["matrix"] == [[75, None], [75, 75]] and record["metrics"]["AP"] == 75
    assert record["novel"]["matrix"] == [[100, None], [100, 100]]
    assert record["stages"] == ["color", "count"] and record["scorers"] == ["exact", "exact"]
    assert record["command"] == "python asr.py --stream 'my stream'" and record["script"] == "asr"
    assert record["drift"] == 0.5 and record["skills"] == ["x", 3, None] and record["seed"] == 0
    assert {"python", "torch", "transformers", "numpy", "cpu"} <= record["versions"].keys()
    assert record["seconds"] == pytest.approx(sum(record["seconds_by_part"].values()))
    assert {"train", "evaluation"} <= record["seconds_by_part"].keys() and record["threads"] >= 1
    assert record["args"]["tau"] == "inf" and record["args"]["targets"] == ["q", "v"]
    assert not {"out", "resume", "plot", "commit"} & record["args"].keys()
    assert "after 2 count" in capsys.readouterr().out and record["peak_memory_mb"] > 10
    assert ev.rescore(run) == []
    facts = np.load(run / "facts.npz")
    assert facts["2-1-length"].tolist() == [0, 1, 2, 3] and "2-novel-2-length" in facts


def test_start_on_unfinished_and_other_runs(tmp_path, monkeypatch):
    def start(run, script="asr", **changes):
        return ev.Run(flags(run, **changes), stream(), script).folder

    monkeypatch.chdir(tmp_path)
    assert start(None) == Path("runs/asr-vqacl-0")
    assert start(None, "cram", stream=f"{tmp_path}/mine/") == Path("runs/cram-mine-0")
    run = start(tmp_path / "run")
    assert start(run) == run  # a start that went wrong left args.json alone
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(InputError, match="--resume or choose another --out"):
        start(run)
    for commit in ("abc", "abc", "def-dirty", "def-dirty"):
        monkeypatch.setattr(ev, "git_commit", lambda commit=commit: commit)
        assert start(run, resume=True, plot=["x"]) == run
    assert ev.read_json(run / "args.json")["commit"].endswith(", then abc, then def-dirty")
    with pytest.raises(InputError, match=r"--lr 0.001, and now --lr is 0.002"):
        start(run, lr=2e-3, resume=True)
    with pytest.raises(InputError, match="script asr, and now script is baselines"):
        start(run, "baselines", resume=True)


def test_folders_that_cannot_be_a_run(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/thesis.txt").write_text("precious")
    for out, resume, message in (
        ("notes", False, "files that are no run"),
        ("notes/thesis.txt", False, "cannot use this folder"),
        ("new", True, "--resume: no run in"),
    ):
        with pytest.raises(InputError, match=message):
            ev.Run(flags(tmp_path / out, resume=resume), stream(), "asr")
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["thesis.txt"]
    assert not (tmp_path / "new").exists()
