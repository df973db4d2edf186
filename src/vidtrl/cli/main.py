"""`vidtrl`: dispatch to the commands. Only argparse is imported here, so that `vidtrl --help` answers at once."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from .. import __version__
from .errors import guarded


# command -> (module, one line for --help). Each module has run(argv) -> exit code.
COMMANDS = {
    "sft": (".sft", "fine-tune a video diffusion model on captioned clips (LoRA, DoRA or full)"),
    "grpo": (".grpo", "train a video diffusion model on reward functions with GRPO and its family"),
    "distill": (".distill", "distil a video diffusion model into a few-step or streaming student"),
    "prompt": (".prompt", "train a language model to write prompts for a video model"),
    "run": (".run", "run all four stages from one file: SFT, GRPO, prompt enhancement, distillation"),
    "check-model": (".check_model", "prove that vidtrl samples and trains a model as its pipeline means it"),
    "estimate": (".estimate", "say how much memory a training run will need, before it starts"),
    "benchmark": (".benchmark", "time a model or a few-step student, and what an optimisation changes"),
    "report": (".report", "one page of any run: its videos, rewards, learning curves and arguments"),
    "compare": (".compare", "judge two folders of videos side by side in the browser, without knowing which is which"),
    "reward-server": (".reward_server", "serve reward functions over HTTP, so that a judge has a device of its own"),
    "push": (".push", "upload a trained model, an enhancer or a dataset of videos to the Hub"),
    "pull": (".pull", "download a model or a dataset from the Hub"),
    "export": (".export", "write a trained model in the form that other tools load, such as ComfyUI"),
    "demo": (".demo", "post-train the shipped toy model on a laptop, all four stages, and show before and after"),
    "env": (".env", "print versions and hardware, for bug reports"),
}

EPILOG = """examples:
  vidtrl sft --config sft.yaml --learning_rate 1e-4
  vidtrl sft --config sft.yaml --accelerate_config fsdp2 --num_processes 4
  vidtrl grpo --config grpo.yaml --reward_funcs my_rewards:smooth
  vidtrl distill --config distill.yaml --base_adapters wan-sft wan-grpo
  vidtrl run --config pipeline.yaml --dry-run
  vidtrl check-model Wan-AI/Wan2.1-T2V-1.3B-Diffusers
  vidtrl demo --output demo

`vidtrl COMMAND --help` lists a command's options. Add --debug to see the traceback of an error."""


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command's name; what follows the name is left to the command."""
    parser = argparse.ArgumentParser(
        prog="vidtrl",
        description="Post-train video diffusion models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vidtrl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """
    Entry point of the `vidtrl` command.

    Args:
        argv (`Sequence[str]`, *optional*): Arguments without the program's name; `sys.argv[1:]` by default.

    Returns:
        `int`: The exit code: 0 done, 1 a negative verdict or a crash, 2 a mistake of the user, 130 interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # Only the name is parsed here: a command's own options may look like abbreviations of ours.
    command = make_parser().parse_args(argv[:1]).command
    return guarded(lambda rest: importlib.import_module(COMMANDS[command][0], __package__).run(rest), argv[1:])


if __name__ == "__main__":
    sys.exit(main())
