"""Several processes, and sharded weights (FSDP2, DeepSpeed): what accelerate and the Trainer do not know about a denoiser."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import AutocastKwargs, DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from .base_config import VideoTrainingConfig
from .lora import repeated_blocks


def shard_on_cpu(accelerator: Accelerator) -> None:
    """
    Shard the weights of processes on a CPU too, where an accelerate configuration asks for FSDP.

    accelerate (1.15) shards on accelerators alone and would silently run DDP.

    Args:
        accelerator (`Accelerator`): Nothing is prepared with it yet.

    Raises:
        `ValueError`: If the configuration asks for DeepSpeed, which accelerate would leave out as silently.
    """
    if _asked_for("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "DeepSpeed does not run with use_cpu: leave use_cpu out, or take the accelerate configuration multi_gpu or fsdp2"
        )
    # FSDP after an earlier trainer of this process
    several = accelerator.distributed_type in (DistributedType.MULTI_CPU, DistributedType.FSDP)
    if _asked_for("ACCELERATE_USE_FSDP") and several:
        # every later state begins as a copy of this one
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()


def exchange_each_micro_batch(args: VideoTrainingConfig) -> None:
    """
    Exchange the gradients of sharded weights after every micro-batch.

    Else FSDP keeps those of earlier micro-batches until the backward pass of the last one: whole ones in every process, and
    lost where `on_nan="skip"` leaves the last one out.

    Args:
        args ([`VideoTrainingConfig`]): Filled in place; no accelerator was made of it yet.
    """
    if _asked_for("ACCELERATE_USE_FSDP"):
        given = args.accelerator_config.gradient_accumulation_kwargs or {}
        args.accelerator_config.gradient_accumulation_kwargs = {**given, "sync_each_batch": True}


def _asked_for(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def prepare_fsdp(accelerator: Accelerator, denoiser: nn.Module) -> None:
    """
    Choose what is sharded together and how it computes: by block of the denoiser, with the numbers of one process.

    Mixed precision is autocast's, as without FSDP: the policy that accelerate would set rounds all arguments of the
    denoiser to bfloat16, and with them the noise level (8 bits of it are left), and adds up gradients in bfloat16.

    Args:
        accelerator (`Accelerator`): With an FSDP plugin; nothing is prepared with it yet.
        denoiser (`nn.Module`): What will be trained, or what an adapter is trained on.

    Raises:
        `ValueError`: For settings of an accelerate configuration that the trainers do not work with; says what to set.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError("FSDP needs fsdp_version: 2 in the accelerate configuration, such as that of the name fsdp2")
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise ValueError("checkpoints are files for diffusers: set fsdp_state_dict_type: FULL_STATE_DICT")
    if plugin.activation_checkpointing:
        raise ValueError("set fsdp_activation_checkpointing: false; the trainer's gradient_checkpointing=True does it")
    if plugin.cpu_ram_efficient_loading:
        raise ValueError("set fsdp_cpu_ram_efficient_loading: false: diffusers loads the weights in every process")
    if plugin.transformer_cls_names_to_wrap is None:
        # diffusers' own list has classes that a denoiser may lack, which accelerate refuses
        blocks = [block for stack in repeated_blocks(denoiser).values() for block in stack]
        plugin.transformer_cls_names_to_wrap = sorted({type(block).__name__ for block in blocks})
    plugin.mixed_precision_policy = None
    # a cache of casts would hold the whole model in every process
    accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)


class Models(nn.Module):
    """
    Several models as one module, for what takes one module: accelerate shards it, and a checkpoint of the optimizer names its
    weights. It is never called: each model is, and for FSDP each is a root.

    Args:
        models (`dict[str, nn.Module]`): By the names that their weights' names begin with.
    """

    def __init__(self, models: dict[str, nn.Module]):
        super().__init__()
        for name, model in models.items():
            self.add_module(name, model)


def shard_apart(accelerator: Accelerator, models: dict[str, nn.Module]) -> None:
    """
    Choose that each of several models is sharded for itself, in the same way.

    Args:
        accelerator (`Accelerator`): That [`prepare_fsdp`] has seen; the [`Models`] are not prepared yet.
        models (`dict[str, nn.Module]`): The models.
    """
    plugin = accelerator.state.fsdp_plugin
    classes = {type(model).__name__ for model in models.values()}
    plugin.transformer_cls_names_to_wrap = sorted({*plugin.transformer_cls_names_to_wrap, *classes})


def set_up_ddp(args: VideoTrainingConfig, num_denoisers: int) -> None:
    """
    Fill what is not set of DDP's options.

    Args:
        args ([`VideoTrainingConfig`]): Filled in place.
        num_denoisers (`int`): How many are trained.
    """
    if args.ddp_find_unused_parameters is None:
        # the Trainer has the default False for its own models only; a micro-batch uses one expert of two
        args.ddp_find_unused_parameters = num_denoisers > 1
    if args.ddp_broadcast_buffers is None:
        # denoisers' buffers are constants, and broadcasting them would make processes wait for each other in every
        # forward, of which they may need different numbers
        args.ddp_broadcast_buffers = False


def check_sharded(args: VideoTrainingConfig, num_denoisers: int, kind: str) -> None:
    """
    Refuse what does not work with sharded weights.

    Args:
        args ([`VideoTrainingConfig`]): The run's.
        num_denoisers (`int`): How many are trained.
        kind (`str`): `"FSDP"` or `"DeepSpeed"`.

    Raises:
        `ValueError`: Says what to set.
    """
    if num_denoisers > 1:
        raise ValueError(
            "FSDP and DeepSpeed shard one denoiser, called alike by all processes: set experts='high' or 'low' and train the "
            "other one in a second run, or train both with DDP (`accelerate launch` without them)"
        )
    if args.on_nan == "skip" and kind == "DeepSpeed":
        raise ValueError(
            "on_nan='skip' does not work with DeepSpeed: a process that leaves out a micro-batch would leave the others waiting "
            "for its share. Set on_nan='raise', or shard with FSDP (--accelerate_config fsdp2)"
        )


class EqualCalls:
    """
    A context in which all processes call a sharded model equally often, however many calls each of them needs.

    A forward of a sharded model waits for the shards of all processes. Before each one they count who still has something
    to do; who has not repeats its last call, under `no_grad`, until all are done.

    Args:
        model (`nn.Module`): Sharded; what is called.
        accelerator (`Accelerator`): That has prepared it.

    Raises:
        `RuntimeError`: If a process has not called the model a single time, in this context or an earlier one.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator):
        self.model, self.accelerator = model, accelerator
        self.last: tuple[tuple, dict] | None = None
        self.handle = None
        self.depth = 0

    def _busy(self, mine: bool) -> int:
        return int(self.accelerator.reduce(torch.tensor(int(mine), device=self.accelerator.device), reduction="sum"))

    def _before(self, module, args, kwargs) -> None:
        self._busy(True)
        self.last = args, kwargs

    def __enter__(self) -> None:
        self.depth += 1
        if self.depth == 1:
            self.handle = self.model.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True)

    def __exit__(self, error, *_) -> None:
        self.depth -= 1
        if self.depth:
            return
        self.handle.remove()
        if error is not None:  # the launcher ends the others
            return
        while self._busy(False):
            if self.last is None:
                raise RuntimeError(
                    "a process has nothing to compute while others have, and their sharded model waits for it: use fewer "
                    "processes, or larger batches"
                )
            args, kwargs = self.last
            with torch.no_grad(), self.accelerator.autocast():
                self.model(*args, **kwargs)


def whole_weights(model: nn.Module, trained_only: bool) -> dict[str, Tensor]:
    """
    All of a sharded model's weights in every process; all processes must call it.

    Args:
        model (`nn.Module`): Sharded, or not yet.
        trained_only (`bool`): Leave out what is frozen.

    Returns:
        `dict[str, torch.Tensor]`: On the CPU, by their names in `model.state_dict()`.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return gathered({n: t for n, t in model.state_dict().items() if n in trained or not trained_only})


def gathered(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU, of which some may be sharded; all processes must call it."""
    return {n: whole(t).detach().cpu() for n, t in weights.items()}


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be sharded; in place of it, changes reach the whole."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return tensor.ds_tensor if hasattr(tensor, "ds_tensor") else tensor  # ZeRO-3's


def master(parameter: nn.Parameter) -> Tensor:
    """What this process holds of the float32 weights that the optimizer steps; DeepSpeed computes in rounded ones."""
    if local(parameter).dtype == torch.float32:
        return local(parameter)
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param

    sharded = hasattr(parameter, "ds_tensor")
    return safe_get_local_fp32_param(parameter) if sharded else safe_get_full_fp32_param(parameter)


def copied(parameter: nn.Parameter) -> Tensor:
    """
    A float32 copy of a parameter, sharded as it is.

    ZeRO-3's, which are no `DTensor`, become one: flat, and padded to a multiple of the processes.
    """
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach().to(torch.float32, copy=True)
    mine = parameter.ds_tensor.to(torch.float32, copy=True)
    mesh = init_device_mesh(mine.device.type, (torch.distributed.get_world_size(),))
    return DTensor.from_local(mine, mesh, [Shard(0)], run_check=False)


@torch.no_grad()
def norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of weights together; of sharded ones all processes must call it."""
    parts, zero3 = [], False
    for parameter in parameters:
        if hasattr(parameter, "ds_tensor"):
            zero3, mine = True, parameter.ds_tensor
            padded = (torch.distributed.get_rank() + 1) * mine.numel() - parameter.ds_numel
            parts.append(mine[: mine.numel() - min(max(0, padded), mine.numel())].norm())
        else:
            parts.append(whole(parameter.norm()))
    square = torch.stack(parts).square().sum()
    if zero3:
        torch.distributed.all_reduce(square)
    return square.sqrt()


def release(model: nn.Module, engine: Any = None) -> None:
    """
    Free what a forward has gathered and kept of sharded weights; the next one gathers it again.

    Args:
        model (`nn.Module`): Sharded, or not.
        engine (`DeepSpeedEngine`, *optional*): That has its weights.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    if engine is not None and engine.zero_optimization_partition_weights():
        engine.optimizer.empty_partition_cache()


@torch.no_grad()
def fill(tensor: Tensor, values: Tensor) -> None:
    """Overwrite a tensor that may be sharded, with its part of a whole one that every process has."""
    if isinstance(tensor, DTensor):
        values = distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.copy_(values)


def load_whole_weights(model: nn.Module, checkpoint: str | os.PathLike) -> None:
    """
    Fill a sharded model from what the Trainer wrote in a checkpoint: what is trained.

    With accelerate's own (1.15), the first process sends an adapter's weights and the others do not wait for them.

    Args:
        model (`nn.Module`): Sharded; all processes must call it.
        checkpoint (`str` or `PathLike`): The directory.
    """
    weights = torch.load(Path(checkpoint, "pytorch_model_fsdp.bin"), weights_only=True, mmap=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained <= set(weights), sorted(trained - set(weights))
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, strict=False))


def check_optimizer(checkpoint: str | os.PathLike, sharding: str | None) -> None:
    """
    Raise unless a checkpoint has an optimizer that this run can load.

    Args:
        checkpoint (`str` or `PathLike`): The directory.
        sharding (`str`, *optional*): What this run shards weights with, as in [`sharding_of`].

    Raises:
        `ValueError`: If it has none, or one that was sharded in another way.
    """
    if not any(Path(checkpoint).glob("optimizer*")) and not any(Path(checkpoint).glob("global_step*")):
        raise ValueError(f"cannot resume from {checkpoint}: it was written with save_only_model")
    written = sharding_of(checkpoint)
    if written != sharding:
        raise ValueError(
            f"cannot resume from {checkpoint}: its run sharded weights with {written or 'nothing'}, this run "
            f"with {sharding or 'nothing'}. Launch it with that kind of accelerate configuration"
        )


def sharding_of(checkpoint: str | os.PathLike) -> str | None:
    """What the run that wrote a checkpoint sharded its weights with: `"FSDP"`, `"DeepSpeed"` or `None`."""
    if Path(checkpoint, "optimizer.bin").is_file():
        return "FSDP"
    return "DeepSpeed" if any(Path(checkpoint).glob("global_step*")) else None
