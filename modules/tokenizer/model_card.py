"""The README of a tokenizer artifact."""

import json
from typing import Any

from modules.tokenizer.collisions import CodebookHealth


def model_card(
    config: dict[str, Any], manifest: dict[str, Any], health: CodebookHealth, *, num_removed: int = 0
) -> str:
    """Markdown with what a person wants to know before using the tokenizer.

    Args:
        config: as in config.json.
        manifest: where features and data came from, and further metrics.
        health: of the ids of all items, without dedup code.
        num_removed: how many of the items are removed.
    """
    ((language, settings),) = config["languages"].items()
    rqvae = settings["rqvae"]
    levels = "\n".join(
        f"| {level} | {size} | {health.use[level]:.1%} | {health.entropy[level]:.2f} |"
        for level, size in enumerate(health.codebook_sizes)
    )
    own = health.as_metrics()
    notes = [f"{name}: {value:g}" for name, value in manifest["metrics"].items() if name not in own]
    if (version := manifest.get("catalogue_version", 1)) > 1:
        notes.append(f"version {version} of the catalogue; items removed since the first: {num_removed:,}")
    extra = "\n".join(f"- {note}" for note in notes)
    return f"""---
tags:
- semantic-ids
- rq-vae
- generative-retrieval
- recommender-systems
---
# Semantic-id tokenizer

{health.num_items:,} items as tuples of codes of the language `{language}`, made by an RQ-VAE
({rqvae["input_dim"]} -> {rqvae["embed_dim"]}, mode `{rqvae["mode"]}`).

| level | codes | in use | entropy (bits) |
|---|---|---|---|
{levels}

- distinct tuples per item, before the dedup code: {health.unique_ratio:.2%}
- collision rate (items that share their tuple): {health.collision_rate:.2%}
- largest group of items on one tuple: {health.largest_group}; the dedup level holds {settings["level_sizes"][-1]}
{extra}

Item features:

```json
{json.dumps(manifest["features"], indent=2, ensure_ascii=False)}
```

```python
from modules.tokenizer.tokenizer import SemanticIdTokenizer

tokenizer = SemanticIdTokenizer.from_pretrained("folder or Hub id")
tokenizer.semantic_ids  # [N, L], the last column is the dedup code
tokenizer.encode(features)  # codes of any items
tokenizer.with_items(item_keys, features)  # a larger catalogue; what it has keeps its ids
```
"""
