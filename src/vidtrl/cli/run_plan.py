"""The file of `vidtrl run`: four stages as one description, held to the rules of each stage's own command."""

import dataclasses
import difflib
import enum
import importlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError, explain, read_config


STAGES = ("sft", "grpo", "prompt", "distill")  # in the order in which they build on each other
KEYS = ("model", "output_dir", "base_adapters", "enhance_prompts", "shared", "launch", "stages")
ADAPTERS = "pytorch_lora_weights*.safetensors"  # of a model with two experts one each
# settings that the pipeline gives each stage, and what to write instead
OWNED = {
    "model_name_or_path": "model, beside stages",
    "video_model_name_or_path": "model, beside stages",
    "output_dir": "output_dir, beside stages",
    "base_adapters": "base_adapters, beside stages, for adapters below the first stage",
    "resume_from_checkpoint": "nothing: an interrupted stage goes on from its last checkpoint",
    "hub_token": "nothing: log in with `hf auth login`, or set HF_TOKEN",  # the settings are written to files
}
LAUNCH = ("accelerate_config", "num_processes", "main_process_port")
SECRETS = ("token", "hub_token", "push_to_hub_token", "use_auth_token", "hf_token", "api_key", "password")
HF_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")  # as the Hub issues them


@dataclass
class Stage:
    """
    One stage, as it will be started.

    Args:
        name (`str`): One of [`STAGES`].
        folder (`Path`): Its output directory.
        settings (`dict`): Contents of the config file of `vidtrl NAME`, as plain YAML values.
        origin (`dict[str, str]`): Where each of them comes from: `"stage"`, `"shared"`, `"launch"` or `"pipeline"`.
        needs (`tuple[str, ...]`): Earlier stages whose results it builds on.
        enhance (`dict`, *optional*): Dataset settings of a distillation whose prompts the trained enhancer rewrites.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    origin: dict[str, str]
    needs: tuple[str, ...] = ()
    enhance: dict[str, Any] | None = None

    @property
    def module(self) -> str:
        """What `python -m` runs."""
        return f"vidtrl.cli.{self.name}"

    @property
    def config_file(self) -> Path:
        """Where its settings are written."""
        return self.folder / "config.yaml"


@dataclass
class Pipeline:
    """
    What a file of `vidtrl run` describes.

    Args:
        model (`str`): Hub id or folder of the pipeline that is trained.
        output_dir (`Path`): Everything is written below it.
        stages (`list[Stage]`): Those that the file has, in order.
        base_adapters (`list[str]`): Adapters below the first stage.
    """

    model: str
    output_dir: Path
    stages: list[Stage]
    base_adapters: list[str] = field(default_factory=list)

    def stage(self, name: str) -> Stage:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)


def read_pipeline(path: str | os.PathLike) -> Pipeline:
    """
    Read the file, and give each stage its share of the settings: `launch`, then `shared`, then its own section, each
    winning over the one before.

    Args:
        path (`str` or `PathLike`): The YAML file.

    Raises:
        [`UserError`]: For a file that cannot be read, an unknown key (with the nearest known one), or a setting that the
            pipeline gives itself.
    """
    content = _mapping(read_config(path), str(path))
    _refuse_secrets(content)
    _known(content, KEYS, "")
    for name in ("model", "output_dir"):
        if not isinstance(content.get(name), str):
            raise UserError(f"{name} is required in {str(path)!r}, as text")
    sections = _mapping(content.get("stages"), "stages")
    _known(sections, STAGES, "stages.")
    if not sections:
        raise UserError(f"stages is empty: give at least one of {', '.join(STAGES)}")
    launch, shared = _mapping(content.get("launch"), "launch"), _mapping(content.get("shared"), "shared")
    if "mixed_precision" in launch:
        raise UserError(
            "launch.mixed_precision: precision is a setting of the trainers, write bf16: true under shared"
        )
    if "num_machines" in launch or "machine_rank" in launch:
        raise UserError(
            "launch.num_machines: vidtrl run starts its stages on one machine. `vidtrl run --dry-run` prints each stage's "
            "command, which runs on several"
        )
    _known(launch, LAUNCH, "launch.")
    base = content.get("base_adapters") or []
    if not isinstance(base, list):
        raise UserError("base_adapters must be a list of folders or Hub ids")
    enhance = content.get("enhance_prompts", False)
    if not isinstance(enhance, bool):
        raise UserError("enhance_prompts must be true or false")
    if enhance and not {"prompt", "distill"} <= set(sections):
        raise UserError("enhance_prompts: true needs both stages.prompt and stages.distill")

    output = Path(content["output_dir"]).expanduser()
    known = {name: _parser_keys(name) for name in STAGES if name in sections}
    for key in shared:
        _owned(key, "shared")
        _known([key], {k for keys in known.values() for k in keys}, "shared.")
    stages: list[Stage] = []
    for name in known:
        section = _mapping(sections[name], f"stages.{name}")
        for key in section:
            if name != "prompt" or key != "model_name_or_path":  # there it is the language model
                _owned(key, f"stages.{name}")
        _known(section, known[name], f"stages.{name}.")
        own = {key: value for key, value in shared.items() if key in known[name]}
        # whoever launches a stage otherwise does not want the number of processes of the others
        launched = {} if "accelerate_config" in section else launch
        settings = {**launched, **own, **section}
        origin = dict.fromkeys(launched, "launch") | dict.fromkeys(own, "shared") | dict.fromkeys(section, "stage")
        settings.setdefault("accelerate_config", _default_launch())
        video = [one.name for one in stages if one.name != "prompt"]
        given = {"output_dir": str(output / name), "resume_from_checkpoint": "latest"}
        given["video_model_name_or_path" if name == "prompt" else "model_name_or_path"] = content["model"]
        if base or video:
            given["base_adapters"] = [*base, *(str(output / below) for below in video)]
        needs, source = tuple(video), None
        if name == "distill" and enhance:
            needs += ("prompt",)
            names = ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "eval_strategy")
            source = {key: settings[key] for key in names if settings.get(key) is not None}
            if "dataset_name" not in source:
                raise UserError("stages.distill.dataset_name is required")
            settings.pop("dataset_config", None)
            given |= {"dataset_name": str(output / name / "prompts"), "dataset_train_split": "train"}
            given["dataset_test_split"] = "test"
        origin |= dict.fromkeys(given, "pipeline") | {"accelerate_config": origin.get("accelerate_config", "pipeline")}
        stages.append(Stage(name, output / name, {**settings, **given}, origin, needs, source))
    if "prompt" in known and any(stage.settings.get("model_revision") for stage in stages):
        raise UserError(
            "model_revision: the prompt stage cannot choose one; give model the folder of that revision instead"
        )
    return Pipeline(content["model"], output, stages, base)


def _refuse_secrets(value: Any, where: str = "") -> None:
    """Settings are written to files that may be shared, so that a token is none of them, at whatever depth."""
    name = where.rpartition(".")[2]
    if isinstance(value, str) and value.lstrip().startswith("{"):  # the command line's spelling of a mapping
        with suppress(json.JSONDecodeError):
            value = json.loads(value)
    if isinstance(value, dict):
        for key, inner in value.items():
            _refuse_secrets(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for inner in value:
            _refuse_secrets(inner, where)
    # `token: true` is the one that is stored
    elif isinstance(value, str) and (name.lower() in SECRETS or HF_TOKEN.search(value)):
        raise UserError(
            f"{where} holds a secret, and what is in this file is written to files in output_dir: take it out, and log in "
            "with `hf auth login`, or set the environment variable HF_TOKEN"
        )


def _mapping(value: Any, where: str) -> dict:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{where} must be a mapping of settings, such as `seed: 42`")
    return value


def _known(names, known, prefix: str) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name.replace("-", "_"), list(known), n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else _where_to_look(prefix, known)
            raise UserError(f"unknown key {prefix}{name}; {hint}")


def _where_to_look(prefix: str, known) -> str:
    stage = prefix.removeprefix("stages.").rstrip(".")
    if stage in STAGES:
        return f"`vidtrl {stage} --help` lists all of them"
    return "no stage has a setting of that name" if prefix == "shared." else f"known are {', '.join(known)}"


def _owned(key: str, where: str) -> None:
    if key in OWNED:
        raise UserError(f"{where}.{key} is set by vidtrl run: write {OWNED[key]}")


def _parser(stage: str):
    return importlib.import_module(f".{stage}", __package__).make_parser()


def _parser_keys(stage: str) -> list[str]:
    return [action.dest for action in _parser(stage)._actions if action.dest not in ("help", "config")]


def _default_launch() -> str:
    import torch

    return "multi_gpu" if torch.accelerator.device_count() > 1 else "single"


@contextmanager
def _environment() -> Iterator[None]:
    """An `env:` block of a stage is for its own process."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def parse_stage(stage: Stage, dry_run: bool = False) -> tuple:
    """
    Let the stage's own command read its settings, and look for the mistakes that would show when it starts.

    Args:
        stage ([`Stage`]): The stage.
        dry_run (`bool`, *optional*, defaults to `False`): Settings may be for another machine: bf16 is not held against
            one without an accelerator.

    Returns:
        `tuple`: The dataclasses of the command's parser.

    Raises:
        [`UserError`]: Says stage and setting.
    """
    settings = dict(stage.settings)
    if dry_run and not has_accelerator():
        settings = _on_a_cpu(stage.name, settings)
    command = importlib.import_module(f".{stage.name}", __package__)
    with tempfile.TemporaryDirectory() as folder, _environment():
        path = Path(folder, "config.yaml")
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
        try:
            parsed = command.make_parser().parse_args_and_config(["--config", str(path)])
            _check(stage, command, parsed)
        except Exception as error:
            message = explain(error)
            if message is None:
                raise
            raise UserError(f"stages.{stage.name}: {message}") from error
    return parsed


def _check(stage: Stage, command, parsed: tuple) -> None:
    from .grpo import resolve_reward
    from .launch import launch_command
    from .sft import require

    script, *rest = parsed
    launch_command(stage.module, {k: str(stage.settings[k]) for k in LAUNCH if stage.settings.get(k) is not None}, [])
    if stage.name == "prompt":
        require(script, "model_name_or_path", "steps")
        if "sft" in script.steps:
            require(script, "pairs_dataset_name")
            command.trl_config("sft", script)
        if "grpo" in script.steps:
            require(script, "dataset_name", "reward_funcs", "height", "width", "num_frames")
            command.trl_config("grpo", script)
        names = script.reward_funcs if "grpo" in script.steps else ()
    else:
        training, lora = rest[:2]
        require(script, "dataset_name", *(["reward_funcs"] if stage.name == "grpo" else []))
        if not lora.use_peft:
            raise UserError("the next stages stack on an adapter: set use_peft: true")
        if stage.enhance and training.rollout == "data":
            raise UserError(
                f"recipe {training.recipe!r} learns from clips, whose captions belong to them: set enhance_prompts: false"
            )
        names = [*getattr(script, "reward_funcs", ()), *(getattr(script, "eval_reward_funcs", None) or ())]
    for name in names:
        resolve_reward(name)


def missing_data(stage: Stage) -> list[str]:
    """Local files and folders that the stage's settings name and that are not there."""
    from .grpo import PROMPT_FILES

    settings = stage.settings | (stage.enhance or {})
    found = []
    for name in ("dataset_name", "pairs_dataset_name"):
        value = settings.get(name)
        if not value or Path(value).expanduser().exists():
            continue
        if value.startswith((".", "/", "~")) or Path(value).suffix.lower() in PROMPT_FILES:
            found.append(f"stages.{stage.name}.{name}: {value!r} does not exist")
    return found


def has_accelerator() -> bool:
    """Whether this machine has a device to train on."""
    import torch

    return torch.accelerator.is_available()


def _on_a_cpu(name: str, settings: dict) -> dict:
    if name != "prompt":
        return settings | ({"bf16": False} if settings.get("bf16") else {})
    kinds = {kind: settings.get(kind) or {} for kind in ("sft", "grpo")}
    return settings | {kind: {"use_cpu": True, **given, "bf16": False} for kind, given in kinds.items()}


def resolved_settings(stage: Stage, parsed: tuple) -> list[tuple[str, Any, str]]:
    """
    Every setting that the stage will have, defaults included.

    Args:
        stage ([`Stage`]): The stage.
        parsed (`tuple`): From [`parse_stage`].

    Returns:
        `list[tuple[str, Any, str]]`: Name, value, and where it comes from: as in [`Stage`], or `"derived"` (a recipe's, or
        this machine's), or `"default"`. Arguments of TRL's trainers are named `sft.NAME` and `grpo.NAME`.
    """
    rows = []
    for group in parsed:
        for one in dataclasses.fields(group):
            if not one.init or one.name in ("hub_token", "push_to_hub_token"):
                continue
            value = getattr(group, one.name)
            if stage.name == "prompt" and one.name in ("sft", "grpo"):
                if one.name in group.steps:
                    rows += _trl_settings(one.name, group, stage.settings.get(one.name) or {})
                continue
            if one.name in stage.origin:
                # as given: what it became may be this machine's
                rows.append((one.name, stage.settings[one.name], stage.origin[one.name]))
            else:
                rows.append((one.name, _plain(value), "default" if _is_default(one, value) else "derived"))
    return rows


def _trl_settings(kind: str, script, given: dict) -> list[tuple[str, Any, str]]:
    from .prompt import trl_config

    config, rows = trl_config(kind, script), []
    for one in dataclasses.fields(config):
        if one.init and one.name not in ("hub_token", "push_to_hub_token"):
            value = given.get(one.name, getattr(config, one.name))
            origin = "stage" if one.name in given else "default" if _is_default(one, value) else "derived"
            rows.append((f"{kind}.{one.name}", _plain(value), origin))
    return rows


def _is_default(one: dataclasses.Field, value: Any) -> bool:
    default = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
    return _plain(value) == _plain(default)


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    return json.loads(json.dumps(value, default=lambda one: getattr(one, "to_dict", one.__str__)()))
