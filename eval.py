"""From answers to numbers: scorers, accuracy matrix, run folders, tables, shared figures. No model.

    python eval.py RUN                           one run: its accuracy matrix and its metrics
    python eval.py RUN RUN ... --plot FOLDER     compare runs, and draw them
    python eval.py results/NAME/*.json --table   records: mean +- std over seeds, paired differences
    python eval.py results --table               every table of README and docs, missing cells too

Saved predictions are scored again, without a model, and must give the run's matrix.json.

The numbers of continual learning. T tasks are learned one after the other; A[t,i] is the accuracy
(%) on task i after training stage t. Every run is one T x T matrix whose lower triangle counts:

                       task 1  task 2  task 3
        after stage 1    80       .       .
        after stage 2    85      71       .
        after stage 3    65      74      89

    AP   mean_i A[T,i]                        (65+74+89)/3 = 76    accuracy at the end
    Last, MFN                                                      other names of AP
    AF   mean_{i<T} max_{t>=i} A[t,i] - A[T,i]    (20+0)/2 = 10    forgetting, ASR's code
    AF_vqacl    the same, but max over t < T     (20-3)/2 = 8.5    forgetting, VQACL's code
    Avg  mean_t mean_{i<=t} A[t,i]            (80+78+76)/3 = 78    accuracy over the run's life
    MAA                                                            other name of Avg
    MFT  mean_i A[i,i]                        (80+71+89)/3 = 80    each task just after its stage
    BWT  mean_{i<T} A[T,i] - A[i,i]              (-15+3)/2 = -6    backward transfer
                                                                   = (MFN - MFT) * T / (T - 1)

The two AF differ where a task ends better than it ever was (task 2: 74 after 71): ASR's maximum
includes the last row, so the task counts 0; VQACL's does not, so it counts -3. Papers also differ
in what they call Avg (HiDe-LLaVA averages per task first): compare definitions, then numbers.

Tables need neither torch nor matplotlib and come at once.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from data import InputError

# --------------------------------------------------------------------------------------------------
# 1. Is an answer right?
# --------------------------------------------------------------------------------------------------
# VQA's gold answers are free text by ten people. The official evaluation (visualqa.org) makes
# "Two dogs." equal to "2 dogs"; we keep its rules with their oddities, because every published VQA
# number rests on them.

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = ("a", "an", "the")
DIGITS = "zero one two three four five six seven eight nine ten".split()
NUMBERS = {"none": "0"} | {word: str(n) for n, word in enumerate(DIGITS)}
# ending -> stems. A form that lacks one apostrophe gets it back: dont -> don't, couldnt've ->
# couldn't've. Forms that are words of their own (were, ill, its, lets) are not in the list.
CONTRACTED = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were "
    "wo would",
    "n't've": "could had might should would",
    "'d": "he how it someone something there they where who you",
    "'d've": "he it she somebody someone something there they we who you",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
    "'s": "he how somebody someone that there what when where who why",
    "'ve": "could might must not should they we what where who would you",
    "": "ma'am o'clock 'twas 'ow's'at y'all y'all'll y'all'd've",
}
FORMS = [stem + ending for ending, stems in CONTRACTED.items() for stem in stems.split()]
CONTRACTIONS = {f[:k] + f[k + 1 :]: f for f in FORMS for k in range(len(f)) if f[k] == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"  # the official list has this one the wrong way round


def strip_punctuation(text: str) -> str:
    """Marks between two words become a space; marks beside a space vanish (official rule)."""
    thousands = re.search(r"\d,\d", text)  # one comma as in "1,000", and ALL marks vanish
    out = text
    for mark in PUNCTUATION:
        vanishes = thousands or f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if vanishes else " ")
    return re.sub(r"\.(?!\d)", "", out)  # a period stays only before a digit: "2.5"


def normalize_vqa(text: str) -> str:
    """A predicted answer in the official normal form: "The two dogs, dont!" -> "2 dogs don't"."""
    text = strip_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction: str, answers) -> float:
    """VQA soft accuracy in 0..1 against the annotators' answers (ten in VQA v2).

    Each annotator is left out in turn and the prediction earns min(1, matches among the others/3);
    the mean counts. So 1, 2, 3, 4 matches of ten give 0.3, 0.6, 0.9, 1. Gold answers lose their
    punctuation only where annotators disagree, and never articles or number words: officially a
    gold "two" can never be matched. One gold answer alone: equality, both sides normalized.
    `textvqa_accuracy` normalizes both sides always.
    """
    predicted = normalize_vqa(prediction)
    if len(answers) == 1:
        return float(predicted == normalize_vqa(answers[0]))
    golds = [strip_punctuation(a) for a in answers] if len(set(answers)) > 1 else answers
    hits = [gold == predicted for gold in golds]
    return sum(min(1.0, (sum(hits) - hit) / 3) for hit in hits) / len(hits)


def textvqa_accuracy(prediction: str, answers) -> float:
    """CoIN's TextVQA: soft accuracy as above, with every gold answer in normal form, too."""
    return vqa_accuracy(prediction, [normalize_vqa(answer) for answer in answers])


def same_text(prediction: str, answers) -> float:
    """UCIT, TriGap; VizWiz and VQAv2 of CoIN: equal up to case and outer spaces, nothing else."""
    said = prediction.strip().upper()
    return float(said in [answer.strip().upper() for answer in answers])


def exact_match(prediction: str, answers) -> float:
    """1.0 if the prediction is a gold answer, up to case, outer spaces and trailing periods."""
    plain = [text.strip().rstrip(".").strip().lower() for text in (prediction, *answers)]
    return float(plain[0] in plain[1:])


def letter_match(prediction: str, answers) -> float:
    """CoIN's ScienceQA: "B", "B. star", and the first word of one letter, all mean option B."""
    said = prediction.strip()
    letter = said[:1] if said[1:3] == ". " or said[1:] == "." else ""
    letter = letter or next((word for word in said.split() if len(word) == 1), "")
    return float(letter.upper() in [answer.strip().upper() for answer in answers])


def option_match(prediction: str, answers) -> float:
    """ACL's GUI, offline in place of MMT-Bench's server: the last option letter of a text, as in
    "b", "(B)", "B. star", "The answer is B."; the words "A" and "I" before another are none."""
    said = prediction.strip()
    whole = re.fullmatch(r"\(?([A-Za-z])[).:]*", said)
    found = re.findall(r"(?<![\w'])([A-Z])(?![\w'])(?!(?<=[AI]) [a-z])", said)
    letter = whole[1] if whole else found[-1] if found else ""
    return float(letter.upper() in [answer.strip().upper() for answer in answers])


def contained(prediction: str, answers, legacy: bool = False) -> float:
    """CoIN's ImageNet: the answer is part of the prediction, or the prediction of the answer.

    legacy: an empty prediction is part of every answer, and counts as right.
    """
    if not prediction.strip() and not legacy:
        return 0.0
    return float(any(a in prediction or prediction in a for a in answers))


def _box(text: str, legacy: bool):
    """Four numbers from a text with a box, or None."""
    if legacy:  # the reference cuts the brackets off, and then once more the first and last sign
        text = text.replace("[", "").replace("]", "")[1:-1]
        try:
            numbers = [float(part) for part in text.split(",")]
        except ValueError:
            return None
    else:
        numbers = [float(number) for number in re.findall(r"-?\d*\.?\d+", text)]
    return numbers if len(numbers) == 4 else None


def box_match(prediction: str, answers, legacy: bool = False) -> float:
    """CoIN's Grounding: 1 if the boxes "[x0, y0, x1, y1]" overlap with IoU > 0.5.

    legacy: the predicted box loses its first sign and its last digit, as in the reference.
    """
    a = _box(prediction, legacy)
    for answer in answers:
        b = _box(answer, False)
        if a and b:
            w, h = (min(a[k + 2], b[k + 2]) - max(a[k], b[k]) for k in (0, 1))
            inside = max(w, 0) * max(h, 0)
            both = sum(abs((c[2] - c[0]) * (c[3] - c[1])) for c in (a, b)) - inside
            if both > 0 and inside / both > 0.5:
                return 1.0
    return 0.0


def edit_distance(a: str, b: str) -> int:
    """Levenshtein: fewest insertions, deletions and substitutions that turn a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def anls(prediction: str, answers, threshold: float = 0.0) -> float:
    """Average normalized Levenshtein similarity (DocVQA): 1 - distance / longer length, best gold.

    The official score counts up to 0.5 as zero ("anls_0.5"); CRAM's numbers do not ("anls").
    """
    best, a = 0.0, " ".join(prediction.lower().split())
    for gold in answers:
        b = " ".join(gold.lower().split())
        best = max(best, 1 - edit_distance(a, b) / max(len(a), len(b), 1))
    return best if best > threshold else 0.0


def relaxed_match(prediction: str, answers) -> float:
    """ChartQA: a number may be 5% off (20% is 0.2), everything else must match, up to case."""

    def number(text):
        return float(text.rstrip("%")) / (100 if text.endswith("%") else 1)

    for gold in answers:
        try:
            a, b = number(prediction.strip()), number(gold.strip())
        except ValueError:
            continue
        if abs(a - b) <= 0.05 * abs(b):
            return 1.0
    return same_text(prediction, answers)


# MLLM-CL's tasks are scored by containment, with a rule of its own for nearly each. row: what
# `evaluate` knows of the sample beside prediction and answers.


def word_in(prediction: str, answers) -> float:
    """DCL's RS and AD: the gold occurs in the prediction, as a word of its own if it is one."""
    said = prediction.lower()
    for answer in answers:
        gold = answer.lower()
        if " " not in gold:
            gold = gold.replace(".", "")
            if " " in said:
                if f" {gold}" in said or any(f"{gold}{end}" in said for end in " .,"):
                    return 1.0
                continue
        if gold in said:
            return 1.0
    return 0.0


def gold_in(prediction: str, answers) -> float:
    """DCL's Med: the gold occurs anywhere ("no" matches every text that contains it)."""
    return float(any(answer.lower() in prediction.lower() for answer in answers))


def sci_match(prediction: str, answers, row: dict) -> float:
    """DCL's Sci, by the image's name: AI2D, TQA, VQA and SciVerse exactly; MapQA's "Which states"
    by the share of gold states in the list that was given; MapQA's others by containment."""
    said, gold = prediction.strip().lower(), answers[0].strip().lower()
    if str(row["image"]).startswith(("AI2D_", "TQA_", "VQA_", "SciVerse_")):
        return float(said == gold)
    if "which states" in row["prompt"].lower():
        listed = {part.strip() for part in said.split(",")}
        states = [part.strip() for part in gold.split(",")]
        return sum(state in listed for state in states) / len(states)
    return float(gold in said)


def fin_match(prediction: str, answers) -> float:
    """DCL's Fin: equal, without case, spaces and periods in the prediction."""
    said = prediction.lower().replace(" ", "").replace(".", "")
    return float(said in [answer.lower() for answer in answers])


def ocr_match(prediction: str, answers, row: dict) -> float:
    """ACL's OCR, OCRBench's rule: a gold occurs in the prediction; handwritten formulas (by the
    record's answer_type) with spaces taken out and case kept."""
    if row["skill"] == "Handwritten Mathematical Expression Recognition":
        said = prediction.replace("\n", "").replace(" ", "")
        return float(any(answer.replace(" ", "") in said for answer in answers))
    said = prediction.lower().strip().replace("\n", " ")
    return float(any(answer.lower().strip().replace("\n", " ") in said for answer in answers))


def math_match(prediction: str, answers) -> float:
    """ACL's Math, a rule-based stand-in for MathVista's extraction by a paid model: a letter is
    read as an option, a number as the last number of the text, all else must be contained."""
    gold, said = answers[0].strip(), prediction.strip()
    if re.fullmatch(r"[A-Za-z]", gold):
        return option_match(said, answers)
    number = r"(?:(?<!\d)-)?\d[\d,]*\.?\d*"  # of 2021-2022 the last is 2022
    if re.fullmatch(number, gold):
        found = re.findall(number, said)
        return float(
            bool(found) and float(found[-1].replace(",", "")) == float(gold.replace(",", ""))
        )
    return float(gold.lower() in said.lower())


def count_match(prediction: str, answers) -> float:
    """ACL's VP, CV-Bench's rule: the gold occurs, without case, spaces and periods."""
    said = prediction.lower().replace(" ", "").replace(".", "")
    return float(any(answer.lower().replace(" ", "") in said for answer in answers))


# Captions are scored over a whole test set, against several references each, on words split as
# below (the usual Java tokenizer does nearly that). METEOR needs Java and is left out; CIDEr ends
# at 1000 and would outweigh the rest. So our mean is "BLEU-ROUGE": of BLEU-1..4 and ROUGE-L, never
# to be put in a column of a paper's mean. summary.json has all of them.


def caption_words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def _ngrams(words: list[str], n: int) -> Counter:
    return Counter(tuple(words[k : k + n]) for k in range(len(words) - n + 1))


def bleu(predictions, references) -> list[float]:
    """BLEU-1..4 of a corpus (Papineni et al. 2002), closest reference length: four of 0..1.

    predictions: lists of words; references: per prediction several lists of words.
    """
    hits, total, length, wanted = np.zeros(4), np.zeros(4), 0, 0
    for words, golds in zip(predictions, references, strict=True):
        length += len(words)
        wanted += min((abs(len(gold) - len(words)), len(gold)) for gold in golds)[1]
        for n in range(1, 5):
            found, most = _ngrams(words, n), Counter()
            for gold in golds:
                most |= _ngrams(gold, n)
            hits[n - 1] += sum((found & most).values())
            total[n - 1] += max(len(words) - n + 1, 0)
    # a tiny number instead of 0, as in the usual implementation: BLEU-4 of short captions is small
    precision = (hits + 1e-15) / (total + 1e-9)
    brevity = 1.0 if length >= wanted else math.exp(1 - wanted / max(length, 1e-9))
    return [float(brevity * np.prod(precision[:n]) ** (1 / n)) for n in range(1, 5)]


def _common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence of words."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(words: list[str], golds: list[list[str]]) -> float:
    """ROUGE-L (Lin 2004) of one caption, 0..1: best precision and best recall, beta = 1.2."""
    common = [_common(words, gold) for gold in golds]
    precision = max(c / max(len(words), 1) for c in common)
    recall = max(c / max(len(gold), 1) for c, gold in zip(common, golds, strict=True))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)


def cider(predictions, references) -> float:
    """CIDEr-D of a corpus (Vedantam et al. 2015), 0..10: tf-idf of 1- to 4-grams over the
    references, clipped, with a Gaussian of the difference in length (sigma = 6)."""
    seen = Counter()  # in how many samples an n-gram occurs
    for golds in references:
        seen.update({g for gold in golds for n in range(1, 5) for g in _ngrams(gold, n)})
    log_n, scores = math.log(len(references)), []

    def vector(words, n):
        return {g: c * (log_n - math.log(max(seen[g], 1))) for g, c in _ngrams(words, n).items()}

    def norm(v):
        return math.sqrt(sum(x * x for x in v.values()))

    for words, golds in zip(predictions, references, strict=True):
        total = 0.0
        for n in range(1, 5):
            a = vector(words, n)
            for gold in golds:
                b = vector(gold, n)
                dot = sum(min(x, b[g]) * b[g] for g, x in a.items() if g in b)
                gap = len(words) - len(gold)
                size = norm(a) * norm(b)
                total += dot / size * math.exp(-(gap**2) / 72) if size else 0.0
        scores.append(10 * total / 4 / len(golds))
    return float(np.mean(scores))


def caption_scores(rows: list[dict]) -> dict[str, float]:
    """{BLEU-1..4, ROUGE-L, CIDEr (all x 100), BLEU-ROUGE} of a test set's predictions."""
    predictions = [caption_words(row["text"]) for row in rows]
    references = [[caption_words(answer) for answer in row["answers"]] for row in rows]
    values = {f"BLEU-{n}": x for n, x in enumerate(bleu(predictions, references), 1)}
    pairs = zip(predictions, references, strict=True)
    values["ROUGE-L"] = float(np.mean([rouge_l(words, golds) for words, golds in pairs]))
    mean = np.mean(list(values.values()))
    values |= {"CIDEr": cider(predictions, references), "BLEU-ROUGE": mean}
    return {name: 100 * float(value) for name, value in values.items()}


def caption_match(prediction: str, answers) -> float:
    """One caption by itself: its ROUGE-L. The test set's score is `accuracy`."""
    return rouge_l(caption_words(prediction), [caption_words(answer) for answer in answers])


SCORERS = {
    "exact": exact_match,  # GQA and OCRVQA of CoIN, and what is not a released stream
    "same": same_text,
    "vqa": vqa_accuracy,
    "textvqa": textvqa_accuracy,
    "letter": letter_match,
    "option": option_match,
    "contains": contained,
    "contains-legacy": partial(contained, legacy=True),
    "iou": box_match,
    "iou-legacy": partial(box_match, legacy=True),
    "anls": anls,
    "anls_0.5": partial(anls, threshold=0.5),
    "relaxed": relaxed_match,
    "caption": caption_match,
    "word-in": word_in,
    "gold-in": gold_in,
    "sci": sci_match,
    "fin": fin_match,
    "ocr": ocr_match,
    "math": math_match,
    "count": count_match,
}


def score(metric: str, prediction: str, answers, row: dict | None = None) -> float:
    """Score of one prediction in 0..1; `metric` is the stage's, a name in SCORERS; row: see
    `evaluate`, needed by "sci" and "ocr" only."""
    if metric not in SCORERS:
        raise InputError(f"unknown metric {metric!r}: choose {', '.join(SCORERS)}")
    facts = {"row": row} if metric in ("sci", "ocr") else {}
    return SCORERS[metric](prediction, answers, **facts)


# --------------------------------------------------------------------------------------------------
# 2. One cell of the matrix: answer and score the test samples of one stage
# --------------------------------------------------------------------------------------------------


def evaluate(generate, samples, metric: str, batch_size: int, title: str = "test") -> list[dict]:
    """Answer and score every sample. Returns one row per sample, in the order of `samples`.

    `generate` maps a list of Samples to the list of their answers. Batches hold questions of
    similar length, longest first: little padding, and if memory runs out, then in the first batch.
    Rows are what predictions/ holds: {question_id, prompt, image, text, answers, score, skill}.
    """
    from tqdm import tqdm

    from model import share_out  # here, not above: tables need no torch

    order = sorted(range(len(samples)), key=lambda k: -len(samples[k].question))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    bar = tqdm(batches, desc=title, leave=False, disable=None)
    answers = share_out(lambda batch: generate([samples[k] for k in batch]), bar)
    rows = [None] * len(samples)
    for batch, texts in zip(batches, answers, strict=True):
        for k, text in zip(batch, texts, strict=True):
            s = samples[k]
            row = {"question_id": s.id, "prompt": s.question, "text": text, "skill": s.skill}
            row |= {"answers": list(s.answers), "image": s.image and Path(s.image).name}
            rows[k] = row | {"score": score(metric, text, row["answers"], row)}
    return rows


def accuracy(rows: list[dict], metric: str = "") -> float:
    """One cell A[t,i]: the mean score of the rows in percent; of captions their BLEU-ROUGE."""
    if not rows:
        raise InputError("no predictions, hence no accuracy: is the stage's test set empty?")
    if metric == "caption":
        return caption_scores(rows)["BLEU-ROUGE"]
    return 100 * sum(row["score"] for row in rows) / len(rows)


# --------------------------------------------------------------------------------------------------
# 3. The matrix and its metrics (definitions and worked example: head of this file)
# --------------------------------------------------------------------------------------------------


def metrics(matrix) -> dict[str, float]:
    """AP, AF, AF_vqacl, Last, Avg, MAA, MFT, MFN, BWT of a T x T matrix [stage, task].

    Cells above the diagonal are ignored. What needs a cell that is nan (not evaluated) is nan:
    joint training fills only the last row, so it has an AP and no Avg. T = 1: AF = BWT = 0.
    """
    a = np.asarray(matrix, dtype=float)
    if a.ndim != 2 or a.shape[0] != a.shape[1] or a.size == 0:
        raise ValueError(f"an accuracy matrix is T x T [stage, task], but this one is {a.shape}")
    last, old = a[-1], range(len(a) - 1)  # old: all tasks but the newest
    ap, avg = np.mean(last), np.mean(seen_mean(a))
    values = {
        **{"AP": ap, "Last": ap, "MFN": ap, "Avg": avg, "MAA": avg, "MFT": np.mean(np.diag(a))},
        "AF": np.mean([a[i:, i].max() - last[i] for i in old] or [0]),
        "AF_vqacl": np.mean([a[i:-1, i].max() - last[i] for i in old] or [0]),
        "BWT": np.mean([last[i] - a[i, i] for i in old] or [0]),
    }
    return {name: float(value) for name, value in values.items()}


def seen_mean(matrix) -> list[float]:
    """After each stage t, the mean accuracy over the tasks seen so far: mean_{i<=t} A[t,i]."""
    return [float(np.mean(row[: t + 1])) for t, row in enumerate(np.asarray(matrix, dtype=float))]


def interference(matrix) -> np.ndarray:
    """A[a,b] - max_t A[t,b] (ASR, Fig. 8), <= 0: what task b misses after stage a. Upper part nan.

    A task that was never tested (a run that is not finished) is a column of nan.
    """
    a = np.array(matrix, dtype=float)
    a[np.triu_indices(len(a), 1)] = np.nan
    return a - np.fmax.reduce(a)  # fmax passes over nan


def t_quantile(df: int, level: float = 0.95) -> float:
    """The t with P(|x| < t) = level in Student's distribution; df = 4: 2.776.

    With x = sqrt(df) tan(u) the density becomes cos(u)^(df-1) on a quarter circle: sum it there.
    """
    u = np.linspace(0, np.pi / 2, 100_001)
    density = np.cos(u) ** (df - 1)
    mass = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])  # trapezoids
    return float(np.sqrt(df) * np.tan(np.interp(level, mass / mass[-1], u)))


def paired(a, b) -> tuple[float, float, float, int]:
    """Differences a - b, pair by pair (same seeds): (mean, low, high, n), a 95% t interval.

    Two runs of one seed share data order and initial weights, so their difference varies less than
    the runs do. One pair has no interval: low and high are nan.
    """
    d = np.array([x - y for x, y in zip(a, b, strict=True)], dtype=float)
    if len(d) < 2:
        return float(d.mean()) if len(d) else math.nan, math.nan, math.nan, len(d)
    half = t_quantile(len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d))
    return float(d.mean()), float(d.mean() - half), float(d.mean() + half), len(d)


# --------------------------------------------------------------------------------------------------
# 4. The run folder: --out IS the run
# --------------------------------------------------------------------------------------------------
#   args.json      the flags, with the script, commit and command of the start
#   metrics.jsonl  one line per training step
#   matrix.json    stages, scorers, matrix; nothing that changes between two equal runs
#   predictions/   after-<t>-on-<i>.jsonl holds the answers behind A[t,i], counted from 1
#   summary.json   written last: it marks the run as finished, and is its record for results/

REPOSITORY = Path(__file__).resolve().parent
MAY_DIFFER = ("resume", "out", "plot")  # flags that do not change what is computed
ABOUT_START = ("script", "commit", "command")


def jsonable(value):
    """Plain JSON types: a path becomes a string, nan null, infinity "inf" (JSON knows neither)."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [jsonable(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return str(value) if isinstance(value, Path) else value


def silent() -> bool:
    """Under torchrun the first process alone writes; True in the others."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and os.environ["RANK"] != "0"


def write_text(path: Path, text: str) -> None:
    """Write the whole file or nothing: after a kill the old file is there, never half a new one."""
    if silent():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_json(path: Path, obj) -> None:
    """Write JSON atomically, with sorted keys, and each row of a matrix on one line."""
    text = json.dumps(jsonable(obj), indent=1, sort_keys=True, allow_nan=False)
    innermost = re.compile(r"\[\n\s*([^\[\]{}]*?)\n\s*\]")  # no JSON string has a raw line break
    text = innermost.sub(lambda m: "[" + re.sub(r"\n\s*", " ", m[1]) + "]", text)
    write_text(Path(path), text + "\n")


def read_json(path: Path, lines: bool = False):
    """Content of a .json file, or the list in a .jsonl file; InputError names file and line."""
    rows = []
    try:
        text = Path(path).read_text(encoding="utf-8")
        if not lines:
            return json.loads(text)
        for line in text.splitlines():
            rows.append(json.loads(line))
        return rows
    except json.JSONDecodeError as error:
        line = len(rows) + error.lineno
        raise InputError(f"{path}, line {line}: not valid JSON ({error.msg})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None


def start_run(args: argparse.Namespace, script: str) -> Path:
    """Make the run folder (args.out or runs/SCRIPT-STREAM-SEED) with its args.json; return it.

    Call it with every default resolved. A finished run says so and ends with SystemExit(0); under
    torchrun with code 1, or the other processes would wait.
    InputError: the folder holds another configuration, or an unfinished run and --resume is off,
    or files that are no run; or --resume finds no run. A folder with args.json alone, left by a
    start that went wrong before it learned anything, is taken over.
    """
    name = Path(script).stem
    run = Path(args.out or f"runs/{name}-{Path(args.stream).resolve().name}-{args.seed}")
    if silent():
        return run
    now = jsonable({key: value for key, value in vars(args).items() if key not in MAY_DIFFER})
    now |= {"script": name, "commit": git_commit(), "command": shlex.join(["python", *sys.argv])}
    began = run.is_dir() and {path.name for path in run.iterdir()} != {"args.json"}
    if (run / "args.json").is_file() and (began or args.resume):
        was = read_json(run / "args.json")
        for key in sorted((was.keys() | now.keys()) - {"commit", "command"}):
            old, new = was.get(key, "absent"), now.get(key, "absent")
            if old != new:
                flag = key if key == "script" else f"--{key}"
                raise InputError(
                    f"{run} holds a run with {flag} {old}, and now {flag} is {new}: "
                    "choose another --out, or the old value"
                )
        if (run / "summary.json").is_file():
            print(f"The run in {run} is finished. To see it: python eval.py {run}")
            raise SystemExit(int(os.environ.get("WORLD_SIZE", 1)) > 1)
        if not args.resume:
            raise InputError(f"{run} holds an unfinished run: add --resume or choose another --out")
        if now["commit"] not in was["commit"].split(", resumed with "):  # two versions of the code
            was["commit"] += f", resumed with {now['commit']}"
            write_json(run / "args.json", was)
        return run
    if args.resume:
        raise InputError(f"--resume: no run in {run}; start without --resume, or correct --out")
    try:
        run.mkdir(parents=True, exist_ok=True)
        if began and any(run.iterdir()):
            raise InputError(f"{run} holds files that are no run: choose another --out")
        write_json(run / "args.json", now)
    except OSError as error:
        raise InputError(f"--out {run}: cannot make this folder ({error.strerror})") from None
    return run


def append_metrics(run: Path, line: dict) -> None:
    """Add a line to metrics.jsonl; it needs "step", counted over the whole run, for --resume."""
    if silent():
        return
    with open(Path(run) / "metrics.jsonl", "a", encoding="utf-8") as file:  # closing it flushes
        file.write(json.dumps(jsonable({"step": line["step"], **line})) + "\n")


def truncate_metrics(run: Path, step: int) -> None:
    """On --resume: keep the lines up to the checkpoint's `step` (a kill can tear the last line)."""
    path = Path(run) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    whole = [line for line in lines if line.endswith("\n")]
    write_text(path, "".join(line for line in whole if json.loads(line)["step"] <= step))


def write_matrix(run: Path, stages, matrix) -> None:
    """Write matrix.json from the Stages (name, metric) and the T x T matrix (nan: not tested)."""
    names, scorers = [stage.name for stage in stages], [stage.metric for stage in stages]
    content = {"stages": names, "scorers": scorers, "matrix": matrix}
    write_json(Path(run) / "matrix.json", content)


def predictions_file(run: Path, trained: int, tested: int | str) -> Path:
    """File of the answers behind matrix[trained, tested] (from 0); a word names an extra test."""
    on = tested + 1 if isinstance(tested, int) else tested
    return Path(run) / "predictions" / f"after-{trained + 1}-on-{on}.jsonl"


def write_predictions(run: Path, trained: int, tested: int | str, rows: list[dict]) -> None:
    """Save the rows of `evaluate` in predictions_file(run, trained, tested)."""
    lines = [json.dumps(jsonable(row), sort_keys=True) + "\n" for row in rows]
    write_text(predictions_file(run, trained, tested), "".join(lines))


def finish_run(run: Path, summary: dict) -> dict:
    """Write summary.json, which marks the run as finished; returns this record.

    `summary` brings seconds, peak_memory_mb, trainable_parameters and whatever a method adds. From
    the folder come flags, stages, matrix, metrics, commit, command; here we add versions, threads,
    the hash of the base model, and of captions all scores, not only the one in the matrix.
    """
    import torch  # only for the number of threads; a run has it loaded already

    missing = {"seconds", "peak_memory_mb", "trainable_parameters"} - summary.keys()
    if missing:
        raise ValueError(f"finish_run: the summary lacks {', '.join(sorted(missing))}")
    packages = ("torch", "transformers", "numpy", "pillow")
    versions = {"python": sys.version.split()[0]} | {name: version(name) for name in packages}
    record = {**summary, **_folder_record(Path(run)), "versions": versions}
    record = jsonable(record | {"threads": torch.get_num_threads()})
    end = max(t for t, row in enumerate(record["matrix"]) if row[0] is not None)
    for i, scorer in enumerate(record["scorers"]):
        if scorer == "caption" and record["matrix"][end][i] is not None:
            rows = read_json(predictions_file(run, end, i), lines=True)
            record.setdefault("captions", {})[record["stages"][i]] = caption_scores(rows)
    write_json(Path(run) / "summary.json", record)
    return record


def read_run(folder: Path) -> dict:
    """Record of a run: its summary.json, or what there is of an unfinished run."""
    summary = Path(folder) / "summary.json"
    return load_record(summary) if summary.is_file() else _folder_record(Path(folder))


def _folder_record(run: Path) -> dict:
    if not (run / "args.json").is_file():
        raise InputError(f"{run} is no run folder: there is no args.json in it")
    if not (run / "matrix.json").is_file():
        raise InputError(f"{run} has no matrix.json: its first stage is not finished")
    args, results = read_json(run / "args.json"), read_json(run / "matrix.json")
    record = {key: args.pop(key) for key in ABOUT_START}
    record |= {"args": args, "stream": args["stream"], "seed": args["seed"]}
    record |= {"model_sha256": model_sha256(args["model"])}
    return record | results | {"metrics": metrics(results["matrix"])}


def git_commit() -> str:
    """Commit of this code, "-dirty" if files outside results/ differ; "unknown" outside git."""

    def git(*words):
        command = ["git", "-C", str(REPOSITORY), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != REPOSITORY:
            return "unknown"  # a copy without .git, unpacked inside another repository
        dirty = git("status", "--porcelain", "--", ".", ":!results")  # a sweep writes there
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def model_sha256(model: str) -> str:
    """sha256 of a local model's weights (all shards, in order); a hub id stands for itself."""
    files = sorted(Path(model).glob("model*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest() if files else f"not hashed: {model}"


def rescore(run: Path) -> list[str]:
    """Score saved predictions again; a sentence for each cell that differs from matrix.json."""
    saved = read_json(Path(run) / "matrix.json")
    matrix = np.array(saved["matrix"], dtype=float)
    wrong = []
    for t, i in np.argwhere(np.isfinite(matrix)).tolist():
        rows = read_json(predictions_file(run, t, i), lines=True)
        scorer = saved["scorers"][i]
        rows = [r | {"score": score(scorer, r["text"], r["answers"], r)} for r in rows]
        again = accuracy(rows, scorer)
        if abs(again - matrix[t, i]) > 1e-9:
            cell = f"{run}: after stage {t + 1} on task {i + 1} ({saved['stages'][i]})"
            wrong.append(f"{cell} the predictions give {again:.4f}, matrix.json {matrix[t, i]:.4f}")
    return wrong


# --------------------------------------------------------------------------------------------------
# 5. Tables
# --------------------------------------------------------------------------------------------------

COLUMNS = {"AP": "AP", "AF": "AF", "AF_vqacl": "AF (VQACL)", "Last": "Last", "Avg": "Avg"}
COLUMNS |= {"MFT": "MFT", "BWT": "BWT"}  # metric -> head of its column


def grid(rows: list[list[str]], markdown: bool = False) -> str:
    """Rows of strings as an aligned table, in plain text or Markdown; the first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("| " + " | ".join(cells) + " |" if markdown else "  ".join(cells).rstrip())
    if markdown:
        lines.insert(1, "|---" + "|---:" * (len(widths) - 1) + "|")
    return "\n".join(lines)


def show(value) -> str:
    """A number for a table; "-" where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.1f}"


def table(matrix, stages: list[str], markdown: bool = False) -> str:
    """One run: accuracy matrix (row: after stage t, column: task i, numbered) and metrics."""
    a, values = np.array(matrix, dtype=float), metrics(matrix)
    rows = [["accuracy (%) on task", *(str(i + 1) for i in range(len(stages)))]]
    for t, name in enumerate(stages):
        seen = [show(value) for value in a[t, : t + 1]]
        rows.append([f"after {t + 1} {name}", *seen, *[""] * (len(stages) - t - 1)])
    numbers = [list(COLUMNS.values()), [show(values[key]) for key in COLUMNS]]
    return grid(rows, markdown) + "\n\n" + grid(numbers, markdown)


def compare(records: dict[str, dict], markdown: bool = False) -> str:
    """Several runs, one line each. records: {name: record}."""
    rows = [["run", "seed", *COLUMNS.values(), "minutes"]]
    for name, record in records.items():
        minutes = show(record["seconds"] / 60) if "seconds" in record else "unfinished"
        values = [show(record["metrics"][key]) for key in COLUMNS]
        rows.append([name, str(record["seed"]), *values, minutes])
    return grid(rows, markdown)


def load_record(path: Path) -> dict:
    """One record; InputError if the file is something else."""
    record = read_json(path)
    needed = {*ABOUT_START, "stream", "seed", "args", "stages", "matrix", "metrics", "model_sha256"}
    missing = needed - record.keys() if isinstance(record, dict) else needed
    if missing:
        raise InputError(f"{path} is no record of a run: it lacks {', '.join(sorted(missing))}")
    return record


def group(records: dict[str, dict]) -> dict[str, list[dict]]:
    """Records that differ in nothing but the seed: {label: records}; labels tell what differs."""
    flags = [{k: str(v) for k, v in r["args"].items() if k != "seed"} for r in records.values()]
    values = {key: {f[key] for f in flags if key in f} for f in flags for key in f}
    groups = {}
    for record, own in zip(records.values(), flags, strict=True):
        differing = [f"{key}={value}" for key, value in own.items() if len(values[key]) > 1]
        groups.setdefault(" ".join([record["script"], *differing]), []).append(record)
    return groups


def record_table(
    records, rows=None, baseline=None, seeds=None, markdown: bool = False, extra=None
) -> str:
    """Mean +- std over seeds, and paired differences to a baseline with 95% t intervals.

    records: {name: record}. rows: {label: {flag or record key: value, ...}} says which records make
    a row; default: `group`. baseline: a label, default the first. seeds: use these, name the
    missing. extra: {head of a further column: function of a record; nan where it has none}.
    InputError if base models or streams are mixed, or a row has two records of one seed.
    """
    for key in ("model_sha256", "stream"):
        found = sorted({str(record[key]) for record in records.values()})
        if len(found) > 1:
            raise InputError(f"one table, but {len(found)} kinds of {key}: {' and '.join(found)}")
    if rows is None:
        picked = group(records)
    else:
        picked = {label: [] for label in rows}
        for record in records.values():
            known = record | record["args"]
            for label, wanted in rows.items():
                if all(known.get(key) == jsonable(value) for key, value in wanted.items()):
                    picked[label].append(record)
    baseline = baseline or next(iter(picked))
    if baseline not in picked:
        raise InputError(f"no row {baseline!r} to compare with, only {', '.join(picked)}")
    cells = {}  # label -> {seed: metrics, numbers only}
    for label, members in picked.items():
        cells[label] = {}
        for record in members:
            if record["seed"] in cells[label]:
                raise InputError(
                    f"row {label!r} holds seed {record['seed']} twice: tell them apart"
                )
            numbers = {k: math.nan if v is None else v for k, v in record["metrics"].items()}
            numbers |= {head: value(record) for head, value in (extra or {}).items()}
            unfinished = math.isnan(numbers["AP"])  # counts as missing
            if not unfinished and (seeds is None or record["seed"] in seeds):
                cells[label][record["seed"]] = numbers
    shown, compared = ("AP", "AF", "Avg", "BWT", *(extra or {})), ("AP", "AF")
    lines = [["row", "seeds", *shown, *(f"{key} - baseline [95%]" for key in compared)]]
    for label, runs in cells.items():
        missing = [str(seed) for seed in seeds or () if seed not in runs]
        count = f"{len(runs)} (missing {', '.join(missing)})" if runs and missing else len(runs)
        line = [label, str(count or "missing")]
        line += [_mean_std([run[key] for run in runs.values()]) for key in shown]
        both = [seed for seed in runs if seed in cells[baseline]]
        for key in compared:
            pairs = [(runs[seed][key], cells[baseline][seed][key]) for seed in both]
            line.append("baseline" if label == baseline else _difference(pairs))
        lines.append(line)
    return grid(lines, markdown)


def drift_correlation(records) -> tuple[np.ndarray, tuple[float, float, float], int]:
    """Does a skill whose spectrum drifts lose points? From the "drift" of records of asr.py:
    points [2, n] (nats; points lost), (r, low, high), number of seeds.

    One Pearson correlation a run, over its skills; runs of one seed are averaged; then the mean
    over the seeds and its 95% t interval. Means are of Fisher's z = atanh r.
    """
    runs = [np.array([p for p in r["drift"].values() if None not in p]).T for r in records]
    by_seed = {}
    for record, pairs in zip(records, runs, strict=True):
        z = np.arctanh(np.corrcoef(*pairs)[0, 1])
        by_seed.setdefault(record["seed"], []).append(z)
    values = [np.mean(z) for z in by_seed.values()]
    mean = paired(values, np.zeros(len(values)))[:3]
    return np.concatenate(runs, 1), tuple(map(float, np.tanh(mean))), len(values)


def _mean_std(values: list[float]) -> str:
    if not values or np.isnan(values).any():
        return "-"
    return show(np.mean(values)) + (f" +- {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")


def _difference(pairs) -> str:
    mean, low, high, n = paired([a for a, _ in pairs], [b for _, b in pairs])
    if math.isnan(mean):
        return "-"
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}] n={n}" if n > 1 else f"{mean:+.1f} n=1"


# --------------------------------------------------------------------------------------------------
# 6. Figures
# --------------------------------------------------------------------------------------------------
# 6.7 inches at 120 dpi are 800 pixels, the width of a README: 9 points are 15 pixels high there.
# cividis for amounts, the palette of Okabe and Ito for lines: safe for color-blind readers.

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dv<P"


def new_figure(rows: int = 1, columns: int = 1, height: float = 4.2, **more):
    """(figure, axes). It needs no screen, and no pyplot whose global state it could disturb."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.7, height), dpi=120, layout="constrained")
    axes = figure.subplots(rows, columns, **more)
    for axis in np.ravel(axes):
        axis.tick_params(labelsize=9)
    return figure, axes


def save_figure(figure, path: Path) -> Path:
    """Save as PNG; makes the folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return Path(path)


def _stack(matrices) -> np.ndarray:
    """One matrix, or a list with one per seed -> [seeds, T, T]."""
    stack = np.array(matrices, dtype=float)
    return stack[None] if stack.ndim == 2 else stack


def _heat_map(axis, values, stages, low, high, digits):
    """A lower triangle in colors, with its numbers; cells that are nan stay white."""
    image = axis.imshow(values, cmap="cividis", vmin=low, vmax=high, aspect="auto")
    for t, i in np.argwhere(np.isfinite(values)):
        ink = "white" if values[t, i] < low + 0.45 * (high - low) else "black"
        text = f"{round(values[t, i], digits) + 0.0:.{digits}f}"  # + 0.0 turns -0 into 0
        axis.text(i, t, text, ha="center", va="center", fontsize=9, color=ink)
    axis.set_xticks(range(len(stages)), stages, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(stages)), stages)
    axis.set_xlabel("tested on")
    axis.spines[["top", "right"]].set_visible(False)
    return image


def plot_matrix(matrix, stages: list[str], path: Path, title: str = "Accuracy matrix") -> Path:
    """Heat map of the accuracy matrix with its numbers; AP, AF and Avg in the title."""
    values, m = np.array(matrix, dtype=float), metrics(matrix)
    values[np.triu_indices(len(values), 1)] = np.nan
    low, high = np.floor(np.nanmin(values) / 10) * 10, np.ceil(np.nanmax(values) / 10) * 10
    figure, axis = new_figure(height=1.8 + 0.34 * len(stages))
    image = _heat_map(axis, values, stages, low, max(high, low + 10), digits=1)
    axis.set_ylabel("after training on")
    axis.set_title(f"{title}\n" + ", ".join(f"{k} {show(m[k])}" for k in ("AP", "AF", "Avg")))
    figure.colorbar(image, ax=axis, label="accuracy (%)")
    return save_figure(figure, path)


def plot_interference(runs: dict, stages: list[str], path: Path) -> Path:
    """Task x task interference (ASR, Fig. 8), one or two methods side by side on one color scale.

    runs: {label: matrix, or list of matrices, one per seed, whose interference is averaged}.
    """
    from matplotlib.ticker import MaxNLocator

    if len(runs) not in (1, 2):
        raise ValueError(f"the interference figure shows one or two methods, not {len(runs)}")
    values = [np.mean([interference(a) for a in _stack(m)], axis=0) for m in runs.values()]
    low = min(-1.0, *(np.nanmin(v) for v in values))
    figure, axes = new_figure(1, len(runs), height=2.9 + 0.28 * len(stages))
    axes = np.ravel(axes)
    for axis, label, value in zip(axes, runs, values, strict=True):
        image = _heat_map(axis, value, stages, low, 0.0, digits=0)
        axis.set_title(f"{label}\nmean {np.nanmean(value):.1f} points")
    figure.suptitle("Interference between tasks")
    axes[0].set_ylabel("after training on")
    for axis in axes[1:]:
        axis.set_yticklabels([])
    bar = {"location": "bottom", "aspect": 60, "label": "accuracy minus the task's best (points)"}
    figure.colorbar(
        image, ax=axes, ticks=MaxNLocator(integer=True), **bar
    )  # below: keeps the width
    return save_figure(figure, path)


def plot_accuracy(runs: dict, path: Path, title: str = "Accuracy on the tasks seen so far") -> Path:
    """Mean accuracy over the seen tasks, stage by stage, a line per run.

    runs: {label: matrix, or list of matrices, one per seed: then mean and +- one std as a band}. A
    run with only its last row (joint training, zero-shot) is one point at the end.
    """
    figure, axis = new_figure()
    for k, (label, matrices) in enumerate(runs.items()):
        curves = np.array([seen_mean(matrix) for matrix in _stack(matrices)])  # [seeds, T]
        stage, mean = np.arange(1, curves.shape[1] + 1), curves.mean(axis=0)
        color, line = COLORS[k % len(COLORS)], ("-", "--", ":")[k // len(COLORS) % 3]
        mark = MARKERS[k % len(MARKERS)]
        label += f" ({len(curves)} seeds, band: std)" if len(curves) > 1 else ""
        axis.plot(stage, mean, color=color, linestyle=line, marker=mark, label=label)
        if len(curves) > 1:
            std = curves.std(axis=0, ddof=1)
            axis.fill_between(stage, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
    axis.set_xticks(stage)
    axis.set_xlabel("after training stage")
    axis.set_ylabel("mean accuracy (%)")
    axis.set_title(title)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    return save_figure(figure, path)


# --------------------------------------------------------------------------------------------------
# 7. Command line
# --------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Print the tables; 1 if a run's predictions do not give its matrix, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder or record (.json)")
    parser.add_argument("--markdown", action="store_true", help="tables as Markdown")
    parser.add_argument("--table", action="store_true", help="only the table over seeds")
    parser.add_argument("--plot", metavar="FOLDER", help="draw the figures into FOLDER")
    args = parser.parse_args(argv)
    results = Path(args.runs[0])
    if args.table and any(results.glob("*/*.json")) and not (results / "args.json").exists():
        import sweep  # it knows the rows of each sweep; it imports this file, so not at the top

        sweep.RESULTS = results
        for name in [*sweep.SWEEPS, *sweep.OTHER_TABLES]:
            print(f"## {name}\n\n{sweep.block(name, args.markdown)}\n")
        return 0
    folders = [path for path in args.runs if not path.endswith(".json")]
    records = {path: read_run(path) if path in folders else load_record(path) for path in args.runs}
    first = records[args.runs[0]]
    if len(records) == 1:
        print(table(first["matrix"], first["stages"], args.markdown))
    else:
        if not args.table:
            print(compare(records, args.markdown) + "\n")
        for stream in dict.fromkeys(record["stream"] for record in records.values()):
            same = {name: r for name, r in records.items() if r["stream"] == stream}
            print(f"{stream}:\n\n{record_table(same, markdown=args.markdown)}\n")
    if args.plot:
        folder, methods = Path(args.plot), group(records)
        matrices = {label: [r["matrix"] for r in members] for label, members in methods.items()}
        two = dict(list(matrices.items())[:2])
        if any(record["stages"] != first["stages"] for record in records.values()):
            raise InputError("--plot: these runs went through different stages or another order")
        drawn = [plot_accuracy(matrices, folder / "accuracy.png")]
        drawn.append(plot_interference(two, first["stages"], folder / "interference.png"))
        if len(records) == 1:
            drawn.append(plot_matrix(first["matrix"], first["stages"], folder / "matrix.png"))
        print("\nfigures:", *drawn)
    wrong = [sentence for folder in folders for sentence in rescore(folder)]
    for sentence in wrong:
        print(sentence)
    if folders and not wrong:
        print(f"\nThe saved predictions of {len(folders)} run(s) give the saved matrix.")
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
