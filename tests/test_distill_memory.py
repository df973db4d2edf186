"""The memory benchmark counts what is really allocated, and what the shape of Wan says by hand."""

import importlib.util
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel


def load_benchmark():
    path = Path(__file__).parents[1] / "benchmarks" / "distill_memory.py"
    spec = importlib.util.spec_from_file_location("distill_memory", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


memory = load_benchmark()
SMALL = memory.SMALL


@pytest.mark.parametrize("check", [memory.check_one_base, memory.check_three_copies])
def test_counted_memory_is_what_one_step_leaves(check):
    expected, found = check()
    assert expected == found and min(found) > 0


def test_another_optimizer_leaves_another_state():
    """Control: the comparison sees what is there."""
    model = memory.one_base(SMALL, 4, "cpu")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, momentum=0.9)
    memory.backward(model)  # through the student alone
    optimizer.step()
    expected, found = memory.counted(model), memory.measured(optimizer, model)
    assert found.weights == expected.weights
    assert found.gradients == expected.gradients / 2 and found.optimizer == found.gradients


def test_the_meta_device_counts_like_the_cpu():
    assert memory.counted(memory.one_base(SMALL, 4, "meta")) == memory.counted(memory.one_base(SMALL, 4, "cpu"))
    copies = memory.three_copies(SMALL, "meta")
    assert memory.counted(*copies) == memory.counted(*memory.three_copies(SMALL, "cpu"))
    assert all(p.is_meta for model in copies for p in model.parameters())


def test_frozen_dtypes_are_those_of_from_pretrained(tmp_path):
    WanTransformer3DModel(**SMALL).save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    ours = memory.frozen_bfloat16(WanTransformer3DModel(**SMALL))
    assert {n: p.dtype for n, p in ours.named_parameters()} == {n: p.dtype for n, p in loaded.named_parameters()}
    assert memory.counted(ours) == memory.counted(loaded.requires_grad_(False))


@pytest.mark.parametrize("rank", [4, 64])
def test_adapters_of_wan_by_hand(rank):
    """Ten Linear layers a block: q, k, v and out of two attentions, and the feed-forward's pair."""
    shape = memory.SHAPES["Wan2.1-1.3B"]
    dim = shape["num_attention_heads"] * shape["attention_head_dim"]
    inputs_and_outputs = shape["num_layers"] * (8 * (dim + dim) + 2 * (dim + shape["ffn_dim"]))
    parameters = 2 * rank * inputs_and_outputs
    tensors = 2 * 2 * 10 * shape["num_layers"]
    found = memory.counted(memory.one_base(shape, rank, "meta"))
    assert found.gradients == 4 * parameters and found.optimizer == 8 * parameters + 4 * tensors
