"""`vidtrl check-model`: is this model sampled and trained as its own pipeline means it?"""

import json
from collections.abc import Sequence
from pathlib import Path

from .errors import Parser, UserError


DTYPES = ("float32", "bfloat16", "float16")


def make_parser() -> Parser:
    """The options of `vidtrl check-model`."""
    parser = Parser(
        prog="vidtrl check-model",
        description="Check a diffusers video pipeline: the ideal denoiser must reproduce the VAE's latents, vidtrl's "
        "sampling loop must follow the pipeline's own trajectory, and gradients must reach the denoiser. Prints a "
        "table and a verdict; the exit code is 0 if all checks pass and 1 if one fails.",
    )
    parser.add_argument("model", metavar="PATH_OR_ID", help="directory of a pipeline, or its id on the Hub")
    parser.add_argument("--prompt", default="a dog runs through a park", help="prompt used (default: %(default)r)")
    parser.add_argument("--height", type=int, help="pixels; the smallest that the model allows if left out")
    parser.add_argument("--width", type=int, help="pixels")
    parser.add_argument("--num_frames", type=int, help="frames")
    parser.add_argument("--torch_dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument(
        "--pipeline_kwargs",
        default="{}",
        help="""JSON of further pipeline arguments, e.g. '{"max_sequence_length": 16}'""",
    )
    parser.add_argument("--device", help="e.g. cuda; the accelerator if there is one, else cpu")
    return parser


def run(argv: Sequence[str]) -> int:
    """Check the model that the arguments name. Returns 0 if it passes and 1 if it does not."""
    args = make_parser().parse_args(argv)
    try:
        pipeline_kwargs = json.loads(args.pipeline_kwargs)
    except json.JSONDecodeError as error:
        raise UserError(f"--pipeline_kwargs is not JSON: {error}") from error
    if not isinstance(pipeline_kwargs, dict):
        raise UserError(f"--pipeline_kwargs must be a JSON object, not {args.pipeline_kwargs}")
    if args.model.startswith((".", "/", "~")) and not Path(args.model).expanduser().is_dir():
        raise UserError(f"{args.model!r} is no directory")

    import torch

    from ..models import VideoModel, check_model

    revision = {"revision": args.revision} if args.revision else {}
    model = VideoModel.from_pretrained(args.model, torch_dtype=getattr(torch, args.torch_dtype), **revision)
    device = args.device or (
        torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    )
    model.pipe.to(device)
    sizes = {"height": args.height, "width": args.width, "num_frames": args.num_frames}
    report = check_model(model, prompt=args.prompt, **sizes, **pipeline_kwargs)
    print(report)
    return 0 if report.ok else 1
