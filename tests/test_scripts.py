"""The scripts as a user runs them: whole runs on a small stream with a random tiny LLaVA.

Runs happen inside this process or in a fork of it, since importing torch, loading a model and
drawing figures each take longer than a run.
"""

import itertools
import json
import os
import re
import runpy
import shlex
import signal
import sys
import traceback
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import streams  # of mini/
import torch
import torch.distributed.launcher.api as launch
from conftest import run_here

import asr
import baselines
import cram
import data
import eval as evaluation
import experts
import mllm_cl
import plot

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a fork cannot use the GPU of its parent

ROOT = Path(data.__file__).parent
README = (ROOT / "README.md").read_text()
SCRIPTS = {"asr": asr, "cram": cram, "mllm_cl": mllm_cl, "experts": experts}
SCRIPTS |= {"baselines": baselines}
FLAGS = {
    "asr": "--skills parser",
    "cram": "--rank 4 --targets q,v --buffer_share 0.5 --published 7",
    "mllm_cl": "--shots 3 --router_steps 2 --router_batch 4",
    "experts": "--start alike",
    "joint": "--blind",
    "replay": "--buffer 2",
    "ewc": "--ewc_lambda 1e4",
    "olora": "--olora_lambda 0.1",
}
METHODS = list(baselines.METHODS)
# What a method keeps from stage to stage must survive a kill, and be equal in all processes.
WITH_STATE = "asr cram mllm_cl experts ewc lwf olora hide disco reglora clmoe smolora".split()
STEPS = {"replay": 4 + 5 + 6, "zeroshot": 0, "mllm_cl": 3 * 4 + 6 + 2}  # the others: 3 * 4


def script_of(name):
    """(script, flags) of a run that is named after its script or its baseline."""
    if name in METHODS:
        return "baselines", ["--method", name, *FLAGS.get(name, "").split()]
    return name, FLAGS[name].split()


def run_named(name, flags, out, figures=False):
    script, further = script_of(name)
    return run_here(script, [*flags, *further], out, figures)


def run_killed(name, flags, out, point, n):
    """A run in a process of its own that ends by SIGKILL after the n-th call of Run.<point>."""
    child = os.fork()
    if not child:
        try:
            calls, method = itertools.count(1), getattr(evaluation.Run, point)

            def last_call(*args, **values):
                method(*args, **values)
                if next(calls) == n:
                    os.kill(os.getpid(), signal.SIGKILL)

            setattr(evaluation.Run, point, last_call)
            run_named(name, flags, out)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert (out / "checkpoint.pt").exists() and not (out / "summary.json").exists()


def results(run):
    """Everything of a run that must not depend on when, where or how often it was started."""
    files = [run / "matrix.json", run / "metrics.jsonl", *run.glob("facts.npz")]
    files += [*run.glob("experts.pt"), *run.rglob("*.safetensors"), *run.glob("predictions/*")]
    record = json.loads((run / "summary.json").read_text())
    for key in ("seconds", "seconds_by_part", "peak_memory_mb", "commit", "command"):
        del record[key]
    return {str(path.relative_to(run)): path.read_bytes() for path in files} | {"record": record}


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def small(flags):
    return [*flags, *"--epochs 1 --batch_size 3 --device cpu".split()]


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """name -> folder of its uninterrupted run, made once."""
    home = tmp_path_factory.mktemp("runs")
    drawn = ("asr", "cram", "mllm_cl", "experts", "sequential")
    return cache(lambda name: run_named(name, small, home / name, name in drawn))


@pytest.mark.parametrize("name", [*WITH_STATE[:4], *METHODS])
def test_a_run_leaves_its_record_and_figures(name, runs):
    run, lines = runs(name), lines_of(runs(name))
    assert [line["step"] for line in lines] == list(range(1, STEPS.get(name, 12) + 1))
    assert all(line["loss"] > 0 and line["gradient_norm"] > 0 for line in lines)
    record = json.loads((run / "summary.json").read_text())
    once = name in ("zeroshot", "joint")  # fills the last row alone
    filled = np.isfinite(np.array(record["matrix"], dtype=float))
    assert filled.sum(1).tolist() == ([0, 0, 3] if once else [1, 2, 3])
    cells = {f"after-{t + 1}-on-{i + 1}.jsonl" for t, i in np.argwhere(filled)}
    cells |= {f"after-3-on-blind-{i}.jsonl" for i in (1, 2, 3) if name == "joint"}
    assert {path.name for path in (run / "predictions").iterdir()} == cells
    assert evaluation.rescore(run) == []
    assert (record["trainable_parameters"] == 0) == (name == "zeroshot")
    trained, stored = (np.max(record[f"{x}_parameters"]) for x in ("trainable", "stored"))
    more = {"ewc": 2 * trained, "olora": 2 * trained}  # three stages; F and center
    more |= {"hide": 2 * trained + 3 * (32 + 64), "disco": 2 * trained + 3 * 64}
    assert name not in more or stored - trained == more[name]
    grows = name in ("asr", "mllm_cl", "experts", "reglora", "smolora", *more)
    assert (stored > trained) == grows
    assert record["script"] == script_of(name)[0] and record["seconds"] > 0
    figures = {path.name for path in run.glob("figures/*") if path.stat().st_size > 5000}
    counts = {"asr": 9, "cram": 7, "mllm_cl": 5, "experts": 5, "sequential": 3}
    assert len(figures) == counts.get(name, 0)
    assert not figures or {"accuracy.png", "matrix.png", "loss.png"} <= figures
    assert (run / "report.html").stat().st_size > 5000
    assert bool(list(run.rglob("*.safetensors"))) == (name not in ("zeroshot", "cram"))


def test_the_losses_are_at_work_and_the_rate_rises_and_falls_in_every_stage(runs):
    lines = lines_of(runs("asr"))
    assert all((line["spectral"] > 0) == (line["stage"] > 1) for line in lines)
    assert all(line["geometry"] > 0 for line in lines[1:])  # at the first step LoRA is still zero
    rates = [0.5, 1, 1, 0.5]  # two steps up, then a cosine
    assert [line["lr"] / 2e-2 for line in lines] == pytest.approx(3 * rates)
    for name, loss in (("ewc", "ewc"), ("lwf", "lwf"), ("olora", "olora")):
        later = [line for line in lines_of(runs(name)) if line["stage"] > 1]
        assert all(line[loss] > 0 for line in later[1:]), name
    assert any(line["orthogonality"] > 0 for line in lines_of(runs("cram")))
    phases = [line["phase"] for line in lines_of(runs("cram"))]
    assert phases == 3 * (2 * ["buffer"] + 2 * ["expert"])


def test_no_method_is_sequential_lora_bit_for_bit(small, runs, tmp_path):
    plain = run_named("asr", [*small, "--beta", "0", "--gamma", "0"], tmp_path / "asr")
    sequential = results(runs("sequential"))
    same = {name: content for name, content in results(plain).items() if name in sequential}
    for name in ("metrics.jsonl", "record"):  # asr.py logs two losses more
        del same[name], sequential[name]
    lora = "lora/adapter_model.safetensors"
    assert same == sequential and same[lora] != results(runs("ewc"))[lora]


@pytest.mark.parametrize("name", WITH_STATE)
def test_killed_and_resumed_gives_the_same_bytes(name, runs, small, tmp_path, monkeypatch):
    run, again = tmp_path / "run", [*small, "--resume"]
    monkeypatch.setattr(SCRIPTS[script_of(name)[0]], "SAVE_EVERY", 1)
    run_killed(name, small, run, "log", 6)  # in the middle of stage 2
    assert torch.load(run / "checkpoint.pt", weights_only=True)["run_step"] == 5
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 99')  # the kill may have torn the last line
    # then in the middle of mllm_cl.py's router, or where cram.py's buffer has become an expert
    run_killed(name, again, run, "log", 5 if name == "mllm_cl" else 3)
    saved = torch.load(run / "checkpoint.pt", weights_only=True)
    assert saved["run_step"] == (9 if name == "mllm_cl" else 7)
    run_killed(name, again, run, "test", 1)  # before the checkpoint of this stage
    run_named(name, again, run)
    assert results(run) == results(runs(name))


def run_several(names, flags, home):
    """What each of torchrun's processes does here."""
    for name in names:
        try:
            run_named(name, flags, home / name)
        except SystemExit as end:  # of the process that does not write
            assert end.code == 0


@pytest.mark.parametrize("number", [2, 4])
def test_several_processes_are_one(number, small, tmp_path, capfd):
    """torchrun shares micro-batches and tests out: losses and answers as from one process.

    It forks its processes here, else they would spend most of their time importing torch.
    """
    flags = (
        f"--dropout 0 --epochs 2 --batch_size {2 * number} --accumulate {number} --order one,two"
    )
    flags = [*small, *flags.split(), "--limit", str(3 * number)]
    names = ["asr", "mllm_cl", "experts", "ewc", "clmoe"] if number == 2 else ["ewc"]
    run_several(names, flags, tmp_path / "one")
    assert capfd.readouterr().out.count("everything is in") == len(names)
    options = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "max_restarts": 0}
    options |= {"nproc_per_node": number, "start_method": "fork"}
    torchrun = launch.LaunchConfig(min_nodes=1, max_nodes=1, **options)
    launch.elastic_launch(torchrun, run_several)(names, flags, tmp_path / "many")
    assert capfd.readouterr().out.count("everything is in") == len(names)
    for name in names:
        one, many = (tmp_path / home / name for home in ("one", "many"))
        losses = [[line["loss"] for line in lines_of(run)] for run in (one, many)]
        assert len(losses[0]) == len(losses[1]) >= 8, name  # the second step is half a batch
        # four gradients are added up in another order, which training amplifies
        np.testing.assert_allclose(*losses, rtol={2: 1e-5, 4: 2e-3}[number], err_msg=name)
        np.testing.assert_allclose(losses[0][:2], losses[1][:2], rtol=1e-5, err_msg=name)
        texts = [(run / "predictions").iterdir() for run in (one, many)]
        texts = [{path.name: path.read_bytes() for path in paths} for paths in texts]
        assert texts[0] == texts[1], name
        assert json.loads((many / "args.json").read_text())["processes"] == number


def test_bfloat16_as_published_with_a_group_held_out(small, tmp_path, monkeypatch):
    def load_stream(args, load=data.load_stream):
        stream = load(args)
        stream.novel = [data.Stage(s.name, [], s.test[:2], s.metric) for s in stream.stages]
        return stream

    monkeypatch.setattr(data, "load_stream", load_stream)
    flags = "--dtype bf16 --batch_size 4 --accumulate 2 --order one,two --published"
    monkeypatch.setitem(FLAGS, "asr", flags)
    run = run_named("asr", small, tmp_path / "run")
    lines = lines_of(run)
    assert len(lines) == 6 and lines[-1]["spectral"] > 0 and lines[-1]["geometry"] > 0
    assert (run / "predictions" / "after-2-on-novel-2.jsonl").read_text().count("\n") == 2
    assert len(json.loads((run / "summary.json").read_text())["novel"]["matrix"]) == 2


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    small, tmp_path, monkeypatch
):
    monkeypatch.setattr(baselines, "SAVE_EVERY", 1)
    with pytest.raises(data.InputError, match=r"^step \d+: loss [^.]*; stopped. .* lower --lr"):
        run_named("sequential", [*small, "--lr", "1e30"], tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["run_step"] == len(lines_of(tmp_path)) >= 1
    assert all(x.isfinite().all() for x in state["lora"].values())


# Command line


@pytest.fixture
def shell(monkeypatch, capsys):
    """(exit code, stdout, stderr) of `python SCRIPT.py WORD ...`, in this process."""

    def call(script, *words):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, words)])
        capsys.readouterr()
        try:
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("name", ["asr", "cram", "mllm_cl", "ewc"])
def test_what_a_script_says_to_a_run_that_is_there(name, runs, small, shell, tmp_path, monkeypatch):
    script, further = script_of(name)
    words = [script, *small, *further, "--out", runs(name)]
    before = results(runs(name))
    for extra in ((), ("--resume",)):
        code, out, err = shell(*words, *extra)
        assert code == 0 and f"is finished. Its tables: python eval.py {runs(name)}" in out
    wrong = {("--seed", 1): "--seed 0, and now --seed is 1"}
    wrong |= {("--model", tmp_path / "none"): "does not exist", ("--lr", 1): "--lr 0.02, and now"}
    wrong[("--stream", tmp_path)] = "has no stages"
    for extra, sentence in wrong.items():
        code, out, err = shell(*words, *extra)
        assert code == 2 and err.startswith("error: ") and sentence in err
        assert err.count("\n") == 1
    code, out, err = shell(script, "--epoch", 3)
    assert code == 2 and err.endswith("error: unrecognized arguments: --epoch 3\n")
    assert results(runs(name)) == before

    drawn = []
    monkeypatch.setattr(plot, "draw", lambda *args: drawn.append(args))
    assert shell(script, "--plot", runs(name), runs("lwf"), "--out", "figures")[0] == 0
    assert drawn == [([str(runs(name)), str(runs("lwf"))], "figures")]


@pytest.mark.parametrize("script", [*SCRIPTS, "data", "eval", "plot"])
def test_help_fits_a_terminal_and_every_flag_is_read(script, shell, monkeypatch):
    monkeypatch.setenv("COLUMNS", "82")  # argparse leaves two columns free
    code, out, err = shell(script, "--help")
    assert code == 0 and len(out.splitlines()) <= 100 and max(map(len, out.splitlines())) <= 80
    if script in SCRIPTS:
        files = (script, "data", "eval", "model")
        read = "".join((ROOT / f"{name}.py").read_text() for name in files)
        for flag in vars(SCRIPTS[script].parse(["--plot", "RUN"])):
            assert re.search(rf"\bargs\.{flag}\b", read), f"--{flag} is read nowhere"


# README


def test_the_program_in_the_readme_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    """In a folder with the tiny LLaVA, and with fewer questions in the drawn stream."""
    program = re.search(r"```python\n(.+?)```", README, re.DOTALL)[1]
    (tmp_path / "mini").symlink_to(ROOT / "mini")
    monkeypatch.setattr(data, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert '"domains"' in program
    monkeypatch.setattr(streams, "DOMAIN_SIZE", {"train": 16, "test": 5})
    streams.replace_stream("domains", tmp_path / "data" / "mini" / "domains")
    exec(compile(program, "first.py", "exec"), {"__name__": "__main__"})
    out = capsys.readouterr().out
    numbers = [re.findall(r"\d+\.?\d*", line) for line in out.splitlines()[-5:]]
    assert "drawing" not in out and len(numbers) == 5 and all(numbers)


YOURS = ("first.py", "l2.py")  # the reader writes these


def test_commands_of_all_pages_name_scripts_and_flags_that_exist(monkeypatch):
    def text_config(model):
        width = 128 if "tiny" in model else 4096
        return SimpleNamespace(hidden_size=width, model_type="llama")

    monkeypatch.setattr(data, "text_config", text_config)
    pages, scripts = [ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "mini/README.md"], set()
    blocks = [re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL) for page in pages]
    for line in "".join(sum(blocks, [])).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        named = [k for k, word in enumerate(words) if word.endswith(".py") and word not in YOURS]
        for k in named:
            end = next((j for j in range(k, len(words)) if words[j] in ("&&", "|", ">")), None)
            script, flags = words[k].removesuffix(".py"), words[k + 1 : end]
            scripts.add(script)
            text = (ROOT / words[k]).read_text()
            if script in SCRIPTS:
                SCRIPTS[script].parse(flags)
            elif script == "data":
                data.common_flags("data.py", "").parse_args(flags)
            else:
                assert all(f'"{flag}"' in text for flag in flags if flag.startswith("--")), line
    assert scripts >= {*SCRIPTS, "data"}


def test_code_of_the_readme_is_as_wide_as_github_shows():
    blocks = re.findall(r"```\w*\n(.*?)```", README, re.DOTALL)
    assert blocks and [x for x in "".join(blocks).splitlines() if len(x) > 88] == []
