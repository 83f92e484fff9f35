"""The tables of results/run.py, in Markdown, from what its `load` returns.

A sweep is {stream: {row: {seed: record}}}, with None for a cell that has not been run. Numbers are
means over seeds. Differences between rows are paired by seed and have a 95% t interval.
"""

import json
import math
from pathlib import Path

import asr_page
import numpy as np

import plot
from eval import compared, difference, grid, mean_std, paired, show

RESULTS = Path(__file__).parent
OURS = "experts + LDA (ours)"
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
    full = record.get("per_rank", math.nan) * args["rank"] * T  # cram.py: a LoRA of rank r per task
    energy = [share for share in record.get("energy", []) if share is not None]
    kept = dict.fromkeys(KEEP_NOTHING, 0) | {"replay": args.get("buffer")}  # by method, or script
    kept = kept.get(args.get("method", record["script"]), math.nan)
    if "--buffer " in record.get("command", ""):  # any baseline
        kept = args["buffer"]
    if record["script"] == "mllm_cl" and args["router"] != "oracle":
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
    return [values[name] for values in runs.values()]


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
            texts.append(columns_table("after the last stage", runs, records[0]["stages"], mean))
    return "\n\n".join(texts)


def columns_table(title: str, runs: dict, names, form) -> str:
    """A line per row; columns without any number are left out."""
    columns = {name: [form(column(cells, name)) for cells in runs.values()] for name in names}
    columns = {name: cells for name, cells in columns.items() if set(cells) != {"-"}}
    return grid([[title, *columns], *zip(runs, *columns.values())], True)


def choice(results: dict) -> str:
    """All methods on seven streams: AP; then means over the streams, each with the same weight.

    Seeds are those that all rows of a stream have; time is relative to sequential LoRA.
    """
    streams = {}  # stream -> {row: {seed: numbers}}
    for stream, rows in results["all"].items():
        rows = results["all-baselines"][stream] | rows | {OURS: ours(results)[stream]}
        rows["joint"] = rows.pop("joint")  # last
        runs = {row: finished(cells) for row, cells in rows.items()}
        having = [set(cells) for cells in runs.values() if cells]
        seeds = sorted(set(runs["sequential"]).intersection(*having))
        for row, cells in runs.items():
            runs[row] = {seed: cells[seed] for seed in seeds if cells}
            for seed, values in runs[row].items():
                values["time"] = values["seconds"] / runs["sequential"][seed]["seconds"]
        for values in runs[OURS].values():  # another machine than that of the other rows
            values["time"] = time_of(results, stream)
        streams[stream] = runs
    names = ("AP", "MFT", "AF", "stored (1000)", "kept samples", "time")
    first, second = [["AP", *streams]], [["mean over streams", *names]]
    for row in rows:
        cells = [runs[row] for runs in streams.values()]
        first.append([row, *(mean(column(x, "AP")) for x in cells)])
        means = [[np.mean(column(x, name)) for x in cells if x] for name in names]
        second.append([row, *(mean(x if all(cells) else []) for x in means)])
    first.append(["seeds", *(", ".join(map(str, x["sequential"])) for x in streams.values())])
    return f"{grid(first, True)}\n\n{grid(second, True)}"


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
    asr_page.figures(results, path)
    return str(path)


def ours(results: dict) -> dict:
    """{stream: {seed: record}} of the row "experts + LDA (ours)", as search-start has chosen it."""
    starts, more = results["experts-start"], results["experts-more"]
    return {stream: rows["mean"] | more[stream]["mean"] for stream, rows in starts.items()}


def time_of(results: dict, stream: str) -> float:
    """Time of the row "experts + LDA (ours)" relative to sequential LoRA on the same machine."""
    rows = results["experts-more"][stream]
    pairs = zip(rows["mean"].values(), rows["sequential"].values())
    return np.mean([a["seconds"] / b["seconds"] for a, b in pairs if a and b] or math.nan)


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
    table = [[f"{OURS} minus", "seeds", "AP", "AF"]]
    chosen = per_seed(ours(results).values())
    for sweep in ("all", "all-baselines"):
        for row in next(iter(results[sweep].values())):
            if sweep != "all" and row in results["all"]["dcl"]:
                continue
            other = per_seed(rows[row] for rows in results[sweep].values())
            seeds = sorted(set(chosen).intersection(other))
            pairs = [list(zip(chosen[seed], other[seed])) for seed in seeds]
            table.append([row, str(len(seeds)), *map(difference, zip(*pairs))])
    rows = results["experts-start"].values()
    means = {row: per_seed(cells[row] for cells in rows) for row in next(iter(rows))}
    starts = [(means["mean"][seed][0], fresh[0]) for seed, fresh in means["fresh"].items()]
    lines = [[f"{OURS} minus MR-LoRA", "seeds", "AP"]]
    for stream, cells in ours(results).items():
        theirs = finished(results["all"][stream]["MR-LoRA"])
        both = [(r["AP"], theirs[s]["AP"]) for s, r in finished(cells).items() if s in theirs]
        lines.append([stream, str(len(both)), difference(both)])
    theirs = per_seed(cells["MR-LoRA"] for cells in results["all"].values())
    later = [(chosen[s][0], theirs[s][0]) for s in (3, 4) if s in chosen and s in theirs]
    lines.append(["mean, seeds 3 and 4 alone", str(len(later)), difference(later)])
    lines.append(["start: mean minus fresh", str(len(starts)), difference(starts)])
    texts.append(grid(lines, True))
    times = [time_of(results, stream) for stream in results["experts-more"]]
    time = f"Time: {np.mean(times):.2f} of that of sequential LoRA on the same machine."
    return "\n\n".join([*texts, grid(table, True), time])


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
    anew, on = (per_seed(rows[row] for rows in both.values()) for row in ("anew", GOES_ON))
    seeds = sorted(set(anew).intersection(on))
    pairs = [list(zip(on[seed], anew[seed])) for seed in seeds]
    ap, af = map(difference, zip(*pairs))
    return f"{grid(table, True)}\n\nSeeds {seeds}: AP {ap}, AF {af}."


def per_seed(streams) -> dict[int, tuple[float, float]]:
    """{seed: (AP, AF)}, means over all streams, of the seeds that every stream has."""
    runs = [finished(cells) for cells in streams]
    return {
        seed: tuple(np.mean([values[seed][name] for values in runs]) for name in ("AP", "AF"))
        for seed in set.intersection(*map(set, runs))
    }


TABLES = {"choice": choice, "beside": beside, "drift": drift, "experts": experts}
TABLES |= {"asr": asr_page.asr, "routers": router, "figures": figures}
