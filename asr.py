"""Attention-Spectrum Regularization (ASR): a LLaVA learns stage after stage, without replay.

Paper: "Attention-Spectrum Regularization for Replay-Free Continual Multimodal LLMs", arXiv
2606.23063. A reference script: read it from top to bottom, copy it, edit it.

The idea. A LLaVA that learns one kind of question after another forgets the earlier kinds. ASR
watches HOW the words of a question look at the image: every attention head gives a map over the
image patches, and the power spectrum of that map (coarse or fine? in which direction?) tells what
kind of looking it is, wherever in the image it happens. After each stage the spectra of every skill
are summed up as a mean and a variance, its prototype: some hundred numbers, no image, question or
answer. While later stages are learned, one loss pulls the spectra of new samples to the prototypes
of their skills. A second loss keeps the similarities of images and questions as they were at first.

    Eq. 5       skill posterior pi(q)                   skill_posterior
    Eq. 6       attention map of the functional words   functional_rows, token_average
    Eqs. 7-14   spectrum, descriptor phi                bin_table, head_spectra, descriptor
    Eqs. 15-20  prototypes (mu, var, d) of the skills   update_prototypes, prototype_variance
    Eqs. 21-26  L_spec                                  spectral_loss
    Eqs. 27-28  L_geo                                   embeddings, geometry_loss
    Eq. 29      L_task + beta L_spec + gamma L_geo      backward

    python asr.py --stream vqacl                        mini stream, tiny LLaVA: laptop, minutes
    python asr.py --stream vqacl --beta 0 --gamma 0 --out runs/seq      sequential LoRA, bit for bit
    python asr.py --stream vqacl --data DIR --model llava-hf/llava-1.5-7b-hf     the paper, one GPU
    python asr.py --plot RUN [RUN ...]                  the paper's figures from saved runs

Letters: B batch, N samples of a stage, L captured layers, H heads, J = L H, T question tokens,
P = h w image patches, K radial and M angular bins, S skills, D size of phi; t stage, s skill.

Where we differ from the paper (P) or its public code (C), and why:
 1. (C) The map of each token is normalized before the mean over tokens, as Eq. 6 says. The code
    averages first, so that tokens which look at the image more dominate.
 2. (P, C) DC is left out of d and of the peak: it is the largest power of EVERY non-negative map,
    so that the published rho* and theta* are always 0. r keeps it, in its first bin.
 3. (P, C) The peak's angle enters as cos 2 theta*, sin 2 theta*: theta and theta + pi are one wave.
 4. (P, C) Angular bins cover [0, pi), not [-pi, pi): the spectrum of a real map is point-symmetric,
    the second half repeats the first. They are shifted by half a bin, and the table is made in
    float64: 28 of the 64 frequencies of an 8 x 8 grid lie on published edges, where rounding rules.
 5. (P, C) No anisotropy a = d / mean(d): it is M d exactly, 16 of the 54 numbers twice.
 6. (P, C) The weight w is detached: x exp(-x) falls beyond x = 1, so the published weight pushes a
    map that is farther than that AWAY from its prototype.
 7. (P, C) The variance floor is relative to the spread of its dimension: the published 1e-4 covers
    nearly all dimensions of a small stage.
 8. (C) The posterior is not rescaled over the skills that have a prototype, and the mean is over
    all samples of the micro-batch: else a sample of a NEW skill is pulled to some old one with full
    weight.
 9. (P) D2 is divided by D, as in the code: without, w = exp(-D2) is 1e-13 and less.
10. (P) The embeddings of L_geo are open for a LLaVA: ours are the means of the last hidden states
    over image tokens and over question tokens; the reference is the same model, its LoRA off.
11. (P, C) Functional words: the paper gives no list, the code 29 words; ours is in section 2.
12. (C) One optimizer and one cosine per stage. VQACL's release makes new ones per object group.
13. (C) Answers are generated as text; the code classifies over a list of frequent answers.
14. (C) With accumulation the task loss is the mean over the answer tokens of the whole step,
    however it is cut. L_geo compares the samples of ONE micro-batch and is zero for a single one.
15. (P) The parser of Eq. 5 is not described: --skills parser takes frozen input embeddings and a
    centroid per kind of question, one more vector of the model's width that is kept per skill.
16. (P, C) The rate rises over the first steps of every stage, as each has a fresh AdamW.
17. (C) --hold_out trains the group that is left out in no stage; VQACL's code does in the first.
2-5 and 7 go back with --descriptor paper, 6 with --weight published, 8 with --renormalize.
"""

import argparse
import contextlib
import functools
import math
import os
import re
import textwrap
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import eval as evaluation
from data import (
    Collator,
    InputError,
    add_common_flags,
    fail,
    load_image,
    load_stream,
    pad_square,
    resolve_defaults,
    schedule,
    show_sample,
    train_order,
)

# --------------------------------------------------------------------------------------------------
# 1. Flags
# --------------------------------------------------------------------------------------------------


# fmt: off
def parse(argv=None):
    """All flags; InputError if one of this script's own makes no sense."""
    parser = argparse.ArgumentParser("asr.py", description=__doc__.split("\n")[0])
    add_common_flags(parser)
    add = parser.add_argument_group("ASR (the paper's defaults where not ours)").add_argument
    add("--beta", type=float, default=0.5,
        help="weight of L_spec, from the second stage on, Eq. 29 (default: 0.5)")
    add("--gamma", type=float, default=0.05,
        help="weight of L_geo, Eq. 29; it compares the samples of ONE micro-batch, so --accumulate "
             "changes it (default: 0.05)")
    add("--lambda_ang", type=float, default=0.1, metavar="LAMBDA",
        help="weight of the angular profile in L_spec, Eq. 23 (default: 0.1)")
    add("--tau", type=float, default=1.0,
        help="of the weight w = exp(-min_s D2_s / tau), Eq. 24; inf: w = 1 (default: 1)")
    add("--weight", default="detached", choices=["detached", "published"],
        help="w as a constant, or with its gradient as published (default: detached, ours)")
    add("--skills", default="parser", choices=["stream", "parser", "shared"],
        help="Eq. 5, skills are: the data's kinds of questions, known; those kinds, guessed from "
             "frozen question embeddings; a fixed list of generic ones, by question words "
             "(default: parser, best in our search)")
    add("--posterior", default="soft", choices=["soft", "hard"],
        help="pi as it is, or one-hot, Eq. 5 (default: soft)")
    add("--parser_temperature", type=float, default=0.05, metavar="X",
        help="of the softmax over cosines of --skills parser (default: 0.05, ours)")
    add("--renormalize", action="store_true",
        help="rescale pi over skills with a prototype, as the public code (default: off, ours)")
    add("--descriptor", default="clean", choices=["clean", "paper"],
        help="phi of Eqs. 7-14, corrected or as published (default: clean, ours)")
    add("--spectrum", default="full", choices=["full", "raw", "radial", "angular"],
        help="phi is: all; the map without Fourier transform; r only; d only (default: full)")
    add("--prototypes", default="gaussian", choices=["gaussian", "mean", "task", "global"],
        help="Eqs. 15-20: mean and variance per skill; mean per skill; one per stage, pulling from "
             "all earlier ones; one for everything; the last two need no --skills (default: "
             "gaussian)")
    add("--tau_skill", type=float, default=0.2, metavar="TAU_S",
        help="samples with pi_s above it make the prototype of s, Eq. 15 (default: 0.2)")
    add("--ema", type=float, default=0.9, metavar="ALPHA",
        help="share of the old prototype when a skill returns, Eq. 20 (default: 0.9)")
    add("--layers", type=int, default=4, metavar="L",
        help="last decoder layers whose attention is captured (default: 4)")
    add("--bins", type=int, default=8, metavar="K",
        help="radial and angular bins, K = M (default: 8)")
    add = parser.add_argument_group("evaluation and checkpoints").add_argument
    add("--eval_batch_size", type=int, default=32, metavar="B",
        help="questions answered at once (default: 32)")
    add("--save_every", type=int, default=100, metavar="N",
        help="checkpoint every N steps inside a stage too; 0: after stages only (default: 100)")
    args = parser.parse_args(argv)
    for name in ("beta", "gamma", "lambda_ang", "tau_skill", "ema", "save_every"):
        if not 0 <= getattr(args, name) < math.inf:
            raise InputError(f"--{name} {getattr(args, name)} must be zero or more")
    above_zero = "tau parser_temperature layers bins eval_batch_size"
    for name in above_zero.split():
        if not getattr(args, name) > 0:
            raise InputError(f"--{name} {getattr(args, name)} must be above zero")
    if max(args.ema, args.tau_skill) >= 1:
        raise InputError(f"--ema {args.ema} and --tau_skill {args.tau_skill} must be below 1")
    return args
# fmt: on


# Wrong flags and missing files are reported before the seconds that importing torch takes.
if __name__ == "__main__":
    try:
        args = parse()
        if not args.plot:
            stream = load_stream(resolve_defaults(args))
            run = evaluation.start_run(args, __file__)
    except InputError as error:
        fail(error)

import torch  # noqa: E402
from torch.nn.functional import normalize as unit  # noqa: E402
from torch.nn.functional import one_hot  # noqa: E402

from model import (  # noqa: E402
    add_lora,
    add_up_gradients,
    capture_attention,
    forward,
    gather,
    generate,
    image_features,
    image_grid,
    image_tokens,
    load_checkpoint,
    load_lora_state,
    lora_off,
    lora_state,
    parameter_report,
    peak_memory,
    processes,
    random_state,
    save_checkpoint,
    save_lora,
    set_random_state,
    set_up,
    share_out,
    to_device,
)

# --------------------------------------------------------------------------------------------------
# 2. The quantity: attention map -> spectrum -> descriptor (Sec. 4.1, App. A, Eqs. 6-14)
# --------------------------------------------------------------------------------------------------

EPS = 1e-8

# The "functional tokens" U(q): wh-words, relation words, verbs, numerals, and head nouns (below).
FUNCTIONAL = frozenset("""
    what which who whose whom where when why how
    left right top bottom above below over under on in at behind front beside next near between
    inside outside with from of than
    is are was were do does did has have had can could will would should may see hold wear show give
    name count find read solve describe call called written shown made used
    zero one two three four five six seven eight nine ten many much
""".split())  # fmt: skip


def question_core(question):
    """The question without what may follow it: up to the first "?", else its first line."""
    head, mark, _ = question.partition("?")
    return head + mark if mark else question.split("\n")[0]


def functional_spans(question):
    """U(q) as spans of characters [(start, end)]: the listed words, numbers, any -ing, and as head
    nouns the word after what / which / many / much and the last word (a guess, needs no tagger).
    """
    words, spans, before = list(re.finditer(r"\w+", question_core(question))), [], ""
    for match in words:
        word = match.group().lower()
        listed = word in FUNCTIONAL or word.isdigit() or (word.endswith("ing") and len(word) > 4)
        if listed or before in ("what", "which", "many", "much") or match is words[-1]:
            spans.append(match.span())
        before = word
    return spans


def functional_rows(batch, samples):
    """Where U(q) is in a padded batch: [B, S] bool. Every question token where U(q) is empty."""
    rows = torch.zeros(batch["question_mask"].shape, dtype=torch.bool)
    for row, sample, offsets in zip(rows, samples, batch["question_offsets"], strict=True):
        spans = functional_spans(sample.question)
        for position, start, end in offsets:
            row[position] = any(start < stop and end > begin for begin, stop in spans)
    rows = rows.to(batch["question_mask"].device)
    return torch.where(rows.any(1, keepdim=True), rows, batch["question_mask"])


@functools.lru_cache(maxsize=32)
def bin_table(h, w, kind="clean", K=8, M=8, wrapped=True, device="cpu"):
    """The frequencies of an h x w grid, row-major, DC first, and their bins (Eqs. 8-10).

    -> rho [P], theta [P], radial [P, K] and angular [P, M] one-hot, cos and sin 2 theta [P].
    float32, but computed in float64 and only once: many frequencies lie exactly on a bin edge.
    wrapped=False: frequencies u / h, v / w as the paper prints them.
    """
    fy = np.fft.fftfreq(h) if wrapped else np.arange(h) / h  # cycles per patch
    fx = np.fft.fftfreq(w) if wrapped else np.arange(w) / w
    fy, fx = (f.ravel() for f in np.meshgrid(fy, fx, indexing="ij"))
    rho = np.sqrt(fy**2 + fx**2)
    rho = rho / rho.max()
    theta = np.arctan2(fx, fy)  # column frequency first: 0 is a wave that runs down the rows
    cos, sin = np.cos(2 * theta), np.sin(2 * theta)
    if kind == "paper":  # bins (low, high] of [0, 1] and [-pi, pi)
        radial = np.searchsorted(np.linspace(0, 1 + EPS, K + 1), rho) - 1
        angular = np.searchsorted(np.linspace(-np.pi, np.pi + EPS, M + 1), theta) - 1
        radial, angular = np.eye(K)[radial.clip(0, K - 1)], np.eye(M)[angular.clip(0, M - 1)]
    else:  # angular bins are centered on multiples of pi / M
        radial = np.eye(K)[np.floor(K * rho + 1e-9).astype(int).clip(0, K - 1)]
        angular = np.eye(M)[np.floor(theta % np.pi * M / np.pi + 0.5).astype(int) % M]
        angular[0] = 0  # DC has no direction
        # At the Nyquist frequency f = -1/2 and +1/2 are one wave, so theta and -theta are, too.
        sin[np.isclose(fy, -0.5) | np.isclose(fx, -0.5)] = 0
    table = (rho, theta, radial, angular, cos, sin)
    return tuple(torch.tensor(x, dtype=torch.float32, device=device) for x in table)


def normalize(x):
    """x / sum(x) over the last axis; zero where all is zero."""
    return x / x.sum(-1, keepdim=True).clamp(min=EPS)


def token_average(maps, weights=None, average_first=False):
    """Eq. 6: each token's map is made to sum to one, then the mean over U(q).

    maps [B, L, H, T, h, w] (negative numbers count as 0), weights [B, T] >= 0 (all equal if None or
    zero) -> [B, J, h, w] that sum to one, in float32 whatever came in (a CPU has no FFT in bf16).
    average_first: the order of the public code, mean over tokens first.
    """
    maps = maps.float().clamp(min=0)
    B, L, H, T, h, w = maps.shape
    weights = maps.new_ones(B, T) if weights is None else weights.to(maps)
    weights = normalize(torch.where(weights.sum(1, keepdim=True) > 0, weights, 1.0))
    maps = maps.flatten(4)  # [B, L, H, T, P]
    maps = maps if average_first else normalize(maps)
    maps = torch.einsum("blhtp,bt->blhp", maps, weights)
    return normalize(maps).reshape(B, L * H, h, w)


def head_spectra(maps, kind="clean", K=8, M=8, bins=None):
    """Eqs. 7-13: the numbers of every head, and the radial and angular spectra among them.

    maps [B, J, h, w] that sum to one -> per head [B, J, D0], r [B, J, K], d [B, J, M].
    paper: r, d, a = d / mean(d), rho*, theta*, p*; DC included:         D0 = K + 2 M + 3 = 27
    clean: r, d, rho*, cos 2 theta*, sin 2 theta*, p*; DC only in r:    D0 = K + M + 4 = 20
    """
    bins = bins or bin_table(*maps.shape[-2:], kind, K, M, device=str(maps.device))
    rho, theta, in_radial, in_angular, cos, sin = bins
    spectrum = torch.fft.fft2(maps, norm="ortho")
    power = normalize((spectrum.real**2 + spectrum.imag**2).flatten(2))  # [B, J, P], Eq. 7
    r = normalize(power @ in_radial)  # Eq. 9
    if kind == "clean":
        power = normalize(torch.cat([torch.zeros_like(power[..., :1]), power[..., 1:]], -1))
    d = normalize(power @ in_angular)  # Eq. 10
    top, peak = power.max(-1)  # p* has a gradient, the place of the peak has none
    if kind == "clean":
        numbers = [r, d, torch.stack([rho[peak], cos[peak], sin[peak], top], -1)]
    else:
        a = d / d.mean(-1, keepdim=True).clamp(min=EPS)  # Eq. 11
        numbers = [r, d, a, torch.stack([rho[peak], theta[peak], top], -1)]
    return torch.cat(numbers, -1), r, d


def descriptor(maps, weights=None, kind="clean", spectrum="full", K=8, M=8, bins=None, **order):
    """Eq. 14: mean and population variance over the heads.

    maps [B, L, H, T, h, w], weights [B, T] -> phi [B, D = 2 D0], angular [B, M], radial [B, K].
    spectrum: "full"; "radial" or "angular", r or d alone; "raw", the maps themselves.
    """
    maps = token_average(maps, weights, **order)
    numbers, r, d = head_spectra(maps, kind, K, M, bins)
    x = {"full": numbers, "radial": r, "angular": d, "raw": maps.flatten(2)}[spectrum]
    phi = torch.cat([x.mean(1), x.var(1, correction=0)], -1)
    return phi, normalize(d.mean(1)), normalize(r.mean(1))


# --------------------------------------------------------------------------------------------------
# 3. The memory: skill posterior (Eq. 5) and prototypes (Eqs. 15-20)
# --------------------------------------------------------------------------------------------------

# The list of --skills shared: a question has every skill whose words it uses. In order of priority.
SHARED = {
    "count": r"how many|number of|\bcount|\bthere (\d|one|two|three|four|five|six)\b",
    "color": r"colou?r|\b(red|orange|yellow|green|blue|purple|pink|brown|black|white|gr[ae]y)\b",
    "read": r"\b(written|words?|read|says?|text|letters?|signs?|brand|title)\b",
    "act": r"\b(doing|action|activity|playing|holding|wearing|happening)\b",
    "reason": r"\b(why|purpose|used for|cause|because|can you|would you)\b",
    "locate": r"\b(where|left|right|top|bottom|above|below|behind|corner|side|room)\b",
    "compare": r"\b(same|different|more|less|fewer|larger|smaller|bigger|than|most|least)\b",
    "judge": r"^(is|are|was|were|do|does|did|has|have|can|could|will|would|should)\b",
    "recognize": r"what (is|are|kind|type|sort)|\bwhich\b|\bwho\b|describe|\bname\b",
}


def skill_names(args, stream):
    """The S skills of a run, in order."""
    if args.prototypes == "global":
        return ["everything"]
    if args.prototypes == "task":
        return [stage.name for stage in stream.stages]
    if args.skills == "shared":
        return list(SHARED)
    return list(dict.fromkeys(sample.skill for stage in stream.stages for sample in stage.train))


def skill_posterior(samples, t, args, skills, parser=None, questions=None, learned=False):
    """Eq. 5: pi [N, S] for samples of stage t; zero for a sample without an image.

    stream: 0.95 for the sample's own skill, the rest spread evenly (hard: 1 and 0).
    parser: softmax over the skills met so far of cos(question, centroid) / temperature.
    shared: even over the skills whose words occur (hard: the first of them).
    One prototype per stage: a stage being learned has none yet, so pi is even over the earlier
    ones; `learned` gives the pi that its own prototype is made from.
    """
    N, S, soft = len(samples), len(skills), args.posterior == "soft"
    if args.prototypes == "global":
        pi = torch.ones(N, 1)
    elif args.prototypes == "task":
        own, old = torch.arange(S) == t, torch.arange(S) < t
        pi = (own if learned else old / max(t, 1)).float().repeat(N, 1)
    elif args.skills == "shared":
        cores = [question_core(sample.question).lower() for sample in samples]
        found = [[bool(re.search(words, core)) for words in SHARED.values()] for core in cores]
        pi = torch.tensor(found).float()
        pi[pi.sum(1) == 0, skills.index("recognize")] = 1
        pi = normalize(pi) if soft else one_hot(pi.argmax(1), S).float()
    elif args.skills == "parser":
        logits = unit(questions) @ unit(parser["centroid"]).T / args.parser_temperature
        pi = logits.masked_fill(parser["count"] == 0, -math.inf).softmax(1)
        pi = pi if soft else one_hot(pi.argmax(1), S).float()
    else:
        pi = one_hot(torch.tensor([skills.index(sample.skill) for sample in samples]), S).float()
        if soft and S > 1:
            pi = 0.95 * pi + 0.05 / (S - 1) * (1 - pi)
    return pi * torch.tensor([[sample.image is not None] for sample in samples])


def question_embeddings(model, processor, samples):
    """Mean of the frozen input embeddings of each question's tokens: [N, width] float32, CPU."""
    table = model.get_input_embeddings().weight.detach().cpu()
    cores = [question_core(sample.question) for sample in samples]
    ids = processor.tokenizer(cores, add_special_tokens=False)["input_ids"]
    return torch.stack([table[torch.tensor(row)].float().mean(0) for row in ids])


def update_centroids(parser, questions, samples, skills):
    """Take questions [N, width] into their skills' running means, parser["centroid"] [S, width]."""
    for s, skill in enumerate(skills):
        own = questions[[sample.skill == skill for sample in samples]]
        parser["count"][s] += len(own)
        if len(own):
            step = len(own) / parser["count"][s]
            parser["centroid"][s] += step * (own.mean(0) - parser["centroid"][s])


def new_prototypes(S, D, M):
    """An empty memory, 2 D + M + 1 floats per skill. With --skills parser a centroid is kept, too:
    nothing else is known of the past."""
    return {
        "mean": torch.zeros(S, D),
        "var": torch.ones(S, D),
        "angular": torch.full((S, M), 1 / M),
        "count": torch.zeros(S),
    }


def update_prototypes(memory, phi, angular, pi, tau_skill=0.2, ema=0.9, floor=1e-4):
    """Eqs. 15-20 after a stage: phi [N, D], angular [N, M] and pi [N, S] change `memory` in place.

    The samples with pi_s > tau_skill give skill s a mean, an unbiased variance (at least `floor`)
    and a mean angular profile: as they are the first time, later a share 1 - ema of them.
    """
    for s in range(pi.shape[1]):
        own = pi[:, s] > tau_skill
        if not own.any():
            continue
        var = phi[own].var(0, correction=1) if own.sum() > 1 else torch.zeros_like(phi[0])
        new = {"mean": phi[own].mean(0), "var": var.clamp(min=floor)}
        new["angular"] = normalize(angular[own].mean(0))
        keep = ema if memory["count"][s] > 0 else 0.0
        for name, value in new.items():
            memory[name][s] = keep * memory[name][s] + (1 - keep) * value
        memory["count"][s] += own.sum()


def prototype_variance(memory, kind="clean", shape="gaussian"):
    """The variances [S, D] that distances are measured in.

    paper: at least 1e-4. clean: at least a tenth of the spread that the dimension has within and
    between skills, so that none counts for being constant by chance. shape "mean": one number for
    all, which makes the distance Euclidean.
    """
    var, seen = memory["var"], memory["count"] > 0
    if shape == "mean":
        return var[seen].mean().clamp(min=1e-6).expand_as(var)
    if kind == "paper":
        return var.clamp(min=1e-4)
    spread = var[seen].mean(0) + memory["mean"][seen].var(0, correction=0)
    return torch.maximum(var, 0.1 * spread + 1e-7)


# --------------------------------------------------------------------------------------------------
# 4. The losses (Eqs. 21-29)
# --------------------------------------------------------------------------------------------------


def symmetric_kl(p, q):
    """0.5 KL(p | q) + 0.5 KL(q | p) over the last axis of non-negative vectors of any sum."""
    p, q = normalize(p.clamp(min=EPS)), normalize(q.clamp(min=EPS))
    return 0.5 * ((p - q) * (p.log() - q.log())).sum(-1)


# fmt: off
def spectral_loss(phi, angular, pi, memory, lambda_ang=0.1, tau=1.0, weight="detached",
                  kind="clean", shape="gaussian", renormalize=False):
    # fmt: on
    """Eqs. 21-26: the distance of samples to the prototypes of their skills.

        L_spec = mean_b w_b ( sum_s pi_bs D2_bs + lambda_ang sum_s pi_bs symKL(d_b, d_s) )
        D2_bs  = sum_i (phi_bi - mu_si)^2 / var_si / D             w_b = exp(-min_s D2_bs / tau)

    phi [B, D], angular [B, M], pi [B, S] -> L_spec, D2 [B, S], w [B]. Skills without a prototype
    add nothing and do not enter the minimum; at least one skill must have one. renormalize: as the
    public code, pi rescaled over skills with a prototype, mean over the samples with any pi left.
    """
    seen = memory["count"] > 0
    D2 = (phi[:, None] - memory["mean"]) ** 2 / prototype_variance(memory, kind, shape)
    D2 = D2.mean(-1)  # [B, S]
    KL = symmetric_kl(angular[:, None], memory["angular"])  # [B, S]
    w = torch.exp(-D2[:, seen].amin(1) / tau)  # Eq. 24; tau = inf: the fixed weight 1
    w = w.detach() if weight == "detached" else w
    pi, count = pi * seen, len(phi)
    if renormalize:
        count = (pi.sum(1) > 0).sum().clamp(min=1)
        pi = normalize(pi)
    loss = (w * (pi * (D2 + lambda_ang * KL)).sum(1)).sum() / count
    return loss, D2.detach(), w.detach()


def embeddings(output, batch):
    """Mean of the last hidden states over image tokens and over question tokens: two [B, width]."""
    hidden = output.hidden_states[-1].float()  # [B, S, width]
    masks = [batch[name][:, :, None] for name in ("image_mask", "question_mask")]
    return [(hidden * mask).sum(1) / mask.sum(1).clamp(min=1) for mask in masks]


def geometry_loss(image, text, image_0, text_0):
    """Eqs. 27-28: how the images of a micro-batch relate to its questions must stay as it was.

    Four [B, width], the last two from the pretrained model -> scalar; 0 if B = 1.
    """
    now = (unit(image) @ unit(text).T).softmax(-1)  # [B, B], over questions for each image
    before = (unit(image_0) @ unit(text_0).T).softmax(-1)
    return symmetric_kl(now, before).mean()


# --------------------------------------------------------------------------------------------------
# 5. One micro-batch, and the two passes over a whole stage
# --------------------------------------------------------------------------------------------------


def as_maps(attention, grid):
    """[B, L, H, T, P] -> [B, L, H, T, h, w]; a batch without any image (P = 0) gets empty maps."""
    if attention.shape[-1] == 0:
        attention = attention.new_zeros(*attention.shape[:-1], grid[0] * grid[1])
    return attention.unflatten(-1, grid)


def look(captured, grid, args):
    """What capture_attention has caught -> phi [B, D], angular [B, M], radial [B, K]."""
    attention, rows = captured
    maps = as_maps(attention, grid)
    return descriptor(maps, rows, args.descriptor, args.spectrum, args.bins, args.bins)


# fmt: off
def backward(model, batch, features, samples, share, args, grid,
             beta=0.0, pi=None, memory=None, gamma=0.0, reference=None):
    # fmt: on
    """Forward, Eq. 29 and backward for one micro-batch; returns the values for the log.

    share: what part of the step's answer tokens, and of its samples, this micro-batch holds.
    beta = 0 captures nothing and gamma = 0 compares nothing: then this is plain LoRA training.
    """
    values = dict.fromkeys(("spectral", "distance", "weight", "geometry"), torch.zeros(()))
    capture = contextlib.nullcontext()
    if beta:
        rows = functional_rows(batch, samples)
        capture = capture_attention(model, args.layers, rows, batch["image_mask"])
    with capture as captured:
        output = forward(model, batch, features)
        loss = values["task"] = output.loss * share[0]
        if beta:
            phi, angular, _ = look(captured(), grid, args)
            lambda_ang = args.lambda_ang if args.spectrum in ("full", "angular") else 0.0
            spectral, D2, w = spectral_loss(
                phi, angular, pi, memory, lambda_ang, args.tau, args.weight, args.descriptor,
                args.prototypes, args.renormalize,
            )  # fmt: skip
            values["spectral"], values["weight"] = spectral * share[1], w.mean() * share[1]
            nearest = D2[:, memory["count"] > 0].amin(1)
            values["distance"] = nearest.mean() * share[1]
            loss = loss + beta * values["spectral"]
        if gamma:
            values["geometry"] = geometry_loss(*embeddings(output, batch), *reference) * share[1]
            loss = loss + gamma * values["geometry"]
        loss.backward()  # inside the block: gradient checkpointing runs the captured layers again
    return {name: value.detach() for name, value in values.items()} | {"loss": loss.detach()}


@torch.no_grad()
def reference_embeddings(model, samples, parts, collate):
    """L_geo's two vectors of each sample from the pretrained model: [N, 2, width] on the CPU."""

    def look_at(part):
        batch, features = collate([samples[k] for k in part])
        output = forward(model, batch, features)
        return torch.stack(embeddings(output, batch), 1).cpu()

    with lora_off(model):
        return torch.cat(share_out(look_at, parts))


@torch.no_grad()
def stage_descriptors(model, samples, parts, collate, args, grid):
    """phi [N, D] and angular [N, M] of a stage's training samples under the present model, CPU."""

    def look_at(part):
        own = [samples[k] for k in part]
        batch, features = collate(own)
        U = functional_rows(batch, own)
        with capture_attention(model, args.layers, U, batch["image_mask"]) as captured:
            forward(model, batch, features)
            return [x.cpu() for x in look(captured(), grid, args)[:2]]

    return [torch.cat(column) for column in zip(*share_out(look_at, parts), strict=True)]


# --------------------------------------------------------------------------------------------------
# 6. Evaluation: the answers, and the spectra of the prompts that they come from
# --------------------------------------------------------------------------------------------------

CASES, SIDE = 3, 112  # for figure 9: test questions per stage whose map is kept, image in pixels


def evaluate_stage(model, processor, cache, collator, stage, args, grid, title):
    """Rows of eval.evaluate and, in their order, how the questions looked at the images:
    {phi [N, D], angular [N, M], radial [N, K], map [CASES, h, w]}; nan without an image."""
    place, found = {id(sample): k for k, sample in enumerate(stage.test)}, {}

    def answer(samples):
        batch = to_device(collator(samples, train=False), model.device)
        U = functional_rows(batch, samples)
        with capture_attention(model, args.layers, U, batch["image_mask"]) as captured:
            features = image_features(cache, samples)
            texts = generate(model, processor, batch, features, args.max_new_tokens)
            attention, rows = captured()
        phi, angular, radial = look((attention, rows), grid, args)
        mean = token_average(as_maps(attention, grid), rows).mean(1)  # over heads: [B, h, w]
        values = {"phi": phi, "angular": angular, "radial": radial, "map": mean}
        values = {name: value.cpu().numpy() for name, value in values.items()}
        for b, sample in enumerate(samples):
            known = np.float32(1 if sample.image is not None else np.nan)
            found[place[id(sample)]] = {name: value[b] * known for name, value in values.items()}
        return texts

    rows = evaluation.evaluate(answer, stage.test, stage.metric, args.eval_batch_size, title)
    found = {k: values for part in gather(found) for k, values in part.items()}
    seen = {name: np.stack([found[k][name] for k in range(len(rows))]) for name in found[0]}
    return rows, seen | {"map": seen["map"][:CASES]}


def thumbnails(stage):
    """The images of a stage's first test questions, for figure 9: [CASES, 112, 112, 3] uint8."""
    images = [s.image and pad_square(load_image(s.image), (127,) * 3) for s in stage.test[:CASES]]
    blank = np.full((SIDE, SIDE, 3), 255, np.uint8)
    return np.stack([np.array(i.resize((SIDE, SIDE))) if i else blank for i in images])


# --------------------------------------------------------------------------------------------------
# 7. The run
# --------------------------------------------------------------------------------------------------

ADAPTER = "continual"  # the one LoRA adapter that goes through all stages


def main(args, stream, run):
    """Train on every stage in turn, test on all stages seen so far, write the run folder."""
    clock, seconds = time.perf_counter(), {}

    def lap(part):
        """Book the time since the last lap on a part of the run."""
        nonlocal clock
        now = time.perf_counter()
        seconds[part] = seconds.get(part, 0.0) + now - clock
        clock = now

    # ---- 7.1 The model: a frozen LLaVA with one LoRA adapter ------------------------------------
    model, processor, cache = set_up(args)
    me, world = processes()
    depth, grid = model.config.text_config.num_hidden_layers, image_grid(model)
    if args.layers > depth:
        raise InputError(f"--layers {args.layers}: this language model has {depth}")
    torch.manual_seed(args.seed)
    targets = args.targets.split(",")
    parameters = add_lora(model, ADAPTER, args.rank, args.alpha, args.dropout, targets)
    collator = Collator(processor, image_tokens(model, processor))

    def collate(samples):
        batch = collator(samples, train=True)
        return to_device(batch, model.device), image_features(cache, samples)

    # ---- 7.2 What is about to happen ------------------------------------------------------------
    stages, T = stream.stages, len(stream.stages)
    count, micro = parameter_report(model), args.batch_size // args.accumulate
    sizes = ", ".join(f"{stage.name} {len(stage.train)} + {len(stage.test)}" for stage in stages)
    show_sample(stages[0].train[0], processor)
    print(f"\n{run}: on {model.device} in {model.dtype}, {torch.get_num_threads()} CPU threads")
    print(f"{count['total']:,} parameters, {count['trainable']:,} trained (LoRA on {args.targets})")
    print(f"{T} stages, training + test samples: {sizes}")
    print(f"{args.epochs} epochs in steps of {args.batch_size} samples, micro-batches of {micro}")
    if args.gamma:
        print(f"L_geo compares {micro} samples" + ": it is always zero" * (micro == 1))

    # ---- 7.3 Memory and records, from the checkpoint if there is one ----------------------------
    skills = skill_names(args, stream)
    memory = parser = None  # prototypes; centroids of --skills parser
    matrix, novel, spectra = np.full((T, T), np.nan), np.full((T, T), np.nan), {}
    first, step, unfinished = 0, 0, None  # stage to begin with, steps so far, a stage half done
    if args.resume and (state := load_checkpoint(run)):
        torch.set_num_threads(state["threads"])  # another number would round differently
        load_lora_state(model, ADAPTER, state["lora"])
        set_random_state(state["random"])
        first, step, unfinished = state["stage"], state["step"], state["unfinished"]
        matrix, novel, seconds = state["matrix"].numpy(), state["novel"].numpy(), state["seconds"]
        memory = state["memory"] and to_device(state["memory"], model.device)
        parser = state["parser"]
        if first:
            saved = np.load(run / "spectra.npz")  # keys "t-i-name"; a kill may have left more
            spectra = {key: saved[key] for key in saved if int(key.split("-")[0]) <= first}
        print(f"resumed after {first} stages and {step} steps")
    evaluation.truncate_metrics(run, step)

    def checkpoint(done, unfinished=None):
        state = {"stage": done, "unfinished": unfinished, "step": step, "random": random_state()}
        state |= {"lora": lora_state(model, ADAPTER), "memory": memory, "parser": parser}
        state |= {"matrix": torch.tensor(matrix), "novel": torch.tensor(novel)}
        save_checkpoint(run, state | {"seconds": seconds, "threads": torch.get_num_threads()})

    # ---- 7.4 Stage after stage ------------------------------------------------------------------
    lap("start")
    for t in range(first, T):
        stage, train = stages[t], stages[t].train
        many = args.eval_batch_size  # for the two passes that need no gradient
        in_order = [range(k, min(k + many, len(train))) for k in range(0, len(train), many)]

        # what the losses need to know of this stage's samples
        pi = questions = reference = None
        if args.beta:
            if args.skills == "parser":
                questions = question_embeddings(model, processor, train)
                if parser is None:
                    centroid = torch.zeros(len(skills), questions.shape[1])
                    parser = {"centroid": centroid, "count": torch.zeros(len(skills))}
                if not unfinished:
                    update_centroids(parser, questions, train, skills)
            pi = skill_posterior(train, t, args, skills, parser, questions).to(model.device)
        if args.gamma:
            model.eval()
            reference = reference_embeddings(model, train, in_order, collate)
            lap("reference")

        # a new optimizer, whose learning rate rises to lr and falls to zero within the stage
        optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.01)
        orders = [train_order(stage, args.seed, e, args.epochs) for e in range(args.epochs)]
        size = args.batch_size
        steps = [order[k : k + size] for order in orders for k in range(0, len(order), size)]
        begin = 0
        if unfinished:
            begin = unfinished["steps"]
            optimizer.load_state_dict(unfinished["optimizer"])
            unfinished = None
        has_prototypes = memory is not None and bool(memory["count"].any())
        beta = args.beta if has_prototypes else 0.0  # the first stage has nothing to protect

        model.train()
        title = f"stage {t + 1}/{T} {stage.name}"
        bar = tqdm(range(begin, len(steps)), title, len(steps), initial=begin, disable=None)
        for k in bar:
            lr = args.lr * schedule(k, len(steps), args.warm_up)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            parts = [steps[k][m : m + micro] for m in range(0, len(steps[k]), micro)][me::world]
            batches = [collate([train[i] for i in part]) for part in parts]
            tokens = [int((batch["labels"] != -100).sum()) for batch, _ in batches]
            whole = sum(gather(sum(tokens)))
            values = dict.fromkeys("loss task spectral geometry distance weight".split(), 0.0)
            for part, (batch, features), n in zip(parts, batches, tokens, strict=True):
                share = n / whole, len(part) / len(steps[k])
                samples = [train[i] for i in part]
                own = None if pi is None else pi[part]
                before = reference[part].to(model.device).unbind(1) if args.gamma else None
                more = backward(
                    model, batch, features, samples, share, args, grid,
                    beta, own, memory, args.gamma, before,
                )  # fmt: skip
                values = {name: values[name] + more[name].item() for name in values}
            values = {name: sum(other[name] for other in gather(values)) for name in values}
            add_up_gradients(parameters)
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
            if not math.isfinite(values["loss"] + norm):
                raise InputError(
                    f"{title}, step {k + 1}: loss {values['loss']}, gradient norm {norm}; stopped. "
                    f"The last good checkpoint stays in {run / 'checkpoint'}; try a lower --lr "
                    f"(now {args.lr:g}) with another --out"
                )
            optimizer.step()
            step += 1
            line = {"step": step, "stage": t + 1, "lr": lr, "gradient_norm": norm, **values}
            evaluation.append_metrics(run, line)
            bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
            if args.save_every and (k + 1) % args.save_every == 0:
                lap("train")
                checkpoint(t, {"steps": k + 1, "optimizer": optimizer.state_dict()})
        lap("train")

        # one more look at the training data makes the prototypes; after that it is gone
        model.eval()
        if args.beta:
            phi, angular = stage_descriptors(model, train, in_order, collate, args, grid)
            if memory is None:
                memory = new_prototypes(len(skills), phi.shape[1], angular.shape[1])
                memory = to_device(memory, model.device)
            pi = skill_posterior(train, t, args, skills, parser, questions, learned=True)
            floor = 1e-4 if args.descriptor == "paper" else 0.0  # clean: see prototype_variance
            new = [x.to(model.device) for x in (phi, angular, pi)]
            update_prototypes(memory, *new, args.tau_skill, args.ema, floor)
            lap("prototypes")

        # test on all stages seen so far; with --hold_out also on the object group that was left out
        for tests, scores, kind in ((stages, matrix, ""), (stream.novel or [], novel, "novel-")):
            for i, test in enumerate(tests[: t + 1]):
                title = f"test {kind}{test.name}"
                rows, seen = evaluate_stage(
                    model, processor, cache, collator, test, args, grid, title
                )
                scores[t, i] = evaluation.accuracy(rows, test.metric)
                evaluation.write_predictions(run, t, f"{kind}{i + 1}" if kind else i, rows)
                if not kind:
                    spectra |= {f"{t + 1}-{i + 1}-{name}": x for name, x in seen.items()}
        spectra[f"{t + 1}-{t + 1}-picture"] = thumbnails(stage)
        if not me:
            np.savez(run / "spectra.part.npz", **spectra)
            os.replace(run / "spectra.part.npz", run / "spectra.npz")
        evaluation.write_matrix(run, stages, matrix)
        print(f"after {stage.name}: " + " ".join(f"{a:.1f}" for a in matrix[t, : t + 1]))
        lap("evaluation")
        checkpoint(t + 1)

    # ---- 7.5 The result -------------------------------------------------------------------------
    if me:  # under torchrun the first process has it
        return
    names = [stage.name for stage in stages]
    print("\n" + evaluation.table(matrix, names) + "\n")
    summary = {"peak_memory_mb": peak_memory(), "trainable_parameters": count["trainable"]}
    summary |= {"tower_runs": cache.tower_runs, "skills": skills if args.beta else []}
    r = load_run(run)  # of each skill of earlier stages, from when it was learned to the end
    lives = {s.name: (s.life[s.i], s.life[r.end]) for s in r.old}
    summary["drift"] = {name: [float(drift(*life)), forgotten(*life)]  # nats, points
                        for name, life in lives.items()}  # fmt: skip
    if memory:
        kept = [*memory.values(), *(parser or {}).values()]
        summary["prototype_floats"] = sum(value.numel() for value in kept)
    summary["stored_parameters"] = count["trainable"] + summary.get("prototype_floats", 0)
    if stream.novel:
        print("object group left out of training:\n" + evaluation.table(novel, names) + "\n")
        summary["novel"] = {"matrix": novel, "metrics": evaluation.metrics(novel)}
    save_lora(model, ADAPTER, run / "lora", args.model)
    lap("end")
    summary |= {"seconds": sum(seconds.values()), "seconds_by_part": seconds}
    evaluation.finish_run(run, summary)
    plot([run], run / "figures")
    print("seconds: " + ", ".join(f"{part} {value:.1f}" for part, value in seconds.items()))
    print(f"peak memory {summary['peak_memory_mb']:,.0f} MB; everything is in {run}")


# --------------------------------------------------------------------------------------------------
# 8. Figures from saved records: python asr.py --plot RUN [RUN ...]  (numbered like the paper's)
# --------------------------------------------------------------------------------------------------
# Each (test set, skill) is followed from the stage that taught it to the end. "Forgotten" is its
# accuracy then minus its accuracy later. Figures with room for two runs take the first two.

COMPARED = """stream lr warm_up epochs targets beta gamma lambda_ang tau weight skills posterior
    renormalize parser_temperature descriptor spectrum prototypes tau_skill ema layers
    bins""".split()


# fmt: off
def js_divergence(p, q):
    """Jensen-Shannon divergence (nats) over the last axis of non-negative arrays of any sum."""
    p, q = (np.clip(x, EPS, None) / np.clip(x, EPS, None).sum(-1, keepdims=True) for x in (p, q))
    return ((p * np.log(2 * p / (p + q))).sum(-1) + (q * np.log(2 * q / (p + q))).sum(-1)) / 2


def high_frequency_loss(before, now, rho0=3):
    """The share of power that the radial bins above rho0 have lost: [..., K] -> [...]."""
    return (before - now)[..., rho0 + 1 :].sum(-1)


def load_run(folder):
    """A run: record, rows[t, i] (answers), seen(t, i, name) (spectra), skills and their life."""
    folder, r = Path(folder), argparse.Namespace()
    r.record = evaluation.read_run(folder)
    if r.record["script"] != "asr" or not (folder / "spectra.npz").is_file():
        raise InputError(f"{folder} holds no spectra: these figures need runs of asr.py (with "
                         "--beta 0 --gamma 0 for sequential LoRA)")
    r.args, r.stages = r.record["args"], r.record["stages"]
    saved = dict(np.load(folder / "spectra.npz"))
    r.seen = lambda t, i, name: saved[f"{t + 1}-{i + 1}-{name}"]
    r.matrix = np.array(r.record["matrix"], dtype=float)
    cells = np.argwhere(np.isfinite(r.matrix)).tolist()
    r.rows = {(t, i): evaluation.read_json(evaluation.predictions_file(folder, t, i), lines=True)
              for t, i in cells}
    r.end, r.skills = max(t for t, _ in cells), []
    for i in range(r.end + 1):
        kinds = np.array([row["skill"] for row in r.rows[i, i]])
        for kind in dict.fromkeys(kinds.tolist()):
            mine, life = np.flatnonzero(kinds == kind), {}
            for t in range(i, r.end + 1):
                life[t] = {name: np.nanmean(r.seen(t, i, name)[mine], 0)
                           for name in ("phi", "radial", "angular")}
                life[t]["var"] = np.nanvar(r.seen(t, i, "phi")[mine], 0) + 1e-7
                life[t]["accuracy"] = 100 * np.mean([r.rows[t, i][k]["score"] for k in mine])
            name = r.stages[i] if len(set(kinds)) == 1 else f"{r.stages[i]}: {kind}"
            r.skills.append(argparse.Namespace(name=name, i=i, mine=mine, life=life))
    r.old = [skill for skill in r.skills if skill.i < r.end]
    return r


def name_runs(runs):
    """Label every run by its kind, and by the flags in which runs of that kind differ."""
    kinds = [["sequential LoRA", "geometry only"], ["spectral only", "ASR"]]
    for r in runs:
        r.kind = kinds[r.args["beta"] > 0][r.args["gamma"] > 0]
    for r in runs:
        same = [o.args for o in runs if o.kind == r.kind]
        differing = [key for key in COMPARED if len({str(args[key]) for args in same}) > 1]
        r.label = ", ".join([r.kind, *(f"{key} {r.args[key]}" for key in differing)])


def drift(a, b):
    return js_divergence(a["radial"], b["radial"]) + js_divergence(a["angular"], b["angular"])


def forgotten(a, b):
    return a["accuracy"] - b["accuracy"]


def correlation(x, y):
    """Pearson's and Spearman's correlation as text."""
    if len(x) < 3 or np.std(x) == 0 or np.std(y) == 0:
        return "no correlation defined"
    ranks = [[np.mean(np.flatnonzero(np.sort(v) == one)) for one in v] for v in (x, y)]
    return f"r = {np.corrcoef(x, y)[0, 1]:.2f}, rank r = {np.corrcoef(*ranks)[0, 1]:.2f}"


def style(axis, title, x="", y=""):
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.grid(alpha=0.3)


def figure_2(runs, path):
    """Spectral drift and lost high frequencies per stage; drift against forgetting."""
    runs = runs[:2]
    figure, axes = evaluation.new_figure(len(runs), 2, height=3.2 * len(runs))
    axes = np.atleast_2d(axes)
    lives = [[(s.life[t - 1], s.life[t], s.life[s.i]) for s in r.old
              for t in range(s.i + 1, r.end + 1)] for r in runs]  # before, after, when learned
    colors = [[forgotten(a, b) for a, b, _ in pairs] for pairs in lives]
    low, high = min(map(min, colors)), max(map(max, colors))
    for r, (left, right), pairs, color in zip(runs, axes, lives, colors, strict=True):
        lost = [100 * high_frequency_loss(a["radial"], b["radial"]) for a, b, _ in pairs]
        dots = left.scatter([drift(a, b) for a, b, _ in pairs], lost, s=22, c=color,
                            cmap="cividis", vmin=low, vmax=high)
        figure.colorbar(dots, ax=left, label="forgotten (points)")
        style(left, f"{r.label}\nevery skill, every later stage", "drift in one stage (JSD, nats)",
              "high frequencies lost (% of power)")
        x, y = [drift(a, b) for _, b, a in pairs], [forgotten(a, b) for _, b, a in pairs]
        right.scatter(x, y, s=16, color=evaluation.COLORS[0])
        style(right, f"since it was learned\n{correlation(x, y)}", "drift (JSD, nats)",
              "forgotten (points)")
    for column in axes.T:  # the runs on the same scales
        for set_limit, name in (("set_xlim", "get_xlim"), ("set_ylim", "get_ylim")):
            limits = [getattr(axis, name)() for axis in column]
            for axis in column:
                getattr(axis, set_limit)(np.min(limits), np.max(limits))
                axis.locator_params(axis="x", nbins=5)
    return evaluation.save_figure(figure, path / "fig2-drift.png")


def figure_4(runs, path):
    """Ablation bars (Fig. 4, Table 3): mean and standard deviation over seeds."""
    groups = {}
    for r in runs:
        groups.setdefault(r.label, []).append(r.record["metrics"])
    figure, axes = evaluation.new_figure(1, 2, height=1.2 + 0.4 * len(groups))
    for k, (axis, key) in enumerate(zip(axes, ("AP", "AF"), strict=True)):
        values = [[m[key] for m in members] for members in groups.values()]
        means = [np.mean(v) for v in values]
        errors = [np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in values]
        axis.barh(range(len(groups)), means, xerr=errors, color=evaluation.COLORS[5 - k])
        for y, mean in enumerate(means):
            axis.text(0, y, f" {mean:.1f}", va="center", fontsize=9)
        labels = [f"{textwrap.fill(label, 34)} (n = {len(v)})" for label, v in groups.items()]
        axis.set_yticks(range(len(groups)), [""] * len(groups) if k else labels)
        axis.invert_yaxis()
        axis.set_xlim(0, max(1.0, 1.1 * np.max(np.add(means, errors))))
        style(axis, ("final accuracy", "forgetting")[k], ("AP (%)", "AF (points)")[k])
    return evaluation.save_figure(figure, path / "fig4-ablation.png")


def figure_5(runs, path):
    """Spectra of every old skill: frequency bands and directions, when learned and at the end."""
    M, kind = (runs[0].args[key] for key in ("bins", "descriptor"))
    runs = [r for r in runs if (r.args["bins"], r.args["descriptor"]) == (M, kind)][:2]
    paper = kind == "paper"
    edges = np.linspace(-np.pi, np.pi, M + 1) if paper else (np.arange(M + 1) - 0.5) * np.pi / M
    inside = np.linspace(edges[:-1], edges[1:], 201)[:-1].T % np.pi  # [M, 200] angles in each bin
    eighth = np.round(inside / (np.pi / 4)) % 4  # 0 down the rows, 2 along them, 1 and 3 diagonal
    panels = {f"{name} frequencies": ("radial", np.arange(M) * 3 // M == k)
              for k, name in enumerate(("low", "middle", "high"))}
    panels |= {f"{name} waves": ("angular", np.isin(eighth, which).mean(1))
               for name, which in {"horizontal": 2, "vertical": 0, "diagonal": (1, 3)}.items()}
    names = [skill.name for skill in runs[0].old]
    figure, axes = evaluation.new_figure(2, 3, height=2 + 0.5 * len(names))
    for k, (axis, (title, (kind, share))) in enumerate(zip(axes.flat, panels.items(), strict=True)):
        for j, r in enumerate(runs):
            was, now = ([100 * s.life[t or s.i][kind] @ share for s in r.old] for t in (0, r.end))
            y, color = np.arange(len(names)) + 0.3 * j, evaluation.COLORS[j]
            axis.hlines(y, was, now, color=color)
            axis.plot(was, y, "o", color=color, mfc="white", ms=4, label=f"{r.label}: when learned")
            axis.plot(now, y, "o", color=color, ms=4, label=f"{r.label}: at the end")
        axis.set_yticks(range(len(names)), [""] * len(names) if k % 3 else names)
        axis.invert_yaxis()
        style(axis, title, "share of power (%)")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(runs), fontsize=8)
    return evaluation.save_figure(figure, path / "fig5-skills.png")


def figure_6(runs, path):
    """How far the mean descriptor of every old skill has moved by the end, on its test questions,
    against its forgetting."""
    figure, axis = evaluation.new_figure()
    for k, r in enumerate(runs[:6]):
        pairs = [(s.life[s.i], s.life[r.end]) for s in r.old]
        x = [np.sqrt(np.mean((b["phi"] - a["phi"]) ** 2 / a["var"])) for a, b in pairs]
        y = [forgotten(a, b) for a, b in pairs]
        axis.scatter(x, y, color=evaluation.COLORS[k], marker=evaluation.MARKERS[k],
                     label=f"{r.label}: {correlation(x, y)}")
    style(axis, "Every old skill at the end of the run",
          "its mean descriptor has moved by (standard deviations)", "forgotten (points)")
    axis.legend(fontsize=8)
    return evaluation.save_figure(figure, path / "fig6-prototypes.png")


def figure_7(runs, path):
    """Distance of old test questions to their skill when learned, for right and wrong answers."""
    figure, axes = evaluation.new_figure(len(runs[:2]), 1, height=2.6 * len(runs[:2]))
    for r, axis in zip(runs, np.ravel(axes), strict=False):
        D2, right = [], []
        for s in r.old:
            start, now = s.life[s.i], r.seen(r.end, s.i, "phi")[s.mine]
            D2 += np.log10(np.mean((now - start["phi"]) ** 2 / start["var"], 1)).tolist()
            right += [r.rows[r.end, s.i][k]["score"] >= 0.5 for k in s.mine]
        D2, right = np.array(D2), np.array(right)
        for k, (name, which) in enumerate({"right": right, "wrong": ~right}.items()):
            values = D2[which & np.isfinite(D2)]
            if len(values):
                axis.hist(values, np.linspace(-1.5, 2, 50), density=True, histtype="step",
                          linestyle=("-", "--")[k], linewidth=1.8, color=evaluation.COLORS[k],
                          label=f"{name}: median {10 ** np.median(values):.2f}, n = {len(values)}")
        style(axis, r.label, "log10 of the Mahalanobis distance D2", "density")
        axis.legend(fontsize=9)
    return evaluation.save_figure(figure, path / "fig7-distance.png")


def figure_8(runs, path):
    """What the other stages have cost every task, two methods side by side."""
    return evaluation.plot_interference({r.label: r.matrix for r in runs[:2]}, runs[0].stages,
                                        path / "fig8-interference.png")


def figure_9(runs, path):
    """Cases: image, question, where it looked, the spectrum of that, the answer. Two runs at their
    end, or one run when it had learned the question and at its end."""
    views = [(r, r.end, r.kind) for r in runs[:2]]
    if len(views) == 1:
        views = [(runs[0], None, "when learned"), (runs[0], runs[0].end, "at the end")]
    cases = [(i, c) for s in runs[0].old for i, c in ((s.i, k) for k in s.mine if k < CASES)]

    def scores(case):
        return [r.rows[case[0] if t is None else t, case[0]][case[1]]["score"] for r, t, _ in views]

    # those where one is right and the other wrong come first, and one per stage
    first = {}
    for case in sorted(cases, key=lambda case: (-abs(np.diff(scores(case))[0]), case)):
        first.setdefault(case[0], case)
    cases = list(first.values())[:4]
    figure, axes = evaluation.new_figure(len(cases), 5, height=1.9 * len(cases))
    for row, (i, c) in zip(np.atleast_2d(axes), cases, strict=True):
        picture, extent = runs[0].seen(i, i, "picture")[c], (0, SIDE, SIDE, 0)
        row[0].imshow(picture)
        asked = runs[0].rows[i, i][c]
        question = textwrap.shorten(question_core(asked["prompt"]), 66)
        question = f"{textwrap.fill(question, 22)}\n-> {asked['answers'][0][:20]}"
        row[0].set_title(question, fontsize=8, parse_math=False)  # "$5" is money
        for (r, t, when), shown, power in zip(views, row[1::2], row[2::2], strict=True):
            t = i if t is None else t
            answer, attention = r.rows[t, i][c], r.seen(t, i, "map")[c]
            shown.imshow(picture, extent=extent)
            shown.imshow(attention, cmap="inferno", alpha=0.5, extent=extent)
            mark = "right" if answer["score"] >= 0.5 else "wrong"
            said = f"{when}\n{answer['text'][:16]!a} ({mark})"
            shown.set_title(said, fontsize=8, parse_math=False)
            P = np.abs(np.fft.fft2(attention)) ** 2
            P[0, 0] = np.nan
            power.imshow(np.log10(np.fft.fftshift(P) + 1e-9), cmap="inferno")
            power.set_title("its spectrum\n(log, no DC)", fontsize=8)
    for axis in np.ravel(axes):
        axis.set_axis_off()
    return evaluation.save_figure(figure, path / "fig9-cases.png")


def plot(folders, path=None):
    """Draw all figures of these runs into a folder (default: figures/ of the first run)."""
    runs = [load_run(folder) for folder in folders]
    path = Path(path or Path(folders[0]) / "figures")
    asked = [[[row["question_id"] for row in r.rows[i, i]] for i in range(r.end + 1)] for r in runs]
    for folder, r, questions in zip(folders, runs, asked, strict=True):
        if r.stages != runs[0].stages or questions != asked[0]:
            raise InputError(f"--plot: {folder} went through other stages, or was tested on other "
                             f"questions, than {folders[0]}: compare runs of one stream and order")
    name_runs(runs)
    figures = [figure_2, figure_4, figure_5, figure_6, figure_7, figure_8, figure_9]
    for draw in figures if runs[0].end else [figure_4]:  # after one stage nothing can have drifted
        draw(runs, path)
    evaluation.plot_matrix(runs[0].matrix, runs[0].stages, path / "matrix.png", runs[0].label)
    curves = {r.label: [o.matrix for o in runs if o.label == r.label] for r in runs}
    evaluation.plot_accuracy(curves, path / "accuracy.png")
    print(f"figures: {path}")
# fmt: on


if __name__ == "__main__":
    try:
        if args.plot:
            plot(args.plot, args.out)
        else:
            main(args, stream, run)
    except InputError as error:
        fail(error)
