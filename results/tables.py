"""The tables of results/run.py, in Markdown, from what its `load` returns.

A sweep is {stream: {row: {seed: record}}}, with None for a cell that has not been run. Numbers are
means over seeds. Differences between rows are paired by seed and have a 95% t interval.
"""

import json
import math
import re
from pathlib import Path

import asr_page
import numpy as np
from matplotlib.transforms import Bbox

import plot
from eval import compared, difference, grid, mean_std, paired, show
from files import InputError

RESULTS = Path(__file__).parent
OURS = "experts + LDA (ours)"
PAPERS = ("ASR", "CRAM", "MR-LoRA")
MEANS = ("AP", "MFT", "AF", "stored (1000)", "kept samples", "time")
GOES_ON = "MR-LoRA, router goes on"
KEEP_NOTHING = """asr cram mllm_cl experts zeroshot sequential ewc lwf olora moelora hide disco
    reglora clmoe smolora""".split()


def details(record: dict) -> dict[str, float | None]:
    """What a record has beside the usual metrics, by the name of its column."""
    args, T = record["args"], len(record["stages"])
    routed, stored = record.get("routing_accuracy", {}), record.get("stored_parameters", math.nan)
    if isinstance(routed, list):  # mllm_cl.py: after every stage
        routed = {"expert": routed[-1]}
    stored = stored[-1] if isinstance(stored, list) else stored
    # cram.py: a LoRA of rank r per task
    full = record.get("per_rank", math.nan) * args.get("rank", math.nan) * T
    energy = [share for share in record.get("energy", []) if share is not None]
    kept = dict.fromkeys(KEEP_NOTHING, 0) | {"replay": args.get("buffer")}  # by method, or script
    kept = kept.get(args.get("method", record["script"]), math.nan)
    if re.search("--buffer[ =]", record.get("command", "")):  # any baseline
        kept = args["buffer"]
    if record["script"] == "mllm_cl" and args["router"] in ("mllm", "generate"):
        kept = args["shots"]
    return {
        "MFT": record["metrics"]["MFT"],
        "right group (%)": routed.get("group"),
        "right expert (%)": routed.get("expert"),
        "older experts' weight (%)": 100 * np.mean(record.get("old_experts_weight", math.nan)),
        "energy in older outputs (%)": 100 * np.mean(energy or math.nan),
        "stored (1000)": stored / 1e3,
        "of one LoRA per task (%)": 100 * stored / full,
        "kept samples": kept * (T - 1),
        "answers": record.get("cost", {}).get("generations"),
        "seconds": record["seconds"],
        "MB": record["peak_memory_mb"],
    }


def numbers(record: dict) -> dict[str, float]:
    """All numbers of a record: metrics, details, scores after the last stage; nan where missing."""
    values = record["metrics"] | details(record)
    values |= dict(zip(record["stages"], record["matrix"][-1]))
    points = [pair for pair in record.get("drift", {}).values() if None not in pair]
    if points:  # do skills whose spectra drift lose accuracy? Fisher's z of their correlation
        values["drift"] = np.arctanh(np.corrcoef(*zip(*points))[0, 1])
    return {name: math.nan if value is None else value for name, value in values.items()}


def finished(cells: dict) -> dict[int, dict]:
    """{seed: numbers} of a row's cells that have been run."""
    return {seed: numbers(record) for seed, record in cells.items() if record}


def column(runs: dict, name: str) -> list[float]:
    return [values.get(name, math.nan) for values in runs.values()]


def mean(values: list) -> str:
    return show(np.mean(values)) if values else "missing"


def sweep_tables(name: str, sweep: dict) -> str:
    """Per stream: metrics, with differences to the first row; details; scores of all tasks."""
    texts = []
    for stream, rows in sweep.items():
        runs, first = {row: finished(cells) for row, cells in rows.items()}, next(iter(rows))
        table = [["row", "seeds", "AP", f"AP - {first}", "AF", f"AF - {first}", "Avg", "BWT"]]
        for row, cells in rows.items():
            missing = ", ".join(str(seed) for seed in cells if seed not in runs[row])
            seeds = f"{len(runs[row])} (missing {missing})" if missing else str(len(cells))
            scores = compared(runs[row], runs[first], ("AP", "AF", "Avg", "BWT"))
            table.append([row, seeds, *scores])
        texts += [f"{name}, `--stream {stream}`:", grid(table, True)]
        records = [record for cells in rows.values() for record in cells.values() if record]
        if records:
            texts.append(columns_table("row", runs, details(records[0]), mean_std))
            stages = dict.fromkeys(stage for record in records for stage in record["stages"])
            texts.append(columns_table("after the last stage", runs, stages, mean))
    return "\n\n".join(texts)


def columns_table(title: str, runs: dict, names, form) -> str:
    """A line per row; columns without any number are left out."""
    columns = {name: [form(column(cells, name)) for cells in runs.values()] for name in names}
    columns = {name: cells for name, cells in columns.items() if set(cells) != {"-"}}
    return grid([[title, *columns], *zip(runs, *columns.values())], True)


def processor(record: dict) -> tuple:
    """What two runs must share if their times are compared; records of before 27 November 2026
    have no processor, and are compared with one another."""
    return record.get("versions", {}).get("cpu", "unknown"), record["threads"]


def methods(results: dict) -> dict:
    """{row: {stream: {seed: numbers}}} of all methods, joint training last. "time" is relative to
    sequential LoRA on the same stream, seed and processor, nan where that was not run."""
    rows = {}
    for stream, ours in results["all"].items():
        others = results["all-baselines"][stream]
        plain = [*others["sequential"].values(), *ours["sequential"].values()]
        pace = {(r["seed"], *processor(r)): r["seconds"] for r in plain if r}
        for row, cells in (others | ours).items():
            runs = rows.setdefault(row, {})[stream] = finished(cells)
            for seed, values in runs.items():
                usual = pace.get((seed, *processor(cells[seed])), math.nan)
                values["time"] = values["seconds"] / usual
    rows["joint"] = rows.pop("joint")
    return rows


def shared_means(rows: dict) -> tuple[dict, dict]:
    """{stream: seeds that all rows have that were run on it}, and {row: {name: means over these
    seeds, one per stream}}; nan where a row was not run."""
    streams, means = next(iter(rows.values())), {}
    having = {x: [set(runs[x]) for runs in rows.values() if runs[x]] for x in streams}
    seeds = {x: set.intersection(*some) if some else set() for x, some in having.items()}
    for row, runs in rows.items():
        cells = [[runs[x][seed] for seed in seeds[x] if seed in runs[x]] for x in streams]
        means[row] = {name: [mean_of(some, name) for some in cells] for name in MEANS}
    return seeds, means


def mean_of(cells: list[dict], name: str) -> float:
    numbers = [values[name] for values in cells if not math.isnan(values[name])]
    return float(np.mean(numbers)) if numbers else math.nan


def choice(results: dict) -> str:
    """All methods on seven streams. AP; means over the streams, each with the same weight, on the
    seeds that all rows have; differences to sequential LoRA, paired over all seeds of a method,
    with the number of streams whose interval lies above or below zero; the commits."""
    rows = methods(results)
    seeds, means = shared_means(rows)
    gains = {row: gain(runs, rows["sequential"]) for row, runs in rows.items()}
    first, second = [["AP", *seeds]], [["mean over streams", "AP", "AP - sequential", *MEANS[1:]]]
    second[0].insert(3, "above, below 0")
    for row, values in means.items():
        first.append([row, *map(show, values["AP"])])
        ap, *others = (show(np.mean(values[name])) for name in MEANS)
        second.append([row, ap, *gains[row][0], *others])
    first.append(["seeds", *(", ".join(map(str, sorted(seeds[x]))) for x in seeds)])
    columns = [row for row in next(iter(results["all"].values())) if row != "sequential"]
    third = [["AP - sequential", *columns]]
    for k, stream in enumerate(seeds):
        third.append([stream, *(gains[row][1][k] for row in columns)])
    texts = [grid(table, True) for table in (first, second, third)]
    return "\n\n".join([*texts, commits(results, "all", "all-baselines")])


def gain(runs: dict, plain: dict) -> tuple[list[str], list[str]]:
    """AP - sequential of a method: of the mean over streams, with the number of streams where the
    interval lies above and below zero; and by stream. Intervals are over seeds."""
    pairs = [
        [(r["AP"], plain[x][s]["AP"]) for s, r in runs[x].items() if s in plain[x]] for x in runs
    ]
    spans = [paired(*zip(*some))[1:3] for some in pairs if some]
    counts = f"{sum(low > 0 for low, _ in spans)}, {sum(high < 0 for _, high in spans)}"
    whole = minus(per_seed(runs.values()), per_seed(plain.values()))
    if runs is plain:
        whole = counts = ""
    return [whole, counts], [*map(difference, pairs)]


def commits(results: dict, *names: str) -> str:
    """Which code made the records of these sweeps; +: edited files, or more than one commit."""
    made = {}
    for name in names:
        for rows in results[name].values():
            for row, cells in rows.items():
                for record in filter(None, cells.values()):
                    commit = record["commit"][:7] + "+" * (len(record["commit"]) > 40)
                    made.setdefault(commit, {})[row] = None
    return "Commits: " + "; ".join(f"{commit} ({', '.join(made[commit])})" for commit in made)


def best(results: dict) -> str:
    """README's table: sequential LoRA and joint training, the papers' methods and the six best by
    AP; the best value of a column in bold, the second in italics, joint training aside."""
    _, means = shared_means(methods(results))
    means = {row: {name: np.mean(x) for name, x in v.items()} for row, v in means.items()}
    order = sorted(means, key=lambda row: -means[row]["AP"])
    ranked = [row for row in order if row not in ("sequential", "joint")]
    if any(math.isnan(values["AP"]) for values in means.values()):
        raise InputError("cells are missing: run the sweeps all and all-baselines first")
    chosen = {"sequential", *ranked[:6], *PAPERS}
    table = [["mean over streams", *MEANS]]
    for row in ["joint", *(row for row in order if row in chosen)]:
        table.append([row, *(show(means[row][name]) for name in MEANS)])
    for k, sign in enumerate((-1, -1, 1), 1):
        cells = [line for line in table[2:] if line[k] != "-"]
        values = sorted({sign * float(line[k]) for line in cells})
        for line in cells:
            rank = values.index(sign * float(line[k]))
            line[k] = f"**{line[k]}**" if rank == 0 else f"*{line[k]}*" if rank == 1 else line[k]
    return grid(table, True)


def again(records: dict, new: dict) -> str:
    """How far runs are from their records, by (sweep, row, stream, seed): equal in every cell of
    the matrix; inside, if AP has moved by less than the half width of the 95% interval of AP over
    the seeds of the row; outside; or not equal and no interval, as the row has a single seed."""
    table = [["sweep", "row", "stream", "seed", "AP", "again", "half width", "processor", ""]]
    for key, run in new.items():
        was, (name, row, stream, _) = records[key], key
        row_of = [r for k, r in records.items() if k[:3] == (name, row, stream)]
        values = [r["metrics"]["AP"] for r in row_of]
        half = paired(values, [0] * len(values))[2] - np.mean(values)
        before, now = was["metrics"]["AP"], run["metrics"]["AP"]
        same = np.array_equal(*(np.array(r["matrix"], float) for r in (was, run)), equal_nan=True)
        word = "inside" if abs(now - before) <= half else "outside"
        word = "equal" if same else "no interval" if math.isnan(half) else word
        cpu = "same" if processor(was) == processor(run) else "another or unknown"
        table.append([*map(str, key), show(before), show(now), show(half), cpu, word])
    words = [line[-1] for line in table[1:]]
    kinds = ("equal", "inside", "outside", "no interval")
    counts = ", ".join(f"{words.count(word)} {word}" for word in kinds)
    return f"{grid(table, True)}\n\n{counts}"


def beside(results: dict) -> str:
    """The papers' numbers, quoted in published.json, and ours on the mini stream of that name."""
    texts = []
    for quoted in json.loads((RESULTS / "published.json").read_text()):
        table = [[quoted["title"], *quoted["columns"]]]
        for row in quoted["rows"]:
            if "published" in row:
                table.append([f"{row['name']}: published", *row["published"]])
            if "sweep" in row:
                runs = finished(results[row["sweep"]][row["stream"]][row["row"]])
                ours = [mean(column(runs, key)) for key in quoted["columns"]]
                table.append([f"{row['name']}: ours", *ours])
        texts += [f"Published: {quoted['source']}", grid(table, True)]
    return "\n\n".join(texts)


def drift(results: dict) -> str:
    """Does a skill whose spectrum drifts lose accuracy? Pearson's r over the skills of a run, as z
    averaged over the rows of a seed, then over seeds; with L_spec, and with L_geo alone."""
    table = [["r [95%]", "with L_spec", "L_geo alone"]]
    for name in ("report", "report-drift"):
        for stream, rows in results[name].items():
            table.append([f"{name}, {stream}"])
            for start in (("spectral", "both"), ("geometry",)):
                runs = [finished(cells) for row, cells in rows.items() if row.startswith(start)]
                seeds = set.intersection(*map(set, runs))
                z = [np.mean([cells[seed]["drift"] for cells in runs]) for seed in sorted(seeds)]
                r, low, high = np.tanh(paired(z, [0] * len(z))[:3])
                table[-1].append(f"{r:.2f} [{low:.2f}, {high:.2f}]" if seeds else "missing")
    return grid(table, True)


def figures(results: dict) -> str:
    """Draw the pictures of README and docs that come from records alone; the folder."""
    path = RESULTS.parent / "docs" / "figures"
    rows = {"sequential LoRA": "sequential", "CRAM": "CRAM"}
    cells = {label: results["cram"]["ucit"][row] for label, row in rows.items()}
    groups = {
        label: [record for record in runs.values() if record] for label, runs in cells.items()
    }
    plot.two_matrices(groups, path / "matrices.png")
    panels, x, y = [], "drift (JSD, nats)", "forgotten (points)"
    for sweep, stream in (("report", "domains"), ("report", "vqacl"), ("report-drift", "domains")):
        dots = {"with L_spec": [], "geometry only": []}
        for record in (r for runs in results[sweep][stream].values() for r in runs.values() if r):
            name = "with L_spec" if record["args"].get("beta") else "geometry only"
            dots[name] += record.get("drift", {}).values()
        dots = {name: np.array(pairs, dtype=float).T for name, pairs in dots.items()}
        panels.append((f"{sweep}: {stream}", x, y, dots))
    plot.scatter(panels, path / "asr-drift.png", "log")
    rows, _ = by_stream(results["experts-router"], "right expert (%)")
    names = list(rows), list(results["experts-router"])
    labels = "router", "", "right expert (%)"
    panels = {"Routers without training, pretrained model": np.array(list(rows.values()))}
    plot.heat_maps(panels, names, labels, (0, 100), path / "experts-routers.png")
    methods_figure(results, path / "methods.png")
    asr_page.figures(results, path)
    return str(path)


def methods_figure(results: dict, path: Path) -> None:
    """AP against AF, a dot per method, whose area shows the parameters stored."""
    _, means = shared_means(methods(results))
    figure, axes = plot.new_figure(height=5.0)
    axis, names, dots = axes[0, 0], ("AF", "AP", "stored (1000)"), []
    for row, values in means.items():
        af, ap, stored = (np.mean(values[name]) for name in names)
        if math.isnan(af):  # tested once: no forgetting
            place = (1, ap), (-4, 2), ("axes fraction", "data"), "offset points"
            axis.axhline(ap, color="gray", linestyle=":")
            axis.annotate(row, *place, ha="right")
        else:
            axis.scatter(af, ap, stored / 2, plot.COLORS[len(dots) % 7], alpha=0.5)
            dots.append((row.replace(", ", ",\n"), (af, ap)))
    axis.margins(x=0.25)
    axis.set(xlabel="AF (points): less is better", ylabel="AP (%): more is better")
    for _ in range(2):  # the second time, the layout has settled
        figure.draw_without_rendering()
    taken = []  # labels keep clear of dots and of one another
    for dot in axis.collections:
        x, y = axis.transData.transform(dot.get_offsets()[0])
        half = math.sqrt(dot.get_sizes()[0] / math.pi) * figure.dpi / 72 * 0.8
        taken.append(Bbox([[x - half, y - half], [x + half, y + half]]))
    sides = [(x, y, "left" if x > 0 else "right") for y in (4, -13, 14, -26) for x in (11, -11)]
    for row, dot in dots:
        for x, y, align in sides:
            label = axis.annotate(row, dot, (x, y), textcoords="offset points", ha=align)
            box = label.get_window_extent()
            if box.x0 > axis.bbox.x0 and not any(box.overlaps(other) for other in taken):
                break
            label.remove()
        else:  # no room: any side
            box = axis.annotate(row, dot, (9, 6), textcoords="offset points").get_window_extent()
        taken.append(box)
    figure.savefig(path)


def by_stream(sweep: dict, name: str) -> tuple[dict, list[int]]:
    """{row: a number per stream, mean over the seeds that all rows have}, numbers of seeds."""
    rows, counts = {}, []
    for cells in sweep.values():
        runs = {row: finished(seeds) for row, seeds in cells.items()}
        shared = sorted(set.intersection(*map(set, runs.values())))
        for row, values in runs.items():
            number = np.mean([values[seed][name] for seed in shared]) if shared else math.nan
            rows.setdefault(row, []).append(number)
        counts.append(len(shared))
    return rows, counts


def experts(results: dict) -> str:
    """experts.py: how an expert begins, on the seeds that chose and on others; how well routers do
    without experts; and the difference of the chosen row to others, means over seven streams."""
    texts = []
    for sweep in ("search-start", "experts-start", "experts-router"):
        name = "right expert (%)" if "router" in sweep else "AP"
        rows, counts = by_stream(results[sweep], name)
        table = [[f"{sweep}, {name}", *results[sweep], "mean"]]
        table += [[row, *map(show, [*values, np.mean(values)])] for row, values in rows.items()]
        texts.append(grid([*table, ["seeds", *map(str, counts), ""]], True))
    rows = methods(results)
    lines = [[f"{OURS} minus MR-LoRA", "seeds", "AP"]]
    for stream, runs in rows[OURS].items():
        ours, theirs = per_seed([runs]), per_seed([rows["MR-LoRA"][stream]])
        lines.append([stream, *counted_minus(ours, theirs)])
    chosen, theirs = per_seed(rows[OURS].values()), per_seed(rows["MR-LoRA"].values())
    later = {seed: chosen[seed] for seed in (3, 4) if seed in chosen}
    lines.append(["mean, seeds 3 and 4 alone", *counted_minus(later, theirs)])
    starts = results["experts-start"].values()
    warm, fresh = (per_seed(finished(x[row]) for x in starts) for row in ("mean", "fresh"))
    lines.append(["start: mean minus fresh", *counted_minus(warm, fresh)])
    table = [[f"{OURS} minus", "seeds", "AP", "AF"]]
    for row in (row for row in rows if row != OURS):
        other = per_seed(rows[row].values())
        table.append([row, *counted_minus(chosen, other), minus(chosen, other, 1)])
    return "\n\n".join([*texts, grid(lines, True), grid(table, True)])


def router(results: dict) -> str:
    """MR-LoRA's routers, trained anew after every stage (sweep all) or going on: means over the
    seeds that both have, and the seconds of training routers and routing by those of training
    experts; below, paired by seed, the difference of the means over the streams."""
    both = {
        stream: {"anew": results["all"][stream]["MR-LoRA"], GOES_ON: rows[GOES_ON]}
        for stream, rows in results["router"].items()
    }
    table = [["MR-LoRA", *both, "mean"]]
    for name in ("AP", "right expert (%)"):
        for row, values in by_stream(both, name)[0].items():
            table.append([f"{name}, {row}", *map(show, [*values, np.mean(values)])])
    for row in ("anew", GOES_ON):
        runs = [[r["seconds_by_part"] for r in rows[row].values() if r] for rows in both.values()]
        times = [[(x["router"] + x["routing"]) / x["expert"] for x in parts] for parts in runs]
        values = [np.mean(x or math.nan) for x in times]
        table.append([f"router / experts, {row}", *map(show, [*values, np.mean(values)])])
    anew, on = (
        per_seed(finished(rows[row]) for rows in both.values()) for row in ("anew", GOES_ON)
    )
    seeds, ap, af = sorted(set(anew).intersection(on)), minus(on, anew), minus(on, anew, 1)
    return f"{grid(table, True)}\n\nSeeds {seeds}: AP {ap}, AF {af}."


def per_seed(streams) -> dict[int, tuple[float, float]]:
    """{seed: (AP, AF)}, means over all streams {seed: numbers}, of the seeds that every one has."""
    streams = list(streams)
    return {
        seed: tuple(np.mean([runs[seed][name] for runs in streams]) for name in ("AP", "AF"))
        for seed in set.intersection(*map(set, streams))
    }


def minus(a: dict, b: dict, k: int = 0) -> str:
    """Difference of the k-th numbers of {seed: numbers}, paired by seed."""
    return difference([(a[seed][k], b[seed][k]) for seed in a if seed in b])


def counted_minus(a: dict, b: dict) -> tuple[str, str]:
    """How many seeds both have, and the difference of their AP."""
    return str(len(set(a).intersection(b))), minus(a, b)


TABLES = {"choice": choice, "best": best, "beside": beside, "drift": drift, "experts": experts}
TABLES |= {"asr": asr_page.asr, "routers": router, "figures": figures}
