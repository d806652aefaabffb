"""The retrieval model with item features: its input, its dense head, and what it shares with the model without."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data.schemas import NO_TARGET, InputError, SeqBatch, TokenizedSeqBatch
from modules.item_table import ItemTable
from modules.item_tower import ItemInputConfig
from modules.model import EncoderDecoderRetrievalModel, RetrievalModelConfig
from modules.tokenizer.sequence import SequenceTokenizer
from modules.transformer.rows import Rows

NUM_ITEMS, MAX_HISTORY = 12, 6
COLD, MISSING = [2, 9], [4, 9]
ITEMS = ItemInputConfig(num_features=7, hidden_dims=(10,), num_positions=MAX_HISTORY, temperature=0.2)
CONFIG = RetrievalModelConfig(
    languages={"text": (5, 4, 3)},
    d_model=16,
    num_heads=2,
    head_dim=8,
    d_ff=32,
    num_encoder_layers=2,
    num_decoder_layers=1,
    num_user_buckets=0,
    relative_buckets=8,
    relative_max_distance=16,
    items=ITEMS,
    embedding_loss_weight=1.0,
)
TIGER = replace(CONFIG, items=None, embedding_loss_weight=0.0)
DENSE = replace(CONFIG, sid_loss_weight=0.0)
TEXT = replace(CONFIG, embedding_loss_weight=0.0)
HISTORIES = [[3, 1, 4, 1, 5, 6], [], [8], [7, 0, 4]]
TARGETS = [0, 11, 4, 3]


def item_table(seed: int = 0) -> ItemTable:
    features = torch.randn(NUM_ITEMS, 7, generator=torch.Generator().manual_seed(seed))
    missing, cold = torch.zeros(2, NUM_ITEMS, dtype=torch.bool)
    missing[MISSING], cold[COLD] = True, True
    return ItemTable(features.masked_fill(missing[:, None], 0.0), missing, cold)


def model_of(config: RetrievalModelConfig = CONFIG) -> EncoderDecoderRetrievalModel:
    """In evaluation mode, with weights as after training where they begin at zero."""
    torch.manual_seed(0)
    model = EncoderDecoderRetrievalModel(config)
    if config.items is not None:
        model.fit_features_(item_table())
    for name, parameter in model.named_parameters():
        if name.endswith(("bias.table", "norm.bias", "positions", "levels", "linears.1.weight")):
            torch.nn.init.normal_(parameter)
    return model.eval()


def histories() -> SeqBatch:
    batch = SeqBatch.from_lists(HISTORIES)
    return replace(batch, user_hashes=torch.arange(4) + 7, targets=torch.tensor(TARGETS))


def tokenizer_of(model: EncoderDecoderRetrievalModel) -> SequenceTokenizer:
    generator = torch.Generator().manual_seed(1)
    codes = [torch.randint(size, (NUM_ITEMS,), generator=generator) for size in (5, 4, 3)]
    return SequenceTokenizer(torch.stack(codes, dim=1), model.vocabulary)


def tokens_of(model: EncoderDecoderRetrievalModel, batch: SeqBatch | None = None) -> TokenizedSeqBatch:
    return tokenizer_of(model)(histories() if batch is None else batch)


def filled(batch: SeqBatch) -> SeqBatch:
    return batch.to_capacity(num_rows=7, num_items=len(batch.item_ids) + 9)


def input_by_hand(model: EncoderDecoderRetrievalModel, row: int, vectors: Tensor) -> Tensor:
    """[tokens, D] of one row, token by token."""
    vocabulary, table, own = model.vocabulary, model.embedding.weight, model.item_embedding
    codes = tokenizer_of(model).target_codes[1:]
    sums = []
    if vocabulary.num_user_buckets:
        sums.append(table[vocabulary.user_tokens(histories().user_hashes)[row]])
    for position, item in enumerate(HISTORIES[row]):
        tokens = [vocabulary.offset("text", level) + int(codes[item, level]) for level in range(3)]
        if vocabulary.separator_token is not None:
            tokens.append(vocabulary.separator_token)
        for level, token in enumerate(tokens):
            sums.append(table[token] + vectors[item] + own.positions[position] + own.levels[level])
    if not sums:
        return torch.zeros(0, 16)
    return F.layer_norm(torch.stack(sums), (16,), own.norm.weight, own.norm.bias)


LAYOUTS = pytest.mark.parametrize(
    "layout",
    [{"num_user_buckets": users, "separator": separator} for users in (0, 5) for separator in (False, True)],
    ids=str,
)


@LAYOUTS
@pytest.mark.parametrize("fill", [lambda batch: batch, filled], ids=["exact", "capacity"])
def test_the_encoder_reads_codes_features_and_positions(layout: dict, fill) -> None:
    model = model_of(replace(CONFIG, **layout))
    vectors = model.project_items(item_table())
    batch = tokens_of(model, fill(histories()))
    read = model.item_embedding.rows(vectors, batch.histories.item_ids)
    got = model.item_embedding(model.embedding(batch.tokens), batch.histories, read)
    expected = torch.cat([input_by_hand(model, row, vectors) for row in range(len(HISTORIES))])
    torch.testing.assert_close(got[: len(expected)], expected)
    assert len(got) == len(batch.tokens)


@LAYOUTS
@pytest.mark.parametrize("fill", [lambda batch: batch, filled], ids=["exact", "capacity"])
def test_queries_are_the_states_of_last_tokens(layout: dict, fill) -> None:
    model = model_of(replace(CONFIG, **layout))
    vectors = model.project_items(item_table())
    got = model.queries(tokens_of(model, fill(histories())), vectors)
    for row in range(len(HISTORIES)):
        alone = input_by_hand(model, row, vectors)
        offsets = torch.tensor([0, len(alone)], dtype=torch.int32)
        expected = model.encoder(alone, Rows(offsets, len(alone)))[-1] if len(alone) else torch.zeros(16)
        torch.testing.assert_close(got[row], F.normalize(expected, dim=0))
    if not layout["num_user_buckets"]:
        assert not got[len(HISTORIES) :].any()


def test_queries_of_empty_rows_alone_are_zeros() -> None:
    model = model_of()
    vectors = model.project_items(item_table())
    for lists in ([], [[]], [[], []]):
        got = model.queries(tokens_of(model, SeqBatch.from_lists(lists)), vectors)
        assert torch.equal(got, torch.zeros(len(lists), 16))


def dense_loss_by_hand(model: EncoderDecoderRetrievalModel, batch: TokenizedSeqBatch, items: ItemTable) -> Tensor:
    queries = model.queries(batch, model.project_items(items))
    vectors = F.normalize(model.project_items(items), dim=1)
    losses = []
    for query, target in zip(queries, batch.histories.targets.tolist(), strict=True):
        if target != NO_TARGET:
            scores = {item: query @ vectors[item] / 0.2 for item in range(NUM_ITEMS) if item not in COLD}
            losses.append(torch.stack(list(scores.values())).logsumexp(0) - scores[target])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("fill", [lambda batch: batch, filled], ids=["exact", "capacity"])
def test_the_loss_is_that_of_the_codes_and_that_over_the_catalogue(fill) -> None:
    model, items = model_of(replace(CONFIG, sid_loss_weight=0.5, embedding_loss_weight=2.0)), item_table()
    batch = tokens_of(model, fill(histories()))
    losses = model(batch, items)
    levels = [f"loss_level_{level}" for level in range(3)]
    assert sorted(losses) == ["loss", "loss_embedding", *levels, "loss_sid"]
    torch.testing.assert_close(losses["loss_embedding"], dense_loss_by_hand(model, batch, items).detach())
    likelihoods = model.log_likelihood(tokens_of(model), model.project_items(items))
    torch.testing.assert_close(losses["loss_sid"], -likelihoods.mean().detach())
    torch.testing.assert_close(losses["loss_sid"], sum(losses[level] for level in levels))
    torch.testing.assert_close(losses["loss"].detach(), 0.5 * losses["loss_sid"] + 2.0 * losses["loss_embedding"])
    assert [name for name, loss in losses.items() if loss.requires_grad] == ["loss"]


def test_gradients_are_those_of_the_loss_by_hand() -> None:
    model, items = model_of(), item_table()
    batch = tokens_of(model)
    expected = dense_loss_by_hand(model, batch, items) - model.log_likelihood(batch, model.project_items(items)).mean()
    parameters = list(model.parameters())
    gradients = (torch.autograd.grad(loss, parameters) for loss in (model(batch, items)["loss"], expected))
    for (name, _), *pair in zip(model.named_parameters(), *gradients, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_nothing_is_learned_from_cold_items_in_the_loss() -> None:
    model, items = model_of(DENSE), item_table()
    features = items.features.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(tokens_of(model), replace(items, features=features))["loss"], [features])
    learned = gradient.abs().sum(dim=1) > 0
    assert learned.tolist() == [item not in COLD and item not in MISSING for item in range(NUM_ITEMS)]
    wrong = replace(histories(), targets=torch.tensor([0, 11, COLD[0], 3]))
    with pytest.raises(ValueError, match="excluded"):
        model(tokens_of(model, wrong), items)


def test_the_vector_of_missing_features_is_trained() -> None:
    model = model_of(DENSE)
    model(tokens_of(model), item_table())["loss"].backward()
    assert model.item_tower.missing.grad.abs().sum() > 0
    vectors = model.project_items(item_table())
    torch.testing.assert_close(vectors[MISSING], model.item_tower.missing.expand(2, -1))


@pytest.mark.parametrize(("config", "num_rows"), [(CONFIG, NUM_ITEMS), (DENSE, NUM_ITEMS), (TEXT, 10)])
def test_every_item_is_projected_once_a_step(config: RetrievalModelConfig, num_rows: int) -> None:
    model, passed = model_of(config), []
    model.item_tower.projection.register_forward_pre_hook(lambda module, inputs: passed.append(len(inputs[0])))
    batch = tokens_of(model)
    loss = model(batch, item_table())["loss"]
    assert passed == [num_rows]  # a text model projects the ten items that it reads, or all if there are fewer
    vectors = model.project_items(item_table())
    if config is TEXT:
        torch.testing.assert_close(loss, -model.log_likelihood(batch, vectors).mean())
        many = replace(SeqBatch.from_lists([[1] * 5, [0, 3, 4, 5], [6] * 4]), targets=torch.tensor([0, 1, 3]))
        model(tokens_of(model, many), item_table())
        assert passed[2:] == [NUM_ITEMS]
        assert sorted(model(batch, item_table())) == ["loss", "loss_level_0", "loss_level_1", "loss_level_2"]


def test_a_dense_model_has_no_decoder_and_trains_all_it_has() -> None:
    model = model_of(DENSE)
    batch, items = tokens_of(model), item_table()
    assert not [name for name in model.state_dict() if name.startswith(("decoder", "heads"))]
    losses = model(replace(batch, target_codes=None), items)
    assert list(losses) == ["loss"]
    losses["loss"].backward()
    untouched = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert untouched == []
    vectors = model.project_items(items)
    for write in (model.start, model.log_likelihood):
        with pytest.raises(InputError, match=r"no decoder: .*sid_loss_weight = 0. Use dense retrieval"):
            write(batch, vectors)


def test_empty_histories_give_every_parameter_a_gradient() -> None:
    model, items = model_of(), item_table()
    batch = replace(SeqBatch.from_lists([[], []]), targets=torch.tensor([3, 1]))
    loss = model(tokens_of(model, batch), items)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_the_model_without_features_is_the_part_of_it_that_reads_codes() -> None:
    torch.manual_seed(0)
    tiger = EncoderDecoderRetrievalModel(TIGER).eval()
    torch.manual_seed(0)
    names = list(EncoderDecoderRetrievalModel(CONFIG).state_dict())
    assert [name for name in names if not name.startswith(("item_tower", "item_embedding"))] == list(tiger.state_dict())
    batch = tokens_of(tiger)
    assert torch.equal(tiger(replace(batch, histories=None))["loss"], tiger(batch)["loss"])
    for ask in (lambda: tiger.project_items(item_table()), lambda: tiger.fit_features_(item_table())):
        with pytest.raises(InputError, match="reads no item features"):
            ask()
    with pytest.raises(InputError, match=r"no dense head: .*embedding_loss_weight = 0. Use generative retrieval"):
        tiger.queries(batch, None)


def test_generation_reads_item_vectors() -> None:
    model = model_of()
    batch, vectors = tokens_of(model), model.project_items(item_table())
    rows = torch.arange(len(HISTORIES))
    total = torch.zeros(len(HISTORIES))
    state, codes, parents = model.start(batch, vectors), None, None
    for level in range(3):
        logits = model.step(state, codes, parents)
        codes, parents = batch.target_codes[:, level, None], torch.zeros(len(HISTORIES), 1, dtype=torch.int64)
        total += logits.log_softmax(-1)[rows, 0, codes[:, 0]]
    torch.testing.assert_close(total, model.log_likelihood(batch, vectors))
    assert not torch.allclose(total, model.log_likelihood(batch, vectors.flip(0)))


def test_the_key_of_projections_changes_with_the_weights_alone() -> None:
    model = model_of()
    batch, items = tokens_of(model), item_table()
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(batch, items)["loss"].backward()
        optimizer.step()

    for change in (
        step,
        lambda: model.load_state_dict(copy.deepcopy(model.state_dict())),
        lambda: model.train(),
        lambda: model.fit_features_(items),
    ):
        before = model.weights_key()
        change()
        after = model.weights_key()
        assert after != before
        model.eval()
        model.project_items(items)
        model.queries(batch, model.project_items(items))
        model.zero_grad()
        assert model.weights_key() == after
        assert hash(after) == hash(model.weights_key())


def test_autocast_trains() -> None:
    model, items = model_of(), item_table()
    batch = tokens_of(model)
    exact = model(batch, items)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(batch, items)
        queries = model.queries(batch, model.project_items(items))
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert queries.dtype == torch.float32
    torch.testing.assert_close(losses["loss_embedding"], exact["loss_embedding"], rtol=0.05, atol=0.05)
    losses["loss"].backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_training_fits_a_small_batch() -> None:
    torch.manual_seed(0)
    model = EncoderDecoderRetrievalModel(replace(CONFIG, items=replace(ITEMS, input_dropout=0.2)))
    model.fit_features_(item_table())
    batch, items = tokens_of(model), item_table()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(batch, items)["loss"].backward()
        optimizer.step()
    scores = (
        model.eval().queries(batch, model.project_items(items)) @ F.normalize(model.project_items(items), dim=1).t()
    )
    right = scores.masked_fill(items.cold, -2.0).argmax(dim=1)
    assert [int(right[row]) for row in (0, 2, 3)] == [TARGETS[row] for row in (0, 2, 3)]


def test_what_is_missing_is_named() -> None:
    model, items = model_of(), item_table()
    batch = tokens_of(model)
    vectors = model.project_items(items)
    with pytest.raises(ValueError, match=r"expected items, an ItemTable of the catalogue, got None"):
        model(batch)
    for read in (model.start, model.log_likelihood, lambda batch: model.queries(batch, None)):
        with pytest.raises(ValueError, match=r"expected item_vectors \[N, D\], got None"):
            read(batch)
    with pytest.raises(ValueError, match="with the histories that its tokens were written from"):
        model.start(replace(batch, histories=None), vectors)
    dense = model_of(DENSE)
    with pytest.raises(ValueError, match="expected histories with targets, got none"):
        dense(tokens_of(dense, replace(histories(), targets=None)), items)
    long = SeqBatch.from_lists([[1] * (MAX_HISTORY + 1)])
    with pytest.raises(InputError, match=r"6 item positions, and a history may have 7 items. Set .*num_positions = 7"):
        model.queries(tokens_of(model, long), vectors)
    with pytest.raises(InputError, match=r"expected item features \[N, 7\], got \[12, 3\]"):
        model(batch, replace(items, features=items.features[:, :3].contiguous()))
