"""A teacher whose weights are quantised, or wait somewhere else: it teaches the same, or as nearly as int8 can."""

import accelerate
import pytest
import torch
from diffusers import WanPipeline
from distill_setup import make_trainer, other_size
from test_distill_trainer import batch


CPU = torch.device("cpu")
OFFLOADS = {
    "group, by layer": lambda module, folder: module.enable_group_offload(CPU, offload_type="leaf_level"),
    "group, by block": lambda module, folder: module.enable_group_offload(
        CPU, offload_type="block_level", num_blocks_per_group=1
    ),
    "group, on disk": lambda module, folder: module.enable_group_offload(
        CPU, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(folder)
    ),
    # what enable_sequential_cpu_offload does with each component, which needs no accelerator
    "sequential": lambda module, folder: accelerate.cpu_offload(module, execution_device=CPU),
    "sequential, on disk": lambda module, folder: accelerate.disk_offload(module, str(folder), execution_device=CPU),
}


def guided(trainer):
    """The teacher's guided velocity of the first batch, at fixed latents."""
    x = torch.randn(2, 16, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return trainer._teacher_velocity(x, torch.tensor([0.4, 0.8]), batch(trainer))


def deviation(found, expected) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Of the teacher as it is, and of a wrong one: the student's own base."""
    folder = tmp_path_factory.mktemp("expected")
    teachers = {"right": dict(teacher_model=other_size()), "wrong": {}}
    return {
        name: guided(make_trainer(folder / name, folder / "cache", trainer=teacher, teacher_guidance_scale=3.0))
        for name, teacher in teachers.items()
    }


@pytest.mark.parametrize("kind", OFFLOADS)
def test_an_offloaded_teacher_teaches_the_same(tmp_path, cache_dir, expected, kind):
    pipe = other_size()
    OFFLOADS[kind](pipe.transformer, tmp_path / "offloaded")
    trainer = make_trainer(tmp_path, cache_dir, trainer=dict(teacher_model=pipe), teacher_guidance_scale=3.0)
    assert deviation(guided(trainer), expected["right"]) < 1e-6 < 0.1 < deviation(expected["wrong"], expected["right"])
    trainer.train()
    assert deviation(guided(trainer), expected["right"]) < 1e-6  # untouched


@pytest.mark.parametrize("kind", ["group, on disk", "sequential"])
def test_trajectories_of_an_offloaded_teacher(tmp_path, cache_dir, kind):
    """They are told apart from another teacher's by what can be read of it, and are found again in the next run."""
    config = dict(loss_type="ode_regression", teacher_guidance_scale=3.0, teacher_steps=4, max_steps=1)
    folders = []
    for _ in range(2):
        pipe = other_size()
        OFFLOADS[kind](pipe.transformer, tmp_path / "offloaded")
        trainer = make_trainer(tmp_path / "run", cache_dir, trainer=dict(teacher_model=pipe), **config)
        trainer.train()
        folders.append(trainer.trajectories.directory)
    assert folders[0] == folders[1]
    other = make_trainer(tmp_path / "run", cache_dir, **config)
    assert other.trajectories.directory != folders[0]


def quantised(folder):
    pytest.importorskip("torchao")
    from diffusers import PipelineQuantizationConfig, TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    other_size().save_pretrained(folder)
    config = PipelineQuantizationConfig(quant_mapping={"transformer": TorchAoConfig(Int8WeightOnlyConfig())})
    return WanPipeline.from_pretrained(folder, quantization_config=config)


def test_a_quantised_teacher_teaches_nearly_the_same(tmp_path, cache_dir, expected):
    pipe = quantised(tmp_path / "teacher")
    assert type(pipe.transformer.blocks[0].attn1.to_q.weight).__name__ == "Int8Tensor"
    trainer = make_trainer(tmp_path / "run", cache_dir, trainer=dict(teacher_model=pipe), teacher_guidance_scale=3.0)
    found = deviation(guided(trainer), expected["right"])
    assert 0 < found < 0.08 < 0.3 < deviation(expected["wrong"], expected["right"])
    trainer.train()
    assert deviation(guided(trainer), expected["right"]) == found
