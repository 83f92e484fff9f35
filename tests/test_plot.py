"""Figures from small run folders written by hand."""

import json
import sys

import numpy as np
import pytest

import plot
from files import InputError

pytestmark = pytest.mark.filterwarnings("error")
FLAGS = {"stream": "toy", "seed": 0, "model": "none", "beta": 0.5, "gamma": 0.05, "rank": 2}
FLAGS |= {"method": "replay", "router": "mllm", "shots": 4, "blind_shots": True}
RECORD = {"seconds": 1, "seconds_by_part": {"routing": 1}, "stored_parameters": [30, 50]}
RECORD |= {"trainable_parameters": 40, "commit": "", "command": ""}
RECORD |= {"confusion": [[[2, 0], [0, 0]], [[1, 1], [0, 2]]], "routing_accuracy": [100, 75]}
STAGES = ["one", "two"]
COARSE, MIXED, BLIND = np.eye(8)[0], np.repeat([0.5, 0], [2, 6]), np.full(8, np.nan)


def make_run(folder, script, facts, matrix=((100, None), (50, 75)), **flags):
    """A finished run of two stages with two test questions each, of two kinds."""
    args, results = FLAGS | flags, {"stages": STAGES[: len(matrix)], "matrix": matrix}
    results["scorers"] = ["exact"] * len(matrix)
    record = RECORD | results | {"script": script, "args": args, "metrics": plot.metrics(matrix)}
    record |= {"stream": "toy", "seed": args["seed"], "model_sha256": "none"}
    (folder / "predictions").mkdir(parents=True)
    steps = [{"step": k, "stage": 1 + (k > 3), "lr": 1.0, "loss": k} for k in range(1, 6)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, steps)))
    for t, i in ((1, 1), (2, 1), (2, 2)):
        row = {"prompt": "is it $5 or $6?", "text": "$5", "answers": ["$6"], "skill": "look"}
        rows = [row | {"score": float(t == i)}, row | {"skill": "read", "score": 1.0}]
        text = "\n".join(map(json.dumps, rows))
        (folder / "predictions" / f"after-{t}-on-{i}.jsonl").write_text(text)
    args |= {name: record[name] for name in ("script", "commit", "command")}
    for name, content in {"args": args, "matrix": results, "summary": record}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    np.savez(folder / "facts.npz", **facts)
    return folder


def asr_facts():
    """The radial spectrum of "look" goes from COARSE to MIXED; "read" has no image."""
    facts = {f"{i}-{i}-picture": np.zeros((2, 112, 112, 3), np.uint8) for i in (1, 2)}
    for cell, radial in {"1-1": COARSE, "2-1": MIXED, "2-2": COARSE}.items():
        facts |= {f"{cell}-{name}": np.stack([radial, BLIND]) for name in ("phi", "radial")}
        facts |= {f"{cell}-angular": np.stack([COARSE, BLIND]), f"{cell}-map": np.ones((2, 4, 4))}
    return facts


def drawn(path):
    return {file.stem for file in path.iterdir() if file.stat().st_size > 3000}


def test_drift_by_hand(tmp_path):
    run = make_run(tmp_path / "run", "asr", asr_facts())
    (run / "summary.json").unlink()  # a run asks for its drift before it writes its record
    drift = plot.drift(run)
    # JSD of (1, 0) and (0.5, 0.5), whose mean is (0.75, 0.25); the angular spectrum stays
    jsd = 0.5 * np.log(1 / 0.75) + 0.5 * (0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25))
    assert drift["one: look"] == pytest.approx([jsd, 100], abs=1e-5)
    assert np.isnan(drift["one: read"][0]) and drift["one: read"][1] == 0


def test_figures_of_several_runs_and_of_one_stage(tmp_path):
    """What a run draws of itself is tested with the scripts."""
    every, alone = {"accuracy", "matrix"}, {"loss", "fig8-interference"}
    run = make_run(tmp_path / "asr", "asr", asr_facts())
    other = make_run(tmp_path / "other", "asr", asr_facts(), beta=0.0, gamma=0.0)
    figures = "compare fig2-drift fig5-spectra fig6-prototypes fig7-distance fig8-interference "
    assert drawn(plot.draw([run, other])) == every | set((figures + "fig9-cases").split())
    first = {key: x for key, x in asr_facts().items() if key.startswith("1-")}
    one = make_run(tmp_path / "one", "asr", first, ((80, None), (None, None)))
    assert drawn(plot.draw([one])) == every | alone  # nothing can have drifted
    facts = {f"{i}-{i}-picture": np.zeros((2, 96, 96, 3), np.uint8) for i in (1, 2)}
    facts |= {f"2-{i}-probability": np.eye(2) for i in (1, 2)}
    runs = [make_run(tmp_path / str(n), "mllm_cl", facts, shots=n) for n in (4, 8)]
    figures = every | {"cases", "confusion", "compare", "shots"}
    assert drawn(plot.draw(runs, tmp_path / "figures")) == figures


def test_any_stage_names_and_damaged_runs(tmp_path, monkeypatch, capsys):
    """Warnings are errors here: glyphs that the font lacks, layouts that collapse."""
    monkeypatch.setattr(sys.modules[__name__], "STAGES", ["$x_1^2$ <b> " * 9, "颜色识别"])
    run = make_run(tmp_path / "run", "baselines", {})
    assert drawn(plot.draw([run])) == {"accuracy", "matrix", "loss"}
    assert [len(name) for name in plot.numbered(["n" * 99, "b"])] == [16, 3]
    record = json.loads((run / "summary.json").read_text())
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(lines.splitlines()[0])  # a run of one step
    plot.draw([run])
    for change in ({"matrix": [[1]]}, {"stages": 7}, {"scorers": []}, {"args": None}):
        (run / "summary.json").write_text(json.dumps(record | change))
        with pytest.raises(InputError, match="damaged, or of another version"):
            plot.draw([run])
    (run / "summary.json").write_text(json.dumps(record))
    (run / "metrics.jsonl").write_text(lines.replace("stage", "age"))
    with pytest.raises(InputError, match="damaged, or of another version: KeyError"):
        plot.draw([run])
