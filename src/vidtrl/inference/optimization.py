"""One place to configure what diffusers has for faster and smaller inference; nothing is implemented here."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline, TextKVCacheConfig
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.models import CacheMixin
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.utils import recurse_remove_peft_layers
from peft.tuners.tuners_utils import BaseTunerLayer


OFFLOADS = ("model", "sequential", "group")
FEW_STEPS = 4


@dataclass(frozen=True)
class InferenceOptimization:
    """
    Settings of diffusers' own optimisations, applied to a pipeline in an order that works.

    What helps differs between models. A few-step student already spends little on denoising, so that text encoder and
    VAE count; caches that skip work between steps are for 20 steps and more. `vidtrl benchmark` measures the gain and
    what it does to the latents.

    Args:
        fuse_lora (`bool`, *optional*, defaults to `False`): Merge the active adapters into the weights. Saves their
            matrix products, and is best done before anything else.
        quantization (`diffusers.PipelineQuantizationConfig`, *optional*): Quantised weights (torchao, bitsandbytes,
            GGUF, ...). Happens while a pipeline is loaded: pass `**optimization.load_kwargs` to `from_pretrained` or
            [`load_student`].
        layerwise_casting (`torch.dtype`, *optional*): Store the denoiser's weights in this dtype, such as
            `torch.float8_e4m3fn`, and compute in its own.
        attention_backend (`str`, *optional*): A name of diffusers' `AttentionBackendName`, such as `"_native_cudnn"`,
            `"flash_hub"` or `"sage"`. Diffusers makes it the default of all models in the process as well.
        cache (`Any`, *optional*): A cache configuration of diffusers, such as `FirstBlockCacheConfig(threshold=0.1)`
            or `PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2)`; a missing
            `current_timestep_callback` is filled in. They reuse features of earlier steps, and are refused for
            4 steps or fewer.
        compile (`bool`, *optional*, defaults to `False`): `compile_repeated_blocks` of the denoiser.
        compile_kwargs (`dict`, *optional*): For `torch.compile`; `{"fullgraph": True}` by default.
        offload (`str`, *optional*): `"model"`, `"sequential"` or `"group"`: weights wait on the CPU, by component, by
            layer or by block.
        offload_kwargs (`dict`, *optional*): For `enable_group_offload`; one block at a time, prefetched in a stream,
            by default.
        vae_tiling, vae_slicing (`bool`, *optional*, defaults to `False`): Decode tile by tile, clip by clip. Both save
            memory and cost time.
        vae_dtype (`torch.dtype`, *optional*): Decode in this dtype, such as `torch.bfloat16`; the encoder keeps its own,
            and pipelines see no difference. On CPUs float32 3-D convolutions of a single clip run in torch's slowest
            kernel, and bfloat16 ones do not.
        vae_channels_last (`bool`, *optional*, defaults to `False`): Store the decoder's convolutions with channels last.
        vae_compile (`bool`, *optional*, defaults to `False`): `torch.compile` the decoder, with `compile_kwargs` but for
            `fullgraph`: decoders that walk over frames with a cache break the graph.
        context_parallel (`diffusers.ContextParallelConfig`, *optional*): Split the sequence over processes started
            with `torchrun`. Not with [`CausalVideoPipeline`].

    Raises:
        `ValueError`: Settings that exclude each other.

    Example:

    ```python
    >>> fast = InferenceOptimization(fuse_lora=True, compile=True, attention_backend="_native_cudnn")
    >>> pipe = fast.apply(load_student("me/wan-4-steps", torch_dtype=torch.bfloat16).to("cuda"))
    ```
    """

    fuse_lora: bool = False
    quantization: Any | None = None
    layerwise_casting: torch.dtype | None = None
    attention_backend: str | None = None
    cache: Any | None = None
    compile: bool = False
    compile_kwargs: dict[str, Any] = field(default_factory=lambda: {"fullgraph": True})
    offload: str | None = None
    offload_kwargs: dict[str, Any] = field(default_factory=dict)
    vae_tiling: bool = False
    vae_slicing: bool = False
    vae_dtype: torch.dtype | None = None
    vae_channels_last: bool = False
    vae_compile: bool = False
    context_parallel: Any | None = None

    def __post_init__(self):
        if self.quantization is not None and self.layerwise_casting is not None:
            raise ValueError("quantization and layerwise_casting both choose how weights are stored; set one of them.")
        if self.quantization is not None and self.fuse_lora:
            raise ValueError(
                "fuse_lora would round the adapter to the quantised weights. Merge first (pipe.fuse_lora() and save_pretrained, "
                "or export_student with format='skyreels-v2') and quantise what was saved, or leave fuse_lora out."
            )
        names = sorted(name.value for name in AttentionBackendName)
        if self.attention_backend is not None and self.attention_backend not in names:
            raise ValueError(
                f"diffusers has no attention backend {self.attention_backend!r}; it has {', '.join(names)}."
            )
        if self.offload is not None and self.offload not in OFFLOADS:
            raise ValueError(f"offload must be one of {', '.join(OFFLOADS)}, got {self.offload!r}.")
        if self.offload == "group" and self.compile and self.compile_kwargs.get("fullgraph"):
            raise ValueError(
                "Group offloading moves weights between the blocks, which breaks a full graph: set "
                "compile_kwargs={'fullgraph': False}."
            )

    @property
    def load_kwargs(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` for what must happen while the weights are loaded."""
        return {} if self.quantization is None else {"quantization_config": self.quantization}

    def apply(self, pipe: DiffusionPipeline, num_inference_steps: int | None = None) -> DiffusionPipeline:
        """
        Configure a pipeline, in place.

        Args:
            pipe (`DiffusionPipeline`): Loaded, with its adapters, on the device where it will run (unless offloaded).
            num_inference_steps (`int`, *optional*): How many steps it will make; needed with `cache`, and read from
                the scheduler of a few-step student.

        Returns:
            `DiffusionPipeline`: The same pipeline.

        Raises:
            `ValueError`: The pipeline, its model or this machine does not have what is asked for; the message says
                what is missing.
        """
        self.check(pipe, num_inference_steps)
        denoisers = _denoisers(pipe)
        if self.quantization is not None and not any("quantization_config" in d.config for d in denoisers):
            raise ValueError(
                "quantization happens while the weights are loaded: pass **optimization.load_kwargs to from_pretrained "
                "or load_student."
            )
        if self.fuse_lora:
            fuse_adapters(pipe)
        for denoiser in denoisers:
            if self.layerwise_casting is not None:
                denoiser.enable_layerwise_casting(storage_dtype=self.layerwise_casting, compute_dtype=denoiser.dtype)
            if self.attention_backend is not None:
                try:
                    denoiser.set_attention_backend(self.attention_backend)
                except (RuntimeError, ValueError, ImportError) as error:  # its package is not installed
                    raise ValueError(
                        f"attention_backend={self.attention_backend!r} cannot be used: {error}"
                    ) from error
            if self.context_parallel is not None:
                denoiser.enable_parallelism(config=self.context_parallel)
            if self.cache is not None:
                denoiser.enable_cache(self._cache_of(pipe))
        if self.vae_tiling:
            pipe.vae.enable_tiling()
        if self.vae_slicing:
            pipe.vae.enable_slicing()
        if self.vae_dtype is not None:
            decode_in(pipe.vae, self.vae_dtype)
        if self.vae_channels_last:
            formats = {torch.nn.Conv2d: torch.channels_last, torch.nn.Conv3d: torch.channels_last_3d}
            for kind, memory_format in formats.items():
                for module in pipe.vae.decoder.modules():
                    if isinstance(module, kind):
                        module.to(memory_format=memory_format)
        self._offload(pipe)
        if self.vae_compile:
            pipe.vae.decoder.compile(**self.compile_kwargs | {"fullgraph": False})
        if self.compile:
            for denoiser in denoisers:
                denoiser.compile_repeated_blocks(**self.compile_kwargs)
        return pipe

    def check(self, pipe: DiffusionPipeline, num_inference_steps: int | None = None) -> None:
        """What `apply` would refuse, before anything is changed; arguments and errors are the same."""
        name = type(_denoisers(pipe)[0]).__name__
        if self.cache is not None:
            steps = num_inference_steps or len(pipe.scheduler.config.get("denoising_steps", ()))
            if not steps:
                raise ValueError(
                    "With a cache, apply needs num_inference_steps, the number of steps you will sample with."
                )
            if steps <= FEW_STEPS and not isinstance(self.cache, TextKVCacheConfig):
                raise ValueError(
                    f"{type(self.cache).__name__} reuses features of the step before, and {steps} steps are too far apart "
                    "for that: each would be replaced by a copy of a different noise level. Leave the cache out for a "
                    "few-step student; caches pay at 20 steps and more."
                )
            if not isinstance(_denoisers(pipe)[0], CacheMixin):
                raise ValueError(f"diffusers has no caches for {name}; leave cache out.")
        if self.offload is not None and not torch.accelerator.is_available():
            raise ValueError(
                f"offload={self.offload!r} needs an accelerator; without one all weights are on the CPU anyway."
            )
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.context_parallel is not None and not distributed:
            raise ValueError(
                "context_parallel splits the sequence over processes: start the script with torchrun and call "
                "torch.distributed.init_process_group() first."
            )
        if self.context_parallel is not None and not torch.accelerator.device_count():
            raise ValueError(
                "context_parallel gives each process an accelerator, and there is none here; leave it out."
            )

    def _cache_of(self, pipe: DiffusionPipeline) -> Any:
        if getattr(self.cache, "current_timestep_callback", self) is None:
            return dataclasses.replace(self.cache, current_timestep_callback=lambda: pipe.current_timestep)
        return self.cache

    def _offload(self, pipe: DiffusionPipeline) -> None:
        if self.offload == "model":
            pipe.enable_model_cpu_offload()
        elif self.offload == "sequential":
            pipe.enable_sequential_cpu_offload()
        elif self.offload == "group":
            stream = {"use_stream": torch.accelerator.current_accelerator().type in ("cuda", "xpu")}
            options = {"offload_type": "block_level", "num_blocks_per_group": 1, **stream} | self.offload_kwargs
            pipe.enable_group_offload(onload_device=torch.accelerator.current_accelerator(), **options)


def decode_in(vae: torch.nn.Module, dtype: torch.dtype) -> None:
    """
    Let a VAE decode in another dtype. What it is given and what it returns keep the dtype that the VAE has now.

    Args:
        vae (`nn.Module`): One of diffusers' autoencoders; changed in place.
        dtype (`torch.dtype`): Of its decoder's weights and arithmetic.
    """
    outside = vae.dtype

    def cast(values: tuple, to: torch.dtype) -> tuple:
        return tuple(v.to(to) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values)

    for module in (getattr(vae, name, None) for name in ("post_quant_conv", "decoder")):
        if module is not None:
            module.to(dtype)
            module.register_forward_pre_hook(lambda module, args: cast(args, dtype))

    def back(module, args, output):
        return cast(output, outside) if isinstance(output, tuple) else output.to(outside)

    vae.decoder.register_forward_hook(back)


def _denoisers(pipe: DiffusionPipeline) -> list[Any]:
    return [m for n in ("transformer", "transformer_2") if (m := pipe.components.get(n)) is not None]


def fuse_adapters(pipe: DiffusionPipeline) -> None:
    """Merge the active LoRA adapters into the denoiser's weights and drop them; without adapters nothing happens."""
    if isinstance(pipe, LoraBaseMixin):
        if active := pipe.get_active_adapters():
            present = [n for n in ("transformer", "transformer_2") if pipe.components.get(n) is not None]
            pipe.fuse_lora(components=present, adapter_names=active, safe_fusing=True)
            pipe.unload_lora_weights()
    elif isinstance(pipe.transformer, PeftAdapterMixin) and getattr(pipe.transformer, "peft_config", None):
        pipe.transformer.fuse_lora(adapter_names=pipe.transformer.active_adapters(), safe_fusing=True)
        pipe.transformer.unload_lora()
    elif getattr(pipe.transformer, "peft_config", None):  # PEFT's layers, without a loader of diffusers
        for layer in pipe.transformer.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.merge(safe_merge=True)
        recurse_remove_peft_layers(pipe.transformer)
        del pipe.transformer.peft_config
