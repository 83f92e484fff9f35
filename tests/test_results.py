"""What is committed fits together: records, base model, README."""

import json
import re
import shutil
from pathlib import Path

import pytest

import eval as evaluation
import sweep

ROOT = Path(__file__).resolve().parent.parent
RECORDS = sorted((ROOT / "results").glob("*/*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_record_comes_from_the_shipped_model(path):
    record = evaluation.load_record(path)
    assert record["model_sha256"] == evaluation.model_sha256(str(ROOT / "assets" / "tiny-llava"))
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
        for name in re.findall(r"<!-- table (\S+) -->\n(?=[^<]*, \1, seeds)", page.read_text()):
            assert f"## {name}\n\n{sweep.block(name)}\n" in printed


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
