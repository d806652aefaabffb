"""The README of a tokenizer artifact."""

import json
from collections.abc import Mapping
from typing import Any

from modules.tokenizer.collisions import CodebookHealth
from modules.tokenizer.policies import CollisionPolicy


def model_card(
    config: dict[str, Any], manifest: dict[str, Any], health: CodebookHealth, *, num_removed: int = 0
) -> str:
    """Markdown with what a person wants to know before using the tokenizer.

    Args:
        config: as in config.json.
        manifest: where features and data came from, and further metrics.
        health: of the quantizer's codes of all items, before collisions are handled.
        num_removed: how many of the items are removed.
    """
    ((language, settings),) = config["languages"].items()
    policy = CollisionPolicy(settings["collision_policy"])
    levels = "\n".join(
        f"| {level} | {size} | {health.use[level]:.1%} | {health.entropy[level]:.2f} |"
        for level, size in enumerate(health.codebook_sizes)
    )
    own = health.as_metrics()
    metrics = manifest.get("metrics", {})
    notes = [f"{name}: {value:g}" for name, value in metrics.items() if name not in own]
    if (version := manifest.get("catalogue_version", 1)) > 1:
        notes.append(f"version {version} of the catalogue; items removed since the first: {num_removed:,}")
    if command := manifest.get("provenance", {}).get("command"):
        notes.append(f"trained by `{command}`")
    extra = "\n".join(f"- {note}" for note in notes)
    return f"""---
tags:
- semantic-ids
- rq-vae
- generative-retrieval
- recommender-systems
---
# Semantic-id tokenizer

{health.num_items:,} items as tuples of codes of the language `{language}`, {_maker(settings.get("rqvae"))}.

| level | codes | in use | entropy (bits) |
|---|---|---|---|
{levels}

- distinct tuples per item, before collisions are handled: {health.unique_ratio:.2%}
- collision rate (items that share their tuple): {health.collision_rate:.2%}
- largest group of items on one tuple: {health.largest_group}
- collision policy `{policy.value}`: {_handling(policy, settings["level_sizes"], metrics)}
{extra}

Item features:

```json
{json.dumps(manifest.get("features", {}), indent=2, ensure_ascii=False)}
```

```python
from modules.tokenizer.tokenizer import SemanticIdTokenizer

tokenizer = SemanticIdTokenizer.from_pretrained("folder or Hub id")
tokenizer.semantic_ids  # {_shape(policy)}
{_USES_OF_A_QUANTIZER if "rqvae" in settings else _USES_OF_IDS_ALONE}
```
"""


_USES_OF_A_QUANTIZER = """tokenizer.encode(features)  # codes of any items
tokenizer.with_items(item_keys, features)  # a larger catalogue; what it has keeps its ids"""

_USES_OF_IDS_ALONE = "tokenizer.without_items(item_keys)  # a smaller catalogue; the others keep their ids"


def _maker(rqvae: Mapping[str, Any] | None) -> str:
    if rqvae is None:
        return "which were imported without their quantizer, so that items cannot be added"
    if rqvae.get("encoder") == "identity":
        return f"made by residual quantization of the features themselves (width {rqvae['input_dim']})"
    mode = rqvae["mode"] if isinstance(rqvae["mode"], str) else ", ".join(rqvae["mode"])
    return f"made by an RQ-VAE\n({rqvae['input_dim']} -> {rqvae['embed_dim']}, mode `{mode}`)"


def _handling(policy: CollisionPolicy, level_sizes: list[int], metrics: Mapping[str, float]) -> str:
    if policy is CollisionPolicy.DEDUP_CODE:
        return f"one more level tells items of one tuple apart; it holds {level_sizes[-1]}"
    if policy is CollisionPolicy.NEAREST_FREE:
        return f"{metrics['semantic_ids/moved']:,.0f} items were moved to the nearest free tuple; no two share one"
    return "items share tuples; `collisions.json` lists them"


def _shape(policy: CollisionPolicy) -> str:
    return "[N, L]" + (", the last column is the dedup code" if policy is CollisionPolicy.DEDUP_CODE else "")
