"""MR-LoRA: the router's prompt, letters and lessons, routed answers, independent experts."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_here
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity, normalize

import data
import eval as evaluation
import mllm_cl
from features import frozen_features
from model import seed_by

NAMES = ["one", "two", "three"]
LINES = ["signs", "maps", "charts"]


@pytest.fixture(scope="module")
def flags(flags):
    return [*flags, *"--router_steps 4 --shots 3 --router_batch 4 --rank 4".split()]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    return run_here("mllm_cl", flags, tmp_path_factory.mktemp("mllm_cl") / "run")


@pytest.fixture
def team(tiny):
    """Three random experts and a random router on the tiny model."""
    args, states = SimpleNamespace(targets="q,v", rank=4, alpha=8.0, dropout=0.0), []
    for seed in range(4):
        torch.manual_seed(seed)
        with torch.no_grad():
            for p in tiny.add_lora(args):
                p += 0.1 * torch.randn_like(p)
        states.append(tiny.lora_state())
    return mllm_cl.Team(NAMES, LINES, list("BAC"), states[:3], states[3])


def test_the_routers_prompt(samples):
    """A line per expert in the order of the letters, not of the tasks; no suffix, no answer."""
    turns = {"question": "how many?\nOne word.", "suffix": "One word.", "further": (("a", "b"),)}
    sample = replace(samples[0], **turns)
    (asked,) = mllm_cl.router_samples([sample], [1], LINES[:2], ["B", "A"])
    lines = asked.question.split("\n")
    assert lines[0].startswith("You are the router")
    assert lines[1:] == ["A. maps", "B. signs", "Question: how many?", "Give the letter only."]
    assert asked.answer == "A" and asked.suffix == "" and asked.image == sample.image
    assert asked.further == ()
    assert sorted(mllm_cl.letters_of(5, 3)) == list("ABCDE") != mllm_cl.letters_of(5, 3)
    assert len({tuple(mllm_cl.letters_of(5, seed)) for seed in range(20)}) > 10


def test_letters_are_told_apart_where_they_are_predicted(llava, samples):
    """For both tokenizers: logits of the letters where the letter of the answer is predicted,
    whatever letter the prompt is filled up with."""
    letters, some = list("BDACE"), [replace(samples[2], image=None), *samples[:3]]
    ids, place = mllm_cl.letter_ids(llava.collate, some[0], letters)
    words = [llava.processor.decode([token]).strip() for token in ids]
    chatml = "<|im_start|>" in llava.processor.tokenizer.get_vocab()
    assert words == letters and place == (0 if chatml else 1)  # there the blank is a token
    rows = []
    for letter in "BE":
        filled = [replace(sample, answer=letter) for sample in some]
        batch = llava.batch(filled, train=True)
        rows.append(mllm_cl.letter_logits(llava, batch, ids, place))
        labels = batch.pop("labels")
        logits = llava.forward(batch).logits  # of all positions
        at = (labels == ids[letters.index(letter)]).int().argmax(1) - 1
        torch.testing.assert_close(rows[-1], logits[range(4), at][:, ids], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*rows, rtol=1e-4, atol=1e-4)

    def shared(samples, train):  # the first tokens that differ are shared by several letters
        codes = [ord(sample.answer) for sample in samples]
        return {"labels": torch.tensor([[-100, 7, code % 2, code] for code in codes])}

    with pytest.raises(data.InputError, match="no single token tells the experts apart"):
        mllm_cl.letter_ids(shared, samples[0], letters)


@pytest.mark.parametrize("text", ["B", " B. ", "(B", "BA", "b", "C", "(B)", "B is", ""])
def test_what_the_generating_router_says(text):
    """Up to one character that is no letter is overlooked, as published."""
    wanted = {"B": "B", " B. ": "B", "(B": "B", "BA": "A"}
    assert mllm_cl.letter_said(text, ["B", "A"]) == wanted.get(text)


def test_every_shot_appears_with_and_without_its_image():
    args = SimpleNamespace(router_batch=4, router_epochs=4, accumulate=2, seed=0, blind_shots=True)
    args.router_steps = 0
    steps = mllm_cl.router_steps(10, 1, args)
    assert [list(map(len, step)) for step in steps] == [[2, 2], [2, 2], [2]] * 4
    passes = [sum(sum(steps[k : k + 3], []), []) for k in range(0, 12, 3)]
    for one, following in zip(passes, passes[1:]):
        assert sorted(one + following) == list(range(20))
        assert sum(i >= 10 for i in one) == 5  # both kinds in every pass
    args.blind_shots, args.router_steps = False, 5
    assert [len(mllm_cl.router_steps(10, t, args)) for t in (1, 2)] == [15, 5]
    assert sorted(sum(mllm_cl.router_steps(10, 1, args)[0], []))[-1] < 10


def test_the_router_learns_from_kept_training_samples_alone(flags):
    args = mllm_cl.parse([*flags, "--shots", "4"])
    stream = data.load_stream(args)
    letters = ["B", "A"]
    team = mllm_cl.Team(NAMES, LINES, [*letters, "C"])
    samples, steps, lr = mllm_cl.lessons("router", 1, stream, team, args)
    assert [s.answer for s in samples] == 2 * ([letters[0]] * 4 + [letters[1]] * 4)
    train = {s.image for stage in stream.stages[:2] for s in stage.train}
    assert {s.image for s in samples[:8]} <= train and {s.image for s in samples[8:]} == {None}
    assert "charts" not in samples[0].question and lr == args.router_lr == 4e-3
    assert {i for step in steps for batch in step for i in batch} == set(range(16))
    samples, steps, lr = mllm_cl.lessons("expert", 1, stream, team, args)
    assert samples == stream.stages[1].train and lr == args.lr and len(steps) == 6
    assert mllm_cl.lessons("router", 0, stream, team, args)[1] == []  # one expert: no choice
    args.router = "oracle"
    assert mllm_cl.lessons("router", 1, stream, team, args)[1] == []
    args.shots = 99
    assert len(mllm_cl.shots_of(stream.stages[0], args)) == 12


def test_the_routers(tiny, team, samples, monkeypatch):
    args = SimpleNamespace(router="mllm", eval_batch_size=4, seed=0, shots=3)
    samples = [replace(s, stage=NAMES[k % 3]) for k, s in enumerate(samples[:10])]

    def choose(router):
        args.router = router
        return mllm_cl.choose(tiny, team, args, samples)

    tiny.load_lora(team.experts[0])
    mllm = choose("mllm")
    tiny.load_lora(team.router)  # by hand, one question at a time
    letters = team.letters
    for sample, row in zip(samples, mllm):
        (asked,) = mllm_cl.router_samples([sample], [0], LINES, letters)
        ids, place = mllm_cl.letter_ids(tiny.collate, asked, letters)
        logits = mllm_cl.letter_logits(tiny, tiny.batch([asked], train=True), ids, place)
        np.testing.assert_allclose(row, logits[0].softmax(0), atol=1e-5)
    assert len(set(mllm.argmax(1))) > 1 and team.cost["router_passes"] == 10
    assert choose("oracle").tolist() == np.eye(3)[[k % 3 for k in range(10)]].tolist()
    said = iter([letters[2], "it is A!", "", letters[0]] * 3)
    monkeypatch.setattr(tiny, "generate", lambda batch, n: [next(said) for _ in batch["samples"]])
    generate = choose("generate")
    order = sum(mllm_cl.by_length(samples, 4), [])
    for place, n in enumerate(order):  # where it names no letter, the logits decide
        wanted = {0: np.eye(3)[2], 3: np.eye(3)[0]}.get(place % 4, mllm[n])
        np.testing.assert_allclose(generate[n], wanted, atol=1e-5)
    assert team.cost["failures"] == 5
    features = frozen_features(tiny, tiny.batch(samples, train=True))
    image = tiny.features([samples[0].image])[0].mean(0)
    text = tiny.text_means([samples[0].question])
    wanted = torch.cat([normalize(image, dim=0), normalize(text)[0]])
    torch.testing.assert_close(features[0], wanted)
    team.prototypes = [*features[:3]]
    cosines = cosine_similarity(features[:, None], features[None, :3], -1)
    np.testing.assert_allclose(choose("prototype"), (20 * cosines).softmax(1), atol=1e-5)
    del team.experts[1:]
    assert choose("mllm").tolist() == [[1.0]] * 10


def test_a_question_is_read_twice_with_a_trained_router_and_once_without(tiny, team, samples):
    args = SimpleNamespace(router="mllm", eval_batch_size=4)
    team.prototypes, read = [*frozen_features(tiny, tiny.batch(samples[:3], train=True))], []

    def count(module, words, options):
        ids = options["input_ids"]
        read.extend([1] * len(ids) if ids.shape[1] > 1 else [])  # later tokens come one by one

    tiny.model.model.register_forward_pre_hook(count, with_kwargs=True)
    for args.router, times in ("mllm", 2), ("prototype", 1):
        mllm_cl.answer(tiny, team, args, SimpleNamespace(lap=lambda name: None), samples[:6])
        assert sum(read) == 6 * times
        team.answers.clear(), read.clear()


def test_the_chosen_expert_answers_and_only_once(tiny, team, samples, monkeypatch):
    args, rng = SimpleNamespace(eval_batch_size=3), np.random.default_rng(0)
    samples = [replace(sample, stage=NAMES[0]) for sample in samples[:8]]
    alone = []  # by every expert, one question at a time
    for expert in team.experts:
        tiny.load_lora(expert)
        alone.append([tiny.answer([sample])[0] for sample in samples])
    assert len(set(map(tuple, alone))) == 3
    answer, run = tiny.answer, SimpleNamespace(lap=lambda name: None)
    asked, pairs = [], set()
    monkeypatch.setattr(tiny, "answer", lambda batch: asked.extend(batch) or answer(batch))
    for _ in range(3):
        probability = rng.random((8, 3))
        monkeypatch.setattr(mllm_cl, "choose", lambda *_, p=probability: p)
        texts, notes = mllm_cl.answer(tiny, team, args, run, samples)
        choice = probability.argmax(1)
        assert [note["choice"] for note in notes] == choice.tolist()
        assert texts == [alone[k][n] for n, k in enumerate(choice)]
        pairs |= set(enumerate(choice))
    assert len(asked) == team.cost["generations"] == len(pairs) < 24


def test_a_run_leaves_its_records(whole):
    record = evaluation.read_json(whole / "summary.json")
    facts, size = np.load(whole / "facts.npz"), record["trainable_parameters"]
    assert np.array(record["confusion"]).sum((1, 2)).tolist() == [5, 10, 15]
    choices = set()
    for t, i in ((1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)):
        choices |= {(i, n, k) for n, k in enumerate(facts[f"{t}-{i}-choice"])}
    cost = {"router_passes": 25, "generations": len(choices), "failures": 0}
    assert record["cost"] == cost and len(choices) < 30
    assert np.allclose(facts["3-2-probability"].sum(1), 1)
    right = sum((facts[f"3-{i + 1}-choice"] == i).sum() for i in range(3))
    assert record["routing_accuracy"][2] == pytest.approx(100 * right / 15)
    router = load_file(whole / "router" / "adapter_model.safetensors").values()
    assert sum(x.numel() for x in router) == size and record["stored_parameters"] == 4 * size


def test_experts_do_not_depend_on_the_order_of_the_tasks(whole, flags, tmp_path):
    flags = [*flags, *"--order three,one --router oracle --cross".split()]
    run = run_here("mllm_cl", flags, tmp_path)
    for name in ("three", "one"):
        file = f"experts/{name}/adapter_model.safetensors"
        assert (run / file).read_bytes() == (whole / file).read_bytes()
    record = evaluation.read_json(run / "summary.json")
    assert record["routing_accuracy"] == [100, 100]
    cross = np.array(record["cross"])  # [expert, task]: with the task known the own expert answers
    assert cross.diagonal().tolist() == record["matrix"][1] and cross[0, 1] != cross[1, 1]
    assert not (run / "router").exists()


def test_a_router_goes_on_from_the_last_one(whole, flags, tmp_path):
    """At a rate at which nothing moves, the last router is the first one as it was drawn."""
    flags = [*flags, "--experts", str(whole), "--router_lr", "1e-12"]

    def last(order, steps):
        words = ["--order", order, "--router_steps", steps]
        run = run_here("mllm_cl", [*flags, *words], tmp_path / f"{order}-{steps}")
        tensors = load_file(run / "router" / "adapter_model.safetensors")
        return torch.cat([x.flatten() for name, x in tensors.items() if "lora_A" in name])

    first, on = last("one,two", "1"), last("one,two,three", "1")
    torch.testing.assert_close(on, first, rtol=1e-6, atol=1e-8)
    seed_by("0/router-3")  # as one that begins anew would be drawn
    a = torch.nn.init.kaiming_uniform_(torch.empty(4, 64), a=5**0.5)
    assert (on[: a.numel()] - a.flatten()).abs().max() > 0.01


def test_experts_of_another_run_give_the_same_bytes(whole, flags, tmp_path):
    flags = [*flags, "--experts", str(whole)]
    run = run_here("mllm_cl", flags, tmp_path / "run")
    names = ["matrix.json", "router/adapter_model.safetensors"]
    names += [f"predictions/{path.name}" for path in (whole / "predictions").iterdir()]
    assert all((run / name).read_bytes() == (whole / name).read_bytes() for name in names)
    records = [evaluation.read_json(path / "summary.json") for path in (run, whole)]
    times = [record["seconds_by_part"]["expert"] for record in records]
    assert times[0] == pytest.approx(times[1])  # what they cost counts here, too
    with pytest.raises(data.InputError, match="was trained with --lr 0.02, not 0.1"):
        run_here("mllm_cl", [*flags, "--lr", "0.1"], tmp_path / "other")
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(data.InputError, match="is no finished run of mllm_cl.py"):
        run_here("mllm_cl", [*flags, "--experts", str(run)], tmp_path / "other")


def test_bad_input(flags, capsys):
    args = mllm_cl.parse(flags)
    stream = data.load_stream(args)
    del stream.descriptions["one"]
    mllm_cl.check(args, stream)
    assert "the router knows one by name only" in capsys.readouterr().out
    stream.descriptions["two"] = "maps and charts " * 500
    with pytest.raises(data.InputError, match="prompt of the router, stage one.* reads at most"):
        mllm_cl.check(args, stream)
    many = SimpleNamespace(stages=[None] * 27)
    with pytest.raises(data.InputError, match="27 tasks, but only 26 letters"):
        mllm_cl.check(args, many)
    for row in data.STREAMS.values():  # every stream of ours can be routed
        assert len(set(row.descriptions.values()) - {""}) == len(row.stages)
