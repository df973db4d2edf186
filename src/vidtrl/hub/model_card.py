"""Model cards: what was trained, on what, how, and a snippet that runs."""

import json
import os
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HTTPError
from transformers.utils import logging

from ..models.loading import looks_like_hub_id
from ..trainer.lora import ADAPTER_FILE, EXPERT_FILES, BaseAdapter
from .run_summary import method_and_paper


if TYPE_CHECKING:
    from transformers import TrainingArguments


logger = logging.get_logger(__name__)

PEFT_LOADER = """\
import json
from huggingface_hub import hf_hub_download
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.functional import set_adapter
from safetensors import safe_open

def load_lora(model, path, name):  # diffusers has no loader for this model
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
        weights = {key.removeprefix("transformer."): file.get_tensor(key) for key in file.keys()}
    config = LoraConfig(**{key.removeprefix("transformer."): value for key, value in config.items()})
    inject_adapter_in_model(config, model, adapter_name=name)
    set_peft_model_state_dict(model, weights, adapter_name=name)
"""


def build_model_card(
    *,
    repo_id: str,
    model_name: str,
    base_model: str,
    pipeline_class: str,
    denoiser_names: list[str],
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
    license: str | dict[str, str] | None = None,
    base_adapters: list[BaseAdapter] | None = None,
    usage: str | None = None,
    recipe: str | None = None,
    rewards: list[dict[str, str]] | None = None,
    evaluation: list[dict[str, str]] | None = None,
    curves: list[dict[str, str]] | None = None,
) -> ModelCard:
    """
    Build the card of a trained video model. Makes no network call; `card.save(path)` writes it.

    Args:
        repo_id (`str`): Where the usage snippet loads the weights from: a Hub id or a local directory.
        model_name (`str`): Title.
        base_model (`str`): Hub id or path of the pipeline that was trained.
        pipeline_class, denoiser_class (`str`): As diffusers names them.
        denoiser_names (`list[str]`): The pipeline's components that were trained: `["transformer"]`, of two experts one or
            both.
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
        license (`str` or `dict`, *optional*): Licence of the weights; with `license_name` and `license_link`, as
            [`licence_of`] gives it.
        base_adapters (`list[BaseAdapter]`, *optional*): Adapters that stay on under this one.
        usage (`str`, *optional*): Python code that samples the model, in place of the stock pipeline's call.
        recipe (`str`, *optional*): Of the trainer's configuration; its paper is linked.
        rewards, evaluation (`list[dict]`, *optional*): Rows of `name`, `first`, `last` and `step`, as `first_and_last` of
            run_summary.py gives them.
        curves (`list[dict]`, *optional*): `{"path": relative path, "title": text}` of pictures.

    Returns:
        `huggingface_hub.ModelCard`.

    Example:

    ```python
    >>> card = build_model_card(
    ...     repo_id="me/wan-sft",
    ...     model_name="wan-sft",
    ...     base_model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    ...     pipeline_class="WanPipeline",
    ...     denoiser_names=["transformer"],
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
    on_hub = is_hub_id(base_model)
    how, paper = method_and_paper(method, recipe)
    all_tags = ["vidtrl", task, "diffusers", "lora" if adapter else "full-finetuning", *(tags or [])]
    all_tags += [f"arxiv:{paper}"] if paper else []
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=task,
        tags=list(dict.fromkeys(all_tags)),
        **(license if isinstance(license, dict) else {"license": license}),
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
        denoiser_names=denoiser_names,
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
        loading=load_adapters(repo_id, denoiser_names, lora_loader, base_adapters or []),
        usage=usage,
        how=how,
        rewards=rewards or [],
        evaluation=evaluation or [],
        curves=curves or [],
    )


def is_hub_id(name: str) -> bool:
    """Whether a model's name is a repository's and not a path."""
    return looks_like_hub_id(name) and not os.path.exists(name)


def licence_of(base_model: str, token: str | None = None) -> dict[str, str]:
    """
    The licence that a base model's card states, which is also that of what was trained from it. Asks the Hub.

    Args:
        base_model (`str`): Hub id or directory.
        token (`str`, *optional*): For a repository that is not public.

    Returns:
        `dict[str, str]`: `license` and, of one that has no short name on the Hub, `license_name` and `license_link`; empty
        where there is no card, or it cannot be read.
    """
    path = os.path.join(base_model, "README.md")
    if is_hub_id(base_model):
        try:
            path = hf_hub_download(base_model, "README.md", token=token)
        except (HTTPError, OSError) as error:  # a missing card or network must not cost the upload
            logger.warning(f"the licence of {base_model} is not known, so the card has none ({type(error).__name__})")
            return {}
    if not os.path.isfile(path):
        return {}
    data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    return {name: data[name] for name in ("license", "license_name", "license_link") if data.get(name)}


def load_adapters(source: str, denoiser_names: list[str], loader: str, base_adapters: list[BaseAdapter]) -> str:
    """
    Python code by which stock diffusers loads a run's adapters into `pipe`: one file, or one for each of two experts.

    Args:
        source (`str`): Hub id or directory.
        denoiser_names (`list[str]`): What they are for.
        loader (`str`): Which object of diffusers loads them; see [`build_model_card`]. `"none"` is written out with PEFT.
        base_adapters (`list[BaseAdapter]`): Those that stay on under them.
    """
    names, lines = {denoiser: [] for denoiser in denoiser_names}, [PEFT_LOADER] if loader == "none" else []
    trained = [
        BaseAdapter(
            source, denoiser, "trained" if base_adapters else "", EXPERT_FILES[denoiser] if len(names) > 1 else None
        )
        for denoiser in denoiser_names
    ]
    for one in [*base_adapters, *trained]:
        names[one.denoiser].append(one.name)
        if loader == "none":
            file = one.weight_name or ADAPTER_FILE
            local = json.dumps(os.path.join(one.source, file) if os.path.isdir(one.source) else one.source)
            remote = f"hf_hub_download({json.dumps(one.source)}, {json.dumps(file)})"
            path = local if os.path.exists(one.source) else remote
            lines.append(f'load_lora(pipe.{one.denoiser}, {path}, "{one.name or "trained"}")')
            continue
        arguments = [json.dumps(one.source)]
        if one.weight_name or loader != "pipeline":
            arguments.append(f"weight_name={json.dumps(one.weight_name or ADAPTER_FILE)}")
        if one.name:
            arguments.append(f"adapter_name={json.dumps(one.name)}")
        if loader == "pipeline":
            second = ["load_into_transformer_2=True"] if one.denoiser == "transformer_2" else []
            lines.append(f"pipe.load_lora_weights({', '.join(arguments + second)})")
        else:
            lines.append(f'pipe.{one.denoiser}.load_lora_adapter({", ".join(arguments)}, prefix="transformer")')
    if base_adapters and loader == "none":
        lines += [f"set_adapter(pipe.{d}, {json.dumps(n)})  # one upon the other" for d, n in names.items()]
    elif base_adapters:
        lines += [f"pipe.{d}.set_adapters({json.dumps(n)})  # one upon the other" for d, n in names.items()]
    return "\n".join(lines)


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
    return [{"path": (folder / name).as_posix(), "prompt": prompt} for name, prompt in prompts.items()]
