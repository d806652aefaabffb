"""Claim: serve.py fails no request at saturation, keeps its queue's bound, and stays even under half of that load.

The server is a process of its own; this one sends requests of one history (3 to 10 items, k = 10) over the loopback
address. Before, its lists are held against those of a Recommender in this process.

    saturation   64 connections, each asking again as soon as it is answered: the rate that the server reaches
    half         requests arrive at random at half that rate; the 99th percentile is at most 5 times the median
    overload     more connections than the queue may hold: answers are 200 or 429, nothing else, and the queue, looked
                 at 20 times a second, never exceeds its bound

    python -m benchmarks.server --artifact RUN_OR_ARTIFACT
    python -m benchmarks.server --quick                    # random weights of the demo's sizes, two seconds a phase
"""

import asyncio
import itertools
import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import REPOSITORY, begin, finish, parser, summarize
from benchmarks.demo_tasks import decoder_config
from benchmarks.http_load import Connection, Outcome, arrive, request_bytes, saturate, watched
from data.schemas import Catalogue, InputError
from modules.artifact import save_model_artifact
from modules.model import EncoderDecoderRetrievalModel
from modules.recommender import Recommender
from modules.rqvae import RqVae, RqVaeConfig
from modules.tokenizer.tokenizer import SemanticIdTokenizer
from training.cli import run_cli

K = 10
NUM_CONNECTIONS = 64
MAX_QUEUE = 256
MAX_RATIO = 5.0
"""Of the 99th percentile to the median at half of saturation."""
TOLERANCE = 1e-3
"""Of log-likelihoods; batches differ in shape."""


def main(argv: Sequence[str]) -> int:
    """Starts the server, verifies, loads it, prints, writes; 1 where a claim fails."""
    options = parser(__doc__)
    options.add_argument("--artifact", help="run folder or model artifact; random weights of the demo's sizes without")
    options.add_argument("--seconds", type=float, help="per phase (20; 2 with --quick)")
    arguments = options.parse_args(argv)
    device = begin(arguments)
    seconds = arguments.seconds or (2.0 if arguments.quick else 20.0)
    with tempfile.TemporaryDirectory() as name:
        artifact = arguments.artifact or save_random_artifact(Path(name) / "model")
        recommender = Recommender.from_pretrained(artifact, device=device)
        case = f"{len(recommender.catalogue):,} items, {'trained' if arguments.artifact else 'random weights'}"
        with started(str(artifact), device) as port:
            asyncio.run(verify(port, recommender))
            rows = asyncio.run(measure(port, recommender.catalogue.item_keys, seconds, case))
    finish("server", rows, arguments, device)
    return 0 if all(row["claim"] != "missed" for row in rows) else 1


@contextmanager
def started(artifact: str, device: str) -> Iterator[int]:
    """The port of a server, stopped afterwards; it must stop in good order.

    Raises:
        InputError: if it does not start.
    """
    command = [sys.executable, "serve.py", artifact, "--port", "0", "--max-queue", str(MAX_QUEUE), "--device", device]
    with subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = []
        try:
            for line in process.stderr:
                said.append(line)
                if found := re.search(r"listening on http://.*:(\d+)$", line):
                    break
            else:
                raise InputError(f"serve.py did not start: {''.join(said)}")
            yield int(found[1])
        finally:
            process.terminate()
            process.communicate()
        if process.returncode != 0:
            raise InputError(f"serve.py ended with code {process.returncode}.")


async def verify(port: int, recommender: Recommender) -> None:
    """Lists of the server are those of a Recommender (AssertionError), scores within a tolerance."""
    connection = Connection(port)
    for _ in range(600):
        if (await connection.ask(request_bytes("GET", "/healthz")))[0] == 200:
            break
        await asyncio.sleep(0.1)
    for body in itertools.islice(bodies(recommender.catalogue.item_keys, seed=1), 20):
        status, answer = await connection.ask(request_bytes("POST", "/recommend", body))
        assert status == 200, answer
        scores = [item["score"] for item in json.loads(answer)["lists"][0]["items"]]
        (expected,) = recommender.recommend([body["history"]], K)
        np.testing.assert_allclose(scores, [item.score for item in expected], atol=TOLERANCE)
    connection.close()


async def measure(port: int, item_keys: list[str], seconds: float, case: str) -> list[dict[str, Any]]:
    """One row per phase."""
    requests = (request_bytes("POST", "/recommend", body) for body in bodies(item_keys))
    await saturate(port, requests, num_connections=NUM_CONNECTIONS, seconds=min(seconds, 2.0))  # to warm up
    full = await saturate(port, requests, num_connections=NUM_CONNECTIONS, seconds=seconds)
    half = await arrive(port, requests, rate=full.rate / 2, seconds=seconds)
    overload = saturate(port, requests, num_connections=2 * MAX_QUEUE, seconds=seconds)
    over = await watched(port, overload, "/metrics", queue_of)
    kept = 0 < max(over.samples, default=0.0) <= MAX_QUEUE and over.num_failed == 0 and 429 in over.statuses
    return [
        row(f"{case}, saturation", full, full.num_failed == 0 and 429 not in full.statuses),
        row(
            f"{case}, half", half, half.num_failed == 0 and tail(half) <= MAX_RATIO, p99_to_median=round(tail(half), 2)
        ),
        row(f"{case}, overload", over, kept, most_in_queue=int(max(over.samples, default=0.0))),
    ]


def row(case: str, outcome: Outcome, holds: bool, **more: float) -> dict[str, Any]:
    """A row of the result."""
    return {
        "case": case,
        "implementation": "ours",
        **summarize(outcome.seconds),
        "p99_ms": round(float(np.percentile(outcome.seconds, 99)) * 1000, 2),
        "answers_per_second": round(outcome.rate, 1),
        "answered": len(outcome.seconds),
        "told_to_wait": outcome.statuses.get(429, 0),
        "failed": outcome.num_failed,
        **more,
        "claim": "met" if holds else "missed",
    }


def tail(outcome: Outcome) -> float:
    """The 99th percentile of the latency, in medians."""
    median, p99 = np.percentile(outcome.seconds, [50, 99])
    return float(p99 / median)


def queue_of(metrics: bytes) -> float:
    """Histories that wait, of the server's metrics."""
    found = re.search(rb"^recommender_queue_histories (\S+)$", metrics, re.MULTILINE)
    assert found is not None
    return float(found[1])


def bodies(item_keys: list[str], seed: int = 0) -> Iterator[dict[str, Any]]:
    """Random requests, the same every time."""
    draw = random.Random(seed)
    while True:
        yield {"history": draw.choices(item_keys, k=draw.randint(3, 10)), "k": K}


def save_random_artifact(folder: Path, num_items: int = 2000) -> Path:
    """A model of the demo's sizes that nobody trained."""
    torch.manual_seed(0)
    rqvae = RqVae(RqVaeConfig(input_dim=32, embed_dim=32, hidden_dims=(64,), codebook_sizes=(128, 64, 64)))
    keys = [f"item-{item}" for item in range(num_items)]
    tokenizer = SemanticIdTokenizer.fit(
        rqvae,
        torch.randn(num_items, 32),
        Catalogue(keys, [f"Title {key}" for key in keys], [""] * num_items),
        feature_description={"encoder": "file"},
        dataset_manifest_hash="",
    )
    model = EncoderDecoderRetrievalModel(decoder_config(tokenizer.level_sizes))
    save_model_artifact(folder, model, tokenizer, {}, ranker_settings={"beam_width": 20, "max_history": 10})
    return folder


if __name__ == "__main__":
    sys.exit(run_cli(main, sys.argv[1:]))
