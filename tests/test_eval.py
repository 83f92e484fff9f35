"""Scorers, metrics, run folders, tables and figures of eval.py. Nothing here needs a model."""

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

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = [[80, np.nan, np.nan], [85, 71, np.nan], [65, 74, 89]]  # the one in eval.py's docstring
STAGES = [SimpleNamespace(name=name, metric="exact") for name in ("color", "count", "place")]


# --------------------------------------------------------------------------------------------------
# Scorers
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("two", "2"),
        ("None", "0"),
        ("Ten dogs.", "10 dogs"),
        ("dont", "don't"),
        ("I dont", "i don't"),
        ("couldntve", "couldntve"),  # both apostrophes missing: not in the official list
        ("couldnt've", "couldn't've"),
        ("its lets were ill", "its lets were ill"),  # words of their own
        ("somebody'd", "somebodyd"),  # official oddity
        ("1,000", "1000"),
        ("1,000 red/blue", "1000 redblue"),  # official oddity: the number removes every mark
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("t-shirt", "t shirt"),
        ("yes, it is", "yes it is"),
        ("(left)", "left"),
        ("a the an", ""),
        ("The cat on an apple", "cat on apple"),
        ("2.5", "2.5"),
        ("no.", "no"),
        ("U.S.A.", "usa"),
        (" black\n\twhite ", "black white"),
        ("", ""),
    ],
)
def test_official_vqa_normalization(text, normal):
    assert ev.normalize_vqa(text) == normal


@pytest.mark.parametrize(("matches", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1)])
def test_soft_accuracy_over_ten_annotators(matches, expected):
    # 2 matches: two annotators leave 1 other match (1/3), eight leave 2 (2/3): (2/3 + 16/3) / 10
    answers = ["red"] * matches + [f"other {k}" for k in range(10 - matches)]
    assert ev.vqa_accuracy("Red.", answers) == pytest.approx(expected)


def test_gold_answers_are_stripped_only_where_annotators_disagree():
    assert ev.vqa_accuracy("red blue", ["red/blue"] * 9 + ["red"]) == 1
    assert ev.vqa_accuracy("red/blue", ["red/blue"] * 10) == 0  # unanimous: the gold stays as it is
    assert ev.vqa_accuracy("two", ["two"] * 10) == 0  # the prediction became "2"
    assert ev.vqa_accuracy("two", ["2"] * 10) == 1
    assert ev.vqa_accuracy("a cat", ["a cat"] * 5 + ["cat"] * 5) == 1  # by the five without article


def test_single_gold_is_equality_after_normalization():
    assert ev.vqa_accuracy("Two dogs.", ["the 2 dogs"]) == 1
    assert ev.vqa_accuracy("2 dog", ["2 dogs"]) == 0


def test_exact_match_and_score():
    assert ev.exact_match(" Red. ", ["red"]) == 1
    assert ev.exact_match("red", ["blue", "Red"]) == 1
    assert ev.exact_match("2.5", ["25"]) == 0
    assert ev.exact_match("", ["red"]) == 0
    assert ev.score("exact", "two", ["2"]) == 0 and ev.score("vqa", "two", ["2"]) == 1
    with pytest.raises(InputError, match="unknown metric 'bleu'"):
        ev.score("bleu", "a", ["a"])


def test_evaluate_batches_by_length_and_keeps_the_order():
    questions = ["short", "the longest question", "a longer one", "mid one"]
    samples = [
        SimpleNamespace(id=str(k), question=q, answers=(q,), skill="read", image=None)
        for k, q in enumerate(questions)
    ]
    batches = []

    def generate(batch):
        batches.append([len(s.question) for s in batch])
        return [s.question if s.id != "2" else "wrong" for s in batch]

    rows = ev.evaluate(generate, samples, "exact", batch_size=3)
    assert batches == [[20, 12, 7], [5]]
    assert [row["question_id"] for row in rows] == ["0", "1", "2", "3"]
    assert [row["score"] for row in rows] == [1, 1, 0, 1] and ev.accuracy(rows) == 75
    assert rows[2] == {
        **{"question_id": "2", "prompt": "a longer one", "text": "wrong", "score": 0.0},
        **{"answers": ["a longer one"], "skill": "read", "image": None},
    }
    with pytest.raises(InputError, match="test set empty"):
        ev.accuracy([])
    with pytest.raises(ValueError):  # a generate that loses an answer must not pass unseen
        ev.evaluate(lambda batch: [], samples, "exact", batch_size=3)


# --------------------------------------------------------------------------------------------------
# Metrics
# --------------------------------------------------------------------------------------------------


def test_worked_example_of_the_docstring():
    m = ev.metrics(EXAMPLE)
    assert (m["AP"], m["AF"], m["AF_vqacl"], m["Avg"]) == pytest.approx((76, 10, 8.5, 78))
    assert (m["MFT"], m["BWT"]) == pytest.approx((80, -6))
    assert m["AP"] == m["Last"] == m["MFN"] and m["Avg"] == m["MAA"]
    for name, value in (("AP", "76"), ("AF", "10"), ("AF_vqacl", "8.5"), ("Avg", "78")):
        assert any(
            line.strip().startswith(name) and f"= {value}" in line
            for line in ev.__doc__.split("\n")
        ), name


@pytest.mark.parametrize("k", [0, 1, 2])
def test_metrics_equal_the_public_asr_code(k):
    golden = np.load(ROOT / "tests/golden/asr_golden.npz")
    m = ev.metrics(golden[f"metric{k}_matrix"])
    found = [m["AP"], m["AF"], m["Last"], m["Avg"]]
    np.testing.assert_allclose(found, golden[f"metric{k}_ap_af_last_avg"], rtol=1e-6)


def test_the_two_forgettings_differ_where_a_task_ends_at_its_best():
    same = ev.metrics([[50, 0], [40, 60]])
    assert same["AF"] == same["AF_vqacl"] == 10
    better = ev.metrics([[50, 0], [55, 60]])
    assert better["AF"] == 0 and better["AF_vqacl"] == -5 and better["BWT"] == 5
    # Highest in the middle: both see it, BWT does not.
    middle = ev.metrics([[50, 0, 0], [70, 60, 0], [60, 60, 60]])
    assert middle["AF"] == middle["AF_vqacl"] == 5 and middle["BWT"] == 5


# MR-LoRA's tables (arXiv 2506.05453): scores after the last stage; MFT, MFN, BWT.
PUBLISHED = {
    "DCL LoRA-FT": ([69.65, 41.59, 25.43, 40.88, 87.45], 64.98, 53.00, -14.97),
    "DCL LoRA-FT + replay": ([76.54, 50.27, 43.01, 43.32, 89.85], 66.32, 60.60, -7.15),
    "DCL O-LoRA": ([74.64, 44.42, 30.02, 41.47, 87.15], 65.16, 55.54, -12.03),
    "DCL MoELoRA": ([77.54, 41.85, 27.62, 40.13, 86.75], 64.94, 54.78, -12.70),
    "DCL HiDe": ([74.31, 48.95, 33.21, 38.54, 81.55], 60.77, 55.31, -6.82),
    "DCL SEFE": ([77.26, 50.37, 37.21, 40.87, 86.82], 65.01, 58.51, -8.13),
    "DCL MR-LoRA": ([80.87, 65.32, 54.12, 56.71, 91.12], 69.64, 69.63, -0.01),
    "ACL LoRA-FT": ([23.60, 33.70, 55.84, 32.50], 41.28, 36.41, -6.49),
    "ACL SEFE": ([26.00, 33.40, 57.74, 33.75], 40.98, 37.72, -4.35),
    "ACL MR-LoRA": ([33.70, 36.20, 65.10, 32.50], 41.89, 41.88, -0.02),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_mfn_and_bwt_follow_from_their_rows(name):
    last, mft, mfn, bwt = PUBLISHED[name]
    tasks = len(last)
    matrix = np.full((tasks, tasks), np.nan)
    matrix[-1] = last
    # The diagonal is not published, but its mean is (MFT), and BWT needs no more than that.
    shift = tasks * (mft - np.mean(last)) / (tasks - 1)
    for i in range(tasks - 1):
        matrix[i, i] = last[i] + shift
    m = ev.metrics(matrix)
    assert m["MFT"] == pytest.approx(mft) and np.isnan(m["Avg"])
    assert m["MFN"] == pytest.approx(mfn, abs=0.0101)
    assert m["BWT"] == pytest.approx(bwt, abs=0.0101)


def test_one_stage_missing_cells_and_wrong_shapes():
    assert ev.metrics([[70]])["AF"] == ev.metrics([[70]])["BWT"] == 0
    joint = np.full((3, 3), np.nan)
    joint[-1] = [60, 70, 80]
    m = ev.metrics(joint)
    assert m["AP"] == 70 and all(np.isnan(m[key]) for key in ("AF", "AF_vqacl", "Avg", "BWT"))
    for wrong in ([], [[1, 2]], [1, 2]):
        with pytest.raises(ValueError, match="T x T"):
            ev.metrics(wrong)


def test_interference_and_seen_mean():
    found = ev.interference(EXAMPLE)
    expected = [[-5, np.nan, np.nan], [0, -3, np.nan], [-20, 0, 0]]
    np.testing.assert_allclose(found, expected)
    assert ev.seen_mean(EXAMPLE) == [80, 78, 76]


def test_t_interval_against_printed_tables():
    for df, value in {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262, 30: 2.042, 120: 1.980}.items():
        assert ev.t_quantile(df) == pytest.approx(value, abs=6e-4)
    # Differences 1..5: mean 3, std sqrt(2.5), half width 2.776 * sqrt(2.5 / 5) = 1.963
    mean, low, high, n = ev.paired([11, 12, 13, 14, 15], [10] * 5)
    assert (mean, n) == (3, 5) and (low, high) == pytest.approx((1.037, 4.963), abs=1e-3)
    mean, low, high, n = ev.paired([2], [1])
    assert (mean, n) == (1, 1) and np.isnan(low) and np.isnan(high)
    with pytest.raises(ValueError):
        ev.paired([1, 2], [1])


# --------------------------------------------------------------------------------------------------
# Run folders
# --------------------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------------
# Tables, figures, command line
# --------------------------------------------------------------------------------------------------


def test_table_of_one_run():
    text = ev.table(EXAMPLE, ["color", "count", "place"])
    assert text.split("\n")[3] == "after 3 place         65.0  74.0  89.0"
    assert text.split("\n")[-1].split() == "76.0 10.0 8.5 76.0 78.0 80.0 -6.0".split()
    lines = ev.table(EXAMPLE, ["color", "count", "place"], markdown=True).split("\n")
    assert lines[1] == "|---|---:|---:|---:|" and len({line.count("|") for line in lines[:5]}) == 1


def make_record(seed, ap, script="asr", model="m", **args):
    m = {"AP": ap, "AF": 10.0, "AF_vqacl": 10.0, "Last": ap, "Avg": None, "MFT": 1.0, "BWT": 1.0}
    record = {"script": script, "stream": "vqacl", "seed": seed, "model_sha256": model}
    record |= {"commit": "c", "command": "python", "stages": ["a"], "matrix": [[ap]], "metrics": m}
    return record | {"args": {"seed": seed, "lr": 0.1, **args}}


def test_record_table_pairs_seeds_and_names_what_is_missing():
    records = {f"s{k}": make_record(k, 50.0, script="baselines") for k in range(5)}
    records |= {f"a{k}": make_record(k, 51.0 + k, beta=0.5) for k in range(5)}
    rows = {"sequential": {"script": "baselines"}, "ASR": {"beta": 0.5, "lr": 0.1}}
    rows["geometry"] = {"beta": 0.0}
    lines = ev.record_table(records, rows, seeds=range(6)).split("\n")
    assert "5 (missing 5)" in lines[1] and "50.0 +- 0.0" in lines[1] and "baseline" in lines[1]
    assert "53.0 +- 1.6" in lines[2] and "+3.0 [+1.0, +5.0] n=5" in lines[2]
    assert lines[3].split()[:2] == ["geometry", "missing"]
    assert len(ev.record_table(records).split("\n")) == 3  # rows found by themselves
    assert "n=2" in ev.record_table(records, rows, "sequential", seeds=(3, 4)).split("\n")[2]


def test_records_that_do_not_belong_together(tmp_path):
    one = {"a": make_record(0, 50.0)}
    with pytest.raises(InputError, match="2 kinds of model_sha256"):
        ev.record_table(one | {"b": make_record(1, 50.0, model="other")})
    with pytest.raises(InputError, match="holds seed 0 twice"):
        ev.record_table(one | {"b": make_record(0, 50.0)})
    with pytest.raises(InputError, match="no row 'joint'"):
        ev.record_table(one, baseline="joint")
    ev.write_json(tmp_path / "a.json", one["a"])
    assert ev.load_record(tmp_path / "a.json") == one["a"]
    ev.write_json(tmp_path / "b.json", {"script": "asr"})
    with pytest.raises(InputError, match=r"b.json is no record of a run: it lacks args"):
        ev.load_record(tmp_path / "b.json")
    (tmp_path / "b.json").write_text('{"script": "asr",\n "seed": }')
    with pytest.raises(InputError, match=r"b.json, line 2"):
        ev.load_record(tmp_path / "b.json")


def test_groups_are_named_by_the_flags_that_differ():
    records = {"a": make_record(0, 1.0, beta=0.5), "b": make_record(1, 1.0, beta=0.5)}
    records |= {"c": make_record(0, 1.0, beta=0.0), "d": make_record(0, 1.0, script="baselines")}
    groups = {label: len(members) for label, members in ev.group(records).items()}
    assert groups == {"asr beta=0.5": 2, "asr beta=0.0": 1, "baselines": 1}


def test_command_line_compares_and_rescores(tmp_path, capsys):
    worse = [[80, np.nan, np.nan], [60, 71, np.nan], [50, 60, 89]]
    first, second = make_run(tmp_path / "a", model="m"), make_run(tmp_path / "b", worse, model="m")
    assert ev.main([str(first)]) == 0
    out = capsys.readouterr().out
    assert "after 3 place" in out and "give the saved matrix" in out
    with pytest.raises(InputError, match="holds seed 0 twice"):  # same flags, same seed
        ev.main([str(first), str(second)])
    third = make_run(tmp_path / "c", worse, model="m", lr=2e-3)
    pictures = tmp_path / "pictures"
    assert ev.main([str(first), str(third), "--markdown", "--plot", str(pictures)]) == 0
    out = capsys.readouterr().out
    assert "| asr lr=0.002 |" in out and "-9.7 n=1" in out
    assert {p.name for p in pictures.iterdir()} == {"accuracy.png", "interference.png"}

    path = first / "predictions/after-3-on-2.jsonl"
    path.write_text(path.read_text().replace('"text": "no"', '"text": "Yes."', 1))
    assert ev.main([str(first)]) == 1
    out = capsys.readouterr().out
    assert "after stage 3 on task 2 (count) the predictions give 75.0000" in out
    path.write_text("{}\n{\n")
    with pytest.raises(InputError, match=r"after-3-on-2.jsonl, line 2"):
        ev.main([str(first)])
    path.unlink()
    with pytest.raises(InputError, match="cannot read .*after-3-on-2.jsonl"):
        ev.main([str(first)])


def test_unfinished_runs_are_shown_with_what_they_have(tmp_path, capsys):
    partial = [[80, np.nan, np.nan], [85, 71, np.nan], [np.nan] * 3]
    run = make_run(tmp_path / "a", partial, finished=False, model="m")
    other = make_run(tmp_path / "b", model="m", seed=1)
    assert ev.main([str(run), str(other)]) == 0
    out = capsys.readouterr().out
    assert "unfinished" in out and "nan" not in out
    assert "asr      1  76.0  10.0" in out  # the unfinished seed is missing from the mean
    (run / "matrix.json").unlink()
    with pytest.raises(InputError, match="first stage is not finished"):
        ev.main([str(run)])


def test_a_folder_that_is_no_run_ends_with_one_sentence_and_code_2(tmp_path):
    command = [sys.executable, str(ROOT / "eval.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: {tmp_path} is no run folder: there is no args.json in it\n"


def test_tables_need_neither_torch_nor_matplotlib():
    code = "import sys, eval; print({'torch', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_figures_are_800_pixels_wide_and_accept_what_runs_give(tmp_path):
    from PIL import Image

    stages = ["color", "count", "place"]
    joint = np.full((3, 3), np.nan)
    joint[-1] = [60, 70, 80]
    drawn = [
        ev.plot_matrix(EXAMPLE, stages, tmp_path / "new/matrix.png"),
        ev.plot_matrix(joint, stages, tmp_path / "joint.png"),
        ev.plot_interference({"ASR": EXAMPLE, "joint": [joint, joint]}, stages, tmp_path / "i.png"),
        ev.plot_accuracy({"ASR": [EXAMPLE, EXAMPLE], "joint": joint}, tmp_path / "a.png"),
        ev.plot_matrix([[0.0]], ["one"], tmp_path / "one.png"),
    ]
    for path in drawn:
        assert abs(Image.open(path).width - 800) < 8
    with pytest.raises(ValueError, match="one or two"):
        ev.plot_interference({}, stages, tmp_path / "none.png")
