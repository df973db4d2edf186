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
}


def student_usage(
    *,
    repo_id: str,
    config: StudentConfig,
    image: bool,
    size: dict,
    fps: int,
) -> str:
    """
    Python code that runs.

    Args:
        repo_id (`str`): Where the student is: a Hub id or a directory.
        config ([`StudentConfig`]): How it is sampled.
        image (`bool`): Whether the pipeline takes an image.
        size (`dict`): Arguments of the call that say what is generated.
        fps (`int`): Frame rate of the written video.
    """
    kind = "causal" if config.causal else "stock"
    if kind == "stock":
        size = {"num_inference_steps": len(config.denoising_steps), "guidance_scale": 1.0} | size
    call = ", ".join(f"{name}={value!r}" for name, value in size.items())
    return USAGE[kind].format(
        repo=json.dumps(repo_id),
        call=f"image=load_image('first_frame.png'), {call}" if image else call,
        image=", load_image" if image else "",
        fps=fps,
    )
