"""`--accelerate_config NAME|FILE`: run a command under `accelerate launch`."""

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import Interrupted, Parser, UserError, read_config


CONFIGS = Path(__file__).resolve().parents[1] / "accelerate_configs"
# options of `accelerate launch` that are passed on as they are
LAUNCH_OPTIONS = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port")
INTERRUPTED = (130, -signal.SIGINT)
HINT = "the same command with --resume_from_checkpoint latest goes on from the last checkpoint"


def shipped_configs() -> list[str]:
    """Names that `--accelerate_config` takes without a file."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def split_launch_options(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """
    Take the launch options out of a command line and its `--config` file.

    Args:
        argv (`Sequence[str]`): The command's arguments.

    Returns:
        `tuple[dict[str, str], list[str]]`: The launch options by name, and the other arguments. Options in the config
        file stay there (the command's parser knows and ignores them); the command line wins.
    """
    parser = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    for name in ("accelerate_config", *LAUNCH_OPTIONS):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name)
    found, rest = parser.parse_known_args(list(argv))
    options = vars(found)
    peek = Parser(add_help=False)
    peek.add_argument("--config", nargs="?")
    path = peek.parse_known_args(rest)[0].config
    if path and Path(path).is_file():
        config = read_config(path)
        if isinstance(config, dict):
            names = ("accelerate_config", *LAUNCH_OPTIONS)
            options = {k: str(config[k]) for k in names if config.get(k) is not None} | options
    return options, rest


def launch_command(module: str, options: dict[str, str], argv: Sequence[str]) -> list[str]:
    """
    The `accelerate launch` command line that runs `python -m module argv`.

    Args:
        module (`str`): Module with a `__main__` guard.
        options (`dict[str, str]`): From [`split_launch_options`].
        argv (`Sequence[str]`): The module's arguments.

    Returns:
        `list[str]`

    Raises:
        [`UserError`]: If `accelerate_config` is neither a shipped name nor a file.
    """
    name = options["accelerate_config"]
    shipped = name in shipped_configs()
    path = CONFIGS / f"{name}.yaml" if shipped else Path(name)
    if not path.is_file():
        raise UserError(f"--accelerate_config {name!r} is neither a file nor one of {', '.join(shipped_configs())}")
    options = {k: v for k, v in options.items() if k in LAUNCH_OPTIONS}
    if shipped and "num_processes" not in options:
        import torch

        options["num_processes"] = "1" if name == "single" else str(max(1, torch.accelerator.device_count()))
    if name == "multi_gpu" and options["num_processes"] == "1":
        raise UserError(
            "--accelerate_config multi_gpu needs at least two devices; found one. Use single, or --num_processes"
        )
    flags = [f"--{k}={v}" for k, v in options.items()]
    # The launcher's own entry point: `accelerate` may not be on PATH when vidtrl runs as `python -m`.
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    return [*launcher, f"--config_file={path}", *flags, "--module", module, *argv]


def launch(module: str, options: dict[str, str], argv: Sequence[str]) -> int:
    """Run [`launch_command`], wait for it, and return its exit code."""
    process = subprocess.Popen(launch_command(module, options, argv), env=dict(os.environ))
    try:
        code = process.wait()
    except KeyboardInterrupt:
        # Ctrl-C reached the ranks as well: they are in this process group
        process.wait()
        raise Interrupted(HINT) from None
    if code in INTERRUPTED:
        raise Interrupted(HINT)
    return 1 if code < 0 else code
