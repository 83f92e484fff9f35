"""The defining property of every baseline, and the method of the docs."""

import json
import re
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

import baselines
import data
import eval as evaluation
import plot
from model import LoRALinear, read_lora


@pytest.fixture
def make(tiny, samples):
    """make("ewc", *flags): the method on the tiny model, with a LoRA that does something."""

    def build(name, *flags):
        args = baselines.parse(["--method", name, "--dropout", "0", "--rank", "4", *flags])
        torch.manual_seed(0)
        stages = [data.Stage(str(k), samples[k::3], samples[k::20], "exact") for k in range(3)]
        method = baselines.METHODS[name](args, tiny, SimpleNamespace(stages=stages))
        tiny.model.eval()
        return change(method)

    return build


@torch.no_grad()
def change(method):
    for p in method.lora:
        p += 0.1 * torch.randn_like(p)
    return method


def copies(parameters):
    return [p.detach().clone() for p in parameters]


def test_fisher_is_the_mean_of_squared_gradients_of_log_p(make, samples):
    ewc, squares = make("ewc"), []
    chosen = [replace(samples[0], image=None), samples[3]]
    for sample in chosen:
        batch = ewc.llava.batch([sample], train=True)
        labels = batch.pop("labels")[0, 1:]  # without labels: logits of all positions
        logits = ewc.llava.forward(batch).logits[0, :-1]
        log_p = -cross_entropy(logits, labels, reduction="sum")  # -100 is left out
        squares.append(torch.autograd.grad(log_p, ewc.lora, materialize_grads=True))
    fisher = ewc.fisher_information(chosen)
    assert all(f.sum() > 0 for f in fisher)
    for f, a, b in zip(fisher, *squares):
        torch.testing.assert_close(f, (a**2 + b**2) / 2, rtol=1e-3, atol=1e-9)


def test_ewc_is_the_sum_of_one_quadratic_per_earlier_stage(make, monkeypatch):
    ewc, terms, values = make("ewc", "--ewc_lambda", "7"), [], []
    monkeypatch.setattr(ewc, "fisher_information", lambda samples: terms[-1][0])
    assert ewc.penalties(0) == {}
    for t in (0, 1):
        change(ewc)
        terms.append(([torch.rand_like(p) for p in ewc.lora], copies(ewc.lora)))
        ewc.after(t, ewc.stages[t])
        assert t or ewc.penalties(1)["ewc"] == 0  # at the weights of the first stage
    for _ in range(2):
        change(ewc)
        squares = [
            (f * (p - old) ** 2).sum() for term in terms for f, old, p in zip(*term, ewc.lora)
        ]
        values.append((ewc.penalties(2)["ewc"].item(), 7 / 2 * sum(squares).item()))
    (a, x), (b, y) = values  # equal up to a constant
    assert abs(a - b) > 1 and a - b == pytest.approx(x - y, rel=1e-3)


def test_lwf_is_zero_at_the_start_of_a_stage_and_then_the_formula(make, samples):
    lwf = make("lwf", "--lwf_lambda", "0.5")
    batch = lwf.llava.batch(samples[:3], train=True)
    assert lwf.losses(0, batch).keys() == {"task"}
    lwf.before(1, lwf.stages[1])
    assert abs(lwf.losses(1, batch)["lwf"]) < 1e-6
    old = lwf.llava.forward(batch).logits.detach()
    before = copies(change(lwf).lora)
    terms, new = lwf.losses(1, batch), lwf.llava.forward(batch)
    p, q = (old / 2).softmax(1), (new.logits / 2).softmax(1)
    wanted = 0.5 * 4 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(terms["lwf"], wanted, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(terms["task"], new.loss)
    assert wanted > 1e-3 and all(map(torch.equal, before, lwf.lora))  # swapped, and swapped back
    ours, formula = (torch.autograd.grad(x, lwf.lora) for x in (terms["lwf"], wanted))
    torch.testing.assert_close(ours, formula, rtol=1e-2, atol=1e-5)


def test_olora_adds_up_and_is_saved_as_one_adapter(make, samples, tmp_path):
    olora, stacks = make("olora", "--olora_lambda", "3"), []
    layer = olora.layers[0]
    x = torch.randn(2, 5, layer.base.in_features)
    wanted = layer.base(x)
    for t, stage in enumerate(olora.stages):
        olora.before(t, stage)
        assert t == 0 or not any(p.any() for p in olora.lora[1::2])  # B starts at zero
        stacks.append(copies(change(olora).lora))
        wanted = wanted + layer.scale * x @ stacks[t][0].T @ stacks[t][1].T
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)
    overlap = [(old @ new.T).abs().sum() for t in (0, 1) for old, new in zip(stacks[t], stacks[2])]
    torch.testing.assert_close(olora.penalties(2)["olora"], 3 * sum(overlap[::2]))  # A, not B
    assert olora.penalties(0) == {}
    batch = olora.llava.batch(samples[:3], train=True)
    logits = olora.llava.forward(batch).logits
    olora.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    args = SimpleNamespace(targets=olora.args.targets, dropout=0.0, rank=config["r"])
    args.alpha = config["lora_alpha"]
    olora.llava.add_lora(args, LoRALinear)
    olora.llava.load_lora(read_lora(tmp_path))
    assert config["r"] == 12
    torch.testing.assert_close(olora.llava.forward(batch).logits, logits, rtol=1e-3, atol=1e-3)


def test_hide_weighs_each_question_in_the_last_layer_alone(make, samples):
    """At a low temperature the last layer gives a question the LoRA of its own stage; in the other
    layers all LoRAs count the same; in training the new one is alone."""
    hide = make("hide", *"--hide_temperature 1e-3 --hide_sum 1.5 --targets q,v".split())
    x = torch.randn(2, 3, 64)
    for t in (0, 1):
        hide.before(t, hide.stages[t])
        hide.llava.model.train()
        layer = hide.layers[0]
        alone = layer.base(x) + layer.scale * x @ layer.A.T @ layer.B.T
        torch.testing.assert_close(layer(x), alone)
        change(hide).llava.model.eval()
        hide.after(t, replace(hide.stages[t], train=samples[t : t + 1]))
    hide.answer(samples[:2])
    for layer, each in (
        (hide.layers[0], torch.full((2, 2), 0.75)),
        (hide.layers[-1], torch.eye(2)),
    ):
        wanted = layer.base(x)
        for k, (A, B) in enumerate(((layer.old_A, layer.old_B), (layer.A, layer.B))):
            wanted = wanted + each[:, k, None, None] * layer.scale * x @ A.T @ B.T
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)
    images, words = torch.tensor([[1.0, 0], [0, 0]]), torch.tensor([[0, 2.0], [3, 0]])
    hide.anchors = [[words[0], torch.tensor([5.0, 0])], [torch.ones(2), torch.tensor([0, 1.0])]]
    cosines = torch.tensor([[1.0, 0.5**1.5], [0.0, 0.5**0.5]])  # no image: the question alone
    torch.testing.assert_close(hide.likeness(words, images), cosines)


def test_disco_weighs_experts_by_the_question_alone(make, samples):
    disco = make("disco", "--targets", "q,projector")
    for t, stage in enumerate(disco.stages):
        disco.before(t, stage)
        change(disco)
        disco.after(t, stage)
    table = disco.llava.model.get_input_embeddings().weight
    split = partial(disco.llava.processor.tokenizer, add_special_tokens=False)
    for stage, mean in zip(disco.stages, disco.anchors):
        means = [table[split(sample.question)["input_ids"]].mean(0) for sample in stage.train]
        torch.testing.assert_close(mean, torch.stack(means).mean(0) - table.mean(0))
    other = replace(samples[0], image=samples[3].image)
    some = [samples[0], other, replace(samples[1], image=None)]
    assert len(disco.answer(some)) == 3
    words, means = disco.words(some), torch.stack(disco.anchors)
    cosines = torch.nn.functional.cosine_similarity(words[:, None], means[None], -1)
    for path, layer in disco.llava.layers.items():
        wanted = (cosines / 0.05).softmax(1)
        torch.testing.assert_close(layer.weights, wanted[:2] if "projector" in path else wanted)
    assert torch.equal(layer.weights[0], layer.weights[1])  # the same question


def test_reglora_holds_the_entries_that_earlier_stages_changed_most(make, samples):
    reglora, layer = make("reglora"), None
    assert reglora.penalties(0) == {}
    layer = reglora.layers[0]
    product = (layer.B @ layer.A).detach().flatten().abs()
    reglora.after(0, reglora.stages[0])
    kept, size = reglora.kept[0], int(0.02 * len(product))
    assert len(kept) == size and product[kept].min() >= product.sort().values[-size]
    reglora.before(1, reglora.stages[1])
    assert reglora.penalties(1)["reglora"] == 0  # B starts at zero
    change(reglora)
    products = [(layer.B @ layer.A).flatten() for layer in reglora.layers]
    means = [x[kept].abs().mean() for x, kept in zip(products, reglora.kept)]
    torch.testing.assert_close(reglora.penalties(1)["reglora"], 250 * torch.stack(means).mean())
    reglora.after(1, reglora.stages[1])
    assert len(reglora.kept[0]) == 2 * size and torch.equal(reglora.kept[0][:size], kept)
    away = torch.ones_like(products[0]).index_fill(0, kept.long(), 0).view(len(layer.B), -1)
    with torch.no_grad():
        layer.B.zero_()
        layer.B[:, 0] = 1
        layer.A.zero_()
        free = away.all(0).nonzero()[:, 0]
        assert len(free)
        layer.A[0, free] = 5.0
    assert reglora.change(layer, kept) == 0  # a change elsewhere is free
    layer.dropout, x = 0.5, torch.randn(9, layer.base.in_features)
    layer.B.data.zero_()
    torch.testing.assert_close(layer.train()(x), layer.eval()(x))  # what is frozen sees all of x


def test_clmoe_keeps_a_share_of_its_experts(make, samples):
    clmoe = make("clmoe", "--experts", "4", "--targets", "q,v")
    layers = list(clmoe.llava.layers.values())
    clmoe.before(0, clmoe.stages[0])
    clmoe.llava.model.train()
    clmoe.losses(0, clmoe.llava.batch(samples[:4], train=True))
    tokens = clmoe.used.sum()
    assert tokens > 0 and tokens % (2 * len(layers)) == 0  # two a token and layer
    first = copies(clmoe.lora)
    clmoe.after(0, clmoe.stages[0])
    assert all(torch.equal(a, b) for a, b in zip(first, clmoe.lora)) and clmoe.top.sum() == 2
    clmoe.top = torch.tensor([True, True, False, False])
    clmoe.before(1, clmoe.stages[1])
    clmoe.used = torch.tensor([0, 9, 9, 0])  # the first is not used any more
    new = copies(change(clmoe).lora)
    clmoe.after(1, clmoe.stages[1])
    share = torch.tensor([0.3, 0.7, 0.7, 0.7])  # rank 4: a row each
    for k, layer in enumerate(layers):
        (A, B, _), (C, D, G) = first[3 * k : 3 * k + 3], new[3 * k : 3 * k + 3]
        torch.testing.assert_close(layer.A, share[:, None] * A + (1 - share[:, None]) * C)
        torch.testing.assert_close(layer.B, share * B + (1 - share) * D)
        assert torch.equal(layer.G, G)


def test_smolora_picks_one_expert_by_sight_and_one_by_the_instruction(make, samples):
    smolora = make("smolora", "--experts", "4", "--targets", "q,projector")
    layers = list(smolora.llava.layers.values())
    gates = [copies((layer.V, layer.I)) for layer in layers]
    some = [samples[0], replace(samples[0], image=samples[3].image), samples[1]]
    batch = smolora.llava.batch(some, train=True)
    smolora.losses(0, batch)["task"].backward()
    seen = batch["input_ids"] == smolora.llava.model.config.image_token_id
    assert seen.any() and smolora.routing["mask"][seen].all()  # the gates see the image
    for layer in layers:
        sight, instruction = layer.chosen
        assert instruction[0] == instruction[1]  # the same words
        for rows, chosen in zip(layer.A.grad.abs().sum(1).chunk(2), (sight, instruction)):
            assert set(rows.nonzero()[:, 0].tolist()) == set(chosen.tolist())
    layer = smolora.llava.layers["model.language_model.layers.0.self_attn.q_proj"]
    x, mask = torch.randn(3, 5, layer.base.in_features), torch.ones(3, 5)
    smolora.routing["mask"] = mask
    y, (A, B) = layer(x), (layer.A, layer.B)
    assert torch.equal(layer.chosen[0], (x.mean(1) @ layer.V.T).argmax(1))
    assert torch.equal(layer.chosen[1], (smolora.routing["words"] @ layer.I.T).argmax(1))
    for b, (k, n) in enumerate(layer.chosen.T.tolist()):
        v, i = (layer.scale * x[b] @ A[[r]].T @ B[:, [r]].T for r in (k, 2 + n))
        a = torch.stack([v @ layer.u[0], i @ layer.u[1]]).softmax(0)[..., None]
        torch.testing.assert_close(y[b], layer.base(x[b]) + a[0] * v + a[1] * i)
    alone = [smolora.answer([sample])[0] for sample in some]
    assert smolora.answer(some) == alone  # whatever the batch and its padding
    asked, long = [layer.chosen for layer in layers], "one two three four five six seven " * 8
    smolora.losses(0, smolora.llava.batch([replace(s, answer=long) for s in some], train=True))
    assert all(map(torch.equal, asked, [layer.chosen for layer in layers]))  # the answer is no hint
    assert all(map(torch.equal, sum(gates, []), [G for x in layers for G in (x.V, x.I)]))
    assert smolora.stored() == sum(p.numel() for layer in layers for p in layer.parameters()) - sum(
        p.numel() for layer in layers for p in layer.base.parameters()
    )


def test_any_method_can_replay(make):
    ewc, replay = make("ewc", "--buffer", "4"), make("replay", "--buffer", "4")
    assert [stage for _, stage in ewc.plan()] == [stage for _, stage in replay.plan()]
    with pytest.raises(data.InputError, match="--buffer: joint ignores it; use --method replay"):
        baselines.parse(["--method", "joint", "--buffer", "4"])


def test_moelora_starts_as_the_base_and_its_gate_mixes_experts():
    torch.manual_seed(2)
    layer = baselines.MoELoRALinear(torch.nn.Linear(10, 6), 8, 16.0, 0.0, 4)
    x = torch.randn(3, 5, 10)
    assert torch.equal(layer(x), layer.base(x))
    torch.nn.init.normal_(layer.B)
    even = layer.base(x) + 2 * x @ layer.A.T @ layer.B.T / 4  # alpha / r = 2, four experts
    torch.testing.assert_close(layer(x), even)
    with torch.no_grad():
        layer.G[2] = 1000 * x[0, 0]
    one = layer.base(x[0, 0]) + 2 * layer.B[:, 4:6] @ layer.A[4:6] @ x[0, 0]
    torch.testing.assert_close(layer(x)[0, 0], one, rtol=1e-4, atol=1e-4)


def test_replay_mixes_in_a_fixed_uniform_sample(make):
    replay = make("replay", "--buffer", "4")
    one, two, three = replay.stages
    n, three.blocks = len(three.train), [[0, 1, 2], list(range(3, len(three.train)))]
    (_, first), (_, second), (t, third) = replay.plan()
    old = third.train[n:]
    assert t == 2 and first.train == one.train and third.train[:n] == three.train
    assert [[s in stage.train for s in old].count(True) for stage in replay.stages] == [4, 4, 0]
    assert second.train[-4:] == old[:4]  # the same ones whatever comes later
    assert third.blocks[0] == [0, 1, 2, n, n + 2, n + 4, n + 6]
    assert sorted(sum(third.blocks, [])) == list(range(n + 8))
    count = dict.fromkeys((s.id for s in one.train), 0)
    for replay.args.seed in range(300):
        for sample in replay.mixed(1, two).train[-4:]:
            count[sample.id] += 1
    assert all(25 < c < 90 for c in count.values())  # 300 x 4 / 22 = 55 each
    replay.args.buffer = 999
    assert len(replay.mixed(1, two).train) == len(one.train) + len(two.train)


def test_blind_answers_are_those_to_black_images(make, tmp_path):
    method = make("sequential")
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    for i, stage in enumerate(method.stages):
        black = [replace(sample, image=tmp_path / "black.png") for sample in stage.test]
        texts, seeing = method.answer(black), method.answer(stage.test)
        assert texts != seeing
        stage.test = [replace(s, answers=(text,)) for s, text in zip(stage.test, texts)]
        rows, _ = evaluation.evaluate(method.answer, stage.test, "exact", 4)
        evaluation.write_predictions(tmp_path, 2, i, rows)
    run = SimpleNamespace(stages=method.stages, folder=tmp_path, args=method.args)
    blind = baselines.test_blind(run, method)
    assert blind["stages"] == [100] * 3 and blind["AP"] == 100
    seeing, blind = zip(*blind["seeing_blind_by_kind"].values())
    assert set(blind) == {100} and sum(seeing) < 300  # of four kinds


def test_the_method_of_the_docs_runs(flags, tmp_path, monkeypatch):
    """The ten lines of docs/baselines.md as they stand there: the penalty begins in stage 2."""
    page = (data.ROOT / "docs" / "baselines.md").read_text()
    program = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    words = ["l2.py", *flags, "--epochs", "1", "--limit", "8", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(plot, "baselines", lambda folders: None)
    exec(compile(program, "l2.py", "exec"), {"__name__": "__main__"})
    lines = evaluation.read_json(tmp_path / "run" / "metrics.jsonl")
    penalty = [line.get("l2") for line in lines]
    assert penalty[:3] == [None, None, 0] and penalty[4] == 0 < min(penalty[3], penalty[5])
    record = evaluation.read_json(tmp_path / "run" / "summary.json")
    assert record["args"]["method"] == "l2" and None not in record["matrix"][2]
