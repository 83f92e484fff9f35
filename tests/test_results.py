"""Sweeps, records and tables of results/: what is committed fits together, and new runs join it."""

import importlib
import json
import math
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import run_here

import attention
import data
import eval as evaluation
from benchmarks import STREAMS
from files import InputError, read_json, write_text

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "results"))  # run.py is a script, and imports its neighbors
run, sweeps, tables = (importlib.import_module(name) for name in ("run", "sweeps", "tables"))
causes = importlib.import_module("causes")

FAKE = """import json, os, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
run, seed = json.load(open("record.json")), int(flags["--seed"]) * ("--deaf" not in flags)
run["metrics"]["AP"] = 50 + seed + int(flags.get("--gain", 0)) * (1 + seed)
run |= {"stream": flags["--stream"], "seed": seed}
os.makedirs(flags["--out"])
json.dump(run, open(flags["--out"] + "/summary.json", "w"))"""


def record(stream="one", seed=0, ap=50.0, **facts):
    """A record of two tasks, of which the first loses ten points."""
    matrix = [[ap + 10, None], [ap, ap]]
    facts = {"script": "baselines", "args": {"rank": 16, "method": "sequential"}} | facts
    usual = {"stages": ["a", "b"], "matrix": matrix, "seconds": 60.0, "peak_memory_mb": 500.0}
    usual |= {"threads": 1, "versions": {"cpu": "a"}}
    return usual | {"stream": stream, "seed": seed, "metrics": evaluation.metrics(matrix)} | facts


def lines_of(text):
    """{first cell: other cells} of a Markdown table, with ordinary spaces."""
    cells = [line.replace("\u00a0", " ").strip("|").split("|") for line in text.split("\n")]
    return {first.strip(): [cell.strip() for cell in others] for first, *others in cells}


def test_a_sweep_has_means_deviations_intervals_and_missing_cells():
    rows = {
        "sequential": {seed: record(seed=seed, ap=50.0 + seed) for seed in range(3)},
        "better": {0: record(ap=54.0), 1: record(seed=1, ap=56.0), 2: None},
        "never": dict.fromkeys(range(3)),
    }
    text = tables.sweep_tables("try", {"one": rows})
    first, second, third = (lines_of(table) for table in text.split("\n\n")[1:])
    assert first["sequential"][:4] == ["3", "51.0 ± 1.0", "", "10.0 ± 0.0"]
    # differences are 4 and 5; t with one degree of freedom is 12.706
    low, high = (4.5 + sign * 12.706205 * 0.5 for sign in (-1, 1))
    difference = f"+4.5 [{low:+.1f}, {high:+.1f}]"
    assert first["better"][:3] == ["2 (missing 2)", "55.0 ± 1.4", difference]
    assert first["never"][:2] == ["0 (missing 0, 1, 2)", "-"]
    assert third["better"] == ["55.0", "55.0"] and third["never"] == ["missing", "missing"]
    assert second["row"] == ["MFT", "kept samples", "seconds", "MB"]


@pytest.mark.parametrize("name", sweeps.SWEEPS)
def test_records_are_those_of_commands_that_scripts_understand(name, monkeypatch):
    """Every command parses, into a folder of its own, and its record has the same settings."""
    config = SimpleNamespace(hidden_size=128, model_type="llama")
    monkeypatch.setattr(data, "text_config", lambda model: config)
    records, commands, folders = run.read(name), sweeps.cells(name), set()
    assert records and set(records) <= set(commands)
    assert len(records) == len((ROOT / "results" / f"{name}.jsonl").read_text().splitlines())
    assert list(records) == sorted(records, key=lambda cell: run.position(name, cell))
    for cell, command in commands.items():
        script, *flags = shlex.split(command)
        args = vars(importlib.import_module(Path(script).stem).parse(flags))
        folders.add(args["out"])
        if cell not in records:
            continue
        assert not run.changed(records[cell], command) and records[cell]["seconds"] > 0
        if order := args["order"]:
            stages = list(STREAMS[cell[1]].stages)
            assert records[cell]["stages"] == data.ordered(stages, order)
        metrics = evaluation.metrics(records[cell]["matrix"])
        assert math.isfinite(metrics["AP"])
        for key, value in records[cell]["metrics"].items():
            assert metrics[key] == pytest.approx(math.nan if value is None else value, nan_ok=True)
    assert len(folders) == len(commands)


def test_every_table_is_printed(capsys, monkeypatch):
    monkeypatch.delitem(tables.TABLES, "figures")  # it draws
    for name in (*tables.TABLES, "cram", "asr-swap"):
        run.main([name, "--table"])
        assert capsys.readouterr().out.count("\n|") > 3


def test_what_hides_the_image_hides_all_of_it_and_nothing_else(tiny, samples):
    """Answers with the image hidden from all text do not depend on it; with nothing hidden they are
    the usual ones."""
    pictured = [sample for sample in samples if sample.image][:4]
    batch, hidden = tiny.batch(pictured, train=False), causes.Hidden()
    other = batch | {"features": batch["features"].flip(0) + 1}
    usual, told = tiny.generate(batch, 6), {}
    hidden.layers = range(tiny.depth)
    causes.ALL_ATTENTION_FUNCTIONS.register("capture", hidden)
    try:
        for kind in causes.ROWS:
            hidden.choose(kind, batch)
            told[kind] = [tiny.generate(seen, 6) for seen in (batch, other)]
    finally:
        causes.ALL_ATTENTION_FUNCTIONS.register("capture", attention._attention)
    assert told["nothing"][0] == usual != told["nothing"][1]
    assert told["all text"][0] == told["all text"][1] != usual


def test_a_missing_cell_is_run_and_added_once(
    stream_folder, tiny_folder, tmp_path, monkeypatch, capsys
):
    command = f"{ROOT / 'baselines.py'} --method zeroshot --model {tiny_folder}"
    sweep = sweeps.Sweep(["toy"], [0], {"zero-shot": command}, records=tmp_path)
    monkeypatch.setitem(sweeps.SWEEPS, "try", sweep)
    monkeypatch.chdir(tmp_path)
    Path("toy").symlink_to(stream_folder)
    started = []

    def call(words, **_):
        started.append(words)
        if "--resume" not in words:
            run_here("baselines", words[2:], words[-1])
        return 0

    monkeypatch.setattr(run.subprocess, "call", call)
    for _ in range(2):
        run.run_sweep("try")
        (line,) = Path("try.jsonl").read_text().splitlines()
    run.add("try", ("zero-shot", "toy", 0), Path("none"))  # run again for its experts: no change
    entry = json.loads(line)
    assert entry["row"] == "zero-shot" and entry["script"] == "baselines" and entry["seconds"] > 0
    Path("try.jsonl").unlink()
    run.run_sweep("try")  # the run is there, and only its record is made again
    assert Path("try.jsonl").read_text() == f"{line}\n" and started[1][-1] == "--resume"
    assert len(started) == 2
    monkeypatch.setattr(run, "SWEEPS", {"try": sweep})
    for _ in range(2):  # anew each time
        run.again(5)
        assert "runs/again/try/zero-shot-toy-0" in started[-1] and "--resume" not in started[-1]
        assert capsys.readouterr().out.endswith("1 equal, 0 inside, 0 outside, 0 no interval\n")
    assert Path("try.jsonl").read_text() == f"{line}\n"
    entry["args"]["rank"] += 1  # the default was another one
    write_text("try.jsonl", json.dumps(entry) + "\n")
    run.run_sweep("try")
    assert read_json("try.jsonl")[0]["args"]["rank"] == entry["args"]["rank"] - 1
    assert "--resume" not in started[-1]


def test_a_run_again_is_equal_or_inside_the_interval_of_its_row_or_outside():
    records = {("try", "row", "one", seed): record(seed=seed, ap=50.0 + seed) for seed in range(3)}
    records |= {("try", "alone", "one", 0): record()}
    half = 4.302653 / math.sqrt(3)  # t with two degrees of freedom; the deviation is 1
    now = {key: was["metrics"]["AP"] for key, was in records.items()}
    now["try", "alone", "one", 0] += 0.1
    now["try", "row", "one", 1] += half - 0.01
    now["try", "row", "one", 2] -= half + 0.01
    text = tables.again(records, {key: record(ap=ap) for key, ap in now.items()})
    words = [line.split("|")[-2].strip() for line in text.split("\n")[2:6]]
    assert words == ["equal", "inside", "outside", "no interval"]
    assert text.endswith("1 equal, 1 inside, 1 outside, 1 no interval")


def test_what_a_run_stores_and_keeps():
    def counted(script="baselines", **args):
        flags = f" --buffer={args['buffer']}" if args.get("method") == "ewc" else ""
        facts = {"stored_parameters": [100, 2000], "command": f"python {script}.py{flags}"}
        facts["args"] = {"rank": 16, "shots": 9} | args
        values = tables.details(record(script=script, **facts))
        assert values["stored (1000)"] == 2.0  # after the last of two stages
        return values["kept samples"]

    assert counted(method="sequential", buffer=20) == 0  # old records have the default of replay
    assert counted(method="replay", buffer=7) == counted(method="ewc", buffer=7) == 7
    assert counted("mllm_cl", router="mllm") == 9 and counted("mllm_cl", router="prototype") == 0
    assert counted("cram") == 0 and math.isnan(counted(method="joint"))


def test_methods_are_timed_on_one_processor_and_paired_by_seed():
    plain = {seed: record(seed=seed, ap=40.0 + seed) for seed in range(2)}
    slow = {seed: record(seed=seed, ap=45.0, seconds=90.0) for seed in range(2)}
    away = {0: record(seconds=90.0, versions={"cpu": "b"}), 1: None}
    results = {
        "all": {"one": {"sequential": plain, "slow": slow, "joint": away}},
        "all-baselines": {"one": {"sequential": {}}},
    }
    rows = tables.methods(results)
    assert [runs["time"] for runs in rows["slow"]["one"].values()] == [1.5, 1.5]
    assert math.isnan(rows["joint"]["one"][0]["time"])
    (whole, counts), (by_stream,) = tables.gain(rows["slow"], rows["sequential"])
    assert whole == by_stream == "+4.5 [-1.9, +10.9]" and counts == "0, 0"  # 5 and 4 points
    seeds, means = tables.shared_means(rows)
    assert seeds == {"one": {0}} and means["slow"]["AP"] == [45.0]


def test_the_best_table_has_the_six_best_and_the_methods_of_the_papers():
    rows = ["sequential", *tables.PAPERS, *"abcdefg", "joint"]
    ap = {row: 50.0 + k for k, row in enumerate(rows)}
    every = {row: {0: record(ap=ap[row])} for row in rows}
    text = tables.best({"all": {"one": every}, "all-baselines": {"one": {"sequential": {}}}})
    lines = lines_of(text)
    assert list(lines)[2:] == ["joint", *"gfedcb", *reversed(tables.PAPERS), "sequential"]
    assert lines["g"][0] == "**60.0**" and lines["f"][0] == "*59.0*" and lines["joint"][0] == "61.0"


def test_one_command_compares_a_script_of_the_reader(tmp_path, monkeypatch, capsys):
    def out(flags=""):
        words = f"--script far/mine.py --streams 'ucit,my own' --flags '--gain 4' {flags}"
        run.main(shlex.split(words))
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    for name in ("baselines.py", "far/mine.py", "my own/train.json", "record.json"):
        write_text(name, FAKE if name.endswith("py") else json.dumps(record()))
    done, _, table = out().split("`--stream ")  # the three differences are 4, 8 and 12
    assert lines_of(table.split("\n\n")[1])["mine.py --gain 4"][2] == "+8.0 [-1.9, +17.9]"
    assert done.count("done") == 12 and out("--seeds 0-3 --streams 'my own'").count("done") == 2
    wrong = {"--seeds 2-1": "0-4", "--streams x": "vqacl", "--flags --limit=9": "--shared"}
    for flags, words in (wrong | {"--flags '--deaf 1' --seeds 1": "stream and seed"}).items():
        with pytest.raises(InputError, match=words):
            out(flags)
    write_text("far/mine.py", FAKE + "# another version")
    assert out("--table").count("missing 0, 1, 2") == 4
