"""Our functions against numbers computed by the authors' public code (tests/golden/asr_golden.npz).

The file stores inputs and outputs. The public code is what `asr.py --published` computes.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

import asr
import eval as evaluation
import plot

GOLDEN = np.load(Path(__file__).parent / "golden" / "asr_golden.npz")
VALUE, GRADIENT = 1e-5, 5e-5  # allowed error, relative to the largest entry of each array
CASES = range(6)


@pytest.fixture(scope="module")
def args(tiny_folder):
    return asr.parse(["--published", "--model", str(tiny_folder)])


def g(name):
    return torch.from_numpy(np.asarray(GOLDEN[name])) if name in GOLDEN.files else None


def close(ours, name, tolerance=VALUE):
    theirs = GOLDEN[name].astype(np.float64)
    ours = np.asarray(torch.as_tensor(ours).detach(), dtype=np.float64)
    assert ours.shape == theirs.shape, (name, ours.shape, theirs.shape)
    error = np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-12)
    assert error <= tolerance, f"{name}: relative error {error:.1e}"


def memory_of(prefix):
    memory = {name: g(prefix + name).clone() for name in ("mean", "var", "angular")}
    return memory | {"count": g(prefix + "init").clone()}


def one_by_one(name, phi, angular, pi, memory, args):
    """A value of spectral_loss for each sample alone: [B]."""
    samples = zip(phi[:, None], angular[:, None], pi[:, None])
    return torch.stack([asr.spectral_loss(*sample, memory, args)[name] for sample in samples])


@pytest.mark.parametrize("i", CASES)
def test_descriptor_and_its_gradient(i, args):
    bins = asr.bin_table(*GOLDEN[f"c{i}_attn"].shape[-2:], tuple(args.published))
    for ours, name in zip(bins, ("rho", "theta", "radial_bin", "angular_bin")):
        close(ours.argmax(1) if ours.ndim == 2 else ours, f"c{i}_{name}")
    attention, mask = g(f"c{i}_attn").requires_grad_(), g(f"c{i}_mask")
    maps = asr.token_average(attention[:, -4:], mask, args.published)
    close(maps, f"c{i}_maps")
    close(asr.head_spectra(maps, args.published)[0], f"c{i}_per_head")
    looks = asr.descriptor(attention[:, -4:], mask, published=args.published)
    for ours, name in zip(looks, ("descriptor", "angular", "radial")):
        close(ours, f"c{i}_{name}")
    (looks[0] * g(f"c{i}_probe_coef")).sum().backward()
    close(attention.grad, f"c{i}_probe_grad_attn", GRADIENT)


@pytest.mark.parametrize("i", CASES)
def test_spectral_loss_and_its_gradient(i, args):
    attention, pi = g(f"c{i}_attn").requires_grad_(), g(f"c{i}_probs")
    memory = memory_of(f"c{i}_mem_")
    looks = asr.descriptor(attention[:, -4:], g(f"c{i}_mask"), published=args.published)[:2]
    close(asr.symmetric_kl(looks[1][:, None], memory["angular"]), f"c{i}_symkl")
    close(one_by_one("distance", *looks, pi, memory, args), f"c{i}_dmin")
    close(one_by_one("weight", *looks, pi, memory, args), f"c{i}_weight")
    # with a single prototype in the memory, the distance to the nearest one is D2 to that one
    only = [memory | {"count": one_hot(torch.tensor(s), 4)} for s in range(4)]
    D2 = [one_by_one("distance", *looks, pi, alone, args) for alone in only]
    close(torch.stack(D2, 1), f"c{i}_d2")
    loss = asr.spectral_loss(*looks, pi, memory, args)["spectral"]
    close(loss, f"c{i}_loss")
    loss.backward()
    close(attention.grad, f"c{i}_loss_grad_attn", GRADIENT)


@pytest.mark.parametrize("i", (0, 3))
def test_raw_frequencies(i, args):
    """u / h and v / w without wrapping, as the paper prints them."""
    attention, published = g(f"c{i}_attn"), tuple(args.published)
    bins = asr.bin_table(*attention.shape[-2:], published, wrapped=False)
    raw = asr.descriptor(attention, g(f"c{i}_mask"), published=published, bins=bins)
    for ours, name in zip(raw, ("descriptor", "angular", "radial")):
        close(ours, f"c{i}_raw_{name}")


def test_divergences():
    close(asr.symmetric_kl(g("kl_p"), g("kl_q")), "kl_symmetric")
    close(plot.js_divergence(GOLDEN["kl_p"], GOLDEN["kl_q"]), "kl_jsd")


def test_prototype_memory_over_two_updates():
    memory, before = None, np.zeros(5)
    for k in (1, 2):
        looks = g(f"mem_desc{k}"), g(f"mem_ang{k}")
        memory = asr.update_prototypes(memory, *looks, g(f"mem_probs{k}"), floor=1e-4)
        for name in ("mean", "var", "angular"):
            close(memory[name], f"mem_after{k}_{name}")
        count = memory["count"].numpy()
        assert (count == GOLDEN[f"mem_after{k}_count"]).all()
        assert ((count > 0) == GOLDEN[f"mem_after{k}_init"]).all()
        assert (count - before == GOLDEN[f"mem_selected{k}"]).all()
        before = count.copy()


@pytest.mark.parametrize(
    "name, scale, flags",
    [
        ("default", 1, ""),
        # distance not divided by D = 54 and tau = 54: the same weight, everything else times 54
        ("unnorm_tau54", 54, f"--lambda_ang {0.1 / 54}"),
        ("lam1_tau4", 1, "--lambda_ang 1 --tau 4"),
    ],
)
def test_spectral_loss_on_that_memory(name, scale, flags, tiny_folder):
    args = asr.parse(["--published", "--model", str(tiny_folder), *flags.split()])
    memory, pi = memory_of("mem_after2_"), g("sl_probs")
    looks = [g("sl_desc").requires_grad_(), g("sl_ang").requires_grad_()]
    loss = scale * asr.spectral_loss(*looks, pi, memory, args)["spectral"]
    close(loss, f"sl_{name}_loss")
    loss.backward()
    close(looks[0].grad, f"sl_{name}_grad_desc", GRADIENT)
    close(looks[1].grad, f"sl_{name}_grad_ang", GRADIENT)
    close(scale * one_by_one("spectral", *looks, pi, memory, args), f"sl_{name}_per_row")


@pytest.mark.parametrize("i", range(3))
def test_geometry_loss_and_its_gradient(i):
    image, text = g(f"geo{i}_img").requires_grad_(), g(f"geo{i}_txt").requires_grad_()
    loss = asr.geometry_loss(image, text, g(f"geo{i}_ref_img"), g(f"geo{i}_ref_txt"))
    close(loss, f"geo{i}_loss")
    loss.backward()
    close(image.grad, f"geo{i}_grad_img", GRADIENT)
    close(text.grad, f"geo{i}_grad_txt", GRADIENT)


@pytest.mark.parametrize("i", range(3))
def test_metrics(i):
    matrix = GOLDEN[f"metric{i}_matrix"].astype(np.float64)
    matrix[np.triu_indices(len(matrix), 1)] = np.nan
    ours = evaluation.metrics(matrix)
    close([ours[name] for name in ("AP", "AF", "Last", "Avg")], f"metric{i}_ap_af_last_avg")
