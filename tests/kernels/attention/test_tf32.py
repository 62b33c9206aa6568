"""fp32 attention multiplies as torch's products of matrices do, whichever API the user sets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="only the kernels multiply in TF32")

LEGACY_ON = "torch.set_float32_matmul_precision('high')"
LEGACY_OFF = "torch.set_float32_matmul_precision('highest')"
FLAG_ON = "torch.backends.cuda.matmul.allow_tf32 = True"
FLAG_OFF = "torch.backends.cuda.matmul.allow_tf32 = False"
ALL_ON = "torch.backends.fp32_precision = 'tf32'"
ALL_OFF = "torch.backends.fp32_precision = 'ieee'"
MATMUL_ON = "torch.backends.cuda.matmul.fp32_precision = 'tf32'"
MATMUL_OFF = "torch.backends.cuda.matmul.fp32_precision = 'ieee'"
CONV_ON = "torch.backends.cudnn.conv.fp32_precision = 'tf32'"

TAKES_TF32 = {
    "": False,
    LEGACY_ON: True,
    "torch.set_float32_matmul_precision('medium')": True,
    LEGACY_OFF: False,
    FLAG_ON: True,
    ALL_ON: True,
    MATMUL_ON: True,
    MATMUL_OFF: False,
    CONV_ON: False,
    # Both APIs, in both orders: the last word on products of matrices counts.
    f"{LEGACY_ON}; {MATMUL_OFF}": False,
    f"{MATMUL_ON}; {LEGACY_OFF}": False,
    f"{LEGACY_OFF}; {MATMUL_ON}": True,
    f"{MATMUL_OFF}; {LEGACY_ON}": True,
    f"{FLAG_ON}; {MATMUL_OFF}": False,
    f"{MATMUL_OFF}; {FLAG_ON}": True,
    f"{FLAG_OFF}; {MATMUL_ON}": True,
    f"{ALL_ON}; {FLAG_OFF}": False,
    f"{ALL_ON}; {LEGACY_ON}": True,
    f"{ALL_OFF}; {LEGACY_ON}": True,
    # What is said of products alone goes before what is said of everything.
    f"{LEGACY_ON}; {ALL_OFF}": True,
    f"{ALL_ON}; {MATMUL_OFF}": False,
}


COMPILED = (ALL_ON, f"{LEGACY_ON}; {MATMUL_OFF}")
RUNS = [(switches, False) for switches in TAKES_TF32] + [(switches, True) for switches in COMPILED]


@pytest.fixture(scope="module")
def precisions():
    # Without a GPU, which a forked process could not use: launches are recorded, not run.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    script = Path(__file__).with_name("tf32_switches.py")
    command = [sys.executable, str(script), json.dumps(RUNS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(RUNS, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize(
    ("switches", "is_compiled"),
    RUNS,
    ids=[
        f"{'compiled: ' * is_compiled}{switches or 'untouched'}" for switches, is_compiled in RUNS
    ],
)
def test_fp32_products_follow_the_switches_of_both_apis(precisions, switches, is_compiled):
    wanted = "tf32" if TAKES_TF32[switches] else "ieee"
    # The forward, dq and dk with dv.
    assert precisions[switches, is_compiled] == [wanted] * 3
