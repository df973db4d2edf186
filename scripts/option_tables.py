"""Write docs/options.md: every setting of the trainers, of `vidtrl prompt` and of InferenceOptimization.

    python scripts/option_tables.py           # write the page
    python scripts/option_tables.py --check   # fail if the page is not what this script writes

Texts and defaults are read from the dataclasses, so the page cannot say anything else; a setting without a text is an error.
"""

import argparse
import dataclasses
import inspect
import re
import sys
from pathlib import Path

from vidtrl.cli.prompt import PromptScriptArguments
from vidtrl.inference import InferenceOptimization
from vidtrl.trainer import distill_recipes, grpo_recipes
from vidtrl.trainer.base_config import VideoTrainingConfig
from vidtrl.trainer.clip_config import ClipConfig
from vidtrl.trainer.distill_config import VideoDistillConfig
from vidtrl.trainer.grpo_config import VideoGRPOConfig
from vidtrl.trainer.sft_config import VideoSFTConfig


PAGE = Path(__file__).parent.parent / "docs" / "options.md"
SECTIONS = [  # heading, class, what its default recipe fills in, what stands above the table
    ("All trainers", VideoTrainingConfig, {}, "Beside those of `transformers.TrainingArguments`, all of which work."),
    ("Trainers that read clips", ClipConfig, {}, "SFT, and distillation from clips (`rollout=\"data\"`)."),
    ("VideoSFTConfig", VideoSFTConfig, {}, "With those of the two tables above: [SFT trainer](sft_trainer.md)."),
    (
        "VideoGRPOConfig", VideoGRPOConfig, grpo_recipes.DEFAULTS | grpo_recipes.RECIPES["flash-grpo"],
        "With those of the first table: [GRPO trainer](grpo_trainer.md). A default with a star is that of `flash-grpo`; other "
        "recipes have others ([papers](papers.md)).",
    ),
    (
        "VideoDistillConfig", VideoDistillConfig, distill_recipes.DEFAULTS | distill_recipes.RECIPES["dmd2"],
        "With those of the first two tables: [distillation trainer](distill_trainer.md). A default with a star is that of `dmd2`, "
        "two values are for LoRA and for all weights; other recipes have others ([papers](papers.md)).",
    ),
    (
        "vidtrl prompt", PromptScriptArguments, {},
        "With `use_peft` and the other LoRA and launch options of [`vidtrl sft`](cli.md): [prompt enhancement](prompts.md).",
    ),
    ("InferenceOptimization", InferenceOptimization, {}, "[What makes it faster](inference.md#what-makes-it-faster)."),
]  # fmt: skip
ENTRY = re.compile(r"([a-z]\w*(?:, [a-z]\w*)*) \(((?:[^()`]|`[^`]*`|\([^()]*\))*)\)(?:, )?")


def entries(cls: type) -> list[tuple[str, list[str], str, str]]:
    """(group, names, types, text) of each entry under `Args:` in a class's docstring."""
    lines = inspect.getdoc(cls).split("\nArgs:\n")[1].splitlines()
    found, group = [], ""
    for line in lines:
        if line.startswith("    > "):
            group = line.strip(" >")
        elif re.match(r"    [a-z]", line):
            found.append((group, line.strip()))
        elif line.startswith("     "):
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
        elif line.strip():  # the next section
            break
    rows = []
    for group, text in found:
        start = 0
        heads = []
        while match := ENTRY.match(text, start):
            heads.append((match[1].split(", "), match[2]))
            start = match.end()
        assert heads and text[start : start + 1] == ":", f"{cls.__name__}: cannot read {text!r}"
        rows += [(group, names, types, text[start + 1 :].strip()) for names, types in heads]
    return rows


def default(cls: type, name: str, types: str, recipe: dict) -> str:
    """A field's default in a cell."""
    one = next(f for f in dataclasses.fields(cls) if f.name == name)
    value = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
    if value is None and recipe.get(name) is not None:
        values = recipe[name] if isinstance(recipe[name], tuple) else (recipe[name],)
        return " / ".join(f"`{v}`" for v in values) + " *"
    if value is None:  # what stands in its place later
        stated = re.search(r"defaults to (`[^`]*`)", types)
        return stated[1] if stated else ""
    return f"`{value}`" if value != "" else '`""`'


def cell(text: str) -> str:
    """Text of a docstring in Markdown."""
    text = re.sub(r"https://huggingface\.co/papers/(\d{4}\.\d{5})", r"[\1](https://huggingface.co/papers/\1)", text)
    text = re.sub(r"\[(`~?[^`\]]+`)\](?!\()", lambda m: m[1].replace("~", ""), text)
    return text.replace("|", "\\|")


def table(cls: type, recipe: dict) -> str:
    """All options of one class, and the defaults that it changes."""
    rows, documented, before = [], set(), ""
    for group, names, types, text in entries(cls):
        if group != before:
            rows.append(f"| **{group.removeprefix('Parameters that control ').capitalize()}** | | |")
            before = group
        rows += [f"| `{name}` | {default(cls, name, types, recipe)} | {cell(text)} |" for name in names]
        documented.update(names)
    bases = [base for base in cls.__mro__[1:] if dataclasses.is_dataclass(base)]
    inherited = {f.name: f.default for base in reversed(bases) for f in dataclasses.fields(base)}
    fields = {f.name: f.default for f in dataclasses.fields(cls) if f.init}
    if missing := fields.keys() - inherited.keys() - documented:
        sys.exit(f"{cls.__name__} says nowhere what {', '.join(sorted(missing))} are")
    changed = [
        f"`{name}` {default(cls, name, '', recipe) or ('none *' if name in recipe else 'where there is an accelerator for it')}"
        for name in fields
        if name not in documented and (name in recipe or fields[name] != inherited[name])
    ]
    note = f"\n\nOther defaults than above, or than in `TrainingArguments`: {', '.join(changed)}." if changed else ""
    return "\n".join(["| option | default | |", "|---|---|---|", *rows]) + note


def page() -> str:
    """The whole page."""
    parts = [
        "# Options",
        "Every setting, in one place. In Python they are arguments of the configurations, on the command line `--name value`, in a "
        "file of `--config` a key. `python scripts/option_tables.py` writes this page from the code.",
    ]
    for heading, cls, recipe, text in SECTIONS:
        parts += [f"## {heading}", text, table(cls, recipe)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = page()
    if not args.check:
        PAGE.write_text(text)
    elif not PAGE.is_file() or PAGE.read_text() != text:
        sys.exit(f"{PAGE.name} is out of date: run python scripts/option_tables.py")


if __name__ == "__main__":
    main()
