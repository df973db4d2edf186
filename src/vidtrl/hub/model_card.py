"""Model cards: what was trained, on what, how, and a snippet that runs."""

import os
from importlib.resources import files
from typing import Any

from huggingface_hub import ModelCard, ModelCardData


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
    task: str = "text-to-video",
    dataset_name: str | list[str] | None = None,
    tags: list[str] | None = None,
    settings: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
    fps: float = 16,
    sample_videos: list[dict[str, str]] | None = None,
    license: str | None = None,
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
        task (`str`, *optional*, defaults to `"text-to-video"`): Task tag of the Hub.
        dataset_name (`str` or `list[str]`, *optional*): Hub ids of the training data.
        tags (`list[str]`, *optional*): Further tags.
        settings (`dict`, *optional*): Training settings for the table.
        generation (`dict`, *optional*): Arguments of the pipeline call in the snippet.
        fps (`float`, *optional*, defaults to `16`): Frame rate of the written video.
        sample_videos (`list[dict]`, *optional*): `{"path": relative path, "prompt": text}`.
        license (`str`, *optional*): Licence of the weights.

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
    samples = sample_videos or []
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
        task=task,
        trained_on=datasets or [],
        settings=settings or {},
        generation=generation or {},
        fps=int(fps) if float(fps).is_integer() else fps,
        samples=samples,
    )
