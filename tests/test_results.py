"""What is committed fits together: records, base model, README."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_scripts import run_here

import eval as evaluation
import sweep
from data import InputError

ROOT = Path(__file__).resolve().parent.parent
RECORDS = sorted((ROOT / "results").glob("*/*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_record_comes_from_the_shipped_model(path):
    record = evaluation.load_record(path)
    assert record["model_sha256"] == sweep._shipped()
    assert evaluation.metrics(record["matrix"])["AP"] == pytest.approx(record["metrics"]["AP"])


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tables_and_line_numbers_are_up_to_date(page, tmp_path, monkeypatch):
    """If this fails after a change: python sweep.py --readme"""
    monkeypatch.chdir(ROOT)
    copy = tmp_path / page.name
    shutil.copyfile(page, copy)
    sweep.write_page(copy)
    assert copy.read_text() == page.read_text()


def test_one_command_prints_every_table(monkeypatch, capsys):
    monkeypatch.setattr(sweep, "RESULTS", ROOT / "results")  # main sets it; this undoes that
    assert evaluation.main([str(ROOT / "results"), "--table", "--markdown"]) == 0
    printed = capsys.readouterr().out
    for page in PAGES:
        for name in re.findall(r"<!-- table (\S+) -->", page.read_text()):
            if name in sweep.SWEEPS or name in sweep.OTHER_TABLES:  # the rest has no records
                assert f"## {name}\n\n{sweep.block(name)}\n" in printed


def test_a_record_that_its_command_would_not_make_today_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    file, line = next(cell for cell in sweep.cells("report") if cell[0].exists())
    record = evaluation.read_json(file)
    assert sweep.outdated(record, line) == ""
    record["args"]["lr"] *= 2
    monkeypatch.setattr(sweep, "RESULTS", tmp_path)
    copy = tmp_path / "report" / file.name
    copy.parent.mkdir()
    evaluation.write_json(copy, record)
    with pytest.raises(InputError, match="is not what its command does now .lr .*, now "):
        sweep.records_of("report", record["stream"])


def test_a_record_of_another_tiny_llava_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    file, _ = next(cell for cell in sweep.cells("report") if cell[0].exists())
    record = evaluation.read_json(file) | {"model_sha256": "0" * 64}
    monkeypatch.setattr(sweep, "RESULTS", tmp_path)
    (tmp_path / "report").mkdir()
    evaluation.write_json(tmp_path / "report" / file.name, record)
    with pytest.raises(InputError, match="another tiny LLaVA"):
        sweep.records_of("report", record["stream"])


def test_the_table_of_all_methods_by_hand(monkeypatch):
    """Seed 2, which one row lacks, counts in no row of that stream; a stream counts as much as
    another, whatever its seeds; a row without records on a stream has no mean."""

    def record(stream, seed, ap, seconds):
        return {"stream": stream, "seed": seed, "metrics": {"AP": ap, "AF": ap / 10, "MFT": None},
                "seconds": seconds, "stored_parameters": [1000, 2000], "script": "asr",
                "args": {}, "stages": ["a", "b"]}  # fmt: skip

    def records(label, stream, seeds, ap, seconds):
        return {label: {k: record(stream, k, ap + k, seconds) for k in seeds}}

    def rows(name, stream):
        empty = {label: {} for label in sweep.SWEEPS[name][2]}
        if name == "all-baselines":
            return empty | (records("ewc", "one", [0], 40.0, 30) if stream == "one" else {})
        if stream == "one":
            own = records("sequential", "one", range(3), 10.0, 10)
            return empty | own | records("ASR", "one", range(2), 20.0, 20)
        own = records("sequential", "two", [0], 50.0, 10)
        return empty | own | records("ASR", "two", [0], 70.0, 40)

    monkeypatch.setattr(sweep, "rows_of", rows)
    monkeypatch.setattr(sweep, "ALL", ["one", "two"])
    lines = [re.split(r"\s{2,}", line.strip()) for line in sweep.choice_table(False).split("\n")]
    lines = {line[0]: line[1:] for line in lines}
    assert lines["sequential"][:3] == ["10.0", "50.0", "30.0"]  # seed 0 alone: ewc has no other
    assert lines["EWC"][:3] == ["40.0", "missing", "missing"]
    assert lines["ASR"] == ["20.0", "70.0", "45.0", "-", "4.5", "2.0", "0.0", "3.0"]
    assert lines["seeds that all rows have"][:2] == ["0", "0"]
    without_ewc = {label: {} for label in sweep.OTHERS}
    monkeypatch.setattr(sweep, "rows_of", lambda name, s: without_ewc | rows("all", s))
    line = sweep.choice_table(False).split("\n")[1].split()
    assert line[:4] == ["sequential", "10.5", "50.0", "30.2"]


def test_a_row_comes_back_from_its_command(tmp_path, monkeypatch):
    """The cheapest record, from the command printed under its table: byte-equal on the machine that
    made it, within a point elsewhere."""
    monkeypatch.chdir(ROOT)
    file = ROOT / "results" / "regime" / "zeroshot-domains-0.json"
    printed = re.findall(r"# zeroshot\n(python .+)", sweep.commands("regime"))[0]
    line = printed.replace("STREAM", "domains").replace("SEED", "0")
    assert f"python {dict(sweep.cells('regime'))[Path(*file.parts[-3:])]}" == line
    out = tmp_path / "run"
    script, *flags = shlex.split(line)[1:]
    run_here(Path(script).stem, flags[: flags.index("--out")], out)
    record, again = (evaluation.read_json(x) for x in (file, out / "summary.json"))
    assert again["metrics"]["AP"] == pytest.approx(record["metrics"]["AP"], abs=1)


def test_drift_correlation_by_hand():
    x, rng = np.linspace(1, 2, 30), np.random.default_rng(0)

    def record(seed, y):
        drift = {str(k): [a, b] for k, (a, b) in enumerate(zip(x, y, strict=True))}
        return {"seed": seed, "drift": drift | {"never": [None, 1.0]}}

    noisy = [record(seed, 3 * x + rng.normal(size=30)) for seed in (0, 0, 1, 2)]
    points, (mean, low, high), n = evaluation.drift_correlation(noisy)
    assert points.shape == (2, 120) and n == 3 and low < mean < high
    r = [np.corrcoef(x, [y for _, y in list(e["drift"].values())[:-1]])[0, 1] for e in noisy]
    z = np.arctanh(r)
    assert mean == pytest.approx(np.tanh(np.mean([(z[0] + z[1]) / 2, z[2], z[3]])))
    falling = [record(seed, -x + 0.01 * rng.normal(size=30)) for seed in range(4)]
    assert evaluation.drift_correlation(falling)[1][2] < -0.9


def test_the_program_in_the_readme_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (program,) = re.findall(r"```python\n(.+?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert '"cpu"]' in program
    short = program.replace('"cpu"]', '"cpu", "--limit", "8", "--limit_test", "4"]')
    exec(short, {})
    lines = capsys.readouterr().out.splitlines()
    assert [len(line.split(",")) for line in lines[-5:]] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!http)([^)#]+)", page.read_text())
    assert links and all((page.parent / link).exists() for link in links)


def test_a_sweep_skips_what_is_there_and_names_what_is_missing(tmp_path, monkeypatch):
    """One cell is run, the second start runs nothing, the other seeds are named as missing."""
    monkeypatch.setattr(sweep, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sweep, "RUNS", tmp_path / "runs")
    rows = {"zeroshot": "baselines.py --method zeroshot --limit_test 2"}
    monkeypatch.setitem(sweep.SWEEPS, "try", (["domains"], range(2), rows))
    monkeypatch.chdir(ROOT)
    (record, line), second = sweep.cells("try")
    assert sweep.run_cell(record, line) == ""
    before = record.stat().st_mtime_ns
    assert sweep.run_cell(record, line) == "" and record.stat().st_mtime_ns == before
    assert not second[0].exists()
    assert "missing 1" in sweep.block("try")
    assert json.loads(record.read_text())["script"] == "baselines"
    assert "exit code 2" in sweep.run_cell(second[0], second[1].replace("domains ", "nowhere "))
