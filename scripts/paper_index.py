"""Write docs/papers.md: every method that vidtrl implements, its paper, where it stands in the code, and its settings.

    python scripts/paper_index.py           # write the page
    python scripts/paper_index.py --check   # fail if the page is not what this script writes

The settings of a recipe are read from the tables that the trainers use, so the page cannot say anything else.
"""

import argparse
import importlib
import inspect
import re
import sys
from pathlib import Path

from vidtrl.hub.papers import DISTILL, GRPO
from vidtrl.trainer import distill_recipes, grpo_recipes


PAGE = Path(__file__).parent.parent / "docs" / "papers.md"
SOURCE = Path(__file__).parent.parent / "src" / "vidtrl"

STAGES = [  # what is done, id, where, settings
    ("The framework's four stages", "2604.25427", "`vidtrl demo`, `vidtrl run`", ""),
    ("Flow matching", "2210.02747", "`VideoSFTTrainer`", 'sigma_sampling="uniform"'),
    ("Rectified flow", "2209.03003", "the model's coordinates: `vidtrl.diffusion.flow`", ""),
    ("Logit-normal and mode sampling of the noise level", "2403.03206", "`VideoSFTConfig`", 'sigma_sampling="logit_normal" or "mode"'),
    ("Min-SNR weighting", "2303.09556", "`VideoSFTConfig`", 'loss_weighting="min_snr"'),
    ("The bell-shaped weight of CausVid's trainings", "2412.07772", "`VideoSFTConfig`", 'loss_weighting="bell"'),
    ("Classifier-free guidance", "2207.12598", "caption dropout in SFT; rollouts, teachers", "caption_dropout, guidance_scale"),
    ("Diffusion Forcing", "2407.01392", "`VideoSFTConfig`", 'causal="diffusion_forcing"'),
    ("rsLoRA", "2312.03732", "`LoraConfig`", "use_rslora=True"),
    ("DoRA", "2402.09353", "`LoraConfig`", "use_dora=True"),
    ("GRPO", "2402.03300", "`group_advantages`", 'scale_rewards="group"'),
    ("PPO's clipped ratio", "1707.06347", "`clipped_loss`", "epsilon"),
    ("DAPO's second clip range", "2503.14476", "`clipped_loss`", "epsilon_high"),
    ("TR-DPO's moving reference", "2404.09656", "`VideoGRPOConfig`", "sync_ref_model=True"),
    ("DDIM", "2010.02502", "`ddim`: CogVideoX, Allegro", ""),
    ("SAGE-GRPO's SDE", "2603.21872", "`ma_sde`", 'transition="ma-sde"'),
    ("DPM-Solver++", "2211.01095", "the tail of a rollout", 'tail_solver="dpm-solver++"'),
    ("DDPO's compressibility task", "2305.13301", "rewards that are meant to be gamed", '"jpeg-compressibility", "jpeg-incompressibility"'),
    ("RePrompt", "2505.17540", "`vidtrl prompt`: `video_reward`, `structure_reward`", ""),
    ("PromptRL's joint training", "2602.01382", "`examples/joint_prompt_video`", ""),
    ("DMD", "2311.18828", "`dmd_loss`", 'loss_type="dmd"'),
    ("Score identity distillation", "2404.04057", "`sid_loss`", 'loss_type="sid"'),
    ("Consistency models", "2303.01469", "`consistency_loss`", 'loss_type="consistency"'),
    ("Improved consistency training", "2310.14189", "its target", 'consistency_target="student"'),
    ("Continuous-time consistency (sCM)", "2410.11081", "`scm_loss`", 'consistency="continuous"'),
    ("LCM-LoRA", "2311.05556", 'recipe `lcm` with `peft_config`', ""),
    ("Gumbel-max sampling", "1611.01144", "`PromptEnhancer`: the same answer in any batch", ""),
    ("ZeRO", "1910.02054", "`vidtrl estimate`", 'strategy "zero2", "zero3"'),
    ("PyTorch FSDP", "2304.11277", "`vidtrl estimate`", 'strategy "fsdp2"'),
]  # fmt: skip


def link(paper: str) -> str:
    """A paper's page."""
    return f"[{paper}](https://huggingface.co/papers/{paper})"


def show(value) -> str:
    """A setting's value in a cell."""
    if isinstance(value, tuple):
        return " / ".join(map(repr, value))
    return repr(value)


def recipe_rows(papers: dict, recipes: dict, defaults: dict) -> list[str]:
    """One line a recipe: what it sets otherwise than the trainer's own defaults."""
    assert papers.keys() == recipes.keys(), f"without a paper: {sorted(papers.keys() ^ recipes.keys())}"
    rows = []
    for name, (title, paper) in papers.items():
        changed = {k: v for k, v in recipes[name].items() if v != defaults.get(k)}
        settings = ", ".join(f"`{key}={show(value)}`" for key, value in changed.items()) or "the defaults below"
        rows.append(f"| {title} | {link(paper)} | `{name}` | {settings} |")
    return rows


def functions() -> list[str]:
    """Public functions of `vidtrl.diffusion`, with the papers that their docstrings name."""
    rows = []
    for module in sorted(path.stem for path in (SOURCE / "diffusion").glob("*.py") if path.stem != "__init__"):
        for name, found in sorted(vars(importlib.import_module(f"vidtrl.diffusion.{module}")).items()):
            if name.startswith("_") or not inspect.isfunction(found) or not found.__module__.endswith(module):
                continue
            text = inspect.getdoc(found) or ""
            papers = sorted({part[:10] for part in text.split("huggingface.co/papers/")[1:]})
            if papers:
                first = re.sub(r"\s*\([^()]*huggingface[^()]*\)?", "", " ".join(text.split("\n\n")[0].split()))
                first = first.split(". ")[0].rstrip(".:,").replace("|", "\\|")
                rows.append(f"| `{module}.{name}` | {first} | {', '.join(map(link, papers))} |")
    return rows


def defaults(values: dict) -> str:
    """The defaults as one paragraph."""
    return ", ".join(f"`{key}={show(value)}`" for key, value in values.items())


def page() -> str:
    """The whole page."""
    parts = [
        "# Papers",
        "Every method that is implemented, with its paper, its name here and its settings. "
        "`python scripts/paper_index.py` writes this page; the recipes' settings are read from the tables that the trainers use.",
        "## Reinforcement learning",
        '`VideoGRPOConfig(recipe="...")`. Settings are those that differ from the defaults; any of them can be set by hand beside the recipe.',
        "\n".join(["| method | paper | recipe | settings |", "|---|---|---|---|", *recipe_rows(GRPO, grpo_recipes.RECIPES, grpo_recipes.DEFAULTS)]),
        f"Defaults: {defaults(grpo_recipes.DEFAULTS)}.",
        "## Distillation",
        '`VideoDistillConfig(recipe="...")`. Of two values with a slash the first is for LoRA, the second for all weights. Guidance is in the standard form.',
        "\n".join(["| method | paper | recipe | settings |", "|---|---|---|---|", *recipe_rows(DISTILL, distill_recipes.RECIPES, distill_recipes.DEFAULTS)]),
        f"Defaults: {defaults(distill_recipes.DEFAULTS)}.",
        "## Everything else",
        "\n".join(["| method | paper | where | settings |", "|---|---|---|---|",
                   *(f"| {what} | {link(paper)} | {where} | {f'`{settings}`' if settings else ''} |" for what, paper, where, settings in STAGES)]),
        "## The maths, function by function",
        "Pure functions in `vidtrl.diffusion`; the equations stand in their docstrings.",
        "\n".join(["| function | what | paper |", "|---|---|---|", *functions()]),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = page()
    if not args.check:
        PAGE.write_text(text)
    elif PAGE.read_text() != text:
        sys.exit(f"{PAGE.name} is out of date: run python scripts/paper_index.py")


if __name__ == "__main__":
    main()
