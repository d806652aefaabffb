from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ops
from data.schemas import NO_TARGET, InputError, SeqBatch
from modules.sequential.hstu import HSTU, HSTUConfig

NUM_ITEMS = 30
MAX_HISTORY = 6
HISTORIES = [[3, 1, 4, 1, 5], [], [9], [2, 6, 5, 3, 5, 8]]
TARGETS = [7, 0, NO_TARGET, 12]


def small_model() -> HSTU:
    """In double precision and evaluation mode, with relative biases as after training."""
    torch.manual_seed(0)
    config = HSTUConfig(
        num_items=NUM_ITEMS, d_model=12, num_heads=2, head_dim=4, value_dim=5, dropout=0.3, max_history=MAX_HISTORY
    )
    model = config.build()
    for layer in model.layers:
        torch.nn.init.normal_(layer.distance_bias)
    return model.double().eval()


def batch_of(histories: list[list[int]] = HISTORIES, targets: list[int] | None = TARGETS) -> SeqBatch:
    batch = SeqBatch.from_lists(histories)
    return replace(batch, max_len=MAX_HISTORY, targets=None if targets is None else torch.tensor(targets))


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def plain_states(model: HSTU, history: list[int]) -> Tensor:
    """[n, D] of one row, by the paper's equations over a padded row of MAX_HISTORY places."""
    length = len(history)
    padded = torch.tensor(history + [0] * (MAX_HISTORY - length))
    stream = model.items[padded] * model.config.d_model**0.5
    x = rms(stream, model.input_norm.weight)
    place = torch.arange(MAX_HISTORY)
    distance = place[:, None] - place
    sees = (distance >= 0) & (place < length)[:, None] & (place < length)
    for layer, norm in zip(model.layers, model.norms, strict=True):
        u, v, q, k = F.silu(x @ layer.project.weight.t()).split([10, 10, 8, 8], dim=-1)
        heads = []
        for head in range(2):
            own_q, own_k = (part[:, 4 * head : 4 * head + 4] for part in (q, k))
            scores = own_q @ own_k.t() / 2 + layer.distance_bias[distance.clamp(min=0), head]
            heads.append((F.silu(scores) * sees) @ v[:, 5 * head : 5 * head + 5] / MAX_HISTORY)
        stream = stream + (rms(torch.cat(heads, -1), layer.norm.weight) * u) @ layer.out.weight.t()
        x = rms(stream, norm.weight)
    return x[:length]


def test_the_loss_is_that_of_the_padded_equations():
    model = small_model()
    losses = []
    for history, target in zip(HISTORIES, TARGETS, strict=True):
        following = torch.tensor([*history[1:], target][: len(history)], dtype=torch.int64)
        logits = plain_states(model, history) @ model.items.t()
        losses.append(
            F.cross_entropy(logits[following != NO_TARGET], following[following != NO_TARGET], reduction="none")
        )
    expected = torch.cat(losses).mean()
    assert len(torch.cat(losses)) == 11
    got = model(batch_of())["loss"]
    torch.testing.assert_close(got, expected)
    ours, theirs = (torch.autograd.grad(loss, list(model.parameters())) for loss in (got, expected))
    torch.testing.assert_close(ours, theirs)
    assert all(gradient.any() for gradient in ours)


def test_queries_are_the_states_of_rows_alone():
    model = small_model()
    queries = model.queries(batch_of(targets=None))
    assert queries.shape == (4, 12)
    assert not queries[1].any()
    for row in (0, 2, 3):
        torch.testing.assert_close(queries[row], plain_states(model, HISTORIES[row])[-1])
        alone = model.queries(batch_of([HISTORIES[row]], None))
        torch.testing.assert_close(alone[0], queries[row])
    assert model.item_vectors().shape == (NUM_ITEMS, 12)


def test_later_items_change_nothing_before_them():
    model = small_model()
    states = model.encode(batch_of())
    changed = model.encode(batch_of([[3, 1, 4, 20, 21], [], [22], [2, 6, 5, 3, 5, 23]]))
    same = torch.tensor([0, 1, 2, 6, 7, 8, 9, 10])
    torch.testing.assert_close(changed[same], states[same], rtol=0, atol=0)
    assert (changed[[3, 4, 5, 11]] != states[[3, 4, 5, 11]]).any(-1).all()


def test_the_order_of_items_counts():
    model = small_model()
    queries = model.queries(batch_of([[1, 2, 3, 4], [2, 1, 3, 4]], None))
    assert (queries[0] - queries[1]).abs().max() > 1e-3


def test_a_batch_of_fixed_capacity_trains_as_the_batch_itself():
    model, batch = small_model(), batch_of()
    filled = batch.to_capacity(num_rows=7, num_items=20)
    losses = [model(one)["loss"] for one in (batch, filled)]
    torch.testing.assert_close(losses[1], losses[0])
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(model.queries(filled)[:4], model.queries(batch))


def test_every_norm_of_the_stream_drops_in_training_alone(monkeypatch):
    """As many ops with dropout as the model says, which draws that many seeds at once on a GPU."""
    model, batch = small_model(), batch_of()
    add_rms_norm, dropouts = ops.add_rms_norm, []

    def noted(*arguments, **options):
        dropouts.append(options["dropout_p"])
        return add_rms_norm(*arguments, **options)

    monkeypatch.setattr(ops, "add_rms_norm", noted)
    model(batch)
    assert set(dropouts) == {0.0}
    dropouts.clear()
    model.train()(batch)
    assert [p for p in dropouts if p > 0.0] == [0.3] * model._num_dropouts == [0.3] * 3


def test_config_goes_to_json_and_back():
    config = HSTUConfig(num_items=5, num_heads=3, value_dim=7)
    assert HSTUConfig.from_dict(config.to_dict()) == config
    with pytest.raises(InputError, match="HSTUConfig expected value_dim of at least 1, got 0"):
        HSTUConfig(value_dim=0)
    with pytest.raises(InputError, match="HSTU expected num_items of at least 1, got 0"):
        HSTUConfig().build()
