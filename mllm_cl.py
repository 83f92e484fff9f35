"""MLLM-CL with MR-LoRA: one LoRA expert per task, and the model itself picks the expert.

Paper: "MLLM-CL: Continual Learning for Multimodal Large Language Models", arXiv 2506.05453. A
reference script: read it from top to bottom, copy it, edit it. Its sections have the numbers of
asr.py's: `diff cram.py mllm_cl.py` shows what makes the methods different.

The idea. Every task gets a LoRA expert, trained alone from the pretrained model: nothing is ever
overwritten, and no expert depends on the order of the tasks. What is left is to find the right
expert for a question whose task is not known. MR-LoRA asks the model: a small router LoRA, trained
on 20 kept samples of each task, reads the image, the question and a line about each expert, and
answers with a letter. Then the expert of this letter answers the question.

    Router      prompt and letters                      router_question, letter_ids, letter_logits
    Memory      kept samples                            shots_of, router_steps
    Answers     by expert, each one generated once      choose, answer

    python mllm_cl.py --stream dcl                      mini stream, tiny LLaVA: laptop, minutes
    python mllm_cl.py --stream dcl --router oracle --experts RUN --out runs/oracle   RUN's experts
    python mllm_cl.py --stream dcl --router oracle --experts RUN --cross --out runs/cross
                                                        every expert on every test
    python mllm_cl.py --stream dcl --data DIR --model llava-hf/llava-1.5-7b-hf     one GPU

Letters: B batch, N samples, T tasks, t stage, k expert, d size of frozen features.

Numbers in brackets, [3], are the deviations from the paper of docs/mllm_cl.md, which gives reasons
and sources. The ones that change results most: the router's choice is the letter with the highest
logit [2], and on the tiny model a kept sample loses its image in every second pass [9].
"""

import argparse
import math
import random
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import plot
from benchmarks import LETTERS
from eval import SAVE_EVERY, Run, accuracy, evaluate, grid, read_run, show
from features import asked, frozen_features
from files import InputError, input_errors, progress, thumbnails
from model import LLaVA, read_lora, seed_by, set_random_state, share_out

# ---- 1. Flags ------------------------------------------------------------------------------------


def parse(argv=None):
    """All flags, defaults filled in; InputError if one makes no sense."""
    parser = data.common_flags("mllm_cl.py", __doc__.split("\n")[0])
    parser.set_defaults(stream="dcl")
    add = parser.add_argument_group("MR-LoRA").add_argument
    ways = ["mllm", "generate", "prototype", "oracle"]
    about = "who picks the expert: the model, by logits; by what it says; the nearest mean of "
    about += "frozen features; the task, known (default: mllm)"
    add("--router", choices=ways, default="mllm", help=about)
    add("--shots", type=data.count, default=20, help="samples kept of every task (default: 20)")
    add("--router_lr", type=data.positive, help="peak rate (default: 2e-4; tiny model 4e-3)")
    add("--router_epochs", type=data.count, help="of a new router (default: 30; tiny model 5)")
    about = "go on from the last router for N steps; 0: every router anew (default: 0) [11]"
    add("--router_steps", type=data.natural, default=0, metavar="N", help=about)
    add("--router_batch", type=data.count, help="samples per step (default: 16; tiny model 4)")
    about = "a kept sample loses its image in every second pass (default: tiny model only)"
    add("--blind_shots", action=argparse.BooleanOptionalAction, help=about)
    about = "take the experts of this finished run, train only routers"
    add("--experts", metavar="RUN", help=about)
    add("--cross", action="store_true", help="at the end every expert answers every test")
    args = parser.parse_args(argv)
    return args if args.plot else data.resolve_defaults(args)


RISE = 5  # steps until a router that goes on has its rate, which then stays
SHAPING = """stream data drawn_sha256 model seed limit object_groups hold_out imbalance epochs lr
    warm_up batch_size accumulate rank alpha dropout targets dtype system""".split()  # of an expert


def check(args, stream):
    """InputError if the router lacks letters, its prompts are longer than the model's context, or
    --experts has other settings."""
    if len(stream.stages) > len(LETTERS):
        raise InputError(f"{len(stream.stages)} tasks, but only {len(LETTERS)} letters: use fewer")
    nameless = [s.name for s in stream.stages if s.name not in stream.descriptions]
    if args.router in ("mllm", "generate"):
        if nameless:
            print(
                f"note: the router knows {', '.join(nameless)} by name only: one line each under "
                f'"descriptions" in {stream.root}/stream.json would tell it more'
            )
        texts = [stream.descriptions.get(s.name, s.name) for s in stream.stages]
        letters, prompts = letters_of(len(texts), args.seed), []
        for stage in stream.stages + (stream.novel or []):
            splits = {"train": shots_of(stage, args), "test": stage.test}
            seen = {k: router_samples(s, [0] * len(s), texts, letters) for k, s in splits.items()}
            prompts.append(replace(stage, **seen))
        data.check_lengths(prompts, args, lambda text: data.stop(f"prompt of the router, {text}"))
    if args.experts:
        record = read_run(args.experts)
        if record["script"] != "mllm_cl" or "seconds" not in record:
            raise InputError(f"--experts {args.experts} is no finished run of mllm_cl.py")
        for key in SHAPING:
            was, now = record["args"].get(key), getattr(args, key, None)
            if was != now:
                raise InputError(
                    f"--experts {args.experts} was trained with --{key} {was}, not {now}"
                )


# ---- 2. The quantity: which expert? A prompt, and the logits of its letters ----------------------


def letters_of(T, seed):
    """The letter of each of T experts, drawn from the seed: letters do not tell the order."""
    return random.Random(f"letters/{seed}/{T}").sample(LETTERS[:T], T)


def router_question(question, descriptions, letters):
    """The router's prompt for one question: role, task, rule, one line an expert, question, rule.

    descriptions, letters: of the experts that exist [3], in the order of the tasks.
    """
    lines = sorted(f"{k}. {text}" for k, text in zip(letters, descriptions))
    head, rule = "You are the router of these experts.", "Give the letter only."
    return "\n".join([f"{head} {rule}", *lines, f"Question: {question}", rule])


def router_samples(samples, tasks, descriptions, letters):
    """Samples [N] of tasks [N] as the router sees them: one turn, no suffix, a letter as answer."""
    prompts = [router_question(asked(sample), descriptions, letters) for sample in samples]
    return [
        replace(sample, question=prompt, answer=letters[k], suffix="", further=())
        for sample, prompt, k in zip(samples, prompts, tasks)
    ]


def letter_ids(collate, sample, letters):
    """The tokens that tell the letters apart, [k], and their place in the answer, counted from 0.

    The place is 1 for tokenizers that write the blank before a letter as a token of its own.
    InputError if no token does.
    """
    batch = collate([replace(sample, answer=letter) for letter in letters], train=True)
    rows = [row[row != -100].tolist() for row in batch["labels"]]
    for place, column in enumerate(zip(*rows)):
        if len(set(column)) == len(column):
            return list(column), place
        if len(set(column)) > 1:
            break
    raise InputError(
        "this model's tokenizer writes the letters A, B, ... with shared tokens: no "
        "single token tells the experts apart"
    )


def letter_said(text, letters):
    """The letter that the router's text names, or None. As published: a text with more than one
    character that is no letter of an expert names none; else the first letter in the alphabet."""
    foreign = sum(character not in letters for character in text.strip())
    return next((k for k in sorted(letters) if k in text), None) if foreign <= 1 else None


@torch.no_grad()
def letter_logits(llava, batch, ids, place):
    """Logits [B, k] of the letters' tokens; `batch` holds any letter as answer (attention is
    causal: where the letter is predicted, the model has not seen it)."""
    logits = llava.forward(batch).logits  # [N, V], sample after sample
    length = (batch["labels"][:, 1:] != -100).sum(1)
    return logits[length.cumsum(0) - length + place][:, ids].float().cpu()


# ---- 3. The memory: experts, and a few samples of every task -------------------------------------


@dataclass
class Team:
    """What there is to answer with after a stage."""

    names: list  # of all tasks
    descriptions: list  # one line per task
    letters: list  # of all tasks: an expert keeps its letter
    experts: list = field(default_factory=list)  # a lora_state per task so far, on the CPU [7]
    router: dict = field(default_factory=dict)  # lora_state of the last stage's
    prototypes: list = field(default_factory=list)  # [d] per task, for --router prototype
    answers: dict = field(default_factory=dict)  # (stage, sample id, expert) -> text [1]
    cost: Counter = field(default_factory=Counter)  # generations, router_passes, failures

    def state(self):
        """For a checkpoint; experts are in files of their own."""
        return {name: getattr(self, name) for name in ("router", "prototypes", "answers", "cost")}


def shots_of(stage, args):
    """--shots training samples of a task (all, if it has fewer), drawn by the seed and its name."""
    rng = random.Random(f"shots/{args.seed}/{stage.name}")
    return rng.sample(stage.train, min(args.shots, len(stage.train)))


def router_steps(n, t, args):
    """Steps over n kept samples after stage t, each a list of micro-batches of indices.

    blind_shots: i + n stands for sample i without its image: half of the samples lose it in one
    pass, the others in the next [9]. The first router cannot go on from another: it has 3 N steps.
    """
    steps, size, micro = [], args.router_batch, math.ceil(args.router_batch / args.accumulate)
    most = args.router_steps * (3 if t == 1 else 1)
    passes = math.ceil(most / math.ceil(n / size)) if most else args.router_epochs
    for epoch in range(passes):
        order = random.Random(f"router/{args.seed}/{t}/{epoch}").sample(range(n), n)
        order = [i + n if args.blind_shots and (i + epoch) % 2 else i for i in order]
        steps += [order[k : k + size] for k in range(0, n, size)]
    steps = steps[: most or None]
    return [[step[m : m + micro] for m in range(0, len(step), micro)] for step in steps]


def keep_expert(llava, team, stage, run, args):
    """The trained adapter becomes the stage's expert: on the CPU [7], and in a file."""
    if args.experts:  # made by another run; its time counts as if it had been trained here
        record = read_run(args.experts)
        llava.load_lora(read_lora(Path(args.experts) / "experts" / stage.name))
        each = record["seconds_by_part"]["expert"] / len(record["stages"])
        run.seconds["expert"] = each * (len(team.experts) + 1)
    team.experts.append(llava.lora_state())
    llava.save_lora(run.folder / "experts" / stage.name)
    if args.router == "prototype":
        features = frozen_features(llava, llava.batch(shots_of(stage, args), train=True))
        team.prototypes.append(features.mean(0))


def lessons(half, t, stream, team, args):
    """What one half of a stage trains on: samples, steps, learning rate; no steps: nothing."""
    stages = stream.stages[: t + 1]
    if half == "expert":
        steps = [] if args.experts else data.steps_of(stages[t], args)
        return stages[t].train, steps, stages[t].lr
    if t == 0 or args.router not in ("mllm", "generate"):
        return [], [], args.router_lr
    shots = [(s, k) for k, stage in enumerate(stages) for s in shots_of(stage, args)]
    samples = router_samples(*zip(*shots), team.descriptions, team.letters[: t + 1])
    imageless = [replace(sample, image=None) for sample in samples]
    return samples + imageless, router_steps(len(samples), t, args), args.router_lr


# ---- 4. One micro-batch --------------------------------------------------------------------------


def backward(llava, batch):
    """Forward and backward for one micro-batch; returns its share of the step's log."""
    loss = llava.forward(batch).loss * batch["token_share"]
    loss.backward()
    return {"loss": loss.detach().double()}


# ---- 5. Answering the questions of a test: route, then answer ------------------------------------


def by_length(samples, size):
    """Lists of at most `size` indices of samples, longest questions first: little padding."""
    order = sorted(range(len(samples)), key=lambda n: -len(samples[n].question))
    return [order[k : k + size] for k in range(0, len(order), size)]


def choose(llava, team, args, samples):
    """The probability [N, E] of each of the E experts so far for every sample."""
    N, E = len(samples), len(team.experts)
    if args.router == "oracle":
        return np.eye(E)[[team.names.index(sample.stage) for sample in samples]]
    if E == 1:
        return np.ones((N, 1))
    if args.router == "prototype":

        def look(batch):
            return [frozen_features(llava, batch)]

        features = llava.over(samples, 64, look, "routing")[0]
        likeness = F.normalize(features) @ F.normalize(torch.stack(team.prototypes)).T  # [N, E]
        return (20 * likeness).softmax(1).numpy()
    llava.load_lora(team.router)
    letters = team.letters[:E]
    prompts = router_samples(samples, [0] * N, team.descriptions, letters)
    ids, place = letter_ids(llava.collate, prompts[0], letters)

    def ask(order):
        batch = [prompts[n] for n in order]
        words = [None] * len(batch)
        if args.router == "generate":
            texts = llava.generate(llava.batch(batch, train=False), 16)
            words = [letter_said(text, letters) for text in texts]
            if None not in words:  # no need for the logits
                return np.eye(E)[[letters.index(word) for word in words]], 0
        rows = letter_logits(llava, llava.batch(batch, train=True), ids, place).softmax(1).numpy()
        for row, word in zip(rows, words):
            row[:] = row if word is None else np.eye(E)[letters.index(word)]
        return rows, words.count(None) if args.router == "generate" else 0

    probability, batches = np.zeros((N, E)), by_length(prompts, args.eval_batch_size)
    for order, (rows, failures) in zip(batches, share_out(ask, progress(batches, "routing"))):
        probability[order] = rows
        team.cost["failures"] += failures
    team.cost["router_passes"] += N
    return probability


def answer(llava, team, args, run, samples):
    """Answers of the chosen experts to all samples of a test, and for the figures the choice.

    An answer that an expert has given is not generated again: it does not change any more [1].
    """
    probability = choose(llava, team, args, samples)
    choice = probability.argmax(1).tolist()
    run.lap("routing")
    keys = [(sample.stage, sample.id, k) for sample, k in zip(samples, choice)]
    for k in sorted(set(choice)):  # one switch per expert
        new = [s for s, key in zip(samples, keys) if key[2] == k and key not in team.answers]
        if not new:
            continue
        llava.load_lora(team.experts[k])
        batches = [[new[n] for n in order] for order in by_length(new, args.eval_batch_size)]
        bar = progress(batches, f"answers of expert {team.names[k]}")
        for batch, texts in zip(batches, share_out(llava.answer, bar)):
            team.answers |= {(s.stage, s.id, k): text for s, text in zip(batch, texts)}
        team.cost["generations"] += len(new)
    notes = [{"choice": k, "probability": row} for k, row in zip(choice, probability)]
    return [team.answers[key] for key in keys], notes


def cross(llava, team, stages, run):
    """Accuracy (%) of every expert on every test, [expert, task]: what a router can lose."""
    size, table = run.args.eval_batch_size, np.zeros((len(stages), len(stages)))
    for k, (name, expert) in enumerate(zip(team.names, team.experts)):
        llava.load_lora(expert)
        for i, stage in enumerate(stages):
            title = f"expert {name} on {stage.name}"
            rows, _ = evaluate(llava.answer, stage.test, stage.metric, size, title)
            table[k, i] = accuracy(rows, stage.metric)
    run.lap("cross")
    rows = [[name, *map(show, row)] for name, row in zip(team.names, table)]
    print("expert on task\n" + grid([["", *team.names], *rows]))
    return {"cross": table}


def sent(facts, T):
    """Where questions went, [stage, task, chosen expert], and the share (%) that went right."""
    confusion = np.zeros((T, T, T))
    for t, i in zip(*np.tril_indices(T)):
        confusion[t, i] = np.bincount(facts[f"{t + 1}-{i + 1}-choice"], minlength=T)
    accuracy = [100 * np.trace(counts) / counts.sum() for counts in confusion]
    return {"confusion": confusion, "routing_accuracy": accuracy}


def summary(run, team, lora):
    """For the record: who was sent where after each stage, what is stored, what it cost."""
    T, each = len(team.experts), sum(p.numel() for p in lora)
    return {
        "trainable_parameters": each,
        "stored_parameters": each * (T + bool(team.router)) + sum(map(len, team.prototypes)),
        **sent(run.facts, T),
        "cost": dict(team.cost),
        "letters": team.letters,
    }


# ---- 6. The run ----------------------------------------------------------------------------------


def main(args):
    """Train on every stage in turn; after each, test on all stages seen so far."""
    stream = data.load_stream(args)
    check(args, stream)
    run = Run(args, stream, "mllm_cl")  # its folder: log, matrix, answers, checkpoint, record
    llava = LLaVA(args)  # frozen
    lora = llava.add_lora(args)  # one adapter: an expert, or the router
    data.show_sample(stream.stages[0].train[0], llava.processor, args.system)

    names = [stage.name for stage in stream.stages]
    lines = [stream.descriptions.get(name, name) for name in names]
    team = Team(names, lines, letters_of(len(names), args.seed))
    first, half, begin = 0, 0, 0  # the stage, its half and the step to start from
    if state := run.resume():
        first, half, begin = state["at"]
        vars(team).update({name: state[name] for name in team.state()})
        for name in names[: first + half]:
            team.experts.append(read_lora(run.folder / "experts" / name))

    for t, stage in list(enumerate(stream.stages))[first:]:
        # Train twice: an expert, from the pretrained model, then a router for all experts [6].
        for h, phase in list(enumerate(("expert", "router")))[half:]:
            samples, steps, peak = lessons(phase, t, stream, team, args)
            # What is drawn depends on the name alone: no expert depends on the order of the stages.
            seed_by(f"{args.seed}/{phase}-{t + 1 if h else stage.name}")
            lora = llava.add_lora(args)
            if (goes_on := h and args.router_steps) and team.router:
                llava.load_lora(team.router)
            optimizer = torch.optim.AdamW(lora, lr=peak, weight_decay=0.0)
            if begin:
                llava.load_lora(state["lora"])
                optimizer.load_state_dict(state["optimizer"])
                set_random_state(state["random"])
            llava.model.train()
            for k in run.steps(t, len(steps), begin, f"{stage.name} {phase}"):
                sinks = data.schedule(k, len(steps), args.warm_up)
                lr = peak * (min(1, (k + 1) / RISE) if goes_on else sinks)
                optimizer.param_groups[0]["lr"] = lr
                optimizer.zero_grad()
                log = Counter()  # adds up over the micro-batches
                for batch in llava.micro_batches(samples, steps, k):
                    log.update(backward(llava, batch))
                log = llava.clip(lora, log)
                run.log(t, lr=lr, **log, phase=phase)  # stops the run at a nan
                optimizer.step()
                if (k + 1) % SAVE_EVERY == 0:
                    run.save((t, h, k + 1), optimizer, lora=llava.lora_state(), **team.state())
            begin = 0
            llava.eval()
            if phase == "expert":
                keep_expert(llava, team, stage, run, args)
                run.save((t, 1, 0), **team.state())
            elif steps:
                team.router = llava.lora_state()
                llava.save_lora(run.folder / "router")
                run.lap("saving")
        half = 0

        # Test on all stages seen so far; the router's choices are kept for the figures.
        run.test(t, partial(answer, llava, team, args, run), whole=True)
        run.note(**{f"{t + 1}-{t + 1}-picture": thumbnails(stage.test[:2], 96)})
        run.save((t + 1, 0, 0), **team.state())

    print(f"generated and routed: {dict(team.cost)}")
    facts = cross(llava, team, stream.stages, run) if args.cross else {}
    run.finish(plot.mllm_cl, **summary(run, team, lora), **facts)


if __name__ == "__main__":
    with input_errors():
        args = parse()
        print("figures:", plot.draw(args.plot, args.out)) if args.plot else main(args)
