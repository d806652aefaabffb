"""Recommend items for histories, from a trained model.

    python recommend.py runs/demo/decoder --history KEY KEY
    python recommend.py runs/beauty --input histories.jsonl --output recommended.jsonl --format json --top-k 20
    python recommend.py runs/liger --mode hybrid@20 --history KEY KEY
    torchrun --nproc_per_node 4 recommend.py runs/beauty --input histories.jsonl --output recommended.jsonl

One line of the input is {"user": ..., "history": [item_key, ...]}, oldest item first; one line of the JSON output is
{"user": ..., "items": [{"item_key": ..., "score": ..., "title": ...}, ...], "complete": ...}, the last false where
fewer items than asked for may be listed. The user, if any, is the data source's own key, which models with a user token
read. Lines that cannot be used are reported with their number, the rest goes on, and the exit code is 2.

A run with --input and --output that was stopped or killed goes on where it was when it is started again with the same
arguments, and the output is the same as if nothing had happened; it appears under its name when it is whole. Several
processes share the work, and write what one with as many threads would have written.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluate import check_writable, positive_int, run_script

if TYPE_CHECKING:  # torch is imported where it is used, so that --help is quick
    from serving.answers import Answerer
    from serving.parts import Part, Tally
    from serving.processes import Share, Watch

MAX_SHOWN_WARNINGS = 10


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    return run_script(parse_arguments, recommend, argv)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line as a namespace; exits with code 2 on bad usage."""
    parser = argparse.ArgumentParser(
        prog="recommend.py", description="Recommend items for histories, from a trained model."
    )
    parser.add_argument("artifact", metavar="RUN_OR_ARTIFACT", help="run folder, model artifact or Hub id")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--history", nargs="+", metavar="KEY", help="item keys of one history, oldest first")
    source.add_argument("--input", type=Path, metavar="FILE", help='JSON lines {"user": ..., "history": [KEY, ...]}')
    parser.add_argument("--top-k", type=positive_int, default=10, metavar="K", help="items per history (10)")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="table for people (the default)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write here instead of to the terminal")
    parser.add_argument("--restart", action="store_true", help="forget what a stopped run had written of the output")
    parser.add_argument("--exclude-seen", action="store_true", help="leave out the items of the history itself")
    parser.add_argument("--allow", type=Path, metavar="FILE", help="recommend only these items, one key per line")
    parser.add_argument("--deny", type=Path, metavar="FILE", help="recommend none of these items, one key per line")
    parser.add_argument(
        "--mode", metavar="M", help="generative, dense, hybrid@20, hybrid@all, ... (the artifact's own)"
    )
    parser.add_argument("--beam-width", type=positive_int, metavar="W", help="beams per history (the artifact's own)")
    parser.add_argument(
        "--batch-size", type=positive_int, default=256, metavar="B", help="lines read and ranked at once (256)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    return parser.parse_args(argv)


def recommend(args: argparse.Namespace) -> int:
    """Check what is asked for, load the model, rank and write; returns the exit code."""
    from modules.recommender import Recommender
    from serving.answers import Answerer
    from serving.jsonl import check_input, read_item_keys
    from serving.processes import LostProcessError, Share

    share = Share.of(os.environ)
    check_writable(args.output, "--output")
    check_replaceable(args)
    check_input(args.input, read_again=args.output is not None)
    check_processes(share, args)
    allow, deny = read_item_keys(args.allow), read_item_keys(args.deny)
    with plain_warnings():
        recommender = Recommender.from_pretrained(
            args.artifact,
            device=own_device(args, share),
            beam_width=args.beam_width,
            batch_size=args.batch_size,
            mode=args.mode,
        )
        answerer = Answerer(recommender, args.top_k, args.format, args.exclude_seen, allow, deny)
        if args.input is None:
            return answer_history(answerer, args)
        if args.output is None:
            return answer_to_terminal(answerer, args)
        try:
            return answer_in_parts(answerer, args, share)
        except LostProcessError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1


def check_replaceable(args: argparse.Namespace) -> None:
    """InputError where the output would take the place of what it must not: a device, or a file that is read."""
    from data.schemas import InputError

    if args.output is None or not args.output.exists():
        return
    if not args.output.is_file():
        raise InputError(f"cannot replace {args.output}: it is no regular file. Choose another --output.")
    for path in (args.input, args.allow, args.deny):
        if path is not None and path.exists() and path.samefile(args.output):
            raise InputError(f"cannot replace {args.output}: it is read, too. Choose another --output.")


def check_processes(share: Share, args: argparse.Namespace) -> None:
    """InputError where several processes have nothing to share, or nowhere to put it."""
    from data.schemas import InputError

    if share.num_processes > 1 and (args.input is None or args.output is None):
        raise InputError("several processes share the lines of --input and write --output; give both, or one process.")


def own_device(args: argparse.Namespace, share: Share) -> str | None:
    """The named device; without a name each of several processes takes a GPU of its own while there are any."""
    import torch

    if args.device is not None or share.num_processes == 1 or not torch.cuda.is_available():
        return args.device
    return f"cuda:{int(os.environ.get('LOCAL_RANK', share.rank)) % torch.cuda.device_count()}"


def answer_history(answerer: Answerer, args: argparse.Namespace) -> int:
    """The one history of the command line, to the terminal or to a file."""
    from data.files import replace_file
    from serving.jsonl import Request

    text = answerer.answer([Request(None, args.history)])
    if args.output is None:
        print(text, end="")
        return 0
    with writing(args.output, "Choose another --output."):
        args.output.parent.mkdir(parents=True, exist_ok=True)
        replace_file(args.output, text)
    return 0


def answer_to_terminal(answerer: Answerer, args: argparse.Namespace) -> int:
    """The histories of a file, as they come."""
    from serving.jsonl import read_blocks, with_progress
    from serving.parts import Tally

    tally, began = Tally(), time.monotonic()
    with args.input.open("rb") as stream:
        for block in with_progress(read_blocks(stream, args.batch_size), stream):
            answer = answerer.answer_block(block)
            print(answer.text, end="", flush=True)
            tally.add(answer.num_histories, len(answer.problems), answer.problems)
    return report(args.input, tally, tally.num_histories, time.monotonic() - began)


def answer_in_parts(answerer: Answerer, args: argparse.Namespace, share: Share) -> int:
    """The histories of a file into another file, from where an earlier run has come to."""
    from serving.parts import open_part
    from serving.processes import Watch, merge, wait_for_merge

    began, asked_for = time.monotonic(), identity(answerer, args, share)
    with (
        writing(args.output, "Mend that, and run the same again to go on."),
        open_part(args.output, share.rank, asked_for, restart=args.restart) as part,
    ):
        watch = Watch(part, share)
        answer_own_blocks(answerer, args, part, watch)
        if share.rank > 0:
            wait_for_merge(part, watch)
            return 0
        merged, tally, num_ranked = merge(part, watch)
        if tally.num_histories == 0:
            part.discard()
        else:
            part.publish(merged)
    return report(args.input, tally, num_ranked, time.monotonic() - began)


def answer_own_blocks(answerer: Answerer, args: argparse.Namespace, part: Part, watch: Watch) -> None:
    """Write the blocks of this process that its part does not have yet."""
    from serving.jsonl import read_blocks, with_progress

    num_blocks, share = 0, watch.share
    with args.input.open("rb") as stream:
        if part.last is not None:
            num_blocks = part.last.index + 1
            stream.seek(part.last.input_end)
            if share.rank == 0:
                print(f"going on behind line {num_blocks * args.batch_size:,} of {args.input}", file=sys.stderr)
        blocks = read_blocks(stream, args.batch_size, first=num_blocks)
        for block in with_progress(blocks, stream, shown=share.rank == 0):
            num_blocks = block.index + 1
            watch.look()
            if share.owns(block.index):
                part.append(block.index, block.end, answerer.answer_block(block))
    part.finish(num_blocks)


def identity(answerer: Answerer, args: argparse.Namespace, share: Share) -> dict[str, Any]:
    """All that an output depends on; a run that is asked for anything else does not go on with its beginning."""
    from data.files import file_sha256, json_sha256

    artifact = answerer.recommender.artifact
    assert artifact is not None  # from_pretrained
    catalogue = artifact.catalogue
    ids = catalogue.item_keys if artifact.tokenizer is None else artifact.tokenizer.content_hash
    return {
        "input": file_sha256(args.input),
        "model": json_sha256(artifact.manifest),
        "catalogue": json_sha256([ids, catalogue.titles]),
        "top_k": args.top_k,
        "format": args.format,
        "exclude_seen": args.exclude_seen,
        "allow": None if args.allow is None else file_sha256(args.allow),
        "deny": None if args.deny is None else file_sha256(args.deny),
        "ranker": answerer.recommender.ranker.name,
        "beam_width": args.beam_width,
        "batch_size": args.batch_size,
        "device": artifact.device.type,
        "num_processes": share.num_processes,
    }


def report(path: Path, tally: Tally, num_ranked: int, seconds: float) -> int:
    """Say on stderr which lines cannot be used and how fast it went; returns the exit code.

    Raises:
        InputError: if no line can be used.
    """
    from data.schemas import InputError

    for problem in tally.problems:
        print(f"{path}:{problem.line}: {problem.message}", file=sys.stderr)
    if tally.num_histories == 0:
        raise InputError(f"{path} has no line that can be used. Nothing was written.")
    if tally.num_problems:
        num_lines = tally.num_problems + tally.num_histories
        print(f"{path}: skipped {tally.num_problems:,} of {num_lines:,} lines", file=sys.stderr)
    earlier = tally.num_histories - num_ranked
    print(
        f"{num_ranked:,} histories in {seconds:.1f} s, {num_ranked / max(seconds, 1e-9):,.1f} histories/s"
        + (f"; {earlier:,} were there already" if earlier else ""),
        file=sys.stderr,
    )
    return 2 if tally.num_problems else 0


@contextmanager
def writing(path: Path, advice: str) -> Iterator[None]:
    """What goes wrong on the disk meanwhile as an InputError that names the output and ends in advice."""
    from data.files import disk_problem
    from data.schemas import InputError

    try:
        yield
    except OSError as error:
        reason = disk_problem(error) or error.strerror or error
        raise InputError(f"cannot write {path}: {reason}. {advice}") from error


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Warnings as one line each on stderr, without the line of code that gave them, the first few of many."""
    count = 0

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        nonlocal count
        count += 1
        if count <= MAX_SHOWN_WARNINGS:
            print(f"warning: {message}", file=sys.stderr)
        elif count == MAX_SHOWN_WARNINGS + 1:
            print("warning: more warnings are not shown", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
