"""What lies where in the folder of a tokenizer artifact."""

from pathlib import Path
from typing import Any

from data.schemas import InputError
from modules.tokenizer.policies import CollisionPolicy

CONFIG = "config.json"


def file_names(
    language: str, policy: CollisionPolicy = CollisionPolicy.DEDUP_CODE, *, has_quantizer: bool = True
) -> dict[str, str]:
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


def only_language(folder: Path, config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The one code language that a configuration holds, and its settings (InputError)."""
    languages = config.get("languages")
    if (
        not isinstance(languages, dict)
        or len(languages) != 1
        or not all(isinstance(s, dict) for s in languages.values())
    ):
        raise InputError(f"{folder / CONFIG} expected one code language under 'languages', got {languages!r}.")
    return next(iter(languages.items()))


def check_versions(path: Path, manifest: dict[str, Any]) -> None:
    """Refuse a manifest whose catalogue version and lineage are not what a tokenizer writes (InputError)."""
    version, lineage = manifest.get("catalogue_version", 1), manifest.get("lineage", [])
    whole = isinstance(lineage, list) and all(isinstance(content_hash, str) for content_hash in lineage)
    if not whole or type(version) is not int or version != 1 + len(lineage):
        raise InputError(
            f"{path} expected a catalogue_version that is one more than the hashes in its lineage, got {version!r} "
            f"and {lineage!r}. Copy the artifact again."
        )
