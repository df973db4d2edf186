"""The teacher of a distillation: where its latents, text and trajectories come from."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from ..data import VideoDataset
from ..data.store import write_atomic
from ..models import Condition, VideoModel
from .checkpoint import weights_fingerprint
from .distill_config import VideoDistillConfig


def check_student(model: VideoModel) -> None:
    """
    Refuse a model that no student can be made of.

    Raises:
        `ValueError`: If it has two denoisers.
    """
    if len(model.denoisers) > 1:
        raise ValueError(
            f"{type(model.pipe).__name__} has two experts here, which one few-step student cannot follow: distil a model "
            "with one denoiser, such as Wan 2.1 or Wan 2.2 5B"
        )


def check_guidance(args: VideoDistillConfig, teacher: VideoModel) -> None:
    """
    Refuse guidance of a teacher that has it built in.

    Raises:
        `ValueError`: If it would be applied twice.
    """
    config = next(iter(teacher.denoisers.values())).config
    if args.teacher_guidance_scale != 1.0 and config.get("guidance_embeds"):
        raise ValueError(
            f"guidance is distilled into this {type(teacher.pipe).__name__}: set teacher_guidance_scale=1.0"
        )


def load_teacher(
    teacher: str | os.PathLike | DiffusionPipeline, student: VideoModel, dtype: torch.dtype
) -> VideoModel:
    """
    A teacher of its own, frozen.

    Args:
        teacher (`str`, `PathLike` or `DiffusionPipeline`): Another model with the same latent space, of any size; a
            pipeline may be quantised or offloaded.
        student ([`VideoModel`]): Whose latents it has to understand.
        dtype (`torch.dtype`): To load a path or Hub id in.

    Raises:
        `ValueError`: If the latents of the two mean different things; says in what.
    """
    options = {} if isinstance(teacher, DiffusionPipeline) else {"torch_dtype": dtype}
    model = VideoModel.from_pretrained(teacher, **options)
    if any(module in student.denoisers.values() for module in model.denoisers.values()):
        raise ValueError(
            "teacher_model has the student's own denoiser: leave it out, and the student's base is the teacher"
        )
    if len(model.denoisers) > 1:
        raise ValueError(
            f"{type(model.pipe).__name__} has two experts here; a teacher has one denoiser for all noise levels"
        )
    problems = []
    for name in ("temporal_factor", "spatial_factor"):
        ours, theirs = getattr(student, name), getattr(model, name)
        if ours != theirs:
            problems.append(f"{name.replace('_', ' ')} {theirs} instead of {ours}")
    shape = student.nearest_frames(17), *student.nearest_size(64, 64)
    if not problems and student.latent_shape(*shape)[0] != model.latent_shape(*shape)[0]:
        problems.append(f"{model.latent_shape(*shape)[0]} channels instead of {student.latent_shape(*shape)[0]}")
    if not problems:
        probe = torch.ones(1, student.latent_shape(*shape)[0], 1, 1, 1)
        if not torch.allclose(student.denormalize(probe), model.denormalize(probe), rtol=1e-3, atol=1e-3):
            problems.append("another normalisation of the latents")
        if weights_fingerprint(student.pipe.vae) != weights_fingerprint(model.pipe.vae):
            problems.append("a VAE with other weights")
    if problems:
        raise ValueError(
            f"teacher and student do not share a latent space: the teacher has {'; '.join(problems)}. Take a teacher with the "
            "student's VAE, such as Wan 2.1 14B for Wan 2.1 1.3B"
        )
    for module in model.denoisers.values():
        module.requires_grad_(False).eval()
    return model


def weights_elsewhere(model: VideoModel) -> bool:
    """
    Whether the denoiser's weights come only when they are needed, so that what is in their place now says nothing.

    Both diffusers and accelerate keep the hook that brings them on the module.
    """
    modules = [m for denoiser in model.denoisers.values() for m in denoiser.modules()]
    return any("_hf_hook" in vars(m) or "_diffusers_hook" in vars(m) for m in modules)


@torch.no_grad()
def answer_fingerprint(model: VideoModel, condition: Condition, device: torch.device) -> str:
    """
    Tell models apart by what they answer, for those whose weights cannot be read.

    Args:
        model ([`VideoModel`]): The model.
        condition (`Condition`): Of one clip; the noise is always the same.
        device (`torch.device`): Where it computes; what stands in for its weights may say another.

    Returns:
        `str`: A hash of the velocity at sigma = 1/2, rounded to bfloat16.
    """
    noise = torch.randn(1, *condition.latent_shape, generator=torch.Generator().manual_seed(0)).to(device)
    velocity = model.velocity(noise, 0.5, condition.to(device)).cpu().to(torch.bfloat16)
    return hashlib.sha256(velocity.view(torch.int16).numpy().tobytes()).hexdigest()[:16]


class Joined(Dataset):
    """
    Items of a dataset, with the conditions of others of the same rows under further names.

    Args:
        dataset (`CachedDataset` or `VideoDataset`): What the items are.
        **conditions (`CachedDataset`): By the name under which an item gets their `condition`.
    """

    def __init__(self, dataset, **conditions):
        self.dataset, self.conditions = dataset, conditions

    @property
    def buckets(self) -> list[int]:
        """The bucket of each item."""
        return self.dataset.buckets

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """The buckets' (num_frames, height, width)."""
        return self.dataset.plan.buckets if isinstance(self.dataset, VideoDataset) else self.dataset.shapes

    @property
    def sample_ids(self) -> list[str]:
        """The name of each item."""
        return self.dataset.sample_ids

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        item = self.dataset[index]  # whose index is another when a damaged clip was replaced
        extra = {name: other[item["index"]]["condition"] for name, other in self.conditions.items()}
        return {**item, **extra}


class Trajectories:
    """
    Points of the teacher's trajectories at the student's noise levels, and their ends; each computed once and kept on disk.

    Args:
        directory (`Path`): Where; a folder for each set of settings.
        settings (`dict`): JSON-able; all that the trajectories depend on.

    Example:

    ```python
    >>> trajectories = Trajectories(Path("run/trajectories"), {"guidance": 4.0})
    >>> states = trajectories.get(["a", "b"], make)  # make([0, 1]) -> (2, S + 1, C, f, h, w), called for what is missing
    ```
    """

    def __init__(self, directory: Path, settings: dict):
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]
        self.directory = directory / digest
        self.directory.mkdir(parents=True, exist_ok=True)
        write_atomic(self.directory / "settings.json", json.dumps(settings, indent=1, sort_keys=True, default=str))

    def missing(self, names: list[str]) -> list[str]:
        """Those that were not computed yet, each once."""
        return [name for name in dict.fromkeys(names) if not self._path(name).is_file()]

    def get(self, names: list[str], make: Callable[[list[int]], Tensor], together: bool = False) -> Tensor:
        """
        Args:
            names (`list[str]`): Those of a batch; see [`trajectory_names`].
            make (`Callable`): `make(which)`: the states of some of the batch, (n, S + 1, C, f, h, w); called for the missing.
            together (`bool`, *optional*, defaults to `False`): Call it in any case, as other processes wait for this one.

        Returns:
            `Tensor`: (B, S + 1, C, f, h, w) float32 on the CPU; the last state is the clean end.
        """
        missing = self.missing(names)
        if together and not missing:
            make([0])
        if missing:
            made = make([names.index(name) for name in missing]).to("cpu", torch.float16)
            for name, states in zip(missing, made, strict=True):
                write_atomic(self._path(name), lambda path, s=states: save_file({"states": s.contiguous()}, path))
        # read back even what was just made: a resumed run sees the same bits
        return torch.stack([load_file(self._path(name))["states"] for name in names]).float()

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"


def trajectory_names(rows: list[int], condition: Condition) -> list[str]:
    """A name for each sample of a batch that tells rows, prompts, images and sizes apart."""
    return [f"{row:08d}-{condition_digest(condition[i])}" for i, row in enumerate(rows)]


def condition_digest(condition: Condition) -> str:
    """A hash of all that a denoiser is told."""
    tensors, meta = condition.state()
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def trajectory_grid(denoising_steps: list[float], teacher_steps: int) -> tuple[Tensor, list[int]]:
    """
    A grid of unshifted times that contains the student's and is about as fine everywhere.

    Args:
        denoising_steps (`list[float]`): The student's timesteps, decreasing, in (0, 1000].
        teacher_steps (`int`): Steps from 1000 to 0.

    Returns:
        `tuple[Tensor, list[int]]`: Times in [0, 1], decreasing, and where in it the student's are; the last one is 0.

    Example:

    ```python
    >>> grid, where = trajectory_grid([1000, 500], teacher_steps=4)
    >>> grid.tolist(), where
    ([1.0, 0.75, 0.5, 0.25, 0.0], [0, 2, 4])
    ```
    """
    marks = [*([] if denoising_steps[0] == 1000 else [1000.0]), *map(float, denoising_steps), 0.0]
    grid, where = [marks[0] / 1000], [0]
    for start, stop in zip(marks, marks[1:], strict=False):
        number = max(1, round(teacher_steps * (start - stop) / 1000))
        grid += [(start + (stop - start) * (i + 1) / number) / 1000 for i in range(number)]
        where.append(len(grid) - 1)
    return torch.tensor(grid), where[-len(denoising_steps) - 1 :]
