"""What `vidtrl run` says at its end: figures, and how to use what was trained."""

import json
from pathlib import Path

from ..models.families import FAMILIES, Family
from ..trainer.lora import ADAPTER_FILE, EXPERT_FILES
from .run_plan import Pipeline, Stage
from .run_state import State, output_files


SIZE = ("height", "width", "num_frames", "max_sequence_length")

SCRIPT = '''"""Generate with what vidtrl run trained: python generate.py "a prompt" [video.mp4]{usage}

{what}
"""

import argparse
{system}from pathlib import Path

import torch
{imports}from diffusers.utils import {utils}
{pillow}{vidtrl}

here = Path(__file__).parent
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
parser = argparse.ArgumentParser(description="Generate with what vidtrl run trained.")
parser.add_argument("prompt")
parser.add_argument("path", nargs="?", default="video.mp4")
{option}args = parser.parse_args()
prompt = args.prompt
{enhancer}{image}{load}pipe.to(device)

video = {sample}
encode_video(video, fps={fps}, output_path=args.path)
'''
OPTION = """parser.add_argument("--image", required=True, help="what the video starts from: a file or a URL")
"""
IMAGE = """image = load_image(args.image)
"""
FITTED = """image = ImageOps.fit(load_image(args.image), ({width}, {height}))  # covers the size, and is cropped to it
"""
ENHANCER = """
prompt = PromptEnhancer.from_pretrained(here / "prompt")(prompt)
print(prompt)
"""
STACK = """
pipe = DiffusionPipeline.from_pretrained({model}, dtype=dtype)
{adapters}
pipe.set_adapters({names})
"""
SCHEDULER = """
sys.path.insert(0, str(here / "distill" / "scheduler"))  # its source lies beside its configuration
from few_step_flow_scheduler import FewStepFlowScheduler  # noqa: E402

pipe.scheduler = FewStepFlowScheduler.from_pretrained(here / "distill" / "scheduler")
"""
CAUSAL = """
pipe = CausalVideoPipeline.from_pretrained(here / "distill", torch_dtype=dtype)
"""


def write_script(pipeline: Pipeline, finished: list[Stage]) -> Path | None:
    """
    Write `generate.py`, a complete program that samples what was trained so far.

    Args:
        pipeline ([`Pipeline`]): All of it.
        finished (`list[Stage]`): Its finished stages.

    Returns:
        `Path` or `None`: The file; `None` if nothing was trained that a program this short can sample.
    """
    trained = [stage.name for stage in finished]
    video = [stage for stage in finished if stage.name != "prompt"]
    student = pipeline.output_dir / "distill" if "distill" in trained else None
    config = json.loads((student / "distill_config.json").read_text()) if student else {}
    causal = config.get("frames_per_block") is not None
    if not video or student and not causal and not (student / "scheduler").is_dir():
        return None
    settings = video[-1].settings
    call = {name: settings[name] for name in SIZE if settings.get(name) is not None}
    call |= settings.get("pipeline_kwargs") or {}
    if student and not causal:
        call |= {"num_inference_steps": len(config["denoising_steps"]), "guidance_scale": 1.0}
    base = {f"base_{i}": adapter for i, adapter in enumerate(pipeline.base_adapters)}
    lines = [f"pipe.load_lora_weights({adapter!r}, adapter_name={name!r})" for name, adapter in base.items()]
    lines += [line for stage in video for line in _loading(stage)]
    names = [*base, *(stage.name for stage in video)]
    family = _family(pipeline.model, settings.get("model_revision"))
    if "num_frames" in call and not causal:
        call[family.frames_argument] = call.pop("num_frames")
    model = str(Path(pipeline.model).resolve()) if Path(pipeline.model).is_dir() else pipeline.model
    stack = STACK.format(model=json.dumps(model), adapters="\n".join(lines), names=names)
    image = ""
    if family.image:
        image = FITTED.format(**call) if call.keys() >= {"height", "width"} else IMAGE
    given = "image=image, prompt=prompt" if image else "prompt=prompt"  # by name: either may be the pipeline's first
    call = ", ".join([given, *(f"{name}={value!r}" for name, value in call.items())])
    call += ', generator=torch.Generator("cpu").manual_seed(0)'
    used = ["CausalVideoPipeline"] if causal else []
    used += ["PromptEnhancer"] if "prompt" in trained else []
    what = (
        "The causal student, upon the adapters of the stages before it"
        if causal
        else "Stock diffusers: the adapters stacked"
    )
    what += ", with the student's scheduler" if student and not causal else ""
    what += ", behind the trained prompt enhancer" if "prompt" in trained else ""
    text = SCRIPT.format(
        what=f"{what}.",
        usage=" --image image.png" if image else "",
        option=OPTION if image else "",
        image=image,
        system="import sys\n" if student and not causal else "",
        imports="" if causal else "from diffusers import DiffusionPipeline\n",
        utils="encode_video, load_image" if image else "encode_video",
        pillow="from PIL import ImageOps\n" if "ImageOps" in image else "",
        vidtrl=f"from vidtrl import {', '.join(used)}\n" if used else "",
        enhancer=ENHANCER if "prompt" in trained else "",
        load=CAUSAL if causal else stack + (SCHEDULER if student else ""),
        sample=f"(pipe({call}) * 255).byte().permute(0, 2, 3, 1)" if causal else f"pipe({call}).frames[0]",
        fps=int(settings.get("fps") or 16),
    )
    path = pipeline.output_dir / "generate.py"
    path.write_text(text)
    return path


def _family(model: str, revision: str | None) -> Family:
    """What the pipeline's call takes."""
    from diffusers import DiffusionPipeline

    name = DiffusionPipeline.load_config(model, revision=revision)["_class_name"]
    return next(family for family in FAMILIES if name in family.pipelines)  # rows of one class agree about it


def _loading(stage: Stage) -> list[str]:
    """Statements that load the stage's adapter; of a model with two experts, for each of them."""
    lines = []
    for path in output_files(stage):
        which = "" if path.name == ADAPTER_FILE else f", weight_name={path.name!r}"
        second = stage.settings.get("experts") == "low" or path.name == EXPERT_FILES["transformer_2"]
        which += ", load_into_transformer_2=True" if second else ""
        lines.append(f"pipe.load_lora_weights(here / {stage.name!r}, adapter_name={stage.name!r}{which})")
    return lines


def print_summary(pipeline: Pipeline, finished: list[Stage], state: State, script: Path | None) -> None:
    """
    Print where the results are, how training went, and how to use them.

    Args:
        pipeline ([`Pipeline`]): All of it.
        finished (`list[Stage]`): Its finished stages.
        state ([`State`]): Their records.
        script (`Path`, *optional*): From [`write_script`].
    """
    print("\nfinished:")
    for stage in finished:
        record = state.stages[stage.name]
        updates = ", ".join(
            f"{number} updates" if name == stage.name else f"{name} {number} updates"
            for name, number in record["figures"]["updates"].items()
        )
        what = "enhancer" if stage.name == "prompt" else "adapter"
        print(
            f"  {stage.name:8} {what} in {stage.folder}; {updates or 'no checkpoint kept'}, {record['seconds']:.0f} s"
        )
        for name, (first, last) in record["figures"]["metrics"].items():
            print(f"{'':11}{name}: {first:.4g} -> {last:.4g}")
    left = [stage.name for stage in pipeline.stages if stage not in finished]
    if left:
        print(f"not finished: {', '.join(left)}")
    print("use it:")
    if script is not None:
        image = " --image image.png" if '"--image"' in script.read_text() else ""
        print(
            f'  python {script} "a prompt" video.mp4{image}   # a short program; read it to load the result into your own'
        )
    video = [str(stage.folder) for stage in finished if stage.name != "prompt"]
    if any(stage.name == "distill" for stage in finished):
        print(f"  vidtrl benchmark {pipeline.output_dir / 'distill'}   # vidtrl.load_student loads the same folder")
    elif video:
        print(f"  vidtrl benchmark {pipeline.model} --lora {' '.join(video)}")
