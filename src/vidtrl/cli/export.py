"""`vidtrl export`: a trained model in the form that other tools load.

comfyui      an adapter named after the original model's layers, with alpha, for ComfyUI's LoRA loaders
lora         a few-step student: its adapter and its scheduler, for the base model's own pipeline
skyreels-v2  a causal student of Wan 2.1 or SkyReels-V2: a whole SkyReelsV2DiffusionForcingPipeline
"""

import argparse
from collections.abc import Sequence

from .errors import Parser, UserError


FORMATS = ("comfyui", "lora", "skyreels-v2")


def make_parser() -> Parser:
    """The options of `vidtrl export`."""
    parser = Parser(prog="vidtrl export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="DIR", help="what a trainer saved: a directory, or a Hub id")
    parser.add_argument("output", metavar="OUTPUT", help="directory to write; for comfyui also a .safetensors file")
    parser.add_argument("--format", choices=FORMATS, required=True, help="what to write")
    parser.add_argument("--family", help="comfyui: the model's family, such as wan, if the directory does not say it")
    parser.add_argument(
        "--alpha",
        choices=("keys", "weights"),
        help="comfyui: the scale as alpha keys, or multiplied into the weights "
        "(default: keys, unless diffusers' loader of the family refuses them)",
    )
    parser.add_argument("--base_model", help="students: the base model, if it has moved (a directory or a Hub id)")
    parser.add_argument("--dtype", help="skyreels-v2: of the merged weights (default: bfloat16)")
    return parser


def run(argv: Sequence[str]) -> int:
    """Write the files and print their names."""
    args = make_parser().parse_args(argv)
    if args.dtype is not None and args.format != "skyreels-v2":
        raise UserError("--dtype is for --format skyreels-v2: the others keep the dtype that was saved")
    if args.format == "comfyui":
        if args.base_model is not None:
            raise UserError("--base_model is for students; --format comfyui takes --family")
        from ..hub import export_comfyui

        for path in export_comfyui(
            args.source, args.output, args.family, {None: None, "keys": True, "weights": False}[args.alpha]
        ):
            print(path)
        return 0
    if args.family is not None or args.alpha is not None:
        raise UserError("--family and --alpha are for --format comfyui")
    import torch

    from ..inference import export_student

    dtype = getattr(torch, args.dtype or "bfloat16", None)
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"--dtype is a type of torch such as bfloat16 or float32, not {args.dtype!r}")
    options = {"torch_dtype": dtype} if args.format == "skyreels-v2" else {}
    print(export_student(args.source, args.output, args.format, args.base_model, **options))
    return 0
