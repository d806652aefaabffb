"""The part of `benchmarks.assign_ids` that reads fp16 vectors from files and writes their codes in shards.

ours            `serving.assignment.assign`: the digest of the file, then a shard at a time, none of it in memory
plain_eager     a loop over a memory map with the plain encoder, torch.cdist and argmin; all codes saved in the end
"""

import shutil
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from benchmarks.common import peak_memory, ratios
from benchmarks.plain_rqvae import PlainRqVae
from benchmarks.rungs import OURS
from data.feature_files import open_features
from data.schemas import Catalogue, InputError
from modules.rqvae import RqVae
from modules.tokenizer.assign import BLOCK_ROWS
from modules.tokenizer.tokenizer import SemanticIdTokenizer
from serving.assignment import assign

_WRITTEN_ROWS = 50_000
_NUM_KNOWN = 1000


def check_disk(folder: Path, num_rows: int, width: int) -> None:
    """InputError where a file of so many fp16 rows, and a tenth more, does not fit."""
    needed, free = num_rows * width * 2.2, shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder} has {free / 1e9:.1f} GB free; the vectors need {needed / 1e9:.1f} GB. "
            "Set TMPDIR to a larger disk, or use --quick."
        )


def write_features(path: Path, num_rows: int, width: int) -> None:
    """A .npy file of fp16 rows of about unit length, written in blocks, so that few are in memory."""
    generator = np.random.default_rng(0)
    with path.open("wb") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": (num_rows, width)}
        np.lib.format.write_array_header_1_0(file, header)
        for begin in range(0, num_rows, _WRITTEN_ROWS):
            shape = (min(_WRITTEN_ROWS, num_rows - begin), width)
            rows = generator.standard_normal(shape, dtype=np.float32)
            rows *= width**-0.5
            rows.astype(np.float16).tofile(file)


def make_tokenizer(model: RqVae, path: Path) -> SemanticIdTokenizer:
    """A tokenizer of the first rows of a file."""
    features = open_features(path)[:_NUM_KNOWN]
    blank = [""] * len(features)
    catalogue = Catalogue([f"item {row}" for row in range(len(features))], blank, blank)
    return SemanticIdTokenizer.fit(model, features, catalogue, feature_description={}, dataset_manifest_hash="")


def run_files(model: RqVae, lengths: tuple[int, ...], rows_per_shard: int, folder: Path) -> list[dict[str, Any]]:
    """Result rows of both for files of several lengths: seconds, rows per second and peak memory.

    Args:
        model: on the CPU.
        lengths: rows of the files, one file at a time.
        rows_per_shard: of ours.
        folder: for the files and what comes of them.

    Raises:
        AssertionError: if a shard does not hold the codes that the tokenizer gives these rows in memory.
        InputError: if the disk is too small.
    """
    width = model.config.input_dim
    check_disk(folder, max(lengths), width)
    found = []
    for num_rows in (min(rows_per_shard, *lengths), *lengths):  # the first warms up
        path = folder / "features.npy"
        write_features(path, num_rows, width)
        case = f"{num_rows:,} x {width}, float16 file"
        rows = [_ours(model, path, rows_per_shard, folder / "ids"), _plain(model, path, folder / "codes.npy")]
        for row in rows:
            row["rows_per_s"] = round(num_rows / row["seconds"])
        for name, ratio in ratios(rows, of=OURS, key="seconds").items():
            next(row for row in rows if row["implementation"] == name)["times_ours"] = ratio
        found.append([{"case": case, **row} for row in rows])
    return [row for rows in found[1:] for row in rows]


def _ours(model: RqVae, path: Path, rows_per_shard: int, output: Path) -> dict[str, Any]:
    tokenizer = make_tokenizer(model, path)
    row: dict[str, Any] = {"implementation": OURS}
    with peak_memory(row):
        began = perf_counter()
        done = assign(tokenizer, open_features(path), output, rows_per_shard=rows_per_shard)
        seconds = perf_counter() - began
    row |= {"seconds": round(seconds, 3), "digest_s": round(seconds - done.seconds, 3), "num_shards": done.num_shards}
    _verify(tokenizer, path, output)
    shutil.rmtree(output)
    return row


def _verify(tokenizer: SemanticIdTokenizer, path: Path, output: Path) -> None:
    """The first and the last shard against the codes of the same rows in memory."""
    import polars as pl

    mapped = np.load(path, mmap_mode="r")
    shards = sorted(output.glob("ids-*.parquet"))
    for shard in (shards[0], shards[-1]):
        table = pl.read_parquet(shard)
        codes = tokenizer.encode(np.array(mapped[table["row"].to_numpy()]))
        if not np.array_equal(table.drop("row").to_numpy(), codes.numpy()):
            raise AssertionError(f"{shard.name} has other codes than the rows in memory; nothing is reported.")


def _plain(model: RqVae, path: Path, output: Path) -> dict[str, Any]:
    plain, block = PlainRqVae(model), BLOCK_ROWS["cpu"]
    row: dict[str, Any] = {"implementation": "plain_eager"}
    with peak_memory(row), torch.no_grad():
        began = perf_counter()
        mapped = np.load(path, mmap_mode="r")
        codes = [
            plain.semantic_ids(torch.from_numpy(mapped[begin : begin + block].astype(np.float32)))
            for begin in range(0, len(mapped), block)
        ]
        np.save(output, torch.cat(codes).numpy())
        row["seconds"] = round(perf_counter() - began, 3)
    output.unlink()
    return row
