"""Work with semantic ids that are there: look at them, give them to more items, exchange them with others.

    python semantic_ids.py report runs/beauty/rqvae --features embeddings.parquet
    python semantic_ids.py assign runs/beauty/rqvae --features millions.npy --output ids     # torchrun shares the work
    python semantic_ids.py export runs/beauty/rqvae beauty.index.json         # or beauty.parquet
    python semantic_ids.py import beauty.index.json published --keys beauty.item2id
    python semantic_ids.py publish runs/beauty/rqvae trained_models/beauty
    python semantic_ids.py push trained_models/beauty OWNER/NAME
    python semantic_ids.py pull OWNER/NAME tokenizer

ARTIFACT is the folder of a tokenizer artifact, of a model artifact or of a run that wrote one, or a Hub id. An index
file is {"item": ["<a_1>", "<b_2>", ...], ...}; `python semantic_ids.py ACTION --help` says what else an action takes.
Imported ids have no quantizer: models train on them, but new items cannot be given codes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evaluate import check_writable, positive_int, run_script, usable_device
from recommend import own_device

if TYPE_CHECKING:  # torch is imported where it is used, so that --help is quick
    from data.schemas import Catalogue
    from modules.tokenizer.index_file import Index
    from modules.tokenizer.tokenizer import SemanticIdTokenizer

FORMATS = (".json", ".parquet")


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    return run_script(parse_arguments, lambda args: args.action(args), argv)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line as a namespace, its action a function of it; exits with code 2 on bad usage."""
    parser = argparse.ArgumentParser(prog="semantic_ids.py", description="Look at, assign and exchange semantic ids.")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    _add_report(actions)
    _add_assign(actions)
    _add_export(actions)
    _add_import(actions)
    _add_publish(actions)
    _add_hub(actions)
    return parser.parse_args(argv)


def _add_action(
    actions: argparse._SubParsersAction, name: str, command: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.set_defaults(action=command)
    return parser


def _add_artifact(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", metavar="ARTIFACT", help="folder of an artifact or of its run, or Hub id")


def _add_report(actions: argparse._SubParsersAction) -> None:
    parser = _add_action(actions, "report", report, "write a page that says whether the ids are healthy, and why")
    _add_artifact(parser)
    parser.add_argument(
        "--features", type=Path, metavar="FILE", help="what the ids were made from, for reconstruction and neighbours"
    )
    parser.add_argument("--metrics-log", type=Path, metavar="FILE", help="metrics.jsonl of the run, for its curves")
    parser.add_argument(
        "--output", type=Path, default=Path("report"), metavar="FOLDER", help="for index.html, metrics.json (report)"
    )


def _add_assign(actions: argparse._SubParsersAction) -> None:
    parser = _add_action(actions, "assign", assign_ids, "give codes to the rows of a feature file of any length")
    _add_artifact(parser)
    parser.add_argument(
        "--features",
        type=Path,
        required=True,
        metavar="FILE",
        help=".npy or .safetensors, NAME.keys.txt beside it or not; .parquet with item_key and embedding, or a folder",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="shards; continued where it is begun"
    )
    parser.add_argument(
        "--rows-per-shard", type=positive_int, default=100_000, metavar="N", help="rows of a shard (100000)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")


def _add_export(actions: argparse._SubParsersAction) -> None:
    parser = _add_action(actions, "export", export_ids, "write the ids of all items as an index file or as parquet")
    _add_artifact(parser)
    parser.add_argument("output", type=Path, metavar="OUT", help="file to write, OUT.index.json or OUT.parquet")


def _add_import(actions: argparse._SubParsersAction) -> None:
    parser = _add_action(actions, "import", import_ids, "make a tokenizer artifact of the ids of an index file")
    parser.add_argument("index", type=Path, metavar="FILE.index.json", help="the ids")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="artifact to write")
    parser.add_argument("--keys", type=Path, metavar="TSV", help="lines KEY<TAB>ITEM: item keys for the file's items")
    items = parser.add_mutually_exclusive_group()
    items.add_argument("--titles", type=Path, metavar="TSV", help="lines KEY<TAB>TITLE")
    items.add_argument(
        "--dataset", type=Path, metavar="DIR", help="prepared dataset to train on: its items in its order, its titles"
    )
    parser.add_argument(
        "--collisions",
        choices=("dedup_code", "none"),
        default="dedup_code",
        help="what items on one id get: a dedup code as one more level (the default), or nothing",
    )
    parser.add_argument(
        "--codebook-sizes", type=positive_int, nargs="+", metavar="K", help="codes per level (the largest + 1)"
    )
    parser.add_argument(
        "--language", metavar="NAME", help="code language (text; image where the letters are upper case)"
    )


def _add_publish(actions: argparse._SubParsersAction) -> None:
    text = "copy a run's tokenizer without titles and categories, with the run's config, command and metrics"
    parser = _add_action(actions, "publish", publish, text)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder that train_rqvae.py wrote")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="artifact to write")


def _add_hub(actions: argparse._SubParsersAction) -> None:
    parser = _add_action(actions, "push", push, "upload a tokenizer to the Hugging Face Hub")
    _add_artifact(parser)
    parser.add_argument("repository", metavar="OWNER/NAME", help="Hub repository, made where it is missing")
    parser.add_argument(
        "--private", action="store_true", help="hide a repository that is made now (its owner's default)"
    )
    parser = _add_action(actions, "pull", pull, "download a tokenizer from the Hugging Face Hub, verified")
    parser.add_argument("artifact", metavar="OWNER/NAME", help="Hub repository, or a folder to be copied")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="artifact to write")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit (main)")


def report(args: argparse.Namespace) -> int:
    """Write a report and print its verdict; returns the exit code."""
    from data.aligned_features import align_features
    from data.feature_files import open_features
    from modules.tokenizer.artifact_folder import read_json
    from reports.tokenizer.report import METRICS, write_tokenizer_report

    check_writable(args.output / METRICS, "--output")
    tokenizer = load_tokenizer(args.artifact)
    features = None
    if args.features is not None:
        features = align_features(open_features(args.features), tokenizer.catalogue.item_keys)
    page = write_tokenizer_report(args.output, tokenizer, features, metrics_log=args.metrics_log)
    print(f"{page}: {read_json(args.output / METRICS)['verdict']['headline']}")
    return 0


def assign_ids(args: argparse.Namespace) -> int:
    """Write shards of codes, as one of several processes where torchrun says so; returns the exit code."""
    from data.feature_files import open_features
    from serving.assignment import assign
    from serving.processes import LostProcessError, Share

    share = Share.of(os.environ)
    features = open_features(args.features)
    tokenizer = load_tokenizer(args.artifact)
    if tokenizer.rqvae is not None:  # imported ids have none, and are refused
        tokenizer.rqvae.to(usable_device(own_device(args, share)))
    try:
        done = assign(
            tokenizer,
            features,
            args.output,
            rows_per_shard=args.rows_per_shard,
            process_index=share.rank,
            num_processes=share.num_processes,
            progress=share.rank == 0,
        )
    except LostProcessError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    rate = done.num_assigned / max(done.seconds, 1e-9)
    print(
        f"{args.output}: {done.num_assigned:,} of {done.num_rows:,} rows given codes by this process in "
        f"{done.seconds:.1f} s, {rate:,.0f} rows/s; {done.num_shards:,} shards",
        file=sys.stderr,
    )
    return 0


def export_ids(args: argparse.Namespace) -> int:
    """Write an index file or a parquet table; returns the exit code."""
    from data.schemas import InputError
    from modules.tokenizer.index_file import letters_of, write_index
    from serving.id_tables import available_rows, write_id_table

    if args.output.suffix not in FORMATS:
        raise InputError(f"cannot write {args.output}: its name must end in .index.json or .parquet.")
    check_writable(args.output, "OUT")
    tokenizer = load_tokenizer(args.artifact)
    rows = available_rows(tokenizer)
    letters = letters_of(tokenizer.language, tokenizer.semantic_ids.shape[1])
    if args.output.suffix == ".parquet":
        write_id_table(args.output, tokenizer, letters)
    else:
        item_keys = [tokenizer.catalogue.item_keys[row] for row in rows.tolist()]
        write_index(args.output, item_keys, tokenizer.semantic_ids[rows], letters)
    removed = tokenizer.num_items - len(rows)
    print(f"{args.output}: {len(rows):,} items" + (f"; {removed:,} removed ones are left out" if removed else ""))
    return 0


def import_ids(args: argparse.Namespace) -> int:
    """Read an index file and write an artifact; returns the exit code."""
    from data.files import file_sha256
    from modules.tokenizer.index_file import read_index
    from modules.tokenizer.policies import CollisionPolicy
    from modules.tokenizer.tokenizer import SemanticIdTokenizer
    from serving.id_tables import by_second

    index = read_index(args.index)
    if args.keys is not None:
        index = index.renamed(by_second(args.keys), args.keys)
    index, catalogue, dataset_hash = described(index, args)
    tokenizer = SemanticIdTokenizer.from_ids(
        index.codes,
        codebook_sizes(index, args.codebook_sizes),
        catalogue,
        language=args.language or ("image" if index.letters.isupper() else "text"),
        collisions=CollisionPolicy(args.collisions),
        manifest={
            "features": {},
            "dataset_manifest_hash": dataset_hash,
            "provenance": {"imported_from": args.index.name, "file_sha256": file_sha256(args.index)},
        },
    )
    tokenizer.save_pretrained(args.folder)
    print(f"{args.folder}: {describe_ids(tokenizer)}")
    return 0


def codebook_sizes(index: Index, wanted: Sequence[int] | None) -> tuple[int, ...]:
    """Codes per level as wanted, else as few as hold those of the file (InputError where fewer are wanted)."""
    from data.schemas import InputError

    needed = index.codebook_sizes
    if wanted is None:
        return needed
    if len(wanted) != len(needed) or any(size < least for size, least in zip(wanted, needed, strict=True)):
        raise InputError(
            f"--codebook-sizes expected {len(needed)} numbers for the levels of {index.path}, of at least "
            f"{' '.join(map(str, needed))}, got {' '.join(map(str, wanted))}."
        )
    return tuple(wanted)


def described(index: Index, args: argparse.Namespace) -> tuple[Index, Catalogue, str]:
    """The ids and items in their order, and the hash of the dataset that they are of, "" of none."""
    from data.processed import PreparedDataset
    from data.schemas import InputError
    from serving.id_tables import by_first, titled

    if args.dataset is not None:
        dataset = PreparedDataset(args.dataset)
        return index.aligned(dataset.catalogue.item_keys, args.dataset), dataset.catalogue, dataset.manifest_hash
    titles = {} if args.titles is None else by_first(args.titles)
    if titles and not titles.keys() & set(index.item_keys):
        raise InputError(
            f"{args.titles} has a title of none of the {len(index.item_keys):,} items, such as {index.item_keys[0]!r}. "
            "Its lines are KEY<TAB>TITLE; give --keys too if the index file numbers its items."
        )
    return index, titled(index.item_keys, titles), ""


def describe_ids(tokenizer: SemanticIdTokenizer) -> str:
    """One line that counts items, and those on the same codes before the collision policy told them apart."""
    from modules.tokenizer.collisions import codebook_health

    sizes = tokenizer.codebook_sizes
    health = codebook_health(tokenizer.nearest_codes, sizes)
    num_groups = health.num_distinct - (health.num_items - health.num_colliding)
    groups = f"{num_groups:,} group{'' if num_groups == 1 else 's'} of at most {health.largest_group}"
    shared = f"{health.num_colliding:,} items share theirs in {groups}"
    return (
        f"{health.num_items:,} items, {len(sizes)} levels of {', '.join(map(str, sizes))} codes; "
        f"{health.num_distinct:,} distinct tuples, {shared if num_groups else 'no two items share theirs'}; "
        f"collision policy {tokenizer.collision_policy.value}"
    )


def publish(args: argparse.Namespace) -> int:
    """Write a run's artifact without third-party texts, and beside it what made it; returns the exit code."""
    from data.files import without_paths
    from data.schemas import InputError
    from modules.tokenizer.artifact_folder import read_json, write_json

    config, environment = args.run / "config.gin", args.run / "env.json"
    if not config.is_file() or not environment.is_file():
        raise InputError(f"{args.run} expected the folder of a run, got one without config.gin or env.json.")
    command, metrics = read_json(environment).get("command"), read_json(args.run / "metrics.json")
    if not isinstance(command, str):
        raise InputError(f"{environment} expected the command of the run, got {command!r}. Copy the run again.")
    tokenizer = load_tokenizer(str(args.run)).without_texts(command=without_paths(command))
    tokenizer.save_pretrained(args.folder)
    (args.folder / "config.gin").write_text(without_paths(config.read_text(encoding="utf-8")), encoding="utf-8")
    write_json(args.folder / "metrics.json", metrics)
    print(f"{args.folder}: {describe_ids(tokenizer)}, without titles and categories")
    return 0


def push(args: argparse.Namespace) -> int:
    """Upload an artifact and print the commit's address; returns the exit code."""
    print(load_tokenizer(args.artifact).push_to_hub(args.repository, private=args.private))
    return 0


def pull(args: argparse.Namespace) -> int:
    """Download an artifact into a folder; returns the exit code."""
    tokenizer = load_tokenizer(args.artifact, revision=args.revision)
    tokenizer.save_pretrained(args.folder)
    print(f"{args.folder}: {describe_ids(tokenizer)}")
    return 0


def load_tokenizer(place: str, *, revision: str | None = None) -> SemanticIdTokenizer:
    """The tokenizer of an artifact, a model artifact or a run, all of them a folder or a Hub id (InputError)."""
    from data.schemas import InputError
    from modules import artifact
    from modules.tokenizer import stored
    from modules.tokenizer.hub import resolve_folder
    from modules.tokenizer.tokenizer import SemanticIdTokenizer

    folder = resolve_folder(place, revision=revision)
    inside = (folder / "model", folder / "tokenizer", folder / "model" / "tokenizer")
    found = [path for path in (folder, *inside) if _kind(path) == stored.KIND]
    if not found and artifact.KIND in (_kind(folder), _kind(folder / "model")):
        raise InputError(
            f"{folder} holds a model without semantic ids. Give the run or the artifact of one that works on them."
        )
    return SemanticIdTokenizer.from_pretrained(found[0] if found else folder)


def _kind(folder: Path) -> str | None:
    """What an artifact in a folder says of itself that it is."""
    from modules.tokenizer.artifact_folder import MANIFEST, read_json

    return read_json(folder / MANIFEST).get("kind") if (folder / MANIFEST).is_file() else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
