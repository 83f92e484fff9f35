"""MLLM-CL with MR-LoRA: one LoRA expert per task, and the model itself picks the expert.

Paper: "MLLM-CL: Continual Learning for Multimodal Large Language Models", arXiv 2506.05453. A
reference script: read it from top to bottom, copy it, edit it. Its sections have the numbers of
asr.py's: `diff cram.py mllm_cl.py` shows what makes the methods different.

The idea. Every task gets a LoRA expert, trained alone from the pretrained model: nothing is ever
overwritten, and the order of the tasks makes no difference to any expert. What is left is to find
the right expert for a question whose task is not known. MR-LoRA asks the model: a small router
LoRA, trained on 20 kept samples of each task, reads the image, the question and a line about each
expert, and says a letter. Then the expert of this letter answers.

    Experts     one adapter per task                    train
    Router      prompt and letters                      router_question, letter_ids, letter_logits
    Answers     by expert, each one generated once      answer_all
    Metrics     MFT, MFN, MAA, BWT                      eval.metrics

    python mllm_cl.py --stream dcl                      mini stream, tiny LLaVA: laptop, minutes
    python mllm_cl.py --stream dcl --router oracle --experts RUN --out runs/oracle   RUN's experts
    python mllm_cl.py --stream dcl --data DIR --model llava-hf/llava-1.5-7b-hf     one GPU
    python mllm_cl.py --plot RUN [RUN ...]              the figures from saved runs

Letters: B batch, N samples, T tasks, t stage, k expert, d size of frozen features.

Where we differ from the paper (P) or its public code (C), and why:
 1. (C) Route first, then generate once per sample. The code lets EVERY expert answer EVERY test
    set (T x T runs) and picks among the stored answers.
 2. (P, C) The router's choice is the letter with the highest logit at the first answer token: one
    forward pass, and no text to be misread. --router generate is the published way; a text that
    names no expert falls back to the logits and is counted. The code picks a random one then.
 3. (C) The prompt lists the experts that exist, in an order drawn from the seed. The code's prompt
    is fixed to all of them.
 4. (P, C) The projector is adapted by LoRA like all other layers, so that an expert is one adapter;
    published is a full copy of the projector per expert.
 5. (C) The vision tower stays frozen for every expert, on ACL too, so that an image goes through it
    once for router and experts together.
 6. (C) The router starts from the pretrained model on both streams; the code starts DCL's from the
    mean of the experts, with a file that no script of it makes.
 7. (C) Idle adapters are on the CPU: six of rank 128 are 8 GB.
 8. (P) One lr, epochs and batch for all tasks of a stream; the published ones differ by task. The
    router's 40 passes are DCL's; ACL's are 35. The tiny model's experts are on q, v and the
    feed-forward layers (--targets), not on all linear layers and the projector.
 9. (P, C) A kept sample loses its image in every second pass of the router. With all images the
    tiny router told the tasks apart by the pictures alone, and did not read the question: on acl,
    where test pictures are unlike those of training, many questions went to the wrong expert.
    Tiny model only: at full size the default is the published way, --no-blind_shots.
"""

import argparse
import json
import math
import random
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

import eval as evaluation
from data import (
    LETTERS,
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
    text_width,
    train_order,
)

# --------------------------------------------------------------------------------------------------
# 1. Flags
# --------------------------------------------------------------------------------------------------


# fmt: off
def parse(argv=None):
    """All flags; InputError if one of this script's own makes no sense."""
    parser = argparse.ArgumentParser("mllm_cl.py", description=__doc__.split("\n")[0])
    add_common_flags(parser)
    parser.set_defaults(stream="dcl")
    add = parser.add_argument_group("MR-LoRA (--router_*, --blind_shots: of the routers mllm and "
                                    "generate, which are trained)").add_argument
    add("--router", default="mllm", choices=["mllm", "generate", "prototype", "oracle"],
        help="who picks the expert: the model, by logits; the model, by what it says; the nearest "
             "mean of frozen features; the task itself, known (default: mllm)")
    add("--shots", type=int, default=20, metavar="N",
        help="samples kept of every task, for the router (default: 20)")
    add("--router_lr", type=float, metavar="ETA",
        help="peak learning rate of the router (default: 5e-6; tiny model 4e-3)")
    add("--router_epochs", type=int, metavar="E",
        help="passes over the kept samples (default: 40; tiny model 10)")
    add("--router_batch", type=int, metavar="B",
        help="samples per step of the router (default: 32; tiny model 16)")
    add("--blind_shots", action=argparse.BooleanOptionalAction, default=None,
        help="a kept sample loses its image in every second pass, so that the router learns to "
             "read the question, too (default: off; tiny model on, ours)")
    add("--experts", metavar="RUN",
        help="take the experts of this finished run with the same settings, train only routers")
    add = parser.add_argument_group("evaluation and checkpoints").add_argument
    add("--eval_batch_size", type=int, default=32, metavar="B",
        help="questions answered at once (default: 32)")
    add("--save_every", type=int, default=100, metavar="N",
        help="checkpoint every N steps inside a stage too; 0: after each part (default: 100)")
    args = parser.parse_args(argv)
    if args.save_every < 0:
        raise InputError(f"--save_every {args.save_every} must be zero or more")
    above_zero = "shots router_lr router_epochs router_batch eval_batch_size"
    for name in above_zero.split():
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise InputError(f"--{name} {getattr(args, name)} must be above zero")
    return args


SHAPING = """stream data drawn_sha256 hold_out object_groups imbalance limit seed epochs lr warm_up
    batch_size accumulate rank alpha dropout targets dtype""".split()  # what an expert depends on


def check_stream(args, stream):
    """Fill the router's defaults; InputError if there are more tasks than letters, if a task has no
    description for the router to read, or if the run of --experts has other experts."""
    tiny = text_width(args.model) < 512
    args.router_lr = args.router_lr or (4e-3 if tiny else 5e-6)
    args.router_epochs = args.router_epochs or (10 if tiny else 40)
    args.router_batch = args.router_batch or (16 if tiny else 32)
    args.blind_shots = tiny if args.blind_shots is None else args.blind_shots
    if len(stream.stages) > len(LETTERS):
        raise InputError(f"{len(stream.stages)} tasks, but only {len(LETTERS)} letters to name "
                         "experts by: use fewer stages")
    for stage in stream.stages:
        if args.router in ("mllm", "generate") and not stream.descriptions.get(stage.name):
            raise InputError(f"task {stage.name} has no description for the router: add "
                             f'"descriptions" to {stream.root}/stream.json')
        if len(stage.train) < args.shots and args.router != "oracle":
            print(f"{stage.name} has {len(stage.train)} samples, fewer than --shots {args.shots}: "
                  "all are kept")
    if args.experts:
        record = evaluation.read_run(args.experts)
        if record["script"] != "mllm_cl" or "seconds_by_part" not in record:
            raise InputError(f"--experts {args.experts} is no finished run of mllm_cl.py")
        if record["model_sha256"] != evaluation.model_sha256(args.model):
            raise InputError(f"the experts of {args.experts} belong to another model than "
                             f"--model {args.model}: train without --experts")
        was = record["args"]
        for key in SHAPING:
            old, new = was.get(key), getattr(args, key, None)
            if old != new:
                raise InputError(f"the experts of {args.experts} were trained with --{key} {old}, "
                                 f"and now --{key} is {new}: use the same, or train without "
                                 "--experts")
        for stage in stream.stages:
            folder = Path(args.experts) / "experts" / stage.name
            if not folder.is_dir():
                raise InputError(f"--experts: {folder} is missing; train without --experts")
    return args
# fmt: on


# Wrong flags and missing files are reported before the seconds that importing torch takes.
if __name__ == "__main__":
    try:
        args = parse()
        if not args.plot:
            stream = load_stream(resolve_defaults(args))
            run = evaluation.start_run(check_stream(args, stream), __file__)
    except InputError as error:
        fail(error)

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from model import (  # noqa: E402
    add_lora,
    add_up_gradients,
    forward,
    gather,
    generate,
    image_features,
    image_tokens,
    load_checkpoint,
    load_lora,
    load_lora_state,
    lora_state,
    move_lora,
    parameter_report,
    peak_memory,
    processes,
    random_state,
    remove_lora,
    save_checkpoint,
    save_lora,
    set_lora,
    set_random_state,
    set_up,
    share_out,
    to_device,
)

# --------------------------------------------------------------------------------------------------
# 2. The quantity: which expert? A prompt, and the logits of its letters
# --------------------------------------------------------------------------------------------------


def letters_of(T, seed):
    """The letter of each of T experts, drawn from the seed: letters do not tell the order."""
    return random.Random(f"letters/{seed}/{T}").sample(LETTERS[:T], T)


def router_question(question, descriptions, letters):
    """The router's prompt for one question: role, task, rule, one line an expert, question, rule.

    descriptions, letters: of the experts that exist, in the order of the tasks.
    """
    lines = sorted(f"{k}. {text}" for k, text in zip(letters, descriptions, strict=True))
    return "\n".join([
        "You are the router of a team of experts. Choose the best expert for this picture and "
        "question by the descriptions. Give the letter only, no answer.",
        *lines, f"Question: {question}", "Give the letter only.",
    ])  # fmt: skip


def router_samples(samples, tasks, descriptions, letters):
    """Samples [N] of tasks [N] as the router sees them: no suffix, and a letter as the answer."""
    return [
        replace(s, question=router_question(asked(s), descriptions, letters), answer=letters[k],
                suffix="")
        for s, k in zip(samples, tasks, strict=True)
    ]  # fmt: skip


def asked(sample):
    """The question without its suffix, which may tell the form of the answer."""
    return (
        sample.question.removesuffix(sample.suffix).rstrip() if sample.suffix else sample.question
    )


def letter_ids(collator, sample, letters):
    """The tokens that tell the letters apart, [k], and their place in the answer, counted from 0.

    The place is 1 for tokenizers that write the blank before a letter as a token of its own.
    InputError if no token does.
    """
    batch = collator([replace(sample, answer=letter) for letter in letters], train=True)
    rows = [row[row != -100].tolist() for row in batch["labels"]]
    for place, column in enumerate(zip(*rows, strict=False)):
        if len(set(column)) == len(column):
            return list(column), place
        if len(set(column)) > 1:
            break
    raise InputError("this model's tokenizer writes the letters A, B, ... with shared tokens: no "
                     "single token tells the experts apart")  # fmt: skip


def letter_said(text, letters):
    """The letter that the router's text names, or None. As published: a text with more than one
    character that is no letter of an expert names none; else the first letter in the alphabet."""
    foreign = sum(character not in letters for character in text.strip())
    return next((k for k in sorted(letters) if k in text), None) if foreign <= 1 else None


@torch.no_grad()
def letter_logits(model, batch, features, ids, place):
    """Logits [B, k] of the letters' tokens; `batch` holds any letter as answer (attention is
    causal: where the letter is predicted, the model has not seen it)."""
    logits = forward(model, batch, features).logits  # [N, V], sample after sample
    length = (batch["labels"][:, 1:] != -100).sum(1)
    return logits[length.cumsum(0) - length + place][:, ids].float().cpu()


@torch.no_grad()
def frozen_features(model, processor, cache, samples):
    """[N, d] for --router prototype: mean tower feature of the image and mean token embedding of
    the question, each of unit length; zeros for a missing image."""
    table, rows = model.get_input_embeddings().weight, []
    images = image_features(cache, samples)
    pooled = iter([] if images is None else F.normalize(images.float().mean(1)).cpu())
    width = model.config.vision_config.hidden_size
    for sample in samples:
        ids = processor.tokenizer(asked(sample), add_special_tokens=False)["input_ids"]
        u = F.normalize(table[torch.tensor(ids, device=table.device)].float().mean(0), dim=0).cpu()
        rows.append(torch.cat([next(pooled) if sample.image else torch.zeros(width), u]))
    return torch.stack(rows)


# --------------------------------------------------------------------------------------------------
# 3. The memory: a few samples of every task
# --------------------------------------------------------------------------------------------------


def shots_of(stage, n, seed):
    """n training samples of a task (all, if it has fewer), drawn by the seed and its name."""
    chosen = random.Random(f"shots/{seed}/{stage.name}")
    return chosen.sample(stage.train, min(n, len(stage.train)))


def router_steps(n, epochs, size, seed, blind):
    """Steps over n kept samples, `epochs` passes in batches of `size`. blind: i + n stands for
    sample i without its image: half of the samples lose it in one pass, the others in the next.
    """
    steps = []
    for epoch in range(epochs):
        order = random.Random(f"router/{seed}/{epoch}").sample(range(n), n)
        order = [i + n if blind and (i + epoch) % 2 else i for i in order]
        steps += [order[k : k + size] for k in range(0, n, size)]
    return steps


def expert_name(stage):
    return f"expert-{stage.name}"


# --------------------------------------------------------------------------------------------------
# 4. The losses: the task's alone
# --------------------------------------------------------------------------------------------------


def backward(model, batch, features, share):
    """Forward and backward of one micro-batch, which holds `share` of the step's answer tokens."""
    loss = forward(model, batch, features).loss * share
    loss.backward()
    return loss.detach()


# --------------------------------------------------------------------------------------------------
# 5. Training one adapter: an expert or the router
# --------------------------------------------------------------------------------------------------


def train(model, parameters, samples, steps, micro, lr, warm_up, collate, log, save, title,
          resumed=None):  # fmt: skip
    """Train the active adapter's `parameters` on `steps`, lists of indices of `samples`.

    resumed: {"steps", "optimizer"} of an interrupted training. save(steps, optimizer) is called
    after every step, log(line) too. InputError if the loss is not finite.
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    me, world = processes()
    begin = 0
    if resumed:
        begin = resumed["steps"]
        optimizer.load_state_dict(resumed["optimizer"])
    model.train()
    bar = tqdm(range(begin, len(steps)), title, len(steps), initial=begin, disable=None)
    for k in bar:
        now = lr * schedule(k, len(steps), warm_up)
        optimizer.param_groups[0]["lr"] = now
        optimizer.zero_grad()
        parts = [steps[k][m : m + micro] for m in range(0, len(steps[k]), micro)][me::world]
        batches = [collate([samples[i] for i in part]) for part in parts]
        tokens = [int((batch["labels"] != -100).sum()) for batch, _ in batches]
        whole = sum(gather(sum(tokens)))
        loss = 0.0
        for (batch, features), n in zip(batches, tokens, strict=True):
            loss += backward(model, batch, features, n / whole).item()
        loss = sum(gather(loss))
        add_up_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
        if not math.isfinite(loss + norm):
            raise InputError(
                f"{title}, step {k + 1}: loss {loss}, gradient norm {norm}; stopped. The last good "
                f"checkpoint stays in the run folder; try a lower rate (now {lr:g}), another --out"
            )
        optimizer.step()
        log({"lr": now, "gradient_norm": norm, "loss": loss})
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        save(k + 1, optimizer)
    optimizer.zero_grad(set_to_none=True)  # an idle adapter's gradients would stay on the device
    model.eval()


# --------------------------------------------------------------------------------------------------
# 6. Evaluation: route, then answer
# --------------------------------------------------------------------------------------------------


def batches_of(samples, size):
    """Lists of at most `size` samples, longest questions first: little padding."""
    order = sorted(samples, key=lambda sample: -len(sample.question))
    return [order[k : k + size] for k in range(0, len(order), size)]


def answer_all(model, processor, cache, collator, samples, choice, stages, args, answers):
    """Let every sample be answered by the expert it was given to, unless it has been.

    choice: the expert of each sample. answers {(id of sample, expert): text} is filled; returns
    the number of answers generated. Samples are grouped by expert: one switch each.
    """
    count = 0
    for k in sorted(set(choice)):
        own = [s for s, c in zip(samples, choice, strict=True) if c == k]
        own = [s for s in own if (id(s), k) not in answers]
        if own:
            use(model, expert_name(stages[k]))

        def answer(part):
            batch = to_device(collator(part, train=False), model.device)
            images = image_features(cache, part)
            return generate(model, processor, batch, images, args.max_new_tokens)

        parts = batches_of(own, args.eval_batch_size)
        for part, texts in zip(parts, share_out(answer, parts), strict=True):
            answers |= {(id(s), k): text for s, text in zip(part, texts, strict=True)}
        if own:
            move_lora(model, expert_name(stages[k]), "cpu")
        count += len(own)
    return count


def use(model, name):
    """Make an adapter the active one, on the model's device."""
    move_lora(model, name, model.device)
    set_lora(model, name)


# fmt: off
def route(model, processor, cache, collator, samples, t, args, stream, letters, prototypes):
    # fmt: on
    """The expert of every sample among t + 1: (probabilities [N, t + 1], choice [N], failures).

    The router's adapter is active if there is one. failures: texts that named no expert.
    """
    N = len(samples)
    if t == 0:
        return np.ones((N, 1)), [0] * N, 0
    if args.router == "prototype":
        parts = [samples[k : k + 64] for k in range(0, N, 64)]
        own = torch.cat(share_out(partial(frozen_features, model, processor, cache), parts))
        likeness = F.normalize(own) @ F.normalize(torch.stack(prototypes)).T
        return (20 * likeness).softmax(1).numpy(), likeness.argmax(1).tolist(), 0
    descriptions = [stream.descriptions[stage.name] for stage in stream.stages[: t + 1]]
    prompts = router_samples(samples, [0] * N, descriptions, letters)
    ids, at = letter_ids(collator, prompts[0], letters)
    place, failures = {id(prompt): k for k, prompt in enumerate(prompts)}, 0
    probability, parts = np.zeros((N, t + 1)), batches_of(prompts, args.eval_batch_size)

    def ask(part):
        images, said = image_features(cache, part), [None] * len(part)
        if args.router == "generate":
            batch = to_device(collator(part, train=False), model.device)
            texts = generate(model, processor, batch, images, 16)
            said = [letter_said(text, letters) for text in texts]
            if None not in said:  # no need of the logits
                return np.array([[letter == word for letter in letters] for word in said]), said
        batch = to_device(collator(part, train=True), model.device)
        return letter_logits(model, batch, images, ids, at).softmax(1).numpy(), said

    for part, (found, said) in zip(parts, share_out(ask, parts), strict=True):
        for sample, row, word in zip(part, found, said, strict=True):
            failures += args.router == "generate" and word is None
            told = row if word is None else np.eye(t + 1)[letters.index(word)]
            probability[place[id(sample)]] = told
    return probability, probability.argmax(1).tolist(), failures


# --------------------------------------------------------------------------------------------------
# 7. The run
# --------------------------------------------------------------------------------------------------

ROUTER = "router"


def main(args, stream, run):
    """Train on every stage in turn, test on all stages seen so far, write the run folder."""
    clock, seconds = time.perf_counter(), {}

    def lap(part):
        """Book the time since the last lap on a part of the run."""
        nonlocal clock
        now = time.perf_counter()
        seconds[part] = seconds.get(part, 0.0) + now - clock
        clock = now

    # ---- 7.1 The model: a frozen LLaVA; experts are added stage by stage ------------------------
    model, processor, cache = set_up(args)
    me, _ = processes()
    targets = args.targets.split(",")
    collator = Collator(processor, image_tokens(model, processor))

    def collate(samples):
        batch = collator(samples, train=True)
        return to_device(batch, model.device), image_features(cache, samples)

    # ---- 7.2 What is about to happen ------------------------------------------------------------
    stages, T = stream.stages, len(stream.stages)
    micro = args.batch_size // args.accumulate
    sizes = ", ".join(f"{stage.name} {len(stage.train)} + {len(stage.test)}" for stage in stages)
    total = parameter_report(model)["total"]
    show_sample(stages[0].train[0], processor)
    print(f"\n{run}: on {model.device} in {model.dtype}, {torch.get_num_threads()} CPU threads")
    print(f"{total:,} parameters; every expert is a LoRA of rank {args.rank} on {args.targets}")
    print(f"{T} stages, training + test samples: {sizes}")
    print(f"{args.epochs} epochs in steps of {args.batch_size} samples, micro-batches of {micro}")
    kept = "" if args.router == "oracle" else f", {args.shots} samples kept of every task"
    print(f"router: {args.router}{kept}")
    if args.router in ("mllm", "generate"):
        print("it reads: " + "; ".join(f"{s.name}: {stream.descriptions[s.name]}" for s in stages))

    # ---- 7.3 Memory and records, from the checkpoint if there is one ----------------------------
    matrix, novel = np.full((T, T), np.nan), np.full((T, T), np.nan)
    prototypes, answers, cost = [], {}, {"generations": 0, "router_passes": 0, "failures": 0}
    first, step, unfinished = 0, 0, None  # stage to begin with, steps so far, a stage half done
    tests = [*stages, *(stream.novel or [])]
    keys = {(i, k): id(s) for i, stage in enumerate(tests) for k, s in enumerate(stage.test)}
    if args.resume and (state := load_checkpoint(run)):
        torch.set_num_threads(state["threads"])  # another number would round differently
        set_random_state(state["random"])
        first, step, unfinished = state["stage"], state["step"], state["unfinished"]
        matrix, novel, seconds = state["matrix"].numpy(), state["novel"].numpy(), state["seconds"]
        prototypes, cost = state["prototypes"], state["cost"]
        answers = {(keys[i, n], k): text for i, n, k, text in state["answers"]}
        known = first + (unfinished is not None and unfinished["phase"] != "expert")
        for stage in stages[:known]:
            load_lora(model, expert_name(stage), run / "experts" / stage.name)
            move_lora(model, expert_name(stage), "cpu")
        print(f"resumed after {first} stages and {step} steps")
    evaluation.truncate_metrics(run, step)
    routing = run / "routing.jsonl"
    lines = routing.read_text().splitlines(keepends=True) if routing.exists() else []
    lines = [line for line in lines if line.endswith("\n")]  # a kill may have cut the last one
    kept_lines = [line for line in lines if json.loads(line)["stage"] <= first]
    evaluation.write_text(routing, "".join(kept_lines))

    def checkpoint(done, unfinished=None):
        place = {key: name for name, key in keys.items()}
        said = [(*place[s], k, text) for (s, k), text in answers.items() if s in place]
        state = {"stage": done, "unfinished": unfinished, "step": step, "random": random_state()}
        state |= {"prototypes": prototypes, "answers": said, "cost": cost}
        state |= {"matrix": torch.tensor(matrix), "novel": torch.tensor(novel)}
        save_checkpoint(run, state | {"seconds": seconds, "threads": torch.get_num_threads()})

    def learn(name, phase, samples, steps, micro, lr):
        """Train a new adapter `name` in stage t, or go on with it; then it is in the checkpoint."""
        nonlocal step, unfinished
        # An adapter's randomness hangs on its name alone: experts do not depend on the order.
        torch.manual_seed(random.Random(f"{args.seed}/{name}").getrandbits(32))
        parameters = add_lora(model, name, args.rank, args.alpha, args.dropout, targets)
        resumed, unfinished = unfinished, None
        resumed = resumed if resumed and resumed["phase"] == phase and resumed["steps"] else None
        if resumed:
            load_lora_state(model, name, resumed["lora"])
            set_random_state(resumed["random"])

        def log(line):
            nonlocal step
            step += 1
            evaluation.append_metrics(run, {"step": step, "stage": t + 1, "phase": phase, **line})

        def save(k, optimizer):
            if args.save_every and k % args.save_every == 0:
                now = {"phase": phase, "steps": k, "lora": lora_state(model, name)}
                lap(phase)
                checkpoint(
                    t, now | {"optimizer": optimizer.state_dict(), "random": random_state()}
                )

        title = f"stage {t + 1}/{T} {stage.name} {phase}"
        train(model, parameters, samples, steps, micro, lr, args.warm_up, collate, log, save, title,
              resumed)  # fmt: skip
        lap(phase)

    # ---- 7.4 Stage after stage ------------------------------------------------------------------
    lap("start")
    for t in range(first, T):
        stage = stages[t]

        # the expert: trained alone, from the pretrained model
        if unfinished is None or unfinished["phase"] == "expert":
            orders = [train_order(stage, args.seed, e, args.epochs) for e in range(args.epochs)]
            size = args.batch_size
            steps = [order[k : k + size] for order in orders for k in range(0, len(order), size)]
            if args.experts:  # their time counts as if they had been trained here
                load_lora(model, expert_name(stage), Path(args.experts) / "experts" / stage.name)
                was = evaluation.read_run(args.experts)
                each = was["seconds_by_part"]["expert"] / len(was["stages"])
                seconds["expert"] = each * (t + 1)
            else:
                learn(expert_name(stage), "expert", stage.train, steps, micro, args.lr)
            save_lora(model, expert_name(stage), run / "experts" / stage.name, args.model)
            if args.router == "prototype":
                kept = shots_of(stage, args.shots, args.seed)
                prototypes.append(frozen_features(model, processor, cache, kept).mean(0))
            unfinished = {"phase": "router", "steps": 0}
            checkpoint(t, unfinished)
        for other in stages[: t + 1]:
            move_lora(model, expert_name(other), "cpu")

        # the router: from the pretrained model again, on the kept samples of all tasks so far
        letters = letters_of(t + 1, args.seed)
        asks = t > 0 and args.router in ("mllm", "generate")
        if asks:
            descriptions = [stream.descriptions[other.name] for other in stages[: t + 1]]
            shots = [(s, k) for k, other in enumerate(stages[: t + 1])
                     for s in shots_of(other, args.shots, args.seed)]  # fmt: skip
            lessons = router_samples(*zip(*shots, strict=True), descriptions, letters)
            steps = router_steps(len(lessons), args.router_epochs, args.router_batch,
                                 f"{args.seed}/{t}", args.blind_shots)  # fmt: skip
            lessons += [replace(sample, image=None) for sample in lessons]
            micro_router = math.ceil(args.router_batch / args.accumulate)
            learn(f"{ROUTER}-{t + 1}", "router", lessons, steps, micro_router, args.router_lr)
            save_lora(model, f"{ROUTER}-{t + 1}", run / "router", args.model)
            told = {k: other.name for k, other in zip(letters, stages[: t + 1], strict=True)}
            evaluation.write_json(run / "router" / "letters.json", told)

        # test on all stages seen so far; with --hold_out also on the object group that was left out
        model.eval()
        records = []
        for tests, scores, kind in ((stages, matrix, ""), (stream.novel or [], novel, "novel-")):
            for i, test in enumerate(tests[: t + 1]):
                if asks:
                    use(model, f"{ROUTER}-{t + 1}")
                if args.router == "oracle":
                    choice, failures = [i] * len(test.test), 0
                    probability = np.eye(t + 1)[choice]
                else:
                    probability, choice, failures = route(
                        model, processor, cache, collator, test.test, t, args, stream, letters,
                        prototypes,
                    )  # fmt: skip
                cost["failures"] += failures
                cost["router_passes"] += len(choice) if asks else 0
                lap("routing")
                cost["generations"] += answer_all(
                    model, processor, cache, collator, test.test, choice, stages, args, answers
                )
                said = {id(s): answers[id(s), k] for s, k in zip(test.test, choice, strict=True)}
                rows = evaluation.evaluate(
                    lambda samples, said=said: [said[id(s)] for s in samples],
                    test.test, test.metric, args.eval_batch_size, f"test {kind}{test.name}",
                )  # fmt: skip
                scores[t, i] = evaluation.accuracy(rows, test.metric)
                evaluation.write_predictions(run, t, f"{kind}{i + 1}" if kind else i, rows)
                if not kind:
                    records += [
                        {"stage": t + 1, "task": i + 1, "question_id": s.id, "choice": k + 1,
                         "probabilities": [round(float(x), 4) for x in p], "right": k == i}
                        for s, k, p in zip(test.test, choice, probability, strict=True)
                    ]  # fmt: skip
                lap("answers")
        if asks:
            remove_lora(model, f"{ROUTER}-{t + 1}")
        if not me:
            with open(routing, "a") as file:
                file.write("".join(json.dumps(record) + "\n" for record in records))
        evaluation.write_matrix(run, stages, matrix)
        right = 100 * np.mean([record["right"] for record in records])
        print(f"after {stage.name}: " + " ".join(f"{a:.1f}" for a in matrix[t, : t + 1])
              + f"; {right:.1f}% routed right")  # fmt: skip
        unfinished = None
        checkpoint(t + 1)

    # ---- 7.5 The result -------------------------------------------------------------------------
    if me:  # under torchrun the first process has it
        return
    names = [stage.name for stage in stages]
    print("\n" + evaluation.table(matrix, names) + "\n")
    lines = [json.loads(line) for line in routing.read_text().splitlines()]
    confusion = np.zeros((T, T, T))  # [stage, task, chosen expert]
    for line in lines:
        confusion[line["stage"] - 1, line["task"] - 1, line["choice"] - 1] += 1
    right = [100 * np.trace(c) / max(c.sum(), 1) for c in confusion]
    each = parameter_report(model)["adapters"] // T
    summary = {"peak_memory_mb": peak_memory(), "trainable_parameters": each}
    summary |= {"tower_runs": cache.tower_runs, "confusion": confusion, "cost": cost}
    router = T > 1 and args.router in ("mllm", "generate")  # is one of the adapters kept
    summary |= {"routing_accuracy": right, "stored_parameters": each * (T + router)}
    if stream.novel:
        print("object group left out of training:\n" + evaluation.table(novel, names) + "\n")
        summary["novel"] = {"matrix": novel, "metrics": evaluation.metrics(novel)}
    lap("end")
    summary |= {"seconds": sum(seconds.values()), "seconds_by_part": seconds}
    evaluation.finish_run(run, summary)
    cases(stream, run, lines, letters_of(T, args.seed))
    plot([run], run / "figures")
    print(f"{right[-1]:.1f}% routed right at the end; {cost['generations']} answers generated, "
          f"{cost['router_passes']} router passes, {cost['failures']} unreadable")  # fmt: skip
    print("seconds: " + ", ".join(f"{part} {value:.1f}" for part, value in seconds.items()))
    print(f"peak memory {summary['peak_memory_mb']:,.0f} MB; everything is in {run}")


# --------------------------------------------------------------------------------------------------
# 8. Figures from saved records: python mllm_cl.py --plot RUN [RUN ...]
# --------------------------------------------------------------------------------------------------


def cases(stream, run, lines, letters):
    """Two test samples of each task (of more than five tasks one), one that was routed wrong if
    there is one: figure at once, since it needs the images."""
    T, chosen = len(stream.stages), []
    end = [line for line in lines if line["stage"] == T]
    for i, stage in enumerate(stream.stages):
        own = [line for line in end if line["task"] == i + 1]
        place = sorted(range(len(own)), key=lambda k: own[k]["right"])[:1]
        place += [len(own) - 1] if T <= 5 else []
        said = evaluation.read_json(evaluation.predictions_file(run, T - 1, i), lines=True)
        chosen += [(stage, stage.test[k], own[k], said[k]) for k in dict.fromkeys(place)]
    rows = math.ceil(len(chosen) / 2)
    figure, axes = evaluation.new_figure(rows, 2, height=0.4 + rows)
    for axis in np.ravel(axes):
        axis.axis("off")
    for axis, (stage, sample, line, row) in zip(np.ravel(axes), chosen, strict=False):
        if sample.image:
            picture = pad_square(load_image(sample.image), (127,) * 3).resize((96, 96))
            axis.imshow(picture, extent=(0, 1, 0, 1))
        own = sample.question.split("\n")[0]
        best = sorted(enumerate(line["probabilities"]), key=lambda pair: -pair[1])[:2]
        names = [f"{letters[k]} {stream.stages[k].name} {100 * p:.0f}%" for k, p in best]
        mark = "right" if line["right"] else "WRONG"
        text = f"{stage.name}: {own[:44]}{'...' if len(own) > 44 else ''}\n"
        text += f"router: {', '.join(names)} ({mark})\n"
        said = "".join(c if c.isprintable() else "?" for c in row["text"])
        text += f"answer: {said}\ngold: {row['answers'][0]}"
        axis.text(1.08, 0.5, text, va="center", fontsize=7.5, parse_math=False)  # "$5" is money
        axis.set_xlim(0, 3.6)
        axis.set_ylim(0, 1)
    figure.suptitle("Questions, the router's choice, the answer")
    evaluation.save_figure(figure, Path(run) / "figures" / "cases.png")


def figure_confusion(record, path):
    """Who was sent where, after each of the last four stages: rows tasks, columns experts, in %."""
    stages, last = record["stages"], min(4, max(len(record["stages"]) - 1, 1))
    columns = min(last, 2)
    rows = math.ceil(last / columns)
    height = 0.6 + rows * (1.2 + 0.3 * len(stages))
    figure, axes = evaluation.new_figure(rows, columns, height=height)
    for axis in np.ravel(axes):
        axis.set_axis_off()
    for t, axis in zip(range(len(stages) - last, len(stages)), np.ravel(axes), strict=False):
        confusion = np.array(record["confusion"])[t, : t + 1, : t + 1]
        share = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
        axis.set_axis_on()
        axis.imshow(share, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        for i, k in np.ndindex(share.shape):
            ink = "white" if share[i, k] < 45 else "black"
            axis.text(k, i, f"{share[i, k]:.0f}", ha="center", va="center", color=ink, fontsize=9)
        axis.set_xticks(range(t + 1), stages[: t + 1])
        axis.set_yticks(range(t + 1), stages[: t + 1])
        right = record["routing_accuracy"][t]
        axis.set_title(f"after {stages[t]}: {right:.1f}% routed right", fontsize=10)
    figure.supxlabel("expert that answered", fontsize=9)
    figure.supylabel("task of the question", fontsize=9)
    figure.suptitle(f"Router {record['args']['router']}: who answered (%)", fontsize=11)
    return evaluation.save_figure(figure, path / "confusion.png")


def router_name(record):
    """The router of a run, and whether it saw all images while it was trained."""
    router = record["args"]["router"]
    blind = router in ("mllm", "generate") and record["args"]["blind_shots"]
    return f"{router}, half blind" if blind else router


def figure_routers(runs, path):
    """Routing accuracy, MFN, and the seconds of training routers and of routing, of the runs."""
    figure, axes = evaluation.new_figure(1, 3, height=1.4 + 0.4 * len(runs))
    columns = {
        "routed right (%)": [r["routing_accuracy"][-1] for r in runs.values()],
        "MFN (%)": [r["metrics"]["MFN"] for r in runs.values()],
        "seconds of routers": [
            sum(r["seconds_by_part"].get(part, 0) for part in ("router", "routing"))
            for r in runs.values()
        ],
    }
    for k, (axis, (title, values)) in enumerate(zip(axes, columns.items(), strict=True)):
        axis.barh(range(len(values)), values, color=evaluation.COLORS[k])
        for y, value in enumerate(values):
            ink = "white" if value > 0.3 * max(values) else "black"
            axis.text(0, y, f" {value:.1f}", va="center", fontsize=9, color=ink)
        axis.set_yticks(range(len(values)), [""] * len(values) if k else list(runs))
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10)
    return evaluation.save_figure(figure, path / "routers.png")


def figure_shots(runs, path):
    """Routing accuracy against the number of kept samples per task, a line per router."""
    lines = {}
    for record in runs.values():
        point = record["args"]["shots"], record["routing_accuracy"][-1]
        lines.setdefault(router_name(record), []).append(point)
    figure, axis = evaluation.new_figure()
    for k, (router, points) in enumerate(lines.items()):
        shots = sorted({x for x, _ in points})
        mean = [np.mean([y for x, y in points if x == n]) for n in shots]
        axis.plot(shots, mean, color=evaluation.COLORS[k], marker=evaluation.MARKERS[k],
                  label=router)  # fmt: skip
    axis.set_xlabel("samples kept per task")
    axis.set_ylabel("routed right after the last stage (%)")
    axis.set_title("How many samples does the router need?")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9, loc="lower right")
    return evaluation.save_figure(figure, path / "shots.png")


def figure_parameters(record, path):
    """Stored parameters against stages: experts, and the router from the second stage on."""
    each, T = record["trainable_parameters"] / 1e3, len(record["stages"])
    figure, axis = evaluation.new_figure()
    stages = np.arange(1, T + 1)
    router = 0 if record["args"]["router"] in ("oracle", "prototype") else each
    axis.plot(stages, each * stages, "o-", color=evaluation.COLORS[0], label="experts")
    axis.plot(stages, each * stages + router * (stages > 1), "s--", color=evaluation.COLORS[1],
              label="experts and router")  # fmt: skip
    axis.set_xticks(stages)
    axis.set_xlabel("after training stage")
    axis.set_ylabel("stored parameters (thousands)")
    axis.set_title("One LoRA a task, and the router")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    return evaluation.save_figure(figure, path / "parameters.png")


def plot(folders, path=None):
    """Confusion, parameters and matrix of the first run; routers and shots of all."""
    records = [evaluation.read_run(folder) for folder in folders]
    path = Path(path or Path(folders[0]) / "figures")
    for folder, record in zip(folders, records, strict=True):
        if record["script"] != "mllm_cl" or "confusion" not in record:
            raise InputError(f"{folder}: these figures need finished runs of mllm_cl.py")
    if len(streams := sorted({record["stream"] for record in records})) > 1:
        raise InputError(f"--plot: runs of different streams ({', '.join(streams)}) in one figure")
    named = "router blind_shots experts".split()
    flags = [{k: v for k, v in r["args"].items() if k not in named} for r in records]
    keys = [key for key in flags[0] if len({str(own.get(key)) for own in flags}) > 1]
    labels = [", ".join([router_name(r), *(f"{key} {r['args'].get(key)}" for key in keys)])
              for r in records]  # fmt: skip
    runs, first = dict(zip(labels, records, strict=True)), records[0]
    if len(runs) < len(records):
        raise InputError(f"{', '.join(map(str, folders))}: some are of the same settings and seed")
    figure_confusion(first, path)
    figure_parameters(first, path)
    figure_routers(runs, path)
    if len({record["args"]["shots"] for record in records}) > 1:
        figure_shots(runs, path)
    evaluation.plot_matrix(first["matrix"], first["stages"], path / "matrix.png", "MR-LoRA")
    print(f"figures: {path}")


if __name__ == "__main__":
    try:
        if args.plot:
            plot(args.plot, args.out)
        else:
            main(args, stream, run)
    except InputError as error:
        fail(error)
