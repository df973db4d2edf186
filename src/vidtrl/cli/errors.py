"""One line for a user's mistake, the traceback for a bug."""

import argparse
import difflib
import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


PACKAGE = Path(__file__).resolve().parents[1]
USER_ERRORS = (ValueError, TypeError, FileNotFoundError, FileExistsError, NotADirectoryError, ConnectionError)


class UserError(Exception):
    """A mistake in the command's arguments or input, in words for its user."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a hint on how to go on."""


class Parser(argparse.ArgumentParser):
    """argparse without abbreviated options, and with one line instead of the usage for a mistake."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        raise UserError(message)

    def parse_args(self, args=None, namespace=None):
        """A misspelt option before what is missing, which may be what it was to be."""
        argv = sys.argv[1:] if args is None else list(args)
        for argument in argv[: argv.index("--") if "--" in argv else None]:
            name = argument.split("=", 1)[0]
            if name.startswith("--") and name not in self._option_string_actions:
                raise UserError(f"unknown option {name}{suggest(name, self._option_string_actions)}")
        return super().parse_args(argv, namespace)


def suggest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest known name, or where to find them all."""
    spellings: dict[str, str] = {}
    for one in known:
        spellings.setdefault(one.replace("-", "_"), one)
    near = difflib.get_close_matches(name.replace("-", "_"), spellings, n=1)
    return f"; did you mean {spellings[near[0]]}?" if near else "; --help lists all of them"


def read_config(path: str | os.PathLike) -> Any:
    """What a YAML file holds. Raises [`UserError`] for one that is missing or malformed."""
    import yaml  # `vidtrl --help` does without

    path = Path(path)
    if not path.is_file():
        raise UserError(f"config file {str(path)!r} does not exist")
    try:
        with open(path, encoding="utf-8") as file:
            return yaml.safe_load(file)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config file {str(path)!r} is not valid YAML: {error}") from error


def guarded(run: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """
    Run a command and turn what it raises into a message and an exit code.

    [`UserError`], and the errors that vidtrl's own code raises about its input, end in one line and exit code 2.
    Anything else is a bug, here or upstream, and keeps its traceback (exit code 1). `--debug` always shows it.

    Args:
        run (`Callable`): Takes the arguments, returns an exit code (`None` = 0).
        argv (`Sequence[str]`): The arguments; `--debug` is taken out.

    Returns:
        `int`: The exit code.
    """
    argv, debug = [a for a in argv if a != "--debug"], "--debug" in argv
    try:
        return run(argv) or 0
    except KeyboardInterrupt as stop:
        print(f"\ninterrupted{': ' + str(stop) if str(stop) else ''}", file=sys.stderr)
        return 130
    except Exception as error:
        message = explain(error)
        if message is None or debug:
            traceback.print_exc()
        else:
            print(f"vidtrl: error: {' '.join(message.split())}", file=sys.stderr)
        return 1 if message is None else 2


def explain(error: Exception) -> str | None:
    """What to tell the user about an error that is theirs to mend; `None` for a bug, which needs its traceback."""
    library = type(error).__module__.partition(".")[0]
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            f"the disk is full{f' ({error.filename})' if error.filename else ''}; checkpoints written before are whole"
        )
    if library == "torch" and type(error).__name__ == "OutOfMemoryError":
        return (
            "the device is out of memory. Lower --per_device_train_batch_size, --num_frames, --height or --width, or use "
            f"--gradient_checkpointing, --use_peft or --load_in_4bit. {error}"
        )
    if library == "huggingface_hub":  # no such repository, no permission, no token, no network
        return str(error)
    if isinstance(error, USER_ERRORS) and error.__traceback__ is not None:
        # a ValueError of ours speaks to the user; one from deep inside torch is a bug
        innermost = traceback.extract_tb(error.__traceback__)[-1].filename
        if Path(innermost).resolve().is_relative_to(PACKAGE):
            return str(error)
    return None
