"""Discriminants as scikit-learn has them, sums that no order changes, the experts of MR-LoRA."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_here
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch.nn.functional import linear

import experts
from baselines import StackedLoRALinear
from eval import read_json

T, D = 4, 6
ARGS = SimpleNamespace(router="lda", shrinkage=0.1)


@pytest.fixture
def stages():
    """x of four stages of different size, center and spread."""
    torch.manual_seed(0)
    return [torch.randn(20 + 9 * k, D) * (1 + k) + 3 * torch.randn(D) for k in range(T)]


def memory_of(stages, batch=7):
    memory = {"mean": [], "covariance": 0.0}
    for x in stages:
        stage = {}
        for k in range(0, len(x), batch):
            experts.welford(stage, x[k : k + batch])
        memory["mean"].append(stage["mean"])
        memory["covariance"] = memory["covariance"] + stage["scatter"] / stage["count"]
    memory["mean"] = torch.stack(memory["mean"])
    return memory | experts.discriminants(memory, ARGS.shrinkage)


def test_probabilities_are_those_of_scikit_learn(stages):
    lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1, priors=[1 / T] * T)
    lda.fit(torch.cat(stages).double().numpy(), np.repeat(range(T), [len(x) for x in stages]))
    x = 3 * torch.randn(50, D)
    p = experts.probability(x, memory_of(stages), ARGS)
    np.testing.assert_allclose(p, lda.predict_proba(x.double().numpy()), atol=1e-8)


def test_no_order_of_samples_or_batches_changes_the_memory(stages):
    memory = memory_of(stages)
    mixed = [x[torch.randperm(len(x))] for x in stages]
    for other in (memory_of(stages, 1), memory_of(mixed, 11), memory_of(stages, 999)):
        for name in ("mean", "covariance"):
            torch.testing.assert_close(other[name], memory[name], rtol=0, atol=1e-9)
    before = memory_of(stages[:2])
    assert torch.equal(before["mean"], memory["mean"][:2])  # later stages change no old mean


def test_the_projection_keeps_distances():
    torch.manual_seed(0)
    x = torch.randn(30, 5120)
    before, after = torch.pdist(x), torch.pdist(x @ experts.projection(5120))
    torch.testing.assert_close(after, before, rtol=0.15, atol=0)
    assert experts.projection(5120) is experts.projection(5120)


def test_an_expert_begins_as_a_mean_of_earlier_ones():
    layer = StackedLoRALinear(torch.nn.Linear(12, 10), 2, 4.0, 0.0, alone=True)
    pairs = []
    for k in range(3):
        layer.A.data, layer.B.data = torch.randn(2, 12), torch.randn(10, 2)
        pairs.append(layer.B.data @ layer.A.data)
        for start, wanted in {
            "last": pairs[-1],
            "mean": sum(pairs) / len(pairs),
            "alike": sum(w * pair for w, pair in zip((0.2, 0.3, 0.5), pairs)),
        }.items():
            old = layer.old_A, layer.old_B, layer.A, layer.B
            alike = torch.tensor([0.2, 0.3, 0.5])[: k + 1]
            experts.begin_expert([layer], SimpleNamespace(start=start), k + 1, alike)
            U, S, Vh = torch.linalg.svd(wanted)
            best = (U[:, :2] * S[:2]) @ Vh[:2]
            torch.testing.assert_close(layer.B @ layer.A, best, rtol=1e-4, atol=1e-4)
            layer.old_A, layer.old_B, layer.A, layer.B = old
        layer.stack()
        assert not layer.B.any()


def test_every_sample_of_a_batch_gets_its_expert():
    layer = StackedLoRALinear(torch.nn.Linear(12, 10), 2, 4.0, 0.0, alone=True).eval()
    for _ in range(2):
        layer.B.data.normal_()
        layer.stack()
    layer.B.data.normal_()
    x, choice = torch.randn(5, 3, 12), [2, 0, 1, 1, 2]
    layer.weights = torch.eye(3)[choice]
    A, B = layer.all_pairs()
    y = layer(x)
    for b, k in enumerate(choice):
        rows = slice(2 * k, 2 * k + 2)
        wanted = layer.base(x[b]) + 2 * linear(linear(x[b], A[rows]), B[:, rows])
        torch.testing.assert_close(y[b], wanted, rtol=1e-4, atol=1e-5)


def test_fresh_experts_are_those_of_mr_lora(flags, tmp_path):
    """With the task known, the same answers; and with --untrained the router is measured alone."""
    small = [*flags, "--epochs", "1", "--dropout", "0", "--router", "oracle"]
    ours = run_here("experts", [*small, "--start", "fresh"], tmp_path / "ours")
    theirs = run_here("mllm_cl", [*small, "--shots", "2"], tmp_path / "theirs")
    for stage in ("one", "two", "three"):
        name = f"experts/{stage}/adapter_model.safetensors"
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), stage
    for path in (theirs / "predictions").iterdir():
        assert path.read_bytes() == (ours / "predictions" / path.name).read_bytes()
    record = read_json(ours / "summary.json")
    each, d = record["trainable_parameters"], 32 + 64
    assert record["stored_parameters"] == 3 * each + 3 * d + d * (d + 1) // 2
    alone = run_here("experts", [*flags, "--untrained", "--features", "last"], tmp_path / "alone")
    record = read_json(alone / "summary.json")
    assert record["stored_parameters"] == 3 * each + 3 * 64 + 64 * 65 // 2
    assert (alone / "metrics.jsonl").read_text() == "" and len(record["routing_accuracy"]) == 3
