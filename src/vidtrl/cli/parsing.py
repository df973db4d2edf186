"""TRL's parser, with YAML values checked like command-line values and unknown names answered with a suggestion."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_type_hints

from trl import TrlParser

from .errors import UserError, read_config, suggest


class VidtrlParser(TrlParser):
    """
    [`trl.TrlParser`] whose config file is held to the same rules as the command line.

    TRL makes YAML values the parser's defaults, and argparse neither converts nor checks a default that is not a
    string. Here each YAML value is spelled as a command-line option placed before the real ones, so that types and
    choices are checked, and the command line still wins. Mistakes raise [`UserError`].

    Args:
        dataclass_types: Dataclasses whose fields are the options.
        **kwargs: For [`argparse.ArgumentParser`].

    Example:

    ```python
    parser = VidtrlParser(dataclass_types=[LoraArguments])
    (lora_args,) = parser.parse_args_and_config(["--config", "sft.yaml", "--lora_r", "8"])
    ```
    """

    def __init__(self, dataclass_types=None, **kwargs):
        self._config_args: list[str] = []
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        kinds = {name: kind for one in dataclass_types or () for name, kind in get_type_hints(one).items()}
        for action in self._actions:
            if kinds.get(action.dest) == bool | None and action.nargs is None:
                # `--bf16` alone, although its default is neither True nor False
                action.nargs, action.const = "?", True

    def error(self, message: str):
        """argparse would print a usage of two hundred options first."""
        raise UserError(message)

    def parse_args_and_config(self, args: Sequence[str], **kwargs) -> tuple:
        """
        Parse options and the file that `--config` names.

        Args:
            args (`Sequence[str]`): Command-line arguments.
            **kwargs: As in [`trl.TrlParser`].

        Returns:
            `tuple`: One instance of each dataclass.

        Raises:
            [`UserError`]: Unknown option, wrong type or value, missing or malformed file.
        """
        args = [part for a in args for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
        if args.count("--config") > 1:
            raise UserError("--config is given twice")
        if args[-1:] == ["--config"]:
            raise UserError("--config needs the path of a YAML file")
        if "--config" in args:
            path = Path(args[args.index("--config") + 1])
            read_config(path)
        self._config_args = []
        try:
            return super().parse_args_and_config(args, **kwargs)
        except (ValueError, TypeError, ImportError) as error:  # from the __post_init__ of a config
            raise UserError(str(error)) from error

    def set_defaults_with_config(self, **config) -> list[str]:
        """Keep the config's values as options instead of defaults; unknown keys are errors."""
        kinds = {action.dest: action for action in self._actions if action.dest != "help"}
        for key, value in config.items():
            if key not in kinds:
                owners = whose(key)
                hint = (
                    f"; it is a setting of vidtrl {' and of vidtrl '.join(owners)}" if owners else suggest(key, kinds)
                )
                raise UserError(f"unknown key {key!r} in the config file{hint}")
            if value is None:
                self.set_defaults(**{key: None})
            elif isinstance(value, list) and kinds[key].nargs in ("+", "*"):
                self._config_args += [f"--{key}", *map(str, value)]
            elif isinstance(value, dict | list):
                self._config_args.append(f"--{key}={json.dumps(value)}")
            else:
                self._config_args.append(f"--{key}={value}")
        return []

    def parse_args_into_dataclasses(self, args=None, return_remaining_strings=False, **kwargs) -> tuple:
        """Options of the config file first, then the command line's; what neither knows is an error."""
        *parsed, unknown = super().parse_args_into_dataclasses(
            args=[*self._config_args, *args], return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            names = [a.split("=", 1)[0] for a in unknown if a.startswith("--")]
            if not names:
                raise UserError(f"unexpected argument {unknown[0]!r}; options are written --name value")
            known = [option for action in self._actions for option in action.option_strings]
            raise UserError(f"unknown option {names[0]}{suggest(names[0], known)}")
        return (*parsed, []) if return_remaining_strings else tuple(parsed)


def whose(key: str) -> list[str]:
    """The commands whose config files may have a key."""
    from . import distill, grpo, prompt, run_plan, sft

    commands = {"sft": sft, "grpo": grpo, "distill": distill, "prompt": prompt}
    found = [name for name, module in commands.items() if key in {a.dest for a in module.make_parser()._actions}]
    return found or ["run"] * (key in run_plan.KEYS)
