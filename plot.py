"""Every figure, drawn from run folders; no model is loaded.

    python plot.py RUN [RUN ...] [--out DIR]    the figures of the script that made these runs

They go to figures/ of the first run unless --out names a folder; so does `--plot RUN` of a script.
Several runs are compared, and those that differ only in their seed are averaged. A method's figures
need facts.npz: what it noted about the N test questions of task i after stage t, in the order of
the predictions, under the key "<t>-<i>-<name>", counted from 1.
"""

import argparse
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval import group, interference, metrics, read_run, show
from files import InputError, damaged, input_errors, predictions_file, read_json

# ---- 1. Runs and their labels --------------------------------------------------------------------


def read_runs(folders, path, needed="matrix"):
    """{label: records, one per seed}, the first record, and the folder to draw into.

    A run that is about to end gives its record in place of its folder. InputError: a record lacks
    the key `needed`, or the stages of the runs differ.
    """
    records = [run if isinstance(run, dict) else read_run(run) for run in folders]
    for record in records:
        if needed not in record:
            raise InputError(f"{record['folder']}: no {needed!r} in its record; is it finished?")
        if record["stages"] != records[0]["stages"]:
            raise InputError(f"{record['folder']} and {folders[0]} went through different stages")
    groups = {label: [*runs.values()] for label, runs in group(records).items()}
    path = Path(path or records[0]["folder"] / "figures")
    path.mkdir(parents=True, exist_ok=True)
    return groups, records[0], path


def read_facts(folder, name):
    """facts.npz as a dict; InputError if it is missing, damaged or holds no `name`."""
    file = Path(folder) / "facts.npz"
    with damaged(file):
        facts = dict(np.load(file))
    if f"1-1-{name}" not in facts:
        raise InputError(f"{file} holds no {name!r}: another script made this run")
    return facts


def numbered(names, most=14):
    """Names of stages for an axis: they differ by number, however long or strange they are."""
    names = [name if len(name) <= most else name[: most - 1] + "…" for name in names]
    return [f"{i + 1} {name}" for i, name in enumerate(names)]


# ---- 2. Figures of any run -----------------------------------------------------------------------
# 6.7 inches at 120 dpi are 800 pixels, the width of a README: 9 points are 15 pixels high there.
# cividis for amounts, the palette of Okabe and Ito for lines: safe for color-blind readers.

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dv<P"
STYLE = {"font.size": 9, "axes.titlesize": 10, "legend.fontsize": 8}
STYLE |= {"axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True, "text.parse_math": False}


def new_figure(rows=1, columns=1, height=4.2, **options):
    """A figure and its axes [rows, columns]. It needs no screen and no pyplot."""
    import matplotlib.figure  # here, not above: training does without its time and memory

    matplotlib.rcParams |= STYLE
    warnings.filterwarnings("ignore", "Glyph")  # letters that the font lacks become boxes
    figure = matplotlib.figure.Figure(figsize=(6.7, height), dpi=120, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def heat_maps(panels, names, labels, limits, path, digits=0):
    """One or two matrices {title: values} on one color scale; nan stays white.

    names: of rows and columns; labels: of vertical axis, horizontal axis and color bar; digits: of
    the numbers in the cells (none if there are more than 40 columns).
    """
    (low, high), step = limits, -(-len(names[1]) // 40)
    figure, axes = new_figure(1, len(panels), 2 + 0.32 * len(names[0]), sharey=True)
    for axis, (title, values) in zip(axes[0], panels.items()):
        image = axis.imshow(values, cmap="cividis", vmin=low, vmax=high, aspect="auto")
        for row, column in np.argwhere(np.isfinite(values)) if step == 1 else ():
            value = round(float(values[row, column]), digits) + 0.0  # + 0.0 turns -0 into 0
            ink = "white" if value < low + 0.45 * (high - low) else "black"
            text = f"{value:.{digits}f}"
            axis.text(column, row, text, ha="center", va="center", fontsize=8, color=ink)
        axis.set_xticks(range(0, len(names[1]), step), names[1][::step], rotation=45, ha="right")
        axis.set_yticks(range(len(names[0])), names[0])
        axis.set(title=title, xlabel=labels[1])
        axis.grid(False)
    axes[0, 0].set_ylabel(labels[0])
    figure.colorbar(image, ax=axes, location="bottom", aspect=60, label=labels[2])
    figure.savefig(path)


def lines(panels, x, y, path, **options):
    """A panel per entry {title: {label: (x values [n], y values [n] or [seeds, n])}}: means over
    the seeds, with bands of one std. options: of the axes."""
    figure, axes = new_figure(1, len(panels), sharey=True)
    for axis, (title, curves) in zip(axes[0], panels.items()):
        for k, (label, (xs, values)) in enumerate(curves.items()):
            values, color = np.atleast_2d(values), COLORS[k % 7]
            style = MARKERS[k % 7] + ("-", ":", "--", "-.")[k // 7 % 4]
            axis.plot(xs, values.mean(0), style, color=color, label=label, clip_on=False)
            if len(values) > 1:
                band = values.mean(0) + np.outer([-1, 1], values.std(0, ddof=1))
                axis.fill_between(xs, *band, color=color, alpha=0.15, linewidth=0)
        axis.xaxis.get_major_locator().set_params(integer=True, steps=(1, 2, 5, 10))
        axis.set(title=textwrap.fill(title, 78 // len(panels)), xlabel=x, **options)
    axes[0, 0].set_ylabel(y)
    columns = 4 if max(map(len, curves)) < 18 else 1
    entries = axes[0, 0].get_legend_handles_labels()
    figure.legend(*entries, loc="outside lower center", ncols=columns)
    figure.savefig(path)


def bars(groups, columns, path):
    """A panel of bars per column {title: function of a record}: mean +- std of each label."""
    figure, axes = new_figure(1, len(columns), 1.2 + 0.4 * len(groups), sharey=True)
    for axis, color, (title, function) in zip(axes[0], COLORS, columns.items()):
        values = [np.array([*map(function, group)], dtype=float) for group in groups.values()]
        errors = [np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in values]
        drawn = axis.barh(range(len(values)), list(map(np.mean, values)), xerr=errors, color=color)
        axis.bar_label(drawn, fmt=" %.1f")
        axis.set(title=title, xmargin=0.5)  # room for these numbers
    names = [f"{textwrap.fill(label, 34)} (n = {len(g)})" for label, g in groups.items()]
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    figure.savefig(path)


def scatter(panels, path, scale="linear"):
    """A panel of dots per entry (title, x, y, {label: (xs, ys)}); if linear with Pearson's r."""
    figure, axes = new_figure(1, len(panels))
    for axis, (title, x, y, groups) in zip(axes[0], panels):
        for k, (label, dots) in enumerate(groups.items()):
            dots = np.array(dots)[:, np.isfinite(dots).all(0)]  # [2, n]
            label = f"{textwrap.fill(label, 40)} (n = {dots.shape[1]})"
            if scale == "linear" and dots.shape[1] > 4 and dots.std(1).all():
                label += f": r = {np.corrcoef(dots)[0, 1]:.2f}"
            axis.scatter(*dots, 12, COLORS[k % 7], marker=MARKERS[k % 7], alpha=0.5, label=label)
        axis.set(title=title, xlabel=x, ylabel=y, xscale=scale)
        if scale == "linear":
            axis.locator_params(axis="x", nbins=5)
        else:
            axis.xaxis.set(major_formatter="{x:.0e}", minor_formatter="")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18))
    figure.savefig(path)


def pictures(cells, columns, path):
    """A grid of images: [(title, image, map that is laid over it or None)]."""
    rows, most = -(-len(cells) // columns), max(title.count("\n") for title, _, _ in cells)
    figure, axes = new_figure(rows, columns, (6.7 / columns + 0.2 + 0.15 * most) * rows)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (title, image, overlay) in zip(axes.flat, cells):
        axis.set_title(title, fontsize=8)
        axis.imshow(image, cmap="inferno", extent=(0, 1, 1, 0))
        if overlay is not None:
            axis.imshow(overlay, cmap="inferno", alpha=0.5, extent=(0, 1, 1, 0))
    figure.savefig(path)


def two_matrices(groups, path, of=np.asarray, limits=(0, 100), label="accuracy (%)"):
    """`of` the accuracy matrices of the first one or two labels, each the mean over its seeds."""
    panels = {}
    for name, records in list(groups.items())[:2]:
        scores = [metrics(record["matrix"]) for record in records]
        numbers = [f"{key} {show(np.mean([s[key] for s in scores]))}" for key in ("AP", "AF")]
        seeds = f"\nmean of {len(records)} seeds" if len(records) > 1 else ""
        title = f"{textwrap.fill(name, 44)}{seeds}\n{', '.join(numbers)}"
        panels[title] = np.mean([of(np.array(r["matrix"], dtype=float)) for r in records], 0)
    stages, labels = numbered(records[0]["stages"]), ("after training on", "tested on", label)
    heat_maps(panels, (stages, stages), labels, limits, path, digits=2 - len(panels))


def tasks(groups, path):
    """The accuracy on every task after every stage since its own, for the first three labels."""
    panels = {}
    for label, records in list(groups.items())[:3]:
        A = np.array([record["matrix"] for record in records], dtype=float)  # [seeds, T, T]
        names, x = numbered(records[0]["stages"]), np.arange(1, A.shape[1] + 1)
        panels[label] = {name: (x[i:], A[:, i:, i]) for i, name in enumerate(names)}
    lines(panels, "after stage", "accuracy on each task (%)", path, ylim=(0, 100))


def losses(record, path):
    """Every part of the loss in every step, and its mean over some; gray: a stage begins."""
    rows = read_json(record["folder"] / "metrics.jsonl")
    apart = {"step", "stage", "lr", "gradient_norm", "phase", "distance", "weight"}
    names = [n for n in dict.fromkeys(n for row in rows for n in row) if n not in apart]
    parts = {n: np.array([row.get(n, np.nan) for row in rows], dtype=float) for n in names}
    parts = {name: values for name, values in parts.items() if np.nan_to_num(values).any()}
    if not parts:  # nothing was trained
        return
    figure, axes = new_figure(len(parts), 1, 1 + 1.1 * len(parts), sharex=True)
    width, steps = min(len(rows), 2 + len(rows) // 50), np.arange(1, len(rows) + 1)
    for axis, (name, values) in zip(axes[:, 0], parts.items()):
        axis.plot(steps, values, color=COLORS[5], linewidth=0.5)
        mean = np.convolve(values, np.ones(width) / width, "valid")
        axis.plot(steps[width - 1 :], mean, color=COLORS[0])
        axis.set_ylabel(name)
        for k in np.flatnonzero(np.diff([row["stage"] for row in rows])):
            axis.axvline(k + 1.5, color="gray", linewidth=0.8)
    axes[0, 0].set_title(f"The parts of the loss, and their means over {width} steps")
    axes[-1, 0].set_xlabel("step")
    figure.savefig(path)


def baselines(folders, path=None, further=None):
    """What every script has: matrices, every task's accuracy, the loss; of several labels AP, AF
    and `further` columns {title: function of a record} in place of the loss."""
    groups, first, path = read_runs(folders, path)
    two_matrices(groups, path / "matrix.png")
    tasks(groups, path / "accuracy.png")
    columns = {"AP (%)": lambda r: r["metrics"]["AP"], "AF (points)": lambda r: r["metrics"]["AF"]}
    if len(groups) > 1:
        bars(groups, columns | (further or {}), path / "compare.png")
    else:
        losses(first, path / "loss.png")
    return path


# ---- 3. ASR, arXiv 2606.23063 (figures numbered like the paper's) --------------------------------
# facts.npz: phi [N, D], angular [N, 8], radial [N, 8], nan without an image; map [3, h, w] and, for
# t = i, picture [3, 112, 112, 3] of the first three questions.


@dataclass
class State:
    """One skill after one stage: its N test questions (rows of nan: no image)."""

    phi: np.ndarray  # [N, D]
    angular: np.ndarray  # [N, 8]
    radial: np.ndarray  # [N, 8]
    scores: np.ndarray  # [N], 0 to 1

    def mean(self, name):
        """The mean of phi [D], angular or radial [8] over the questions with an image."""
        rows = getattr(self, name)[np.isfinite(self.phi).all(1)]
        return rows.mean(0) if len(rows) else np.full(rows.shape[1], np.nan)

    def distance(self, phi):
        """Squared distance of phi [N, D] to this skill, per dimension, in units of its variance."""
        known = self.phi[np.isfinite(self.phi).all(1)]
        spread = known.var(0) + 1e-7 if len(known) else np.nan
        return ((phi - self.mean("phi")) ** 2 / spread).mean(-1)  # [N]


def read_skills(folder, record):
    """{skill: its States, from the stage that taught it to the last one} without the skills of the
    last stage; the run may lack summary.json."""
    facts, stages, skills = read_facts(folder, "phi"), record["stages"], {}
    last = max((int(key.split("-")[0]) for key in facts), default=0)
    for i, t in [(b, a) for b in range(1, last) for a in range(b, last + 1)]:
        rows = read_json(predictions_file(folder, t - 1, i - 1))
        values = [facts[f"{t}-{i}-{name}"] for name in ("phi", "angular", "radial")]
        values.append(np.array([row["score"] for row in rows], dtype=float))
        kinds = np.array([row["skill"] for row in rows])
        for kind in dict.fromkeys(kinds.tolist()):
            name = stages[i - 1] if len(set(kinds)) == 1 else f"{stages[i - 1]}: {kind}"
            skills.setdefault(name, []).append(State(*(v[kinds == kind] for v in values)))
    return skills


def js_divergence(p, q):
    """Jensen-Shannon divergence (nats) over the last axis of non-negative arrays of any sum."""
    p, q = (np.clip(x, 1e-8, None) / np.clip(x, 1e-8, None).sum(-1, keepdims=True) for x in (p, q))
    return ((p * np.log(2 * p / (p + q))).sum(-1) + (q * np.log(2 * q / (p + q))).sum(-1)) / 2


def change(before, after):
    """From one State of a skill to another: drift of its spectra (nats), accuracy lost (points)."""
    drifts = [js_divergence(before.mean(name), after.mean(name)) for name in ("radial", "angular")]
    return [float(sum(drifts)), float(100 * np.mean(before.scores) - 100 * np.mean(after.scores))]


def drift(folder):
    """{skill: [drift of its spectra (nats), accuracy lost (points)]} between the stage that taught
    it and the last one; for the record of a run that lacks summary.json."""
    skills = read_skills(folder, read_run(folder))
    return {name: change(states[0], states[-1]) for name, states in skills.items()}


def asr_drift(runs, path):
    """Figs. 2 and 6: what moves in the spectra of every skill, and what is forgotten."""
    frequencies, forgetting, prototypes = {}, {}, {}
    for label, skills in runs.items():
        steps = [pair for states in skills.values() for pair in zip(states, states[1:])]
        power = [100 * (a.mean("radial") - b.mean("radial"))[4:].sum() for a, b in steps]
        frequencies[label] = [change(*pair)[0] for pair in steps], power
        since = [change(states[0], state) for states in skills.values() for state in states[1:]]
        forgetting[label] = list(zip(*since))
        ends = [(states[0], states[-1]) for states in skills.values()]
        moved = [np.sqrt(a.distance(b.mean("phi"))) for a, b in ends]
        prototypes[label] = moved, [change(*pair)[1] for pair in ends]
    x, y, power = "drift (JSD, nats)", "forgotten (points)", "lost power in bins 5-8 of r (%)"
    left = "Every skill in every later stage", x, power, frequencies
    right = "Every skill since it was learned", x, y, forgetting
    scatter([left, right], path / "fig2-drift.png")
    x = "distance its mean descriptor has moved (standard deviations)"
    scatter([("Every skill at the end", x, y, prototypes)], path / "fig6-prototypes.png")


def asr_spectra(skills, path):
    """Fig. 5: the change of every skill's mean spectra between its stage and the last one."""
    panels = {}
    for name, title in {"radial": "frequency, coarse to fine", "angular": "direction"}.items():
        changes = [states[-1].mean(name) - states[0].mean(name) for states in skills.values()]
        panels[title] = 100 * np.array(changes)
    bound = max(0.1, *(np.nanmax(abs(values)) for values in panels.values()))
    labels = "", "bin", "change of the share of power (points)"
    heat_maps(panels, (numbered(skills, 24), range(1, 9)), labels, (-bound, bound), path, 1)


def asr_distance(runs, path):
    """Fig. 7: distance of old questions to their skill as learned, for right and wrong answers."""
    curves, x = {}, np.arange(5, 100, 5)
    for label, skills in runs.items():
        ends = [(states[0], states[-1]) for states in skills.values()]
        D2 = np.concatenate([first.distance(last.phi) for first, last in ends])
        right = np.concatenate([last.scores for _, last in ends]) >= 0.5
        for name, chosen in {"right": right, "wrong": ~right}.items():
            values = D2[chosen & np.isfinite(D2)]
            if len(values):
                curves[f"{label}: {name}, n = {len(values)}"] = x, np.percentile(values, x)
    title, y = "Distance of every question to its skill as learned", "Mahalanobis distance D2"
    lines({title: curves}, "percentile of the questions", y, path)


def asr_cases(record, path):
    """Fig. 9: image, attention, its spectrum and answer, just after the stage and at the end; of
    the first three questions of a stage the one on which the two answers differ most."""
    folder, facts, cells = record["folder"], read_facts(record["folder"], "picture"), []
    last = max((int(key.split("-")[0]) for key in facts), default=0)
    for i in range(1, min(last, 5)):
        images, views = facts[f"{i}-{i}-picture"], {"just after its stage": i, "at the end": last}
        files = [predictions_file(folder, t - 1, i - 1) for t in views.values()]
        pairs = list(zip(*(read_json(file) for file in files)))[: len(images)]
        k = int(np.argmax([a["score"] != b["score"] for a, b in pairs]))
        question = textwrap.shorten(pairs[k][0]["prompt"].split("\n")[0], 66)
        title = f"{textwrap.fill(question, 22)}\n-> {pairs[k][0]['answers'][0][:20]}"
        cells.append((title, images[k], None))
        for (view, t), answer in zip(views.items(), pairs[k]):
            attention = facts[f"{t}-{i}-map"][k]
            score = answer["score"]
            mark = "no score" if score is None else ("wrong", "right")[score >= 0.5]
            cells.append((f"{view}\n{answer['text'][:16]!a} ({mark})", images[k], attention))
            power = np.abs(np.fft.fft2(attention)) ** 2
            power[0, 0] = np.nan
            spectrum = np.log10(np.fft.fftshift(power) + 1e-9)
            cells.append(("its spectrum\n(log, no DC)", spectrum, None))
    pictures(cells, 5, path)


def asr(folders, path=None):
    """The figures of runs of asr.py; Figs. 2, 6 and 7 show one run of each label."""
    groups, first, path = read_runs(folders, path)
    runs = {label: read_skills(r[0]["folder"], r[0]) for label, r in groups.items()}
    if any(runs.values()):  # after one stage nothing can have drifted
        asr_drift(runs, path)
        asr_spectra(next(iter(runs.values())), path / "fig5-spectra.png")
        asr_distance(runs, path / "fig7-distance.png")
        asr_cases(first, path / "fig9-cases.png")
    below = "accuracy minus the task's best (points)"
    two_matrices(groups, path / "fig8-interference.png", interference, (-100, 0), below)
    return baselines(folders, path)  # compare.png: Fig. 4


# ---- 4. CRAM and MR-LoRA; command line -----------------------------------------------------------
# facts.npz: weights [N, t] of CRAM's experts; probability [N, t] of MR-LoRA's experts and, for
# t = i, picture [2, 96, 96, 3] of the first two questions.


def cram(folders, path=None):
    """Routing, groups and ranks of the first run of cram.py; parameters and energy of all."""
    groups, first, path = read_runs(folders, path, "ranks")
    facts, stages = read_facts(first["folder"], "weights"), numbered(first["stages"])
    T, right = len(stages), first["routing_accuracy"]
    weights = np.array([100 * facts[f"{T}-{i + 1}-weights"].mean(0) for i in range(T)])
    title = f"right group {right['group']:.1f}%, right expert {right['expert']:.1f}%"
    labels = "test questions of", "expert of", "mean weight of the expert (%)"
    heat_maps({title: weights}, (stages, stages), labels, (0, 100), path / "routing.png")

    numbers, ranks = first["groups"], np.array(first["ranks"])  # [T], [T, layers]
    order, about = sorted(range(T), key=lambda k: (numbers[k], k)), []
    for k in order:
        text = textwrap.shorten(first["instructions"][k], 36)
        about.append(f'group {numbers[k] + 1}: {stages[k]}, rank {ranks[k].mean():.1f}\n"{text}"')
    title, labels = "Groups by instruction; ranks of their experts", ("", "adapted layer", "rank")
    names, limits = (about, range(1, ranks.shape[1] + 1)), (0, ranks.max())
    heat_maps({title: ranks[order]}, names, labels, limits, path / "groups-ranks.png")

    counts, energy, x = {}, [], np.arange(1, T + 1)
    for label, records in groups.items():
        for key in ("stored", "trained"):
            values = [np.array(record[f"{key}_parameters"]) / 1e3 for record in records]
            counts[f"{label}: {key}"] = x, values
        energy.append(100 * np.mean([np.array(r["energy"], dtype=float) for r in records], 0))
    rank = first["args"]["rank"]
    counts[f"one LoRA of rank {rank} per task"] = x, first["per_rank"] * rank / 1e3 * x
    title = "Parameters: stored so far, and trained in each stage"
    lines({title: counts}, "stage", "thousands", path / "parameters.png")
    title = "Energy of a new expert in the output space of older ones"
    labels = "", "expert of (white: first of its group)", "energy (%)"
    names = [textwrap.fill(label, 34) for label in groups], stages
    heat_maps({title: np.array(energy)}, names, labels, (0, 100), path / "energy.png")
    return baselines(folders, path)


def mllm_cl_cases(record, path):
    """The first questions of every task, the two most probable experts, and the answer."""
    facts, stages = read_facts(record["folder"], "picture"), numbered(record["stages"])
    cells, T = [], len(stages)
    for i, stage in enumerate(stages):
        answers = read_json(predictions_file(record["folder"], T - 1, i))
        probabilities = facts[f"{T}-{i + 1}-probability"]
        for answer, p, picture in zip(answers, probabilities, facts[f"{i + 1}-{i + 1}-picture"]):
            best = np.argsort(-p, kind="stable")[:2]
            experts = ", ".join(f"{stages[e]} {100 * p[e]:.0f}%" for e in best)
            text = [f"{stage}: {textwrap.shorten(answer['prompt'], 50)}", f"experts: {experts}"]
            text += [f"{answer['text'][:16]!a} (gold: {answer['answers'][0][:16]})"]
            title = "\n".join(textwrap.fill(line, 28) for line in text)
            cells.append((title, picture, None))
    pictures(cells, 4, path)


def mllm_cl(folders, path=None):
    """Confusion and cases of the first run of mllm_cl.py; routers and shots of several."""
    groups, first, path = read_runs(folders, path, "confusion")
    stages, counts = numbered(first["stages"]), np.array(first["confusion"])[-1]
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    title = f"after the last stage: {first['routing_accuracy'][-1]:.1f}% routed right"
    labels = "task of the question", "expert that answered", "share of the questions (%)"
    heat_maps({title: shares}, (stages, stages), labels, (0, 100), path / "confusion.png")
    mllm_cl_cases(first, path / "cases.png")
    columns = {"routed right (%)": lambda r: r["routing_accuracy"][-1]}
    steps = ("router", "routing")  # training routers, and routing
    columns["seconds of routers"] = lambda r: sum(r["seconds_by_part"].get(k, 0) for k in steps)
    shots = {}
    for records in (g for g in groups.values() if "shots" in g[0]["args"]):  # not of experts.py
        args = records[0]["args"]
        point = args["shots"], np.mean([r["routing_accuracy"][-1] for r in records])
        name = f"router {args['router']}, blind_shots {args['blind_shots']}"
        shots.setdefault(name, []).append(point)
    if any(len(points) > 1 for points in shots.values()):
        curves = {name: list(zip(*sorted(points))) for name, points in shots.items()}
        title, x = "How many samples does the router need?", "samples kept per task"
        lines({title: curves}, x, "routed right (%)", path / "shots.png")
    return baselines(folders, path, columns)


def draw(folders, path=None):
    """The figures of the script that made all these runs, or what every script has."""
    scripts = {read_run(folder)["script"] for folder in folders}
    known = {"asr": asr, "cram": cram, "mllm_cl": mllm_cl, "experts": mllm_cl}
    figures = known.get(min(scripts), baselines) if len(scripts) == 1 else baselines
    with damaged(" ".join(map(str, folders))):
        return figures(folders, path)


def main(argv=None):
    parser = argparse.ArgumentParser("plot.py", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--out", metavar="DIR", help="(default: figures/ of the first run)")
    args = parser.parse_args(argv)
    print("figures:", draw(args.runs, args.out))


if __name__ == "__main__":
    with input_errors():
        main()
