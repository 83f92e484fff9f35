"""The sweeps of results/run.py: rows (a label and a command), streams and seeds.

Braces in a command depend on the stream: {lr}, {twice}, {experts}, and those of ALL.
"""

import re
import shlex
from pathlib import Path
from typing import NamedTuple


class Sweep(NamedTuple):
    """Every row is run on every stream with every seed."""

    streams: list[str]
    seeds: list[int]
    rows: dict[str, str]  # {label: command}
    flags: str = ""  # added to every command
    threads: str = "--threads 1"
    records: Path = Path(__file__).resolve().parent  # of NAME.jsonl
    runs: Path = Path("runs/sweep")  # of NAME/ with the run folders


def vary(label: str, command: str, values) -> dict[str, str]:
    """A row per value; label and command end with it."""
    return {f"{label} {value}".strip(): f"{command} {value}" for value in values}


# {lr}: sequential LoRA's best on the whole stream, by AP (sweeps rate-cram and rate-mr-lora)
LR = {"ucit": "2e-3", "trigap": "1e-3", "dcl": "1e-3", "acl": "5e-4"}
TWICE = {"domains": "4e-3", "vqacl": "1e-3"}  # {twice}: two times the default learning rate
FIRST = {"domains": "plain", "vqacl": "recognition"}  # {first}: the first stage
# The other braces belong to the sweeps of all methods on seven streams, of which five are cut to 30
# steps per stage (coin, ucit, trigap: in three epochs). Learning rates were chosen on seed 5, which
# is not reported (sweep rate-all): {shared} for methods in which a question passes through all
# that was learned, {chosen} for methods that choose among adapters, {joint} for joint training.
# Ten stages of questions keep the ten passes of MR-LoRA's router that search-router had.
BRACES = ("cut", "shared", "chosen", "joint", "router")
LONG, SHORT = "--limit 480 --limit_test 40", "--limit 160 --limit_test 40"
ALL = {
    "vqacl": (LONG, "1e-3", "4e-3", "4e-3", "--router_epochs 10"),
    "clt-vqa": (LONG, "1e-3", "4e-3", "2e-3", "--router_epochs 10"),
    "coin": (SHORT, "5e-4", "4e-3", "4e-3", ""),
    "ucit": (SHORT, "2e-3", "4e-3", "4e-3", ""),
    "trigap": (SHORT, "5e-4", "4e-3", "2e-3", ""),
    "dcl": ("", "1e-3", "2e-3", "2e-3", ""),
    "acl": ("", "5e-4", "2e-3", "2e-3", ""),
}
CUT = ["vqacl", "clt-vqa", "coin", "ucit", "trigap"]

RATES, SKILLS = ("2.5e-4", "5e-4", "1e-3", "2e-3", "4e-3"), ("stream", "parser", "shared")
# The settings of before both became faster: prototypes of all samples, longer training of routers.
ASR = "asr.py --prototype_samples inf"
MR = "mllm_cl.py --router_epochs 10 --router_batch 16"
SEQUENTIAL, JOINT = "baselines.py --method sequential", "baselines.py --method joint"
REPLAY, ZERO_SHOT = "baselines.py --method replay", "baselines.py --method zeroshot"
EWC = "baselines.py --method ewc --lr {shared}"
LWF = "baselines.py --method lwf --lr {shared}"
OLORA = "baselines.py --method olora --lr {shared} --olora_lambda"
# MoELoRA's eight gates begin even, so its first updates would be an eighth of a plain LoRA's.
MOELORA = "baselines.py --method moelora --lr {shared} --alpha"
HIDE = "baselines.py --method hide --lr {chosen} --hide_temperature"
DISCO = "baselines.py --method disco --lr"
REGLORA = "baselines.py --method reglora --lr {shared} --reglora_lambda"
CLMOE = "baselines.py --method clmoe --lr {shared} --alpha"
SMOLORA = "baselines.py --method smolora --lr {shared} --alpha"
EXPERTS = "experts.py --lr 4e-3"  # the best of sweep rate-experts for experts that begin as a mean
LIKE_CRAM = "--targets q,k,v,o --rank 9 --alpha 18"  # layers and rank of CRAM's experts
ORACLE = "one LoRA per task, task known"

METHODS = {
    "sequential": f"{SEQUENTIAL} --lr {{shared}}",
    "ASR": "asr.py --lr {shared}",
    "CRAM": "cram.py --lr {chosen}",
    "MR-LoRA": "mllm_cl.py --lr {chosen} {router}",
    "replay": f"{REPLAY} --lr {{shared}}",
    "experts + LDA (ours)": f"{EXPERTS} --start mean",  # search-start chose it
    "joint": f"{JOINT} --lr {{joint}}",
}
REORDERED = ("sequential", "ASR", "CRAM", "experts + LDA (ours)")
VQACL_ORDERS = {row: METHODS[row] for row in REORDERED}
ORDERS = VQACL_ORDERS | {"MR-LoRA": METHODS["MR-LoRA"]}  # ten routers of vqacl take long
BASELINES = {
    "sequential": METHODS["sequential"],
    "zero-shot": ZERO_SHOT,
    "EWC": EWC,
    "LwF": LWF,
    "O-LoRA": f"{OLORA} 0.05",
    "MoELoRA": f"{MOELORA} 256",
    "HiDe": f"{HIDE} 0.03 --hide_sum 2",
    "DISCO": f"{DISCO} {{chosen}}",
    "RegLoRA": f"{REGLORA} 250",
    "CL-MoE": f"{CLMOE} 256",
    "SMoLoRA": f"{SMOLORA} 256",
    "MR-LoRA, prototype router": "mllm_cl.py --lr {chosen} --router prototype",
}
BASELINE_SEARCH = (
    {"sequential": METHODS["sequential"]}
    | vary("EWC, lambda", f"{EWC} --ewc_lambda", (1, 10, 100, 1000))
    | vary("LwF, lambda", f"{LWF} --lwf_lambda", (0.25, 1, 4))
    | vary("O-LoRA, lambda", OLORA, (0.05, 0.5))
    | vary("MoELoRA, alpha", MOELORA, (32, 256))
    | vary("HiDe, T 0.03, W", f"{HIDE} 0.03 --hide_sum", (1, 2, 4, "inf"))
    | vary("HiDe, T 0.1, W", f"{HIDE} 0.1 --hide_sum", (2, "inf"))
    | vary("DISCO, lr", DISCO, ("{shared}", "{chosen}"))
    | vary("RegLoRA, lambda", REGLORA, (25, 250, 2500))
    | vary("CL-MoE, alpha", CLMOE, (32, 256))
    | vary("SMoLoRA, alpha", SMOLORA, (32, 256))
)
RATE_SEARCH = (
    vary("sequential, lr", f"{SEQUENTIAL} --lr", RATES[1:])
    | vary(f"{ORACLE}, lr", f"{MR} --router oracle --lr", RATES[1:])
    | vary("joint, lr", f"{JOINT} --lr", RATES[1:])
)
# experts.py: rates for experts that begin as a mean (seed 5), then beginnings (seeds 5 to 7), both
# reported on others; routers without experts
WARM_SEARCH = vary("mean, lr", "experts.py --start mean --lr", RATES[2:])
STARTS = vary("", f"{EXPERTS} --start", ("fresh", "last", "mean", "alike"))
CONTENDERS = {row: STARTS[row] for row in ("fresh", "mean", "alike")}
ROUTERS = vary("LDA,", "experts.py --features", ("both", "image", "question", "last"))
ROUTERS["cosine, both"] = "experts.py --router cosine"
UNTRAINED = "{cut} --untrained --start fresh --max_new_tokens 1"
# On dcl and acl, methods that choose among adapters have 2e-3, not the 4e-3 of experts.py
FASTER = {
    "MR-LoRA, lr 4e-3": "mllm_cl.py --lr 4e-3",
    "MR-LoRA, prototype router, lr 4e-3": "mllm_cl.py --lr 4e-3 --router prototype",
    "DISCO, lr 4e-3": f"{DISCO} 4e-3",
}
# N, rate and batch were chosen on seed 5
ROUTER = f"{MR} --lr {{chosen}} --router_steps 60 --router_lr 2e-3 --router_batch 4"
ROUTER = {"MR-LoRA, router goes on": ROUTER}
PASSES = {"10 passes, batches of 16": MR}
PASSES["5 passes, batches of 4"] = "mllm_cl.py --router_epochs 5 --router_batch 4"
ROUTER_SEARCH = vary("steps of", f"{MR} --lr {{chosen}} --router_batch", (16, 4))

# without L_geo, for every kind of skills; then at ten times the paper's weight
ASR_SEARCH = {"sequential": SEQUENTIAL} | vary("", f"{ASR} --gamma 0 --skills", SKILLS)
ASR_SEARCH["shared, beta 5, w = 1"] = f"{ASR} --gamma 0 --skills shared --tau inf --beta 5"
# the four rows of the paper's ablation, for every kind of skills
ASR_REPORT = {"sequential": SEQUENTIAL, "geometry only": f"{ASR} --beta 0"}
ASR_REPORT |= vary("spectral only,", f"{ASR} --gamma 0 --skills", SKILLS)
ASR_REPORT |= vary("both,", f"{ASR} --skills", SKILLS)

# What docs/asr.md asks: does the published variant work, which layers forget, is forgetting drift,
# does a mean need no spread, can L_geo act, is a gain at 1e-2 more than damping, at which rates?
ASR_PUBLISHED = {"ASR as published": f"{ASR} --published"}
ASR_PARTS = {"q": "q", "q, k": "q,k", "v": "v", "projector": "projector"}
ASR_PARTS |= {"feed-forward": "gate,up,down", "all": "q,k,v,o,gate,up,down,projector"}
ASR_PARTS = {row: f"{SEQUENTIAL} --targets {targets}" for row, targets in ASR_PARTS.items()}
ASR_SWAP = {"all parts": SEQUENTIAL, "first stage alone": f"{SEQUENTIAL} --order {{first}}"}
OBSERVED = f"{ASR} --beta 0 --gamma 0"  # sequential LoRA whose spectra are recorded
LOSSES = {"sequential": OBSERVED, "L_spec": f"{ASR} --gamma 0"}
LOSSES["L_spec, means"] = f"{ASR} --gamma 0 --beta 1 --match mean"
ASR_MATCH = {"sequential": OBSERVED, "ASR": ASR}
ASR_MATCH["ASR, means (ours)"] = f"{ASR} --match mean --beta 1"  # fixed before seeds 30 to 34 ran
ASR_GEOMETRY = vary("L_geo, gamma", f"{ASR} --beta 0 --gamma", (20, 200))
ASR_DAMPED = {"sequential, alpha 8": f"{SEQUENTIAL} --lr 1e-2 --alpha 8"}
ASR_DAMPED["sequential, lr 5e-3"] = f"{SEQUENTIAL} --lr 5e-3"
ASR_RATES = vary("sequential, lr", f"{SEQUENTIAL} --lr", ("5e-4", "1e-3", "4e-3"))
ASR_RATES |= vary("ASR, lr", f"{ASR} --lr", ("5e-4", "1e-3", "4e-3"))
ASR_SAMPLES = vary("prototypes of", "asr.py --prototype_samples", (50, 200))
# Table 3 and Fig. 4; the first choice of each axis is "both, parser" of the sweep report
ASR_TABLE = {"raw maps": f"{ASR} --spectrum raw", "radial profile": f"{ASR} --spectrum radial"}
ASR_TABLE |= {"angular profile": f"{ASR} --spectrum angular"}
ASR_TABLE |= vary("prototypes:", f"{ASR} --prototypes", ("global", "task", "mean"))
ASR_TABLE |= {"hard posterior": f"{ASR} --posterior hard", "w = 1": f"{ASR} --tau inf"}
ASR_TABLE |= {"lambda_ang 0": f"{ASR} --lambda_ang 0"}

CRAM = {
    "sequential": f"{SEQUENTIAL} {LIKE_CRAM} --lr {{lr}}",
    ORACLE: "cram.py --buffer_share 0 --no-reuse --routing oracle",
    "CRAM": "cram.py",
    "CRAM, published constants": "cram.py --published 4,5,7,11,12,13",
}
CRAM_ABLATION = {
    "CRAM": "cram.py",
    "one expert per task": "cram.py --no-reuse",
    "fixed rank, novelty off": "cram.py --fixed_rank",
    "no orthogonality": "cram.py --lambda_orth 0",
    "no groups": "cram.py --no-grouping",
    "uniform routing": "cram.py --routing uniform",
    "oracle routing": "cram.py --routing oracle",
    "experts shared more": "cram.py --sigma_share 1",
}

# {experts}: the run of the same sweep, stream and seed whose command is MR alone
MR_LORA = {
    "sequential": f"{SEQUENTIAL} --lr {{lr}}",
    "sequential, MR-LoRA's rate": SEQUENTIAL,
    "zero-shot": ZERO_SHOT,
    "replay, 20 per task": f"{REPLAY} --lr {{lr}}",
    "replay, MR-LoRA's rate": REPLAY,
    "joint": JOINT,
    "MR-LoRA": MR,
    "MR-LoRA, all images": f"{MR} --no-blind_shots --experts {{experts}}",
}
for router in ("generate", "prototype", "oracle"):
    MR_LORA[f"MR-LoRA, {router}"] = f"{MR} --router {router} --experts {{experts}}"
SHOTS = {"20 shots": MR}
for n in (1, 5, 10, 50):  # whatever is kept, the router trains on 200 samples per task
    SHOTS[f"{n} shots"] = f"{MR} --shots {n} --router_epochs {200 // n} --experts {{experts}}"

DEFAULT = {"ASR": "asr.py", "sequential": "asr.py --beta 0 --gamma 0"}  # what a new user runs first
REGIME = {"sequential": SEQUENTIAL, "zero-shot": ZERO_SHOT, "joint": f"{JOINT} --blind"}
SHUFFLED = "color,causal,recognition,judge,count,commonsense,action,location,subcategory,type"
MLP = "--targets q,v,gate,up,down"
SWEEPS = {
    "default": Sweep(["vqacl"], [0], DEFAULT, threads=""),  # as a user starts it
    # Are the mini streams like the benchmarks? Which learning rate suits sequential LoRA best?
    "regime": Sweep(["domains", "vqacl", "vqav2", "clt-vqa"], range(5), REGIME),
    "rate": Sweep(["domains", "vqacl"], range(2), vary("lr", f"{SEQUENTIAL} --lr", RATES)),
    "rate-cram": Sweep(["ucit", "trigap"], [0], vary("lr", f"{SEQUENTIAL} --lr", RATES), LIKE_CRAM),
    "rate-mr-lora": Sweep(["dcl", "acl"], [0], vary("lr", f"{SEQUENTIAL} --lr", RATES[1:])),
    # Which skills, weight and targets make ASR help? At the default rate, at twice that rate, where
    # sequential LoRA collapses, and on other layers. Then a report on seeds not used before.
    "search": Sweep(["domains", "vqacl"], range(2), ASR_SEARCH),
    "search-twice": Sweep(["domains", "vqacl"], range(2), ASR_SEARCH, "--lr {twice}"),
    "search-drift": Sweep(["domains"], range(2), ASR_SEARCH, "--lr 1e-2"),
    "search-mlp-domains": Sweep(["domains"], range(2), ASR_SEARCH, f"{MLP} --lr 2e-3"),
    "search-mlp-vqacl": Sweep(["vqacl"], range(2), ASR_SEARCH, f"{MLP} --lr 1e-3"),
    "report": Sweep(["domains", "vqacl"], range(5, 10), ASR_REPORT),
    "report-drift": Sweep(["domains"], range(5, 10), ASR_REPORT, "--lr 1e-2"),
    "asr-hold": Sweep(["domains"], range(5, 10), LOSSES, "--targets q,k --lr 3e-3"),
    "asr-match": Sweep(["domains", "vqacl"], range(30, 35), ASR_MATCH),
    "asr-swap": Sweep(["domains", "vqacl"], range(5, 8), ASR_SWAP, "--targets q,k,v,projector"),
    "asr-parts": Sweep(["domains"], range(5, 8), ASR_PARTS),
    "asr-geometry": Sweep(["domains"], range(5, 8), ASR_GEOMETRY),
    "asr-damped": Sweep(["domains"], range(5, 10), ASR_DAMPED),
    "asr-rates": Sweep(["domains"], range(5, 8), ASR_RATES),
    "asr-table": Sweep(["domains", "vqacl"], range(5, 8), ASR_TABLE),
    "asr-samples": Sweep(["domains", "vqacl"], range(5, 8), ASR_SAMPLES),
    "asr-published": Sweep(["domains", "vqacl"], range(5, 10), ASR_PUBLISHED),
    # CRAM and MR-LoRA beside what they have to beat
    "cram": Sweep(["ucit", "trigap"], range(5), CRAM),
    "cram-ablation": Sweep(["ucit", "trigap"], range(3), CRAM_ABLATION),
    "mr-lora": Sweep(["dcl", "acl"], range(5), MR_LORA),
    "shots": Sweep(["dcl", "acl"], range(3), SHOTS),
    # all methods on seven streams, the searches for them, and other orders of the stages
    "all": Sweep([*CUT, "dcl", "acl"], range(5), METHODS, "{cut}"),
    "all-baselines": Sweep([*CUT, "dcl", "acl"], range(3), BASELINES, "{cut}"),
    "rate-all": Sweep([*CUT, "dcl", "acl"], [5], RATE_SEARCH, "{cut}"),
    "rate-faster": Sweep(["dcl", "acl"], range(3), FASTER),
    "rate-experts": Sweep([*CUT, "dcl", "acl"], [5], WARM_SEARCH, "{cut}"),
    "search-start": Sweep([*CUT, "dcl", "acl"], range(5, 8), CONTENDERS, "{cut}"),
    "experts-start": Sweep([*CUT, "dcl", "acl"], range(3), STARTS, "{cut}"),
    "experts-router": Sweep([*CUT, "dcl", "acl"], range(2), ROUTERS, UNTRAINED),
    "router": Sweep(["vqacl", "clt-vqa", "coin", "dcl"], range(3), ROUTER, "{cut}"),
    "search-passes": Sweep(["dcl", "acl"], [5], PASSES),
    "search-router": Sweep(["vqacl"], [5], ROUTER_SEARCH, "{cut}"),
    "search-baselines": Sweep(["vqacl", "dcl"], [5], BASELINE_SEARCH, "{cut}"),
    "vqacl-reversed": Sweep(["vqacl"], range(3), VQACL_ORDERS, "{cut} --order reverse"),
    "vqacl-shuffled": Sweep(["vqacl"], range(3), VQACL_ORDERS, f"{{cut}} --order {SHUFFLED}"),
    "dcl-reversed": Sweep(["dcl"], range(3), ORDERS, "--order reverse"),
    "dcl-shuffled": Sweep(["dcl"], range(3), ORDERS, "--order Sci,Fin,RS,Med,AD"),
}


def source(name: str) -> str:
    """The row whose experts other rows of the sweep take."""
    return next((row for row, line in SWEEPS[name].rows.items() if line == MR), "")


def folder_of(name: str, row: str, stream: str, seed: int) -> Path:
    label = re.sub(r"[^\w.]+", "-", f"{row}-{stream}-{seed}")
    return SWEEPS[name].runs / name / label


def cells(name: str) -> dict[tuple, str]:
    """{(row, stream, seed): command} of a sweep; the last word is the run folder."""
    sweep, commands = SWEEPS[name], {}
    for seed in sweep.seeds:  # outermost: a stopped sweep then holds complete comparisons
        for stream in sweep.streams:
            fill = dict(zip(BRACES, ALL.get(stream, ())))
            fill |= {"lr": LR.get(stream), "twice": TWICE.get(stream), "first": FIRST.get(stream)}
            fill |= {"experts": folder_of(name, source(name), stream, seed)}
            for row, command in sweep.rows.items():
                line = f"{command} {sweep.flags}".format(**fill)
                line += f" --stream {shlex.quote(stream)} --seed {seed} {sweep.threads}"
                line += f" --out {folder_of(name, row, stream, seed)}"
                commands[row, stream, seed] = shlex.join(shlex.split(line))
    return commands
