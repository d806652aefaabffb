"""Every kernel configuration that is shipped compiles for sm_80 and sm_90 and fits, checked without a GPU.

The compiler needs a process in which Triton was imported without its interpreter; `tests/kernels/ahead_of_time.py` runs
there and says how to print its table by hand.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED_MEMORY = {80: 166_912, 90: 232_448}
"""Bytes that a block can have on an A100 and on an H100."""

MAX_SPILLED = {
    "_jagged_attention_fwd_kernel": 64,
    "_jagged_attention_bwd_q_kernel": 16,
    "_jagged_attention_bwd_kv_kernel": 48,
    "_jagged_attention_bwd_bias_kernel": 136,
    "_jagged_silu_attention_fwd_kernel": 16,
    "_jagged_silu_attention_bwd_bias_kernel": 16,
    "_beam_cross_attention_fwd_kernel": 8,
    "_catalogue_cross_entropy_bwd_items_kernel": 8,
}
"""Bytes per thread that may be spilled to the stack, by kernel; none by others.

A 64 x 64 tile with its dropout mask needs a few registers more than there are. Smaller tiles would not spill, and read
keys and values twice as often; which is faster has not been measured.
"""

WITHOUT_PRODUCTS = {
    "_jagged_attention_bwd_bucket_kernel": "adds the gradients of positions up by bucket",
    "_jagged_silu_attention_bwd_distance_kernel": "adds the gradients of distances up over the rows",
    "_beam_self_attention_fwd_kernel": "every beam has keys of its own, so that there is no matrix to multiply by",
}
"""Kernels of the attention that tensor cores do not help, with the reason."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("ahead_of_time") / "report.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.ahead_of_time", "--json", str(path)]
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-6000:]
    return json.loads(path.read_text())


def described(found):
    constants = ", ".join(f"{name}={value}" for name, value in found["constants"].items())
    return (
        f"{found['name']} for sm_{found['capability']} with {'/'.join(found['dtypes'])}, {constants}, "
        f"{found['num_warps']} warps, {found['num_stages']} stages ({found['first_user']})"
    )


def test_shipped_configs_run(report):
    assert report["failures"] == []


def test_every_kernel_is_compiled(report):
    compiled = {(found["name"], found["capability"]) for found in report["compiled"]}
    assert report["kernels"]
    assert {(name, capability) for name in report["kernels"] for capability in SHARED_MEMORY} - compiled == set()


def test_the_compiler_accepts_every_launch(report):
    errors = [f"{described(found)}: {found['error']}" for found in report["compiled"] if found["error"]]
    assert not errors, "\n".join(errors)


def test_shared_memory_suffices(report):
    too_much = [
        f"{described(found)}: {found['shared']} bytes"
        for found in report["compiled"]
        if found["shared"] > SHARED_MEMORY[found["capability"]]
    ]
    assert not too_much, "\n".join(too_much)


def test_registers_suffice(report):
    """In what is shipped; the odd sizes of the kernels' own tests need not be fast."""
    spilling = [
        f"{described(found)}: {found['spilled']} bytes of stack per thread, {found['registers']} registers"
        for found in report["compiled"]
        if found["spilled"] > MAX_SPILLED.get(found["name"], 0) and not found["first_user"].startswith("check")
    ]
    assert not spilling, "\n".join(spilling)
    assert MAX_SPILLED.keys() <= set(report["kernels"])


def test_attention_multiplies_on_tensor_cores(report):
    attention = [
        found for found in report["compiled"] if "attention" in found["name"] and found["name"] not in WITHOUT_PRODUCTS
    ]
    half = [found for found in attention if {"bf16", "fp16"} & set(found["dtypes"])]
    slow = [described(found) for found in half if not found["tensor_cores"]]
    assert not slow, "\n".join(slow)
    for dtype in ("bf16", "fp16"):
        assert any(dtype in found["dtypes"] for found in half)


def test_fp32_products_are_exact(report):
    rounded = [
        described(found)
        for found in report["compiled"]
        if found["tf32"] and found["constants"].get("PRECISION") != "tf32x3"
    ]
    assert not rounded, "\n".join(rounded)
