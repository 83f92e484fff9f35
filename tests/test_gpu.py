"""The scripts on a GPU, with activation checkpointing, beside a CPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_scripts import FLAGS, script_of

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="no GPU here")
@pytest.mark.parametrize("name", [*FLAGS])
def test_a_gpu_in_bfloat16_is_near_a_cpu(name, flags, tmp_path):
    """The losses of the first steps agree to the precision of the numbers."""
    script, further = script_of(name)
    environment = {key: x for key, x in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    words = [sys.executable, ROOT / f"{script}.py", *flags, *further, "--dropout", "0"]

    def losses(*choice):
        out = tmp_path / "-".join(choice)
        places = ["--device", choice[0], "--dtype", choice[1], "--out", out]
        subprocess.run(list(map(str, [*words, *places])), env=environment, check=True)
        assert json.loads((out / "summary.json").read_text())["peak_memory_mb"] > 1
        return [json.loads(x)["loss"] for x in (out / "metrics.jsonl").read_text().splitlines()]

    cpu, gpu, half = losses("cpu", "fp32"), losses("cuda", "fp32"), losses("cuda", "bf16")
    assert len(cpu) == len(gpu) == len(half) and np.isfinite(gpu + half).all()
    np.testing.assert_allclose(gpu[:3], cpu[:3], rtol=1e-3)
    np.testing.assert_allclose(half[:3], cpu[:3], rtol=5e-2)
