"""The figures of docs/: the idea of each method, and what the theory of ASR says, from runs and
records.

    python docs/figures.py RUN [RUN ...]       finished runs of asr.py, cram.py, mllm_cl.py

Into docs/figures it writes, from a run of asr.py, asr-idea.png and asr-theory.png (its attention
maps), and asr-drift.png from the records of the sweeps "report" and "report-drift"; from a run of
cram.py cram-idea.png; from one of mllm_cl.py mllm_cl-idea.png.
"""

import argparse
import sys
import textwrap
import types
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import asr  # noqa: E402
import data  # noqa: E402
import eval as evaluation  # noqa: E402
import mllm_cl  # noqa: E402

FIGURES = ROOT / "docs" / "figures"


def spectra(maps):
    """Maps [N, h, w] of any sum -> P [N, h w], the power of every wave, DC first, that sums to one;
    radial [N, 8] and angular [N, 8] spectra."""
    maps = torch.tensor(maps, dtype=torch.float32)[:, None]
    maps = maps / maps.sum((-2, -1), keepdim=True)
    _, r, d = asr.head_spectra(maps)
    power = torch.fft.fft2(maps).abs() ** 2
    return tuple(x.flatten(1).numpy() for x in (asr.normalize(power.flatten(2)), r, d))


def idea(run, path):
    """One question: where it looks, the spectrum of that, and the two profiles that are kept."""
    kept = [
        skill for skill in run.old if skill.mine[0] < asr.CASES
    ]  # the map of a question is kept
    skill = max(kept, key=lambda skill: skill.life[skill.i]["accuracy"])
    case, seen = skill.mine[0], run.seen
    row = run.rows[skill.i, skill.i][case]
    picture, attention = (seen(skill.i, skill.i, name)[case] for name in ("picture", "map"))
    power, r, d = spectra(attention[None])
    figure, axes = evaluation.new_figure(1, 4, height=2.1)
    axes[0].imshow(picture)
    title = textwrap.fill(asr.question_core(row["prompt"]), 22)
    axes[0].set_title(f"{title}\n-> {row['text']}", fontsize=8)
    side = attention.shape[-1]
    axes[1].imshow(attention, cmap="inferno")
    axes[1].set_title("attention of the question's\nwords to the patches", fontsize=8)
    power = np.fft.fftshift(power.reshape(side, side))
    power[side // 2, side // 2] = np.nan
    axes[2].imshow(np.log10(power + 1e-9), cmap="inferno")
    for k in range(1, 4):
        circle = np.linspace(0, 2 * np.pi, 100)
        radius = k / 8 * np.hypot(side / 2, side / 2)
        axes[2].plot(side / 2 + radius * np.cos(circle), side / 2 + radius * np.sin(circle), "w:",
                     linewidth=0.8)  # fmt: skip
    axes[2].set(xlim=(-0.5, side - 0.5), ylim=(side - 0.5, -0.5))
    axes[2].set_title("its power spectrum (log,\nno DC); dotted: bins of r", fontsize=8)
    for axis in axes[:3]:
        axis.set_axis_off()
    places = np.arange(r.shape[1])
    axes[3].bar(places - 0.2, 100 * r[0], 0.4, color=evaluation.COLORS[0], label="r: how coarse")
    axes[3].bar(places + 0.2, 100 * d[0], 0.4, color=evaluation.COLORS[1], label="d: direction")
    axes[3].set_title("share of power (%) per bin", fontsize=8)
    axes[3].set_xlabel("bin: of r from coarse to fine,\nof d from 0 to 180 degrees", fontsize=7)
    axes[3].tick_params(labelsize=7)
    axes[3].legend(fontsize=7)
    return evaluation.save_figure(figure, path)


def theory(run, path):
    """Theorem 2: a cyclic shift changes the map and not its spectrum; a small change of the map
    changes the spectrum in proportion."""
    maps = np.concatenate([run.seen(skill.i, skill.i, "map") for skill in run.old])
    maps = maps[np.isfinite(maps).all((1, 2))]
    maps = maps / maps.sum((1, 2), keepdims=True)
    before, chosen = spectra(maps)[0], np.random.default_rng(0)

    def distance(a, b):
        return np.abs(a - b).reshape(len(a), -1).sum(1)

    figure, (left, right) = evaluation.new_figure(1, 2, height=2.9)
    steps = range(maps.shape[-1])
    moved = [np.roll(maps, (k, k), (1, 2)) for k in steps]
    change = [distance(m, maps).mean() for m in moved]
    left.plot(steps, change, "o-", color=evaluation.COLORS[1], label="the map")
    change = [distance(spectra(m)[0], before).mean() for m in moved]
    left.plot(steps, change, "s-", color=evaluation.COLORS[0], label="its spectrum")
    asr.style(left, "shifted by k patches, down and right", "k", "change (L1)")
    sizes = np.logspace(-3, -0.5, 12)
    noise = chosen.random(maps.shape)
    noise /= noise.sum((1, 2), keepdims=True)
    for name, mark, fun in (("P", "s-", 0), ("r", "^-", 1), ("d", "D-", 2)):
        was = spectra(maps)[fun]
        change = [distance(spectra((1 - e) * maps + e * noise)[fun], was).mean() for e in sizes]
        right.loglog(sizes, change, mark, color=evaluation.COLORS[(0, 2, 3)[fun]], label=name)
    right.loglog(sizes, 2 * sizes, ":", color="black", label="proportional")
    asr.style(right, "a share e of the map is noise", "e", "change of the spectrum (L1)")
    for axis in (left, right):
        axis.legend(fontsize=8)
    return evaluation.save_figure(figure, path)


def drift(panels, path):
    """What every skill has forgotten by the end against the drift of its spectrum, all seeds, with
    the correlation (of the drift itself, not of its logarithm). panels: {title: records}."""
    kinds = {True: "with L_spec", False: "without, L_geo alone"}
    figure, axes = evaluation.new_figure(1, len(panels), height=4.2)
    for axis, (title, records) in zip(np.ravel(axes), panels.items(), strict=True):
        for k, (spectral, kind) in enumerate(kinds.items()):
            own = [r for r in records if (r["args"]["beta"] > 0) == spectral]
            if not own:
                continue
            points, (mean, low, high), _ = evaluation.drift_correlation(own)
            label = f"{kind}:\nr = {mean:.2f} [{low:.2f}, {high:.2f}]"
            axis.semilogx(*points, "os"[k], color=evaluation.COLORS[k], ms=3, alpha=0.4,
                          label=label)  # fmt: skip
        title = f"{title}\n{len({r['seed'] for r in records})} seeds"
        asr.style(axis, title, "drift (JSD, nats)", "forgotten (points)")
        axis.title.set_fontsize(9)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return evaluation.save_figure(figure, path)


def ask(axis, sample):
    """The picture of a test sample, and its question."""
    axis.imshow(data.load_image(sample.image))
    axis.set_axis_off()
    lines = [textwrap.fill(line, 24) for line in sample.question.split("\n")]
    axis.set_title("\n".join(lines), fontsize=8, parse_math=False)


def bars(axis, names, shares, chosen, title):
    """Named shares of one, the chosen one in color."""
    colors = ["#b0b0b0" if k != chosen else evaluation.COLORS[1] for k in range(len(names))]
    axis.barh(names, shares, color=colors)
    for k, share in enumerate(shares):
        axis.text(share + 0.02, k, f"{100 * share:.0f}%", va="center", fontsize=7)
    axis.invert_yaxis()
    axis.set(xlim=(0, 1.2), xticks=[])
    axis.tick_params(labelsize=7, length=0)
    axis.set_title(title, fontsize=8)
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)


def cram_idea(folder, record, stream, path):
    """The test question whose experts share it most evenly: its group, and their weights."""
    T, routes = len(record["stages"]), np.load(folder / "routing.npz")
    highest = [routes[f"{T}-{i + 1}-weights"].max(1) for i in range(T)]
    i = min(range(T), key=lambda i: highest[i].min())
    k = int(highest[i].argmin())
    group, weights = routes[f"{T}-{i + 1}-group"][k], routes[f"{T}-{i + 1}-weights"][k]
    figure, axes = evaluation.new_figure(1, 3, height=2.3)
    ask(axes[0], stream.stages[i].test[k])
    axes[1].set_axis_off()
    axes[1].set_title("1. the instruction\ndecides on the group", fontsize=8)
    for g in range(max(record["groups"]) + 1):
        own = [name for name, x in zip(record["stages"], record["groups"], strict=True) if x == g]
        shown = textwrap.fill(", ".join(own), 34)
        axes[1].text(0, 0.95 - g / (max(record["groups"]) + 1), f"group {g + 1}: {shown}", va="top",
                     fontsize=7, color=evaluation.COLORS[1] if g == group else "#707070",
                     fontweight="bold" if g == group else "normal")  # fmt: skip
    own = [n for n in range(T) if record["groups"][n] == group]
    names = [f"{record['stages'][n]}\n(rank {np.mean(record['ranks'][n]):.1f})" for n in own]
    bars(axes[2], names, weights[own], int(weights[own].argmax()),
         "2. the image weighs its\nexperts (mean rank)")  # fmt: skip
    return evaluation.save_figure(figure, path)


def mllm_cl_idea(folder, record, stream, path):
    """The first question of the last task: what the router is asked and says; the answer."""
    T = len(record["stages"])
    lines = evaluation.read_json(folder / "routing.jsonl", lines=True)
    line = next(x for x in lines if x["stage"] == x["task"] == T)
    said = evaluation.read_json(evaluation.predictions_file(folder, T - 1, T - 1), lines=True)[0]
    letters = mllm_cl.letters_of(T, record["seed"])
    figure, axes = evaluation.new_figure(1, 2, height=2.6, width_ratios=(1, 3))
    ask(axes[0], stream.stages[-1].test[0])
    about = [textwrap.fill(stream.descriptions[name], 48) for name in record["stages"]]
    names = [f"{letter}: {text}" for letter, text in zip(letters, about, strict=True)]
    chosen = line["choice"] - 1
    bars(axes[1], names, line["probabilities"], chosen, "")
    figure.suptitle("the router LoRA reads image, question and these lines, and says a letter; "
                    f'expert {letters[chosen]} answers: "{said["text"]}"', fontsize=8)  # fmt: skip
    return evaluation.save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run")
    drawn = []
    for folder in map(Path, parser.parse_args().runs):
        record = evaluation.read_run(folder)
        if record["script"] == "asr":
            drawn += of_asr(folder)
        elif draw := {"cram": cram_idea, "mllm_cl": mllm_cl_idea}.get(record["script"]):
            stream = data.load_stream(types.SimpleNamespace(**record["args"]))
            drawn.append(draw(folder, record, stream, FIGURES / f"{record['script']}-idea.png"))
        else:
            raise data.InputError(f"{folder}: a run of {record['script']}.py has no figure in docs")
    print("\n".join(map(str, drawn)))


def of_asr(folder):
    run = asr.load_run(folder)
    asr.name_runs([run])
    drawn = [idea(run, FIGURES / "asr-idea.png"), theory(run, FIGURES / "asr-theory.png")]
    panels = {}
    for sweep in ("report", "report-drift"):
        for file in sorted((ROOT / "results" / sweep).glob("*.json")):
            record = evaluation.load_record(file)
            if "drift" in record:  # runs of asr.py
                panels.setdefault(f"{sweep}: {record['stream']}", []).append(record)
    if panels:
        drawn.append(drift(panels, FIGURES / "asr-drift.png"))
    return drawn


if __name__ == "__main__":
    try:
        main()
    except data.InputError as error:
        data.fail(error)
