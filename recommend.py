"""Recommend items for histories, from a trained model.

    python recommend.py runs/demo --history item-12 item-48
    python recommend.py runs/beauty --input histories.jsonl --output recommended.jsonl --format json --top-k 20

One line of the input is {"user": ..., "history": [item_key, ...]}, oldest item first; one line of the JSON output is
{"user": ..., "items": [{"item_key": ..., "score": ..., "title": ...}, ...]}. The user, if any, is the data source's own
key, which models with a user token read. Lines that cannot be used are reported with their number, the rest goes on,
and the exit code is 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from evaluate import check_writable, positive_int

if TYPE_CHECKING:
    from modules.recommender import Recommendation, Recommender

MAX_SHOWN_PROBLEMS = 10
TITLE_WIDTH = 60


@dataclass(frozen=True)
class Request:
    """One user's history, with whatever the input named the user, and the line it came from."""

    user: Any
    history: list[str]
    line: int = 0

    def user_key(self) -> str | None:
        """The user as the prepared dataset names users: as text; None where there is none."""
        return str(self.user) if isinstance(self.user, str | int) else None


class Problem(NamedTuple):
    """A line of the input that cannot be used."""

    line: int
    message: str


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit code."""
    try:
        args = parse_arguments(argv)
    except SystemExit as leaving:  # argparse has printed its help or message
        return leaving.code if isinstance(leaving.code, int) else 2
    from training.cli import run_cli  # torch is imported from here on, so that --help is quick

    return run_cli(lambda _: recommend(args), argv)


def recommend(args: argparse.Namespace) -> int:
    """Read the histories, rank, and write; returns the exit code."""
    from modules.recommender import Recommender

    check_writable(args.output, "--output")
    requests, problems = ([Request(None, args.history)], []) if args.input is None else read_requests(args.input)
    with plain_warnings():
        recommender = Recommender.from_pretrained(
            args.artifact, device=args.device, beam_width=args.beam_width, batch_size=args.batch_size
        )
        if args.input is not None:
            requests, problems = usable_requests(requests, problems, recommender)
            report_problems(args.input, problems, num_usable=len(requests))
        write = write_json if args.format == "json" else write_table
        with destination(args.output) as stream:
            for request, items in recommend_all(recommender, requests, args):
                write(stream, recommender, request, items)
    return 2 if problems else 0


def parse_arguments(argv: list[str]) -> argparse.Namespace:
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
    parser.add_argument("--exclude-seen", action="store_true", help="leave out the items of the history itself")
    parser.add_argument("--beam-width", type=positive_int, metavar="W", help="beams per history (the artifact's own)")
    parser.add_argument("--batch-size", type=positive_int, default=256, metavar="B", help="histories at once (256)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    return parser.parse_args(argv)


def read_requests(path: Path) -> tuple[list[Request], list[Problem]]:
    """The requests of a file of JSON lines, and the lines that are none; blank lines are passed over."""
    from data.schemas import InputError

    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}. Give a file of JSON lines.") from error
    requests, problems = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            requests.append(parse_request(line, number))
        except ValueError as error:
            problems.append(Problem(number, str(error)))
    return requests, problems


def parse_request(line: bytes, number: int) -> Request:
    """One line of the input; ValueError when it is something else."""
    try:
        content = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    history = content.get("history") if isinstance(content, dict) else None
    if not isinstance(history, list) or not all(isinstance(key, str) for key in history):
        raise ValueError('expected {"user": ..., "history": [item keys as strings, ...]}')
    return Request(content.get("user"), history, number)


def usable_requests(
    requests: list[Request], problems: list[Problem], recommender: Recommender
) -> tuple[list[Request], list[Problem]]:
    """Requests whose history has a known item, and the problems with those of the others, in line order."""
    usable, problems = [], list(problems)
    for request in requests:
        if any(key in recommender for key in request.history):
            usable.append(request)
        else:
            what = "no item of the history is in the catalogue" if request.history else "the history is empty"
            problems.append(Problem(request.line, what))
    return usable, sorted(problems)


def report_problems(path: Path, problems: list[Problem], *, num_usable: int) -> None:
    """Name the lines that cannot be used on stderr, the first few of many; InputError when no line can be."""
    from data.schemas import InputError

    for problem in problems[:MAX_SHOWN_PROBLEMS]:
        print(f"{path}:{problem.line}: {problem.message}", file=sys.stderr)
    if num_usable == 0:
        raise InputError(f"{path} has no line that can be used. Nothing was written.")
    if problems:
        print(f"{path}: skipped {len(problems)} of {len(problems) + num_usable} lines", file=sys.stderr)


def recommend_all(
    recommender: Recommender, requests: list[Request], args: argparse.Namespace
) -> Iterator[tuple[Request, list[Recommendation]]]:
    """Every request with its list, in batches, with a progress bar when someone watches and there are several."""
    from tqdm import tqdm

    several = len(requests) > args.batch_size
    with tqdm(total=len(requests), unit="users", disable=None if several else True) as bar:
        for begin in range(0, len(requests), args.batch_size):
            batch = requests[begin : begin + args.batch_size]
            lists = recommender.recommend(
                [request.history for request in batch],
                args.top_k,
                users=[request.user_key() for request in batch],
                exclude_seen=args.exclude_seen,
            )
            yield from zip(batch, lists, strict=True)
            bar.update(len(batch))


def write_json(stream: TextIO, _: Recommender, request: Request, items: list[Recommendation]) -> None:
    """One line of JSON."""
    content = {"user": request.user, "items": [asdict(item) for item in items]}
    stream.write(json.dumps(content, ensure_ascii=False) + "\n")


def write_table(stream: TextIO, recommender: Recommender, request: Request, items: list[Recommendation]) -> None:
    """The history by title, then the ranked items."""
    if request.user is not None:
        stream.write(f"User {request.user}\n")
    stream.write("History, oldest first\n")
    for key in request.history:
        if key in recommender:
            stream.write(f"      {shortened(recommender.display_name(key)):{TITLE_WIDTH}}  {key}\n")
    width = max((len(item.item_key) for item in items), default=0)
    stream.write("Recommended\n")
    for rank, item in enumerate(items, start=1):
        title = shortened(item.title or item.item_key)
        stream.write(f"{rank:4}. {title:{TITLE_WIDTH}}  {item.item_key:{width}}  {item.score:9.4f}\n")
    stream.write("\n")


def shortened(title: str) -> str:
    """A title that fits its column."""
    title = " ".join(title.split())
    return title if len(title) <= TITLE_WIDTH else title[: TITLE_WIDTH - 3] + "..."


@contextmanager
def destination(path: Path | None) -> Iterator[TextIO]:
    """The terminal, or a file that appears under its name only when it is whole."""
    if path is None:
        yield sys.stdout
        return
    from data.files import disk_problem
    from data.schemas import InputError

    temporary = path.with_name(f".{path.name}.new-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as stream:
            yield stream
        temporary.replace(path)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {disk_problem(error) or error.strerror}. Choose another --output."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Warnings as one line each on stderr, without the line of code that gave them."""
    show: Callable[..., None] = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
