"""Is an answer right? The scorers of all streams; benchmarks.py says which stage has which metric.

RULES       a text against one gold answer, the best gold counts      exact, letter, iou, ...
ALL_GOLDS   a text against all gold answers together                  vqa, textvqa, caption
captions    a whole test set: BLEU-1..4, ROUGE-L, CIDEr               caption_scores
"""

import math
import re
from collections import Counter

import numpy as np

from files import InputError

# VQA's gold answers are free text from ten annotators. The official evaluation (visualqa.org) makes
# "Two dogs." equal to "2 dogs"; its oddities are kept, because all published numbers rest on them.

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = ("a", "an", "the")
DIGITS = "zero one two three four five six seven eight nine ten".split()
NUMBERS = {"none": "0"} | {word: str(n) for n, word in enumerate(DIGITS)}
# A form that lacks one apostrophe gets it back: dont -> don't, couldnt've -> couldn't've. The
# official list leaves out forms that are words without it: were, ill, its, lets.
FORMS = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
    hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
    might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't shan't she'd've
    should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've there're
    there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're
    you've""".split()
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


def vqa_accuracy(text: str, answers) -> float:
    """VQA soft accuracy in 0..1 against the annotators' answers (ten in VQA v2).

    Each annotator is left out in turn and the text earns min(1, matches among the others / 3);
    the mean counts: 1, 2, 3, 4 matches of ten give 0.3, 0.6, 0.9, 1. Gold answers lose their
    punctuation only where annotators disagree, and never articles or number words: officially a
    gold "two" can never be matched. A single gold answer: equality, both sides normalized.
    """
    text = normalize_vqa(text)
    if len(answers) == 1:
        return float(text == normalize_vqa(answers[0]))
    golds = [strip_punctuation(a) for a in answers] if len(set(answers)) > 1 else answers
    hits = [gold == text for gold in golds]
    return sum(min(1.0, (sum(hits) - hit) / 3) for hit in hits) / len(hits)


def letter_match(text: str, gold: str) -> bool:
    """CoIN's ScienceQA: "B", "B. star" and the first word of one letter all mean option B."""
    text = text.strip()
    letter = text[:1] if text[1:3] == ". " or text[1:] == "." else ""
    letter = letter or next((word for word in text.split() if len(word) == 1), "")
    return letter.upper() == gold.strip().upper()


def option_said(text: str) -> str:
    """The last option letter of a text, "" without any, as in "b", "(B)", "B. star", "The answer is
    B."; the words "A" and "I" before another do not count."""
    whole = re.fullmatch(r"\(?([A-Za-z])[).:]*", text.strip())
    letters = re.findall(r"(?<![\w'])([A-Z])(?![\w'])(?!(?<=[AI]) [a-z])", text.strip())
    return (whole[1] if whole else "".join(letters[-1:])).upper()


def option_match(text: str, gold: str) -> bool:
    """ACL's GUI, offline in place of MMT-Bench's server, which took the whole text for a letter."""
    return option_said(text) == gold.strip().upper()


def box_match(text: str, gold: str) -> bool:
    """CoIN's Grounding: the boxes "[x0, y0, x1, y1]" overlap with IoU > 0.5."""
    a, b = ([float(x) for x in re.findall(r"-?\d*\.?\d+", box)] for box in (text, gold))
    if len(a) != 4 or len(b) != 4:
        return False
    width, height = (min(a[k + 2], b[k + 2]) - max(a[k], b[k]) for k in (0, 1))
    inside = max(width, 0) * max(height, 0)
    union = sum(abs((c[2] - c[0]) * (c[3] - c[1])) for c in (a, b)) - inside
    return union > 0 and inside / union > 0.5


def edit_distance(a, b, substitution: int = 1) -> int:
    """Levenshtein: the least cost of insertions, deletions and substitutions that turn a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            change = diagonal + (0 if x == y else substitution)
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, change)
    return row[-1]


def anls(text: str, gold: str) -> float:
    """Normalized Levenshtein similarity (DocVQA), 1 - distance / longer length. As in CRAM, without
    the official threshold, which sets values up to 0.5 to zero."""
    text, gold = (" ".join(words.lower().split()) for words in (text, gold))
    return 1 - edit_distance(text, gold) / max(len(text), len(gold), 1)


def word_in(text: str, gold: str) -> bool:
    """DCL's RS and AD: the text contains the gold answer, a single word between word borders."""
    text, gold = text.lower(), gold.lower()
    if " " not in gold:
        gold = gold.replace(".", "")
        if " " in text:
            return any(form in text for form in (f" {gold}", f"{gold} ", f"{gold}.", f"{gold},"))
    return gold in text


def sci_match(text: str, gold: str, row: dict) -> float:
    """DCL's Sci, by the image's name: AI2D, TQA, VQA and SciVerse exactly; MapQA's "Which states"
    by the share of gold states in the text's list; the rest of MapQA by containment."""
    text, gold = text.strip().lower(), gold.strip().lower()
    if str(row["image"]).startswith(("AI2D_", "TQA_", "VQA_", "SciVerse_")):
        return text == gold
    if "which states" in row["prompt"].lower():
        listed = {state.strip() for state in text.split(",")}
        states = [state.strip() for state in gold.split(",")]
        return sum(state in listed for state in states) / len(states)
    return gold in text


def ocr_match(text: str, gold: str, row: dict) -> bool:
    """ACL's OCR, OCRBench's rule: the text contains the gold answer, line breaks taken out of both;
    handwritten formulas (by the record's answer_type) are compared without spaces and with case."""
    text, gold = (words.strip().replace("\n", "") for words in (text, gold))
    if row["skill"] == "Handwritten Mathematical Expression Recognition":
        return gold.replace(" ", "") in text.replace(" ", "")
    return gold.lower() in text.lower()


def choices_of(prompt: str) -> dict[str, str]:
    """{letter: text} of the choices that a question lists as "Choices: (A) 3 (B) 4"; else {}."""
    _, _, listed = prompt.partition("Choices:")
    return dict(re.findall(r"\(([A-Z])\)\s*(.*?)\s*(?=\([A-Z]\)|\n|$)", listed))


def chosen_letter(text: str, choices: dict[str, str]) -> str:
    """The choice that a text names: the one letter among its words, or the one choice whose words
    it contains, the rules that MathVista's evaluation tries first; else what option_said reads."""
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    letters = [letter for letter in choices if letter in words]
    texts = [letter for letter, choice in choices.items() if choice.lower() in text.lower()]
    found = next((named for named in (letters, texts) if len(named) == 1), [])
    return found[0] if found else option_said(text)


def math_match(text: str, gold: str, row: dict) -> bool:
    """ACL's Math, rules in place of MathVista's extraction by a paid model: letter or text of a
    choice; a gold number must be the last number of the text; all else must occur in it."""
    text, gold = text.strip(), gold.strip()
    if choices := choices_of(row["prompt"]):
        letters = [k for k, choice in choices.items() if choice.lower() == gold.lower()]
        return chosen_letter(text, choices) in (letters or [gold.upper()])
    if re.fullmatch(r"[A-Za-z]", gold):
        return option_match(text, gold)
    number = r"(?:(?<!\d)-)?\d[\d,]*\.?\d*"  # of 2021-2022 the last is 2022
    if re.fullmatch(number, gold):
        numbers = [float(x.replace(",", "")) for x in re.findall(number, text)]
        return numbers[-1:] == [float(gold.replace(",", ""))]
    return gold.lower() in text.lower()


# Captions are scored over a whole test set, against several references each, on words as
# pycocoevalcap cuts them. METEOR needs Java and is left out; CIDEr goes up to 1000 and would
# outweigh the rest. So the matrix has "BLEU-ROUGE", the mean of BLEU-1..4 and ROUGE-L, not to be
# compared with a paper's mean of other scores. summary.json has all of them.

REWRITTEN = {  # before a caption is cut into words
    r"[’‘`]": "'",
    r"[“”]|''": '"',
    r"[–—]": " -- ",
    "…": " ... ",
    "€": "$",
    "£": "#",
    "¢": " cents",
    "½": "1/2",
    "\ufffd": " ",
    r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b|\b(gim|lem)(me)\b": r"\1\3\5\7 \2\4\6\8",
    r"'t(is|was)\b": r"'t \1",
    r"(?<=[^\W\d_])(n't)\b": r" \1",
    r"(?<=\w)('(?:s|m|re|ve|ll|d))\b": r" \1",
    r"(\d:\d\d)([ap]m)\b": r"\1 \2",
}
ABBREVIATIONS = """mr mrs ms dr st jr sr co inc ltd corp vs etc ave blvd ph.d mt ft rd ct tv gen
    prof jan feb mar apr jun jul aug sep sept oct nov dec"""
CAPTION_WORD = re.compile(
    r"https?://\S+|www\.\S+|\S+@\S+\.\w+|<[a-z]+>"
    rf"|(?<!\w)(?:{'|'.join(ABBREVIATIONS.split())})\.(?!\w)|(?:no|pp)\.(?=\s+\d)"
    r"|(?<!\w)(?:[^\W\d_]\.){2,}"  # u.s.
    r"|(?<!\S)[-+]\d(?:[\d.,]*\d)?|\.\d+"  # -5, .5
    r"|n't|y'(?= all)|'(?:s|m|re|ve|ll|d|t|em|n'|\d0s)(?!\w)"
    r"|[^\W_]+(?:(?:[-&/_]|(?<=[^\W\d])[.'](?=[^\W\d])|(?<=\d)[.,:](?=\d))[^\W_]+)*"  # half-eaten
    r"|\.\.\.|--+|[?!]+|\S"
)
BRACKETS = dict(zip("()[]{}", "-lrb- -rrb- -lsb- -rsb- -lcb- -rcb-".split()))
DROPPED = {*"\"'.?!,:;-", "--", "..."}


def caption_words(text: str) -> list[str]:
    """Lower-case words as pycocoevalcap's tokenizer makes them, Stanford's for the Penn Treebank:
    "The dog's half-eaten" -> the, dog, 's, half-eaten. Its oddities are kept: brackets count as
    words, and so do "!!" and "?!", but not "!"."""
    text = text.lower()
    for pattern, by in REWRITTEN.items():
        text = re.sub(pattern, by, text)
    words = [BRACKETS.get(word, word) for word in CAPTION_WORD.findall(text)]
    return [word for word in words if word not in DROPPED]


def ngrams(words: list[str], n: int) -> Counter:
    return Counter(tuple(words[k : k + n]) for k in range(len(words) - n + 1))


def bleu(captions, references) -> list[float]:
    """BLEU-1..4 of a corpus (Papineni et al. 2002), closest reference length: four of 0..1.

    captions: lists of words; references: per caption several lists of words.
    """
    hits, total, length, wanted = np.zeros(4), np.zeros(4), 0, 0
    for words, golds in zip(captions, references):
        length += len(words)
        wanted += min((abs(len(gold) - len(words)), len(gold)) for gold in golds)[1]
        for n in range(1, 5):
            most = Counter()
            for gold in golds:
                most |= ngrams(gold, n)
            hits[n - 1] += sum((ngrams(words, n) & most).values())
            total[n - 1] += max(len(words) - n + 1, 0)
    # a tiny number instead of 0, as in the usual implementation: BLEU-4 of short captions is small
    precision = (hits + 1e-15) / (total + 1e-9)
    brevity = 1.0 if length >= wanted else math.exp(1 - wanted / max(length, 1e-9))
    return [float(brevity * np.prod(precision[:n]) ** (1 / n)) for n in range(1, 5)]


def rouge_l(words: list[str], golds: list[list[str]]) -> float:
    """ROUGE-L (Lin 2004) of one caption, 0..1: best precision and best recall, beta = 1.2."""
    # the longest common subsequence, from the distance with insertions and deletions only
    common = [(len(words) + len(gold) - edit_distance(words, gold, 2)) // 2 for gold in golds]
    precision = max(common) / max(len(words), 1)
    recall = max(c / max(len(gold), 1) for c, gold in zip(common, golds))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision)


def cider(captions, references) -> float:
    """CIDEr-D of a corpus (Vedantam et al. 2015), 0..10: tf-idf of 1- to 4-grams over the
    references, clipped, with a Gaussian of the difference in length (sigma = 6)."""
    df = Counter()  # n-gram -> number of samples whose references have it
    for golds in references:
        df.update({g for gold in golds for n in range(1, 5) for g in ngrams(gold, n)})

    def tf_idf(words, n):
        """{n-gram: weight}, and the norm of the weights."""
        log_n, counts = math.log(len(references)), ngrams(words, n)
        weights = {g: count * (log_n - math.log(max(df[g], 1))) for g, count in counts.items()}
        return weights, math.sqrt(sum(x * x for x in weights.values()))

    scores = []
    for words, golds in zip(captions, references):
        total = 0.0
        for n in range(1, 5):
            a, norm = tf_idf(words, n)
            for gold in golds:
                b, gold_norm = tf_idf(gold, n)
                if norm * gold_norm > 0:
                    dot = sum(min(x, b[g]) * b[g] for g, x in a.items() if g in b)
                    gap = len(words) - len(gold)
                    total += dot / (norm * gold_norm) * math.exp(-(gap**2) / 72)
        scores.append(10 * total / 4 / len(golds))
    return float(np.mean(scores))


def caption_scores(rows: list[dict]) -> dict[str, float]:
    """{BLEU-1..4, ROUGE-L, CIDEr (all x 100), BLEU-ROUGE} of a test set's predictions."""
    captions = [caption_words(row["text"]) for row in rows]
    references = [list(map(caption_words, row["answers"])) for row in rows]
    values = {f"BLEU-{n}": x for n, x in enumerate(bleu(captions, references), 1)}
    values["ROUGE-L"] = np.mean(list(map(rouge_l, captions, references)))
    mean = np.mean(list(values.values()))
    values |= {"CIDEr": cider(captions, references), "BLEU-ROUGE": mean}
    return {name: 100 * float(value) for name, value in values.items()}


def bare(text: str) -> str:
    return text.strip().rstrip(".").strip().lower()


def squeeze(text: str) -> str:
    return text.lower().replace(" ", "").replace(".", "")


# metric of a stage -> the rule that scores a text against one gold answer; the best gold counts
RULES = {
    # GQA and OCRVQA of CoIN, streams of your own: equal up to case, outer spaces, final periods
    "exact": lambda text, gold: bare(text) == bare(gold),
    # UCIT, TriGap, VizWiz and VQAv2 of CoIN: equal up to case and outer spaces
    "same": lambda text, gold: text.strip().upper() == gold.strip().upper(),
    "letter": letter_match,
    "option": option_match,
    # CoIN's ImageNet: one is part of the other. Its code counts an empty text as right, we do not
    "contains": lambda text, gold: text.strip() != "" and (gold in text or text in gold),
    "iou": box_match,
    "anls": anls,
    "word-in": word_in,
    # DCL's Med: the text contains the gold answer, be it in a word ("no" in "nodule")
    "gold-in": lambda text, gold: gold.lower() in text.lower(),
    "sci": sci_match,
    # DCL's Fin: equal without case, spaces and periods
    "fin": lambda text, gold: squeeze(text) == gold.lower(),
    "ocr": ocr_match,
    "math": math_match,
    # ACL's VP, CV-Bench's rule: the text contains the gold answer, without case and spaces
    "count": lambda text, gold: gold.lower().replace(" ", "") in squeeze(text),
}
ALL_GOLDS = {  # the same for rules that need all gold answers together
    "vqa": vqa_accuracy,
    # CoIN's TextVQA: as VQA, but every gold answer is normalized as well
    "textvqa": lambda text, golds: vqa_accuracy(text, [normalize_vqa(gold) for gold in golds]),
    "unscored": lambda text, golds: math.nan,  # golds that no rule of ours can use
    # one caption alone: its ROUGE-L; the score of a test set is `accuracy`
    "caption": lambda text, golds: rouge_l(caption_words(text), list(map(caption_words, golds))),
}


def score(metric: str, text: str, answers, row: dict | None = None) -> float:
    """Score of a text in 0..1 by the metric of its stage, a name in RULES or ALL_GOLDS.

    row: see `evaluate`; "sci", "ocr" and "math" need it, as their rule depends on the sample.
    """
    if metric in ALL_GOLDS:
        return ALL_GOLDS[metric](text, answers)
    if metric not in RULES:
        raise InputError(f"unknown metric {metric!r}: choose {', '.join(RULES | ALL_GOLDS)}")
    extra = {"row": row} if metric in ("sci", "ocr", "math") else {}
    return max(float(RULES[metric](text, gold, **extra)) for gold in answers)
