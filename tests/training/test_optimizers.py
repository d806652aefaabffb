"""Optimizers, their groups of parameters and their states."""

import copy

import pytest
import torch
from torch import nn

from data.schemas import InputError
from tests.training.tiny import loop_config
from training.optimizers import (
    _require_fused_adagrad,
    build_optimizer,
    load_optimizer_state_,
    optimizer_state,
    set_rate_,
    step_unless_,
)
from training.parameter_groups import ParameterGroup


def group(*patterns: str, factor: float = 1.0, decay: float | None = None) -> ParameterGroup:
    return ParameterGroup(parameters=patterns, learning_rate_factor=factor, weight_decay=decay)


def model_of_two() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"encoder": nn.Linear(2, 3), "decoder": nn.Linear(3, 1)})


def built(*groups: ParameterGroup, model: nn.Module | None = None, recorded: bool = False, **settings):
    config = loop_config(parameter_groups=groups, **settings)
    return build_optimizer(model or model_of_two(), config, recorded=recorded)


def backward(model: nn.Module) -> None:
    model["decoder"](model["encoder"](torch.ones(4, 2))).square().mean().backward()


def test_rates_and_states_are_plain_numbers_where_they_leave_the_optimizer():
    model = torch.nn.Linear(2, 1)
    optimizer = build_optimizer(model, loop_config(learning_rate=0.5), recorded=True)
    rate = optimizer.param_groups[0]["lr"]
    set_rate_(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is rate
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = optimizer_state(optimizer)
    assert state["param_groups"][0]["lr"] == 0.25
    assert optimizer.param_groups[0]["lr"] is rate

    plain = build_optimizer(model, loop_config(learning_rate=0.1, weight_decay=0.3), recorded=False)
    load_optimizer_state_(plain, state)
    group = plain.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["capturable"]) == (0.1, 0.3, False)
    load_optimizer_state_(optimizer, optimizer_state(plain))
    assert optimizer.param_groups[0]["lr"] is rate
    assert optimizer.param_groups[0]["capturable"]


def test_a_parameter_belongs_to_the_first_group_that_names_it_and_the_rest_to_the_last():
    groups = group("encoder.weight", factor=0.5), group("*.weight", decay=0.0)
    optimizer = built(*groups, weight_decay=0.3)
    names = [group["param_names"] for group in optimizer.param_groups]
    assert names == [["encoder.weight"], ["decoder.weight"], ["encoder.bias", "decoder.bias"]]
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.01, 0.01]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0, 0.3]


@pytest.mark.parametrize("recorded", [False, True])
def test_the_rate_of_a_group_is_its_share_of_the_loops(recorded):
    optimizer = built(group("encoder.*", factor=0.25), recorded=recorded)
    rates = [group["lr"] for group in optimizer.param_groups]
    set_rate_(optimizer, 0.5)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.125, 0.5]
    if recorded:
        assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True))
        set_rate_(optimizer, 1.0)
        assert [float(rate) for rate in rates] == [0.25, 1.0]


@pytest.mark.parametrize("optimizer_name", ["adamw", "adagrad"])
def test_groups_train_as_optimizers_of_their_own_would(optimizer_name):
    grouped, alone = model_of_two(), model_of_two()
    optimizers = [
        built(group("encoder.*", factor=0.5, decay=0.2), model=grouped, optimizer=optimizer_name),
        *(
            build_optimizer(alone[name], loop_config(optimizer=optimizer_name, **settings), recorded=False)
            for name, settings in {
                "encoder": {"learning_rate": 0.005, "weight_decay": 0.2},
                "decoder": {"learning_rate": 0.01},
            }.items()
        ),
    ]
    start = copy.deepcopy(grouped.state_dict())
    for _ in range(3):
        for model in (grouped, alone):
            model.zero_grad()
            backward(model)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(grouped.state_dict(), alone.state_dict(), rtol=0, atol=0)
    assert all(not torch.equal(value, start[name]) for name, value in grouped.state_dict().items())


def test_a_frozen_group_gets_no_gradient_and_no_moments():
    model = model_of_two()
    optimizer = built(group("encoder.*", factor=0.0), model=model, weight_decay=0.5)
    before = copy.deepcopy(model["encoder"].state_dict())
    backward(model)
    optimizer.step()
    assert all(value.grad is None for value in model["encoder"].parameters())
    torch.testing.assert_close(model["encoder"].state_dict(), before, rtol=0, atol=0)
    assert [group["param_names"] for group in optimizer.param_groups] == [["decoder.weight", "decoder.bias"]]
    with pytest.raises(InputError, match="the model has no trainable parameters"):
        built(group("*", factor=0.0))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            [group("encoder.*", "decodr.weight")],
            r"parameter_groups\[0\]: 'decodr.weight' names none of the model's 4 trainable parameters. "
            r"Did you mean decoder.weight\?",
        ),
        ([group("*.weight"), group("decoder.weight")], r"parameter_groups\[1\]: groups before it name all that"),
    ],
)
def test_a_group_that_names_nothing_is_refused(groups, message):
    with pytest.raises(InputError, match=message):
        built(*groups)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parameters": ()}, r'parameters expected patterns such as \("\*.bias",\), got \(\)'),
        ({"parameters": "*.bias"}, r"parameters expected patterns such as .*, got '\*.bias'"),
        ({"learning_rate_factor": -1.0}, "learning_rate_factor expected at least 0, got -1.0"),
        ({"learning_rate_factor": float("inf")}, "learning_rate_factor expected a finite number, got inf"),
        ({"weight_decay": float("nan")}, "weight_decay expected at least 0, got nan"),
    ],
)
def test_impossible_groups_are_refused(settings, message):
    with pytest.raises(InputError, match=f"ParameterGroup.{message}"):
        ParameterGroup(**{"parameters": ("*",), **settings})


@pytest.mark.parametrize("optimizer", ["adamw", "adagrad"])
def test_moments_of_groups_are_saved_and_loaded(optimizer):
    model, groups = model_of_two(), (group("encoder.*", factor=0.5),)
    first = built(*groups, model=model, optimizer=optimizer)
    backward(model)
    first.step()
    state = copy.deepcopy(optimizer_state(first))
    second = built(group("encoder.*", factor=2.0, decay=0.7), model=model, optimizer=optimizer)
    load_optimizer_state_(second, state)
    torch.testing.assert_close(optimizer_state(second)["state"], state["state"], rtol=0, atol=0)
    assert [group["lr"] for group in second.param_groups] == [0.02, 0.01]
    set_rate_(second, 0.1)
    assert [group["lr"] for group in second.param_groups] == [0.2, 0.1]
    assert [group["weight_decay"] for group in second.param_groups] == [0.7, 0.0]


@pytest.mark.parametrize("groups", [(), (group("encoder.weight"),), (group("decoder.*"),)])
def test_a_state_of_other_groups_is_refused(groups):
    state = optimizer_state(built(group("encoder.*")))
    optimizer = built(*groups)
    with pytest.raises(
        ValueError, match=r"trained in other groups \(LoopConfig.parameter_groups\).*the first (en|de)coder"
    ):
        load_optimizer_state_(optimizer, state)


def test_a_state_without_names_is_that_of_one_group():
    state = optimizer_state(built())
    del state["param_groups"][0]["param_names"], state["param_groups"][0]["learning_rate_factor"]
    optimizer = built()
    load_optimizer_state_(optimizer, state)
    set_rate_(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] == 0.5
    with pytest.raises(ValueError, match="trained in other groups"):
        load_optimizer_state_(built(group("*.bias")), state)


@pytest.mark.parametrize("optimizer_name", ["adamw", "adagrad"])
def test_a_step_is_taken_unless_it_must_not(optimizer_name):
    models = [model_of_two() for _ in range(3)]
    plain, taken, skipped = (built(model=model, optimizer=optimizer_name, weight_decay=0.1) for model in models)
    for model in models:
        backward(model)
    before = copy.deepcopy(models[2].state_dict())
    plain.step()
    step_unless_(taken, torch.tensor(0.0))
    step_unless_(skipped, torch.tensor(1.0))
    torch.testing.assert_close(models[1].state_dict(), models[0].state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(models[2].state_dict(), before, rtol=0, atol=0)
    assert not hasattr(skipped, "found_inf")
    assert {float(moments["step"]) for moments in skipped.state.values()} == {0}


def test_adagrad_that_this_torch_cannot_skip_on_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    _require_fused_adagrad(torch.device("cpu"))
    with pytest.raises(InputError, match=r"needs torch 2\.12 on CUDA devices, got 2\.11\.0\+cu130"):
        _require_fused_adagrad(torch.device("cuda"))
