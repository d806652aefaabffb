import copy

import pytest
import torch
from torch import nn

from training.averages import AveragedWeights

ONE = torch.ones(())


def model_at(value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    move(model, value)
    model[1].bias.requires_grad_(False)
    return model


@torch.no_grad()
def move(model: nn.Module, value: float) -> None:
    for parameter in model.parameters():
        parameter.fill_(value)


def averages_of(averages: AveragedWeights) -> set[float]:
    return {value for tensor in averages.state_dict()["averages"].values() for value in tensor.unique().tolist()}


def test_averages_by_hand():
    """From 0: 0.1 of it stays and 0.9 of 10 comes, then 2/11, then the decay."""
    model = model_at(0.0)
    averages = AveragedWeights(model, 0.2)
    expected = 0.0
    for kept, value in ((1 / 10, 10.0), (2 / 11, 20.0), (0.2, 30.0), (0.2, 40.0)):
        move(model, value)
        averages.update_(ONE)
        expected = kept * expected + (1 - kept) * value
        assert list(averages_of(averages)) == pytest.approx([expected], rel=1e-6)


def test_a_step_that_does_not_count_changes_no_average():
    model = model_at(1.0)
    averages = AveragedWeights(model, 0.9)
    move(model, 2.0)
    averages.update_(ONE)
    before = copy.deepcopy(averages.state_dict())
    move(model, 3.0)
    averages.update_(1 - ONE)
    torch.testing.assert_close(averages.state_dict(), before, rtol=0, atol=0)


def test_averages_are_applied_in_place_and_the_weights_come_back():
    model = model_at(1.0)
    averages = AveragedWeights(model, 0.9)
    move(model, 3.0)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]

    def evaluate() -> None:
        assert model[0].weight.unique().tolist() == [1.0]
        assert model[1].bias.unique().tolist() == [3.0]  # does not learn
        assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), averages.applied():
        evaluate()
    assert {value for parameter in model.parameters() for value in parameter.unique().tolist()} == {3.0}
    assert averages_of(averages) == {1.0}
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    assert all(parameter.grad is None for parameter in model.parameters())


def test_averages_follow_weights_that_move_to_other_memory():
    """As they do when a model is prepared for several processes on a CPU."""
    model = model_at(1.0)
    averages = AveragedWeights(model, 0.2)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    move(model, 11.0)
    averages.update_(ONE)
    assert averages_of(averages) == {10.0}
    with averages.applied():
        assert model[0].weight.unique().tolist() == [10.0]
    averages.restart_()
    assert averages_of(averages) == {11.0}


def test_averages_continue_where_they_were_saved():
    model, other = model_at(1.0), model_at(7.0)
    averages, resumed = AveragedWeights(model, 0.9), AveragedWeights(other, 0.9)
    for value in (2.0, 5.0):
        move(model, value)
        averages.update_(ONE)
    resumed.load_state_dict(copy.deepcopy(averages.state_dict()))
    for model_, own in ((model, averages), (other, resumed)):
        move(model_, 4.0)
        own.update_(ONE)
    torch.testing.assert_close(resumed.state_dict(), averages.state_dict(), rtol=0, atol=0)


def test_averages_begin_anew_as_the_weights():
    model = model_at(1.0)
    averages = AveragedWeights(model, 0.9)
    averages.update_(ONE)
    move(model, 6.0)
    averages.restart_()
    assert averages_of(averages) == {6.0}
    assert float(averages.state_dict()["num_updates"]) == 0


@pytest.mark.parametrize("other", [nn.Linear(2, 2), nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))])
def test_averages_of_another_model_are_refused(other):
    state = AveragedWeights(other, 0.9).state_dict()
    with pytest.raises(ValueError, match="averages are of other parameters than this run trains"):
        AveragedWeights(model_at(1.0), 0.9).load_state_dict(state)
