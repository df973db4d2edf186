"""The prompts of a distillation, as a trained enhancer writes them. `vidtrl run` starts this in a process of its own."""

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from .errors import Parser, guarded
from .grpo import GRPOScriptArguments, load_prompts


def enhance_prompts(enhancer: str, output: Path, source: dict, batch_size: int = 64) -> None:
    """
    Write `train.jsonl`, and `test.jsonl` where the stage evaluates: columns `prompt` and `user_prompt`.

    Args:
        enhancer (`str`): Folder of a saved [`PromptEnhancer`].
        output (`Path`): Folder for the files. A file that is there stays: it is complete.
        source (`dict`): `dataset_name`, `dataset_config`, `dataset_train_split`, `dataset_test_split` and `eval_strategy` of the
            stage, as far as they are set.
        batch_size (`int`, *optional*, defaults to 64): Prompts between two lines of progress.
    """
    import torch

    from ..data.columns import standardize_columns
    from ..prompts import PromptEnhancer
    from ..prompts.enhancer import PromptFallbackWarning

    names = {key: value for key, value in source.items() if key != "eval_strategy"}
    args = GRPOScriptArguments(**names)
    splits = {"train": args.dataset_train_split}
    if source.get("eval_strategy", "no") not in ("no", False):
        splits["test"] = args.dataset_test_split
    missing = {name: split for name, split in splits.items() if not (output / f"{name}.jsonl").is_file()}
    if not missing:
        return
    model = PromptEnhancer.from_pretrained(enhancer)
    if model.model is not None:
        model.model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    output.mkdir(parents=True, exist_ok=True)
    for name, split in missing.items():
        prompts = list(standardize_columns(load_prompts(args, split), prompts_only=True)["prompt"])
        results = []
        for start in range(0, len(prompts), batch_size):
            with warnings.catch_warnings():  # counted below
                warnings.simplefilter("ignore", PromptFallbackWarning)
                results += model.enhance(prompts[start : start + batch_size])
            print(f"enhanced {len(results)} of {len(prompts)} prompts ({name})", flush=True)
        kept = [result for result in results if not result.enhanced]
        if kept:
            print(f"{len(kept)} stay as they were written, the first because {kept[0].reason}: {kept[0].prompt!r}")
        lines = [json.dumps({"prompt": r.text, "user_prompt": r.prompt}, ensure_ascii=False) for r in results]
        partial = output / f"{name}.jsonl.partial"
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        partial.replace(output / f"{name}.jsonl")


def main(argv: Sequence[str]) -> int:
    """Parse the arguments and write the files."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--enhancer", required=True)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--dataset", required=True, type=json.loads, help="JSON of the stage's dataset settings")
    args = parser.parse_args(argv)
    enhance_prompts(args.enhancer, args.output, args.dataset)
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv[1:]))
