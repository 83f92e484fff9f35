"""CRAM: routing, ranks, isolation of the experts, and whole runs."""

import dataclasses
import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_scripts import kill_after, run_here
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
)

import cram
import data
import eval as evaluation
from data import Collator
from model import FeatureCache, generate, image_features, image_tokens


def random_experts(model, T=3, rank=3, seed=0):
    """The layers of a model with T random frozen experts, the first two in one group."""
    layers, routing = cram.add_experts(model, ["q", "v"], 2.0, 0.0)
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        for k in range(T):
            A = torch.randn(rank + k, layer.base.in_features, generator=generator)
            B = torch.randn(layer.base.out_features, rank + k, generator=generator)
            layer.keep(k, 0.1 * A, 0.1 * B)
    memory = {"group": torch.tensor([0, 0, 1][:T]), "count": torch.ones(2)}
    return layers, routing, memory


def test_an_answer_does_not_depend_on_its_batch(tiny, samples):
    model, processor = tiny
    layers, routing, memory = random_experts(model)
    cache = FeatureCache(model, processor)
    features_of = cram.RoutingFeatures(model, processor, cache)
    u, q = features_of(samples[:5])
    memory |= {"prototype": u[:2].clone(), "centroid": torch.nan_to_num(q[[0, 1, 3]])}
    args = types.SimpleNamespace(routing="centroid", reuse=True, sigma=None, sigma_share=1 / 3)
    collator = Collator(processor, image_tokens(model, processor))

    def answer(part):
        # new features each time: those of a batch must not depend on what else is in it either
        features_of = cram.RoutingFeatures(model, processor, FeatureCache(model, processor))
        group, pi = cram.weights_for(*features_of(part), memory, args)
        assert torch.allclose(pi.sum(1), torch.ones(len(part)))
        assert (pi[:, 2] == (group == 1)).all()  # the group of one expert: weight 1, others 0
        routing.weights = pi
        batch = collator(part, train=False)
        return generate(model, processor, batch, image_features(cache, part), 6), pi

    samples = samples[:40:5] + samples[1:5]  # the first eight ask one question
    texts, pi = answer(samples)
    for order in ([3, 0, 9, 4, 1, 7, 2, 11], [1], [4, 5]):
        again, pi_again = answer([samples[k] for k in order])
        assert again == [texts[k] for k in order]
        torch.testing.assert_close(pi_again, pi[order], rtol=0, atol=1e-5)
    assert len({tuple(row.tolist()) for row in pi}) > 2  # the samples do take different routes


def test_all_experts_at_once_are_the_sum_over_experts(tiny):
    """Two frozen experts and the one in training; the latter's gradient is that of the sum."""
    model, _ = tiny
    layers, routing, _ = random_experts(model, T=2)
    layer = next(iter(layers.values()))
    x, pi = torch.randn(2, 5, layer.base.in_features), torch.rand(2, 3)
    layer.train_pair(
        0.1 * torch.randn(5, layer.base.in_features), 0.1 * torch.randn(len(layer.B), 5)
    )
    routing.weights = pi
    wanted = layer.base(x)
    pairs = [(layer.A[layer.owner == k], layer.B[:, layer.owner == k]) for k in range(2)]
    for k, (A, B) in enumerate([*pairs, (layer.new_A, layer.new_B)]):
        wanted = wanted + 2.0 * pi[:, k, None, None] * (x @ A.T @ B.T)
    assert torch.allclose(layer(x), wanted, atol=1e-5)
    for p in (layer.new_A, layer.new_B):
        (a,), (b,) = (
            torch.autograd.grad(y.square().sum(), p, retain_graph=True) for y in (layer(x), wanted)
        )
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    layer.new_A = layer.new_B = None
    routing.weights = None
    assert torch.equal(layer(x), layer.base(x))


def test_the_whole_buffer_becomes_an_expert_of_the_same_function(tiny):
    """Alone in its group, with every direction kept: the layer computes what it did before."""
    layers, routing, _ = random_experts(tiny[0], T=0)
    layer = next(iter(layers.values()))
    x = torch.randn(2, 5, layer.base.in_features)
    layer.fresh_pair(12)
    layer.train_pair(layer.new_A, torch.randn(len(layer.B), 12))
    routing.buffer = True
    before = layer(x)
    A, B, chosen = cram.adaptive_expert(
        layer.new_A.detach(), layer.new_B.detach(), layer.scale, r_max=12, tau_alloc=0.0
    )
    layer.train_pair(A, B)
    routing.buffer, routing.weights = False, torch.ones(2, 1)
    assert len(chosen) == 12 and not torch.allclose(before, layer.base(x), atol=0.1)
    assert torch.allclose(layer(x), before, atol=1e-4)
    assert torch.allclose(A.norm(dim=1), B.norm(dim=0), atol=1e-4)  # sqrt(S) each
    layer.keep(0)
    assert torch.allclose(layer(x), before, atol=1e-4)


def test_rank_rules_against_numpy():
    rng = np.random.default_rng(3)
    for case in range(20):
        A, B = rng.normal(size=(10, 24)), rng.normal(size=(16, 10))
        Q = np.linalg.qr(rng.normal(size=(24, 5)))[0] if case % 4 else None
        tau = float(rng.uniform(0, 40))
        got_A, got_B, chosen = cram.adaptive_expert(
            torch.tensor(A), torch.tensor(B), 2.0, None if Q is None else torch.tensor(Q),
            r_min=3, r_max=6, tau_alloc=tau, tau_orth=0.95,
        )  # fmt: skip
        U, S, Vh = np.linalg.svd(B @ A)
        S = S[:10]
        out = Vh[:10] - (Vh[:10] @ Q @ Q.T if Q is not None else 0)
        novelty = np.linalg.norm(out, axis=1)
        limit = 0.95 * np.sqrt(1 - 5 / 24) if Q is not None else 0
        wanted = [k for k in range(10) if 2 * S[k] > tau and k < 6 and novelty[k] > limit]
        wanted += [k for k in range(10) if k not in wanted][: max(0, 3 - len(wanted))]
        assert chosen.tolist() == sorted(wanted) and 3 <= len(chosen) <= 6
        if Q is not None:
            assert np.abs(got_A.numpy() @ Q).max() < 1e-5  # nothing is left inside Q
        product = sum(S[k] * np.outer(U[:, k], out[k] / novelty[k]) for k in sorted(wanted))
        assert np.allclose(got_B @ got_A, product, atol=1e-4)
    few = cram.adaptive_expert(torch.randn(3, 9), torch.randn(8, 3), 2.0, fixed=True)
    assert len(few[2]) == 3  # no more directions than there are
    inside = torch.eye(24)[:, :10]  # a buffer that older experts have already, all of it
    A = torch.randn(10, 10) @ inside.T
    kept, _, chosen = cram.adaptive_expert(A, torch.randn(16, 10), 2.0, inside, tau_alloc=0)
    assert len(chosen) == 4 and torch.allclose(kept @ inside @ inside.T, kept, atol=1e-5)


def test_stored_numbers_of_numpy():
    """SVD, novelty and RBF on stored arrays; what was wanted was computed by numpy alone, formula
    by formula, when they were stored."""
    g = np.load(Path(__file__).parent / "golden" / "cram_golden.npz")
    A, B, Q, q, c = (torch.tensor(g[name]) for name in ("A", "B", "Q", "q", "c"))
    tau_alloc, tau_orth, sigma = g["constants"]
    for relative, name in ((True, "ours"), (False, "published")):
        got_A, got_B, chosen = cram.adaptive_expert(
            A, B, 2.0, Q, r_min=2, r_max=7, tau_alloc=tau_alloc, tau_orth=tau_orth,
            relative=relative,
        )  # fmt: skip
        assert chosen.tolist() == g[f"chosen_{name}"].tolist()
        np.testing.assert_allclose(got_B @ got_A, g[f"product_{name}"], atol=1e-5)
    groups = torch.zeros(len(c), dtype=torch.long)
    pi = cram.route(q, torch.zeros(len(q), dtype=torch.long), c, groups, sigma)
    np.testing.assert_allclose(pi, g["pi"], atol=1e-6)


def test_groups_follow_from_cosines_by_hand():
    e = torch.eye(8)
    mean = torch.nn.functional.layer_norm

    def unit(*weights):
        return mean(sum(w * e[k] for k, w in enumerate(weights)), (8,))

    assert cram.choose_group(e[0], torch.zeros(0, 8)) == 0
    one = unit(1.0)[None]
    assert cram.choose_group(unit(1.0, 0.1), one) == 0  # cosine 0.99
    assert cram.choose_group(unit(0.3, 1.0), one) == 1  # cosine 0.15
    two = torch.stack([unit(1.0), unit(0, 1.0)])
    assert cram.choose_group(unit(1.0, 0.2), two) == 0  # far ahead of the second
    assert cram.choose_group(unit(1.0, 0.95), two) == 2  # 0.05 ahead: undecided, a new group
    assert cram.choose_group(unit(1.0, 0.95), two, max_groups=2) == 0
    far = unit(0.5, 0.1, 1.0)  # cosines 0.45 and 0.09: ahead, but like neither
    assert cram.choose_group(far, two) == 2
    assert cram.choose_group(far, two, lead_is_enough=True) == 0
    assert cram.group_of(torch.stack([unit(0.2, 1.0), unit(5.0)]), two).tolist() == [1, 0]


def test_weights_against_numpy():
    rng = np.random.default_rng(5)
    q, c = rng.normal(size=(7, 4)), rng.normal(size=(5, 4))
    groups, group = np.array([0, 1, 0, 1, 0]), np.array([0, 1, 1, 0, 0, 1, 0])
    q[2] = np.nan
    got = cram.route(*map(torch.tensor, (q, group, c, groups)), 1.3)
    for n in range(7):
        own = groups == group[n]
        w = np.exp(-((q[n] - c) ** 2).sum(1) / (2 * 1.3**2)) * own if n != 2 else own.astype(float)
        assert np.allclose(got[n], w / w.sum())
    pairs = [np.linalg.norm(c[i] - c[j]) for i in range(5) for j in range(i)]
    args = types.SimpleNamespace(sigma=None, sigma_share=0.25)
    assert np.isclose(cram.sigma_of(args, torch.tensor(c)), np.sort(pairs)[4] / 4)
    assert cram.sigma_of(args, torch.tensor(c[:1])) == 1
    args.sigma = 2.5
    assert cram.sigma_of(args, torch.tensor(c)) == 2.5


def test_the_penalty_is_zero_for_orthogonal_outputs_and_spares_old_experts(tiny, samples):
    model, processor = tiny
    layers, routing, memory = random_experts(model, T=2)
    collator = Collator(processor, image_tokens(model, processor))
    part = [s for s in samples if s.image is not None][:2]
    batch, features = collator(part, train=True), image_features(FeatureCache(*tiny), part)
    memory["group"] = torch.tensor([0, 0, 0])
    routing.weights, routing.gamma = torch.full((2, 3), 1 / 3), torch.full((2,), 2 / 3)
    before = {path: (layer.A.clone(), layer.B.clone()) for path, layer in layers.items()}
    parameters = []
    for layer in layers.values():
        layer.old_outputs = cram.basis(layer.B)
        Q = layer.old_outputs
        out = torch.randn(len(Q), 3)
        layer.train_pair(torch.randn(3, layer.base.in_features), out - Q @ (Q.T @ out))
        parameters += [layer.new_A, layer.new_B]
    inputs = {}  # of every layer, for the penalty by hand

    def backward():
        hooks = [
            layer.register_forward_pre_hook(lambda layer, x: inputs.update({layer: x[0].detach()}))
            for layer in layers.values()
        ]
        values = cram.backward(model, batch, features, (1.0, 1.0), routing, layers, 1.0)
        assert all(hook.remove() is None for hook in hooks) and routing.leaks == {}
        return values

    assert 0 <= backward()["orthogonality"] < 1e-8
    for layer in layers.values():  # and with outputs that older experts have
        layer.train_pair(layer.new_A, layer.B[:, :3])
    parts = []
    got = backward()["orthogonality"]
    for layer, x in inputs.items():
        mask = batch["image_mask"].float()
        mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        z = 2.0 * mean @ (layer.new_B @ layer.new_A).T
        inside = torch.linalg.lstsq(layer.B, z.T).solution.T @ layer.B.T  # z projected on the old B
        parts += [(2 / 3 * (inside**2).sum(1)).mean()]
    assert got == pytest.approx(torch.stack(parts).mean().item(), rel=1e-3) and got > 1e-3
    new = {id(p) for layer in layers.values() for p in (layer.new_A, layer.new_B)}
    for path, p in model.named_parameters():  # the projector and all else: no gradient at all
        assert (p.grad is not None) == (id(p) in new), path
    before_base = {path: p.detach().clone() for path, p in model.named_parameters()}
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    for path, p in model.named_parameters():
        assert torch.equal(p, before_base[path]) == (id(p) not in new), path
    for path, layer in layers.items():
        assert all(
            torch.equal(*pair) for pair in zip(before[path], (layer.A, layer.B), strict=True)
        )


def test_shared_energy_by_hand(tiny):
    layers, _, _ = random_experts(tiny[0], T=1)
    layer = next(iter(layers.values()))
    A, B = layer.train_pair(torch.randn(4, layer.base.in_features), torch.randn(len(layer.B), 4))
    Q = cram.basis(layer.B)
    wanted = (Q @ Q.T @ B @ A).square().sum() / (B @ A).square().sum()
    assert cram.shared_energy(layer, Q) == pytest.approx(float(wanted), rel=1e-4)


def test_routing_accuracy_by_hand():
    routes = {"2-0-groups": [0, 1], "2-1-group": np.array([0, 1]), "2-2-group": np.array([1, 1])}
    routes["2-1-weights"] = [[0.9, 0.1], [0.5, 0.5]]  # a tie counts for a half
    routes["2-2-weights"] = [[0.6, 0.4], [0.0, 1.0]]
    assert cram.routing_accuracy(routes, 2) == {"group": 75.0, "expert": 62.5}


def test_pure_text_has_its_own_expert_in_training_and_all_in_tests():
    nan = torch.full((1, 3), torch.nan)
    memory = {"group": torch.zeros(3, dtype=torch.long), "count": torch.ones(1)}
    memory |= {"prototype": torch.ones(1, 4), "centroid": torch.cat([torch.eye(3)[:2], nan])}
    args = types.SimpleNamespace(routing="centroid", reuse=True, sigma=None, sigma_share=1 / 3)
    u, q = torch.ones(2, 4), torch.cat([nan, torch.eye(3)[1:2]])
    _, pi = cram.weights_for(u, q, memory, args, own=2)
    assert pi[0].tolist() == [0, 0, 1]
    assert pi[1, 1] > 0.9 and pi[1, 2] == 0  # an image never goes to the expert of nothing but text
    _, pi = cram.weights_for(u, q, memory, args)
    torch.testing.assert_close(pi[0], torch.full((3,), 1 / 3))
    memory["centroid"][:] = torch.nan  # no stage had images: evenly
    assert torch.allclose(cram.weights_for(u, q, memory, args)[1], torch.full((2, 3), 1 / 3))


def results(run):
    files = ["matrix.json", *(f"predictions/{p.name}" for p in (run / "predictions").iterdir())]
    kept = torch.load(run / "experts.pt", weights_only=True)
    found = {name: (run / name).read_bytes() for name in files}
    found |= {name: x.tolist() for name, x in np.load(run / "routing.npz").items()}
    names = "energy sigma old_experts_weight stored_parameters trained_parameters ranks groups"
    summary = evaluation.read_json(run / "summary.json")
    return found | {name: summary[name] for name in names.split()}, kept


@pytest.fixture(scope="module")
def flags(flags):
    return [*flags, "--targets", "q,k,v,o"]  # CRAM's projector stays frozen


# six steps a stage, three in the buffer and three in the expert
HALF = "--buffer_share 0.5 --paper_constants".split()


@pytest.fixture(scope="module")
def cram_run(flags, tmp_path_factory):
    return run_here("cram", [*flags, *HALF], tmp_path_factory.mktemp("run") / "cram")


def test_a_run_leaves_its_records_and_figures(cram_run):
    summary = json.loads((cram_run / "summary.json").read_text())
    ranks = np.array(summary["ranks"])
    assert ranks.shape == (3, 16) and ranks.min() >= 4 and ranks.max() <= 9
    assert len(summary["groups"]) == 3 and summary["stored_parameters"] == sorted(
        summary["stored_parameters"]
    )
    routes = np.load(cram_run / "routing.npz")
    assert routes["3-1-weights"].shape == (5, 3) and routes["2-2-weights"].shape == (5, 2)
    assert np.allclose(routes["3-2-weights"].sum(1), 1)
    lines = [json.loads(line) for line in (cram_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines[:6]] == ["buffer"] * 3 + ["stable"] * 3
    per_rank, trained = summary["per_rank"], summary["trained_parameters"]
    assert summary["trainable_parameters"] == 48 * per_rank  # the buffer
    assert per_rank * 4 <= min(trained) and max(trained) <= per_rank * 9
    assert summary["sigma"] == [2.0] * 3
    assert evaluation.rescore(cram_run) == []
    names = {path.name for path in (cram_run / "figures").iterdir()}
    assert len(names) == 6


def test_old_experts_do_not_change_by_a_bit(cram_run, flags, tmp_path):
    """A run over the first stage alone leaves the expert that the longer run still holds."""
    short = run_here("cram", [*flags, *HALF, "--order", "one"], tmp_path / "short")
    long, first = results(cram_run)[1]["experts"], results(short)[1]["experts"]
    for path, layer in first.items():
        own = long[path]["owner"] == 0
        assert torch.equal(long[path]["A"][own], layer["A"])
        assert torch.equal(long[path]["B"][:, own], layer["B"])


@pytest.mark.parametrize("lines", [8, 11])  # killed in the buffer, and in the stable phase
def test_killed_and_resumed_gives_the_same_bytes(lines, cram_run, flags, tmp_path):
    run, more = tmp_path / "killed", [*HALF, "--save_every", "1"]
    kill_after(lines, "cram", [*flags, *more], run)
    run_here("cram", [*flags, *more, "--resume"], run)
    (files, kept), (wanted_files, wanted) = results(run), results(cram_run)
    assert files == wanted_files
    for path, layer in wanted["experts"].items():
        assert all(torch.equal(value, kept["experts"][path][n]) for n, value in layer.items())


def test_a_run_stopped_just_before_its_end_can_be_finished(cram_run, flags, tmp_path):
    run = shutil.copytree(cram_run, tmp_path / "run")
    (run / "summary.json").unlink()  # all stages are done, the records are not written
    (run / "experts.pt").unlink()
    run_here("cram", [*flags, *HALF, "--resume"], run)
    before, after = (evaluation.read_json(path / "summary.json") for path in (cram_run, run))
    for key in ("matrix", "ranks", "stored_parameters", "trained_parameters", "routing_accuracy"):
        assert before[key] == after[key]


def test_a_run_goes_on_with_its_own_features_only(cram_run, flags, clip_folder, tmp_path):
    run = shutil.copytree(cram_run, tmp_path / "run")
    (run / "summary.json").unlink()
    with pytest.raises(data.InputError, match="--routing_features"):
        more = [*HALF, "--resume", "--routing_features", str(clip_folder)]
        run_here("cram", [*flags, *more], run)


def test_an_instruction_that_is_empty_stops_before_any_work(flags, stream_folder, tmp_path):
    broken = shutil.copytree(stream_folder, tmp_path / "stream")
    file = broken / "two" / "train.json"
    records = json.loads(file.read_text())
    records[0]["conversations"][0]["value"] = "<image>\n "
    file.write_text(json.dumps(records))
    changed = [str(broken) if flag == str(stream_folder) else flag for flag in flags]
    with pytest.raises(data.InputError, match="empty question"):
        run_here("cram", changed, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "more",
    [
        "--no-reuse",
        "--no-grouping --routing uniform --lambda_orth 0",
        "--routing oracle --buffer_share 0",
        "--paper_constants --fixed_rank",
        "--gradient_checkpointing --dtype bf16 --no-grouping",
    ],
)
def test_every_ablation_runs(more, flags, tmp_path):
    run = run_here("cram", [*flags, *more.split(), "--limit", "4"], tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    weights = np.load(run / "routing.npz")["3-2-weights"]
    if "oracle" in more:
        assert summary["routing_accuracy"] == {"group": 100, "expert": 100}
    if "no-reuse" in more or "oracle" in more:
        assert set(np.unique(weights)) <= {0, 1}
    if "no-grouping" in more:
        assert summary["groups"] == [0, 0, 0]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        penalties = [line["orthogonality"] for line in lines]
        assert (max(penalties) > 0) == ("lambda_orth" not in more)
    if "uniform" in more:
        assert np.allclose(weights, 1 / 3)
        assert summary["routing_accuracy"] == {
            "group": 100,
            "expert": pytest.approx(100 / 3),
        }  # a tie
    if "fixed_rank" in more:
        assert set(np.ravel(summary["ranks"])) == {9}


def test_bad_input(flags, tmp_path):
    with pytest.raises(data.InputError, match="3 stages need --max_experts 3"):
        run_here("cram", [*flags, "--max_experts", "2"], tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for wrong in ("--targets q,projector", "--r_min 10", "--tau_alloc -1", "--sigma 0"):
        with pytest.raises(data.InputError, match=wrong.split()[0].removeprefix("--")):
            cram.parse(wrong.split())
    for k, wrong in enumerate((tmp_path, data.ROOT / "assets" / "tiny-llava")):
        with pytest.raises(data.InputError, match="no CLIP model"):
            run_here("cram", [*flags, "--routing_features", str(wrong)], tmp_path / f"clip{k}")
    with pytest.raises(data.InputError, match="none is the largest"):
        cram.parse("--routing uniform --no-reuse".split())
    for wrong in ("--rank 0", "--buffer_rank 3"):
        with pytest.raises(data.InputError, match="ranks must be"):
            cram.parse(wrong.split())


@pytest.mark.parametrize(
    ("more", "tau", "sigma"),
    [("", 0.13, None), ("--paper_constants", 0.08, 2.0), ("--tau_alloc 0", 0.0, None),
     ("--paper_constants --tau_alloc 0.3 --sigma 5", 0.3, 5.0)],
)  # fmt: skip
def test_constants(more, tau, sigma):
    """Ours belong to the tiny model; the published ones come back with one flag; flags win."""
    args = cram.parse(more.split())
    args = cram.check_stream(args, types.SimpleNamespace(stages=[None] * 6))
    assert (args.tau_alloc, args.sigma, args.max_experts) == (tau, sigma, 6)
    assert args.max_groups == (5 if args.paper_constants else 6)  # on ucit


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIP, smaller than any, with a tokenizer of letters and 24 positions."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text = {"vocab_size": len(words), "max_position_embeddings": 24, "num_attention_heads": 2}
    text |= {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    vision = {"image_size": 16, "patch_size": 8, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=sizes | text, vision_config=sizes | vision, projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    image = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(image, tokenizer).save_pretrained(folder)
    return folder


def test_routing_by_clip(clip_folder, tiny, samples, flags, tmp_path):
    model, processor = tiny
    features = cram.RoutingFeatures(model, processor, None, str(clip_folder))
    part = [samples[0], dataclasses.replace(samples[1], image=None)]
    u, q = features(part)
    assert u.shape == (2, 12) and q.shape == (2, 12)
    assert torch.isnan(q[1]).all() and not torch.isnan(q[0]).any()
    pictures = features.clip_processor(images=[data.load_image(part[0].image)], return_tensors="pt")
    own = features.clip.visual_projection(features.clip.vision_model(**pictures).pooler_output)
    torch.testing.assert_close(q[:1], own)  # as CLIP projects it, of any length
    long = [dataclasses.replace(part[0], question="a" * 99 + end) for end in ("b", "c")]
    assert not torch.equal(*features(long)[0])  # of a long question the end is read
    run_here("cram", [*flags, "--routing_features", str(clip_folder), "--limit", "4"],
             tmp_path / "run")  # fmt: skip
    weights = load_file(clip_folder / "model.safetensors")
    for wrong, message in (("vision", "weights are missing"), ("large", "no CLIP model|its tower")):
        folder = tmp_path / wrong
        shutil.copytree(clip_folder, folder)
        if wrong == "vision":  # the tower alone: the rest would be random
            kept = {k: v for k, v in weights.items() if "vision" in k}
            save_file(kept, folder / "model.safetensors", {"format": "pt"})
        else:
            config = json.loads((folder / "config.json").read_text())
            config["vision_config"]["image_size"] = 32
            (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(data.InputError, match=message):
            cram.RoutingFeatures(model, processor, None, str(folder))


def test_a_stage_of_pure_text(flags, stream_folder, tmp_path):
    """It has no centroid to be near to: its group's experts get equal weights."""
    shutil.copytree(stream_folder, tmp_path / "s")
    for split in ("train", "test"):
        path = tmp_path / "s" / "one" / f"{split}.json"
        records = json.loads(path.read_text())
        for record in records:
            del record["image"]
            for turn in record.get("conversations", ()):
                turn["value"] = turn["value"].removeprefix("<image>\n")
        path.write_text(json.dumps(records))
    own = [str(tmp_path / "s") if flag == str(stream_folder) else flag for flag in flags]
    run = run_here("cram", [*own, "--limit", "4", "--no-grouping"], tmp_path / "run")
    routes = np.load(run / "routing.npz")
    assert np.allclose(routes["3-1-weights"], 1 / 3)
    assert not np.allclose(routes["3-2-weights"][:3], 1 / 3)
