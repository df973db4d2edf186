"""How to sample a student, as its model card says it."""

import json

from ..inference.distill_config import StudentConfig


USAGE = {
    "stock": """import torch
from diffusers.utils import encode_video{image}
from vidtrl.inference import load_student

pipe = load_student({repo}, torch_dtype=torch.bfloat16)
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
video = pipe(prompt="a red circle moving right", {call}).frames[0]
encode_video(video, fps={fps}, output_path="video.mp4")""",
    "causal": """import torch
from diffusers.utils import encode_video
from vidtrl.inference import CausalVideoPipeline

pipe = CausalVideoPipeline.from_pretrained({repo}, torch_dtype=torch.bfloat16)
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
video = pipe("a red circle moving right", {call})  # or pipe.stream(...), block by block
encode_video((video * 255).byte().permute(0, 2, 3, 1), fps={fps}, output_path="video.mp4")""",
    "rollout": """import torch
from diffusers import DiffusionPipeline
from diffusers.utils import encode_video{image}
from vidtrl.inference.export import load_adapters
from vidtrl.models import VideoModel
from vidtrl.rollout import few_step_rollout

# the stock pipeline's call cannot visit the noise levels of this student
pipe = DiffusionPipeline.from_pretrained({base}, dtype=torch.bfloat16)
{load}
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
model = VideoModel(pipe)
condition = model.condition("a red circle moving right", {call})
noise = torch.randn(1, *condition.latent_shape, device=model.device)
with torch.no_grad():
    x0 = few_step_rollout(
        model, condition, noise, {sigmas}, draw=lambda step: torch.randn_like(noise), sampler={sampler!r}
    )
video = model.decode(x0)[0]
encode_video((video * 255).byte().permute(0, 2, 3, 1), fps={fps}, output_path="video.mp4")""",
}


def student_usage(
    *,
    repo_id: str,
    config: StudentConfig,
    sigmas: list[float] | None,
    adapter: bool,
    image: bool,
    size: dict,
    fps: int,
) -> str:
    """
    Python code that runs.

    Args:
        repo_id (`str`): Where the student is: a Hub id or a directory.
        config ([`StudentConfig`]): How it is sampled.
        sigmas (`list[float]`, *optional*): Its noise levels, where no scheduler can tell them to the stock pipeline.
        adapter (`bool`): Whether it is an adapter; else all weights were trained.
        image (`bool`): Whether the pipeline takes an image.
        size (`dict`): Arguments of the call that say what is generated.
        fps (`int`): Frame rate of the written video.
    """
    kind = "causal" if config.causal else "stock" if sigmas is None else "rollout"
    if kind == "stock":
        size = {"num_inference_steps": len(config.denoising_steps), "guidance_scale": 1.0} | size
    call = ", ".join(f"{name}={value!r}" for name, value in size.items())
    repo = json.dumps(repo_id)
    if adapter:
        below = {f"base_{i}": source for i, source in enumerate(config.base_adapters)}
        load = f"load_adapters(pipe, {json.dumps({**below, 'student': repo_id})})"
    else:
        load = f'pipe.transformer = type(pipe.transformer).from_pretrained({repo}, subfolder="transformer")'
    return USAGE[kind].format(
        repo=repo,
        base=json.dumps(config.base_model),
        load=load,
        call=f"image=load_image('first_frame.png'), {call}" if image else call,
        image=", load_image" if image else "",
        fps=fps,
        sigmas=[round(sigma, 6) for sigma in sigmas or ()],
        sampler=config.sampler,
    )
