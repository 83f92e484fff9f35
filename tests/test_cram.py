"""CRAM: groups, routing, ranks, isolation of the experts, and whole runs."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as tf
from conftest import run_here
from PIL import Image
from torch.nn.functional import layer_norm, one_hot

import cram
import data
import eval as evaluation
from features import ClipFeatures, question_and_image

NAN = torch.full((1, 3), torch.nan)


def args_with(**changes):
    """cram.py's defaults, but for these."""
    usual = {"tau_alloc": 0.0, "dropout": 0.0, "targets": "q,v"}
    return SimpleNamespace(**vars(cram.parse([])) | usual | changes)


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


def test_a_stage_joins_a_group_or_founds_one():
    def unit(*weights):
        return layer_norm(torch.tensor([*weights, *[0.0] * (8 - len(weights))]), (8,))

    one, two = unit(1.0)[None], torch.stack([unit(1.0), unit(0, 1.0)])
    assert cram.choose_group(unit(1.0), torch.zeros(0, 8)) == 0
    assert cram.choose_group(unit(1.0, 0.1), one) == 0  # cosine 0.99
    assert cram.choose_group(unit(0.3, 1.0), one) == 1  # cosine 0.15
    assert cram.choose_group(unit(1.0, 0.2), two) == 0  # far ahead of the second
    near = torch.stack([unit(1.0, 0.1), unit(1.0, 0, 0.2)])
    assert cram.choose_group(unit(1.0), near) == 2  # 0.99 and 0.98: undecided, a new group
    assert cram.choose_group(unit(1.0), near, most=2) == 0
    assert cram.choose_group(unit(0.5, 0.1, 1.0), two) == 2  # 0.45 and 0.09: similar to neither
    memory, (e, f) = {}, torch.eye(8)[:2]
    for u, q in ((e, 1.0), (f, 2.0), (e + 0.1 * f, 3.0)):
        images = torch.cat([torch.full((3, 3), q), NAN])  # the last sample is pure text
        cram.join_group(memory, u.expand(4, 8), images, args_with(), 3)
    assert memory["group"].tolist() == [0, 1, 0] and memory["count"].tolist() == [8, 4]
    torch.testing.assert_close(memory["prototype"], torch.stack([8 * e + 0.4 * f, 4 * f]))
    torch.testing.assert_close(memory["centroid"], torch.tensor([[1.0], [2], [3]]).expand(3, 3))
    cram.join_group(memory, -e.expand(1, 8), NAN, args_with(grouping=False), 3)
    assert memory["group"].tolist() == [0, 1, 0, 1] and memory["centroid"][3].isnan().all()


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
    # sigma is a third of the median distance, sqrt(2)
    near, far = (math.exp(-d / (2 * (math.sqrt(2) / 3) ** 2)) for d in (0, 2))
    image = [far / (near + far), near / (near + far), 0, 0]
    wanted = torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0], image, [0, 0, 0, 1]])
    assert group.tolist() == [0, 0, 1] and cram.sigma_of(args_with(), torch.eye(3)[:1]) == 1
    torch.testing.assert_close(pi, wanted)
    training = weights(expert=2)  # the group is that of the stage, whatever the question
    torch.testing.assert_close(training[:2], torch.tensor([[0, 0, 1.0, 0], image]))
    assert training[2, 3] == 0
    even = torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]).expand(3, 4)
    torch.testing.assert_close(weights(routing="uniform", expert=2), even)
    assert weights(reuse=False).argmax(1).tolist()[1:] == [1, 3]
    assert torch.equal(weights(reuse=False, expert=1), one_hot(torch.tensor([1, 1, 1]), 4).float())


def test_an_answer_does_not_depend_on_its_batch(tiny, samples):
    _, routing = with_experts(tiny, 3)
    memory = {"group": torch.tensor([0, 0, 1]), "count": torch.ones(2)}
    u, q = question_and_image(tiny, tiny.batch(samples[:5], train=True))
    memory |= {"prototype": u[:2].clone(), "centroid": q[[0, 1, 3]]}
    table = tiny.model.get_input_embeddings().weight
    ids = tiny.processor.tokenizer(samples[1].question, add_special_tokens=False)["input_ids"]
    torch.testing.assert_close(u[1], table[ids].mean(0) - table.mean(0))
    torch.testing.assert_close(q[1], tiny.features([samples[1].image])[0].mean(0))

    look = partial(question_and_image, tiny)
    answer = partial(cram.answer, tiny, args_with(), [], memory, routing, look)
    samples = samples[:40:5] + [*samples[1:4], replace(samples[4], image=None)]
    texts, notes = answer(samples)
    weights = np.stack([note["weights"] for note in notes])
    assert len({tuple(row) for row in weights.round(4).tolist()}) > 3  # routes differ
    for order in ([3, 0, 11, 4, 1, 7, 2, 9], [1], [11, 5]):
        again, notes = answer([samples[k] for k in order])
        assert again == [texts[k] for k in order]
        np.testing.assert_allclose([n["weights"] for n in notes], weights[order], atol=1e-5)


def test_a_layer_is_the_formula_and_comes_back_from_a_checkpoint(tiny):
    layers, routing = with_experts(tiny, 2)
    layer, pi = layers[0], torch.rand(2, 3)
    x = torch.randn(2, 5, layer.base.in_features)
    new = layer.train_pair(*(torch.randn(shape) for shape in ((5, 64), (len(layer.B), 5))))
    wanted, routing.weights = layer.base(x), pi
    frozen = [(layer.A[layer.owner == k], layer.B[:, layer.owner == k]) for k in range(2)]
    for k, (A, B) in enumerate([*frozen, new]):
        assert len(A) == (3, 4, 5)[k]
        wanted = wanted + layer.scale * pi[:, k, None, None] * (x @ A.T @ B.T)
    y, state = layer(x), cram.experts_state(layers)
    torch.testing.assert_close(y, wanted, atol=1e-3, rtol=1e-4)
    ours, formula = (torch.autograd.grad(z.sum(), new) for z in (y, wanted))
    torch.testing.assert_close(ours, formula, atol=1e-3, rtol=1e-3)
    routing.weights = None
    assert torch.equal(layer(x), layer.base(x))
    layers, routing = with_experts(tiny, 0)
    cram.load_experts(layers, state)
    routing.weights = pi
    assert torch.equal(layers[0](x), y) and layers[0].new_A.requires_grad
    assert layers[1].new_A is None and len(layers[1].A) == 7
    layers[0].freeze(2)
    torch.testing.assert_close(layers[0](x), y)


def test_a_buffer_is_its_truncated_svd(tiny):
    """With every direction kept, an expert computes what its buffer did; else the best of its rank,
    alone in its group."""
    layers, routing = with_experts(tiny, 0)
    layer, routing.buffer = layers[0], True
    x = torch.randn(2, 5, layer.base.in_features)
    pair = layer.fresh_pair(12)[0].detach(), torch.randn(len(layer.B), 12)
    layer.train_pair(*pair)
    before, (U, S, Vh) = layer(x), torch.linalg.svd(pair[1] @ pair[0], full_matrices=False)
    cram.shrink_buffers([layer], [], args_with(rank=12))
    routing.buffer, routing.weights = False, torch.ones(2, 1)
    torch.testing.assert_close(layer(x), before, atol=1e-4, rtol=1e-4)
    assert torch.allclose(layer.new_A.norm(dim=1), layer.new_B.norm(dim=0), atol=1e-4)
    for changes in ({"rank": 5}, {"rank": 5, "fixed_rank": True, "tau_alloc": 1e9}):
        A, B, chosen = cram.adaptive_expert(*pair, 2.0, None, args_with(**changes))
        best = U[:, :5] * S[:5] @ Vh[:5]
        assert chosen.tolist() == list(range(5)) and torch.allclose(B @ A, best, atol=1e-4)


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


def test_the_penalty_is_the_formula_and_pulls_at_the_new_pair_alone(tiny, samples, monkeypatch):
    layers, routing = with_experts(tiny, 2)
    inputs = {}
    for layer in layers:
        layer.old_outputs = cram.basis(layer.B)
        layer.register_forward_pre_hook(lambda layer, x: inputs.update({layer: x[0].detach()}))
    samples = [replace(samples[0], image=None), *samples[1:3]]
    (batch,) = tiny.micro_batches(samples, [[[2, 1, 0]]], 0)
    pi, gamma = torch.full((3, 3), 1 / 3), torch.tensor([0.5, 0.2, 0.7])
    forward = tiny.forward  # without L_task every gradient is the penalty's
    monkeypatch.setattr(tiny, "forward", lambda b: SimpleNamespace(loss=0 * forward(b).loss))

    def penalty(outputs):
        for layer in layers:
            layer.train_pair(torch.ones(3, layer.base.in_features), outputs(layer))
        args = args_with(lambda_orth=1.0)
        return cram.backward(tiny, batch, args, routing, layers, pi, gamma)["orthogonality"]

    def outside(layer):
        out, Q = torch.randn(len(layer.B), 3), layer.old_outputs
        return out - Q @ (Q.T @ out)

    assert 0 <= penalty(outside) < 1e-8 and cram.shared_energy(layers[0]) < 1e-8
    loss, wanted = penalty(lambda layer: layer.B[:, 2:5]), []
    for layer, x in inputs.items():
        mask = batch["image_mask"].float()
        mean = torch.einsum("bs,bsd->bd", mask, x) / mask.sum(1, keepdim=True).clamp(min=1)
        z = 2.0 * mean @ (layer.new_B @ layer.new_A).T  # inside the old outputs as a whole
        wanted.append((gamma[[2, 1, 0]] * z.square().sum(1)).mean())
    assert loss == pytest.approx(torch.stack(wanted).mean().item(), rel=1e-4, abs=1e-6)
    assert cram.shared_energy(layers[0]) == pytest.approx(1)
    new = [p for layer in layers for p in (layer.new_A, layer.new_B)]
    formula = torch.autograd.grad(torch.stack(wanted).mean(), new)
    torch.testing.assert_close([p.grad for p in new], [*formula], rtol=1e-3, atol=1e-6)
    pulled = {id(p) for p in tiny.model.parameters() if p.grad is not None}
    assert pulled == set(map(id, new)) and min(g.abs().max() for g in formula) > 1e-3
    routing.buffer = True  # while the buffer is trained there is no penalty
    assert penalty(lambda layer: layer.B[:, 2:5]) == 0


def test_each_published_deviation_changes_what_it_says_and_nothing_else(monkeypatch):
    def groups(args, *means):
        memory = {}
        for u in means:
            cram.join_group(memory, torch.tensor([u]), torch.zeros(1, 3), args, len(means))
        return len(memory["prototype"])

    A, B, Q = torch.eye(6, 9), torch.eye(6), torch.eye(9)[:, 6:] + torch.eye(9)[:, 3:6] * 0.4
    Q, far = cram.basis(Q), torch.eye(12).tolist()[:6]
    ahead = [[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0.5, 0.1, 1.0, 0]]
    facts = {
        3: lambda args: args.weight_decay,
        4: lambda args: len(cram.adaptive_expert(A, B, 2.0, Q, args)[2]),
        5: lambda args: round(cram.sigma_of(args, torch.eye(3)), 5),
        7: lambda args: [cram.warm_up_steps(n, args) for n in (10, 50, 330, 1000)],
        11: lambda args: groups(args, *ahead),
        12: lambda args: args.tau_alloc,
        13: lambda args: groups(args, *far),
    }
    ours = {3: 0.01, 4: 6, 5: 0.4714, 7: [9, 16, 16, 50], 11: 3, 12: 0.13, 13: 6}
    published = {3: 0.0, 4: 4, 5: 2.0, 7: [1, 2, 16, 50], 11: 2, 12: 0.08, 13: 5}
    assert tuple(facts) == cram.PUBLISHED
    for numbers in ([], *([n] for n in facts), list(facts)):
        flag = ["--published", ",".join(map(str, numbers))] if numbers else []
        args = cram.parse(flag if numbers != list(facts) else ["--published"])
        wanted = {n: published[n] if n in numbers else ours[n] for n in facts}
        assert {n: fact(args) for n, fact in facts.items()} == wanted
    assert cram.parse(["--published", "--tau_alloc", "0"]).tau_alloc == 0  # a flag wins
    assert cram.parse(["--weight_decay", "0.5"]).weight_decay == 0.5
    monkeypatch.setattr(data, "is_tiny", lambda model: False)
    assert cram.parse([]).weight_decay == 0 and cram.parse([]).tau_alloc == 0.08


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIP, smaller than any, with a tokenizer of letters and 24 positions."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    text = sizes | {"vocab_size": len(words), "max_position_embeddings": 24}
    text |= {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    torch.manual_seed(0)
    config = tf.CLIPConfig(text_config=text, vision_config=sizes, projection_dim=12)
    tf.CLIPModel(config).save_pretrained(folder)
    square = {"height": 16, "width": 16}
    pixels = tf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=square)
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    tokenizer = tf.CLIPTokenizer(*files, truncation_side="left")
    tf.CLIPProcessor(pixels, tokenizer).save_pretrained(folder)
    return str(folder)


def test_features_of_a_clip_model(clip_folder, samples, tmp_path):
    features, clip = ClipFeatures(clip_folder, "cpu"), tf.CLIPModel.from_pretrained(clip_folder)
    processor = tf.CLIPProcessor.from_pretrained(clip_folder, backend="pil")
    wide = np.random.default_rng(0).integers(0, 255, (20, 40, 3), np.uint8)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    text, pictured = (replace(sample, question="where?") for sample in samples[:2])
    text, pictured = replace(text, image=None), replace(pictured, image=tmp_path / "wide.png")
    u, q = features({"samples": [text, pictured]})
    # the text tower's pooled output, not projected, with layer norm
    ids = processor(text=["where?"], return_tensors="pt")
    pooled = clip.text_model(**ids).pooler_output[0]
    normal = (pooled - pooled.mean()) / (pooled.var(correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(u, normal.expand(2, 16))
    # the projected embedding of the image in a square of the mean color, not normalized
    square = np.full((40, 40, 3), [int(255 * c) for c in processor.image_processor.image_mean])
    square[10:30] = wide
    pixels = processor(images=[Image.fromarray(square.astype(np.uint8))], return_tensors="pt")
    assert q.shape == (2, 12) and q[0].isnan().all()
    torch.testing.assert_close(q[1:], clip.visual_projection(clip.vision_model(**pixels)[1]))
    # a long question is cut at its end, whatever the tokenizer's files say
    ends = [replace(text, question="a" * 99 + end) for end in "bc"]
    starts = [replace(text, question=start + "a" * 99) for start in "bc"]
    assert torch.equal(*features({"samples": ends})[0])
    assert not torch.allclose(*features({"samples": starts})[0], atol=1e-3)


@pytest.fixture
def run(flags, tmp_path):
    """run(flags): folder, record, weights of questions of stage 2 in the end, greatest L_orth."""

    def start(more):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        usual = "--targets q,k --buffer_share 0.5 --published 7 --limit 8 --limit_test 4"
        run_here("cram", [*flags, *usual.split(), *more.split()], out)
        lines = evaluation.read_json(out / "metrics.jsonl")
        penalty, facts = max(line["orthogonality"] for line in lines), np.load(out / "facts.npz")
        return out, evaluation.read_json(out / "summary.json"), facts.get("3-2-weights"), penalty

    return start


def test_a_frozen_expert_never_changes_and_the_record_counts_it(run):
    long, record, weights, _ = run("")
    short, first, _, _ = run("--order one")
    states = [
        torch.load(folder / "experts.pt", weights_only=True)["experts"] for folder in (long, short)
    ]
    for new, old in zip(*states):
        assert torch.equal(new["A"][new["owner"] == 0], old["A"]) and len(old["A"]) >= 4
        assert torch.equal(new["B"][:, new["owner"] == 0], old["B"])
    ranks = np.array(record["ranks"])
    assert ranks.shape == (3, 8) and ranks.min() >= 4 and ranks.max() <= 9
    assert record["trained_parameters"] == (ranks.sum(1) * (64 + 64)).tolist()
    assert weights.shape == (4, 3)


def test_ablations(run, clip_folder, monkeypatch):
    decays, AdamW = [], torch.optim.AdamW

    def spy(lora, **flags):
        decays.append(flags["weight_decay"])
        return AdamW(lora, **flags)

    monkeypatch.setattr(torch.optim, "AdamW", spy)
    alone = f"--no-reuse --fixed_rank --weight_decay 0.5 --routing_features {clip_folder}"
    _, record, weights, penalty = run(alone)
    assert decays == [0.5] * 6  # buffer and expert of three stages
    assert set(np.ravel(record["ranks"])) == {9} and set(np.unique(weights)) == {0, 1}
    assert penalty == 0 and record["energy"] == [None] * 3
    _, record, weights, penalty = run("--no-grouping --routing uniform --lambda_orth 0")
    assert record["groups"] == [0, 0, 0] and np.allclose(weights, 1 / 3) and penalty == 0
    assert record["routing_accuracy"] == {"group": 100, "expert": pytest.approx(100 / 3)}  # a tie
    _, record, weights, penalty = run("--no-grouping --routing oracle --buffer_share 0")
    assert record["routing_accuracy"] == {"group": 100, "expert": 100} and penalty > 0
    assert record["trainable_parameters"] == 9 * record["per_rank"]  # no buffer


def test_bad_input(tmp_path):
    for wrong, sentence in (
        ("--routing uniform --no-reuse", "none is the largest"),
        ("--targets q,projector", "projector stays frozen"),
        ("--rank 3", "--rank 3 must lie between 4 and 48"),
    ):
        with pytest.raises(data.InputError, match=sentence):
            cram.parse(wrong.split())
    with pytest.raises(data.InputError, match="no CLIP model"):
        ClipFeatures(str(tmp_path), "cpu")
