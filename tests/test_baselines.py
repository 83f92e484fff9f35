"""baselines.py: every baseline's defining property, and that a kill does not change it."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from test_scripts import kill_after, results, run_here

import baselines
from data import Collator, InputError
from model import add_lora, forward, generate, image_tokens, remove_lora, set_lora, share_lora


@pytest.fixture
def adapted(tiny, samples):
    """The tiny model with a LoRA that does something: (model, parameters, samples, collate)."""
    model, processor = tiny
    torch.manual_seed(0)
    parameters = add_lora(model, "continual", 4, 8, 0.0, ["q", "v"])
    with torch.no_grad():
        for p in parameters:
            p += 0.1 * torch.randn_like(p)
    collator = Collator(processor, image_tokens(model, processor))
    chosen = [replace(sample, image=None) for sample in samples[:2]]

    def collate(part):
        return collator(part, train=True), None

    model.eval()
    yield model, parameters, chosen, collate
    remove_lora(model, "continual")


def test_fisher_is_the_squared_gradient_of_log_p(adapted):
    """The mean of the squares, which is not the square of the mean."""
    model, parameters, chosen, collate = adapted
    gradients = []
    for sample in chosen:
        batch, _ = collate([sample])
        logits = forward(model, batch, None).logits.log_softmax(1)
        answer = batch["labels"][batch["labels"] != -100]
        log_p = logits[torch.arange(len(answer)), answer].sum()
        gradients.append(torch.autograd.grad(log_p, parameters))
    fisher = baselines.fisher_information(model, parameters, chosen, collate)
    assert sum(f.sum() for f in fisher) > 0
    for f, g1, g2 in zip(fisher, *gradients, strict=True):
        torch.testing.assert_close(f, (g1**2 + g2**2) / 2, rtol=1e-4, atol=1e-9)


def test_adapters_add_up_and_are_one_joined_adapter(adapted):
    model, parameters, chosen, collate = adapted
    batch, _ = collate(chosen)
    other = add_lora(model, "other", 4, 8, 0.0, ["q", "v"])
    joined = add_lora(model, "joined", 8, 16, 0.0, ["q", "v"])
    with torch.no_grad():
        for p in other:
            p += 0.1 * torch.randn_like(p)
        for k, p in enumerate(joined):
            p.copy_(torch.cat([parameters[k], other[k]], k % 2))
    logits = []
    for names in (("joined",), ("continual", "other"), ("continual",)):
        set_lora(model, *names)
        logits.append(forward(model, batch, None).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    assert (logits[0] - logits[2]).abs().max() > 1e-2
    add_lora(model, "louder", 4, 16, 0.0, ["q", "v"])
    with pytest.raises(ValueError, match="different scales"):
        set_lora(model, "continual", "louder")
    for name in ("other", "joined", "louder"):
        remove_lora(model, name)


def test_shares_are_per_sample_and_the_last_layer_has_its_own(adapted):
    model, parameters, chosen, collate = adapted
    batch, _ = collate(chosen)
    other = add_lora(model, "other", 4, 8, 0.0, ["q", "v"])
    with torch.no_grad():
        for p in other:
            p += 0.1 * torch.randn_like(p)

    def logits(*names, shares=None, last=None):
        set_lora(model, *names)
        if shares is not None:
            share_lora(model, torch.tensor(shares), last and torch.tensor(last))
        found = forward(model, batch, None).logits  # answer tokens, sample after sample
        return found.split((batch["labels"][:, 1:] != -100).sum(1).tolist())

    one, two = logits("continual"), logits("other")
    mixed = logits("continual", "other", shares=[[1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(mixed[0], one[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1], two[1], rtol=1e-4, atol=1e-4)
    top = logits("continual", "other", shares=[[1.0, 0.0]], last=[[0.0, 1.0]])
    path = f"layers.{model.config.text_config.num_hidden_layers - 1}."
    with torch.no_grad():  # the same by hand: "continual" with the last layer of "other"
        for name, p in model.named_parameters():
            if path in name and "continual_" in name:
                p.copy_(model.get_parameter(name.replace("continual_", "other_")))
    torch.testing.assert_close(logits("continual"), top, rtol=1e-4, atol=1e-4)
    assert (top[0] - one[0]).abs().max() > 1e-3
    remove_lora(model, "other")


def test_likeness_is_the_mean_cosine_of_images_and_questions():
    images, words = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    memory = [[torch.tensor([5.0, 0.0]), torch.tensor([0.0, 1.0])],
              [torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])]]  # fmt: skip
    wanted = torch.tensor([[1.0, 0.5**1.5], [0.0, 0.5**0.5]])  # no image: the question alone
    torch.testing.assert_close(baselines.likeness((images, words), memory), wanted)


def test_hide_begins_as_one_lora_and_keeps_a_lora_of_every_stage(flags, tmp_path, monkeypatch):
    """With one stage there is nothing to weigh; a kill changes nothing; no stage touches another's
    LoRA; in tests a LoRA counts in the last layer as its stage is like the question."""
    flags = [*flags, "--dropout", "0", "--targets", "q,v,projector"]
    plain = run_here("baselines", flags, tmp_path / "sequential")
    more, seen, alike = [*flags, "--method", "hide", "--save_every", "2"], [], []
    more += ["--hide_sum", "2", "--hide_temperature", "0.03"]

    def watched_likeness(*args):
        alike.append(likeness(*args))
        return alike[-1]

    def watched_share(model, shares, last):
        seen.append((shares, last))
        share_lora(model, shares, last)

    def watched_answers(model, *args):
        active = [m for m in model.modules() if getattr(m, "active", ())]
        assert (
            all(m.shares is not None for m in active) and len({len(m.active) for m in active}) == 1
        )
        return generate(model, *args)

    likeness = baselines.likeness
    monkeypatch.setattr(baselines, "likeness", watched_likeness)
    monkeypatch.setattr(baselines, "share_lora", watched_share)
    monkeypatch.setattr(baselines, "generate", watched_answers)
    # without a cache the tower runs before every answer, with all adapters off
    whole = run_here("baselines", [*more, "--features", "off"], tmp_path / "whole")
    monkeypatch.undo()
    assert [last.shape[1] for _, last in seen] == [1] * 1 + [2] * 2 + [3] * 3
    for (shares, last), cosines in zip(seen, alike, strict=True):
        n = last.shape[1]
        torch.testing.assert_close(shares, torch.full((1, n), min(1.0, 2 / n)))
        torch.testing.assert_close(last, torch.softmax(cosines / 0.03, 1))
    assert (seen[-1][1].max(1).values > 1.01 / 3).all()
    assert losses(whole)[:6] == losses(plain)[:6]
    first = "predictions/after-1-on-1.jsonl"
    assert (whole / first).read_bytes() == (plain / first).read_bytes()
    short = run_here("baselines", [*more, "--order", "one"], tmp_path / "short")
    file = "lora/one/adapter_model.safetensors"
    assert (whole / file).read_bytes() == (short / file).read_bytes()
    assert sorted(p.name for p in (whole / "lora").iterdir()) == ["one", "three", "two"]
    kill_after(9, "baselines", more, tmp_path / "killed")
    killed = run_here("baselines", [*more, "--resume"], tmp_path / "killed")
    assert results(killed) == results(whole)
    with pytest.raises(InputError, match="--blind"):
        baselines.parse(["--method", "hide", "--blind"])


def test_ewc_penalty_is_zero_at_the_old_weights_and_sums_the_stages():
    torch.manual_seed(1)
    first, second, now = ([torch.randn(3, 2), torch.randn(4)] for _ in range(3))
    F1, F2 = ([torch.rand(3, 2), torch.rand(4)] for _ in range(2))
    one = baselines.remember(None, F1, first)
    assert baselines.ewc_penalty(one, first) == 0 < baselines.ewc_penalty(one, now)
    both = baselines.remember(one, F2, second)

    def direct(theta):
        terms = [(F1, first), (F2, second)]
        return sum(
            (f * (p - c) ** 2).sum()
            for F, old in terms
            for f, p, c in zip(F, theta, old, strict=True)
        )

    # equal to the two terms but for a constant
    other = [p + 1 for p in now]
    difference = baselines.ewc_penalty(both, other) - baselines.ewc_penalty(both, now)
    torch.testing.assert_close(2 * difference, direct(other) - direct(now))


def test_distillation_is_zero_for_equal_logits_and_is_t2_kl():
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    assert baselines.distillation_loss(a, a, 2.0).abs() < 1e-6
    p, q = (a / 3).softmax(1), (b / 3).softmax(1)
    kl = (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(baselines.distillation_loss(b, a, 3.0), 9 * kl)


def test_olora_penalty_is_zero_for_orthogonal_rows_and_counts_every_entry():
    eye = torch.eye(6)
    old, older, B = eye[:2], eye[2:4], torch.ones(3, 2)
    assert baselines.orthogonality_loss([[old, B], [older, B]], [eye[4:], B]) == 0
    new = 2 * eye[4:] + 3 * eye[[0, 2]] - 5 * eye[[1, 1]]
    assert baselines.orthogonality_loss([[old, B], [older, B]], [new, B]) == 3 + 5 + 5 + 3


def test_olora_leaves_earlier_stages_alone(flags, tmp_path):
    """The file holds the ranks of all stages, those of the first as a shorter run ends with them;
    the penalty makes the new rows more orthogonal to the old ones."""
    flags, overlap = [*flags, "--method", "olora", "--rank", "4"], {}
    for weight in ("0", "100"):
        run = run_here("baselines", [*flags, "--olora_lambda", weight], tmp_path / weight)
        state = load_file(run / "lora" / "adapter_model.safetensors")
        A = [value for key, value in state.items() if "lora_A" in key]
        assert all(len(a) == 12 for a in A)
        overlap[weight] = sum((a[:4] @ a[4:8].T).abs().sum() for a in A)
    assert overlap["100"] < 0.7 * overlap["0"], overlap
    short = run_here("baselines", [*flags, "--order", "one"], tmp_path / "short")
    for key, value in load_file(short / "lora" / "adapter_model.safetensors").items():
        own = state[key][:4] if "lora_A" in key else state[key][:, :4]
        assert torch.equal(own, value)


def test_even_gates_are_a_quarter_of_a_plain_lora_and_a_sharp_gate_is_one_expert():
    torch.manual_seed(2)
    layer = baselines.MoELoRALinear(torch.nn.Linear(10, 6), 8, 16.0, 0.0, 4)
    torch.nn.init.normal_(layer.B)
    x = torch.randn(3, 5, 10)
    even = layer.base(x) + 2 * x @ layer.A.T @ layer.B.T / 4  # alpha / r = 2, four experts
    torch.testing.assert_close(layer(x), even)
    with torch.no_grad():
        layer.G[2] = 1000 * x[0, 0]
    own = layer.base(x[0, 0]) + 2 * layer.B[:, 4:6] @ layer.A[4:6] @ x[0, 0]
    torch.testing.assert_close(layer(x)[0, 0], own, rtol=1e-4, atol=1e-4)


def test_ewc_holds_the_weights_and_lwf_the_answers(flags, tmp_path, monkeypatch):
    """Second stage, with the penalty and with its weight zero: ewc ends nearer to the LoRA of the
    first stage, lwf nearer to the words it said before."""
    flags = [*flags, "--dropout", "0", "--fisher_samples", "8", "--lr", "1e-2"]

    def adapter(run):
        return load_file(run / "lora" / "adapter_model.safetensors")

    first = adapter(run_here("baselines", [*flags, "--order", "one"], tmp_path / "one"))
    flags, moved, apart = [*flags, "--order", "one,two", "--method"], {}, {}
    for weight in ("0", "1e5"):
        more = ["ewc", "--ewc_lambda", weight]
        run = run_here("baselines", [*flags, *more], tmp_path / f"ewc-{weight}")
        moved[weight] = sum(((v - first[k]) ** 2).sum() for k, v in adapter(run).items())
    assert moved["1e5"] < 0.5 * moved["0"], moved
    loss = baselines.distillation_loss
    for weight in ("0", "30"):
        seen = apart[weight] = []

        def watched(*args, seen=seen):
            seen.append(loss(*args))
            return seen[-1]

        monkeypatch.setattr(baselines, "distillation_loss", watched)
        more = ["lwf", "--lwf_lambda", weight]
        run_here("baselines", [*flags, *more], tmp_path / f"lwf-{weight}")
    last = {weight: sum(x.item() for x in seen[-3:]) for weight, seen in apart.items()}
    assert last["30"] < 0.5 * last["0"], last


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["ewc", "lwf", "olora", "moelora"])
def test_a_method_begins_where_it_has_nothing_to_protect(method, flags, tmp_path):
    """The first stage, and the loss of the second's first step, are those of sequential LoRA; what
    follows is not. A killed run that goes on ends with the same bytes."""
    flags = [*flags, "--dropout", "0", "--fisher_samples", "8", "--targets", "q,v,projector"]
    strong = {
        "ewc": ["--ewc_lambda", "1e6"],
        "lwf": ["--lwf_lambda", "10"],
        "olora": ["--olora_lambda", "0.1"],
        "moelora": ["--experts", "4"],
    }[method]
    if method == "moelora":
        with pytest.raises(InputError, match="--rank 16 by --experts 3"):
            uneven = [*flags, "--method", method, "--experts", "3"]
            run_here("baselines", uneven, tmp_path / "uneven")
    plain = losses(run_here("baselines", flags, tmp_path / "sequential"))
    whole = run_here("baselines", [*flags, "--method", method, *strong], tmp_path / "whole")
    own = losses(whole)
    if method == "moelora":  # begins as the pretrained model, like any LoRA
        assert own[0] == pytest.approx(plain[0], rel=1e-5)
    else:
        assert own[:6] == plain[:6]
    if method in ("ewc", "lwf"):  # olora's penalty is there from the first step on
        assert own[6] == pytest.approx(plain[6], rel=1e-5)
    assert all(abs(a - b) > 1e-4 for a, b in zip(own[8:12], plain[8:12], strict=True))
    if method == "lwf":  # what is kept in stage 3 is what stage 2 ended with, not stage 1
        third = torch.load(whole / "checkpoint" / "state.pt", weights_only=True)["before"]
        second = run_here("baselines", [*flags, "--method", method, *strong, "--order", "one,two"],
                          tmp_path / "two")  # fmt: skip
        ended = load_file(second / "lora" / "adapter_model.safetensors")
        assert all(torch.equal(v, ended[f"base_model.model.{k}"]) for k, v in third.items())
    if method == "moelora":  # the gates learn, too
        state = load_file(whole / "lora" / "adapter_model.safetensors")
        assert all(value.abs().max() > 1e-5 for key, value in state.items() if key.endswith(".G"))
    more = ["--method", method, *strong, "--save_every", "2"]
    kill_after(9, "baselines", [*flags, *more], tmp_path / "killed")
    killed = run_here("baselines", [*flags, *more, "--resume"], tmp_path / "killed")
    assert results(killed) == results(whole)
