"""Everything that the shipped configs run, through the public interface: for compiling its kernels ahead of time.

Models and batch sizes are read from `configs/`, so that a new config is compiled without a line here.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import gin
import torch

import ops
import train_decoder  # noqa: F401, registers what configs may say
import train_rqvae  # noqa: F401
import train_sequence  # noqa: F401
from data.schemas import ItemFilter, SeqBatch
from modules.estimators import QuantizeMode
from modules.generation.beam import beam_search
from modules.generation.trie import PrefixTrie
from modules.item_table import ItemTable
from modules.item_tower import ItemInputConfig
from modules.kmeans import kmeans
from modules.model import EncoderDecoderRetrievalModel, RetrievalModelConfig
from modules.rqvae import RqVae, RqVaeConfig
from modules.sequential.hstu import HSTUConfig
from modules.sequential.next_item import NextItemConfig
from modules.sequential.sasrec import SASRecConfig
from modules.tokenizer.assign import BLOCK_ROWS, assign_codes
from modules.tokenizer.sequence import SequenceTokenizer
from tests.kernels.gpu_paths import as_on_a_gpu
from training.gin_config import load_config
from training.gin_syntax import ConfigReader, Macro

REQUIRED = Macro("gin.REQUIRED")
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BEAM_WIDTHS = (20, 50)
WIDEST_BEAM = 1024
WIDE_MODEL = 384
"""The second width that speed is promised for, beside the configs'."""
CATALOGUE_WIDTHS = (128, 512)
"""Of item vectors; wider ones than a tile take several."""
NUM_ITEMS = 1000
ITEM_FEATURES = 16
"""Products with item features are PyTorch's, so their width decides nothing here."""


@dataclass(frozen=True)
class Workload:
    """What one of the shipped configs runs, and how it is called in reports."""

    name: str
    run: Callable[[], object]


def workloads() -> Iterator[Workload]:
    """Training and generation of every shipped model: as shipped, and the models of the defaults' heads in every way.

    As shipped means fp16, which is what "auto" is on CUDA.
    """
    for config, batch_size in retrieval_models():
        usual = config.head_dim == RetrievalModelConfig.head_dim
        for dtype in DTYPES if usual else (torch.float16,):
            name = f"d_model {config.d_model}, {config.num_heads} heads of {config.head_dim}, {_name(dtype)}"
            if config.items is not None:
                name += ", item features"
            yield Workload(f"training, {name}", partial(train_step, config, batch_size, dtype))
            if config.items is None:
                yield Workload(f"generation, {name}", partial(generate, config, dtype))
        if usual:
            plain = replace(config, dropout=0.0, label_smoothing=0.1)
            yield Workload(
                f"training without dropout, d_model {config.d_model}, float32",
                partial(train_step, plain, batch_size, torch.float32),
            )
    yield Workload(f"trie step of {WIDEST_BEAM} beams", wide_trie_step)
    for width, dtype in itertools.product(CATALOGUE_WIDTHS, DTYPES):
        yield Workload(f"loss over a catalogue, width {width}, {_name(dtype)}", partial(catalogue_loss, width, dtype))
    for item_config, batch_size in sequence_models():
        name = f"{type(item_config).__name__}, d_model {item_config.d_model}, {item_config.max_history} items, float16"
        yield Workload(f"training, {name}", partial(sequence_step, item_config, batch_size, torch.float16))
    for config, batch_size in rqvae_models():
        for dtype in (torch.float32, torch.float16):
            yield Workload(f"RQ-VAE {config.input_dim}, {_name(dtype)}", partial(rqvae_step, config, batch_size, dtype))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def retrieval_models() -> list[tuple[RetrievalModelConfig, int]]:
    """Distinct shapes of the shipped models, one layer deep, and the batch sizes they are trained with."""
    found = {}
    for path in [*_paths("decoder"), *_paths("liger")]:  # whose kernels are TIGER's and all of LIGER's
        config, batch_size = _load(path, "train_decoder", RetrievalModelConfig)
        config = replace(config, dropout=RetrievalModelConfig.dropout)
        if config.items is not None:
            items = ItemInputConfig(num_features=ITEM_FEATURES, hidden_dims=(), num_positions=20)
            config = replace(config, items=items, sid_loss_weight=1.0)
        for d_model in {config.d_model, WIDE_MODEL} if config == RetrievalModelConfig() else {config.d_model}:
            shape = replace(
                config, d_model=d_model, num_encoder_layers=1, num_decoder_layers=1, languages={"text": (256,) * 4}
            )
            found[str(shape), batch_size] = shape, batch_size
    return list(found.values())


def rqvae_models() -> list[tuple[RqVaeConfig, int]]:
    """Distinct codebooks of the shipped RQ-VAEs, and the batch sizes they are trained with."""
    found = {}
    for path in _paths("rqvae"):
        config, batch_size = _load(path, "train_rqvae", RqVaeConfig)
        found[config.embed_dim, config.codebook_sizes, batch_size] = config, batch_size
    return list(found.values())


def sequence_models() -> list[tuple[NextItemConfig, int]]:
    """Distinct shapes of the shipped models of item sequences, one layer deep, and their batch sizes."""
    found = {}
    for stage, kind in {"sasrec": SASRecConfig, "hstu": HSTUConfig}.items():
        for path in _paths(stage):
            config, batch_size = _load(path, "train_sequence", kind)
            shape = replace(config, num_layers=1, num_items=NUM_ITEMS)
            found[str(shape), batch_size] = shape, batch_size
    return list(found.values())


def _paths(stage: str) -> list[Path]:
    paths = sorted(path for path in CONFIGS.rglob("*.gin") if path.stem.startswith(stage))
    return [path for path in paths if path.parent.name != "base"]


def _load(path: Path, script: str, kind: type) -> tuple:
    """The model's config that a file describes, and the batch size."""
    reader = ConfigReader()
    reader.read_file(path)
    given = [f"{setting.name}=given" for setting in reader.statements if setting.value == REQUIRED]
    load_config([path], given, script=script, supplied=["options"])
    batch_size = gin.query_parameter(f"{script}.train.batch_size")
    return gin.get_configurable(kind)(), batch_size


def histories(num_rows: int, max_len: int = 20) -> SeqBatch:
    """Lengths from 0 on, as many tokens as a batch of fixed capacity has."""
    lengths = torch.arange(num_rows) % (max_len + 1)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    num_items = (int(offsets[-1]) + 63) // 64 * 64
    users, targets = torch.arange(num_rows), torch.arange(num_rows) % NUM_ITEMS
    return SeqBatch(torch.arange(num_items) % NUM_ITEMS, offsets, max_len, users, targets)


def semantic_ids(num_items: int = NUM_ITEMS) -> torch.Tensor:
    """[num_items, 4] distinct codes."""
    items = torch.arange(num_items)
    return torch.stack([items % 256, items // 256, items % 7, items % 11], dim=1)


def item_table(width: int) -> ItemTable:
    """Features of all items, some of which are missing, and some cold."""
    items = torch.arange(NUM_ITEMS)
    return ItemTable(torch.zeros(NUM_ITEMS, width), items % 10 == 3, items >= NUM_ITEMS - 3)


def model_and_tokenizer(config: RetrievalModelConfig) -> tuple[EncoderDecoderRetrievalModel, SequenceTokenizer]:
    """Untrained."""
    model = EncoderDecoderRetrievalModel(config)
    return model, SequenceTokenizer(semantic_ids(), model.vocabulary)


def _precision(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)


def train_step(config: RetrievalModelConfig, batch_size: int, dtype: torch.dtype) -> None:
    """Forward and backward, and the log-likelihood as in an evaluation."""
    model, tokenize = model_and_tokenizer(config)
    items = None if config.items is None else item_table(config.items.num_features)
    with _precision(dtype), as_on_a_gpu():
        loss = model(tokenize(histories(batch_size)), items)["loss"]
    loss.backward()
    with _precision(dtype), as_on_a_gpu(), torch.no_grad():
        vectors = None if items is None else model.eval().project_items(items)
        model.eval().log_likelihood(tokenize(histories(batch_size)), vectors)


def generate(config: RetrievalModelConfig, dtype: torch.dtype) -> None:
    """Beam search of all items and of some, where items share tuples too."""
    model, tokenize = model_and_tokenizer(config)
    batch = tokenize(histories(16))
    trie = PrefixTrie.from_semantic_ids(semantic_ids())
    with _precision(dtype):
        for beam_width in BEAM_WIDTHS:
            beam_search(model.eval(), batch, trie, beam_width)
        trie = PrefixTrie.from_semantic_ids(semantic_ids(NUM_ITEMS // 2).repeat(2, 1))
        flags = torch.arange(NUM_ITEMS) % 3 > 0
        for allowed, normalize in ((None, "level"), (flags, "level"), (flags, "children")):
            item_filter = ItemFilter.unseen(histories(16), allowed)
            beam_search(model, batch, trie, BEAM_WIDTHS[0], item_filter, normalize)


def wide_trie_step() -> None:
    """Selection in several rounds."""
    (row_ptr, codes), *_ = PrefixTrie.from_semantic_ids(semantic_ids()).levels
    logits = torch.zeros(1, WIDEST_BEAM, 256)
    nodes = torch.full((1, WIDEST_BEAM), -1)
    ops.trie_topk_step(logits, nodes, torch.zeros(1, WIDEST_BEAM), row_ptr, codes, beam_width=WIDEST_BEAM)


def catalogue_loss(width: int, dtype: torch.dtype) -> None:
    """Forward and backward, with items that were not seen in training."""
    queries, items = (torch.zeros(rows, width, dtype=dtype).requires_grad_() for rows in (256, NUM_ITEMS))
    excluded = torch.arange(NUM_ITEMS) == 7
    ops.catalogue_cross_entropy(queries, items, torch.zeros(256, dtype=torch.int64), excluded=excluded).backward()


def sequence_step(config: NextItemConfig, batch_size: int, dtype: torch.dtype) -> None:
    """Forward and backward, and the states that rank items."""
    model, batch = config.build(), histories(batch_size, config.max_history)
    with _precision(dtype):
        loss = model(batch)["loss"]
    loss.backward()
    with _precision(dtype), torch.no_grad():
        model.eval().queries(batch)


def rqvae_step(config: RqVaeConfig, batch_size: int, dtype: torch.dtype) -> None:
    """Initialisation, a step in every mode, and ids of a catalogue."""
    for mode in QuantizeMode:
        if mode is QuantizeMode.GUMBEL_SOFTMAX and config.ema_decay:
            continue  # such codes are learned by gradient
        model = RqVae(replace(config, mode=mode))
        with _precision(dtype):
            model(torch.randn(batch_size, config.input_dim)).loss.backward()
    kmeans(torch.randn(1024, config.embed_dim), config.codebook_sizes[0], num_iterations=1, seed=0)
    with mock.patch.dict(BLOCK_ROWS, cpu=BLOCK_ROWS["cuda"]):
        for precision in ("ieee", "tf32x3"):
            assign_codes(model.eval(), torch.ones(1, config.input_dim), encoder_dtype=dtype, precision=precision)
