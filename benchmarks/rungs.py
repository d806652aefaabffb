"""Several implementations of one op: verified against double precision, then timed in turn, forward and backward."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import interleaved, peak_memory, ratios, summarize

OURS = "ours"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Largest error that counts as agreement, relative to the largest value of the expected tensor or to one."""

Named = dict[str, Tensor]


class UnavailableError(Exception):
    """Says why an implementation cannot run here."""


@dataclass(frozen=True)
class Rung:
    """One implementation of an op.

    Attributes:
        forward: computes the output, or a tuple of outputs, from the inputs by name.
        inputs: tensors that get gradients.
        grads: gradient of each output, in its layout.
        canonical: brings outputs ("out", "out1") and gradients (the inputs' names) to the names and layout of the
            expected values.
        backward: whether there is one.
        exact: False where something else is computed, as a bound; it is not verified.
    """

    forward: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: Named
    grads: tuple[Tensor, ...]
    canonical: Callable[[Named], Named] = field(default=lambda values: values)
    backward: bool = True
    exact: bool = True


Builder = Callable[[], Rung]


def dtypes_of(device: str) -> list[str]:
    """Precisions that are measured on a device."""
    return ["fp32", "fp16", "bf16"] if device.startswith("cuda") else ["fp32"]


def allow_repeated_backward() -> None:
    """Compiled code may otherwise reuse what it saved as scratch space, and then runs backward only once."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False


def values_of(rung: Rung) -> Named:
    """Outputs and gradients under their canonical names, in double precision on the CPU."""
    if not rung.backward:
        with torch.no_grad():
            outputs = _tuple(rung.forward(**rung.inputs))
        return _on_cpu(rung.canonical(_named_outputs(outputs)))
    outputs = _tuple(rung.forward(**rung.inputs))
    grads = torch.autograd.grad(outputs, list(rung.inputs.values()), rung.grads)
    return _on_cpu(rung.canonical(_named_outputs(outputs) | dict(zip(rung.inputs, grads, strict=True))))


def disagreement(got: Named, expected: Named, tolerance: float) -> str | None:
    """Where the values differ too much; None where they agree. Every one of `got` must be expected."""
    for name, value in got.items():
        scale = max(1.0, float(expected[name].abs().max()))
        error = float((value - expected[name]).abs().max()) / scale
        if not error <= tolerance:  # also where it is NaN
            return f"{name} differs from double precision by {error:.1e}"
    return None


def contest(
    case: str,
    builders: Mapping[str, Builder],
    expected: Named,
    *,
    dtype: torch.dtype,
    device: str,
    repeats: int,
    expected_exactly: bool = True,
) -> list[dict[str, Any]]:
    """Result rows of all implementations that can run here; the others' rows say why they cannot.

    Args:
        case: what is computed.
        builders: make the implementations, "ours" among them; an UnavailableError says why there is none.
        expected: canonical outputs and gradients in double precision.
        dtype: of the computation; decides on the tolerance.
        device: where.
        repeats: samples of each time.
        expected_exactly: False if random numbers (dropout) keep the outputs from agreeing; nothing is verified then.

    Raises:
        AssertionError: if ours is wrong.
    """
    rungs, notes = {}, {}
    for name, build in builders.items():
        try:
            rung = build()
            values = values_of(rung)
            problem = None
            if rung.exact and expected_exactly:
                problem = disagreement(values, expected, TOLERANCES[dtype])
        except Exception as error:  # a baseline that fails is a result too; ours must not fail
            if name == OURS:
                raise
            problem = reason_of(error)
        if problem is None:
            rungs[name] = rung
        elif name == OURS:
            raise AssertionError(f"{case}: ours is wrong, {problem}; nothing is reported.")
        else:
            notes[name] = problem
    return _time(case, rungs, notes, device, repeats)


def _time(case: str, rungs: dict[str, Rung], notes: dict[str, str], device: str, repeats: int) -> list[dict[str, Any]]:
    rows = _rows(case, "forward", {name: _forward(rung) for name, rung in rungs.items()}, device, repeats)
    notes = notes | {name: "no backward" for name, rung in rungs.items() if not rung.backward}
    trained = {name: rung for name, rung in rungs.items() if rung.backward}
    rows += _rows(case, "backward", {name: _backward(rung) for name, rung in trained.items()}, device, repeats)
    rows += _rows(case, "both", {name: _both(rung) for name, rung in trained.items()}, device, repeats)
    for name, rung in trained.items():
        memory: dict[str, Any] = {}
        with peak_memory(memory, device):
            _both(rung)()
        next(row for row in rows if row["implementation"] == name and row["pass"] == "both").update(memory)
    return rows + [{"case": case, "implementation": name, "note": f"n/a: {note}"} for name, note in notes.items()]


def _rows(
    case: str, name: str, runs: dict[str, Callable[[], object]], device: str, repeats: int
) -> list[dict[str, Any]]:
    seconds = interleaved(runs, repeats=repeats, device=device, on_device=True)
    rows: list[dict[str, Any]] = [
        {"case": case, "pass": name, "implementation": contender, **summarize(values)}
        for contender, values in seconds.items()
    ]
    if device.startswith("cuda"):
        walls = interleaved(runs, repeats=repeats, device=device)
        for row in rows:
            row["wall_ms"] = summarize(walls[row["implementation"]])["median_ms"]
    slower = ratios(rows, of=OURS)
    for row in rows:
        if row["implementation"] in slower:
            row["ours_faster"] = slower[row["implementation"]]
    return rows


def _forward(rung: Rung) -> Callable[[], object]:
    def run() -> object:
        with torch.set_grad_enabled(rung.backward):
            return rung.forward(**rung.inputs)

    return run


def _backward(rung: Rung) -> Callable[[], object]:
    outputs = _tuple(rung.forward(**rung.inputs))
    inputs = list(rung.inputs.values())
    return lambda: torch.autograd.grad(outputs, inputs, rung.grads, retain_graph=True)


def _both(rung: Rung) -> Callable[[], object]:
    def run() -> object:
        outputs = _tuple(rung.forward(**rung.inputs))
        return torch.autograd.grad(outputs, list(rung.inputs.values()), rung.grads)

    return run


def _named_outputs(outputs: tuple[Tensor, ...]) -> Named:
    return {f"out{index or ''}": output for index, output in enumerate(outputs)}


def _on_cpu(values: Named) -> Named:
    return {name: value.detach().double().cpu() for name, value in values.items()}


def _tuple(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def reason_of(error: Exception) -> str:
    """The first line of an error, for a row without numbers."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]
