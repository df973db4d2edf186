"""`vidtrl benchmark`: how fast a model samples, where the time goes, and what an optimisation changes."""

import contextlib
import dataclasses
import functools
import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path

from .errors import Parser, UserError


DTYPES = ("float32", "bfloat16", "float16")


def make_parser() -> Parser:
    """The options of `vidtrl benchmark`."""
    parser = Parser(
        prog="vidtrl benchmark",
        description="Time a video pipeline or a few-step student: denoiser evaluations, denoising alone and the whole call "
        "(after a warm-up, waiting for the device), and peak memory. With optimisations, the model is measured without "
        "and with them, and the deviation of the latents from the unoptimised run with the same seed is reported.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="directory or Hub id of a pipeline, or of a student (distill_config.json)"
    )
    parser.add_argument("--lora", nargs="+", default=[], metavar="DIR", help="adapters, stacked in this order")
    parser.add_argument(
        "--steps", nargs="+", type=int, metavar="N", help="numbers of steps; a student's own by default"
    )
    parser.add_argument("--guidance_scale", type=float, help="the pipeline's default if left out; 1 for a student")
    parser.add_argument("--prompt", default="a dog runs through a park", help="default: %(default)r")
    parser.add_argument("--height", type=int, required=True, help="pixels")
    parser.add_argument("--width", type=int, required=True, help="pixels")
    parser.add_argument("--num_frames", type=int, required=True, help="frames")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--torch_dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    parser.add_argument("--device", help="e.g. cuda; the accelerator if there is one, else cpu")
    parser.add_argument("--warmup", type=int, default=1, help="runs before the clock (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs; the median counts (default: %(default)s)")
    parser.add_argument("--revision", help="branch, tag or commit of the pipeline on the Hub")
    parser.add_argument(
        "--pipeline_kwargs", default="{}", metavar="JSON", help="further arguments of the pipeline call"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    group = parser.add_argument_group("optimisations", "All of them together make the optimised run.")
    group.add_argument("--fuse_lora", action="store_true", help="merge the adapters into the weights")
    group.add_argument("--quantization", metavar="JSON", help="arguments of diffusers' PipelineQuantizationConfig")
    group.add_argument("--layerwise_casting", metavar="DTYPE", help="storage dtype, e.g. float8_e4m3fn")
    group.add_argument("--attention_backend", metavar="NAME", help="e.g. _native_cudnn, flash_hub, sage")
    group.add_argument("--cache", metavar="CLASS", help="a cache of diffusers, e.g. FirstBlockCacheConfig")
    group.add_argument("--cache_kwargs", default="{}", metavar="JSON", help="its arguments")
    group.add_argument("--compile", action="store_true", help="compile the repeated blocks")
    group.add_argument("--compile_kwargs", metavar="JSON", help="arguments of torch.compile")
    group.add_argument("--offload", choices=("model", "sequential", "group"), help="weights wait on the CPU")
    group.add_argument("--vae_tiling", action="store_true", help="decode tile by tile")
    group.add_argument("--vae_slicing", action="store_true", help="decode clip by clip")
    group.add_argument("--vae_dtype", choices=DTYPES, help="decode in this dtype")
    group.add_argument("--vae_channels_last", action="store_true", help="its convolutions with channels last")
    group.add_argument("--vae_compile", action="store_true", help="compile the decoder")
    return parser


def run(argv: Sequence[str]) -> int:
    """Measure what the arguments name, print a table and write the JSON file. Returns 0."""
    args = make_parser().parse_args(argv)
    args.pipeline_kwargs = _json(args.pipeline_kwargs, "--pipeline_kwargs")
    if args.repeats < 1 or args.warmup < 1:
        raise UserError("--repeats and --warmup must be at least 1: the first run loads kernels and compiles")
    if args.steps and min(args.steps) < 1:
        raise UserError("--steps must be positive")
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise UserError(f"--json: there is no directory {str(args.json.absolute().parent)!r}")
    for option, folder in [("MODEL", args.model), *(("--lora", folder) for folder in args.lora)]:
        if folder.startswith((".", "/", "~")) and not Path(folder).expanduser().exists():
            raise UserError(f"{option}: there is nothing at {folder!r}")

    import diffusers
    import torch

    optimization = _optimization(args)
    device = args.device or (
        torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    )
    name = platform.processor() or device
    if torch.device(device).type in ("cuda", "xpu"):
        name = torch.get_device_module(device).get_device_name(device)
    try:
        results = _measure(args, optimization, device)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the device is out of memory. Lower --num_frames, --height or --width, or choose another --torch_dtype. {error}"
        ) from error
    print(f"{args.model} on {name}, {args.torch_dtype}, {args.num_frames} frames of {args.height}x{args.width}")
    print(table(results))
    if args.json is not None:
        report = {
            "arguments": {
                name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
            },
            "device": name,
            "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
            "runs": [_plain(dataclasses.asdict(result)) for result in results],
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def table(results) -> str:
    """The results as aligned text, one row for each."""
    rows = [["", "steps", "evaluations", "denoise", "end to end", "peak memory", "PSNR", "cosine"]]
    for r in results:
        psnr = "" if r.psnr is None else "identical" if math.isinf(r.psnr) else f"{r.psnr:.1f} dB"
        cosine = "" if r.cosine is None else f"{r.cosine:.6f}"
        seconds = [f"{r.denoise_seconds:.3f} s", f"{r.total_seconds:.3f} s"]
        memory = f"{r.peak_memory / 2**30:.2f} GiB"
        rows.append([r.name, str(r.num_inference_steps), str(r.evaluations), *seconds, memory, psnr, cosine])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)] for row in rows]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *line]).rstrip() for row, line in zip(rows, lines, strict=True)
    )


def _measure(args, optimization, device: str) -> list:
    """Every number of steps as loaded, then all of them optimised."""
    from ..inference import CausalVideoPipeline
    from ..inference.benchmark import measure

    pipe, samplers = _load(args, {}, device)
    settings = dict(warmup=args.warmup, repeats=args.repeats)
    results, references = [], {}
    for steps, sample in samplers.items():
        if optimization is not None:  # before minutes are spent
            optimization.check(_stock(pipe), steps)
        result, references[steps] = measure("as loaded", sample, _denoisers(pipe), device, steps, **settings)
        results.append(result)
    if optimization is None:
        return results
    if optimization.load_kwargs or optimization.offload:
        del pipe, samplers, sample
        pipe, samplers = _load(args, optimization.load_kwargs, None if optimization.offload else device)
    if isinstance(pipe, CausalVideoPipeline):
        pipe.optimize(optimization)
    else:
        optimization.apply(pipe, min(samplers))
    for steps, sample in samplers.items():
        settings["reference"] = references[steps]
        results.append(measure("optimised", sample, _denoisers(pipe), device, steps, **settings)[0])
    return results


def _denoisers(pipe) -> list:
    return [m for n in ("transformer", "transformer_2") if (m := _stock(pipe).components.get(n)) is not None]


def _stock(pipe):
    """The stock pipeline under a causal one."""
    return getattr(pipe, "pipe", pipe)


def _load(args, load_kwargs: dict, device: str | None) -> tuple:
    """The pipeline, and for each number of steps a function that samples with it."""
    import torch

    from ..inference import CausalVideoPipeline, load_student, read_distill_config
    from ..inference.export import load_adapters, student_directory
    from ..models import VideoModel
    from ..models.capture import quiet
    from ..models.loading import load_pipeline

    load_kwargs = load_kwargs | ({"revision": args.revision} if args.revision else {})
    dtype, size = getattr(torch, args.torch_dtype), dict(height=args.height, width=args.width)
    config = read_distill_config(student_directory(args.model)) if _is_student(args.model) else None
    if config is None:
        pipe = load_pipeline(args.model, dtype=dtype, **load_kwargs)
        if args.lora:
            load_adapters(pipe, {f"lora_{i}": folder for i, folder in enumerate(args.lora)})
        numbers, guidance_scale = args.steps, args.guidance_scale
        if not numbers:
            raise UserError("--steps is needed: how many steps the pipeline makes, e.g. --steps 50")
    else:
        numbers, guidance_scale = [len(config.denoising_steps)], 1.0
        if args.lora or args.guidance_scale not in (None, 1.0) or args.steps not in (None, numbers):
            raise UserError(
                f"{args.model!r} is a student with its own adapters, {numbers[0]} steps and no guidance: leave out --lora, "
                "--steps and --guidance_scale"
            )
        load = CausalVideoPipeline.from_pretrained if config.causal else load_student
        pipe = load(args.model, torch_dtype=dtype, **load_kwargs)
    if device is not None:
        pipe.to(device)
    model = VideoModel(_stock(pipe))
    model.latent_shape(args.num_frames, args.height, args.width)

    def sample(output_type: str, steps: int):
        output = dict(output_type=output_type, generator=torch.Generator().manual_seed(args.seed))
        if isinstance(pipe, CausalVideoPipeline):
            return pipe(args.prompt, **size, num_frames=args.num_frames, **output, **args.pipeline_kwargs)
        call = model.call_arguments(**size, num_frames=args.num_frames, pipeline_kwargs=args.pipeline_kwargs)
        scale = contextlib.nullcontext({}) if guidance_scale is None else model.guidance(guidance_scale)
        with quiet(pipe), scale as guidance:
            return pipe(prompt=args.prompt, num_inference_steps=steps, **output, **guidance, **call).frames

    return pipe, {steps: functools.partial(sample, steps=steps) for steps in numbers}


def _is_student(model: str) -> bool:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError

    from ..inference.distill_config import CONFIG_FILE

    folder = Path(model).expanduser()
    if folder.is_dir():
        return (folder / CONFIG_FILE).is_file() and not (folder / "model_index.json").is_file()
    try:
        return bool(hf_hub_download(model, CONFIG_FILE))
    except (EntryNotFoundError, HFValidationError, RepositoryNotFoundError):  # the pipeline's loader knows what to say
        return False


def _optimization(args):
    """The settings of the command line, or None."""
    import diffusers
    import torch

    from ..inference import InferenceOptimization

    chosen = {
        name: getattr(args, name)
        for name in (
            "fuse_lora",
            "attention_backend",
            "compile",
            "offload",
            "vae_tiling",
            "vae_slicing",
            "vae_channels_last",
            "vae_compile",
        )
        if getattr(args, name)
    }
    if args.compile_kwargs is not None:
        chosen["compile_kwargs"] = _json(args.compile_kwargs, "--compile_kwargs")
    if args.vae_dtype is not None:
        chosen["vae_dtype"] = getattr(torch, args.vae_dtype)
    if args.layerwise_casting is not None:
        chosen["layerwise_casting"] = getattr(torch, args.layerwise_casting, None)
        if not isinstance(chosen["layerwise_casting"], torch.dtype):
            raise UserError(f"--layerwise_casting: torch has no dtype {args.layerwise_casting!r}; try float8_e4m3fn")
    if args.cache is not None:
        names = [name for name in dir(diffusers) if name.endswith("CacheConfig") or name.endswith("BroadcastConfig")]
        if args.cache not in names:
            raise UserError(f"--cache: diffusers has {', '.join(names)}, not {args.cache!r}")
        chosen["cache"] = _make(getattr(diffusers, args.cache), args.cache_kwargs, "--cache_kwargs")
    if args.quantization is not None:
        chosen["quantization"] = _make(diffusers.PipelineQuantizationConfig, args.quantization, "--quantization")
    return InferenceOptimization(**chosen) if chosen else None


def _make(cls, text: str, option: str):
    try:
        return cls(**_json(text, option))
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"{option}: {error}") from error


def _json(text: str, option: str) -> dict:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{option} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{option} must be a JSON object, not {text}")
    return value


def _plain(values: dict) -> dict:
    """For JSON, which knows neither infinity nor dtypes: an infinite PSNR becomes null."""
    numbers = {
        name: None if isinstance(value, float) and math.isinf(value) else value for name, value in values.items()
    }
    return json.loads(json.dumps(numbers, default=str))
