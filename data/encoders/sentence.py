"""Text features of any sentence-transformers model, from the Hugging Face Hub or a local folder."""

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from data.encoders import Encoder, EncoderInput
from data.schemas import InputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

CHUNK_SIZE = 2048
"""Items whose features are saved at once; a killed run loses at most so many."""


class SentenceEncoder(Encoder):
    """Sentence embeddings as the model gives them, saved chunk by chunk so that a killed run goes on where it was.

    Args:
        model: Hub id, taken as unchanging, or local folder, known by the content of its files.
        batch_size: texts encoded at once.

    Raises:
        InputError: if `model` is written as a path and there is no such folder, or batch_size is not positive.
    """

    def __init__(self, model: str, batch_size: int) -> None:
        if batch_size < 1:
            raise InputError(f"FeatureConfig.batch_size must be at least 1, got {batch_size}.")
        self.model = model
        self.batch_size = batch_size
        folder = Path(model).expanduser()
        self.folder = folder if folder.is_dir() else None
        if self.folder is None and _looks_like_path(model):
            raise InputError(f"FeatureConfig.model: there is no folder {model}. Give a model folder, or a Hub id.")

    def settings(self) -> dict[str, Any]:
        """The Hub id, or the name and content hash of the local folder."""
        if self.folder is None:
            return {"model": self.model}
        return {"model": self.folder.resolve().name, "model_sha256": _folder_sha256(self.folder)}

    def encode(self, items: EncoderInput, scratch: Path) -> np.ndarray:
        """[N, the model's width] float32; InputError when the model cannot be loaded."""
        starts = range(0, len(items.texts), CHUNK_SIZE)
        paths = [scratch / f"rows-{start:09d}.npy" for start in starts]
        missing = [(start, path) for start, path in zip(starts, paths, strict=True) if not path.is_file()]
        if missing:
            scratch.mkdir(exist_ok=True)
            self._encode_chunks(items.texts, missing)
        return np.concatenate([np.load(path) for path in paths])

    def _encode_chunks(self, texts: list[str], chunks: list[tuple[int, Path]]) -> None:
        model = self.load()
        num_missing = sum(len(texts[start : start + CHUNK_SIZE]) for start, _ in chunks)
        with tqdm(
            total=len(texts), initial=len(texts) - num_missing, desc="encoding texts", unit="item", disable=None
        ) as progress:
            for start, path in chunks:
                chunk = texts[start : start + CHUNK_SIZE]
                rows = model.encode(chunk, batch_size=self.batch_size, show_progress_bar=False, convert_to_numpy=True)
                _save_whole(rows.astype(np.float32), path)
                progress.update(len(chunk))

    def load(self) -> "SentenceTransformer":
        """The model; InputError when it cannot be loaded."""
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise InputError(
                "encoder 'sentence_transformers' needs its package: pip install sentence-transformers."
            ) from error
        try:
            return SentenceTransformer(str(self.folder or self.model))
        except (OSError, ValueError) as error:  # what the hub raises for an id that is unknown, gated or not cached
            raise InputError(self._advice(error)) from error

    def _advice(self, error: Exception) -> str:
        reason = str(error).strip().split("\n")[0]
        if self.folder is not None:
            return (
                f"FeatureConfig.model: {self.folder} is not a whole sentence-transformers model ({reason}). "
                "Copy it again, or give another folder or a Hub id."
            )
        return (
            f"the sentence-transformers model {self.model!r} is not in the local Hugging Face cache and could not be "
            f"downloaded ({reason}). Check the id; without a network, fetch it elsewhere with `hf download "
            f"{self.model} --local-dir FOLDER` and set FeatureConfig.model to that folder, or use the offline encoder "
            "'tfidf_svd'."
        )


def _looks_like_path(model: str) -> bool:
    """A Hub id is `name` or `owner/name`."""
    return model.startswith((".", "~", "/")) or "\\" in model or model.count("/") > 1


def _folder_sha256(folder: Path) -> str:
    """Of names and contents of all files that are not hidden; documentation does not count."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and path.suffix != ".md" and not any(part.startswith(".") for part in name.parts):
            digest.update(name.as_posix().encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _save_whole(rows: np.ndarray, path: Path) -> None:
    """The file is there with all rows, or not at all."""
    unfinished = path.with_name(f".{path.name}")
    with unfinished.open("wb") as file:
        np.save(file, rows)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
