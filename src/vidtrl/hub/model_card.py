"""Model cards: what was trained, on what, how, and a snippet that runs."""

import json
import os
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData


if TYPE_CHECKING:
    from transformers import TrainingArguments


def build_model_card(
    *,
    repo_id: str,
    model_name: str,
    base_model: str,
    pipeline_class: str,
    denoiser_name: str,
    denoiser_class: str,
    adapter: dict | None,
    method: str,
    lora_loader: str = "pipeline",
    image: bool = False,
    dataset_name: str | list[str] | None = None,
    tags: list[str] | None = None,
    settings: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
    fps: float = 16,
    sample_videos: list[dict[str, str]] | None = None,
    license: str | None = None,
    base_adapters: list[str] | None = None,
    usage: str | None = None,
) -> ModelCard:
    """
    Build the card of a trained video model. Makes no network call; `card.save(path)` writes it.

    Args:
        repo_id (`str`): Where the usage snippet loads the weights from: a Hub id or a local directory.
        model_name (`str`): Title.
        base_model (`str`): Hub id or path of the pipeline that was trained.
        pipeline_class, denoiser_name, denoiser_class (`str`): As diffusers names them.
        adapter (`dict`, *optional*): Summary of the LoRA configuration; `None` if all weights were trained.
        method (`str`): `"SFT"`, `"GRPO"`, ...
        lora_loader (`str`, *optional*, defaults to `"pipeline"`): Which object of diffusers loads an adapter:
            `"pipeline"`, `"denoiser"` or `"none"`.
        image (`bool`, *optional*, defaults to `False`): Whether the pipeline takes an image.
        dataset_name (`str` or `list[str]`, *optional*): Hub ids of the training data.
        tags (`list[str]`, *optional*): Further tags.
        settings (`dict`, *optional*): Training settings for the table.
        generation (`dict`, *optional*): Arguments of the pipeline call in the snippet.
        fps (`float`, *optional*, defaults to `16`): Frame rate of the written video.
        sample_videos (`list[dict]`, *optional*): `{"path": relative path, "prompt": text}`.
        license (`str`, *optional*): Licence of the weights.
        base_adapters (`list[str]`, *optional*): Hub ids or paths of adapters that stay on under this one.
        usage (`str`, *optional*): Python code that samples the model, in place of the stock pipeline's call.

    Returns:
        `huggingface_hub.ModelCard`.

    Example:

    ```python
    >>> card = build_model_card(
    ...     repo_id="me/wan-sft",
    ...     model_name="wan-sft",
    ...     base_model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    ...     pipeline_class="WanPipeline",
    ...     denoiser_name="transformer",
    ...     denoiser_class="WanTransformer3DModel",
    ...     adapter={"r": 32, "lora_alpha": 32},
    ...     method="SFT",
    ... )
    >>> card.data.base_model
    'Wan-AI/Wan2.1-T2V-1.3B-Diffusers'
    ```
    """
    samples, task = sample_videos or [], "image-to-video" if image else "text-to-video"
    datasets = [dataset_name] if isinstance(dataset_name, str) else dataset_name
    on_hub = bool(base_model) and base_model.count("/") == 1 and not os.path.exists(base_model)
    all_tags = ["vidtrl", task, "diffusers", "lora" if adapter else "full-finetuning", *(tags or [])]
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=task,
        tags=list(dict.fromkeys(all_tags)),
        license=license,
        datasets=datasets,
        # the Hub refuses a card whose base model is no repository
        base_model=base_model if on_hub else None,
        base_model_relation=("adapter" if adapter else "finetune") if on_hub else None,
        widget=[{"text": one["prompt"], "output": {"url": one["path"]}} for one in samples] or None,
    )
    template = files("vidtrl.hub") / "templates" / "model_card.md"
    return ModelCard.from_template(
        data,
        template_str=template.read_text(encoding="utf-8"),
        repo_id=repo_id,
        model_name=model_name,
        base_model=base_model or "the base pipeline",
        on_hub=on_hub,
        pipeline_class=pipeline_class,
        denoiser_name=denoiser_name,
        denoiser_class=denoiser_class,
        adapter=adapter,
        method=method,
        lora_loader=lora_loader,
        image=image,
        trained_on=datasets or [],
        settings=settings or {},
        generation=generation or {},
        fps=int(fps) if float(fps).is_integer() else fps,
        samples=samples,
        base_adapters=base_adapters or [],
        usage=usage,
    )


def training_settings(args: "TrainingArguments", method: str, steps: int) -> dict[str, Any]:
    """The rows of the card's table."""
    processes = args.world_size
    return {
        "method": method,
        "steps": steps,
        "global batch size": args.per_device_train_batch_size * args.gradient_accumulation_steps * processes,
        "learning rate": args.learning_rate,
        "optimizer": args.optim.value,
        "precision": "bfloat16 autocast" if args.bf16 else "float16 autocast" if args.fp16 else "float32",
        "weight average": args.ema_decay or "none",
        "seed": args.seed,
    }


def last_validation_videos(output_dir: str | os.PathLike) -> list[dict[str, str]]:
    """The videos of a run's last validation: path below `output_dir`, and prompt."""
    runs = sorted(Path(output_dir, "validation").glob("step_*/prompts.json"))
    if not runs:
        return []
    prompts = json.loads(runs[-1].read_text())
    folder = runs[-1].parent.relative_to(output_dir)
    return [{"path": str(folder / name), "prompt": prompt} for name, prompt in prompts.items()]
