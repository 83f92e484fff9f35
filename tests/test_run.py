"""The run folder of eval.py."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import eval as ev
from data import InputError

EXAMPLE = [[80, np.nan, np.nan], [85, 71, np.nan], [65, 74, 89]]
STAGES = [SimpleNamespace(name=name, metric="exact") for name in ("color", "count", "place")]


def flags(out, **changes):
    values = {"stream": "vqacl", "seed": 0, "lr": 1e-3, "tau": float("inf"), "targets": ("q", "v")}
    values |= {"model": str(out) + "-model", "out": out and str(out), "resume": False, "plot": None}
    return argparse.Namespace(**(values | changes))


def make_run(out, matrix=EXAMPLE, finished=True, script="asr.py", **changes):
    """A run folder whose predictions give the matrix: cells are whole percents of 100 answers."""
    run = ev.start_run(flags(out, **changes), script)
    ev.write_matrix(run, STAGES, matrix)
    for t, i in np.argwhere(np.isfinite(np.array(matrix, dtype=float))).tolist():
        rows = [
            {"question_id": str(k), "prompt": "?", "text": "yes" if k < matrix[t][i] else "no"}
            | {"answers": ["yes"], "score": float(k < matrix[t][i]), "skill": "judge"}
            for k in range(100)
        ]
        ev.write_predictions(run, t, i, rows)
    if finished:
        summary = {"seconds": 90.0, "peak_memory_mb": 512.0, "trainable_parameters": 1234}
        ev.finish_run(run, summary | {"drift": 0.5})
    return run


def test_default_folder_and_args_json(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ev.start_run(flags(None), "asr.py") == Path("runs/asr-vqacl-0")
    own = ev.start_run(flags(None, stream=str(tmp_path / "my_stream") + "/"), "baselines")
    assert own == Path("runs/baselines-my_stream-0")
    saved = json.loads(Path("runs/asr-vqacl-0/args.json").read_text())
    assert saved["script"] == "asr" and saved["tau"] == "inf" and saved["targets"] == ["q", "v"]
    assert "out" not in saved and "resume" not in saved and saved["command"].startswith("python ")


def test_start_on_finished_unfinished_and_other_runs(tmp_path, capsys):
    run = make_run(tmp_path / "run", finished=False)
    with pytest.raises(InputError, match="--resume or choose another --out"):
        ev.start_run(flags(run), "asr.py")
    assert ev.start_run(flags(run, resume=True, plot=["x"]), "asr.py") == run
    with pytest.raises(InputError, match=r"--lr 0.001, and now --lr is 0.002"):
        ev.start_run(flags(run, lr=2e-3, resume=True), "asr.py")
    with pytest.raises(InputError, match=r"--beta absent, and now --beta is 1"):
        ev.start_run(flags(run, beta=1, resume=True), "asr.py")
    with pytest.raises(InputError, match="script asr, and now script is baselines"):
        ev.start_run(flags(run, resume=True), "baselines.py")
    make_run(tmp_path / "done")
    before = (tmp_path / "done/summary.json").read_bytes()
    for resume in (False, True):
        with pytest.raises(SystemExit) as stop:
            ev.start_run(flags(tmp_path / "done", resume=resume), "asr.py")
        assert stop.value.code == 0 and "is finished" in capsys.readouterr().out
    with pytest.raises(InputError, match="--seed 0, and now --seed is 1"):
        ev.start_run(flags(tmp_path / "done", seed=1), "asr.py")
    assert (tmp_path / "done/summary.json").read_bytes() == before


def test_folders_that_cannot_be_a_run(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="files that are no run"):
        ev.start_run(flags(tmp_path / "notes"), "asr.py")
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["thesis.txt"]
    with pytest.raises(InputError, match="cannot make this folder"):
        ev.start_run(flags(tmp_path / "notes/thesis.txt/run"), "asr.py")
    with pytest.raises(InputError, match="cannot make this folder"):
        ev.start_run(flags(tmp_path / "notes/thesis.txt"), "asr.py")
    with pytest.raises(InputError, match="--resume: no run in"):
        ev.start_run(flags(tmp_path / "new", resume=True), "asr.py")
    assert not (tmp_path / "new").exists()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/args.json").write_text('{\n "lr": \n')
    (tmp_path / "torn/metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(InputError, match="args.json, line 3: not valid JSON"):
        ev.start_run(flags(tmp_path / "torn"), "asr.py")


def test_resume_with_other_code_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(ev, "git_commit", lambda: "abc")
    run = make_run(tmp_path / "run", finished=False)
    monkeypatch.setattr(ev, "git_commit", lambda: "def-dirty")
    for _ in range(2):
        ev.start_run(flags(run, resume=True), "asr.py")
    assert ev.read_json(run / "args.json")["commit"] == "abc, resumed with def-dirty"


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    for step in range(1, 6):
        ev.append_metrics(tmp_path, {"step": step, "loss": np.float32(1 / step)})
    path = tmp_path / "metrics.jsonl"
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')  # killed here
    ev.truncate_metrics(tmp_path, 3)
    assert [row["step"] for row in ev.read_json(path, lines=True)] == [1, 2, 3]
    ev.append_metrics(tmp_path, {"step": 4, "loss": 0.5})
    assert ev.read_json(path, lines=True)[-1] == {"step": 4, "loss": 0.5}
    with pytest.raises(KeyError):
        ev.append_metrics(tmp_path, {"loss": 0.5})
    ev.truncate_metrics(tmp_path / "empty", 0)  # killed before the first step
    assert (tmp_path / "empty/metrics.jsonl").read_text() == ""


def test_json_is_atomic_sorted_and_strict(tmp_path):
    path = tmp_path / "deep/matrix.json"
    tricky = 'say "[ 1,  2 ]",\n twice'
    obj = {"b": np.array([[1.5, np.nan], [2, 3]]), "a": tricky, "c": [Path("x"), np.int64(3)]}
    ev.write_json(path, obj)
    text = path.read_text()
    assert "[1.5, null]" in text and text.index('"a"') < text.index('"b"')
    back = {"a": tricky, "b": [[1.5, None], [2, 3]], "c": ["x", 3]}
    assert ev.read_json(path) == back
    with pytest.raises(TypeError):
        ev.write_json(path, {"bad": object()})
    assert path.read_text() == text and [p.name for p in path.parent.iterdir()] == ["matrix.json"]


def test_summary_is_the_record(tmp_path, monkeypatch):
    model = tmp_path / "run-model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(sys, "argv", ["asr.py", "--stream", "my stream"])
    run = make_run(tmp_path / "run")
    record = ev.read_run(run)
    assert record["model_sha256"] == ev.hashlib.sha256(b"weights").hexdigest()
    assert record["command"] == "python asr.py --stream 'my stream'"
    assert record["metrics"]["AP"] == 76 and record["matrix"][0] == [80, None, None]
    assert record["stages"] == ["color", "count", "place"] and record["drift"] == 0.5
    assert {"torch", "transformers", "numpy", "python"} <= record["versions"].keys()
    assert record["threads"] >= 1 and record["seed"] == 0 and record["script"] == "asr"
    assert "commit" not in record["args"] and "out" not in record["args"]
    again = make_run(tmp_path / "again")
    assert (run / "matrix.json").read_bytes() == (again / "matrix.json").read_bytes()
    with pytest.raises(ValueError, match="lacks seconds"):
        ev.finish_run(run, {"peak_memory_mb": 1, "trainable_parameters": 1})
    assert ev.model_sha256("llava-hf/llava-1.5-7b-hf") == "not hashed: llava-hf/llava-1.5-7b-hf"


def test_commit_is_unknown_outside_git_and_marks_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(ev, "REPOSITORY", tmp_path)
    assert ev.git_commit() == "unknown"
    if not shutil.which("git"):
        pytest.skip("git is not installed")

    def git(*words):
        who = ["-c", "user.name=x", "-c", "user.email=x@y.z"]
        subprocess.run(["git", "-C", tmp_path, *who, *words], check=True, capture_output=True)

    (tmp_path / "code.py").write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    (tmp_path / "results").mkdir()
    (tmp_path / "results/record.json").write_text("{}")
    assert len(ev.git_commit()) == 40
    (tmp_path / "code.py").write_text("2")
    assert ev.git_commit().endswith("-dirty")
    (tmp_path / "copy").mkdir()  # a copy of the files inside somebody else's repository
    monkeypatch.setattr(ev, "REPOSITORY", tmp_path / "copy")
    assert ev.git_commit() == "unknown"


def test_a_record_is_checked(tmp_path):
    ev.write_json(tmp_path / "b.json", {"script": "asr"})
    with pytest.raises(InputError, match=r"b.json is no record of a run: it lacks args"):
        ev.load_record(tmp_path / "b.json")
    (tmp_path / "b.json").write_text('{"script": "asr",\n "seed": }')
    with pytest.raises(InputError, match=r"b.json, line 2"):
        ev.load_record(tmp_path / "b.json")
