"""The faults of earlier implementations listed in the project's core reference, one test (or a few) per fault.

Each is a compact run through our own code that would fail if the fault came back; the rooms' own tests go deeper.
"""

import ast
import dataclasses
import gzip
import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ops
from data.batching import ExampleStrategy, TrainingBatches, evaluation_batches
from data.prepare import build_splits
from data.processed import DatasetConfig, RecDataset, load_dataset
from data.schemas import Catalogue, Histories, InputError, SeqBatch, TokenizedSeqBatch
from evaluation.codebook import check_collapse, codebook_health
from evaluation.evaluator import evaluate
from modules.baselines.popularity import PopularityRanker
from modules.estimators import QuantizeMode
from modules.generation.beam import beam_search
from modules.generation.ranker import GenerativeRanker
from modules.generation.trie import PrefixTrie
from modules.kmeans import kmeans
from modules.model import EncoderDecoderRetrievalModel, RetrievalModelConfig
from modules.rqvae import RqVae, RqVaeConfig
from modules.tokenizer.collisions import codebook_health as tuple_health
from modules.tokenizer.collisions import dedup_codes
from modules.tokenizer.tokenizer import SemanticIdTokenizer
from training import cli
from training.gin_syntax import ConfigReader, Macro
from training.loop import run_training
from training.loop_config import LoopConfig
from training.run_folder import RunFolder, RunOptions

REPOSITORY = Path(__file__).resolve().parent.parent
REQUIRED = Macro("gin.REQUIRED")


def rqvae(**settings) -> RqVae:
    torch.manual_seed(0)
    given = {"input_dim": 4, "embed_dim": 2, "hidden_dims": (), "codebook_sizes": (3, 3, 3), **settings}
    return RqVae(RqVaeConfig(mode=given.pop("mode", QuantizeMode.STRAIGHT_THROUGH), **given))


def tokenizer_of(features: Tensor, model: RqVae | None = None) -> SemanticIdTokenizer:
    keys = [f"item-{i}" for i in range(len(features))]
    catalogue = Catalogue(keys, keys, [""] * len(keys))
    model = rqvae() if model is None else model
    return SemanticIdTokenizer.fit(model, features, catalogue, feature_description={}, dataset_manifest_hash="0")


def generative_ranker(
    tokenizer: SemanticIdTokenizer, *, dropout: float = 0.0, beam_width: int = 50
) -> GenerativeRanker:
    torch.manual_seed(1)
    sizes = {"d_model": 16, "num_heads": 2, "head_dim": 8, "d_ff": 32, "num_encoder_layers": 1, "num_decoder_layers": 1}
    config = RetrievalModelConfig(
        languages={"text": tokenizer.level_sizes}, dropout=dropout, num_user_buckets=0, **sizes
    )
    return GenerativeRanker(EncoderDecoderRetrievalModel(config), tokenizer, beam_width=beam_width)


def histories_of(rows: list[list[int]]) -> Histories:
    batch = SeqBatch.from_lists(rows)
    return Histories(batch.offsets, batch.item_ids.int(), torch.arange(len(batch.item_ids)), batch.user_hashes)


def test_fault_1_items_that_share_codes_are_two_items():
    """Both items of a colliding pair are a target once, for the same history: one rank is 1, so recall@1 is a half."""
    features = torch.ones(2, 4)
    tokenizer = tokenizer_of(features)
    assert torch.equal(tokenizer.semantic_ids[0, :-1], tokenizer.semantic_ids[1, :-1])
    history = SeqBatch.from_lists([[0], [0]])
    batch = dataclasses.replace(history, targets=torch.tensor([0, 1]))
    result = evaluate(generative_ranker(tokenizer), [batch], cold=torch.zeros(2, dtype=torch.bool), split="test")
    assert sorted(result.ranks.tolist()) == [1, 2]
    assert result.metrics["generative/test/all/recall@1"] == 0.5


@pytest.mark.parametrize("strategy", ExampleStrategy)
def test_fault_2_training_sees_neither_validation_nor_test_targets(strategy: ExampleStrategy):
    """Items 100+ stand in validation places and 200+ in test places only; training must not meet one of them."""
    histories = histories_of([[u, u + 1, u + 2, 100 + u, 200 + u] for u in range(20)])
    split = build_splits(histories)["leave_one_out"]
    batches = TrainingBatches(histories, split.train, strategy=strategy, max_history=20, batch_size=16, seed=0)
    for step in range(20):
        batch = batches.batch(step)
        assert batch.targets is not None
        assert int(torch.cat([batch.item_ids, batch.targets]).max()) < 100
    assert int(PopularityRanker.fit(histories, split.train, 300).counts[100:].sum()) == 0


def test_fault_2_the_validation_split_is_not_the_test_split():
    histories = histories_of([[u, u + 1, u + 2, 100 + u, 200 + u] for u in range(20)])
    split = build_splits(histories)["leave_one_out"]
    valid, test = (
        next(evaluation_batches(histories, split.role(role), max_history=20, batch_size=64))
        for role in ("valid", "test")
    )
    assert valid.targets is not None
    assert test.targets is not None
    assert valid.targets.tolist() == list(range(100, 120))
    assert test.targets.tolist() == list(range(200, 220))
    assert int(valid.item_ids.max()) < 100


def test_fault_3_beam_search_is_deterministic_and_every_beam_is_an_item():
    features = torch.randn(40, 4, generator=torch.Generator().manual_seed(2))
    ranker = generative_ranker(tokenizer_of(features), dropout=0.5, beam_width=10)
    ranker.model.train()  # as in the middle of training, with dropout on
    histories = SeqBatch.from_lists([[i, i + 1] for i in range(30)])
    first, second = ranker.rank(histories, 10), ranker.rank(histories, 10)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert int(first[0].min()) >= 0
    assert all(len(set(row)) == 10 for row in first[0].tolist())


def test_fault_4_without_categorical_features_the_continuous_ones_still_count():
    """`x[..., :-0]` is empty: the reconstruction would be neither normalised nor compared."""
    model = rqvae(num_categorical=0, normalize_output=True)
    x = torch.nn.functional.normalize(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    decoded = model.decode(torch.randn(8, 2, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(decoded.norm(dim=-1), torch.ones(8))
    assert decoded.shape == (8, 4)
    latents = model.encode(x)
    embedding = latents - ops.residual_quantize(latents, [q.codebook() for q in model.quantizers])[1]
    expected = (model.decode(embedding) - x).square().sum(dim=-1).mean()
    torch.testing.assert_close(model(x).reconstruction_loss, expected)
    assert float(expected.detach()) > 0.1


def test_fault_5_every_level_pulls_at_the_encoder():
    """Commitment gradient on a latent z is 2 beta times the sum of all levels' residuals, not the first one's alone."""
    model = rqvae(input_dim=2, embed_dim=2, codebook_sizes=(2, 2, 2), commitment_weight=0.25)
    with torch.no_grad():
        model.encoder.linears[0].weight.copy_(torch.eye(2))
        for quantizer, code in zip(model.quantizers, ([1.0, 0.0], [0.5, 0.0], [0.25, 0.0]), strict=True):
            quantizer.weight.copy_(torch.tensor([code, [-9.0, -9.0]]))
    x = torch.tensor([[2.0, 0.5]])
    model(x).quantize_loss.backward()
    residuals_after = torch.tensor([[1.0, 0.5], [0.5, 0.5], [0.25, 0.5]])  # z minus the codes so far, by hand
    expected = 2 * 0.25 * residuals_after.sum(dim=0)
    gradient = model.encoder.linears[0].bias.grad
    torch.testing.assert_close(gradient, expected)


def test_fault_6_kmeans_ends_on_duplicates_and_on_few_rows():
    duplicates = kmeans(torch.ones(500, 3), 16)
    few = kmeans(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), 8)
    for centroids, num_codes in ((duplicates, 16), (few, 8)):
        assert centroids.isfinite().all()
        assert len(torch.unique(centroids, dim=0)) == num_codes


def test_fault_6_kmeans_memory_does_not_grow_with_rows_times_codes_times_width():
    """10,000 x 256 x 128 floats would be 1.3 GB; the peak may be a quarter of it above what the process held before."""
    script = (
        "import resource, torch; from modules.kmeans import kmeans\n"
        "x = torch.randn(10000, 128); kmeans(x[:600], 8)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "kmeans(x, 256, num_iterations=1)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 330_000  # kilobytes


def test_fault_7_a_reloaded_model_keeps_its_codebooks():
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(3))
    model = rqvae()
    model.initialize_codebooks_(x)
    reloaded = rqvae()
    assert not reloaded.codebooks_initialized
    reloaded.load_state_dict(model.state_dict())
    assert reloaded.codebooks_initialized
    reloaded.train()
    reloaded(x + 100.0)  # data on which a new k-means would go elsewhere
    for quantizer, original in zip(reloaded.quantizers, model.quantizers, strict=True):
        torch.testing.assert_close(quantizer.codebook(), original.codebook())


def test_fault_8_collapse_is_logged_and_stops_the_run():
    collapsed = torch.zeros(100, 3, dtype=torch.int64)
    health = codebook_health(collapsed, (256, 256, 256))
    metrics = health.as_metrics()
    assert metrics["codebook/use_level_0"] == 1 / 256
    assert metrics["codebook/entropy_level_0"] == 0.0
    assert metrics["codebook/collision_rate"] == 1.0
    with pytest.raises(InputError, match="codebook collapse: level 0 uses 1 of 100"):
        check_collapse(health, 0.1)


P5_ITEMS = {"A1": "Red lipstick", "B2": "Green soap", "C3": None, "D4": "Blue comb", "E5": "White cream"}


def p5_folder(folder: Path, extra_lines: tuple[str, ...] = ()) -> Path:
    """A Beauty folder whose metadata is shuffled and lacks C3; every user has all five items."""
    folder.mkdir()
    numbers = {key: i for i, key in enumerate(P5_ITEMS, start=1)}
    users = {f"user-{u}": u for u in range(1, 7)}
    (folder / "datamaps.json").write_text(json.dumps({"user2id": users, "item2id": numbers}))
    (folder / "sequential_data.txt").write_text("".join(f"{u} 1 2 3 4 5\n" for u in users.values()))
    lines = [repr({"asin": key, "title": title}) for key, title in reversed(P5_ITEMS.items()) if title]
    lines += [repr({"asin": f"other-{i}", "title": "not in the log"}) for i in range(400)]
    with gzip.open(folder / "meta.json.gz", "wt") as stream:
        stream.write("\n".join([*lines, *extra_lines]) + "\n")
    return folder


def p5_dataset(tmp_path: Path, raw_dir: Path) -> DatasetConfig:
    return DatasetConfig(
        dataset=RecDataset.AMAZON, category="beauty", root=str(tmp_path / "dataset"), raw_dir=str(raw_dir)
    )


def test_fault_9_an_item_without_metadata_shifts_nobody(tmp_path: Path):
    dataset = load_dataset(p5_dataset(tmp_path, p5_folder(tmp_path / "raw")))
    texts = dict(zip(dataset.catalogue.item_keys, dataset.item_texts(dataset.text_template), strict=True))
    assert len(texts) == 5
    for key, title in P5_ITEMS.items():
        if title is None:
            assert texts[key]
            assert not any(other in texts[key] for other in filter(None, P5_ITEMS.values()))
        else:
            assert title in texts[key]


def test_fault_10_metadata_is_read_but_never_executed(tmp_path: Path):
    marker = tmp_path / "executed"
    attack = f"{{'asin': 'C3', 'title': open({str(marker)!r}, 'w').write('x')}}"
    dataset = load_dataset(p5_dataset(tmp_path, p5_folder(tmp_path / "raw", (attack,))))
    assert not marker.exists()
    assert dataset.catalogue.titles[dataset.catalogue.item_keys.index("C3")] == ""


def test_fault_10_nothing_evaluates_text_or_unpickles():
    folders = ("data", "modules", "ops", "training", "evaluation", "reports")
    paths = [path for folder in folders for path in (REPOSITORY / folder).rglob("*.py")] + list(REPOSITORY.glob("*.py"))
    wrong = []
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            unsafe_load = called == "torch.load" and not any(
                keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True" for keyword in node.keywords
            )
            if called in ("eval", "exec", "pickle.load", "pickle.loads") or unsafe_load:
                wrong.append(f"{path.relative_to(REPOSITORY)}:{node.lineno}: {called}")
    assert len(paths) > 30
    assert wrong == []


def test_fault_11_collisions_of_many_items_are_counted_in_no_time():
    """300,000 items compared pair by pair would be 45 billion comparisons."""
    codes = torch.randint(64, (300_000, 3), generator=torch.Generator().manual_seed(0))
    started = time.perf_counter()
    health = tuple_health(codes, (64, 64, 64))
    dedup = dedup_codes(codes)
    assert time.perf_counter() - started < 10
    assert health.num_distinct == len(torch.unique(codes, dim=0))
    assert int((dedup == 0).sum()) == health.num_distinct


class FlatModel(nn.Module):
    """A step model that prefers lower codes and costs nothing."""

    def __init__(self, level_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.level_sizes = level_sizes

    def start(self, batch: TokenizedSeqBatch) -> dict[str, int]:
        return {"rows": len(batch), "level": 0}

    def step(self, state: dict[str, int], codes: Tensor | None, parents: Tensor | None) -> Tensor:
        size = self.level_sizes[state["level"]]
        state["level"] += 1
        beams = 1 if codes is None else codes.shape[1]
        return -0.01 * torch.arange(size).float().expand(state["rows"], beams, size)


def test_fault_11_prefix_checks_do_not_walk_the_catalogue():
    """Checking every beam against every one of 300,000 items would be 64 x 50 x 300,000 comparisons per level."""
    codes = torch.randint(64, (300_000, 3), generator=torch.Generator().manual_seed(0))
    dedup = dedup_codes(codes)
    semantic_ids = torch.cat([codes, dedup[:, None]], dim=1)
    sizes = (64, 64, 64, int(dedup.max()) + 1)
    trie = PrefixTrie.from_semantic_ids(semantic_ids)
    batch = TokenizedSeqBatch(torch.zeros(0, dtype=torch.int64), torch.zeros(65, dtype=torch.int32), 0)
    started = time.perf_counter()
    item_ids, _ = beam_search(FlatModel(sizes), batch, trie, 50)
    assert time.perf_counter() - started < 10
    order = np.lexsort(semantic_ids.numpy().T[::-1])
    assert item_ids[0, 0] == order[0]  # the lowest tuple is the likeliest


def test_fault_11_batches_carry_no_item_features():
    """Ids only; item features are looked up once per item, never gathered per training example."""
    histories = histories_of([[0, 1, 2, 3, 4]] * 10)
    split = build_splits(histories)["leave_one_out"]
    strategy = ExampleStrategy.EVERY_PREFIX
    batch = TrainingBatches(histories, split.train, strategy=strategy, max_history=20, batch_size=8, seed=0).batch(0)
    tensors = [value for value in vars(batch).values() if isinstance(value, Tensor)]
    assert len(tensors) == 4
    assert all(tensor.dim() == 1 and not tensor.is_floating_point() for tensor in tensors)


def test_fault_12_an_evaluation_counts_every_batch():
    """The last, small batch holds the only miss; reporting it alone would give 0."""
    histories = histories_of([[0, 0, 0, 0]] * 8 + [[0, 0, 0, 1]])
    split = build_splits(histories)["leave_one_out"]
    ranker = PopularityRanker.fit(histories, split.train, 4)
    batches = evaluation_batches(histories, split.test, max_history=20, batch_size=4)
    result = evaluate(ranker, batches, cold=torch.zeros(4, dtype=torch.bool), split="test", k=1)
    assert result.metrics["popularity/test/all/count"] == 9
    assert result.metrics["popularity/test/all/recall@1"] == pytest.approx(8 / 9)


class LineTask:
    """Fits a line with dropout; can break at a step, as a crash would."""

    selection_metric = "valid/loss"
    higher_is_better = False

    def __init__(self, breaks_at: int | None = None) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 1))
        self.breaks_at = breaks_at

    def batch(self, step: int) -> Tensor:
        if step == self.breaks_at:
            raise RuntimeError("the machine is gone")
        return torch.randn(16, 8, generator=torch.Generator().manual_seed(step))

    def loss(self, model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        return {"loss": (model(batch)[:, 0] - batch.sum(dim=1)).square().mean()}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"valid/loss": float(self.loss(model, self.batch(10_000))["loss"])}


def train_line(folder: Path, task: LineTask, resume: str | None = None) -> list[dict[str, float]]:
    """Train, and return what was logged without times."""
    config = LoopConfig(num_steps=12, learning_rate=0.05, eval_every=4, checkpoint_every=4, log_every=2, warmup_steps=6)
    run = RunFolder.open(folder, RunOptions(resume=resume), seed=0)
    run_training(task, config, run, seed=0, resume=resume, progress=False)
    records = [json.loads(line) for line in run.metrics_log.read_text().splitlines()]
    timed = ("seconds", "per_second", "time")
    return [{key: value for key, value in record.items() if not any(t in key for t in timed)} for record in records]


def test_fault_12_resuming_repeats_the_uninterrupted_run_exactly(tmp_path: Path):
    """Saved step, optimizer state, data order, learning rate and dropout all come back."""
    whole, broken = LineTask(), LineTask(breaks_at=10)
    expected = train_line(tmp_path / "whole", whole)
    with pytest.raises(RuntimeError, match="the machine is gone"):
        train_line(tmp_path / "broken", broken)
    resumed = LineTask()
    assert train_line(tmp_path / "broken", resumed, resume="auto") == expected
    for parameter, original in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(parameter, original)


def shipped_configs() -> list[Path]:
    """What a user can run; configs/base holds parts."""
    paths = sorted((REPOSITORY / "configs").rglob("*.gin"))
    return [path for path in paths if "base" not in path.relative_to(REPOSITORY).parts]


each_shipped_config = pytest.mark.parametrize(
    "path", shipped_configs(), ids=lambda path: path.relative_to(REPOSITORY).as_posix()
)


def run_config(path: Path, *arguments: str) -> tuple[Any, int]:
    """The script of a config, and its exit code; values that the config asks a user for are given."""
    script = re.findall(r"^(\w+)\.train\.save_dir_root = ", path.read_text(), flags=re.MULTILINE)[-1]
    module = importlib.import_module(script)
    reader = ConfigReader()
    reader.read_file(path)
    required = [s.name for s in reader.statements if s.value == REQUIRED]
    given = [f"--gin.{name}=given.csv" for name in required]
    return module, cli.main(module.train, script, [str(path), *given, *arguments])


@each_shipped_config
def test_fault_13_every_shipped_config_parses(path: Path, capsys: pytest.CaptureFixture[str]):
    _, code = run_config(path, "--print-config")
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert "train.save_dir_root" in captured.out


@each_shipped_config
def test_fault_13_every_line_of_a_shipped_config_counts(path: Path, capsys: pytest.CaptureFixture[str]):
    """What a file says and no other line says anew is in force with that file and line as its origin."""
    reader = ConfigReader()
    reader.read_file(path)
    last = {statement.name: statement.origin for statement in reader.statements if statement.value != REQUIRED}
    assert len(last) >= 5
    assert run_config(path, "--print-config")[1] == 0
    in_force = set(re.findall(r"^#? ?(\S+) = .*  # (\S+\.gin:\d+)$", capsys.readouterr().out, flags=re.MULTILINE))
    assert {f"{name} @ {origin}" for name, origin in last.items()} <= {f"{n} @ {o}" for n, o in in_force}


@each_shipped_config
def test_fault_13_every_shipped_config_holds_possible_values(path: Path, monkeypatch: pytest.MonkeyPatch):
    """gin builds every dataclass of the run, whose own checks pass, and calls the function."""
    reached = []

    def stop(configs: object) -> None:
        reached.append(configs)
        raise InputError("far enough")

    for script in ("fit_baseline", "train_decoder", "train_sequence", "train_rqvae"):
        name = "load_datasets" if script == "train_rqvae" else "load_dataset"
        monkeypatch.setattr(importlib.import_module(script), name, stop)
    assert run_config(path)[1] == 2
    (configs,) = reached
    assert {type(config) for config in (configs if isinstance(configs, list) else [configs])} == {DatasetConfig}


def test_fault_13_there_are_configs_to_parse():
    names = {path.relative_to(REPOSITORY / "configs").as_posix() for path in shipped_configs()}
    wanted = ["amazon", "amazon_sports", "amazon_toys", "ml_1m", "ml_32m"]
    assert names >= {f"{stage}_{data}.gin" for stage in ("rqvae", "decoder") for data in wanted}
    assert names >= {"demo/rqvae.gin", "demo/decoder.gin"}


@pytest.mark.parametrize("mode", QuantizeMode)
def test_fault_14_a_reloaded_tokenizer_quantizes_as_before(mode: QuantizeMode, tmp_path: Path):
    features = torch.randn(30, 4, generator=torch.Generator().manual_seed(4))
    model = rqvae(mode=mode, sim_vq=True, codebook_normalize=True)
    model.initialize_codebooks_(features)
    tokenizer = tokenizer_of(features, model)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    reloaded = SemanticIdTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert reloaded.rqvae.config == model.config
    assert reloaded.rqvae.config.mode is mode
    assert torch.equal(reloaded.encode(features), tokenizer.semantic_ids[:, :-1])


def test_fault_15_offsets_keep_their_dtype_whatever_the_values():
    """In bfloat16 the boundary 257 would become 256 or 258."""
    offsets = torch.tensor([0, 257, 514], dtype=torch.int32)
    x = torch.arange(514).remainder(100).to(torch.bfloat16)[:, None]
    padded = ops.jagged_to_padded(x, offsets, max_len=257)
    assert padded.dtype == torch.bfloat16
    assert torch.equal(padded[1, :, 0], x[257:, 0])
    assert torch.equal(ops.padded_to_jagged(padded, offsets, num_tokens=514), x)
    with pytest.raises(ValueError, match="offsets as contiguous int32"):
        ops.jagged_to_padded(x, offsets.to(torch.bfloat16), max_len=257)
