"""Properties of the method: what the paper proves, what we changed, and what goes into training.

The numbers themselves are compared with the authors' code in test_golden.py.
"""

import copy
import math

import pytest
import torch

import asr
from data import Collator
from model import add_lora, enable_checkpointing, image_grid, image_tokens


@pytest.fixture
def samples(samples):
    """The samples of conftest.py, to be changed freely."""
    return copy.deepcopy(samples)


def random_maps(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator) ** 3


def settings(*flags):
    return asr.parse([*flags])


# ------------------------------------------------------------------------------------------------
# The quantity
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clean", "paper"])
@pytest.mark.parametrize("grid", [(8, 8), (5, 7), (24, 24)])
def test_spectra_do_not_change_under_a_cyclic_shift(kind, grid):  # Theorem 2
    maps = random_maps(2, 2, 2, 3, *grid)
    shifted = maps.roll((3, 2), (-2, -1))
    for a, b in zip(
        asr.descriptor(maps, kind=kind), asr.descriptor(shifted, kind=kind), strict=True
    ):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)
    raw = [asr.descriptor(m, spectrum="raw")[0] for m in (maps, shifted)]
    assert (raw[0] - raw[1]).abs().max() > 1e-3  # the maps themselves do change


@pytest.mark.parametrize("grid", [(8, 8), (5, 7)])
def test_spectra_change_at_most_linearly_with_the_map(grid):  # Theorem 2, second half
    """With P the power |F|^2 of A and p = P / sum P, and ||.|| the Euclidean norm:
    ||P(A+E) - P(A)||_1 <= (2 ||A|| + ||E||) ||E|| (Parseval, Cauchy-Schwarz), hence
    ||p(A+E) - p(A)||_1 <= 2 (2 ||A|| + ||E||) ||E|| / ||A||^2. r is made of sums of p, so the bound
    is its own; d is without DC, so that ||A|| without its mean counts."""
    generator = torch.Generator().manual_seed(1)
    maps = random_maps(20, 1, *grid)
    noise = torch.randn(maps.shape, generator=generator)
    without = (maps - maps.mean((-2, -1), keepdim=True)).flatten(1).norm(dim=1)
    sizes = {"r": maps.flatten(1).norm(dim=1), "d": without}
    for scale in (1e-1, 1e-2, 1e-3):
        e = (scale * noise).flatten(1).norm(dim=1)
        before, after = (asr.head_spectra(m)[1:] for m in (maps, maps + scale * noise))
        for name, a, b in zip("rd", before, after, strict=True):
            size, moved = sizes[name], (b - a).abs().flatten(1).sum(1)
            assert (moved <= 2 * (2 * size + e) * e / size**2 + 1e-5).all()
            assert moved.max() > scale / 50  # they do change


def test_clean_bins_have_no_direction_for_dc_and_cover_half_a_turn():
    rho, theta, radial, angular, cos, sin = asr.bin_table(8, 8)
    assert angular[0].sum() == 0 and (angular[1:].sum(1) == 1).all() and (radial.sum(1) == 1).all()
    grid = torch.arange(64).view(8, 8)
    mirror = grid.roll((-1, -1), (0, 1)).flip(0, 1).flatten()  # the place of frequency -f
    inside = [k for k in range(1, 64) if k // 8 != 4 and k % 8 != 4]  # not on a Nyquist line
    assert (angular[inside] == angular[mirror[inside]]).all()
    torch.testing.assert_close(torch.stack([cos, sin]), torch.stack([cos, sin])[:, mirror])
    paper = asr.bin_table(8, 8, "paper")[3]
    assert (paper[inside] != paper[mirror[inside]]).any()


def test_clean_peak_finds_a_grating_and_the_paper_s_peak_never_does():
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    grating = 1 + torch.cos(2 * math.pi * (x + y) / 6)  # diagonal waves, 4 to a side
    maps = asr.token_average(grating[None, None, None, None])
    clean, paper = asr.head_spectra(maps)[0][0, 0], asr.head_spectra(maps, "paper")[0][0, 0]
    torch.testing.assert_close(clean[-4:], torch.tensor([1 / 3, 0.0, 1.0, 0.5]), atol=1e-5, rtol=0)
    assert paper[-3:-1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "kind, spectrum, D",
    [
        ("clean", "full", 40),
        ("paper", "full", 54),
        ("clean", "radial", 16),
        ("clean", "angular", 16),
        ("clean", "raw", 128),
    ],
)
def test_descriptor_sizes(kind, spectrum, D):
    maps = random_maps(3, 4, 2, 5, 8, 8).bfloat16()
    phi, angular, radial = asr.descriptor(maps, None, kind, spectrum)
    assert phi.shape == (3, D) and phi.dtype == torch.float32
    assert angular.shape == radial.shape == (3, 8)
    torch.testing.assert_close(angular.sum(1), torch.ones(3))


def test_every_token_counts_the_same_however_much_of_its_attention_is_on_the_image():
    maps, weights = random_maps(1, 1, 1, 2, 8, 8), torch.ones(1, 2)
    louder = maps * torch.tensor([1.0, 100.0]).view(2, 1, 1)
    same = [asr.token_average(m, weights) for m in (maps, louder)]
    torch.testing.assert_close(*same)
    first = [asr.token_average(m, weights, average_first=True) for m in (maps, louder)]
    assert (first[0] - first[1]).abs().max() > 1e-3


def words(question):
    return [question[a:b] for a, b in asr.functional_spans(question)]


def test_functional_words():
    assert words("What color is the big cup?") == ["What", "color", "is", "cup"]
    assert (
        words("How many cars are left of it? A. 2 B. 3") == "How many cars are left of it".split()
    )
    assert words("Is the dog running to 3 trees?\nUse one word.") == "Is running 3 trees".split()
    assert words("?!") == []


def test_functional_rows_and_their_fallback(tiny, samples):
    model, processor = tiny
    picked = samples[:4]
    picked[1].question = "?!"
    batch = Collator(processor, image_tokens(model, processor))(picked, train=True)
    rows = asr.functional_rows(batch, picked)
    assert (rows <= batch["question_mask"]).all() and rows.any(1).all()
    assert (rows[1] == batch["question_mask"][1]).all()
    assert rows[0].sum() < batch["question_mask"][0].sum()


# ------------------------------------------------------------------------------------------------
# The memory
# ------------------------------------------------------------------------------------------------


def posterior(samples, *flags, t=1, skills=None, **more):
    args = settings(*flags)
    skills = skills or [f"skill {k}" for k in range(5)]
    return asr.skill_posterior(samples, t, args, skills, **more)


def test_posterior_of_known_skills(samples):
    known = ["--skills", "stream"]
    soft = posterior(samples[:5], *known)
    hard = posterior(samples[:5], *known, "--posterior", "hard")
    torch.testing.assert_close(soft, 0.9375 * torch.eye(5) + 0.0125)
    assert (hard == torch.eye(5)).all()
    samples[2].image = None
    assert posterior(samples[:5], *known)[2].sum() == 0  # nothing to look at


def test_posterior_of_one_prototype_per_stage_or_for_all(samples):
    task = ["--prototypes", "task"]
    assert posterior(samples[:2], *task, t=2, skills=list("abcd"))[0].tolist() == [0.5, 0.5, 0, 0]
    learned = posterior(samples[:2], *task, t=2, skills=list("abcd"), learned=True)
    assert learned[1].tolist() == [0, 0, 1, 0]
    assert posterior(samples[:2], *task, t=0, skills=list("ab")).sum() == 0
    assert posterior(samples[:2], "--prototypes", "global", skills=["all"]).tolist() == [[1], [1]]


def test_posterior_of_shared_skills(samples):
    questions = {
        "how many cups are there?": {"count"},
        "what color is the cup on the left?": {"color", "locate"},
        "why is the street empty?": {"reason"},
        "is there a red cup?": {"color", "judge"},
        "hm": {"recognize"},
    }
    picked = samples[:5]
    for sample, question in zip(picked, questions, strict=True):
        sample.question = question
    names = list(asr.SHARED)
    soft = posterior(picked, "--skills", "shared", skills=names)
    for row, expected in zip(soft, questions.values(), strict=True):
        assert {names[s] for s in row.nonzero().flatten()} == expected
        torch.testing.assert_close(row.sum(), torch.tensor(1.0))
    hard = posterior(picked, "--skills", "shared", "--posterior", "hard", skills=names)
    assert [names[s] for s in hard.argmax(1)] == "count color reason color recognize".split()


def test_parser_gives_mass_to_the_skills_met_so_far(tiny, samples):
    model, processor = tiny
    skills = [f"skill {k}" for k in range(5)]
    questions = asr.question_embeddings(model, processor, samples[:40])
    width = questions.shape[1]
    parser = {"centroid": torch.zeros(5, width), "count": torch.zeros(5)}
    old = [k for k in range(20) if k % 5 < 2]  # stage 1 knows skills 0 and 1, stage 2 brings 2
    new = [k for k in range(20, 40) if k % 5 == 2]
    for stage in (old, new):
        asr.update_centroids(parser, questions[stage], [samples[k] for k in stage], skills)
    assert parser["count"].tolist() == [4, 4, 4, 0, 0]
    torch.testing.assert_close(parser["centroid"][1], questions[[1, 6, 11, 16]].mean(0))
    picked = [samples[k] for k in new]
    pi = posterior(picked, "--skills", "parser", parser=parser, questions=questions[new])
    torch.testing.assert_close(pi.sum(1), torch.ones(len(new)))
    assert (pi.argmax(1) == 2).all() and (pi[:, :2] > 0).all() and (pi[:, 3:] == 0).all()
    asr.update_centroids(parser, questions[new] + 1, picked, skills)  # a skill that returns
    torch.testing.assert_close(parser["centroid"][2], questions[new].mean(0) + 0.5)


def filled_memory(S=3, D=10, M=8, seen=2):
    torch.manual_seed(0)
    memory = asr.new_prototypes(S, D, M)
    pi = torch.eye(S)[torch.arange(60) % seen]
    asr.update_prototypes(memory, torch.randn(60, D), torch.rand(60, M), pi, floor=0.0)
    return memory


def test_prototypes_are_an_average_that_keeps_most_of_the_old():
    memory = asr.new_prototypes(2, 4, 8)
    first, second = torch.randn(9, 4), torch.randn(7, 4)
    pi = torch.tensor([[0.8, 0.2]])  # 0.2 is not above the threshold
    asr.update_prototypes(memory, first, torch.rand(9, 8), pi.expand(9, 2), floor=0.0)
    torch.testing.assert_close(memory["mean"][0], first.mean(0))
    torch.testing.assert_close(memory["var"][0], first.var(0))
    asr.update_prototypes(memory, second, torch.rand(7, 8), pi.expand(7, 2), floor=0.0)
    torch.testing.assert_close(memory["mean"][0], 0.9 * first.mean(0) + 0.1 * second.mean(0))
    assert memory["count"].tolist() == [16, 0]


def test_variance_floors():
    memory = filled_memory()
    memory["var"][0, 0] = memory["var"][1, 0] = 0.0  # constant inside the skills by chance
    memory["mean"][0, 1] = memory["mean"][1, 1] = memory["mean"][0, 1]
    clean = asr.prototype_variance(memory)
    spread = memory["mean"][:2, 0].var(correction=0)
    torch.testing.assert_close(clean[0, 0], 0.1 * spread + 1e-7)
    assert (clean[:2] >= memory["var"][:2]).all()
    assert asr.prototype_variance(memory, "paper")[0, 0] == torch.tensor(1e-4)
    assert asr.prototype_variance(memory, shape="mean")[:2].unique().numel() == 1


# ------------------------------------------------------------------------------------------------
# The losses
# ------------------------------------------------------------------------------------------------


def test_a_skill_without_prototype_adds_nothing():
    memory = filled_memory()
    phi, angular = torch.randn(4, 10), torch.rand(4, 8)
    own = torch.eye(3)[[0, 1, 2, 2]]  # skill 2 has no prototype
    loss, D2, w = asr.spectral_loss(phi, angular, own, memory)
    both = asr.spectral_loss(phi[:2], angular[:2], own[:2], memory)[0]
    torch.testing.assert_close(loss, both / 2)  # the mean is over all four
    assert asr.spectral_loss(phi, angular, own[[2, 2, 2, 2]], memory)[0] == 0
    torch.testing.assert_close(w, torch.exp(-D2[:, :2].amin(1)))
    published = asr.spectral_loss(phi, angular, own, memory, renormalize=True)[0]
    torch.testing.assert_close(published, both)
    mixed = torch.tensor([[0.01, 0.0, 0.99]]).expand(4, 3)  # nearly all of it on a new skill
    ours, theirs = (
        asr.spectral_loss(phi, angular, mixed, memory, renormalize=r)[0] for r in (False, True)
    )
    torch.testing.assert_close(theirs, 100 * ours)


def test_micro_batches_add_up():
    memory, pi = filled_memory(), torch.rand(6, 3)
    phi, angular = torch.randn(6, 10), torch.rand(6, 8)
    whole = asr.spectral_loss(phi, angular, pi, memory)[0]
    halves = [
        asr.spectral_loss(phi[k], angular[k], pi[k], memory)[0] for k in ([0, 1, 2], [3, 4, 5])
    ]
    torch.testing.assert_close(whole, sum(halves) / 2)


def test_the_detached_weight_pulls_and_the_published_one_pushes_distant_maps_away():
    memory, pi = filled_memory(seen=1), torch.tensor([[1.0, 0.0, 0.0]])
    std = asr.prototype_variance(memory)[0].sqrt()
    for distance, published_pulls in ((0.5, True), (1.5, False)):  # D2 = 0.25 and 2.25
        for weight, pulls in (("detached", True), ("published", published_pulls)):
            phi = (memory["mean"][:1] + distance * std).requires_grad_()
            asr.spectral_loss(phi, torch.ones(1, 8), pi, memory, 0.0, weight=weight)[0].backward()
            outward = (phi.grad * std).sum()  # a step against the gradient moves inward if > 0
            assert (outward > 0) == pulls, (distance, weight)


def test_infinite_tau_is_the_fixed_weight_one():
    memory = filled_memory()
    w = asr.spectral_loss(
        torch.randn(4, 10), torch.rand(4, 8), torch.rand(4, 3), memory, tau=math.inf
    )
    assert w[2].tolist() == [1.0] * 4


def test_geometry_is_zero_at_the_start_and_for_a_single_sample():
    a, b, c = torch.randn(3, 5, 16)
    assert asr.geometry_loss(a, b, a, b) == 0 and asr.geometry_loss(a, b, a, c) > 0
    assert asr.geometry_loss(a[:1], b[:1], a[:1], c[:1]) == 0


# ------------------------------------------------------------------------------------------------
# One micro-batch of training
# ------------------------------------------------------------------------------------------------


class Bench:
    """A tiny model with LoRA, and its gradient after asr.backward on some samples."""

    def __init__(self, llava, samples, seed=0):
        self.model, processor = llava
        torch.manual_seed(seed)
        self.parameters = add_lora(self.model, "a", 4, 8, 0.0, ("q", "v", "projector"))
        for p in self.parameters:  # B starts at zero: no gradient would reach A
            torch.nn.init.normal_(p, std=0.05)
        self.samples, self.grid = samples, image_grid(self.model)
        self.collator = Collator(processor, image_tokens(self.model, processor))
        P, width = self.grid[0] * self.grid[1], self.model.config.vision_config.hidden_size
        self.features = torch.randn(len(samples), P, width)
        self.args, self.pi = settings(), torch.rand(len(samples), 3)
        self.memory = asr.new_prototypes(3, 40, 8)
        self.memory["count"][:2] = 10
        self.memory["var"][:] = 0.01
        text = self.model.config.text_config.hidden_size
        self.reference = torch.randn(2, len(samples), text)

    def gradient(self, *parts, beta=0.5, gamma=0.0, args=None):
        """Of one step made of these parts (ranges of samples), and the logged values."""
        batches = [self.collator([self.samples[k] for k in part], train=True) for part in parts]
        tokens = [int((batch["labels"] != -100).sum()) for batch in batches]
        total, n = {}, sum(map(len, parts))
        for p in self.parameters:
            p.grad = None
        for part, batch, answer in zip(parts, batches, tokens, strict=True):
            rows, own = list(part), [self.samples[k] for k in part]
            values = asr.backward(
                self.model, batch, self.features[rows], own, (answer / sum(tokens), len(rows) / n),
                args or self.args, self.grid, beta, self.pi[rows], self.memory, gamma,
                self.reference[:, rows],
            )  # fmt: skip
            total = {name: total.get(name, 0) + value for name, value in values.items()}
        return torch.cat([p.grad.flatten() for p in self.parameters]), total


def test_a_step_does_not_depend_on_how_it_is_cut(llava, samples):
    bench = Bench(llava, samples[:6])
    whole, values = bench.gradient(range(6))
    parts, more = bench.gradient(range(2), range(2, 6))
    torch.testing.assert_close(whole, parts, atol=1e-5 * whole.abs().max().item(), rtol=1e-4)
    for name in ("task", "spectral", "loss", "weight", "distance"):
        torch.testing.assert_close(values[name], more[name], atol=1e-6, rtol=1e-4)
    plain, nothing = bench.gradient(range(6), beta=0.0)
    assert nothing["spectral"] == nothing["geometry"] == 0 and nothing["loss"] == nothing["task"]
    assert (whole - plain).abs().max() > 1e-7  # the spectral loss reaches LoRA
    geometry, values = bench.gradient(range(6), beta=0.0, gamma=0.05)
    assert values["geometry"] > 0 and (geometry - plain).abs().max() > 1e-7


def test_gradient_checkpointing_changes_nothing(llava, samples):
    bench = Bench(llava, samples[:4])
    bench.model.train()
    plain, _ = bench.gradient(range(4), gamma=0.05)
    enable_checkpointing(bench.model)
    torch.testing.assert_close(bench.gradient(range(4), gamma=0.05)[0], plain)


@pytest.mark.parametrize(
    "flags",
    ["--descriptor paper", "--weight published --renormalize", "--tau inf", "--prototypes mean",
     "--spectrum radial", "--spectrum raw"],
)  # fmt: skip
def test_every_variant_trains(tiny, samples, flags):
    bench = Bench(tiny, samples[:4])
    args = settings(*flags.split())
    D = {"paper": 54}.get(args.descriptor, {"radial": 16, "raw": 128}.get(args.spectrum, 40))
    bench.memory |= {"mean": torch.zeros(3, D), "var": torch.full((3, D), 0.01)}
    gradient, values = bench.gradient(range(4), args=args)
    assert gradient.isfinite().all() and values["spectral"] > 0


def test_a_batch_without_any_image(tiny, samples):
    bench = Bench(tiny, samples[:3])
    for sample in bench.samples:
        sample.image = None
    bench.features, bench.pi = [None] * 3, torch.zeros(3, 3)
    batch = bench.collator(bench.samples, train=True)
    values = asr.backward(bench.model, batch, None, bench.samples, (1, 1), bench.args, bench.grid,
                          0.5, bench.pi, bench.memory)  # fmt: skip
    assert values["spectral"] == 0 and values["loss"].isfinite()
