"""Which twin runs, when and how that is said, and what happens where Triton cannot run."""

import logging
import os
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path

import pytest
import torch

import ops
from data.schemas import InputError
from ops import backend, seeds

REPOSITORY = Path(__file__).resolve().parents[2]
CACHED = (backend._from_environment, backend._decide, backend._triton_problem, backend._warn)


@pytest.fixture(autouse=True)
def forgetful(monkeypatch):
    """Every test starts without an environment and without earlier answers."""

    def forget():
        for function in CACHED:
            function.cache_clear()

    monkeypatch.delenv("OPS_BACKEND", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    forget()
    yield
    forget()


def install(monkeypatch, version, *, package="triton"):
    """Pretend that this version of Triton is installed, or none."""

    def found(name):
        if name != package or version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", found)


@pytest.mark.parametrize(
    ("name", "on_cpu", "on_cuda"),
    [(None, False, True), ("auto", False, True), ("torch", False, False)],
)
def test_choice(monkeypatch, name, on_cpu, on_cuda):
    install(monkeypatch, "3.6.0")
    if name is not None:
        monkeypatch.setenv("OPS_BACKEND", name)
    assert backend.uses_triton("cpu") is on_cpu
    assert backend.uses_triton("cuda") is on_cuda
    assert backend.uses_triton("mps") is False


def test_triton_is_taken_when_asked_for(monkeypatch):
    install(monkeypatch, "3.8.0")
    monkeypatch.setenv("OPS_BACKEND", "triton")
    assert backend.uses_triton("cuda") is True
    with pytest.raises(InputError, match=r"tensors on cpu.*TRITON_INTERPRET=1.*OPS_BACKEND=auto"):
        backend.uses_triton("cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.uses_triton("cpu") is True


def test_public_op_with_triton_on_a_cpu(monkeypatch):
    monkeypatch.setenv("OPS_BACKEND", "triton")
    install(monkeypatch, "3.8.0")
    with pytest.raises(InputError, match="the triton backend was asked for with tensors on cpu"):
        ops.add_rms_norm(torch.ones(2, 4), None, torch.ones(4))


@pytest.mark.parametrize("name", ["", "Triton", "cuda"])
def test_unknown_name(monkeypatch, name):
    monkeypatch.setenv("OPS_BACKEND", name)
    with pytest.raises(InputError, match=rf"^OPS_BACKEND expected one of auto, torch, triton, got '{name}'\.$"):
        backend.uses_triton("cpu")
    with pytest.raises(InputError, match=r"^ops\.use_backend expected one of"), ops.use_backend(name):
        raise AssertionError("the block must not run")


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        (None, r"Triton is not installed: install triton>=3\.6 \(Linux only\)"),
        ("3.5.1", r"Triton 3\.5\.1 is older than 3\.6: upgrade torch"),
        ("2.10.0", r"Triton 2\.10\.0 is older than 3\.6"),
    ],
)
def test_without_a_usable_triton(monkeypatch, caplog, version, problem):
    """auto says once that it falls back; triton is an error that says what to do."""
    install(monkeypatch, version)
    for _ in range(3):
        assert backend.uses_triton("cuda") is False
    (record,) = [record for record in caplog.records if record.name == "ops"]
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("ops run in PyTorch on cuda, slower than they could: Triton")
    with pytest.raises(InputError, match=problem):
        run_with("triton", "cuda")
    assert backend.uses_triton("cpu") is False
    assert "since Triton" in ops.describe_backend("cuda")


def run_with(name, device_type):
    with ops.use_backend(name):
        return backend.uses_triton(device_type)


@pytest.mark.parametrize("package", ["triton", "pytorch-triton", "pytorch-triton-rocm"])
@pytest.mark.parametrize("version", ["3.6.0", "3.10.1+gitabc", "4.0.0"])
def test_versions_that_will_do(monkeypatch, version, package):
    install(monkeypatch, version, package=package)
    assert backend.uses_triton("cuda") is True
    assert ops.describe_backend("cuda") == f"ops run as Triton {version} kernels on cuda"


def test_the_choice_is_logged_once(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "ops")
    x = torch.ones(2, 4)
    for _ in range(3):
        ops.add_rms_norm(x, None, torch.ones(4))
    assert [record.getMessage() for record in caplog.records] == ["ops run in PyTorch on cpu"]


def test_use_backend_nests_and_restores(monkeypatch):
    install(monkeypatch, "3.8.0")
    assert backend.uses_triton("cuda")
    with ops.use_backend("torch"):
        assert not backend.uses_triton("cuda")
        with ops.use_backend("triton"):
            assert backend.uses_triton("cuda")
        assert not backend.uses_triton("cuda")
        with pytest.raises(InputError, match="on cpu"), ops.use_backend("triton"):
            backend.uses_triton("cpu")
        assert not backend.uses_triton("cuda")
    assert backend.uses_triton("cuda")


def test_use_backend_wins_over_the_environment(monkeypatch):
    install(monkeypatch, "3.8.0")
    monkeypatch.setenv("OPS_BACKEND", "torch")
    assert not backend.uses_triton("cuda")
    with ops.use_backend("auto"):
        assert backend.uses_triton("cuda")


def test_use_backend_counts_in_other_threads():
    """Such as those in which a backward pass computes parts of the forward again."""
    found = []
    with ops.use_backend("triton"):
        thread = threading.Thread(target=lambda: found.append(backend._override))
        thread.start()
        thread.join()
    assert found == ["triton"]


def test_messages_are_said_once(caplog):
    for _ in range(3):
        backend.say_once("slow")
    assert [record.getMessage() for record in caplog.records] == ["slow"]


def run_script(script, **environment):
    command = [sys.executable, "-c", script]
    result = subprocess.run(
        command, cwd=REPOSITORY, env=clean_environment() | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def clean_environment():
    return {name: value for name, value in os.environ.items() if name not in ("OPS_BACKEND", "TRITON_INTERPRET")}


USE = """
import sys
{before}
import torch
import ops
x = torch.randn(4, 8, requires_grad=True)
normed, _ = ops.add_rms_norm(x, None, torch.ones(8), dropout_p=0.1)
offsets = torch.tensor([0, 1, 4], dtype=torch.int32)
ops.jagged_self_attention(normed.view(4, 1, 1, 8).expand(-1, 3, -1, -1), offsets, max_len=3, scale=1.0).sum().backward()
print(x.grad.shape == x.shape, sys.modules.get("triton") is not None, "ops.triton.library" in sys.modules)
"""


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_triton_is_not_imported_before_it_is_used(name):
    assert run_script(USE.format(before=""), OPS_BACKEND=name) == ["True", "False", "False"]


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_ops_run_where_triton_is_not_installed(name):
    hidden = "sys.modules['triton'] = None"
    assert run_script(USE.format(before=hidden), OPS_BACKEND=name) == ["True", "False", "False"]


def test_autocast_dtype():
    single, double = torch.ones(2), torch.ones(2, dtype=torch.float64)
    assert backend.to_autocast_dtype(single, double) == (single, double)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dtypes = [tensor.dtype for tensor in backend.to_autocast_dtype(single, double)]
    assert dtypes == [torch.bfloat16, torch.float64]


def test_compiling_needs_no_tracing_of_the_choice(caplog):
    """One graph, and at most another one for another backend."""
    graphs = []

    def count(graph, examples):
        graphs.append(graph)
        return graph.forward

    def norm(x):
        backend.say_once("compiled")
        return ops.add_rms_norm(x, None, torch.ones(8), dropout_p=0.1)[0]

    torch.compiler.reset()
    compiled = torch.compile(norm, fullgraph=True, backend=count)
    for _ in range(2):
        compiled(torch.ones(3, 8))
    assert len(graphs) == 1
    with ops.use_backend("torch"):
        compiled(torch.ones(3, 8))
    assert len(graphs) <= 2
    assert [record.getMessage() for record in caplog.records if record.name == "ops"] == ["compiled"]


def test_seeds_drawn_ahead_are_used_once_each():
    device = torch.device("cpu")
    torch.manual_seed(0)
    with ops.dropout_seeds(2, device):
        first, second, third = (seeds.next_seed(device) for _ in range(3))
        assert seeds._pool.seeds == []
    assert len({int(seed) for seed in (first, second, third)}) == 3
    assert all(seed.shape == (1,) and seed.dtype == torch.int64 for seed in (first, second, third))
    torch.manual_seed(0)
    with ops.dropout_seeds(2, device):
        assert torch.equal(seeds.next_seed(device), first)


def test_seeds_nest_and_do_not_outlive_their_block():
    device = torch.device("cpu")
    with ops.dropout_seeds(2, device):
        outer = list(seeds._pool.seeds)
        with ops.dropout_seeds(1, device):
            inner = seeds.next_seed(device)
        assert all(not torch.equal(inner, seed) for seed in outer)
        assert seeds._pool.seeds == outer
    assert seeds._pool.seeds == []


def test_seeds_are_not_shared_between_threads():
    device, counts = torch.device("cpu"), []
    with ops.dropout_seeds(3, device):
        thread = threading.Thread(target=lambda: counts.append(len(seeds._pool.seeds)))
        thread.start()
        thread.join()
        assert (counts, len(seeds._pool.seeds)) == ([0], 3)


def test_seeds_of_another_device_are_left_alone():
    with ops.dropout_seeds(1, torch.device("cpu")):
        assert seeds.next_seed(torch.device("meta")).device.type == "meta"
        assert len(seeds._pool.seeds) == 1


def test_seeds_drawn_ahead_do_not_reach_compiled_code():
    """A compiled function draws its own at every call, and is compiled once however many seeds lie ready."""
    graphs = []

    def count(graph, examples):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    draw = torch.compile(lambda: seeds.next_seed(torch.device("cpu")), fullgraph=True, backend=count)
    with ops.dropout_seeds(3, torch.device("cpu")):
        found = [int(draw())]
        seeds.next_seed(torch.device("cpu"))
        found.append(int(draw()))
        assert len(seeds._pool.seeds) == 2
    assert len(set(found)) == 2
    assert len(graphs) == 1
