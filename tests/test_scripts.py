"""The scripts as a user runs them: whole runs on a small stream with a random tiny LLaVA.

Most runs happen inside this process, since importing torch takes longer than they do; what is about
processes (exit codes, a kill) starts one.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import asr
import baselines
import cram
import data
import eval as evaluation
import mllm_cl
import model

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"asr": asr, "baselines": baselines, "cram": cram, "mllm_cl": mllm_cl}


def run_here(script, flags, out):
    """A run of a script in this process; returns its folder."""
    module = SCRIPTS[script]
    args = module.parse([*flags, "--out", str(out)])
    stream = data.load_stream(data.resolve_defaults(args))
    if script != "asr":
        module.check_stream(args, stream)
    run = evaluation.start_run(args, f"{script}.py")
    module.main(args, stream, run)
    return run


def start(script, flags, out, **kwargs):
    """A run of a script in a process of its own."""
    command = [sys.executable, f"{script}.py", *map(str, flags), "--out", str(out)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=env, **pipes, **kwargs)


def kill_after(lines, script, flags, run):
    """Start a run, kill it when it has logged so many steps; returns its metrics.jsonl."""
    process, metrics = start(script, flags, run), run / "metrics.jsonl"
    while process.poll() is None and (
        not metrics.exists() or metrics.read_bytes().count(b"\n") < lines
    ):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (run / "summary.json").exists()
    return metrics


def results(run):
    """Everything of a run that must not depend on when, where or how often it was started."""
    files = [run / "matrix.json", *(run / "lora").rglob("*.safetensors")]
    files = sorted(str(p.relative_to(run)) for p in [*files, *(run / "predictions").iterdir()])
    return {name: (run / name).read_bytes() for name in files}


@pytest.fixture(scope="session")
def asr_run(flags, tmp_path_factory):
    """An uninterrupted run of the method, with skills that return and both losses at work."""
    return run_here("asr", [*flags, "--skills", "parser"], tmp_path_factory.mktemp("run") / "asr")


def test_a_run_leaves_its_records(asr_run):
    for name in ("args.json", "summary.json", "spectra.npz", "checkpoint/state.pt"):
        assert (asr_run / name).is_file(), name
    lines = [json.loads(line) for line in (asr_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 19))  # 3 stages, 2 epochs, 3 steps
    assert all(line["spectral"] == 0 for line in lines if line["stage"] == 1)
    assert all(line["spectral"] > 0 and line["weight"] > 0 for line in lines if line["stage"] > 1)
    assert all(line["geometry"] > 0 for line in lines[1:])  # at the first step LoRA is still zero
    rates = [1 / 3, 2 / 3, 1, 1, 0.75, 0.25]  # three steps up, then a cosine; in every stage
    assert [line["lr"] / 2e-2 for line in lines] == pytest.approx(3 * rates)
    summary = json.loads((asr_run / "summary.json").read_text())
    assert summary["tower_runs"] == 3 * 17 - 2  # every image once; two samples have none
    # 2 skills: a prototype each, and the centroid of the parser with its count
    assert summary["prototype_floats"] == 2 * (2 * 40 + 8 + 1) + 2 * (64 + 1)
    assert len(summary["drift"]) == 4  # two skills in each of the two earlier stages
    assert all(nats > 0 for nats, _ in summary["drift"].values())
    assert evaluation.rescore(asr_run) == []
    spectra = np.load(asr_run / "spectra.npz")
    assert spectra["3-2-phi"].shape == (5, 40) and np.isnan(spectra["3-2-phi"][3]).all()
    assert np.isfinite(spectra["3-1-map"]).all() and spectra["2-2-picture"].dtype == np.uint8


def test_a_run_draws_its_figures(asr_run):
    names = {path.name for path in (asr_run / "figures").iterdir()}
    assert len(names) == 9 and all(
        (asr_run / "figures" / name).stat().st_size > 5000 for name in names
    )


def test_no_method_is_sequential_lora_bit_for_bit(flags, tmp_path):
    plain = run_here("asr", [*flags, "--beta", "0", "--gamma", "0"], tmp_path / "asr")
    sequential = run_here("baselines", flags, tmp_path / "sequential")
    assert results(plain) == results(sequential)
    more = {plain: ["--beta", "0", "--gamma", "0"], sequential: []}
    for run, script in ((plain, "asr"), (sequential, "baselines")):  # stopped just before the end
        before = evaluation.read_json(run / "summary.json")
        (run / "summary.json").unlink()
        run_here(script, [*flags, *more[run], "--resume"], run)
        after = evaluation.read_json(run / "summary.json")
        for key in {"matrix", "metrics", "stored_parameters", "drift"} & before.keys():
            assert before[key] == after[key]
    asr.plot([plain, plain], tmp_path / "figures")  # two runs side by side
    with pytest.raises(data.InputError, match="holds no spectra"):
        asr.plot([sequential], tmp_path / "figures")


def test_bfloat16_checkpointing_accumulation_and_a_held_out_group(flags, tmp_path):
    more = "--dtype bf16 --gradient_checkpointing --accumulate 2 --limit 8 --skills shared"
    args = asr.parse([*flags, *more.split(), "--out", str(tmp_path / "run")])
    stream = data.load_stream(data.resolve_defaults(args))
    stream.novel = [data.Stage(s.name, [], s.test[:2], s.metric) for s in stream.stages]
    run = evaluation.start_run(args, "asr.py")
    asr.main(args, stream, run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and lines[-1]["spectral"] > 0 and lines[-1]["geometry"] > 0
    assert (run / "predictions" / "after-3-on-novel-2.jsonl").read_text().count("\n") == 2
    assert len(json.loads((run / "summary.json").read_text())["novel"]["matrix"]) == 3


def test_joint_and_zeroshot(flags, tmp_path):
    for method, more in (("joint", ["--blind"]), ("zeroshot", [])):
        run = run_here("baselines", [*flags, "--method", method, *more], tmp_path / method)
        matrix = json.loads((run / "matrix.json").read_text())["matrix"]
        assert matrix[0] == [None] * 3 and None not in matrix[2]
        summary = json.loads((run / "summary.json").read_text())
        assert (summary["trainable_parameters"] == 0) == (method == "zeroshot")
        assert ("blind" in summary) == (method == "joint")
    baselines.plot([run], tmp_path / "figures")


def test_replay_keeps_a_uniform_sample(flags, tmp_path):
    args = baselines.parse([*flags, "--method", "replay"])
    stages = data.load_stream(data.resolve_defaults(args)).stages
    stages[2].blocks = [[0, 1, 2], list(range(3, 12))]
    mixed = baselines.with_replay(stages[2], stages[:2], 4, 0)
    old = mixed.train[12:]
    assert len(old) == 8 and [s.stage for s in old] == ["one"] * 4 + ["two"] * 4
    assert sorted(i for block in mixed.blocks for i in block) == list(range(20))
    assert sorted(data.train_order(mixed, 0, 0)) == list(range(20))
    drawn = [
        baselines.with_replay(stages[1], stages[:1], 4, seed).train[12:] for seed in range(300)
    ]
    count = {s.id: 0 for s in stages[0].train}
    for samples in drawn:
        for s in samples:
            count[s.id] += 1
    assert all(60 < n < 140 for n in count.values())  # 300 x 4 / 12 = 100 each
    run = run_here("baselines", [*flags, "--method", "replay", "--buffer", "2"], tmp_path / "run")
    steps = [json.loads(line)["stage"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [steps.count(k) for k in (1, 2, 3)] == [6, 8, 8]  # 12, 14 and 16 samples, twice, by 4


def test_killed_and_resumed_gives_the_same_bytes(asr_run, flags, tmp_path):
    run, more = tmp_path / "killed", ["--skills", "parser", "--save_every", "2"]
    metrics = kill_after(9, "asr", [*flags, *more], run)  # stage 2, past its first checkpoint
    state = torch.load(run / "checkpoint" / "state.pt", weights_only=True)
    assert state["stage"] == 1 and state["unfinished"]["steps"] >= 2
    with open(metrics, "a") as file:
        file.write('{"step": 99')  # and the kill may have torn the last line
    with pytest.raises(data.InputError, match="--resume"):
        run_here("asr", [*flags, *more], run)
    run_here("asr", [*flags, *more, "--resume"], run)
    assert results(run) == results(asr_run)
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 19))
    with pytest.raises(SystemExit) as finished:
        run_here("asr", [*flags, *more], run)
    assert finished.value.code == 0
    with pytest.raises(data.InputError, match="beta"):
        run_here("asr", [*flags, *more, "--beta", "1"], run)


def test_nan_loss_stops_and_keeps_the_last_good_checkpoint(flags, tmp_path):
    process = start("asr", [*flags, "--lr", "1e30", "--save_every", "1"], tmp_path / "run")
    output, errors = process.communicate()
    assert process.returncode == 2, errors
    message = errors.strip().splitlines()[-1]
    assert message.startswith("error: stage 1/3 one, step") and "--lr" in message
    state = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert state["step"] == len(lines) >= 1
    assert "question row" in output  # the decoded example was shown before training


def test_bad_flags_are_reported_before_torch_is_imported(flags, tmp_path):
    program = f"""
import runpy, sys
sys.argv = ["baselines.py", "--stream", "nothing", "--out", {str(tmp_path / "run")!r}]
try:
    runpy.run_path("baselines.py", run_name="__main__")
finally:
    print("torch" in sys.modules)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=data.ROOT)
    assert done.returncode == 2 and done.stdout.endswith("\nFalse\n")
    assert not (tmp_path / "run").exists()
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "wrong",
    ["--beta -1", "--tau 0", "--layers 0", "--ema 1", "--save_every -1", "--bins 0", "--gamma nan"],
)
def test_flags_of_the_method_are_checked(wrong):
    with pytest.raises(data.InputError, match=wrong.split()[0]):
        asr.parse(wrong.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device")
def test_a_device_that_is_not_there(flags, tmp_path):
    with pytest.raises(data.InputError, match="--device cuda:1: torch finds 0 CUDA devices"):
        run_here("asr", [*flags, "--device", "cuda:1"], tmp_path / "run")


def test_too_many_layers(flags, tmp_path):
    with pytest.raises(data.InputError, match="--layers 5: this language model has 4"):
        run_here("asr", [*flags, "--layers", "5"], tmp_path / "run")
    args = data.resolve_defaults(asr.parse([*flags, "--out", str(tmp_path / "run")]))
    assert evaluation.start_run(args, "asr.py") == tmp_path / "run"  # the folder is not lost
    assert evaluation.read_json(tmp_path / "run" / "args.json")["layers"] == 4


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read(script):
    names = (script, "data", "eval", "model")
    own, common, *others = ((ROOT / f"{name}.py").read_text() for name in names)
    before, after = common.split("def add_common_flags")
    used = own.split("parse_args(argv)")[1] + before + after.split("# fmt: on")[1]
    used += "".join(others)
    for flag in vars(SCRIPTS[script].parse([])):
        assert re.search(rf"\bargs\.{flag}\b", used), f"--{flag} is read nowhere"


@pytest.mark.parametrize("parts", [0, 1, 2, 3, 7])
def test_shares_of_three_processes_are_the_whole(parts, monkeypatch):
    done = []  # what each process would send
    monkeypatch.setattr(model, "gather", lambda value: done.append(value) or [])
    for me in range(3):
        monkeypatch.setattr(model, "processes", lambda me=me: (me, 3))
        model.share_out(lambda x: 10 * x, range(parts))
    monkeypatch.setattr(model, "gather", lambda value: done)
    assert model.share_out(lambda x: 10 * x, range(parts)) == [10 * k for k in range(parts)]


@pytest.mark.parametrize(
    "script", ["asr", "cram", "mllm_cl", "baselines olora", "baselines ewc", "baselines hide"]
)
def test_two_processes_are_one(script, flags, stream_folder, tmp_path):
    """torchrun shares the micro-batches out: losses and answers as from one process.

    Without dropout and L_geo, which live on the micro-batch.
    """
    flags = [*flags, "--dropout", "0", "--batch_size", "4", "--accumulate", "2", "--limit", "6"]
    script, *method = script.split()
    if script == "asr":
        flags += ["--gamma", "0", "--skills", "parser"]
    if script == "cram":
        flags += ["--buffer_rank", "6", "--rank", "4", "--alpha", "8", "--r_min", "1"]
        flags += ["--targets", "q,v"]
    if script == "baselines":
        flags += ["--method", *method, "--olora_lambda", "0.1", "--ewc_lambda", "1e4"]
        flags += [] if method == ["hide"] else ["--blind"]
    if script == "mllm_cl":
        spec = json.dumps({"descriptions": {name: name for name in ("one", "two", "three")}})
        shutil.copytree(stream_folder, tmp_path / "stream")
        (tmp_path / "stream" / "stream.json").write_text(spec)
        flags = [str(tmp_path / "stream") if x == str(stream_folder) else x for x in flags]
        flags += ["--router_epochs", "2", "--shots", "3"]
    alone = run_here(script, flags, tmp_path / "alone")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    both = [f"{script}.py", *map(str, flags), "--out", str(tmp_path / "both")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, "2", *both], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("everything is in") == 1
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (alone, tmp_path / "both")]
    losses = [[json.loads(line)["loss"] for line in part] for part in lines]
    assert len(losses[0]) == len(losses[1]) > 9
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-4)
    for file in sorted((alone / "predictions").iterdir()):
        assert file.read_bytes() == (tmp_path / "both" / "predictions" / file.name).read_bytes()
    if script == "asr":
        uneven = subprocess.run([*command, "3", *both], cwd=ROOT, env=env, capture_output=True,
                                text=True)  # fmt: skip
        assert uneven.returncode and "multiple of the 3 processes" in uneven.stderr
