"""A fixed sample of `kernel_calls.py`, run as its command; `--calls 2000` and more are for by hand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interprets kernels, which tests do without a GPU")
SCRIPT = Path(__file__).with_name("kernel_calls.py")
KERNELS = SCRIPT.parent.parent.parent / "kernels"


@pytest.fixture(scope="module")
def sample():
    command = [sys.executable, str(SCRIPT), "--calls", "900", "--seed", "20"]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_a_wrong_argument_is_named_and_nothing_else_happens(sample):
    assert "valid calls are right" in sample.stdout, sample.stdout + sample.stderr
    faults = re.findall("^(?:RAW|WRONG|HUNG|CRASHED): .*", sample.stdout, re.MULTILINE)
    assert not faults, "\n".join(faults)
    assert sample.returncode == 0, sample.stdout + sample.stderr


def test_calls_are_refused_and_calls_are_right(sample):
    """Of every wrapper some, so that neither all is refused nor nothing is changed."""
    *rows, total = re.findall(r"^(\S.*?) +(\d+) +(\d+) +0 +0 +0 +0$", sample.stdout, re.MULTILINE)
    assert total[0] == "all"
    assert int(total[1]) + int(total[2]) == 900
    assert all(int(refused) for _, refused, _ in rows)
    assert int(total[2]) > 100


def test_every_twin_is_in_the_sample(sample):
    """Names of what kernels/ has twins of begin the rows of the table."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in KERNELS.glob("*.py"))
    twins = set(re.findall(r"^def (\w+)_ref\(", text, re.MULTILINE))
    inner = {"warp", "rope", "given_norm", "sum_parts", "own_sum"}  # steps of other twins
    between_gpus = {"exchange_add_rms_norm", "exchange_best"}  # whose memory a CPU cannot reach: `tests/ops/`
    rows = re.findall(r"^(\w+)(?:_ref)?(?:,.*?)? +\d+ +\d+ +0", sample.stdout, re.MULTILINE)
    missing = twins - inner - between_gpus - {row.removesuffix("_ref") for row in rows}
    assert not missing


OUT_OF_BOUNDS = """
import kernel_calls, bounds, torch
from eagle_fast_kernels.silu_mul import _silu_mul_kernel
bounds.watch()
try:
    _silu_mul_kernel[(1, 1)](torch.zeros(1, 8), torch.zeros(1, 4), 8, I=5, BLOCK=8, PDL=False)
except Exception as error:
    print(error)
"""


def test_a_load_out_of_bounds_is_seen():
    command = [sys.executable, "-c", OUT_OF_BOUNDS]
    done = subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, text=True, timeout=300)
    assert "a kernel reads 2 elements out of bounds" in done.stdout, done.stdout + done.stderr
