"""One hash of all that fixes the meaning of a tokenizer's codes."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def content_hash(config: Mapping[str, Any], item_keys: list[str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a configuration, item keys and tensors (weights, semantic ids), whatever order the tensors come in.

    Args:
        config: JSON-serialisable.
        item_keys: in the order of the rows.
        tensors: by name; name, dtype, shape and values count.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    digest.update(json.dumps(item_keys).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().view(-1).numpy().data)
    return digest.hexdigest()
