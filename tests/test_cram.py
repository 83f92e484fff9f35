"""CRAM: groups, routing, ranks, isolation of the experts, and whole runs."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as tf
from test_baselines import run_here, stop_at
from torch.nn.functional import layer_norm, one_hot

import cram
import data
import eval as evaluation

ARGS = {"published": [], "sigma_share": 1 / 3, "routing": "centroid", "reuse": True, "rank": 9}
ARGS |= {"grouping": True, "stream": "toy", "fixed_rank": False, "tau_alloc": 0.0, "alpha": 18.0}
ARGS |= {"targets": "q,v", "dropout": 0.0, "lambda_orth": 1.0, "buffer_share": 0.05}
NAN = torch.full((1, 3), torch.nan)


def args_with(**changes):
    return SimpleNamespace(**ARGS | changes)


def with_experts(llava, T):
    """T random frozen experts in every layer, and what all layers are told."""
    routing = SimpleNamespace(weights=None, buffer=False, image_mask=None, gamma=None)
    llava.add_lora(args_with(), cram.ExpertLinear, routing=routing)
    torch.manual_seed(0)
    for layer in llava.layers.values():
        for k in range(T):
            A, B = torch.randn(3 + k, layer.base.in_features), torch.randn(len(layer.B), 3 + k)
            layer.train_pair(0.1 * A, 0.1 * B)
            layer.freeze(k)
    return list(llava.layers.values()), routing


def test_groups_follow_from_cosines():
    def unit(*weights):
        return layer_norm(torch.tensor([*weights, *[0.0] * (8 - len(weights))]), (8,))

    assert cram.choose_group(unit(1.0), torch.zeros(0, 8)) == 0
    one, two = unit(1.0)[None], torch.stack([unit(1.0), unit(0, 1.0)])
    assert cram.choose_group(unit(1.0, 0.1), one) == 0  # cosine 0.99
    assert cram.choose_group(unit(0.3, 1.0), one) == 1  # cosine 0.15
    assert cram.choose_group(unit(1.0, 0.2), two) == 0  # far ahead of the second
    assert cram.choose_group(unit(1.0, 0.95), two) == 2  # 0.05 ahead: undecided, a new group
    assert cram.choose_group(unit(1.0, 0.95), two, most=2) == 0
    far = unit(0.5, 0.1, 1.0)  # cosines 0.45 and 0.09: ahead, but similar to neither
    assert cram.choose_group(far, two) == 2
    assert cram.choose_group(far, two, lead_is_enough=True) == 0


def test_a_stage_joins_a_group_or_founds_one():
    memory, (e, f) = {}, torch.eye(8)[:2]
    for u, q in ((e, 1.0), (f, 2.0), (e + 0.1 * f, 3.0)):
        images = torch.cat([torch.full((3, 3), q), NAN])  # the last sample is pure text
        cram.join_group(memory, u.expand(4, 8), images, args_with(), 3)
    assert memory["group"].tolist() == [0, 1, 0] and memory["count"].tolist() == [8, 4]
    torch.testing.assert_close(memory["prototype"], torch.stack([8 * e + 0.4 * f, 4 * f]))
    torch.testing.assert_close(memory["centroid"], torch.tensor([[1.0], [2], [3]]).expand(3, 3))
    cram.join_group(memory, -e.expand(1, 8), NAN, args_with(grouping=False), 3)
    assert memory["group"].tolist() == [0, 1, 0, 1] and memory["centroid"][3].isnan().all()


def test_route_and_sigma_against_numpy():
    rng = np.random.default_rng(5)
    q, c = rng.normal(size=(7, 4)), rng.normal(size=(5, 4))
    groups, group = np.array([0, 1, 0, 1, 0]), np.array([0, 1, 1, 0, 0, 1, 0])
    q[2] = np.nan
    ours = cram.route(*map(torch.tensor, (q, group, c, groups)), 1.3)
    for n in range(7):
        w = (groups == group[n]) * (np.exp(-((q[n] - c) ** 2).sum(1) / 3.38) if n != 2 else 1.0)
        assert np.allclose(ours[n], w / w.sum())
    pairs = [np.linalg.norm(c[i] - c[j]) for i in range(5) for j in range(i)]
    c = torch.tensor(c)
    sigma = cram.sigma_of(args_with(sigma_share=0.25), torch.cat([c, c[:1] * math.nan]))
    assert np.isclose(sigma, np.sort(pairs)[4] / 4) and cram.sigma_of(args_with(), c[:1]) == 1


def test_weights_in_training_and_in_tests():
    """Expert 2 has seen pure text only. Pure text goes to its own expert in training and evenly to
    its group in tests; an image never goes to an expert of pure text."""
    memory = {"group": torch.tensor([0, 0, 0, 1]), "count": torch.ones(2)}
    memory["prototype"] = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    memory["centroid"] = torch.cat([torch.eye(3)[:2], NAN, torch.eye(3)[2:]])
    u, q = torch.tensor([[1.0, 0.1], [1, 0.1], [0, 3]]), torch.cat([NAN, torch.eye(3)[1:]])

    def weights(expert=None, **changes):
        return cram.weights_for(u, q, memory, args_with(**changes), expert)[1]

    group, pi = cram.weights_for(u, q, memory, args_with())
    near, far = (math.exp(-d / (2 * (math.sqrt(2) / 3) ** 2)) for d in (0, 2))
    image = [far / (near + far), near / (near + far), 0, 0]
    wanted = torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0], image, [0, 0, 0, 1]])
    assert group.tolist() == [0, 0, 1]
    torch.testing.assert_close(pi, wanted)
    training = weights(expert=2)  # the group is that of the stage, whatever the question
    torch.testing.assert_close(training[:2], torch.tensor([[0, 0, 1.0, 0], image]))
    assert training[2, 3] == 0
    even = torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]).expand(3, 4)
    torch.testing.assert_close(weights(routing="uniform", expert=2), even)
    assert weights(reuse=False).argmax(1).tolist()[1:] == [1, 3]
    assert torch.equal(weights(reuse=False, expert=1), one_hot(torch.tensor([1, 1, 1]), 4).float())


def test_an_answer_does_not_depend_on_its_batch(tiny, samples):
    layers, routing = with_experts(tiny, 3)
    memory = {"group": torch.tensor([0, 0, 1]), "count": torch.ones(2)}
    u, q = cram.llava_features(tiny, tiny.batch(samples[:5], train=True))
    memory |= {"prototype": u[:2].clone(), "centroid": q[[0, 1, 3]]}

    def answer(some):
        return cram.answer(
            tiny,
            args_with(),
            [],
            memory,
            routing,
            lambda batch: cram.llava_features(tiny, batch),
            some,
        )

    samples = samples[:40:5] + [*samples[1:4], replace(samples[4], image=None)]
    texts, notes = answer(samples)
    weights = np.stack([note["weights"] for note in notes])
    assert len({tuple(row) for row in weights.round(4).tolist()}) > 3  # routes differ
    for order in ([3, 0, 11, 4, 1, 7, 2, 9], [1], [11, 5]):
        again, notes = answer([samples[k] for k in order])
        assert again == [texts[k] for k in order]
        np.testing.assert_allclose([n["weights"] for n in notes], weights[order], atol=1e-5)


def test_a_layer_is_the_formula_and_trains_the_new_pair_alone(tiny):
    layer, routing = with_experts(tiny, 2)[0][0], with_experts(tiny, 2)[1]
    layer.routing = routing
    torch.manual_seed(1)
    x, pi = torch.randn(2, 5, layer.base.in_features), torch.rand(2, 3)
    layer.train_pair(0.1 * torch.randn(5, layer.base.in_features), torch.randn(len(layer.B), 5))
    wanted, routing.weights = layer.base(x), pi
    frozen = [(layer.A[layer.owner == k], layer.B[:, layer.owner == k]) for k in range(2)]
    for k, (A, B) in enumerate([*frozen, (layer.new_A, layer.new_B)]):
        assert len(A) == (3, 4, 5)[k]
        wanted = wanted + 2.0 * pi[:, k, None, None] * (x @ A.T @ B.T)
    y, new = layer(x), (layer.new_A, layer.new_B)
    torch.testing.assert_close(y, wanted, atol=1e-4, rtol=1e-4)
    a, b = (torch.autograd.grad(z.square().sum(), new, retain_graph=True) for z in (y, wanted))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2)
    before = layer.A.clone(), layer.B.clone()
    y.square().sum().backward()
    torch.optim.AdamW(layer.parameters(), lr=0.1).step()
    layer.freeze(2)
    assert torch.equal(layer.A[:7], before[0]) and torch.equal(layer.B[:, :7], before[1])
    assert not torch.allclose(layer(x), wanted, atol=1e-2)  # the new pair has moved
    routing.weights = None
    assert torch.equal(layer(x), layer.base(x))


def test_a_buffer_is_its_truncated_svd(tiny):
    """With every direction kept, an expert computes what its buffer did; else the best of its rank,
    alone in its group."""
    layers, routing = with_experts(tiny, 0)
    layer, routing.buffer = layers[0], True
    x = torch.randn(2, 5, layer.base.in_features)
    layer.train_pair(layer.fresh_pair(12)[0], torch.randn(len(layer.B), 12))
    before, product = layer(x), (layer.new_B @ layer.new_A).detach()
    pair = layer.new_A.detach(), layer.new_B.detach()
    cram.shrink_buffers([layer], [], args_with(rank=12))
    routing.buffer, routing.weights = False, torch.ones(2, 1)
    torch.testing.assert_close(layer(x), before, atol=1e-4, rtol=1e-4)
    assert torch.allclose(layer.new_A.norm(dim=1), layer.new_B.norm(dim=0), atol=1e-4)
    for changes in ({"rank": 5}, {"rank": 5, "fixed_rank": True, "tau_alloc": 1e9}):
        A, B, chosen = cram.adaptive_expert(*pair, 2.0, None, args_with(**changes))
        U, S, Vh = torch.linalg.svd(product, full_matrices=False)
        best = U[:, :5] * S[:5] @ Vh[:5]
        assert chosen.tolist() == list(range(5)) and torch.allclose(B @ A, best, atol=1e-4)


def test_rank_rules_on_a_diagonal_buffer():
    """s S_i = 16, 14, .., 2 along eight axes, of which older experts of the group have the first
    two and nearly the fourth (its rest outside has length 0.6)."""
    A, B, axes = torch.eye(8, 10), torch.diag(torch.arange(8.0, 0, -1)), torch.eye(10)
    Q = torch.stack([axes[0], axes[1], 0.8 * axes[3] + 0.6 * axes[9]], 1)

    def chosen(**changes):
        return cram.adaptive_expert(A, B, 2.0, Q, args_with(**changes))

    A_k, B_k, rows = chosen(tau_alloc=3.0)
    assert rows.tolist() == [2, 4, 5, 6]
    torch.testing.assert_close(
        B_k @ A_k, torch.diag(B.diag())[:, :8] @ A * axes[[2, 4, 5, 6]].sum(0)
    )
    assert chosen(tau_alloc=9.0)[2].tolist() == [0, 1, 2, 4]  # two, filled up by the largest
    assert chosen(tau_alloc=3.0, rank=6)[2].tolist() == [0, 2, 4, 5]
    full = chosen(tau_alloc=0.0)
    assert full[2].tolist() == [2, 4, 5, 6, 7] and (full[0] @ Q).abs().max() < 1e-6
    inside = chosen(tau_alloc=99.0)[0]  # 0 and 1 lie inside Q: they stay as they are
    torch.testing.assert_close(inside[:2], torch.tensor([8.0, 7]).sqrt()[:, None] * axes[:2])
    torch.testing.assert_close(inside[3].norm(), torch.tensor(5.0).sqrt())
    assert torch.allclose(inside[3:] @ Q, torch.zeros(3), atol=1e-6)


def test_stored_numbers_of_numpy(monkeypatch):
    """SVD, novelty and RBF; the stored results were computed formula by formula in numpy alone."""
    g = np.load(Path(__file__).parent / "golden" / "cram_golden.npz")
    A, B, Q, q, c = (torch.tensor(g[name]) for name in ("A", "B", "Q", "q", "c"))
    tau_alloc, tau_orth, sigma = g["constants"]
    monkeypatch.setattr(cram, "R_MIN", 2)
    monkeypatch.setattr(cram, "TAU_ORTH", tau_orth)
    for published, name in (([], "ours"), ([4], "published")):
        args = args_with(rank=7, tau_alloc=tau_alloc, published=published)
        A_k, B_k, chosen = cram.adaptive_expert(A, B, 2.0, Q, args)
        assert chosen.tolist() == g[f"chosen_{name}"].tolist()
        np.testing.assert_allclose(B_k @ A_k, g[f"product_{name}"], atol=1e-5)
    zeros = torch.zeros(6, dtype=torch.long)
    np.testing.assert_allclose(cram.route(q, zeros, c, zeros[:3], sigma), g["pi"], atol=1e-6)


def test_the_penalty_is_the_formula_and_pulls_at_the_new_pair_alone(tiny, samples):
    layers, routing = with_experts(tiny, 2)
    inputs = {}
    for layer in layers:
        layer.old_outputs = cram.basis(layer.B)
        layer.register_forward_pre_hook(lambda layer, x: inputs.update({layer: x[0].detach()}))
    samples = [replace(samples[0], image=None), *samples[1:3]]
    (batch,) = tiny.micro_batches(samples, [[2, 1, 0]])
    pi, gamma = torch.full((3, 3), 1 / 3), torch.tensor([0.5, 0.2, 0.7])

    def penalty(outputs):
        for layer in layers:
            layer.train_pair(torch.ones(3, layer.base.in_features), outputs(layer))
        cram.tell(routing, layers, batch, pi, gamma, args_with())
        tiny.forward(batch)
        return cram.orthogonality_loss(layers)

    def outside(layer):
        out, Q = torch.randn(len(layer.B), 3), layer.old_outputs
        return out - Q @ (Q.T @ out)

    assert 0 <= penalty(outside) < 1e-8
    loss, wanted = penalty(lambda layer: layer.B[:, 2:5]), []
    for layer, x in inputs.items():
        mask = batch["image_mask"].float()
        mean = torch.einsum("bs,bsd->bd", mask, x) / mask.sum(1, keepdim=True).clamp(min=1)
        z = 2.0 * mean @ (layer.new_B @ layer.new_A).T  # inside the old outputs as a whole
        wanted.append((gamma[[2, 1, 0]] * z.square().sum(1)).mean())
    torch.testing.assert_close(loss, torch.stack(wanted).mean(), rtol=1e-4, atol=1e-6)
    loss.backward()
    new = {id(p) for layer in layers for p in (layer.new_A, layer.new_B)}
    pulled = {id(p) for p in tiny.model.parameters() if p.grad is not None}
    assert pulled == new and layers[0].new_A.grad.abs().max() > 1e-3 and loss > 1e-3
    assert not any(layer.A.requires_grad or layer.B.requires_grad for layer in layers)
    routing.buffer = True  # while the buffer is trained there is no penalty
    assert penalty(lambda layer: layer.B[:, 2:5]) == 0


def test_facts_of_the_record_by_hand(tiny):
    layer = with_experts(tiny, 1)[0][0]
    A, B = layer.train_pair(torch.randn(4, layer.base.in_features), torch.randn(len(layer.B), 4))
    Q = layer.old_outputs = cram.basis(layer.B)
    wanted = (Q @ Q.T @ B @ A).square().sum() / (B @ A).square().sum()
    assert cram.shared_energy(layer) == pytest.approx(float(wanted), rel=1e-4)
    facts = {"2-1-group": np.array([0, 1]), "2-2-group": np.array([1, 1])}
    facts["2-1-weights"] = np.array([[0.9, 0.1], [0.5, 0.5]])  # a tie counts for a half
    facts["2-2-weights"] = np.array([[0.6, 0.4], [0.0, 1.0]])
    assert cram.routing_accuracy(facts, [0, 1]) == {"group": 75.0, "expert": 62.5}


def test_each_published_deviation_changes_what_it_says_and_nothing_else():
    def groups(args, *means):
        memory = {}
        for u in means:
            cram.join_group(memory, torch.tensor([u]), torch.zeros(1, 3), args, len(means))
        return len(memory["prototype"])

    A, B, Q = torch.eye(6, 9), torch.eye(6), torch.eye(9)[:, 6:] + torch.eye(9)[:, 3:6] * 0.4
    Q, far = cram.basis(Q), torch.eye(12).tolist()[:6]
    ahead = [[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0.5, 0.1, 1.0, 0]]
    facts = {
        4: lambda args: len(cram.adaptive_expert(A, B, 2.0, Q, args)[2]),
        5: lambda args: cram.sigma_of(args, torch.eye(3)),
        7: lambda args: [cram.warm_up_steps(n, args) for n in (10, 100, 1000)],
        11: lambda args: groups(args, *ahead),
        12: lambda args: args.tau_alloc,
        13: lambda args: groups(args, *far),
    }
    ours = {4: 6, 5: math.sqrt(2) / 3, 7: [9, 16, 50], 11: 3, 12: 0.13, 13: 6}
    published = {4: 4, 5: 2.0, 7: [1, 5, 50], 11: 2, 12: 0.08, 13: 5}
    assert tuple(facts) == cram.PUBLISHED
    for numbers in ([], *([n] for n in facts), list(facts)):
        flag = ["--published", ",".join(map(str, numbers))] if numbers else []
        args = cram.parse(flag if numbers != list(facts) else ["--published"])
        wanted = {n: published[n] if n in numbers else ours[n] for n in facts}
        assert {n: fact(args) for n, fact in facts.items()} == pytest.approx(wanted)
    assert cram.parse(["--published", "--tau_alloc", "0"]).tau_alloc == 0  # a flag wins


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIP, smaller than any, with a tokenizer of letters and 24 positions."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    text = sizes | {"vocab_size": len(words), "max_position_embeddings": 24}
    text |= {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    vision = sizes | {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    config = tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    tf.CLIPModel(config).save_pretrained(folder)
    square = {"height": 16, "width": 16}
    pixels = tf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=square)
    tokenizer = tf.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tf.CLIPProcessor(pixels, tokenizer).save_pretrained(folder)
    return str(folder)


def test_features_of_a_clip_model(clip_folder, samples):
    features = cram.ClipFeatures(clip_folder, "cpu")
    u, q = features({"samples": [replace(samples[0], image=None), samples[1]]})
    assert u.shape == (2, 12) and q[0].isnan().all()
    clip, shown = tf.CLIPModel.from_pretrained(clip_folder), data.load_image(samples[1].image)
    pixels = features.processor(images=[shown], return_tensors="pt")
    torch.testing.assert_close(q[1:], clip.visual_projection(clip.vision_model(**pixels)[1]))
    long = [replace(samples[0], question="a" * 99 + end) for end in ("b", "c")]
    assert not torch.equal(*features({"samples": long})[0])  # the end of a long question is read


@pytest.fixture(scope="module")
def flags(flags):
    """Six steps per stage, three in the buffer and three in the expert."""
    return [*flags, *"--targets q,k,v,o --buffer_share 0.5 --published 7".split()]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    return run_here("cram", flags, tmp_path_factory.mktemp("cram") / "run")


def results(run):
    """What must not depend on when and how often a run was started."""
    files = [run / "matrix.json", *sorted((run / "predictions").iterdir())]
    names = "energy sigma old_experts_weight stored_parameters trained_parameters ranks groups"
    record, facts = evaluation.read_json(run / "summary.json"), np.load(run / "facts.npz")
    content = {path.name: path.read_text() for path in files}
    return content | {k: record[k] for k in names.split()} | {k: facts[k].tolist() for k in facts}


def test_a_run_leaves_its_records(whole, flags, tmp_path):
    record = evaluation.read_json(whole / "summary.json")
    ranks, facts = np.array(record["ranks"]), np.load(whole / "facts.npz")
    assert ranks.shape == (3, 16) and ranks.min() >= 4 and ranks.max() <= 9
    assert facts["3-1-weights"].shape == (5, 3) and facts["2-2-weights"].shape == (5, 2)
    lines = evaluation.read_json(whole / "metrics.jsonl", lines=True)
    assert [line["phase"] for line in lines[:6]] == ["buffer"] * 3 + ["expert"] * 3
    assert record["trainable_parameters"] == 48 * record["per_rank"]  # the buffer
    assert record["trained_parameters"][0] == sum(ranks[0]) * (64 + 64)
    assert record["stored_parameters"][0] == sum(ranks[0]) * (64 + 64) + 64 + 32
    short = run_here("cram", [*flags, "--order", "one"], tmp_path / "short")
    long, first = (torch.load(run / "experts.pt")["experts"] for run in (whole, short))
    for old, new in zip(first, long):  # an expert that is frozen never changes again
        assert torch.equal(new["A"][new["owner"] == 0], old["A"])
        assert torch.equal(new["B"][:, new["owner"] == 0], old["B"])


@pytest.mark.parametrize("steps", [8, 11])  # stopped in the buffer, and in the expert
def test_stopped_and_resumed_gives_the_same_results(steps, whole, flags, tmp_path, monkeypatch):
    stop_at(steps, "cram", flags, tmp_path / "run", monkeypatch)
    assert results(run_here("cram", [*flags, "--resume"], tmp_path / "run")) == results(whole)


def test_every_ablation_runs(flags, clip_folder, stream_folder, tmp_path):
    def run(more):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        run_here("cram", [*flags, "--limit", "4", *more.split()], out)
        lines = evaluation.read_json(out / "metrics.jsonl", lines=True)
        record, facts = evaluation.read_json(out / "summary.json"), np.load(out / "facts.npz")
        return record, facts["3-2-weights"], max(line["orthogonality"] for line in lines)

    record, weights, penalty = run("--no-reuse")
    assert set(np.unique(weights)) <= {0, 1} and penalty == 0 and record["energy"] == [None] * 3
    record, weights, penalty = run("--no-grouping --routing uniform --lambda_orth 0")
    assert record["groups"] == [0, 0, 0] and np.allclose(weights, 1 / 3) and penalty == 0
    assert record["routing_accuracy"] == {"group": 100, "expert": pytest.approx(100 / 3)}  # a tie
    record, weights, penalty = run("--routing oracle --buffer_share 0 --no-grouping")
    assert record["routing_accuracy"] == {"group": 100, "expert": 100} and penalty > 0
    record, _, _ = run(f"--fixed_rank --routing_features {clip_folder}")
    assert set(np.ravel(record["ranks"])) == {9}
    shutil.copytree(stream_folder, tmp_path / "text")  # a stage of pure text has no centroid
    for file in (tmp_path / "text" / "one").glob("*.json"):
        records = json.loads(file.read_text().replace("<image>\\n", ""))
        file.write_text(json.dumps([{k: v for k, v in r.items() if k != "image"} for r in records]))
    record, weights, _ = run(f"--no-grouping --stream {tmp_path / 'text'}")
    assert np.allclose(weights[3], 1 / 3) and np.allclose(weights[:3, 0], 0)


def test_bad_input(tmp_path):
    with pytest.raises(data.InputError, match="none is the largest"):
        cram.parse("--routing uniform --no-reuse".split())
    with pytest.raises(data.InputError, match="projector stays frozen"):
        cram.parse(["--targets", "q,projector"])
    for rank in ("3", "49"):
        with pytest.raises(data.InputError, match=f"--rank {rank} must lie between 4 and 48"):
            cram.parse(["--rank", rank])
    for wrong in ("--tau_alloc -1", "--sigma_share 0", "--buffer_share 1", "--published 6"):
        with pytest.raises(SystemExit):
            cram.parse(wrong.split())
    for folder in (tmp_path, data.ROOT / "mini" / "tiny-llava"):
        with pytest.raises(data.InputError, match="no CLIP model"):
            cram.ClipFeatures(str(folder), "cpu")
