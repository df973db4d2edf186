"""What the three roles of distillation keep in memory: adapters on one base, or three copies of the model.

    python benchmarks/distill_memory.py

Counted from the parameters of real `WanTransformer3DModel`s on the meta device, so no memory of that size is needed.
Student and fake score are trained, the teacher is frozen:

- one base: bfloat16 base, shared and frozen (it is the teacher), with one float32 LoRA each for student and fake score on
  vidtrl's default target modules;
- three copies: float32 student and float32 fake score, fully trained, and a frozen bfloat16 teacher.

Assumed: a parameter takes its dtype's size (bfloat16 2 bytes, float32 4); a trained one has a gradient of its own dtype, both
roles' at once, and AdamW's two moments of its own dtype plus a float32 step count per tensor: 16 bytes per trained float32
parameter. Of a bfloat16 model, the few parts that `from_pretrained` keeps in float32 are float32.
Left out: activations, KV caches, text encoder, VAE, moving averages, bfloat16 copies of float32 weights under autocast or FSDP,
allocator and communication buffers. 1 GB is 10^9 bytes.

Then the count is checked byte for byte against small models that are built, trained for one step and measured. Exit code 1 if it
differs.
"""

import argparse
import sys
from typing import NamedTuple

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig
from torch import nn

from vidtrl.trainer.lora import add_lora


WAN = dict(attention_head_dim=128, in_channels=16, out_channels=16, text_dim=4096, freq_dim=256)
SHAPES = {
    "Wan2.1-1.3B": dict(WAN, num_attention_heads=12, ffn_dim=8960, num_layers=30),
    "Wan2.1-14B": dict(WAN, num_attention_heads=40, ffn_dim=13824, num_layers=40),
}
FLOAT32 = {"rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"}  # as `from_pretrained` leaves them
SMALL = dict(WAN, attention_head_dim=12, num_attention_heads=2, ffn_dim=32, num_layers=2, text_dim=32)


class Memory(NamedTuple):
    """Bytes that stay in memory between and during steps."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return sum(self)


def counted(*models: nn.Module) -> Memory:
    """What the models need under AdamW, from their parameters' sizes, dtypes and `requires_grad` alone."""
    tensors = [p for model in models for p in (*model.parameters(), *model.buffers())]
    trained = [p for p in tensors if p.requires_grad]
    size = sum(p.nbytes for p in trained)
    return Memory(
        weights=sum(p.nbytes for p in tensors),
        gradients=size,
        optimizer=2 * size + torch.float32.itemsize * len(trained),
    )


def measured(optimizer: torch.optim.Optimizer, *models: nn.Module) -> Memory:
    """What is really there after a step: every tensor of the models, their gradients and the optimizer's state."""
    tensors = [p for model in models for p in (*model.parameters(), *model.buffers())]
    state = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
    return Memory(
        *(sum(t.nbytes for t in group) for group in (tensors, [p.grad for p in tensors if p.grad is not None], state))
    )


def frozen_bfloat16(model: nn.Module) -> nn.Module:
    for name, parameter in model.requires_grad_(False).named_parameters():
        if FLOAT32.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def one_base(shape: dict, rank: int, device: str) -> nn.Module:
    """A frozen bfloat16 Wan with the trainable float32 adapters "default" (student) and "fake"."""
    with torch.device(device):
        model = add_lora(frozen_bfloat16(WanTransformer3DModel(**shape)), LoraConfig(r=rank))
        model.add_adapter("fake", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def three_copies(shape: dict, device: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Float32 student and fake score to be trained, and a frozen bfloat16 teacher."""
    with torch.device(device):
        student, fake, teacher = (WanTransformer3DModel(**shape) for _ in range(3))
    return student, fake, frozen_bfloat16(teacher)


def backward(model: nn.Module) -> None:
    config = model.config
    with torch.autocast("cpu", torch.bfloat16):
        output = model(
            hidden_states=torch.randn(1, config.in_channels, 1, 4, 4),
            timestep=torch.tensor([500.0]),
            encoder_hidden_states=torch.randn(1, 4, config.text_dim),
            return_dict=False,
        )[0]
    output.float().square().mean().backward()


def check_one_base(rank: int = 4) -> tuple[Memory, Memory]:
    """Counted and measured memory of a small model with two adapters after one step of one AdamW over both."""
    model = one_base(SMALL, rank, "cpu")
    expected = counted(model)
    roles = [[p for n, p in model.named_parameters() if f".{role}." in n] for role in ("default", "fake")]
    optimizer = torch.optim.AdamW([{"params": roles[0], "lr": 1e-4}, {"params": roles[1], "lr": 2e-5}])
    for role in ("default", "fake"):
        model.set_adapter(role)
        backward(model)
    optimizer.step()
    return expected, measured(optimizer, model)


def check_three_copies() -> tuple[Memory, Memory]:
    """The same for three small models, two of them trained."""
    student, fake, teacher = three_copies(SMALL, "cpu")
    expected = counted(student, fake, teacher)
    optimizer = torch.optim.AdamW([{"params": student.parameters()}, {"params": fake.parameters()}])
    backward(student)
    backward(fake)
    optimizer.step()
    return expected, measured(optimizer, student, fake, teacher)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, nargs="+", default=[64, 128], help="LoRA ranks")
    args = parser.parse_args()

    print(f"{'GB':28}" + "".join(f"{title:>11}" for title in ("weights", "gradients", "AdamW", "total")))
    for name, shape in SHAPES.items():
        rows = {f"one base, r={rank}": counted(one_base(shape, rank, "meta")) for rank in args.rank}
        rows["three copies"] = counted(*three_copies(shape, "meta"))
        for row, memory in rows.items():
            print(f"{f'{name}, {row}':28}" + "".join(f"{size / 1e9:11.2f}" for size in (*memory, memory.total)))

    failed = False
    for name, (expected, found) in {"one base": check_one_base(), "three copies": check_three_copies()}.items():
        failed |= expected != found
        print(f"small {name}, bytes: counted {tuple(expected)}, measured {tuple(found)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
