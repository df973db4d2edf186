"""One line for a user's mistake, the traceback for a bug."""

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path


PACKAGE = Path(__file__).resolve().parents[1]
USER_ERRORS = (ValueError, TypeError, FileNotFoundError, FileExistsError, NotADirectoryError)


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
        if debug or not _is_users(error):
            traceback.print_exc()
            return 2 if _is_users(error) else 1
        print(f"vidtrl: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _is_users(error: Exception) -> bool:
    """A ValueError of ours speaks to the user; one from deep inside torch is a bug that needs its traceback."""
    if isinstance(error, UserError):
        return True
    if not isinstance(error, USER_ERRORS) or error.__traceback__ is None:
        return False
    innermost = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(innermost).resolve().is_relative_to(PACKAGE)
