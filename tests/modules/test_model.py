import json
from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from data.schemas import NO_TARGET, InputError, TokenizedSeqBatch
from modules.item_tower import ItemInputConfig
from modules.model import EncoderDecoderRetrievalModel, RetrievalModelConfig
from modules.transformer.rows import Rows

LEVEL_SIZES = (5, 4, 3)
CONFIG = RetrievalModelConfig(
    languages={"text": LEVEL_SIZES},
    d_model=16,
    num_heads=2,
    head_dim=8,
    d_ff=32,
    num_encoder_layers=2,
    num_decoder_layers=2,
    num_user_buckets=3,
    relative_buckets=8,
    relative_max_distance=16,
)


def small_model(config: RetrievalModelConfig = CONFIG, seed: int = 0) -> EncoderDecoderRetrievalModel:
    """In evaluation mode, with relative biases as after training."""
    torch.manual_seed(seed)
    model = EncoderDecoderRetrievalModel(config)
    for stack in (model.encoder, model.decoder):
        torch.nn.init.normal_(stack.bias.table)
    return model.eval()


def random_batch(lengths: list[int], seed: int = 0) -> TokenizedSeqBatch:
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    targets = torch.stack([torch.randint(size, (len(lengths),), generator=generator) for size in LEVEL_SIZES], dim=1)
    tokens = torch.randint(1, 16, (sum(lengths),), generator=generator)
    return TokenizedSeqBatch(tokens, offsets, max(lengths), targets)


def stepwise_log_likelihood(model: EncoderDecoderRetrievalModel, batch: TokenizedSeqBatch, width: int) -> Tensor:
    """The target's path among `width` beams; the others take arbitrary codes and the target changes its slot."""
    assert batch.target_codes is not None
    state, rows = model.start(batch), torch.arange(len(batch))
    total, slot = model.step(state, None, None).log_softmax(-1)[rows, 0, batch.target_codes[:, 0]], torch.zeros(1)
    for level in range(1, model.num_levels):
        new_slot = (level * 2 + 1) % width
        codes = torch.zeros(len(batch), width, dtype=torch.int64)
        codes[:, new_slot] = batch.target_codes[:, level - 1]
        parents = torch.arange(width).flip(0).expand(len(batch), -1).clone() % (1 if level == 1 else width)
        parents[:, new_slot] = int(slot)
        logits = model.step(state, codes, parents)
        assert logits.shape == (len(batch), width, LEVEL_SIZES[level])
        total = total + logits.log_softmax(-1)[rows, new_slot, batch.target_codes[:, level]]
        slot = torch.tensor(new_slot)
    return total


@pytest.mark.parametrize("width", [1, 4, 7])
def test_teacher_forced_log_likelihood_equals_the_sum_over_steps(width: int) -> None:
    model, batch = small_model(), random_batch([6, 0, 1, 13, 6])
    torch.testing.assert_close(stepwise_log_likelihood(model, batch, width), model.log_likelihood(batch))


def test_probabilities_of_all_tuples_sum_to_one() -> None:
    model = small_model()
    tuples = torch.cartesian_prod(*(torch.arange(size) for size in LEVEL_SIZES))
    one = random_batch([4])
    batch = TokenizedSeqBatch(
        one.tokens.repeat(len(tuples)), torch.arange(len(tuples) + 1, dtype=torch.int32) * 4, 4, tuples
    )
    torch.testing.assert_close(model.log_likelihood(batch).exp().sum(), torch.tensor(1.0))


def test_loss_is_the_mean_negative_log_likelihood() -> None:
    model, batch = small_model(), random_batch([3, 9, 1])
    losses = model(batch)
    assert sorted(losses) == ["loss", "loss_level_0", "loss_level_1", "loss_level_2"]
    torch.testing.assert_close(losses["loss"], -model.log_likelihood(batch).mean())
    torch.testing.assert_close(losses["loss"], sum(losses[f"loss_level_{level}"] for level in range(3)))
    assert losses["loss"].requires_grad
    assert not losses["loss_level_0"].requires_grad


def test_the_mean_over_targets_is_the_mean_over_rows_bit_by_bit() -> None:
    model, batch = small_model(), random_batch([3, 9, 1, 0, 6, 2, 11])
    losses = model(batch)
    losses["loss"].backward()
    got = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    rows = Rows(batch.offsets, batch.max_len)
    level_losses = model._level_losses(batch, model._encode(batch, rows, None), rows, 0.0).mean(dim=0)
    level_losses.sum().backward()
    assert torch.equal(losses["loss"], level_losses.sum())
    for grad, parameter in zip(got, model.parameters(), strict=True):
        assert torch.equal(grad, parameter.grad)


def without_target(batch: TokenizedSeqBatch, row: int) -> TokenizedSeqBatch:
    assert batch.target_codes is not None
    codes = batch.target_codes.clone()
    codes[row] = NO_TARGET
    return replace(batch, target_codes=codes)


def test_rows_without_target_count_nowhere() -> None:
    model, batch = small_model(replace(CONFIG, label_smoothing=0.1)), random_batch([3, 9, 4])
    filled = without_target(batch, 2)
    assert batch.target_codes is not None
    short = TokenizedSeqBatch(batch.tokens[:12], batch.offsets[:3], 9, batch.target_codes[:2])
    gradients = []
    for one in (filled, short):
        loss = model(one)["loss"]
        gradients.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)
    assert model.log_likelihood(filled)[2] == 0
    torch.testing.assert_close(model.log_likelihood(filled)[:2], model.log_likelihood(short))


def test_a_batch_without_any_target_has_no_loss() -> None:
    model, batch = small_model(), without_target(random_batch([3]), 0)
    loss = model(batch)["loss"]
    loss.backward()
    assert loss == 0
    assert all(not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_one_product_for_all_levels_gives_the_same_losses(label_smoothing: float) -> None:
    model, batch = small_model(), without_target(random_batch([3, 9, 1]), 1)
    hidden = torch.randn(3, 3, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    inputs = [hidden, *model.heads.parameters()]
    results = []
    for losses in (model.heads._in_one_product, model.heads._level_by_level):
        loss = losses(hidden, batch.target_codes, "text", label_smoothing)
        results.append((loss, *torch.autograd.grad(loss.square().sum(), inputs)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_rows_are_independent() -> None:
    model, batch = small_model(), random_batch([6, 0, 1, 13])
    together = model.log_likelihood(batch)
    bounds = batch.offsets.tolist()
    assert batch.target_codes is not None
    for row in range(4):
        tokens = batch.tokens[bounds[row] : bounds[row + 1]]
        offsets = torch.tensor([0, len(tokens)], dtype=torch.int32)
        alone = TokenizedSeqBatch(tokens, offsets, len(tokens), batch.target_codes[row : row + 1])
        torch.testing.assert_close(model.log_likelihood(alone)[0], together[row])


def test_steps_on_no_rows() -> None:
    model = small_model()
    nothing = TokenizedSeqBatch(torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int32), 0)
    state, beams = model.start(nothing), torch.zeros(0, 4, dtype=torch.int64)
    assert model.step(state, None, None).shape == (0, 1, 5)
    assert model.step(state, beams, beams).shape == (0, 4, 4)
    assert model.step(state, beams, beams).shape == (0, 4, 3)


@pytest.mark.parametrize("lengths", [[0], [0, 0], [0, 1]], ids=str)
def test_empty_histories_train_and_generate(lengths: list[int]) -> None:
    model, batch = small_model(), random_batch(lengths)
    loss = model(batch)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert torch.isfinite(model.step(model.start(batch), None, None)).all()


def test_every_parameter_learns() -> None:
    model = small_model()
    model(random_batch([6, 2, 9]))["loss"].backward()
    untouched = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert untouched == []


@pytest.mark.slow
def test_equals_padded_hugging_face_t5_with_the_same_weights() -> None:
    pytest.importorskip("transformers")
    from benchmarks.hf_t5 import build_t5, t5_inputs, t5_level_losses

    model, batch = small_model(), random_batch([6, 2, 1, 13, 40])
    t5 = build_t5(model, "eager").eval()
    expected = t5_level_losses(t5(**t5_inputs(batch, model)).logits, batch, model).sum(dim=1)
    got = -model.log_likelihood(batch)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(got.mean(), [model.embedding.weight])
    (expected_gradient,) = torch.autograd.grad(expected.mean(), [t5.shared.weight])
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-5)


def test_training_fits_a_small_batch() -> None:
    torch.manual_seed(0)
    model = EncoderDecoderRetrievalModel(replace(CONFIG, dropout=0.1))
    batch = random_batch([5] * 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = model(batch)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(5.0, abs=1.5)  # ln 5 + ln 4 + ln 3 = 4.1 for even guesses
    assert sum(losses[-10:]) / 10 < 1.0


def test_initial_loss_is_near_even_guessing() -> None:
    torch.manual_seed(0)
    model = EncoderDecoderRetrievalModel(RetrievalModelConfig(languages={"text": (256, 256)}, num_user_buckets=0))
    batch = TokenizedSeqBatch(
        torch.randint(1, 513, (320,)), torch.arange(0, 321, 5, dtype=torch.int32), 5, torch.randint(256, (64, 2))
    )
    assert model.eval()(batch)["loss"].item() == pytest.approx(11.1, abs=1.5)  # 2 ln 256


def test_autocast_trains() -> None:
    model, batch = small_model(), random_batch([6, 0, 4])
    exact = model(batch)["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(batch)["loss"]
    assert loss.dtype == torch.float32
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.05)
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_heads_exist_for_every_language() -> None:
    model = small_model(replace(CONFIG, languages={"text": (5, 4, 3), "image": (7,)}))
    assert [head.out_features for head in model.heads["image"]] == [7]
    assert model.language == "text"
    assert model.embedding.weight.shape == (1 + 12 + 7 + 3, 16)


@pytest.mark.parametrize(
    "config", [CONFIG, replace(CONFIG, items=ItemInputConfig(num_features=4), embedding_loss_weight=2.0)]
)
def test_config_survives_json(config: RetrievalModelConfig) -> None:
    for values in (config.to_dict(), asdict(config)):
        assert RetrievalModelConfig.from_dict(json.loads(json.dumps(values))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 0}, "d_model of at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\), got 1.0"),
        ({"label_smoothing": -0.1}, r"label_smoothing in \[0, 1\), got -0.1"),
        ({"relative_buckets": 6}, "multiple of 4, got 6"),
        ({"relative_max_distance": 4}, r"above relative_buckets / 2 \(4\), got 4"),
        ({"num_user_buckets": -1}, "num_user_buckets of at least 0"),
        ({"sid_loss_weight": 0.0}, "at least 0 and not both 0, got 0.0 and 0.0. TIGER is 1 and 0, LIGER 1 and 1"),
        ({"sid_loss_weight": -1.0}, "at least 0 and not both 0, got -1.0 and 0.0"),
        ({"embedding_loss_weight": 1.0}, "embedding_loss_weight above 0 needs item features"),
    ],
)
def test_wrong_config_values_are_named(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(CONFIG, **change)


def test_a_model_needs_languages_and_a_config_does_not() -> None:
    with pytest.raises(InputError, match="at least one language"):
        EncoderDecoderRetrievalModel(RetrievalModelConfig())
    with pytest.raises(InputError, match="level sizes of at least 1"):
        EncoderDecoderRetrievalModel(replace(CONFIG, languages={"text": (0,)}))


def test_unknown_config_names_list_the_valid_ones() -> None:
    with pytest.raises(InputError, match="does not know d_modle; valid names: languages, d_model"):
        RetrievalModelConfig.from_dict({"languages": {"text": [4]}, "d_modle": 3})
    with pytest.raises(InputError, match="expected 'languages', got none"):
        RetrievalModelConfig.from_dict({})


def test_wrong_batches_and_steps_are_named() -> None:
    model, batch = small_model(), random_batch([3, 2])
    with pytest.raises(ValueError, match=r"expected target_codes \[2, 3\], got None"):
        model(replace(batch, target_codes=None))
    state = model.start(batch)
    with pytest.raises(ValueError, match="every level but the first, this is level 0"):
        model.step(state, torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64))
    model.step(state, None, None)
    with pytest.raises(ValueError, match=r"codes and parents \[2, W\], got \[3, 1\] and \[3, 1\]"):
        model.step(state, torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int64))
    for _ in range(2):
        model.step(state, torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="at most 3 calls"):
        model.step(state, torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64))


def test_nothing_is_repeated_per_beam() -> None:
    model, batch = small_model(), random_batch([6, 2])
    state = model.start(batch)
    cross_kv = state.cross_kv
    assert cross_kv.shape == (2, 8, 2, 2, 8)
    model.step(state, None, None)
    model.step(state, torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64))
    assert state.cross_kv is cross_kv
    assert state.beams.ancestors.shape == (2, 4, 2)
