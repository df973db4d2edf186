r"""`vidtrl estimate`: how much memory a training run will need, before it starts.

From the options of the run, as they stand in its file or on its command line:

    vidtrl estimate --config sft.yaml --memory 24

Another setting, on eight devices:

    vidtrl estimate --trainer sft --config sft.yaml --lora_r 128 --accelerate_config fsdp2 --num_processes 8
"""

import argparse
import sys
from collections.abc import Sequence

from .errors import Parser, UserError, guarded, read_config, suggest


TRAINERS = ("sft", "grpo", "distill")
STRATEGIES = {"single": "ddp", "multi_gpu": "ddp", "fsdp2": "fsdp2", "zero2": "zero2", "zero3": "zero3"}


def make_parser() -> argparse.ArgumentParser:
    """The command's own options; all others are those of the trainer's command."""
    parser = Parser(
        prog="vidtrl estimate",
        description="How much memory a training run will need on each device. Nothing is trained, no weights are read or "
        "downloaded: of the model, the configuration files are enough.",
        epilog="All other options are those of `vidtrl sft`, `vidtrl grpo` or `vidtrl distill`, also from the YAML file that "
        "--config names. --accelerate_config and --num_processes say what is shared by how many devices. Without bf16, fp16 or "
        "use_cpu the run is planned with bfloat16.",
    )
    parser.add_argument("--trainer", choices=TRAINERS, help="whose run it is; by default told from the options")
    parser.add_argument(
        "--memory",
        type=float,
        metavar="GB",
        help="what a device has (10^9 bytes): exit code 1 and advice if it is too little",
    )
    parser.add_argument(
        "--advice", action="store_true", help="show what single changes would save, even if the run fits"
    )
    parser.add_argument("--json", action="store_true", help="print the estimate as JSON")
    return parser


def given_options(argv: Sequence[str]) -> dict[str, str]:
    """Names (and, of options in a file, values) of what the user has set."""
    peek = Parser(add_help=False)
    peek.add_argument("--config")
    path = peek.parse_known_args(list(argv))[0].config
    names = {a[2:].split("=", 1)[0].replace("-", "_"): "" for a in argv if a.startswith("--")}
    if path is None:
        return names
    config = read_config(path)
    if not isinstance(config, dict):
        raise UserError(f"config file {path!r} holds no options")
    return {name: value for name, value in config.items() if value is not None} | names


def options_parser(trainer: str, num_processes: int):
    """All options of the trainer's command, for a run of so many processes, which need not be here."""
    from ..trainer.memory import CONFIGS, planned_config
    from .distill import DistillScriptArguments
    from .grpo import GRPOScriptArguments
    from .parsing import VidtrlParser
    from .sft import LaunchArguments, LoraArguments, QuantizationArguments, ScriptArguments

    script = {"sft": ScriptArguments, "grpo": GRPOScriptArguments, "distill": DistillScriptArguments}[trainer]
    kinds = [script, planned_config(CONFIGS[trainer], num_processes), LoraArguments, QuantizationArguments]
    return VidtrlParser([*kinds, LaunchArguments], prog=f"vidtrl estimate --trainer {trainer}")


def find_trainer(names: set[str], recipe: str | None) -> str:
    """The one trainer that knows all options of a run (and its recipe)."""
    from ..trainer.distill_recipes import RECIPES as DISTILL
    from ..trainer.grpo_recipes import RECIPES as GRPO

    recipes = {"sft": (), "grpo": GRPO, "distill": DISTILL}
    if recipe and recipe not in [*GRPO, *DISTILL]:
        raise UserError(f"there is no recipe {recipe!r}: {', '.join([*GRPO, *DISTILL])}")
    known = {t: {a.dest for a in options_parser(t, 1)._actions} | {"config", "env", "debug"} for t in TRAINERS}
    every = set.union(*known.values())
    for name in sorted(names - every):
        raise UserError(f"no trainer has the option --{name}{suggest(name, every)}")
    fitting = [t for t in TRAINERS if names <= known[t] and (not recipe or recipe in recipes[t])]
    if len(fitting) != 1:
        what = f"these options are of {' and '.join(fitting)}" if fitting else "no trainer knows all these options"
        raise UserError(f"{what}: say whose they are with --trainer {'|'.join(fitting or TRAINERS)}")
    return fitting[0]


def run(argv: Sequence[str]) -> int:
    """Entry point of `vidtrl estimate`: 0, or 1 if the run needs more than `--memory`."""
    own, rest = make_parser().parse_known_args(list(argv))
    given = given_options(rest)
    trainer = own.trainer or find_trainer(set(given), str(given.get("recipe") or _value(rest, "recipe") or ""))
    strategy, number = _devices(rest, given)

    from transformers.hf_argparser import string_to_bool

    from ..trainer.memory import GB, alternatives, estimate
    from .sft import model_init_kwargs, require

    # a device need not be here
    parsed = options_parser(trainer, number).parse_args_and_config([*rest, "--use_cpu", "--output_dir=estimate"])
    script_args, args, lora, quantization = parsed[:4]
    require(script_args, "model_name_or_path")
    args.model_init_kwargs = model_init_kwargs(script_args, args)
    on_cpu = string_to_bool(_value(rest, "use_cpu") or given.get("use_cpu") or False)
    if not {"bf16", "fp16"} & set(given) and not on_cpu:
        args.bf16 = True
    args.use_cpu = on_cpu
    options = dict(
        peft_config=lora.peft_config(),
        teacher_model=getattr(script_args, "teacher_model_name_or_path", None),
        quantization_bits=4 if quantization.load_in_4bit else 8 if quantization.load_in_8bit else None,
        strategy=strategy,
        num_processes=number,
    )
    model = script_args.model_name_or_path
    found = estimate(trainer, args, model, **options)
    print(found.to_json() if own.json else found.table())
    fits = own.memory is None or found.total <= own.memory * GB
    if own.json:
        return 0 if fits else 1
    if own.memory is not None:
        print(f"\n{'fits' if fits else 'does not fit'} into {own.memory:g} GB")
    if own.advice or not fits:
        print("\nwith one change:")
        for change, other in alternatives(trainer, args, model, **options):
            mark = "" if own.memory is None else "fits" if other.total <= own.memory * GB else "too much"
            print(f"{other.total / GB:9.2f} GB in the phase {other.peak_phase!r:18} {mark:9} {change}")
        if found.peak_phase == "preparation":
            halves = "; --torch_dtype bfloat16 halves them" if found.setting["weights"] == "float32" else ""
            print(f"Before training, all models are on the device at once to encode prompts and clips{halves}.")
    return 0 if fits else 1


def _value(argv: Sequence[str], name: str) -> str | None:
    peek = Parser(add_help=False)
    peek.add_argument(f"--{name}", nargs="?", const="true")
    return getattr(peek.parse_known_args(list(argv))[0], name)


def _devices(argv: Sequence[str], given: dict) -> tuple[str, int]:
    """Strategy and number of devices, from `--accelerate_config` and `--num_processes`."""
    name = str(_value(argv, "accelerate_config") or given.get("accelerate_config") or "single")
    number = str(_value(argv, "num_processes") or given.get("num_processes") or 1)
    if not number.isdecimal():
        raise UserError(f"--num_processes is a number of devices, not {number!r}")
    if name not in STRATEGIES:
        raise UserError(f"--accelerate_config {name!r} cannot be estimated: name one of {', '.join(STRATEGIES)}")
    return STRATEGIES[name], int(number)


if __name__ == "__main__":
    sys.exit(guarded(run, sys.argv[1:]))
