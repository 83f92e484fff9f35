"""Tables and figures of docs/asr.md: does ASR work, and why not? `python results/run.py asr`.

A comparison is {title: {row: {seed: record}}}, its first row what the others are paired with.
"""

import math
from pathlib import Path

import numpy as np

import plot
from eval import difference, grid, mean_std, paired, show
from files import read_json

RESULTS = Path(__file__).parent
ASR = "both, parser"  # the defaults of asr.py in the sweep report
PARTS = {"": "nothing", "q_proj k_proj": "q, k", "q_proj k_proj v_proj projector": "all four"}
PARTS |= {name: name.removesuffix("_proj") for name in ("q_proj", "k_proj", "v_proj", "projector")}


def comparisons(results: dict) -> dict:
    """What is compared, in the order of the page, from the sweeps."""
    report, fast = results["report"], results["report-drift"]["domains"]
    usual = {s: {"sequential": rows["sequential"]} for s, rows in report.items()}
    both = {stream: rows | {"ASR": report[stream][ASR]} for stream, rows in usual.items()}
    groups = {f"a. published, {s}": both[s] | results["asr-published"][s] for s in both}
    groups |= {f"b. Table 3, {s}": both[s] | results["asr-table"][s] for s in both}
    parts = results["asr-parts"]["domains"]
    groups["d. trained layers, domains"] = {"all": parts["all"]} | parts
    groups["e. q, k alone at 3e-3, domains"] = results["asr-hold"]["domains"]
    groups |= {f"f. means, {s}": rows for s, rows in results["asr-match"].items()}
    geometry = {"L_geo, gamma 0.05": report["domains"]["geometry only"]}
    geometry |= results["asr-geometry"]["domains"]
    groups["g. L_geo, domains"] = usual["domains"] | geometry
    damped = {"sequential": fast["sequential"], "ASR": fast[ASR]} | results["asr-damped"]["domains"]
    groups["h. damping at 1e-2, domains"] = damped | {
        "sequential, lr 2e-3": usual["domains"]["sequential"]
    }
    samples = {f"j. prototypes, {s}": {"ASR": report[s][ASR]} for s in report}
    return groups | {t: rows | results["asr-samples"][t[15:]] for t, rows in samples.items()}


def shared(rows: dict) -> dict:
    """{row: {seed: record}} with the seeds that all of its rows have finished; {} without any."""
    done = {row: {s: r for s, r in cells.items() if r} for row, cells in rows.items()}
    seeds = set.intersection(*map(set, done.values()))
    return (
        {row: {s: cells[s] for s in sorted(seeds)} for row, cells in done.items()} if seeds else {}
    )


def moved(record: dict) -> float:
    """Mean drift of the spectra of all skills of a run, in millinats; nan if nobody looked."""
    values = [pair[0] for pair in record.get("drift", {}).values() if pair[0] is not None]
    return 1000 * np.mean(values) if values else math.nan


def table(title: str, rows: dict) -> str:
    """AP, AF and MFT, with paired differences to the first row."""
    lines, first = [[title, "seeds", "AP", "- first", "AF", "- first", "MFT", "drift"]], None
    for row, cells in rows.items():
        lines.append([row, str(len(cells))])
        for name in ("AP", "AF"):
            values = [r["metrics"][name] for r in cells.values()]
            first = first or cells
            pairs = [(r["metrics"][name], first[s]["metrics"][name]) for s, r in cells.items()]
            lines[-1] += [mean_std(values), "" if cells is first else difference(pairs)]
        learned = np.mean([r["metrics"]["MFT"] for r in cells.values()])
        lines[-1] += [show(learned), show(np.mean([moved(r) for r in cells.values()]))]
    return grid(lines, True)


def hidden() -> dict:
    """{stream: {rows: {layers: scores of all questions}}} of causes.py hide."""
    nested = {}
    for r in read_json(RESULTS / "causes-hide.jsonl"):
        rows = nested.setdefault(r["stream"], {}).setdefault(r["rows"], {})
        rows[r["layers"]] = 100 * np.array(r["scores"])
    return nested


def hidden_table(stream: str, nested: dict) -> str:
    """What is lost where rows do not see the image, with 95% intervals over the questions."""
    layers, before = list(nested["question"]), nested["nothing"]["all"]
    lines = [[f"c. image hidden from, {stream}", *(f"layers {name}" for name in layers)]]
    lines.append(["nothing", show(before.mean()), *[""] * (len(layers) - 1)])
    for rows, cells in list(nested.items())[1:]:
        lines.append([rows])
        for name in layers:
            change = cells[name] - before
            half = 1.96 * change.std(ddof=1) / math.sqrt(len(change))
            low, high = change.mean() - half, change.mean() + half
            lines[-1].append(f"{change.mean():+.1f} [{low:+.1f}, {high:+.1f}]")
    return grid(lines, True)


def swapped() -> dict:
    """{stream: {way: {parts: accuracy of each seed}}} of causes.py swap."""
    nested = {}
    for r in read_json(RESULTS / "causes-swap.jsonl"):
        ways = nested.setdefault(r["stream"], {})
        ways.setdefault(r["way"], {}).setdefault(PARTS[r["parts"]], []).append(r["accuracy"])
    return nested


def swapped_table(nested: dict) -> str:
    """Accuracy on the first stage; parts put back as they were, or put forward as they became."""
    lines = [["d. parts", *(f"{way}, {s}" for s, ways in nested.items() for way in ways)]]
    for parts in next(iter(nested.values()))["put back"]:
        lines.append([parts])
        lines[-1] += [mean_std(cells[parts]) for ways in nested.values() for cells in ways.values()]
    return grid(lines, True)


def drift_table() -> str:
    """Pearson's r by the paper's definition (Eqs. 1-2), within a run and pooled over the seeds."""
    runs, lines = {}, [["drift, paper's definition", "r [95%] within a run", "pooled", "pairs"]]
    for r in read_json(RESULTS / "causes-drift.jsonl"):
        runs.setdefault(f"{r['row']}, {r['stream']}", []).append(np.array(r["pairs"], dtype=float))
    for name, pairs in runs.items():
        pairs = [p[np.isfinite(p).all(1)] for p in pairs]
        z = [np.arctanh(np.corrcoef(p.T)[0, 1]) for p in pairs]
        r, low, high = np.tanh(paired(z, [0] * len(z))[:3])
        pooled = np.concatenate(pairs)
        lines.append([name, f"{r:.2f} [{low:.2f}, {high:.2f}]"])
        lines[-1] += [f"{np.corrcoef(pooled.T)[0, 1]:.2f}", str(len(pooled))]
    return grid(lines, True)


def rates(results: dict) -> dict:
    """{metric: {label: (learning rates, values [seeds, rates])}} on domains, three seeds."""
    report, fast, more = (results[n]["domains"] for n in ("report", "report-drift", "asr-rates"))
    panels = {}
    for label, row in {"sequential": "sequential", "ASR": ASR}.items():
        points = {lr: more[f"{label}, lr {lr}"] for lr in ("5e-4", "1e-3")}
        points |= {"2e-3": report[row], "4e-3": more[f"{label}, lr 4e-3"], "1e-2": fast[row]}
        runs = shared(points)
        for name in ("AP", "AF"):
            values = [[r["metrics"][name] for r in cells.values()] for cells in runs.values()]
            panels.setdefault(name, {})[label] = list(map(float, runs)), np.array(values).T
    return panels


def rates_table(panels: dict) -> str:
    """Means at every rate, and the paired difference of the two."""
    lines = [["i. learning rate, domains", *(f"{lr:.0e}" for lr in panels["AP"]["ASR"][0])]]
    for name, curves in panels.items():
        both = [values for _, values in curves.values()]
        for label, values in zip(curves, both):
            lines.append([f"{label}, {name}", *map(show, values.mean(0))])
        pairs = [list(zip(b, a)) for a, b in zip(both[0].T, both[1].T)]
        lines.append([f"{name}, ASR - sequential", *map(difference, pairs)])
    return grid(lines, True)


def asr(results: dict) -> str:
    """All tables of the page."""
    groups = {title: shared(rows) for title, rows in comparisons(results).items()}
    texts = [table(title, rows) if rows else f"{title}: missing" for title, rows in groups.items()]
    texts += [hidden_table(stream, nested) for stream, nested in hidden().items()]
    more = [swapped_table(swapped()), rates_table(rates(results)), drift_table()]
    return "\n\n".join(texts + more)


def forest(groups: dict, path: Path) -> None:
    """AP and AF minus those of the first row, paired by seed, with 95% intervals; orange: not 0."""
    entries = [(title, row, rows) for title, rows in groups.items() for row in list(rows)[1:]]
    figure, axes = plot.new_figure(1, 2, 1 + 0.17 * len(entries), sharey=True)
    for axis, name in zip(axes[0], ("AP", "AF")):
        for k, (_, row, rows) in enumerate(entries):
            first = next(iter(rows.values()))
            values = [[r["metrics"][name] for r in cells.values()] for cells in (rows[row], first)]
            mean, low, high, _ = paired(*values)
            color = plot.COLORS[1 if low > 0 or high < 0 else 0]
            axis.plot([low, high], [k, k], color=color)
            axis.plot(mean, k, "o", color=color, markersize=4)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(f"{name} minus that of the first row")
    names = [f"{title[:2]} {row} ({title.split(', ')[-1]})" for title, row, _ in entries]
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.invert_yaxis()
    figure.savefig(path)


def figures(results: dict, folder: Path) -> None:
    """The figures of the page that come from these records."""
    groups = {title: shared(rows) for title, rows in comparisons(results).items()}
    groups = {title: rows for title, rows in groups.items() if rows}
    forest(
        {t: rows for t, rows in groups.items() if t[0] in "abfg"}, folder / "asr-differences.png"
    )
    panels = rates(results)
    steps = panels["AP"]["ASR"][0]
    axis = {"xscale": "log", "xticks": steps, "xticklabels": [f"{x:g}" for x in steps]}
    plot.lines(panels, "learning rate", "", folder / "asr-rates.png", **axis)
    columns = {"AP (%)": lambda r: r["metrics"]["AP"], "AF (points)": lambda r: r["metrics"]["AF"]}
    columns["drift (millinats)"] = moved
    held = {
        row: list(cells.values()) for row, cells in groups["e. q, k alone at 3e-3, domains"].items()
    }
    plot.bars(held, columns, folder / "asr-hold.png")
    columns["MFT (%)"] = lambda r: r["metrics"]["MFT"]
    del columns["drift (millinats)"]
    parts = {
        row: list(cells.values()) for row, cells in groups["d. trained layers, domains"].items()
    }
    plot.bars(parts, columns, folder / "asr-parts.png")
    layers, kept = ("all", "1 and 2", "3 and 4", "4"), {}
    for stream, nested in hidden().items():
        before = nested["nothing"]["all"].mean()
        kinds = list(nested)[1:]
        kept[f"{stream} (nothing hidden: {before:.1f})"] = np.array(
            [[nested[kind][name].mean() for name in layers] for kind in kinds]
        )
    labels = "image hidden from", "decoder layers", "accuracy (%)"
    plot.heat_maps(kept, (kinds, layers), labels, (0, 60), folder / "asr-hidden.png", 1)
