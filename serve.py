"""Serve recommendations of a trained model over HTTP, with a page for people.

    pip install -r requirements-serve.txt
    python serve.py runs/demo/decoder                                # http://127.0.0.1:8000, this machine only
    python serve.py runs/beauty --host 0.0.0.0 --token-env TOKEN     # reachable, with a token from the environment
    python serve.py runs/beauty --save runs/beauty_grown             # keeps what POST /items adds and removes

    curl -s localhost:8000/recommend -H 'Content-Type: application/json' -d '{"history": ["KEY", "KEY"], "k": 5}'

POST /recommend, POST /items (add, remove), GET /items?query=, GET /healthz, GET /metrics, and the page at GET /. Errors
are {"error": {"field": ..., "message": ...}}. SIGTERM or Ctrl-C stops it once what it accepted is answered; code 0.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from evaluate import positive_int, run_script

if TYPE_CHECKING:  # torch and the web framework are imported where they are used, so that --help is quick
    import uvicorn

    from serving.app import Settings

KEEP_ALIVE_SECONDS = 75
"""Longer than the minute that load balancers keep idle connections: the side that sends next should not be cut off."""

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")


def main(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    return run_script(parse_arguments, serve, argv)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line as a namespace; exits with code 2 on bad usage."""
    parser = argparse.ArgumentParser(prog="serve.py", description="Serve recommendations of a trained model over HTTP.")
    parser.add_argument("artifact", metavar="RUN_OR_ARTIFACT", help="run folder, model artifact or Hub id")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any that is free (8000)")
    token = parser.add_mutually_exclusive_group()
    token.add_argument("--token-env", metavar="NAME", help="environment variable with the token that requests carry")
    token.add_argument("--token-file", type=Path, metavar="FILE", help="file with the token that requests carry")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="where the artifact is saved as its items change")
    parser.add_argument("--text-model", type=Path, metavar="FOLDER", help="the artifact's local sentence-transformer")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    parser.add_argument(
        "--mode", metavar="M", help="generative, dense, hybrid@20, hybrid@all, ... (the artifact's own)"
    )
    parser.add_argument("--beam-width", type=positive_int, metavar="W", help="beams per history (the artifact's own)")
    parser.add_argument("--max-batch", type=positive_int, default=64, metavar="B", help="histories per batch (64)")
    parser.add_argument("--max-wait-ms", type=float, default=2.0, metavar="MS", help="wait for a fuller batch (2)")
    parser.add_argument("--max-queue", type=positive_int, default=256, metavar="Q", help="histories that wait (256)")
    parser.add_argument("--max-histories", type=positive_int, default=64, metavar="N", help="per request (64)")
    parser.add_argument("--max-k", type=positive_int, default=100, metavar="K", help="items per list (100)")
    parser.add_argument("--timeout", type=float, default=10.0, metavar="SECONDS", help="to answer a request (10)")
    return parser.parse_args(argv)


def serve(args: argparse.Namespace) -> int:
    """Load the model and answer until a signal comes; returns the exit code."""
    check_packages()
    settings = settings_of(args)
    check_save(args.save, args.artifact)
    with listening_socket(args.host, args.port) as listener:  # before the model is loaded, which takes a while
        server = build_server(args, settings)
        listener.listen(server.config.backlog)  # from here on nobody is refused
        greet(listener, settings)
        with suppress(KeyboardInterrupt):  # uvicorn stops in good order, then raises the signal again
            server.run(sockets=[listener])
    return 0


def build_server(args: argparse.Namespace, settings: Settings) -> uvicorn.Server:
    """The model behind the web application, ready to run."""
    import uvicorn

    from data.encoders.new_items import NewItemEncoder
    from modules.recommender import Recommender
    from serving.app import create_app
    from serving.service import RecommendService

    recommender = Recommender.from_pretrained(
        args.artifact, device=args.device, beam_width=args.beam_width, batch_size=args.max_batch, mode=args.mode
    )
    if args.save is not None and not args.save.exists():
        recommender.save_pretrained(args.save)  # what cannot be written is found out now, and a restart finds it
    assert recommender.artifact is not None  # from_pretrained gives one
    tokenizer = recommender.artifact.tokenizer
    features = {} if tokenizer is None else tokenizer.manifest.get("features", {})
    service = RecommendService(
        recommender, save_to=args.save, encode_texts=NewItemEncoder.of(features, args.text_model)
    )
    print(f"{service.num_items:,} items of {args.artifact}, ranked by {service.mode}", file=sys.stderr)
    config = uvicorn.Config(
        create_app(service, settings),
        log_level="warning",
        access_log=False,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(2 * settings.limits.timeout),
    )
    server = uvicorn.Server(config)
    gc.collect()
    gc.freeze()  # what is loaded stays: looking through it again and again would hold answers up for 0.1 s
    return server


def greet(listener: socket.socket, settings: Settings) -> None:
    """Say on stderr where the server is found, and who may use it where that is everybody."""
    host, port = listener.getsockname()[:2]
    if settings.token is None and not settings.loopback_only:
        print(f"warning: whoever reaches {host} may use this server; see --token-env", file=sys.stderr)
    print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}", file=sys.stderr, flush=True)


def check_packages() -> None:
    """InputError when the web packages are missing."""
    from data.schemas import InputError

    missing = [name.replace("_", "-") for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise InputError(f"serve.py needs {', '.join(missing)}: pip install -r requirements-serve.txt.")


def settings_of(args: argparse.Namespace) -> Settings:
    """The command line's settings; InputError where they contradict each other."""
    from data.schemas import InputError
    from serving.app import Limits, Settings
    from serving.requests import DEFAULT_K

    if args.max_queue < args.max_histories:
        raise InputError(
            f"--max-queue {args.max_queue} is less than --max-histories {args.max_histories}: such a request would "
            "never be accepted. Raise the one or lower the other."
        )
    if args.max_k < DEFAULT_K:
        raise InputError(f"--max-k {args.max_k} is less than {DEFAULT_K}, which requests get that do not say.")
    if not (0 < args.timeout < math.inf and 0 <= args.max_wait_ms < math.inf):
        raise InputError(
            f"expected --timeout above 0 and --max-wait-ms from 0, got {args.timeout}, {args.max_wait_ms}."
        )
    return Settings(
        limits=Limits(max_histories=args.max_histories, max_k=args.max_k, timeout=args.timeout),
        max_batch=args.max_batch,
        max_wait=args.max_wait_ms / 1000,
        max_queue=args.max_queue,
        token=read_token(args),
        loopback_only=is_loopback(args.host),
    )


def check_save(save: Path | None, artifact: str) -> None:
    """InputError when --save would replace another artifact than the served one, such as an earlier server's."""
    from data.schemas import InputError

    served = Path(artifact, "model") if Path(artifact, "model").is_dir() else Path(artifact)
    if save is not None and save.resolve() == Path(artifact).resolve() != served.resolve():
        raise InputError(f"--save {save} is a run folder; to change the artifact in it: --save {served}.")
    if save is not None and save.exists() and save.resolve() != served.resolve():
        raise InputError(
            f"--save {save} exists, and is not the artifact that is served. To go on with it: serve.py {save} --save "
            f"{save}. To begin anew, choose another folder."
        )


def read_token(args: argparse.Namespace) -> str | None:
    """The token, never from the command line, which every user of the machine can read; None when none is asked for."""
    from data.schemas import InputError

    if args.token_env is None and args.token_file is None:
        return None
    if args.token_file is not None:
        source = str(args.token_file)
        try:
            token = args.token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the token from {source}: {error}.") from error
    else:
        source = f"the environment variable {args.token_env}"
        token = os.environ.get(args.token_env, "").strip()
    if not token or not all("!" <= character <= "~" for character in token):
        raise InputError(f"{source} expected a token of visible ASCII characters, got {'other' if token else 'none'}.")
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def listening_socket(host: str, port: int) -> socket.socket:
    """A bound socket; InputError when the address is unknown or taken."""
    from data.schemas import InputError

    if not 0 <= port <= 65_535:
        raise InputError(f"expected --port from 0 to 65535, got {port}.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise InputError(f"cannot listen on {host}, port {port}: {error}. Choose another --host or --port.") from error
    return listener


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
