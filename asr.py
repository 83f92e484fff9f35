"""Attention-Spectrum Regularization (ASR): a LLaVA learns stage after stage, without replay.

Paper: "Attention-Spectrum Regularization for Replay-Free Continual Multimodal LLMs", arXiv
2606.23063. A reference script: read it from top to bottom, copy it, edit it.

The idea. A LLaVA that learns one kind of question after another forgets the earlier kinds. ASR
watches HOW the words of a question look at the image: every attention head gives a map over the
image patches, and the power spectrum of that map (coarse or fine? in which direction?) tells what
kind of looking it is, wherever in the image it happens. After each stage the spectra of every skill
are summarized by a mean and a variance, its prototype: some hundred numbers. One loss pulls the
spectra of new samples to these; a second keeps similarities of images and questions as they were.

    Eq. 6       attention map of the functional words   functional_rows, token_average
    Eqs. 7-14   spectrum, descriptor phi                bin_table, head_spectra, descriptor
    Eq. 5       skill posterior pi(q)                   skill_posterior
    Eqs. 15-20  prototypes (mu, var, d) of the skills   update_prototypes, prototype_variance
    Eqs. 21-26  L_spec                                  spectral_loss
    Eqs. 27-28  L_geo                                   embeddings, geometry_loss
    Eq. 29      L_task + beta L_spec + gamma L_geo      backward

    python asr.py --stream vqacl                        mini stream, tiny LLaVA: laptop, minutes
    python asr.py --stream vqacl --beta 0 --gamma 0 --out runs/seq      sequential LoRA, bit for bit
    python asr.py --stream vqacl --data DIR --model llava-hf/llava-1.5-7b-hf     the paper, one GPU

Letters: B batch, N samples of a stage, L captured layers, H heads, J = L H, T question tokens,
P = h w image patches, K radial and M angular bins, S skills, D size of phi; t stage, s skill.

Numbers in brackets, [3], are deviations from the paper: docs/asr.md. [2], [6], [8] matter most.
"""

import re
from collections import Counter
from contextlib import nullcontext
from functools import lru_cache, partial

import numpy as np
import torch
from torch.nn.functional import normalize as unit
from torch.nn.functional import one_hot

import data
import plot
from attention import capture_attention
from eval import SAVE_EVERY, Run
from files import InputError, input_errors, thumbnails
from model import LLaVA, to_device

# ---- 1. Flags ------------------------------------------------------------------------------------

PUBLISHED = (1, 2, 3, 4, 5, 6, 7, 8, 16)  # deviations of docs/asr.md that --published takes back
ABOUT = """\
The first choice is the default. Skills (Eq. 5) are guessed from question embeddings, known from
the data, or inferred from question words; their posterior is used as it is or one-hot. A prototype
is mean and variance or the mean of a skill, of a stage (task), or of everything (global). Matched
to it is every sample or (ours) the mean of a skill's samples in a micro-batch. phi holds all
numbers, the raw maps without Fourier transform, or one of the two profiles."""


def parse(argv=None):
    """All flags, defaults filled in; InputError if one makes no sense."""
    parser = data.common_flags("asr.py", __doc__.split("\n")[0])
    add = parser.add_argument_group("ASR", ABOUT).add_argument
    add("--beta", type=data.weight, default=0.5, help="of L_spec, Eq. 29 (default: 0.5)")
    add("--gamma", type=data.weight, help="of L_geo, Eq. 29 (0.05; coin, ucit at full size 0.02)")
    add("--lambda_ang", type=data.weight, default=0.1, help="of d in L_spec, Eq. 26 (default: 0.1)")
    add("--tau", type=data.endless, default=1.0, help="of w, Eq. 25; inf: w = 1 (default: 1)")
    add("--skills", choices=["parser", "stream", "shared"], default="parser")
    add("--match", choices=["sample", "mean"], default="sample")
    add("--posterior", choices=["soft", "hard"], default="soft")
    add("--prototypes", choices=["gaussian", "mean", "task", "global"], default="gaussian")
    add("--spectrum", choices=["full", "raw", "radial", "angular"], default="full")
    add("--layers", type=data.count, default=4, help="last layers that are captured (default: 4)")
    add("--prototype_samples", type=data.most, help="of a stage, or inf (1000; tiny model 200)")
    data.published_flag(add, PUBLISHED)
    args = parser.parse_args(argv)
    if 16 in args.published and args.warm_up is None:
        args.warm_up = 0.0
    return args if args.plot else data.resolve_defaults(args)


# ---- 2. The quantity: attention map -> spectrum -> descriptor (Sec. 4.1, App. A, Eqs. 6-14) ------

EPS = 1e-8
BINS = 8  # K = M, radial and angular

# The "functional tokens" U(q) [11]: wh-words, relation words, verbs, numerals, head nouns (below).
FUNCTIONAL = """
    what which who whose whom where when why how
    left right top bottom above below over under on in at behind front beside next near between
    inside outside with from of than
    is are was were do does did has have had can could will would should may see hold wear show give
    name count find read solve describe call called written shown made used
    zero one two three four five six seven eight nine ten many much
    """.split()


def question_core(question):
    """The question without what may follow it: up to the first "?", else its first line."""
    head, mark, _ = question.partition("?")
    return head + mark if mark else question.split("\n")[0]


def functional_spans(question):
    """U(q) as spans of characters [(start, end)]: the listed words, numbers, any -ing, and as head
    nouns the word after what / which / many / much and the last word (a heuristic, no tagger).
    """
    words, spans, before = list(re.finditer(r"\w+", question_core(question))), [], ""
    for match in words:
        word = match.group().lower()
        listed = word in FUNCTIONAL or word.isdigit() or (word.endswith("ing") and len(word) > 4)
        if listed or before in ("what", "which", "many", "much") or match is words[-1]:
            spans.append(match.span())
        before = word
    return spans


def functional_rows(batch):
    """Where U(q) is in a padded batch: [B, S] bool. Every question token where U(q) is empty."""
    rows = torch.zeros(batch["question_mask"].shape, dtype=torch.bool)
    for row, sample, offsets in zip(rows, batch["samples"], batch["question_offsets"]):
        spans = functional_spans(sample.question)
        for position, start, end in offsets:
            row[position] = any(start < stop and end > begin for begin, stop in spans)
    rows = rows.to(batch["question_mask"].device)
    return torch.where(rows.any(1, keepdim=True), rows, batch["question_mask"])


@lru_cache(maxsize=32)
def bin_table(h, w, published=(), wrapped=True, device="cpu"):
    """The frequencies of an h x w grid, row-major, DC first, and their bins (Eqs. 8-11).

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
    # At the Nyquist frequency f = -1/2 and +1/2 are one wave, so theta and -theta are, too.
    sin[np.isclose(fy, -0.5) | np.isclose(fx, -0.5)] = 0
    if 4 in published:  # bins (low, high] of [0, 1] and [-pi, pi)
        radial = np.searchsorted(np.linspace(0, 1 + EPS, BINS + 1), rho) - 1
        angular = np.searchsorted(np.linspace(-np.pi, np.pi + EPS, BINS + 1), theta) - 1
    else:  # [4]: angular bins are centered on multiples of pi / M
        radial = np.floor(BINS * rho + 1e-9).astype(int)
        angular = np.floor(theta % np.pi * BINS / np.pi + 0.5).astype(int) % BINS
    radial, angular = (np.eye(BINS)[bins.clip(0, BINS - 1)] for bins in (radial, angular))
    table = (rho, theta, radial, angular, cos, sin)
    return tuple(torch.tensor(x, dtype=torch.float32, device=device) for x in table)


def normalize(x):
    """x / sum(x) over the last axis; zero where all is zero."""
    return x / x.sum(-1, keepdim=True).clamp(min=EPS)


def token_average(maps, tokens=None, published=()):
    """Eq. 6, in the order of Eq. 57: each token's map is made to sum to one, then their mean [1].

    maps [B, L, H, T, h, w] (negative numbers count as 0), tokens [B, T] >= 0 (all equal if None or
    zero) -> [B, J, h, w] that sum to one, in float32 whatever came in (a CPU has no FFT in bf16).
    """
    maps = maps.float().clamp(min=0)
    B, L, H, T, h, w = maps.shape
    tokens = maps.new_ones(B, T) if tokens is None else tokens.to(maps)
    tokens = normalize(torch.where(tokens.sum(1, keepdim=True) > 0, tokens, 1.0))
    maps = maps.flatten(4)  # [B, L, H, T, P]
    maps = maps if 1 in published else normalize(maps)  # [1]
    maps = torch.einsum("blhtp,bt->blhp", maps, tokens)
    return normalize(maps).reshape(B, L * H, h, w)


def head_spectra(maps, published=(), bins=None):
    """Eqs. 7-12: the numbers of every head, and the radial and angular spectra among them.

    maps [B, J, h, w] that sum to one -> per head [B, J, D0], r [B, J, K], d [B, J, M].
    ours:      r, d, rho*, cos 2 theta*, sin 2 theta*, p*; DC only in r    D0 = K + M + 4 = 20
    published: r, d, a = d / mean(d), rho*, theta*, p*; DC everywhere      D0 = K + 2 M + 3 = 27
    """
    bins = bins or bin_table(*maps.shape[-2:], published, device=str(maps.device))
    rho, theta, in_radial, in_angular, cos, sin = bins
    spectrum = torch.fft.fft2(maps, norm="ortho")
    power = normalize((spectrum.real**2 + spectrum.imag**2).flatten(2))  # [B, J, P], Eq. 7
    r = normalize(power @ in_radial)  # [B, J, K], Eqs. 9-10
    if 2 not in published:  # [2]: DC is the largest power of every non-negative map
        power = normalize(torch.cat([torch.zeros_like(power[..., :1]), power[..., 1:]], -1))
    d = normalize(power @ in_angular)  # [B, J, M], Eq. 11
    numbers = [r, d]
    if 5 in published:  # [5]: anisotropy, Eq. 12
        numbers.append(d / d.mean(-1, keepdim=True).clamp(min=EPS))
    top, peak = power.max(-1)  # p* has a gradient, the place of the peak has none
    angle = [theta[peak]] if 3 in published else [cos[peak], sin[peak]]  # [3]
    numbers.append(torch.stack([rho[peak], *angle, top], -1))
    return torch.cat(numbers, -1), r, d


def descriptor(maps, tokens=None, spectrum="full", published=(), bins=None):
    """Eqs. 13-14: mean and population variance over the heads.

    maps [B, L, H, T, h, w], tokens [B, T] -> phi [B, D = 2 D0], angular [B, M], radial [B, K].
    spectrum: "full"; "radial" or "angular", r or d alone; "raw", the maps themselves.
    """
    maps = token_average(maps, tokens, published)
    numbers, r, d = head_spectra(maps, published, bins)
    x = {"full": numbers, "radial": r, "angular": d, "raw": maps.flatten(2)}[spectrum]
    phi = torch.cat([x.mean(1), x.var(1, correction=0)], -1)  # [B, D], over heads
    return phi, normalize(d.mean(1)), normalize(r.mean(1))


# ---- 3. The memory: skill posterior (Eq. 5) and prototypes (Eqs. 15-20) --------------------------

TEMPERATURE = 0.05  # of the softmax over cosines of --skills parser; ours [15]
TAU_SKILL = 0.2  # tau_s: samples with pi_s above it make the prototype of s, Eq. 15
EMA = 0.9  # alpha: share of the old prototype when a skill returns, Eq. 20

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


def known_skills(samples, skills, soft):
    """--skills stream: 0.95 for the sample's own skill, the rest spread evenly (hard: 1 and 0)."""
    S = len(skills)
    pi = one_hot(torch.tensor([skills.index(sample.skill) for sample in samples]), S).float()
    return 0.95 * pi + 0.05 / (S - 1) * (1 - pi) if soft and S > 1 else pi


def parsed_skills(questions, parser, soft):
    """--skills parser: softmax over the skills met so far of cos(question, centroid)."""
    logits = unit(questions) @ unit(parser["centroid"]).T / TEMPERATURE
    pi = logits.masked_fill(parser["count"] == 0, -torch.inf).softmax(1)
    return pi if soft else one_hot(pi.argmax(1), pi.shape[1]).float()


def shared_skills(samples, soft):
    """--skills shared: even over the skills whose words occur (hard: the first of them)."""
    cores = [question_core(sample.question).lower() for sample in samples]
    hits = [[bool(re.search(words, core)) for words in SHARED.values()] for core in cores]
    pi = torch.tensor(hits).float()
    pi[pi.sum(1) == 0, list(SHARED).index("recognize")] = 1
    return normalize(pi) if soft else one_hot(pi.argmax(1), len(SHARED)).float()


def skill_posterior(samples, t, args, skills, parser=None, questions=None, learned=False):
    """Eq. 5: pi [N, S] for samples of stage t; zero for a sample without an image.

    One prototype per stage (--prototypes task): a stage being learned has none yet, so pi is even
    over the earlier ones; `learned` gives the pi that its own prototype is made from.
    """
    N, S, soft = len(samples), len(skills), args.posterior == "soft"
    if args.prototypes == "global":
        pi = torch.ones(N, 1)
    elif args.prototypes == "task":
        stages = torch.arange(S)
        pi = (stages == t if learned else (stages < t) / max(t, 1)).float().repeat(N, 1)
    elif args.skills == "stream":
        pi = known_skills(samples, skills, soft)
    elif args.skills == "parser":
        pi = parsed_skills(questions, parser, soft)
    else:
        pi = shared_skills(samples, soft)
    return pi * torch.tensor([[sample.image is not None] for sample in samples])


def update_parser(parser, questions, samples, skills):
    """Take questions [N, width] into the running means of their skills, "centroid" [S, width]."""
    if not parser:
        centroid = torch.zeros(len(skills), questions.shape[1])
        parser = {"centroid": centroid, "count": torch.zeros(len(skills))}
    for s, skill in enumerate(skills):
        chosen = questions[[sample.skill == skill for sample in samples]]
        parser["count"][s] += len(chosen)
        if len(chosen):
            step = len(chosen) / parser["count"][s]
            parser["centroid"][s] += step * (chosen.mean(0) - parser["centroid"][s])
    return parser


def update_prototypes(memory, phi, angular, pi, floor=0.0):
    """Eqs. 15-20 after a stage, from phi [N, D], angular [N, M], pi [N, S]; returns the memory.

    The samples with pi_s > TAU_SKILL give skill s a mean, an unbiased variance (at least `floor`)
    and a mean angular profile, later a share 1 - EMA of them: 2 D + M + 1 floats per skill.
    """
    if not memory:
        S, D, M = pi.shape[1], phi.shape[1], angular.shape[1]
        memory = {"mean": phi.new_zeros(S, D), "var": phi.new_ones(S, D)}
        memory |= {"angular": phi.new_full((S, M), 1 / M), "count": phi.new_zeros(S)}
    for s in range(pi.shape[1]):
        chosen = pi[:, s] > TAU_SKILL
        if not chosen.any():
            continue
        var = phi[chosen].var(0, correction=1) if chosen.sum() > 1 else torch.zeros_like(phi[0])
        new = {"mean": phi[chosen].mean(0), "var": var.clamp(min=floor)}
        new["angular"] = normalize(angular[chosen].mean(0))
        old_share = EMA if memory["count"][s] > 0 else 0.0
        for name, value in new.items():
            memory[name][s] = old_share * memory[name][s] + (1 - old_share) * value
        memory["count"][s] += chosen.sum()
    return memory


def prototype_variance(memory, shape="gaussian", published=()):
    """The variances [S, D] that distances are measured in.

    At least a tenth of the spread that the dimension has within and between skills [7], so that
    none counts for being constant by chance; published: at least 1e-4. shape "mean": one number for
    all, which makes the distance Euclidean.
    """
    var, seen = memory["var"], memory["count"] > 0
    if shape == "mean":
        return var[seen].mean().clamp(min=1e-6).expand_as(var)
    if 7 in published:
        return var.clamp(min=1e-4)
    spread = var[seen].mean(0) + memory["mean"][seen].var(0, correction=0)
    return torch.maximum(var, 0.1 * spread + 1e-7)


# ---- 4. The losses (Eqs. 21-29) ------------------------------------------------------------------


def symmetric_kl(p, q):
    """0.5 KL(p | q) + 0.5 KL(q | p) over the last axis of non-negative vectors of any sum."""
    p, q = normalize(p.clamp(min=EPS)), normalize(q.clamp(min=EPS))
    return 0.5 * ((p - q) * (p.log() - q.log())).sum(-1)


def spectral_loss(phi, angular, pi, memory, args):
    """Eqs. 21-26: the distance of samples to the prototypes of their skills.

        L_spec = mean_b w_b ( sum_s pi_bs D2_bs + lambda_ang sum_s pi_bs symKL(d_b, d_s) )
        D2_bs  = sum_i (phi_bi - mu_si)^2 / var_si / D [9]          w_b = exp(-min_s D2_bs / tau)

    phi [B, D], angular [B, M], pi [B, S] -> {"spectral": L_spec, "distance": mean D2 to the nearest
    prototype, "weight": mean w}, the last two for the log. --match mean: b is not a sample but the
    mean of the samples of a skill, which counts as many [20].
    Skills without a prototype add nothing and do not enter the minimum; at least one must have one.
    """
    seen, count = memory["count"] > 0, len(phi)
    if args.match == "mean" and pi.any():
        used = pi.sum(0) > 0
        share = normalize(pi.T[used])  # [skills, B]
        phi, angular, pi = share @ phi, share @ angular, pi.sum(0).diag()[used]
    D2 = (phi[:, None] - memory["mean"]) ** 2  # [B, S, D]
    D2 = (D2 / prototype_variance(memory, args.prototypes, args.published)).mean(-1)  # [B, S]
    KL = symmetric_kl(angular[:, None], memory["angular"])  # [B, S]
    lambda_ang = args.lambda_ang if args.spectrum in ("full", "angular") else 0.0
    nearest = D2[:, seen].amin(1)  # [B]
    w = torch.exp(-nearest / args.tau)  # Eq. 25; tau = inf: the fixed weight 1
    w = w if 6 in args.published else w.detach()  # [6]
    pi = pi * seen
    if 8 in args.published:  # pi over skills with a prototype, mean over samples with any pi left
        count = (pi.sum(1) > 0).sum().clamp(min=1)
        pi = normalize(pi)
    loss = (w * (pi * (D2 + lambda_ang * KL)).sum(1)).sum() / count
    return {"spectral": loss, "distance": nearest.detach().mean(), "weight": w.detach().mean()}


def embeddings(output, batch):
    """Mean of the last hidden states over image tokens and over question tokens: two [B, width]."""
    hidden = output.last_hidden_state.float()  # [B, S, width]
    masks = [batch[name][:, :, None] for name in ("image_mask", "question_mask")]
    return [(hidden * mask).sum(1) / mask.sum(1).clamp(min=1) for mask in masks]


def geometry_loss(image, text, image_0, text_0):
    """Eqs. 27-28: how the images of a micro-batch relate to its questions must stay as it was.

    Four [B, width], the last two from the pretrained model [10] -> scalar; 0 if B = 1.
    """
    now = (unit(image) @ unit(text).T).softmax(-1)  # [B, B], over questions for each image
    before = (unit(image_0) @ unit(text_0).T).softmax(-1)
    return symmetric_kl(now, before).mean()


# ---- 5. Looking at a batch, at a stage, at the questions of a test -------------------------------

CASES = 3  # for figure 9: test questions per stage whose map is kept


def capture(llava, batch, args):
    """Inside this block the attention of the functional words is captured."""
    return capture_attention(llava.model, args.layers, functional_rows(batch), batch["image_mask"])


def attention_maps(captured, llava):
    """What a capture holds -> maps [B, L, H, T, h, w] and which of the T words are real [B, T]."""
    attention, words = captured()
    if attention.shape[-1] == 0:  # a batch without any image gets empty maps
        attention = attention.new_zeros(*attention.shape[:-1], llava.grid[0] * llava.grid[1])
    return attention.unflatten(-1, llava.grid), words


def backward(llava, batch, args, beta, pi, memory, reference):
    """Forward, Eq. 29 and backward for one micro-batch; returns its share of the step's log."""
    log = dict.fromkeys(("spectral", "distance", "weight", "geometry"), torch.zeros(()))
    with capture(llava, batch, args) if beta else nullcontext() as captured:
        output = llava.forward(batch)
        log["task"] = output.loss * batch["token_share"]  # [14]
        if beta:
            maps = attention_maps(captured, llava)
            phi, angular, _ = descriptor(*maps, args.spectrum, args.published)
            spectral = spectral_loss(phi, angular, pi[batch["index"]], memory, args)
            log |= {name: x * batch["sample_share"] for name, x in spectral.items()}
        if args.gamma:
            before = reference[batch["index"]].to(llava.device).unbind(1)
            geometry = geometry_loss(*embeddings(output, batch), *before)
            log["geometry"] = geometry * batch["sample_share"]
        log["loss"] = log["task"] + beta * log["spectral"] + args.gamma * log["geometry"]
        log["loss"].backward()  # inside: checkpointing runs the captured layers again
    return {name: x.detach().double() for name, x in log.items()}


def reference_embeddings(llava, samples, args):
    """L_geo's two vectors of each sample from the pretrained model: [N, 2, width] on the CPU."""

    def look(batch):
        return [torch.stack(embeddings(llava.forward(batch), batch), 1)]

    with llava.lora_off():
        return llava.over(samples, args.eval_batch_size, look, "reference of L_geo")[0]


def remember(memory, llava, stage, pi, args):
    """One more look at training samples of a stage makes the prototypes (Eqs. 15-20) [21]."""
    chosen = data.pick(range(len(pi)), args.prototype_samples, f"{args.seed}/look/{stage.name}")

    def look(batch):
        with capture(llava, batch, args) as captured:
            llava.forward(batch)
            maps = attention_maps(captured, llava)
        return descriptor(*maps, args.spectrum, args.published)[:2]

    samples = [stage.train[i] for i in chosen]
    phi, angular = llava.over(samples, args.eval_batch_size, look, "prototypes")  # [n, D], [n, M]
    new = to_device([phi, angular, pi[chosen]], llava.device)
    return update_prototypes(memory, *new, floor=1e-4 if 7 in args.published else 0.0)


def answer(llava, args, shown, samples):
    """Answers, and for the figures how each question looked at its image: phi, angular, radial, and
    of the samples in `shown` the mean map [h, w]; nan without an image."""
    batch = llava.batch(samples, train=False)
    with capture(llava, batch, args) as captured:
        texts = llava.generate(batch)
        maps, words = attention_maps(captured, llava)
    mean = token_average(maps, words).mean(1)  # over heads: [B, h, w]
    looks = *descriptor(maps, words, args.spectrum, args.published), mean
    looks = {name: x.cpu().numpy() for name, x in zip(("phi", "angular", "radial", "map"), looks)}
    notes = []
    for b, sample in enumerate(samples):
        known = np.float32(1 if sample.image is not None else np.nan)
        names = looks if (sample.stage, sample.id) in shown else ("phi", "angular", "radial")
        notes.append({name: looks[name][b] * known for name in names})
    return texts, notes


# ---- 6. The run ----------------------------------------------------------------------------------


def main(args):
    """Train on every stage in turn; after each, test on all stages seen so far."""
    stream = data.load_stream(args)
    run = Run(args, stream, "asr")  # its folder: log, matrix, answers, checkpoint, record
    llava = LLaVA(args)  # frozen
    if args.layers > llava.depth:
        raise InputError(f"--layers {args.layers}: this language model has {llava.depth}")
    torch.manual_seed(args.seed)
    lora = llava.add_lora(args)  # one adapter, trained through all stages
    data.show_sample(stream.stages[0].train[0], llava.processor, args.system)

    skills, memory, parser = skill_names(args, stream), {}, {}
    shown = {(stage.name, s.id) for stage in stream.stages for s in stage.test[:CASES]}
    first, begin = 0, 0  # the stage and the step to start from
    if state := run.resume():
        llava.load_lora(state["lora"])
        (first, begin), parser = state["at"], state["parser"]
        memory = to_device(state["memory"], llava.device)

    for t, stage in list(enumerate(stream.stages))[first:]:
        # What the losses need to know about the new samples, all of it from frozen weights.
        pi = questions = reference = None
        if args.beta:  # Eq. 5: which skills does each question need?
            questions = llava.text_means([question_core(s.question) for s in stage.train]).cpu()
            if args.skills == "parser" and not begin:
                parser = update_parser(parser, questions, stage.train, skills)
            pi = skill_posterior(stage.train, t, args, skills, parser, questions).to(llava.device)
        if args.gamma:  # how the pretrained model embeds images and questions, [N, 2, width]
            reference = reference_embeddings(llava, stage.train, args)
            run.lap("reference")
        beta = args.beta if memory and memory["count"].any() else 0.0  # nothing to protect at first

        # Train. A step is a few micro-batches; each adds its share to the gradient.
        steps = data.steps_of(stage, args)
        optimizer = torch.optim.AdamW(lora, lr=stage.lr, weight_decay=0.01)  # [12]
        if begin:
            optimizer.load_state_dict(state["optimizer"])
        llava.model.train()
        for k in run.steps(t, len(steps), begin):
            lr = stage.lr * data.schedule(k, len(steps), args.warm_up)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            log = Counter()  # adds up over the micro-batches
            for batch in llava.micro_batches(stage.train, steps, k):
                log.update(backward(llava, batch, args, beta, pi, memory, reference))
            log = llava.clip(lora, log)
            run.log(t, lr=lr, **log)  # stops the run at a nan
            optimizer.step()
            if (k + 1) % SAVE_EVERY == 0:
                memories = {"memory": memory, "parser": parser}
                run.save((t, k + 1), optimizer, lora=llava.lora_state(), **memories)
        begin = 0

        # One more look at the training data makes the prototypes; then it is gone.
        llava.eval()
        if args.beta:
            pi = skill_posterior(stage.train, t, args, skills, parser, questions, learned=True)
            memory = remember(memory, llava, stage, pi, args)
            run.lap("prototypes")

        # Test on all stages seen so far; how the questions looked is kept for the figures.
        run.test(t, partial(answer, llava, args, shown))
        run.note(**{f"{t + 1}-{t + 1}-picture": thumbnails(stage.test[:CASES], 112)})
        run.save((t + 1, 0), lora=llava.lora_state(), memory=memory, parser=parser)

    llava.save_lora(run.folder / "lora")
    trained = sum(p.numel() for p in lora)
    stored = sum(x.numel() for x in [*memory.values(), *parser.values()])
    facts = {"trainable_parameters": trained, "stored_parameters": trained + stored}
    run.finish(plot.asr, drift=plot.drift(run.folder), skills=skills if args.beta else [], **facts)


if __name__ == "__main__":
    with input_errors():
        args = parse()
        print("figures:", plot.draw(args.plot, args.out)) if args.plot else main(args)
