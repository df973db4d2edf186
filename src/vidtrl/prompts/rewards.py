"""Rewards for a language model that writes prompts: the video that comes of a prompt, and its form. Both are reward
functions of `trl.GRPOTrainer`."""

import functools
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..models import Condition, VideoModel
from ..rewards import RewardRunner
from ..rollout import sample
from ..trainer.lora import load_base_adapters
from .enhancer import PromptEnhancer
from .text import REFUSAL, clean_output, count_words, missing_words, repeats_itself, required_words


USER_PROMPT = "user_prompt"  # the dataset column with what the user wrote
# what TRL passes besides the dataset's columns
_TRL_ARGUMENTS = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_metric",
    "log_extra",
    "environments",
)


class video_reward:  # noqa: N801 - made like the functions that it stands for, `reward_funcs=[video_reward(...)]`
    """
    A reward function for `trl.GRPOTrainer`: generate from each completion with a frozen video model, and score the video
    against what the user wrote.

    A completion is seen as the enhancer would see it at inference: cleaned and checked, and the user's own prompt in its
    place where it is not valid (RePrompt, https://huggingface.co/papers/2505.17540, with the generator frozen). Equal
    prompts share their initial noise, so completions of a group differ by their words alone. Videos are cached by prompt and
    seed, as 8-bit frames.

    Args:
        model (`str`, `PathLike`, `DiffusionPipeline` or [`VideoModel`]): It is not trained, and must not change while its
            videos are cached (see `clear_cache`).
        reward_funcs (`Callable`, `str` or `list`): As for [`VideoGRPOTrainer`]: called with the users' prompts, the videos
            and every dataset column.
        enhancer ([`PromptEnhancer`]): What is trained; it judges the completions.
        height (`int`), width (`int`), num_frames (`int`): Of the videos.
        reward_weights (`list[float]`, *optional*): One a function, 1 each by default.
        num_inference_steps (`int`, *optional*, defaults to `10`): Few are enough to compare prompts.
        guidance_scale (`float`, *optional*, defaults to `5.0`): Classifier-free guidance; 1 turns it off.
        negative_prompt (`str`, *optional*, defaults to `""`): For guidance.
        base_adapters (`list[str]`, *optional*): LoRA adapters, folders or Hub ids, under which the model generates. For a model
            that is loaded here.
        seeds (`Sequence[int]`, *optional*, defaults to `(0,)`): One video a seed; a completion's reward is their mean.
        batch_size (`int`, *optional*, defaults to `4`): Videos that are generated at once.
        cache_size (`int`, *optional*, defaults to `1024`): Videos that are kept, the last used ones. 0 keeps none.
        reward_timeout (`float`, *optional*), reward_error (`str`, *optional*, defaults to `"raise"`): As for
            [`VideoGRPOConfig`].
        device (`torch.device` or `str`, *optional*): Where a model that is loaded here goes; by default the accelerator
            (in bfloat16), or else the CPU.
        **pipeline_kwargs: Further arguments of the pipeline, such as `max_sequence_length`.

    Attributes:
        renders (`int`): Videos that were generated so far.
        cache_hits (`int`): Videos that were taken from the cache, or were wanted twice in a call.

    Raises:
        `ValueError` or `TypeError`: For a size the model does not take, an unknown reward, or an image-to-video model.

    Example:

    ```python
    >>> reward = video_reward("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", ["motion-magnitude"], enhancer=enhancer,
    ...                       height=480, width=832, num_frames=33)
    >>> trainer = trl.GRPOTrainer(enhancer.model, [reward, structure_reward(enhancer)], args,
    ...                           prompts_dataset(enhancer, dataset), processing_class=enhancer.tokenizer)
    ```
    """

    def __init__(
        self,
        model: str | os.PathLike | DiffusionPipeline | VideoModel,
        reward_funcs: Callable | str | list[Callable | str],
        *,
        enhancer: PromptEnhancer,
        height: int,
        width: int,
        num_frames: int,
        reward_weights: list[float] | None = None,
        num_inference_steps: int = 10,
        guidance_scale: float = 5.0,
        negative_prompt: str = "",
        base_adapters: list[str] | None = None,
        seeds: Sequence[int] = (0,),
        batch_size: int = 4,
        cache_size: int = 1024,
        reward_timeout: float | None = None,
        reward_error: str = "raise",
        device: torch.device | str | None = None,
        **pipeline_kwargs: Any,
    ):
        self.__name__ = "video_reward"
        if not seeds:
            raise ValueError("seeds is empty: give at least one, such as seeds=(0,)")
        for name, value, low in (("batch_size", batch_size, 1), ("cache_size", cache_size, 0)):
            if value < low:
                raise ValueError(f"{name} must be at least {low}, not {value}")
        self.runner = RewardRunner(reward_funcs, reward_weights, timeout=reward_timeout, on_error=reward_error)
        if isinstance(model, (str, os.PathLike)):
            device = torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
            dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
            model = VideoModel.from_pretrained(model, torch_dtype=dtype)
            load_base_adapters(model.pipe, list(model.denoisers), list(base_adapters or []))
            model.pipe.to(device)
        elif base_adapters:
            raise ValueError(
                "base_adapters are for a model that is loaded here: load them into the pipeline that you pass"
            )
        elif not isinstance(model, VideoModel):
            model = VideoModel.from_pretrained(model)
        if model.family.image:
            raise ValueError(f"{type(model.pipe).__name__} needs an image a prompt; video_reward takes text-to-video")
        self.model, self.enhancer = model, enhancer
        self.latent_shape = model.latent_shape(num_frames, height, width)  # an invalid size shows here
        self.call = {"height": height, "width": width, "num_frames": num_frames, **pipeline_kwargs}
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        self.negative_prompt, self.seeds, self.batch_size = negative_prompt, tuple(seeds), batch_size
        self.cache_size = cache_size
        self.renders = self.cache_hits = 0
        self._cache: OrderedDict[tuple[str, int], torch.Tensor] = OrderedDict()

    def __call__(self, prompts, completions, **kwargs) -> list[float | None]:
        """As TRL calls it. Returns one weighted reward a completion, `None` where no function applies."""
        users = user_prompts(prompts, kwargs)
        words = kwargs.get("required_words") or [None] * len(users)
        judged = [
            self.enhancer.judge(user, completion_text(c), w)
            for user, c, w in zip(users, completions, words, strict=True)
        ]
        texts, repeat = [e.text for e in judged], len(self.seeds)
        videos = self.generate(texts)  # the seeds of the first prompt, of the second, ...
        columns = {k: v for k, v in kwargs.items() if k not in _TRL_ARGUMENTS}
        each = lambda values: [v for v in values for _ in range(repeat)]  # noqa: E731
        handle = self.runner.submit(
            each(users), videos, {k: each(v) for k, v in columns.items()}, kwargs.get("trainer_state")
        )
        rewards = self.runner.collect(handle)  # (N * seeds, R)
        if log_metric := kwargs.get("log_metric"):
            for name, value in zip(self.runner.names, rewards.nanmean(0).tolist(), strict=True):
                log_metric(f"video/{name}", value)
            for name, values in self.runner.metrics.items():
                log_metric(f"video/{name}", sum(values) / len(values))
            log_metric("video/fallback", sum(not e.enhanced for e in judged) / len(judged))
        if log_extra := kwargs.get("log_extra"):
            log_extra("rendered_prompt", texts)
        applies = ~rewards.isnan()
        total = (rewards.nan_to_num() * self.runner.weights).sum(1).masked_fill(~applies.any(1), float("nan"))
        means = total.view(-1, repeat).nanmean(1)
        return [None if value != value else value for value in means.tolist()]

    def generate(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        """
        The videos of prompts, from the cache where it has them.

        Args:
            prompts (`Sequence[str]`): What to generate from, as it is.

        Returns:
            `list[torch.Tensor]`: One video a prompt and seed, the seeds of a prompt side by side: float32 (F, C, H, W) in
            [0, 1] on the CPU, in steps of 1/255.
        """
        return self.render([(prompt, seed) for prompt in prompts for seed in self.seeds])

    @torch.no_grad()
    def render(self, wanted: Sequence[tuple[str, int]]) -> list[torch.Tensor]:
        """The videos of (prompt, seed) pairs, as `generate` returns them."""
        missing = [key for key in dict.fromkeys(wanted) if key not in self._cache]
        self.renders += len(missing)
        self.cache_hits += len(wanted) - len(missing)
        negative = None
        if self.guidance_scale != 1.0 and missing:
            negative = self.model.condition(self.negative_prompt, negative=True, **self.call)
        present = {key: self._cache[key] for key in wanted if key in self._cache}
        for first in range(0, len(missing), self.batch_size):
            batch = missing[first : first + self.batch_size]
            encoded = {p: self.model.condition(p, **self.call) for p in dict.fromkeys(p for p, _ in batch)}
            latents = sample(
                self.model,
                Condition.cat([encoded[p] for p, _ in batch]),
                negative,
                guidance_scale=self.guidance_scale,
                num_inference_steps=self.num_inference_steps,
                generator=[torch.Generator().manual_seed(seed) for _, seed in batch],
            )
            for key, video in zip(batch, self.model.decode(latents), strict=True):
                present[key] = (video.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        for key in wanted:
            self._cache[key] = present[key]
            self._cache.move_to_end(key)
        while len(self._cache) > self.cache_size:
            self._cache.popitem(last=False)
        return [present[key].float() / 255 for key in wanted]

    def clear_cache(self) -> None:
        """Forget all videos, because the video model was trained meanwhile."""
        self._cache.clear()


class structure_reward:  # noqa: N801 - as above
    """
    A reward function for `trl.GRPOTrainer`: whether a completion has the form of a prompt, in [0, 1].

    The mean of three parts: nothing had to be cleaned away (0 or 1); its length is within the template's limits (falling
    in proportion outside of them); the share of the quoted text, numbers and `required_words` (a dataset column) that it
    keeps. 0 for an empty answer, a refusal, or one that repeats itself. It says nothing about whether a prompt is any good:
    a model that copies the user's prompt can score 1.

    Args:
        enhancer ([`PromptEnhancer`]): Its template has the limits.

    Example:

    ```python
    >>> reward = structure_reward(enhancer)
    >>> reward(prompts=["2 cats"], completions=["I'm sorry, I can't do that."])
    [0.0]
    ```
    """

    def __init__(self, enhancer: PromptEnhancer):
        self.__name__ = "structure_reward"
        self.template = enhancer.template

    def __call__(self, prompts, completions, **kwargs) -> list[float]:
        users = user_prompts(prompts, kwargs)
        words = kwargs.get("required_words") or [None] * len(users)
        return [
            self.score(user, completion_text(completion), extra)
            for user, completion, extra in zip(users, completions, words, strict=True)
        ]

    def score(self, prompt: str, answer: str, words: list[str] | None = None) -> float:
        """The reward of one answer."""
        text, low, high = clean_output(answer), self.template.min_words, self.template.max_words
        if not text or repeats_itself(text) or (REFUSAL.search(text) and not REFUSAL.search(prompt)):
            return 0.0
        count = count_words(text)
        length = 1.0 if low <= count <= high else count / low if count < low else high / count
        required = len(required_words(prompt)) + len(words or [])
        kept = 1 - len(missing_words(prompt, text, words)) / max(1, required)
        return (float(" ".join(answer.split()) == text) + length + kept) / 3


def score_original(reward_func: Callable | str, column: str = USER_PROMPT) -> Callable:
    """
    A reward function for [`VideoGRPOTrainer`] on enhanced prompts: it scores the videos against what users wrote.

    Args:
        reward_func (`Callable` or `str`): A reward function, or the name of a built-in one.
        column (`str`, *optional*, defaults to `"user_prompt"`): The dataset column with the users' prompts.

    Returns:
        `Callable`: The same function, called with that column for `prompts`.

    Raises:
        `ValueError`: If there is no built-in reward of that name.
    """
    if isinstance(reward_func, str):
        from ..rewards import get_reward

        reward_func = get_reward(reward_func)
    return functools.wraps(reward_func)(functools.partial(_with_column, reward_func, column))


def _with_column(reward_func, column, /, **kwargs):
    if column not in kwargs:
        raise ValueError(f"the dataset has no column {column!r}: add one with what the users wrote")
    return reward_func(**{**kwargs, "prompts": kwargs[column]})


def user_prompts(prompts: list, columns: dict[str, list]) -> list[str]:
    """What users wrote: the column `user_prompt`, or else the prompts that TRL passes, of a conversation the last turn."""
    if columns.get(USER_PROMPT) is not None:
        return list(columns[USER_PROMPT])
    return [p if isinstance(p, str) else p[-1]["content"] for p in prompts]


def completion_text(completion: str | list[dict[str, str]]) -> str:
    """The text of a completion in TRL's standard or conversational format."""
    return completion if isinstance(completion, str) else completion[-1]["content"]
