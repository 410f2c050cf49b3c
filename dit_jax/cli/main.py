"""The program `dit-jax`: finds the verb, parses its flags, and turns mistakes into one line.

Verb modules import heavy libraries inside `run`, so that `--help` answers at once.
"""

import argparse
import atexit
import contextlib
import importlib
import logging
import os
import re
import sys
import time
import traceback
import typing
from collections.abc import Iterator

from dit_jax.config import Config, did_you_mean, load_config, paths_ending_in
from dit_jax.files import user_path
from dit_jax.terminal import silence_tensorflow

VERBS = ("train", "encode", "sample", "evaluate", "convert", "plan", "benchmark", "info", "report")
RESUMED = ("encode", "sample", "evaluate")  # verbs that SIGTERM ends with the exit code that asks to be started again
CONFIG_FLAG = "--config."
HUGE_PAGES = "glibc.malloc.hugetlb"  # of the C library's tunables


def main(argv: list[str] | None = None) -> None:
    """Runs one verb; exits with 0, or with 2 and one line on standard error for a mistake that a person can mend."""
    started = time.monotonic()
    if argv is not None:
        run_verb(argv, started)
        return
    use_huge_pages()
    code: object = 0
    try:
        run_verb(sys.argv[1:], started)
    except SystemExit as request:
        code = request.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    end(code if isinstance(code, int) else int(code is not None))


def end(code: int) -> None:
    """Ends the process as Python would, but does not wait for threads: a reader of a dead disk never returns."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def run_verb(argv: list[str], started: float) -> None:
    """Does what `main` says, in a process that goes on."""
    parser = Parser(
        prog="dit-jax", description="Latent diffusion transformers in JAX: train, sample, evaluate.", allow_abbrev=False
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        module = importlib.import_module(f"dit_jax.cli.{verb}")
        subparser = verbs.add_parser(verb, help=module.HELP, description=module.__doc__, allow_abbrev=False)
        module.add_arguments(subparser)
        subparser.set_defaults(run=module.run)
    argv, overrides = split_overrides(argv)
    args, unknown = parse(parser, argv)
    if unknown:
        flags = verbs.choices[args.verb].flags()
        flag = next((word.partition("=")[0] for word in unknown if word.startswith("--")), "")
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{did_you_mean(flag, flags) if flag else ''}")
    foreign = [key for key, _ in overrides if not key.startswith(getattr(args, "overridable", "nothing"))]
    if foreign:
        own = [name for name in paths_ending_in(foreign[0].rpartition(".")[2]) if name.startswith(args.overridable)]
        hint = f"; did you mean --config.{own[0]}?" if own else ""
        parser.error(f"{args.verb} takes no {CONFIG_FLAG}{foreign[0]}=VALUE: a workdir has its own config{hint}")
    args.overrides, args.started = overrides, started
    silence_tensorflow()
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        with made_way(args.verb) if args.verb in RESUMED else contextlib.nullcontext():
            args.run(args)
    except KeyboardInterrupt:
        end_others(130, "interrupted", "")
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        message = " ".join(str(error).split())
        if not isinstance(error, ValueError | OSError) or os.environ.get("DIT_JAX_TRACEBACK"):
            end_others(1, f"{type(error).__name__}: {message}", traceback.format_exc())
            raise
        line = f"dit-jax {args.verb}: error: {message}"
        end_others(2, message, line)
        print(line, file=sys.stderr)
        sys.exit(2)


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags and what is none; exits with 2 and one line where one is of a home folder that nobody knows."""
    try:
        return parser.parse_known_args(argv)
    except UnknownHome as error:
        print(f"dit-jax {argv[0]}: error: {error}", file=sys.stderr)
        sys.exit(2)


class UnknownHome(Exception):
    """Of a flag's path; argparse would put all of the usage before a ValueError."""


def path_flag(text: str) -> str:
    """The type of every flag that may be a file or a folder: `--workdir=~/run` reaches the program as it is here."""
    try:
        return user_path(text)
    except ValueError as error:
        raise UnknownHome(str(error)) from None


def paths_flag(text: str) -> str:
    """The type of a flag of several paths with commas between."""
    return ",".join(map(path_flag, text.split(",")))


class Parser(argparse.ArgumentParser):
    """A parser that names the nearest of the choices that there are."""

    def flags(self) -> list[str]:
        """Returns the names of the flags."""
        return [name for action in self._actions for name in action.option_strings if name.startswith("--")]

    def error(self, message: str) -> typing.NoReturn:
        """Prints a message and exits with 2."""
        if match := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            message += did_you_mean(match[1], re.findall(r"[\w.-]+", match[2]))
        super().error(message)


@contextlib.contextmanager
def made_way(verb: str) -> Iterator[None]:
    """Lets SIGTERM end within seconds what the same command goes on with."""
    from dit_jax.parallel.preemption import MakeWay, Preemption

    again = "start it again to go on"
    with Preemption(nothing_done=again) as preemption, preemption.interruptible():
        try:
            yield
        except MakeWay:
            print(f"dit-jax {verb}: asked to make way; {again}", file=sys.stderr)
            raise


def use_huge_pages() -> None:
    """Starts this program again, as the same process, with large arrays on huge pages; once, and on Linux alone.

    XLA on CPU takes the memory of its temporaries anew for every step, and on most systems 4 KiB at a time: the page
    faults are a quarter of a training step. The C library asks for huge pages if its environment says so at its start.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and sys.executable and HUGE_PAGES not in tunables:
        os.environ["GLIBC_TUNABLES"] = f"{tunables}:{HUGE_PAGES}=1".lstrip(":")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def end_others(code: int, message: str, report: str) -> None:
    """Prints the report and exits, where this is one of several processes; they end too, with the message."""
    distributed = sys.modules.get("dit_jax.parallel.distributed")  # loaded by the verbs that have others
    if distributed:
        distributed.end_all(code, message, report)


def split_overrides(argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Returns the arguments without `--config.a.b=VALUE` (or `--config.a.b VALUE`), and these as (key, value)."""
    rest, overrides = [], []
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith(CONFIG_FLAG):
            rest.append(argument)
            continue
        key, separator, value = argument.removeprefix(CONFIG_FLAG).partition("=")
        overrides.append((key, value if separator else next(arguments, "")))
    return rest, overrides


def load_run_config(args: argparse.Namespace, workdir: str | None = None) -> Config:
    """Returns the config of --config with its overrides; what it leaves out of a network may be `init_from`'s.

    workdir: of the run, whose own config goes before that: once it has a checkpoint, `init_from` may be gone.
    """

    def starting_config(init_from: str) -> Config:
        from dit_jax.checkpoint import find_checkpoint, read_config

        own = None if workdir is None else read_config(workdir)
        return own if own and own.training.init_from == init_from else find_checkpoint(init_from)[1]

    return load_config(args.config, args.overrides, starting_config)


def add_config_argument(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds --config, whose keys --config.KEY=VALUE override."""
    parser.set_defaults(overridable="")  # the prefix of the keys that may be
    parser.add_argument(
        "--config",
        type=path_flag,
        required=required,
        metavar="FILE[:ARG]",
        help="config file, for example configs/fashion_mnist_dit.py; override its keys with --config.a.b=VALUE",
    )
