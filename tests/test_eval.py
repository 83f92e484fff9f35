"""Scorers, evaluation, metrics, tables, command line: scorers.py and eval.py without a model."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from anls import anls_score
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

import eval as ev
import scorers
from data import InputError
from scorers import score, vqa_accuracy

EXAMPLE = [[80, np.nan, np.nan], [85, 71, np.nan], [65, 74, 89]]  # the one in eval.py's docstring
STAGES = ["color", "count", "place"]


def test_official_vqa_normalization():
    forms = {"two": "2", "Ten dogs.": "10 dogs", "2.5": "2.5", "U.S.A.": "usa", "(left)": "left"}
    forms |= {"dont": "don't", "couldnt've": "couldn't've", "a the an": "", "1,000": "1000"}
    forms |= {"red/blue": "red blue", "yes, it is": "yes it is", " black\n\twhite ": "black white"}
    forms |= {"The cat on an apple": "cat on apple"}
    # the official list: words without an apostrophe, both apostrophes missing, the wrong way round
    forms |= {"its lets were ill": "its lets were ill", "couldntve": "couldntve"}
    forms |= {"somebody'd": "somebodyd", "1,000 red/blue": "1000 redblue"}
    assert {text: scorers.normalize_vqa(text) for text in forms} == forms


def test_soft_accuracy_over_ten_annotators():
    # 2 matches: two annotators leave 1 other match (1/3), eight leave 2 (2/3): (2/3 + 16/3) / 10
    for matches, expected in enumerate((0, 0.3, 0.6, 0.9, 1)):
        answers = ["red"] * matches + [f"other {k}" for k in range(10 - matches)]
        assert vqa_accuracy("Red.", answers) == pytest.approx(expected)
    assert vqa_accuracy("red blue", ["red/blue"] * 9 + ["red"]) == 1
    assert vqa_accuracy("red/blue", ["red/blue"] * 10) == 0  # unanimous: the gold stays as it is
    assert vqa_accuracy("two", ["two"] * 10) == 0  # the prediction became "2"
    assert vqa_accuracy("two", ["2"] * 10) == 1
    assert vqa_accuracy("a cat", ["a cat"] * 5 + ["cat"] * 5) == 1  # by the five without article
    assert vqa_accuracy("Two dogs.", ["the 2 dogs"]) == 1  # a single gold answer: equality
    assert vqa_accuracy("2 dog", ["2 dogs"]) == 0
    assert score("textvqa", "2", ["two"] * 4 + ["three"]) == 1  # gold answers are normalized too
    assert score("textvqa", "stop", ["The stop!", "stop", "go"]) == pytest.approx(4 / 9)


HALF = "[0.00, 0.00, 0.50, 0.50]"
RIGHT_AND_WRONG = {  # metric: {text: gold} that count 1, and that count 0
    "exact": ({" Red. ": "red"}, {"2.5": "25", "two": "2"}),
    "same": ({" star": "Star"}, {"star.": "star"}),
    "vqa": ({"two": "2"}, {"2 dog": "2 dogs"}),
    # the reference reads "B", "B. ..." and words of one letter
    "letter": (
        {"B": "B", "b. star": "B", "The answer is C .": "C"},
        {"Because": "B", "B)": "B", "": "A"},
    ),
    "option": (
        {"(B)": "B", "I think the answer is B.": "B", "A button that opens: C": "C", "A. a": "A"},
        {"A button": "A", "": "A"},
    ),
    "contains": ({"a tabby cat": "cat", "cat": "tabby cat"}, {"": "cat"}),
    "iou": (
        {"[0.10, 0.10, 0.50, 0.50]": "[0.10, 0.10, 0.50, 0.40]", HALF: HALF},
        # the second IoU is just 0.5
        {"[0.0, 0.0, 0.2, 0.98]": "[0.0, 0.5, 0.2, 0.98]", HALF: "[0.00, 0.00, 0.50, 1.00]"},
    ),
    # a text of one word may contain the answer anywhere
    "word-in": (
        {"a forest.": "Forest.", "deforested": "forest", "it is a red light now": "red light"},
        {"deforested land": "forest"},
    ),
    "gold-in": ({"a nodule": "No"}, {"yes": "No"}),
    "fin": ({" A. ": "a"}, {"a b": "a b"}),  # spaces vanish from the text only
    "count": ({"There are 1 2.": "12"}, {"two": "2"}),
    "caption": ({"a red cat": "a red cat"}, {"dog": "a red cat"}),
}


@pytest.mark.parametrize("metric", RIGHT_AND_WRONG)
def test_scorers_by_hand(metric):
    for wanted, cases in zip((1, 0), RIGHT_AND_WRONG[metric]):
        for text, gold in cases.items():
            assert score(metric, text, [gold]) == pytest.approx(wanted), text


def test_scorers_whose_rule_depends_on_the_sample():
    row = {"image": "AI2D_7.png", "prompt": "What is it?", "skill": "Sci"}
    assert score("sci", "A cell ", ["a cell"], row) == 1
    assert score("sci", "a cell wall", ["a cell"], row) == 0
    row["image"] = "map.png"
    assert score("sci", "a cell wall", ["a cell"], row) == 1
    row["prompt"] = "Which states are red?"
    assert score("sci", "Ohio, Texas", ["texas, iowa"], row) == 0.5
    assert score("ocr", "it says STO\nP here", ["sto\np"], row) == 1  # line breaks vanish
    row["skill"] = "Handwritten Mathematical Expression Recognition"
    assert score("ocr", "x ^ 2\n", ["x^2"], row) == 1 and score("ocr", "X^2", ["x^2"], row) == 0


def test_math_takes_the_letter_or_the_text_of_a_choice():
    free, listed = "How many?", "Which?\nChoices:\n(A) 3 cm\n(B) 4 cm\n(C) none"
    right = {"The answer is B": "B", "from 2021-2022": "2022", "it is -1,000.": "-1000"}
    for text, gold in {**right, "x+1": "X+1"}.items():
        assert score("math", text, [gold], {"prompt": free}) == 1, text
    assert score("math", "3 of 4", ["3"], {"prompt": free}) == 0
    for text in ("B", "b", "(B) 4 cm", "It is 4 cm.", "B, for A is too short: B"):
        for gold in ("B", "4 cm"):
            assert score("math", text, [gold], {"prompt": listed}) == 1, text
    for text in ("A", "C. 4", "3 cm", "neither"):
        assert score("math", text, ["4 cm"], {"prompt": listed}) == 0, text


def test_every_metric_has_a_scorer():
    alone = {"textvqa", "anls", "sci", "ocr", "math", "unscored"}
    assert scorers.RULES.keys() | scorers.ALL_GOLDS.keys() == RIGHT_AND_WRONG.keys() | alone
    assert score("exact", "red", ["blue", "Red"]) == 1  # the best gold answer counts
    assert np.isnan(score("unscored", "a", ["a"]))
    with pytest.raises(InputError, match="unknown metric 'bleu'"):
        score("bleu", "a", ["a"])


# captions -> words, by pycocoevalcap 1.2: its Java tool, and its list of marks that are left out
CAPTIONS = json.loads((Path(__file__).parent / "golden" / "captions.json").read_text())


UNLIKE = {text for text, words in CAPTIONS.items() if scorers.caption_words(text) != words.split()}


def test_caption_words_are_those_of_the_usual_tokenizer():
    rare = "ol' ⅔ :) A.1. $1.50/lb Calif.".split()  # the oddities that we do without
    assert len(CAPTIONS) > 200 and len(UNLIKE) == len(rare)
    assert all(any(word in text for text in UNLIKE) for word in rare)


def test_caption_scores_equal_the_usual_package():
    rng = np.random.default_rng(1)
    texts = [text for text in CAPTIONS if text not in UNLIKE]
    rows = [{"text": text, "answers": list(rng.choice(texts, 5))} for text in texts]
    for row in rows[::3]:
        row["answers"][2] = row["text"]
    golds = {k: [CAPTIONS[text] for text in row["answers"]] for k, row in enumerate(rows)}
    said = {k: [CAPTIONS[row["text"]]] for k, row in enumerate(rows)}
    ours = scorers.caption_scores(rows)
    wanted, _ = Bleu(4).compute_score(golds, said, verbose=0)
    for n in range(4):
        assert ours[f"BLEU-{n + 1}"] == pytest.approx(100 * wanted[n], abs=1e-5)
    assert ours["ROUGE-L"] == pytest.approx(100 * Rouge().compute_score(golds, said)[0], abs=1e-6)
    assert ours["CIDEr"] == pytest.approx(100 * Cider().compute_score(golds, said)[0], abs=1e-6)
    five = [*(ours[f"BLEU-{n}"] for n in (1, 2, 3, 4)), ours["ROUGE-L"]]
    assert ours["BLEU-ROUGE"] == pytest.approx(np.mean(five))
    assert ev.accuracy(rows, "caption") == ours["BLEU-ROUGE"]


def test_anls_equals_the_usual_package():
    rng = np.random.default_rng(2)
    for _ in range(50):
        gold = ["".join(rng.choice(list("ab1 "), rng.integers(1, 7))).strip() or "a" for _ in "xy"]
        text = "".join(rng.choice(list("AB1 "), rng.integers(1, 7))).strip() or "b"
        # their threshold is one of the distance: 1.01 switches it off
        wanted = anls_score(prediction=text, gold_labels=gold, threshold=1.01)
        assert score("anls", text, gold) == pytest.approx(wanted)
    assert score("anls", "1.0", ["0.28"]) == 0.25 and score("anls", "2015", ["2013"]) == 0.75


QUESTIONS = ["short", "the longest question", "a longer one", "mid one"]
SAMPLES = [
    SimpleNamespace(id=str(k), question=q, answers=(q,), skill="read", image=None)
    for k, q in enumerate(QUESTIONS)
]


@pytest.mark.parametrize("whole", [False, True])
def test_evaluate_batches_by_length_and_keeps_the_order(whole):
    calls = []

    def answer(samples):
        calls.append([s.id for s in samples])
        facts = [{"phi": np.full(2, int(s.id), np.float32)} for s in samples]
        for k, s in enumerate(samples):
            facts[k] |= {"map": np.ones((2, 3))} if s.id in "02" else {}
        return [s.question if s.id != "2" else "wrong" for s in samples], facts

    rows, facts = ev.evaluate(answer, SAMPLES, "exact", 3, "test", whole=whole)
    assert calls == ([["0", "1", "2", "3"]] if whole else [["1", "2", "3"], ["0"]])
    assert [row["score"] for row in rows] == [1, 1, 0, 1] and ev.accuracy(rows) == 75
    expected = {"question_id": "2", "prompt": "a longer one", "text": "wrong", "score": 0.0}
    assert rows[2] == expected | {"answers": ["a longer one"], "skill": "read", "image": None}
    assert facts["phi"].tolist() == [[k, k] for k in range(4)] and facts["phi"].dtype == np.float32
    assert facts["map"].shape == (2, 2, 3)  # only two samples have one
    with pytest.raises(InputError, match="test set empty"):
        ev.accuracy([])
    with pytest.raises(ValueError):  # a lost answer must not pass unnoticed
        ev.evaluate(lambda samples: [], SAMPLES, "exact", 3, "test", whole=whole)


def test_worked_example_of_the_docstring():
    m = ev.metrics(EXAMPLE)
    assert (m["AP"], m["AF"], m["AF_vqacl"], m["Avg"]) == pytest.approx((76, 10, 8.5, 78))
    assert (m["MFT"], m["BWT"]) == pytest.approx((80, -6))
    assert m["AP"] == m["Last"] == m["MFN"] and m["Avg"] == m["MAA"]
    expected = [[-5, np.nan, np.nan], [0, -3, np.nan], [-20, 0, 0]]
    np.testing.assert_allclose(ev.interference(EXAMPLE), expected)
    lines = [line.strip() for line in ev.__doc__.split("\n")]
    for name in ("AP", "AF", "AF_vqacl", "Avg", "MFT", "BWT"):
        assert any(x.startswith(name + " ") and f"= {m[name]:g} " in x for x in lines), name


# MR-LoRA's tables (arXiv 2506.05453): scores after the last stage; MFT, MFN, BWT.
PUBLISHED = {
    "DCL LoRA-FT": ([69.65, 41.59, 25.43, 40.88, 87.45], 64.98, 53.00, -14.97),
    "DCL MR-LoRA": ([80.87, 65.32, 54.12, 56.71, 91.12], 69.64, 69.63, -0.01),
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


def test_paired_interval_against_printed_tables():
    printed = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]
    assert [round(t, 3) for t in ev.T95] == printed
    # Differences 1..5: mean 3, std sqrt(2.5), half width 2.776 * sqrt(2.5 / 5) = 1.963
    mean, low, high, n = ev.paired([11, 12, 13, 14, 15], [10] * 5)
    assert (mean, n) == (3, 5) and (low, high) == pytest.approx((1.037, 4.963), abs=1e-3)
    mean, low, high, n = ev.paired([2], [1])
    assert (mean, n) == (1, 1) and np.isnan(low) and np.isnan(high)
    assert np.isnan(ev.paired([], [])[0]) and ev.paired(range(10), range(10))[3] == 10
    with pytest.raises(ValueError):
        ev.paired([1, 2], [1])
    with pytest.raises(InputError, match="11 pairs, but the table T95"):
        ev.paired(range(11), range(11))


def record(seed, ap, script="asr", **args):
    args = {"seed": seed, "beta": 0.5, "gamma": 0.05, "targets": ["q", "v"]} | args
    about = {"script": script, "seed": seed, "args": args, "folder": "runs/x"}
    return about | {"matrix": [[ap]], "seconds": 90}


def test_compare_pairs_seeds():
    records = [record(k, 50.0, "baselines", method="sequential") for k in range(5)]
    records += [record(k, 51.0 + k, gamma=0.5) for k in range(5)] + [record(7, 50.0)]
    del records[-1]["seconds"]
    text = ev.compare(records)
    head, *lines = (line.split("  ") for line in text.split("\n"))
    cells = [[cell.strip() for cell in line if cell] for line in lines]
    constant = ["50.0 ± 0.0", "0.0 ± 0.0"]
    assert cells[0] == ["sequential LoRA", "5 of 5", *constant, *constant, "1.5 ± 0.0"]
    assert cells[1][:4] == ["ASR, gamma 0.5", "5 of 5", "53.0 ± 1.6", "+3.0 [+1.0, +5.0]"]
    assert cells[2][:4] == ["ASR, gamma 0.05", "0 of 1", "-", "-"]
    assert "ASR (runs/x) " in ev.compare([record(0, 50.0), record(0, 51.0)])  # edited between them


def make_run(run, matrix=EXAMPLE, **args):
    """A run folder whose predictions give the matrix: cells are whole percents of 100 answers."""
    about = {"script": "asr", "commit": "c", "command": "python asr.py"}
    args = {"stream": "vqacl", "seed": 0, "lr": 1e-3, "beta": 0.5, "gamma": 0.05} | args
    ev.write_json(run / "args.json", about | args)
    results = {"stages": STAGES, "scorers": ["exact"] * 3, "matrix": np.array(matrix)}
    ev.write_json(run / "matrix.json", results)
    for t, i in np.argwhere(np.isfinite(np.array(matrix))).tolist():
        texts = ["yes" if k < matrix[t][i] else "no" for k in range(100)]
        rows = [{"text": text, "answers": ["yes"], "score": 0} for text in texts]
        ev.write_predictions(run, t, i, rows)
    ev.write_json(run / "summary.json", ev.read_run(run) | {"seconds": 90.0})
    return run


def test_command_line_compares_and_rescores(tmp_path, capsys):
    worse = [[80, np.nan, np.nan], [60, 71, np.nan], [50, 60, 89]]
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b", worse, lr=2e-3)
    assert ev.main([str(first)]) == 0
    out = capsys.readouterr().out
    assert "after 3 place" in out and "give the saved matrix" in out
    other = make_run(tmp_path / "c", stream="ucit")
    assert ev.main([str(first), str(second), str(other), "--markdown"]) == 0
    out = capsys.readouterr().out
    assert "| ASR, lr 0.002 |" in out and "-9.7 |" in out
    assert out.startswith("vqacl:\n") and "\n\nucit:\n" in out and "of 3 run(s)" in out

    path = first / "predictions/after-3-on-2.jsonl"
    path.write_text(path.read_text().replace('"text": "no"', '"text": "Yes."', 1))
    assert ev.main([str(first)]) == 1
    out = capsys.readouterr().out
    assert "after stage 3 on task 2 (count) the predictions give 75.0000" in out
    path.write_text("{}\n{\n")
    with pytest.raises(InputError, match=r"after-3-on-2.jsonl is corrupt or truncated: .*line 2"):
        ev.main([str(first)])
