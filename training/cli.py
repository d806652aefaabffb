"""The command line of every script: one error line for what the user can mend, a traceback for what they cannot.

Exit codes: 0 done, 1 a fault in the program, 2 bad usage or input, 130 stopped by Ctrl-C or SIGTERM.
"""

import argparse
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence

from data.files import disk_problem
from data.schemas import InputError
from ops import describe_backend
from training.gin_config import clear_config, load_config, plain_message
from training.interrupt import EXIT_CODE, LeaveAtOnce, termination_interrupts
from training.processes import leave_after_error, leave_together, lost_process, process_state, uses_cuda
from training.run_folder import RunOptions

__all__ = ["RunOptions", "main", "run_cli"]

_OVERRIDE = "--gin."


def main(train: Callable[..., object], script: str, argv: Sequence[str] | None = None) -> int:
    """Run a training script: `CONFIG.gin [MORE.gin ...] [--gin.NAME=VALUE ...] [--resume ...] [...]`.

    Args:
        train: registered by `@gin.configurable(module=script)`; called with the keyword `options`, a RunOptions.
        script: the script's module name, such as "train_rqvae".
        argv: arguments without the program's name; None for those of this process.

    Returns:
        The exit code.
    """
    return run_cli(lambda arguments: _train(train, script, arguments), sys.argv[1:] if argv is None else argv)


def run_cli(command: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """Run a command and turn its errors into messages and exit codes; None from the command means 0.

    What the library logs, such as the preparation of a data set, goes to stderr. One of several processes does not
    return: it ends with the code.
    """
    return leave_after_error(_exit_code(command, argv))


def _exit_code(command: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for room in ("data", "modules", "training"):
        logging.getLogger(room).setLevel(logging.INFO)
    try:
        with termination_interrupts():
            return command(argv) or 0
    except SystemExit as leaving:  # argparse has already printed its message
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except InputError as error:
        return _refuse(plain_message(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        problem = disk_problem(error)
        if problem is None:
            traceback.print_exc()
            return 1
        return _refuse(f"{error.filename or 'writing failed'}: {problem}. Free space or choose another folder.")
    except LeaveAtOnce:
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)  # the interpreter's own way out waits for threads
    except KeyboardInterrupt as interrupt:
        print(f"interrupted{f': {interrupt}' if str(interrupt) else ''}", file=sys.stderr)
        return EXIT_CODE
    except Exception as error:
        lost = lost_process(error)
        if lost is None:
            traceback.print_exc()
        else:
            print(f"error: {lost}", file=sys.stderr)
        return 1


def _refuse(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _train(train: Callable[..., object], script: str, argv: Sequence[str]) -> int:
    overrides = [argument.removeprefix(_OVERRIDE) for argument in argv if argument.startswith(_OVERRIDE)]
    for override in overrides:
        if "=" not in override:
            raise InputError(f"command line: expected {_OVERRIDE}NAME=VALUE, got {_OVERRIDE}{override}.")
    arguments = _parser(script).parse_args([argument for argument in argv if not argument.startswith(_OVERRIDE)])
    if arguments.resume == "auto" and arguments.overwrite:
        raise InputError("command line: --resume auto continues a run and --overwrite replaces it; give one of them.")
    try:
        config = load_config(arguments.configs, overrides, script=script, supplied=["options"])
        if arguments.print_config:
            print(config.operative_config(), end="")
            return 0
        process_state()
        describe_backend("cuda" if uses_cuda() else "cpu")  # refuses an impossible OPS_BACKEND before any work
        train(
            options=RunOptions(
                resume=arguments.resume,
                overwrite=arguments.overwrite,
                allow_changes=arguments.allow_changes,
                dry_run=arguments.dry_run,
                profile=arguments.profile,
                config_text=config.text,
                settings=config.settings,
                command=shlex.join(["python", f"{script}.py", *argv]),
            )
        )
        leave_together()
        return 0
    finally:
        clear_config()


def _parser(script: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{script}.py",
        description="Values can be changed with --gin.NAME=VALUE, for instance --gin.train.seed=1.",
        allow_abbrev=False,
    )
    parser.add_argument("configs", nargs="+", metavar="CONFIG.gin", help="later files win")
    parser.add_argument("--resume", metavar="auto|PATH", help="continue from the newest whole checkpoint, or from one")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that the folder holds")
    parser.add_argument("--allow-changes", action="store_true", help="resume with other settings than the run had")
    parser.add_argument("--dry-run", action="store_true", help="two steps, an evaluation, a checkpoint; touches no run")
    parser.add_argument("--profile", type=int, metavar="N", help="show where the time of N steps goes; touches no run")
    parser.add_argument("--print-config", action="store_true", help="print every value and its origin, then leave")
    return parser
