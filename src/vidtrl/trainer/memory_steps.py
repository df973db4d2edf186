"""One step of each trainer on fake tensors: what is evaluated, kept and freed, in the trainer's order."""

import contextlib
import copy
import functools
import os
import warnings

import torch
from diffusers import DiffusionPipeline
from peft import PeftConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from ..diffusion import distribution_matching as dm
from ..diffusion import flow
from ..models import CausalAttention, VideoModel
from ..models.causal import KVCache
from ..rollout.causal import causal_rollout
from ..rollout.sampling import guided_velocity
from .base_config import VideoTrainingConfig
from .ema import WeightAverage
from .grpo_choices import choose_reuse
from .memory_run import SIGMA, Phase, Run


WALKED = 3  # graphs of one size: the first, whose backward is the last, one like all others, and the last


def kinds_of_passes(
    run: Run, clean: Tensor, x: Tensor, denoiser: nn.Module, model: VideoModel, condition, causal
) -> Tensor:
    """A velocity of clips as `causal` shows them to a causal model; else the plain one."""
    mode, length = run.args.causal, getattr(run.args, "frames_per_block", None)
    if causal is None or mode is None:
        return run.velocity(x, condition, denoiser=denoiser, model=model)
    frames = x.shape[2]
    sigma = torch.full((len(x), frames), SIGMA)
    if mode == "diffusion_forcing":
        with causal.block_causal(length):
            return run.velocity(x, condition, sigma, denoiser, model)
    both, levels = torch.cat([clean, x], 2), torch.cat([torch.zeros_like(sigma), sigma], 1)
    with causal.teacher_forcing(length):
        return run.velocity(both, condition, levels, denoiser, model)[:, :, frames:]


# ---- SFT ----


def sft_phases(run: Run) -> dict[str, Phase]:
    """Encoding of clips and prompts, then the training step; without a cache both at once."""
    args, batch = run.args, run.args.per_device_train_batch_size
    phases = {"preparation": run.preparation(clips=args.cache)}
    run.add_optimizer()

    def loss() -> Tensor:
        if args.cache:
            mean, std = run.latents(batch, copies=2)
        else:
            with torch.no_grad():
                mean, std = run.encode(batch)
        x0 = mean + std * torch.randn_like(mean)
        noise = torch.randn_like(x0)
        target = flow.velocity_target(x0, noise)
        x = flow.add_noise(x0, noise, SIGMA)
        velocity = kinds_of_passes(run, x0, x, run.trained, run.model, run.condition, run.causal)
        return (velocity.float() - target).square().flatten(1).mean(1).mean()

    repeats = min(2, args.gradient_accumulation_steps)
    resident = {} if args.cache else {"text_encoder": run.encoder_bytes, "vae": run.vae_bytes}
    phases["training step"] = run.peak_of(lambda: run.update(loss, "policy", repeats), **resident)
    return phases


# ---- GRPO ----


class GraphsLeftOut(torch.autograd.Function):
    """
    The outputs of forwards that are not walked. What their graphs keep is in a list, which backward empties: after the
    backward of the graphs that are made later, and before that of earlier ones.
    """

    @staticmethod
    def forward(ctx, root: Tensor, shape: tuple[int, ...], kept: list[Tensor]) -> Tensor:
        ctx.kept = kept
        return torch.empty(shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, None, None]:
        ctx.kept.clear()
        return None, None, None


def grpo_phases(run: Run) -> dict[str, Phase]:
    """Encoding, a rollout with its decoded videos, and the update; encoders stay on the device."""
    args, model = run.args, run.model
    batch, rollout_batch = (
        args.per_device_train_batch_size,
        args.rollout_batch_size or args.per_device_train_batch_size,
    )
    videos = batch * args.steps_per_generation
    encoders = {"text_encoder": run.encoder_bytes, "vae": run.vae_bytes}
    phases = {"preparation": run.preparation(clips=False)}
    regression = args.loss_type in ("nft", "awm")
    with run.tracing():
        roles = {}
        if regression:
            roles["old"] = WeightAverage(run.trained, 0.5)
        if args.beta > 0 and (args.sync_ref_model or run.peft_config is None):
            roles["reference"] = WeightAverage(run.trained, 0.5)
        for role in roles.values():
            run.trace.own(role.average.values(), "roles")
    run.add_optimizer()
    if regression:
        kept, drawn = 3 * args.num_train_sigmas, 1  # x0, noise and the old policy's velocity
    else:
        drawn = args.num_inference_steps if args.sde_schedule == "all" else args.sde_steps
        kept = 3 * drawn  # where each step started, what was drawn there, and its mean
    negative = run.negative if args.guidance_scale != 1.0 else None
    # where it is open, the trainer batches on a CPU, and on an accelerator only where that fits
    batched = args.use_cpu if args.batch_guidance is None else args.batch_guidance
    dropout = any(module.p > 0 for module in run.trained.modules() if isinstance(module, nn.Dropout))
    shared = {"num_denoisers": run.num_denoisers, "sharded": run.sharded}
    reuse = choose_reuse(args, own_reference="reference" in roles, dropout=dropout, **shared)
    guided = functools.partial(
        guided_velocity, model, batched=batched, guidance_scale=args.guidance_scale, denoiser=run.trained
    )

    def velocity(number: int) -> Tensor:
        x = torch.randn(number, *run.latent_shape)
        return guided(x, SIGMA, run.condition[[0] * number], negative)

    @contextlib.contextmanager
    def swapped_in(role: WeightAverage):
        with role.swapped_in() as own:
            run.trace.own(own.values(), "roles")
            yield

    root = torch.zeros((), requires_grad=True)  # a real one, which is not counted

    def velocities() -> list[Tensor]:
        """One forward for each of `graphs`. Of more than three of one size, three are walked, and the others are like the second."""
        left_out = sum(n == size for n in graphs) - WALKED
        if left_out <= 0:
            return [velocity(n) for n in graphs]
        like_it: list[Tensor] = []
        # the first has what all share, such as the weights that autocast casts, and its backward is the last
        found = [velocity(size), GraphsLeftOut.apply(root, (left_out * size, *run.latent_shape), like_it)]
        before = run.trace.live.total()
        found.append(velocity(size))
        kept = run.trace.live.total() - before - found[-1].nbytes
        like_it.append(torch.empty(left_out * kept, dtype=torch.uint8))
        return found + [velocity(n) for n in graphs[left_out + 2 :]]

    def rollout() -> None:
        old = swapped_in(roles["old"]) if args.loss_type == "nft" else contextlib.nullcontext()
        memory = run.latents(videos, copies=1 + kept)
        with old, torch.no_grad():
            with run.autocast():
                with torch.set_grad_enabled(reuse), run.policies.active("policy"):
                    kept_graphs = velocities() if reuse else []
                velocity(min(rollout_batch, videos))  # of a step without noise, which may be a later one
            frames, height, width = run.size
            chunk = min(args.vae_batch_size, videos)
            finished = [torch.empty(videos - chunk, frames, 3, height, width)]
            run.trace.own(finished, "latents")
            finished += model.decode(memory[0][:chunk], chunk_size=chunk)
        del kept_graphs

    def loss() -> Tensor:
        x, drawn_x, mean = run.latents(batch, copies=3)
        if args.beta > 0:
            reference = swapped_in(roles["reference"]) if "reference" in roles else run.policies.active("base")
            with torch.no_grad(), reference:
                velocity(batch)
        v = torch.cat(velocities())
        return (v - mean[:1]).square().mean()

    # where the update uses the rollout's forward, the graphs of all stochastic steps are kept until the update
    total = videos * drawn if reuse else batch
    size = rollout_batch if reuse else batch
    graphs = [min(size, total - start) for start in range(0, total, size)]
    repeats = 1 if reuse or (args.gradient_accumulation_steps == 1 and drawn == 1) else 2

    def step() -> None:
        memory = run.latents(videos, copies=kept)
        run.update(loss, "policy", repeats)
        del memory

    phases["rollout"] = run.peak_of(rollout, **encoders)
    phases["update"] = run.peak_of(step, **encoders)
    return phases


# ---- Distillation ----


def distill_phases(run: Run) -> dict[str, Phase]:
    """Encoding, the student's step, and that of the fake score."""
    args, batch = run.args, run.args.per_device_train_batch_size
    clips, stream = args.rollout == "data", args.stream_num_frames is not None
    resident = {"vae": run.vae_bytes} if stream else {}
    phases = {"preparation": run.preparation(clips)}
    fake, teacher = _distill_roles(run)
    trained = ("student", "fake") if args.matches_distributions else ("student",)
    run.add_optimizer(*trained)
    teacher_causal = run.causal if args.loss_type == "consistency" else None
    if teacher_causal is not None and run.teacher is not run.model:
        teacher_causal = CausalAttention(run.teacher)

    def student_clip(clean: Tensor) -> Tensor:
        x = torch.lerp(clean, torch.randn_like(clean), SIGMA)
        return x - SIGMA * kinds_of_passes(run, clean, x, run.trained, run.model, run.condition, run.causal)

    def teacher_velocity(x: Tensor, clean: Tensor | None = None) -> Tensor:
        causal = teacher_causal if clean is not None else None
        conditions = run.teacher_conditions if args.teacher_guidance_scale != 1.0 else run.teacher_conditions[:1]
        with run.policies.active("teacher", frozen=True):
            found = [kinds_of_passes(run, clean, x, teacher, run.teacher, c, causal) for c in conditions]
        return found[0] if len(found) == 1 else dm.guided(*found, args.teacher_guidance_scale)

    def fake_velocity(x: Tensor) -> Tensor:
        frozen = run.policies.current != "fake"
        with run.policies.active("fake", frozen=frozen):
            return run.velocity(x, run.condition, denoiser=fake)

    def sample(grad: bool) -> Tensor:
        with torch.set_grad_enabled(grad), run.policies.active("student", frozen=not grad):
            if clips and args.loss_type != "consistency":
                return student_clip(run.latents(batch)[0])
            if run.causal is not None:
                return _causal_sample(run, batch, grad)
            x = torch.randn(batch, *run.latent_shape)
            if len(args.denoising_steps) > 1:
                with torch.no_grad():
                    x = x - SIGMA * run.velocity(x, run.condition)
            return x - SIGMA * run.velocity(x, run.condition)

    def matching() -> Tensor:
        x = sample(grad=True)
        if args.loss_type == "sid":
            x_s = flow.add_noise(x, torch.randn_like(x), SIGMA)
            return dm.sid_loss(x, x_s - SIGMA * fake_velocity(x_s), x_s - SIGMA * teacher_velocity(x_s))
        with torch.no_grad():
            x_s = flow.add_noise(x, torch.randn_like(x), SIGMA)
            scores = x_s - SIGMA * fake_velocity(x_s), x_s - SIGMA * teacher_velocity(x_s)
        return dm.dmd_loss(x, *scores)

    def student_loss() -> Tensor:
        if args.loss_type in ("dmd", "sid"):
            return matching()
        (clean,) = run.latents(batch)
        if args.loss_type == "ode_regression":
            return (student_clip(clean) - clean).square().mean()
        with torch.no_grad():
            x = torch.lerp(clean, torch.randn_like(clean), SIGMA)
            x = x + SIGMA * teacher_velocity(x, clean)
            average = args.consistency == "discrete" and args.consistency_target == "ema"
            with run.average.swapped_in() if average else contextlib.nullcontext():
                target = student_clip(clean)
        loss = (student_clip(clean) - target).square().mean()
        return loss + matching() if args.dmd_weight else loss

    def fake_loss() -> Tensor:
        with torch.no_grad():
            x = sample(grad=False)
        noise = torch.randn_like(x)
        return (fake_velocity(flow.add_noise(x, noise, SIGMA)) - (noise - x)).square().mean()

    repeats = min(2, args.gradient_accumulation_steps)
    losses = {"student": student_loss, "fake": fake_loss}
    for role in trained:
        name = "student step" if role == "student" else "fake score step"
        step = functools.partial(run.update, losses[role], role, repeats, cache=False)
        phases[name] = run.peak_of(step, **resident)
    return phases


def _distill_roles(run: Run) -> tuple[nn.Module, nn.Module]:
    """Fake score and teacher beside the student, as `DistillBase` adds them."""
    args, student, copies = run.args, run.trained, run.copies
    if run.peft_config is not None:
        if args.matches_distributions:
            run.policies.add("fake", student, ("fake",), trained=True)
        run.policies.add("teacher", student, ())
        run.policies.add("student", student, ("default",), trained=True)
    elif args.matches_distributions:
        run.policies.add("fake", copies["fake"], trained=True)
    teacher = copies.get("teacher", student)
    if run.teacher is not run.model:
        teacher = next(iter(run.teacher.denoisers.values()))
    if teacher is not student:
        run.policies.add("teacher", teacher.requires_grad_(False).eval())
    for module in {id(m): m for m in (copies.get("fake"), teacher) if m not in (None, student)}.values():
        run.trace.own(module.parameters(), "roles")
    return copies.get("fake", student), teacher


def _causal_sample(run: Run, batch: int, grad: bool) -> Tensor:
    """Self Forcing's rollout with its KV cache; upon a stream, after what its window remembers."""
    args, (channels, frames, height, width) = run.args, run.latent_shape
    cache, length = KVCache(args.window, args.sink), args.frames_per_block
    if args.stream_num_frames is not None:
        with torch.no_grad():
            seen = args.stream_num_frames if args.window is None else args.window
            for _ in range(0, min(seen, args.stream_num_frames - frames), length):
                with run.causal.cached(cache, store=True):
                    run.velocity(torch.randn(batch, channels, length, height, width), run.condition)
                _own_cache(run, cache)
        frames -= args.stream_overlap
    blocks = causal_rollout(
        run.model, run.causal, run.condition[[0] * batch], torch.randn(batch, channels, frames, height, width), [1.0],
        frames_per_block=length, cache=cache, grad_frames=frames if grad else 0, sampler="ode", denoiser=run.trained,
    )  # fmt: skip
    found = []
    for block in blocks:
        _own_cache(run, cache)
        found.append(block)
    return torch.cat(found, 2)


def _own_cache(run: Run, cache: KVCache) -> None:
    run.trace.own((t for block in cache.blocks for pair in block.layers for t in pair), "kv_cache")


PHASES = {"sft": sft_phases, "grpo": grpo_phases, "distill": distill_phases}
ROLES = {"sft": "policy", "grpo": "policy", "distill": "student"}


def trace_run(
    trainer: str,
    args: VideoTrainingConfig,
    model: str | os.PathLike | DiffusionPipeline,
    peft_config: PeftConfig | None,
    teacher_model: str | os.PathLike | DiffusionPipeline | None = None,
    sharded: bool = False,
) -> tuple[Run, dict[str, Phase]]:
    """
    A run and what each of its phases needs on a single device, by part.

    Raises:
        `ValueError`: For a denoiser whose operations depend on values, such as the number of text tokens in a mask.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Mismatch dtype between input and weight"
        )  # says which kernel a CPU would take
        run = Run(copy.copy(args), model, peft_config, teacher_model, ROLES[trainer], sharded)
        try:
            return run, PHASES[trainer](run)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(
                f"the memory of {run.name} cannot be counted without data: its {type(run.denoiser).__name__} decides by the "
                f"values of a tensor what it computes ({error}). Start a short run (max_steps=2) and watch the device instead"
            ) from error
