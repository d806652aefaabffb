"""The files of a tokenizer artifact: what is written, and what is verified when they are read."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from data.schemas import Catalogue, InputError, read_safetensors
from modules.rqvae import RqVae, RqVaeConfig
from modules.tokenizer.artifact_folder import (
    MANIFEST,
    file_hashes,
    read_json,
    read_manifest,
    verify_files,
    write_artifact,
    write_json,
)
from modules.tokenizer.collisions import codebook_health
from modules.tokenizer.frozen_ids import FrozenIds
from modules.tokenizer.legacy import has_older_layout
from modules.tokenizer.model_card import model_card
from modules.tokenizer.policies import CollisionPolicy

KIND = "semantic-id tokenizer"
FORMAT_VERSION = 2
CONFIG = "config.json"

_WRITTEN_FIELDS = ("kind", "format_version", "content_hash", "files")


def write_tokenizer(folder: Path, tokenizer: FrozenIds) -> None:
    """Write an artifact, whole or not at all; an older tokenizer artifact at that place is replaced.

    Raises:
        InputError: if something else is there, or the place cannot be written.
    """
    write_artifact(folder, KIND, lambda temporary: _write_files(temporary, tokenizer))


def read_tokenizer(folder: Path) -> tuple[dict[str, Any], Any]:
    """What a folder holds, verified file by file.

    Returns:
        The arguments of `FrozenIds`, and the content hash that the manifest states.

    Raises:
        InputError: if it is missing, damaged, of a newer format, or not a tokenizer artifact.
        KeyError, TypeError, RuntimeError: if its files do not fit each other.
    """
    if has_older_layout(folder):
        raise InputError(
            f"{folder} holds an RQ-VAE of the older layout, which has weights but no semantic ids. Compute them "
            "from item features: SemanticIdTokenizer.fit(load_legacy(path), features, ...)."
        )
    manifest = read_manifest(folder, KIND, FORMAT_VERSION, [CONFIG])
    _check_versions(folder / MANIFEST, manifest)
    language, settings = _only_language(folder, read_json(folder / CONFIG))
    policy = _policy(folder, settings)
    names = _file_names(language, policy, has_quantizer="rqvae" in settings)
    verify_files(folder, manifest, names.values())
    ids = read_safetensors(folder / names["semantic_ids"])
    arguments = {
        "rqvae": _rqvae(folder, settings["rqvae"], names["quantizer"]) if "rqvae" in settings else None,
        "semantic_ids": ids["semantic_ids"],
        "level_sizes": tuple(settings["level_sizes"]),
        "catalogue": Catalogue.load(folder / names["catalogue"]),
        "language": language,
        "manifest": {key: value for key, value in manifest.items() if key not in _WRITTEN_FIELDS},
        "available": ids.get("available"),
        "collision_policy": policy,
        "nearest_codes": ids.get("nearest_codes"),
    }
    return arguments, manifest.get("content_hash")


@contextmanager
def naming(place: Path) -> Iterator[None]:
    """What turns out not to fit meanwhile says where it lies."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def _write_files(folder: Path, tokenizer: FrozenIds) -> None:
    policy, manifest = tokenizer.collision_policy, tokenizer.described()
    names = _file_names(tokenizer.language, policy, has_quantizer=tokenizer.rqvae is not None)
    for name in names.values():
        (folder / name).parent.mkdir(exist_ok=True)
    config = {"languages": {tokenizer.language: tokenizer.settings()}}
    write_json(folder / CONFIG, config)
    if tokenizer.rqvae is not None:
        save_file(tokenizer.weights(), folder / names["quantizer"])
    ids = {**tokenizer.ids(), "semantic_ids": tokenizer.semantic_ids.int()}
    if policy is CollisionPolicy.NEAREST_FREE:
        ids["nearest_codes"] = tokenizer.nearest_codes.int()
    save_file(ids, folder / names["semantic_ids"])
    tokenizer.catalogue.save(folder / names["catalogue"])
    if policy is CollisionPolicy.NONE:
        _write_collisions(folder / names["collisions"], tokenizer)
    written = {
        "kind": KIND,
        "format_version": FORMAT_VERSION,
        "content_hash": tokenizer.content_hash,
        "files": file_hashes(folder, names.values()),
    }
    write_json(folder / MANIFEST, {**written, **manifest})
    health = codebook_health(tokenizer.nearest_codes, tokenizer.codebook_sizes)
    card = model_card(config, manifest, health, num_removed=tokenizer.num_items - tokenizer.num_available)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _write_collisions(path: Path, tokenizer: FrozenIds) -> None:
    """The items of every shared id, a line per id and the fullest first."""
    keys = tokenizer.catalogue.item_keys
    groups = [
        {"codes": tokenizer.semantic_ids[group[0]].tolist(), "item_keys": [keys[item_id] for item_id in group]}
        for group in tokenizer.collisions()
    ]
    lines = ",\n".join(json.dumps(group, ensure_ascii=False) for group in groups)
    path.write_text(f'{{"num_ids": {len(groups)}, "groups": [\n{lines}\n]}}\n', encoding="utf-8")


def _file_names(language: str, policy: CollisionPolicy, *, has_quantizer: bool) -> dict[str, str]:
    """Names, inside the folder, of the files that the manifest lists.

    Args:
        language: of the codes.
        policy: the one that lists what shares an id does so in a file.
        has_quantizer: false for ids that came without one.
    """
    names = {
        "config": CONFIG,
        "semantic_ids": f"semantic_ids/{language}.safetensors",
        "catalogue": "catalogue.safetensors",
    }
    if has_quantizer:
        names["quantizer"] = f"quantizers/{language}.safetensors"
    if policy is CollisionPolicy.NONE:
        names["collisions"] = "collisions.json"
    return names


def _only_language(folder: Path, config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The one code language that a configuration holds, and its settings (InputError)."""
    languages = config.get("languages")
    if (
        not isinstance(languages, dict)
        or len(languages) != 1
        or not all(isinstance(s, dict) for s in languages.values())
    ):
        raise InputError(f"{folder / CONFIG} expected one code language under 'languages', got {languages!r}.")
    return next(iter(languages.items()))


def _check_versions(path: Path, manifest: dict[str, Any]) -> None:
    """Refuse a manifest whose catalogue version and lineage are not what a tokenizer writes (InputError)."""
    version, lineage = manifest.get("catalogue_version", 1), manifest.get("lineage", [])
    whole = isinstance(lineage, list) and all(isinstance(content_hash, str) for content_hash in lineage)
    if not whole or type(version) is not int or version != 1 + len(lineage):
        raise InputError(
            f"{path} expected a catalogue_version that is one more than the hashes in its lineage, got {version!r} "
            f"and {lineage!r}. Copy the artifact again."
        )


def _policy(folder: Path, settings: Mapping[str, Any]) -> CollisionPolicy:
    """That of a language's settings; those of format 1 name none, since there was only one."""
    name = settings.get("collision_policy", CollisionPolicy.DEDUP_CODE.value)
    known = [policy.value for policy in CollisionPolicy]
    if name not in known:
        raise InputError(f"{folder / CONFIG} expected a collision_policy of {', '.join(known)}, got {name!r}.")
    return CollisionPolicy(name)


def _rqvae(folder: Path, config: dict[str, Any], weights: str) -> RqVae:
    state = read_safetensors(folder / weights)
    with naming(folder):
        return RqVae.from_weights(RqVaeConfig.from_dict(config), state)
