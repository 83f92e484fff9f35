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
    Metrics     MFT, MFN, MAA, BWT                      eval.metrics

    python mllm_cl.py --stream dcl                      mini stream, tiny LLaVA: laptop, minutes
    python mllm_cl.py --stream dcl --router oracle --experts RUN --out runs/oracle   RUN's experts
    python mllm_cl.py --stream dcl --data DIR --model llava-hf/llava-1.5-7b-hf     one GPU

Letters: B batch, N samples, T tasks, t stage, k expert, d size of frozen features.

Numbers in brackets, [3], are the deviations from the paper of docs/mllm_cl.md, which gives reasons
and sources. The ones that change results most: the router's choice is the letter with the highest
logit [2], and on the tiny model a kept sample loses its image in every second pass [9].
"""

import argparse
import json
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
from data import LETTERS, InputError
from eval import SAVE_EVERY, Run, read_run, write_json
from model import LLaVA, read_lora, seed_by, set_random_state, share_out

# --------------------------------------------------------------------------------------------------
# 1. Flags
# --------------------------------------------------------------------------------------------------


def parse(argv=None):
    """All flags, defaults filled in; InputError if one makes no sense."""
    parser = data.common_flags("mllm_cl.py", __doc__.split("\n")[0])
    parser.set_defaults(stream="dcl")
    add = parser.add_argument_group("MR-LoRA").add_argument
    add(
        "--router",
        default="mllm",
        choices=["mllm", "generate", "prototype", "oracle"],
        help="who picks the expert: the model, by logits; by what it says; the nearest mean of frozen features; the task, known (default: mllm)",
    )
    add(
        "--shots",
        type=data.count,
        default=20,
        metavar="N",
        help="samples kept of every task, for the router (default: 20)",
    )
    add(
        "--router_lr",
        type=data.positive,
        metavar="ETA",
        help="peak learning rate of the router (default: 5e-6; tiny model 4e-3)",
    )
    add(
        "--router_epochs",
        type=data.count,
        metavar="E",
        help="passes over the kept samples (default: 40; tiny model 10)",
    )
    add(
        "--router_batch",
        type=data.count,
        metavar="B",
        help="samples per step of the router (default: 32; tiny model 16)",
    )
    add(
        "--blind_shots",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="a kept sample loses its image in every second pass (default: tiny model only)",
    )
    add(
        "--experts", metavar="RUN", help="take the experts of this finished run, train only routers"
    )
    args = parser.parse_args(argv)
    if args.plot:
        return args
    tiny = data.text_width(args.model) < 512
    args.router_lr = args.router_lr or (4e-3 if tiny else 5e-6)
    args.router_epochs = args.router_epochs or (10 if tiny else 40)
    args.router_batch = args.router_batch or (16 if tiny else 32)
    args.blind_shots = tiny if args.blind_shots is None else args.blind_shots
    return data.resolve_defaults(args)


SHAPING = "stream model seed order epochs lr batch_size limit rank alpha targets".split()


def check(args, stream):
    """InputError if the router lacks letters or descriptions, or --experts RUN has other experts."""
    if len(stream.stages) > len(LETTERS):
        raise InputError(f"{len(stream.stages)} tasks, but only {len(LETTERS)} letters: use fewer")
    for stage in stream.stages:
        if args.router in ("mllm", "generate") and not stream.descriptions.get(stage.name):
            raise InputError(
                f"task {stage.name} has no description for the router: add "
                f'"descriptions" to {stream.root}/stream.json'
            )
        if len(stage.train) < args.shots and args.router != "oracle":
            print(f"note: {stage.name} has only {len(stage.train)} samples, all of them are kept")
    if args.experts:
        record = read_run(args.experts)
        if record["script"] != "mllm_cl" or "seconds_by_part" not in record:
            raise InputError(f"--experts {args.experts} is no finished run of mllm_cl.py")
        for key in SHAPING:
            old, new = record["args"][key], getattr(args, key)
            if old != new:
                raise InputError(
                    f"--experts {args.experts} was trained with --{key} {old}, not {new}"
                )


# --------------------------------------------------------------------------------------------------
# 2. The quantity: which expert? A prompt, and the logits of its letters
# --------------------------------------------------------------------------------------------------


def letters_of(T, seed):
    """The letter of each of T experts, drawn from the seed: letters do not tell the order."""
    return random.Random(f"letters/{seed}/{T}").sample(LETTERS[:T], T)


def router_question(question, descriptions, letters):
    """The router's prompt for one question: role, task, rule, one line an expert, question, rule.

    descriptions, letters: of the experts that exist [3], in the order of the tasks.
    """
    lines = sorted(f"{k}. {text}" for k, text in zip(letters, descriptions))
    head = (
        "You are the router of a team of experts. Choose the best expert for this picture and "
        "question by the descriptions. Give the letter only, no answer."
    )
    return "\n".join([head, *lines, f"Question: {question}", "Give the letter only."])


def router_samples(samples, tasks, descriptions, letters):
    """Samples [N] of tasks [N] as the router sees them: no suffix, and a letter as the answer."""
    prompts = [router_question(asked(sample), descriptions, letters) for sample in samples]
    return [
        replace(sample, question=prompt, answer=letters[k], suffix="")
        for sample, prompt, k in zip(samples, prompts, tasks)
    ]


def asked(sample):
    """The question without its suffix, which may tell the form of the answer."""
    if not sample.suffix:
        return sample.question
    return sample.question.removesuffix(sample.suffix).rstrip()


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


@torch.no_grad()
def frozen_features(llava, batch):
    """[B, d] for --router prototype: mean tower feature of the image and mean token embedding of
    the question, each of unit length; zeros for a missing image."""
    table, rows = llava.model.get_input_embeddings().weight, []
    images = batch["features"]
    pooled = iter([] if images is None else F.normalize(images.float().mean(1)).cpu())
    width = llava.model.config.vision_config.hidden_size
    for sample in batch["samples"]:
        ids = llava.processor.tokenizer(asked(sample), add_special_tokens=False)["input_ids"]
        u = F.normalize(table[torch.tensor(ids, device=table.device)].float().mean(0), dim=0).cpu()
        rows.append(torch.cat([next(pooled) if sample.image else torch.zeros(width), u]))
    return torch.stack(rows)


# --------------------------------------------------------------------------------------------------
# 3. The memory: experts, and a few samples of every task
# --------------------------------------------------------------------------------------------------


@dataclass
class Team:
    """What there is to answer with after a stage."""

    names: list  # of the tasks
    descriptions: list  # one line per task
    experts: list = field(default_factory=list)  # a lora_state per task, on the CPU [7]
    router: dict | None = None  # lora_state of the trained router
    letters: list = field(default_factory=list)
    prototypes: list = field(default_factory=list)  # [d] per task, for --router prototype
    answers: dict = field(default_factory=dict)  # (stage, sample id, expert) -> text [1]
    cost: Counter = field(default_factory=Counter)  # generations, router_passes, failures


def shots_of(stage, n, seed):
    """n training samples of a task (all, if it has fewer), drawn by the seed and its name."""
    chosen = random.Random(f"shots/{seed}/{stage.name}")
    return chosen.sample(stage.train, min(n, len(stage.train)))


def router_steps(n, t, args):
    """Steps over n kept samples after stage t, each a list of micro-batches of indices.

    blind_shots: i + n stands for sample i without its image: half of the samples lose it in one
    pass, the others in the next [9].
    """
    steps, size, micro = [], args.router_batch, math.ceil(args.router_batch / args.accumulate)
    for epoch in range(args.router_epochs):
        order = random.Random(f"router/{args.seed}/{t}/{epoch}").sample(range(n), n)
        order = [i + n if args.blind_shots and (i + epoch) % 2 else i for i in order]
        steps += [order[k : k + size] for k in range(0, n, size)]
    return [[step[m : m + micro] for m in range(0, len(step), micro)] for step in steps]


def router_lessons(stages, team, args):
    """The kept samples of all stages so far as the router sees them, then once more imageless."""
    shots = [
        (s, k) for k, stage in enumerate(stages) for s in shots_of(stage, args.shots, args.seed)
    ]
    samples, tasks = zip(*shots)
    lessons = router_samples(samples, tasks, team.descriptions[: len(stages)], team.letters)
    return lessons + [replace(lesson, image=None) for lesson in lessons]


# --------------------------------------------------------------------------------------------------
# 5. Answering the questions of a test: route, then answer
# --------------------------------------------------------------------------------------------------


def by_length(samples, size):
    """Lists of at most `size` samples, longest questions first: little padding."""
    order = sorted(samples, key=lambda sample: -len(sample.question))
    return [order[k : k + size] for k in range(0, len(order), size)]


def choose(llava, team, args, samples):
    """The probability [N, t + 1] of every expert for every sample; 1 for the only one."""
    N, E = len(samples), len(team.experts)
    if E == 1 or args.router == "oracle":
        return np.eye(E)[[team.names.index(sample.stage) if E > 1 else 0 for sample in samples]]
    if args.router == "prototype":
        features = llava.over(samples, 64, lambda batch: [frozen_features(llava, batch)])[0]
        likeness = F.normalize(features) @ F.normalize(torch.stack(team.prototypes)).T
        return (20 * likeness).softmax(1).numpy()
    llava.load_lora(team.router)
    prompts = router_samples(samples, [0] * N, team.descriptions[:E], team.letters)
    ids, place = letter_ids(llava.collate, prompts[0], team.letters)

    def ask(batch):
        letters = [None] * len(batch)
        if args.router == "generate":
            texts = llava.generate(llava.batch(batch, train=False), 16)
            letters = [letter_said(text, team.letters) for text in texts]
        rows = letter_logits(llava, llava.batch(batch, train=True), ids, place).softmax(1).numpy()
        for b, letter in enumerate(letters):
            if letter:
                rows[b] = np.eye(E)[team.letters.index(letter)]
        return rows, sum(letter is None for letter in letters)

    probability, row_of = np.zeros((N, E)), {id(prompt): k for k, prompt in enumerate(prompts)}
    batches = by_length(prompts, args.eval_batch_size)
    for batch, (rows, failures) in zip(batches, share_out(ask, batches)):
        probability[[row_of[id(prompt)] for prompt in batch]] = rows
        team.cost["failures"] += failures if args.router == "generate" else 0
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
        if new:
            llava.load_lora(team.experts[k])
        batches = by_length(new, args.eval_batch_size)
        for batch, texts in zip(batches, share_out(llava.answer, batches)):
            team.answers |= {(s.stage, s.id, k): text for s, text in zip(batch, texts)}
        team.cost["generations"] += len(new)
    notes = [{"choice": k, "probability": row} for k, row in zip(choice, probability)]
    return [team.answers[key] for key in keys], notes


# --------------------------------------------------------------------------------------------------
# 6. The run
# --------------------------------------------------------------------------------------------------


def main(args):
    """Train on every stage in turn; after each, test on all stages seen so far."""
    stream = data.load_stream(args)
    check(args, stream)
    run = Run(args, stream, "mllm_cl")  # its folder: log, matrix, answers, checkpoint, record
    llava = LLaVA(args)  # frozen
    lora = llava.add_lora(args)  # one adapter: now an expert, now the router
    data.show_sample(stream.stages[0].train[0], llava.processor)

    names, T = [stage.name for stage in stream.stages], len(stream.stages)
    team = Team(names, [stream.descriptions.get(name, "") for name in names])
    trains_router = args.router in ("mllm", "generate")
    first, phase, begin = 0, "expert", 0  # the stage, its half and the step to start from
    if state := run.resume():
        first, phase, begin = state["at"]
        team.prototypes, team.answers = state["prototypes"], state["answers"]
        team.cost = Counter(state["cost"])
        for name in names[: first + (phase == "router")]:
            team.experts.append(read_lora(run.folder / "experts" / name))

    for t, stage in list(enumerate(stream.stages))[first:]:
        # Train twice: the expert on the stage, then a router on the kept samples of all stages.
        # Both start from the pretrained model [6].
        for phase in ("expert", "router") if phase == "expert" else ("router",):
            if phase == "expert":
                samples, steps, peak = stage.train, data.steps_of(stage, args), args.lr
                name = f"expert-{stage.name}"
                if args.experts:
                    steps = []
            else:
                team.letters = letters_of(t + 1, args.seed)
                if not (t and trains_router):
                    continue
                samples = router_lessons(stream.stages[: t + 1], team, args)
                steps, peak = router_steps(len(samples) // 2, t, args), args.router_lr
                name = f"router-{t + 1}"
            # An adapter's randomness hangs on its name alone: experts do not depend on the order.
            seed_by(f"{args.seed}/{name}")
            lora = llava.add_lora(args)
            optimizer = torch.optim.AdamW(lora, lr=peak, weight_decay=0.0)
            if begin:
                llava.load_lora(state["lora"])
                optimizer.load_state_dict(state["optimizer"])
                set_random_state(state["random"])
            llava.model.train()
            for k in run.steps(t, len(steps), begin, f"{stage.name} {phase}"):
                lr = optimizer.param_groups[0]["lr"] = peak * data.schedule(
                    k, len(steps), args.warm_up
                )
                optimizer.zero_grad()
                log = Counter(loss=0.0)  # adds up over the micro-batches
                for batch in llava.micro_batches(samples, steps[k]):
                    loss = llava.forward(batch).loss * batch["token_share"]
                    loss.backward()
                    log.update(loss=loss.item())
                log = llava.sync(lora, log)
                norm = torch.nn.utils.clip_grad_norm_(lora, 1.0).item()
                run.log(t, lr=lr, gradient_norm=norm, **log, phase=phase)  # stops at a nan
                optimizer.step()
                if (k + 1) % SAVE_EVERY == 0:
                    run.save(
                        (t, phase, k + 1),
                        lora=llava.lora_state(),
                        optimizer=optimizer.state_dict(),
                        prototypes=team.prototypes,
                        answers=team.answers,
                        cost=dict(team.cost),
                    )
            begin = 0
            if phase == "router":
                team.router = llava.lora_state()
                llava.save_lora(run.folder / "router")
                write_json(run.folder / "router" / "letters.json", dict(zip(team.letters, names)))
                continue
            if args.experts:
                llava.load_lora(read_lora(Path(args.experts) / "experts" / stage.name))
            team.experts.append(llava.lora_state())
            llava.save_lora(run.folder / "experts" / stage.name)
            if args.router == "prototype":
                shots = shots_of(stage, args.shots, args.seed)
                team.prototypes.append(frozen_features(llava, llava.batch(shots, True)).mean(0))
            run.save(
                (t, "router", 0),
                prototypes=team.prototypes,
                answers=team.answers,
                cost=dict(team.cost),
            )
        phase = "expert"

        # Test on all stages seen so far; the router's choices are kept for the figures.
        llava.model.eval()
        run.test(t, partial(answer, llava, team, args, run), whole=True)
        run.save(
            (t + 1, "expert", 0),
            prototypes=team.prototypes,
            answers=team.answers,
            cost=dict(team.cost),
        )

    confusion = np.zeros((T, T, T))  # [stage, task, chosen expert]
    for t, i in zip(*np.tril_indices(T)):
        confusion[t, i] = np.bincount(run.facts[f"{t + 1}-{i + 1}-choice"], minlength=T)
    right = [100 * np.trace(c) / max(c.sum(), 1) for c in confusion]
    each = sum(p.numel() for p in lora)
    run.finish(
        trainable_parameters=each,
        stored_parameters=each * (T + (T > 1 and trains_router)),
        confusion=confusion,
        routing_accuracy=right,
        cost=dict(team.cost),
    )
    plot.mllm_cl([run.folder])


if __name__ == "__main__":
    with data.input_errors():
        args = parse()
        plot.mllm_cl(args.plot, args.out) if args.plot else main(args)
