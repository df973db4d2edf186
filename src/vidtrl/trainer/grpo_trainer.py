"""Reinforcement learning of video diffusion models with group-relative advantages.

The method of https://huggingface.co/papers/2604.25427 (stage 2) by default, its relatives as recipes. One generation:

1. Prompts: P of them, G videos each.
2. Rollout: a plan (`diffusion.step_schedules`) says which steps of which video draw noise and what videos share; every
   shared latent is computed once. A stochastic step is a decision: x, its kernel N(mean(v), std^2), and the x' drawn.
3. Reward: the decoded videos are scored.
4. Advantage: a drawn x' is worth the mean reward of the videos that came of it, compared with its competitors.
5. Loss: at each decision one forward gives the mean, and with it the log-probability of every x' drawn from it,

       loss = mean  w_k max(-A r, -A clip(r)),        r = p(x' | x) / p_old(x' | x).

DiffusionNFT and AWM sample deterministically and regress on re-noised videos instead (2. and 5. change).
Left out: learned rewards' gradients (ReFL), per-token entropy terms, rollout engines outside this process.
"""

import contextlib
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from peft import PeftConfig
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.utils import logging

from ..data import standardize_columns
from ..diffusion import flow
from ..diffusion.advantages import aggregate_rewards, zero_std_groups
from ..diffusion.policy_losses import awm_log_prob, clipped_loss, dppo_loss, guard_log_ratio, nft_loss
from ..diffusion.step_schedules import Plan
from ..diffusion.transitions import Transition, transition
from ..models import Condition
from ..rewards import RewardRunner
from ..rewards.runner import RewardHandle
from ..rollout.branching import rollout
from ..rollout.sampling import guided_velocity
from .base_trainer import VideoTrainer
from .callbacks import SyncReferenceCallback
from .completions import CompletionLog
from .draws import draw_seed
from .ema import WeightAverage
from .grpo_checks import check_arguments, check_denoisers, check_on_policy
from .grpo_choices import choose_batch_guidance, choose_reuse, keep_graphs, load_choices, save_choices
from .grpo_config import VideoGRPOConfig
from .grpo_evaluation import evaluate_prompts
from .grpo_items import Item, micro_batches, noised, share_out
from .grpo_logging import GenerationMetrics, log_completions
from .grpo_plans import (
    check_schedule,
    credited,
    draw_plan,
    embedded_guidance,
    step_weights,
    trained_steps,
    training_times,
)
from .prompt_batches import (
    EncodedPrompts,
    as_given,
    generation_sampler,
    members_here,
    prompt_loader,
    prompts_with_images,
    row_of_prompt,
    summary_of_prompts,
)


logger = logging.get_logger(__name__)


class VideoGRPOTrainer(VideoTrainer):
    """
    GRPO and its relatives for any supported diffusers video pipeline.

    Args:
        model (`str`, `PathLike` or `DiffusionPipeline`):
            Hub id, local path, or a loaded pipeline. Not copied: it carries the trained weights afterwards.
        reward_funcs (`Callable`, `str` or a list of them):
            Called with keywords `prompts`, `videos` (list of float32 tensors (F, C, H, W) in [0, 1]) and every other
            column of the dataset; each returns one float (or `None`) per video. A `str` names a built-in reward.
        args ([`VideoGRPOConfig`], *optional*): Default: the paper's configuration, at the pipeline's own size.
        train_dataset (`Dataset` or `IterableDataset`):
            A column `prompt`, `image` for image-to-video models, and any columns for the rewards.
        eval_dataset (`Dataset`, `IterableDataset` or a dict of them, *optional*):
            Prompts of the evaluation: fixed seeds, the pipeline's own solver.
        callbacks (`list[TrainerCallback]`, *optional*): Added to the default ones.
        optimizers (`tuple`, *optional*): Optimizer and scheduler; default: AdamW and what `args` says.
        quantization_config (*optional*): A diffusers quantisation configuration, used while loading `model` (an id or path).
        peft_config (`LoraConfig`, *optional*): Train an adapter; `None` trains all weights of the denoiser.
        eval_reward_funcs (`list`, *optional*):
            Rewards that evaluation reports and training never sees: where reward hacking shows.

    Raises:
        `TypeError`, `ValueError`: For arguments that do not fit, with the fix in the message.

    Example:

    ```python
    from datasets import load_dataset
    from peft import LoraConfig
    from vidtrl import VideoGRPOConfig, VideoGRPOTrainer

    def smooth(prompts, videos, **kwargs):
        return [-(v[2:] - 2 * v[1:-1] + v[:-2]).abs().mean().item() for v in videos]

    trainer = VideoGRPOTrainer(
        model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        reward_funcs=[smooth, "motion-magnitude"],
        args=VideoGRPOConfig("wan-grpo", height=480, width=832, num_frames=81, max_steps=300),
        train_dataset=load_dataset("me/prompts", split="train"),
        peft_config=LoraConfig(r=64, lora_alpha=128),
    )
    trainer.train()
    ```
    """

    _name = "GRPO"
    _tag_names = ["vidtrl", "grpo"]

    def __init__(
        self,
        model: str | os.PathLike | DiffusionPipeline,
        reward_funcs: Callable | str | list[Callable | str],
        args: VideoGRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
        quantization_config=None,
        peft_config: PeftConfig | None = None,
        eval_reward_funcs: Callable | str | list[Callable | str] | None = None,
    ):
        if args is None:
            name = type(model).__name__ if isinstance(model, DiffusionPipeline) else os.fspath(model)
            args = VideoGRPOConfig(f"{name.rstrip('/').split('/')[-1]}-GRPO")
        check_arguments(args, train_dataset, peft_config)
        runner = {"timeout": args.reward_timeout, "on_error": args.reward_error}
        self.rewards = RewardRunner(reward_funcs, weights=args.reward_weights, **runner)
        trained = reward_funcs if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        held_out = eval_reward_funcs if isinstance(eval_reward_funcs, (list, tuple)) else [eval_reward_funcs or ()]
        self.eval_rewards = RewardRunner([*trained, *[f for f in held_out if f]], **runner)
        self._generation: tuple[tuple[int, int], list[list[list[Item]]]] | None = None
        self.metrics = GenerationMetrics()
        self._completions: CompletionLog | None = None
        self._last_ratio_deviation = 0.0
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            data_collator=as_given,
        )
        own_reference = args.beta > 0 and (args.sync_ref_model or not self.has_adapter)
        # roles on the one base: a set of trainable weights each, saved with every checkpoint
        if args.loss_type in ("nft", "awm"):
            self.roles["old"] = WeightAverage(self.model, decay=0.5)
        if own_reference:
            self.roles["reference"] = WeightAverage(self.model, decay=0.5)
            if args.sync_ref_model:
                self.add_callback(SyncReferenceCallback(self.roles["reference"]))
        self.reuse_rollout = choose_reuse(
            args,
            own_reference=own_reference,
            num_denoisers=len(self.video_model.denoisers),
            sharded=self.is_sharded,
            dropout=any(module.p > 0 for module in self.model.modules() if isinstance(module, nn.Dropout)),
        )
        self.batch_guidance = args.batch_guidance  # chosen before the first rollout, if left open
        self._graphs_tried = args.reuse_rollout is not None  # likewise

    # ---- Prompts ----

    def prepare_datasets(self, train_dataset, eval_dataset):
        args, model = self.args, self.video_model
        self.fill_shape()
        check_denoisers(args, model, self.denoiser_names, swapped=self.swap.enabled)
        self._encoded = EncodedPrompts(args, model)
        model.embedded_guidance = embedded_guidance(args, model)
        # of both experts, where the low-noise one has its own
        self.guidance_scale: float | dict[str, float] = args.guidance_scale
        if args.guidance_scale_2 is not None:
            scales = (args.guidance_scale, args.guidance_scale_2)
            self.guidance_scale = dict(zip(model.denoisers, scales, strict=True))
        self.latent_shape = model.latent_shape(args.num_frames, args.height, args.width)
        self.grid = model.sigmas(args.num_inference_steps, self.latent_shape)
        # the steps at which what is trained is used: all, unless it is one of two experts
        self._own_steps = [
            i for i, sigma in enumerate(self.grid[:-1].tolist()) if model.expert(sigma) in self.denoiser_names
        ]
        check_schedule(args, self.grid, self._own_steps, self.transition)
        self.negative_condition = None  # of all prompts; each image has its own
        if args.guidance_scale != 1.0 and not model.family.image:
            self.negative_condition = self._encoded.encode(args.negative_prompt, negative=True).to(args.device)
        if isinstance(eval_dataset, dict):
            evaluation = {name: self.prepare_dataset(dataset) for name, dataset in eval_dataset.items()}
        else:
            evaluation = None if eval_dataset is None else self.prepare_dataset(eval_dataset)
        return self.prepare_dataset(train_dataset), evaluation

    def prepare_dataset(self, dataset: Dataset | IterableDataset) -> Dataset:
        """Prompts under the name `prompt`, with an image where the model starts from one; a stream is read to its end."""
        if isinstance(dataset, IterableDataset):
            dataset = Dataset.from_list(list(dataset))
        return prompts_with_images(standardize_columns(dataset, prompts_only=True), self.video_model)

    def data_summary(self) -> dict:
        """What decides which prompts each generation sees."""
        return summary_of_prompts(self.train_dataset["prompt"][:])

    def _identity(self) -> dict:
        return {**super()._identity(), "method": {"recipe": self.args.recipe, "loss_type": self.args.loss_type}}

    def validation_prompts(self) -> list[str]:
        if self.args.validation_prompts:
            return self.args.validation_prompts
        return list(dict.fromkeys(self._shown()["prompt"]))[: self.args.num_validation_videos]

    def validation_image(self, index: int):
        if self.video_model.family.image:
            return self.image(row_of_prompt(self._shown(), self.validation_prompts()[index], index))
        return None

    def _shown(self) -> Dataset:
        return self.eval_dataset if isinstance(self.eval_dataset, Dataset) else self.train_dataset

    def image(self, row: dict) -> Image.Image | None:
        """The image that the videos of a row start from, at their size; `None` for text-to-video models."""
        return self._encoded.image(row)

    def condition(self, key: int, row: dict, negative: bool = False) -> Condition:
        """What the denoiser gets for a row of the dataset, encoded once per prompt (and image) and kept on the CPU."""
        return self._encoded.condition(key, row, negative)

    def get_train_dataloader(self) -> DataLoader:
        self._train_sampler = generation_sampler(self.args, len(self.train_dataset))
        return prompt_loader(self.train_dataset, self._train_sampler, self.args.dataloader_num_workers)

    def transition(self, x: Tensor, velocity: Tensor, sigma, sigma_next) -> Transition:
        """The kernel of a stochastic step; see [`~vidtrl.diffusion.transitions.transition`]."""
        args, sigma_max = self.args, float(self.grid[1])
        return transition(
            args.transition, x, velocity, sigma, sigma_next, noise_level=args.noise_level, sigma_max=sigma_max
        )

    # ---- Rollout ----

    def generate(self, inputs: list[tuple[tuple[int, ...], dict]]) -> list[list[list[Item]]]:
        """
        Sample, score and compare the videos of one generation.

        Args:
            inputs: What the sampler gave: (epoch, generation, micro-step, group, row index) and row for each group that this
                process has a part in.

        Returns:
            The slices of the generation, one per micro-step; each a list of micro-batches, equally many on all processes.
        """
        args, model = self.args, self.video_model
        epoch, number = inputs[0][0][:2]
        iteration = epoch * self._train_sampler.generations_per_epoch + number
        if "old" in self.roles:
            rate, most = args.old_policy_decay
            self.roles["old"].move(1 - min(rate * iteration, most))
        # a window is the same for all prompts, everything else is drawn for each
        own = args.sde_schedule != "window"
        seeds = [draw_seed(args.seed, epoch, number, group if own else 0) for group in range(args.num_prompts)]
        plans = [draw_plan(args, self.grid, self._own_steps, iteration, random.Random(seed)) for seed in seeds]
        members = members_here(args)
        groups = [key[3] for key, _ in inputs]
        conditions: list[Condition] = []
        negatives: list[Condition] = []
        own = args.guidance_scale != 1.0 and self.negative_condition is None
        with self.equal_calls():  # a negative branch may come after a call of the positive one
            for key, row in inputs:  # one after the other, so that both branches share the encoded image
                conditions.append(self.condition(key[4], row))
                negatives += [self.condition(key[4], row, negative=True)] if own else []
        self._group_conditions = dict(zip(groups, conditions, strict=True))
        self._group_negatives = dict(zip(groups, negatives, strict=False))

        def draw(group: int, *key: int) -> Tensor:
            source = torch.Generator().manual_seed(draw_seed(args.seed, epoch, number, group, *key))
            return torch.randn(self.latent_shape, generator=source)

        # as many groups at a time as fill the denoiser's batch: their async rewards are computed while the next ones are sampled
        latents, decisions, videos, handles, evaluations = [], [], [], [], 0
        batch_size = args.rollout_batch_size or args.per_device_train_batch_size
        together = math.lcm(batch_size, args.latents_per_prompt) // args.latents_per_prompt
        policy = self.roles["old"].swapped_in() if args.loss_type == "nft" else contextlib.nullcontext()
        if self.batch_guidance is None:
            self.batch_guidance = choose_batch_guidance(self, groups[0])
        if not self._graphs_tried:
            self.reuse_rollout = keep_graphs(self, {group: plans[group] for group in groups}, members)
            self._graphs_tried = True
        with policy, self.equal_calls():
            for start in range(0, len(groups), together):
                part = range(start, min(start + together, len(groups)))
                with self.metrics.timed("rollout_time"), self.accelerator.autocast(), torch.no_grad():
                    result = rollout(
                        model,
                        [plans[groups[i]] for i in part],
                        [list(members[groups[i]]) for i in part],
                        Condition.cat([conditions[i] for i in part]),
                        self._negatives([groups[i] for i in part]),
                        sigmas=self.grid,
                        transition=self.transition,
                        draw=lambda i, *key, start=start: draw(groups[start + i], *key),
                        guidance_scale=self.guidance_scale,
                        batch_size=batch_size,
                        batch_guidance=self.batch_guidance,
                        antithetic=args.antithetic,
                        tail_solver=args.tail_solver,
                        share=args.share_prefix,
                        keep_graph=self.reuse_rollout,
                        denoiser=self.by_expert(self.model_wrapped if self.reuse_rollout else self.model),
                    )
                with self.metrics.timed("rollout_time"):
                    decoded = model.decode(torch.cat(result.latents), chunk_size=args.vae_batch_size)
                evaluations += result.num_evaluations
                latents += result.latents
                videos += decoded
                for decision in result.decisions:
                    decision.group = groups[start + decision.group]
                decisions += result.decisions
                rows = [inputs[i][1] for i in part for _ in members[groups[i]]]
                handles.append(self._submit(self.rewards, rows, decoded))

        local, extra = self.metrics.collect_rewards(self.rewards, handles)
        # every process holds the same number of videos, in the order of (group, member)
        rewards = self.accelerator.gather(local.to(args.device)).cpu()
        rewards = rewards.view(args.num_prompts, args.num_generations, -1)
        advantages = self._advantages(plans, rewards)
        self.metrics.rewards(self.rewards, rewards)

        with self.metrics.timed("rollout_time"):
            if args.loss_type in ("clipped", "dppo"):
                items = self._decision_items(decisions, plans, advantages)
            else:
                items = self._video_items(latents, groups, members, advantages, (epoch, number))
        slices = self._slices(items)
        self.metrics.values["nfe"].append(float(evaluations * args.world_size))
        self.metrics.add_time("rollout_time", "reward_time")
        if args.log_completions and self.state.global_step % max(1, int(args.logging_steps)) == 0:
            self._completions = log_completions(
                self, self._completions, inputs, plans, videos, rewards, advantages, extra
            )
        return slices

    def _submit(self, runner: RewardRunner, rows: list[dict], videos: list[Tensor]) -> RewardHandle:
        """Hand videos and their rows of the dataset to the reward functions; images as the model saw them."""
        if self.video_model.family.image:
            images = {key: self.image(row) for key, row in {id(row): row for row in rows}.items()}  # of each row once
            rows = [{**row, "image": images[id(row)]} for row in rows]
        return runner.submit(
            prompts=[row["prompt"] for row in rows],
            videos=videos,
            columns={name: [row[name] for row in rows] for name in rows[0] if name != "prompt"},
            trainer_state=self.state,
        )

    # ---- Advantage ----

    def _advantages(self, plans: list[Plan], rewards: Tensor) -> dict[tuple[int, int, int], float]:
        """
        Advantages of everything that was drawn, over all processes.

        The value of a child is the mean reward of the members below it. Its competitors are the other children of the same
        step of its prompt (`baseline="prompt"`), or of the same initial latent. Tails are compared with their like and summed.

        Args:
            plans: One per group.
            rewards: (P, G, R), NaN where a reward does not apply.

        Returns:
            {(group, step, first member of the child): advantage}; for methods without stochastic steps the step is -1.
        """
        args = self.args
        keys, values, competition = [], [], []
        for group, plan in enumerate(plans):
            for step, _, children in credited(plan):
                for child in children:
                    for tail in sorted({int(plan.tail[m]) for m in child}):
                        below = [m for m in child if int(plan.tail[m]) == tail]
                        keys.append((group, step, child[0]))
                        values.append(rewards[group, below].nanmean(0))
                        latent = int(plan.seed[child[0]]) if args.baseline == "latent" else -1
                        competition.append((group, step, tail, latent))
        numbers = {name: i for i, name in enumerate(dict.fromkeys(competition))}
        ids = torch.tensor([numbers[name] for name in competition])
        table = torch.stack(values)
        flat = aggregate_rewards(
            table, self.rewards.weights, ids, scale=args.scale_rewards, clip=args.advantage_clip,
            aggregation="advantage" if args.multi_objective_aggregation == "normalize_then_sum" else "reward",
        )  # fmt: skip
        self.metrics.values["frac_reward_zero_std"].append(zero_std_groups(table, ids).float().mean().item())
        advantages: dict[tuple[int, int, int], float] = defaultdict(float)
        for key, advantage in zip(keys, flat.tolist(), strict=True):
            advantages[key] += advantage
        return dict(advantages)

    # ---- What to train on ----

    def _decision_items(self, decisions, plans, advantages) -> list[Item]:
        """Decisions of this process with their advantages and step weights; those that teach nothing weigh nothing."""
        args = self.args
        chosen = {
            (group, member): trained_steps(args, plan, self.state.global_step, group, member)
            for group, plan in enumerate(plans)
            for member in range(plan.num_members)
        }
        scale = step_weights(args, self.grid, plans, chosen, advantages, self.transition)
        leader = {  # the first member of each member's child, here or on another process
            (group, step, member): child[0]
            for group, plan in enumerate(plans)
            for step, _, children in plan.decisions()
            for child in children
            for member in child
        }
        items = []
        for d in decisions:
            target = int(plans[d.group].target[d.step, d.children[0][0]])
            first = [leader[d.group, d.step, child[0]] for child in d.children]
            worth = torch.tensor([advantages[d.group, d.step, m] for m in first])
            # a child whose members are on several processes is trained once, where its first member is
            mine = [d.step in chosen[d.group, m] and child[0] == m for m, child in zip(first, d.children, strict=True)]
            weight = torch.tensor([scale[d.step, target] * trained for trained in mine])
            # LongCat scales its divergence by the square
            kl_weight = weight**2 if args.timestep_weighting == "longcat" else weight
            items.append(Item(d.group, worth, weight, kl_weight, decision=d))
        return items

    @torch.no_grad()
    def _video_items(self, latents, groups, members, advantages, number) -> list[Item]:
        """Each video at `num_train_sigmas` stratified noise levels, with what the old policy says there."""
        args, items = self.args, []
        times = training_times(self.video_model, self.denoiser_names, self.latent_shape)
        for group, videos in zip(groups, latents, strict=True):
            for member, x0 in zip(members[group], videos, strict=True):
                source = torch.Generator().manual_seed(draw_seed(args.seed, *number, group, 2, member))
                worth, one = torch.tensor([advantages[group, -1, member]]), torch.ones(1)
                for sigma, noise in noised(self.video_model, self.latent_shape, args.num_train_sigmas, times, source):
                    items.append(Item(group, worth, one, one, x0=x0, noise=noise.to(x0.device), sigma=sigma))
        several_updates = args.steps_per_generation * args.num_iterations > args.gradient_accumulation_steps
        batch_size = args.rollout_batch_size or args.per_device_train_batch_size
        parts = self._batches(items, batch_size)
        inputs = [
            (
                torch.stack([flow.add_noise(item.x0, item.noise, item.sigma) for item in part]),
                torch.tensor([item.sigma for item in part]),
                [item.group for item in part],
            )
            for part in parts
        ]
        with self.roles["old"].swapped_in(), self.equal_calls(), self.accelerator.autocast():
            for part, given in zip(parts, inputs, strict=True):
                for item, v in zip(part, self._velocity(self.model, *given), strict=True):
                    item.v_old = v
        several = parts if args.loss_type == "awm" and several_updates else []
        with self.equal_calls(), self.accelerator.autocast():
            for part, given in zip(several, inputs, strict=False):
                v = self._velocity(self.model, *given)
                noise, x0 = (torch.stack([getattr(item, name) for item in part]) for name in ("noise", "x0"))
                log_prob = awm_log_prob(v, noise, x0, given[1], args.awm_weighting, self._free(given[2]))
                for item, value in zip(part, log_prob, strict=True):
                    item.old_log_prob = value
        return items

    def _slices(self, items: list[Item]) -> list[list[list[Item]]]:
        """Micro-steps of micro-batches, equally many on all processes, with weights that make their loss a mean."""
        size = 10**9 if self.reuse_rollout else self.args.per_device_train_batch_size
        return share_out(items, self.args, self.accelerator, lambda part: self._batches(part, size))

    def _batches(self, items: list[Item], size: int) -> list[list[Item]]:
        return micro_batches(items, size, self._called_alike)

    @property
    def _mixed(self) -> bool:
        """Whether one call takes several noise levels."""
        return self.video_model.per_sample_sigma and self.video_model.boundary is None

    def _called_alike(self, item: Item) -> tuple[int, float]:
        """What items of a micro-batch share: the expert, and the noise level where one call takes one: so all make one call."""
        expert = self.denoiser_names.index(self.video_model.expert(item.noise_level))
        # the calls of a reused rollout have been made
        return expert, 0.0 if self._mixed or self.reuse_rollout else item.noise_level

    # ---- Loss ----

    def _negatives(self, groups: list[int]) -> Condition | None:
        """The other branch of guidance: one for all, or one for each of these groups."""
        if not self._group_negatives:
            return self.negative_condition
        return Condition.cat([self._group_negatives[group] for group in groups])

    def _free(self, groups: list[int]) -> Tensor | None:
        """Of the latents of these groups, what is generated and not given by an image: (B, 1, f, h, w), `None` for all."""
        return Condition.cat([self._group_conditions[group] for group in groups]).free(self.args.device)

    def _velocity(self, model: nn.Module, x: Tensor, sigma: Tensor, groups: list[int]) -> Tensor:
        """Guided as in the rollout; one call per noise level where the family cannot mix them."""
        mixed = self._mixed
        parts = [torch.arange(len(x))] if mixed else [(sigma == s).nonzero().flatten() for s in sigma.unique()]
        velocities = [
            guided_velocity(
                self.video_model, x[rows], sigma[rows] if mixed else float(sigma[rows[0]]),
                Condition.cat([self._group_conditions[groups[i]] for i in rows.tolist()]),
                self._negatives([groups[i] for i in rows.tolist()]), self.guidance_scale, batched=bool(self.batch_guidance),
                denoiser=self.by_expert(model),
            )
            for rows in parts
        ]  # fmt: skip
        return torch.cat(velocities)[torch.cat(parts).argsort()]

    @contextlib.contextmanager
    def _reference(self) -> Iterator[None]:
        """The reference policy: what is under the trained adapter, or the kept weights. Not for use around a backward pass."""
        with torch.no_grad():
            if "reference" in self.roles:
                with self.roles["reference"].swapped_in():
                    yield
            else:
                with self.policies.active("base"):
                    yield

    def compute_loss(
        self, model: nn.Module, inputs: list[Item], return_outputs: bool = False, num_items_in_batch=None
    ):
        args, device = self.args, self.args.device
        sigma = torch.tensor([item.noise_level for item in inputs])
        groups = [item.group for item in inputs]
        advantages = torch.cat([item.advantages for item in inputs]).to(device)
        counts = torch.tensor([len(item.advantages) for item in inputs])
        child = torch.arange(len(inputs)).repeat_interleave(counts)  # the item of each child
        weight = torch.cat([item.weight for item in inputs]).to(device)
        kl_weight = torch.cat([item.kl_weight for item in inputs]).to(device)

        if inputs[0].decision is None:  # DiffusionNFT and AWM: the finished videos, noised again
            x0, noise = (torch.stack([getattr(item, name) for item in inputs]) for name in ("x0", "noise"))
            x = flow.add_noise(x0, noise, sigma)
        else:
            x = torch.stack([item.decision.latents for item in inputs])
        v_ref = None
        if args.beta > 0:
            with self._reference():
                v_ref = self._velocity(self._unwrapped(), x, sigma, groups)
        if inputs[0].decision is not None and inputs[0].decision.velocity is not None:  # the rollout kept its graph
            velocity = torch.stack([item.decision.velocity for item in inputs])
        else:
            velocity = self._velocity(model, x, sigma, groups)

        if inputs[0].decision is None:
            loss, ratio, kl = self._video_loss(inputs, velocity, v_ref, x, x0, noise, sigma, advantages)
        else:
            loss, ratio, kl = self._decision_loss(inputs, velocity, v_ref, x, sigma, advantages, child)
        total = (weight * loss).sum() + args.beta * (kl_weight * kl).sum()
        if bool((weight > 0).any()):
            self._last_ratio_deviation = float((ratio.detach()[weight > 0] - 1).abs().max())
            expert = self.video_model.expert(inputs[0].noise_level) if len(self.denoiser_names) > 1 else None
            self.metrics.policy(args, [item.step for item in inputs], velocity, ratio, kl, weight, advantages, expert)
        return (total, {"ratio": ratio, "kl": kl}) if return_outputs else total

    def _decision_loss(self, inputs, velocity, v_ref, x, sigma, advantages, child) -> tuple[Tensor, Tensor, Tensor]:
        """Policy gradient: (loss, ratio, divergence from the reference) of each child, from one mean per decision."""
        args, device = self.args, x.device
        sigma_next = torch.tensor([item.decision.sigma_next for item in inputs])
        free = self._free([item.group for item in inputs])
        step = self.transition(x, velocity, sigma, sigma_next).held(x, free)[child.to(device)]  # (M, ...)
        next_latents = torch.cat([item.decision.next_latents for item in inputs])
        old_log_prob = torch.cat([item.decision.old_log_prob for item in inputs])
        old_mean = torch.stack([item.decision.old_mean for item in inputs])[child.to(device)]
        log_prob = step.log_prob(next_latents)
        if args.ratio_normalization:
            log_prob = guard_log_ratio(log_prob, old_log_prob, step.mean, old_mean, step.std, step.free)
            old_log_prob = torch.zeros_like(log_prob)
        if args.loss_type == "dppo":
            divergence = Transition(old_mean, step.std, free=step.free).kl(step)
            loss = dppo_loss(log_prob, old_log_prob, divergence, advantages, args.epsilon)
        else:
            loss = clipped_loss(log_prob, old_log_prob, advantages, args.epsilon, args.epsilon_high)
        kl = torch.zeros_like(log_prob)
        if v_ref is not None:
            kl = step.kl(self.transition(x, v_ref, sigma, sigma_next).held(x, free)[child.to(device)])
        return loss, torch.exp(log_prob.detach() - old_log_prob), kl

    def _video_loss(self, inputs, velocity, v_ref, x, x0, noise, sigma, advantages) -> tuple[Tensor, Tensor, Tensor]:
        """DiffusionNFT or AWM: (loss, ratio, divergence from the reference) of each video at its noise level."""
        args, v_old, free = self.args, torch.stack([i.v_old for i in inputs]), self._free([i.group for i in inputs])
        distance = flow.sample_mean((velocity - v_old).square(), free)
        if args.loss_type == "nft":
            loss = nft_loss(velocity, v_old, x, x0, sigma, advantages, args.nft_beta, args.advantage_clip, free)
            ratio = torch.ones_like(loss)
        else:
            log_prob = awm_log_prob(velocity, noise, x0, sigma, args.awm_weighting, free)
            # with one update per generation the policy that sampled is the present one
            known = inputs[0].old_log_prob is not None
            old = torch.stack([item.old_log_prob for item in inputs]) if known else log_prob.detach()
            loss = clipped_loss(log_prob, old, advantages.double(), args.epsilon, args.epsilon_high).float()
            ratio = torch.exp(log_prob.detach() - old)
        loss = loss + args.old_policy_beta * distance
        kl = torch.zeros_like(loss) if v_ref is None else flow.sample_mean((velocity - v_ref).square(), free)
        return loss, ratio, kl

    def training_step(self, model: nn.Module, inputs: list, num_items_in_batch=None) -> Tensor:
        """One slice of a generation; its first slice samples the generation."""
        args, micro_step = self.args, inputs[0][0][2]
        model.train()
        with self.metrics.timed("step_time"):
            # a new call of `train` starts over with the same numbers
            fresh = micro_step == 0 or self._generation is None or self._generation[0] != inputs[0][0][:2]
            if fresh:
                self._last_ratio_deviation = 0.0
                self._generation = inputs[0][0][:2], self.generate(inputs)
            with self.metrics.timed("update_time"):
                total = self._update(model, self._generation[1][micro_step % args.steps_per_generation], fresh)
        if (micro_step + 1) % (args.steps_per_generation * args.num_iterations) == 0:
            self.metrics.add_time("update_time")
        if (micro_step + 1) % args.gradient_accumulation_steps == 0:
            self.metrics.add_time("step_time")
        return total

    def _update(self, model: nn.Module, batches: list[list[Item]], fresh: bool) -> Tensor:
        """Forward and backward of a slice's micro-batches; before the first ones of a generation nothing has been learned."""
        total = torch.zeros((), device=self.args.device)
        for i, batch in enumerate(batches):
            # gradients are exchanged once, with the last one; those of shards with each, or they would be whole until then
            last = i == len(batches) - 1
            with contextlib.nullcontext() if last or self.is_fsdp_enabled else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(model, batch)
                if fresh and i == 0 and self.args.loss_type in ("clipped", "dppo"):
                    denoiser = self.video_model.denoisers[self.denoiser_name]
                    check_on_policy(self._last_ratio_deviation, self.args, denoiser)
                loss = self.finite_or_skip(loss, [f"group {item.group}" for item in batch], 1 / len(batches))
                self.backward(loss, last)
            total += loss.detach()
        return total

    def save_rank_state(self, directory: Path) -> None:
        super().save_rank_state(directory)
        if self.is_world_process_zero():
            save_choices(directory, batch_guidance=self.batch_guidance, reuse_rollout=self.reuse_rollout)

    def load_rank_state(self, directory: Path) -> None:
        super().load_rank_state(directory)
        chosen = load_choices(directory)  # other free memory must not change a resumed run
        if self.args.batch_guidance is None:
            self.batch_guidance = chosen.get("batch_guidance")
        if self.args.reuse_rollout is None and "reuse_rollout" in chosen:
            self.reuse_rollout, self._graphs_tried = self.reuse_rollout and chosen["reuse_rollout"], True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self.metrics.collect()
        super().log(logs, start_time)

    # ---- Evaluation ----

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        Generate videos of the evaluation prompts with the stock pipeline and score them.

        Args:
            eval_dataset (`Dataset` or a dict of them, *optional*): Instead of the trainer's.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`): Before every metric.

        Returns:
            `dict[str, float]`: `eval_reward`, `eval_rewards/{name}/mean` and `/std`, `eval_runtime`.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            metrics = {}
            for name, one in dataset.items():
                metrics |= self.evaluate(one, metric_key_prefix=f"{metric_key_prefix}_{name}")
            return metrics
        if dataset is None:
            raise ValueError("evaluation needs an eval_dataset: prompts to generate")
        began = time.perf_counter()
        metrics = evaluate_prompts(self, self.prepare_dataset(dataset))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - began
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
