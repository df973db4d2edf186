"""Captioned clips as training data: from files on disk to latents and conditions, for every trainer that learns from videos."""

import hashlib
import json
import os
from collections import Counter

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from huggingface_hub import constants
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..data import BucketSampler, CachedDataset, VideoDataset, build_cache, plan_dataset, standardize_columns
from ..data.video import as_image, condition_image
from ..models import Condition, VideoModel
from .base_trainer import VideoTrainer
from .checkpoint import weights_fingerprint
from .clip_config import ClipConfig
from .draws import DrawDataset, DrawSampler, draw_seed
from .loading import condition_kwargs
from .prompt_batches import missing_images


class ClipTrainer(VideoTrainer):
    """
    Base of the trainers that learn from clips. Not used by itself; arguments as in [`VideoTrainer`], with a [`ClipConfig`].
    """

    args: ClipConfig
    caption_dropout = 0.0  # share of samples with the empty prompt
    cached_negative_prompt: str | None = None  # every row's condition is cached with this prompt, too
    prompts_only = False  # rows are prompts (and images) without videos

    def __init__(self, *args, **kwargs):
        self._clips: dict[str, tuple] = {}  # split -> dataset and plan
        super().__init__(*args, **kwargs)

    # ---- Dataset: clips on disk -> latents and conditions ----

    def prepare_datasets(self, train_dataset, eval_dataset):
        train = DrawDataset(self.prepare_dataset(train_dataset, "train"), self.caption_dropout)
        if isinstance(eval_dataset, dict):
            evaluation = {
                name: DrawDataset(self.prepare_dataset(d, f"eval_{name}")) for name, d in eval_dataset.items()
            }
        else:
            evaluation = None if eval_dataset is None else DrawDataset(self.prepare_dataset(eval_dataset, "eval"))
        if self.args.cache or self.prompts_only:
            self.video_model.offload_encoders(self.kept_encoders)
        return train, evaluation

    def frame_rule(self) -> tuple[int, int]:
        """(multiple, offset): clips have offset + k * multiple frames."""
        return self.video_model.frame_multiple, self.video_model.frame_offset

    def prepare_dataset(self, dataset, split: str) -> CachedDataset | VideoDataset:
        """Plan the shape of every clip, report it, and encode the clips once (`cache=True`) or decode them on access."""
        if isinstance(dataset, (CachedDataset, VideoDataset)):
            return dataset
        args, model = self.args, self.video_model
        offloaded = model.offloaded  # for a dataset that comes later, such as one passed to `evaluate`
        if offloaded:
            model.restore_encoders()
        if self.prompts_only and isinstance(dataset, IterableDataset):
            dataset = Dataset.from_list(list(dataset))
        dataset = standardize_columns(dataset, prompts_only=self.prompts_only)
        if self.prompts_only and "video" in dataset.column_names:
            dataset = dataset.remove_columns("video")
        given = "image" in (dataset.column_names or next(iter(dataset)))
        if model.family.image and self.prompts_only and not given:
            raise ValueError(missing_images(model, dataset))
        frame_multiple, frame_offset = self.frame_rule()
        plan = plan_dataset(
            dataset,
            max_bad_fraction=args.max_bad_fraction,
            quiet=args.process_index != 0,
            frame_multiple=frame_multiple,
            frame_offset=frame_offset,
            pixel_multiple=model.pixel_multiple,
            spatial_factor=model.spatial_factor,
            temporal_factor=model.temporal_factor,
            **args.shape_rules(),
        )
        if args.cache or self.prompts_only:
            prepared = self.build_cache(
                dataset, plan, text_only=self.prompts_only, negative_prompt=self.cached_negative_prompt
            )
        else:
            prepared = VideoDataset(dataset, plan, images=model.family.image)
        if args.process_index == 0 and not self.prompts_only:
            tqdm.write(f"{split} {plan}")
            if model.family.image and not given:
                tqdm.write(f"{split}: there is no column image, so the image of each clip is its first frame")
            os.makedirs(args.output_dir, exist_ok=True)
            plan.to_json(os.path.join(args.output_dir, f"plan_{split}.json"))
        if offloaded:
            model.offload_encoders(self.kept_encoders)
        self._clips[split] = dataset, plan
        return prepared

    def build_cache(
        self,
        dataset,
        plan,
        *,
        text_only: bool = False,
        model: VideoModel | None = None,
        negative_prompt: str | None = None,
    ) -> CachedDataset:
        """
        Encode what is not cached yet.

        Args:
            dataset (`Dataset` or `IterableDataset`): Rows with standard columns.
            plan ([`Plan`]): Their shapes.
            text_only (`bool`, *optional*, defaults to `False`): Conditions without latents.
            model ([`VideoModel`], *optional*): Whose encoders; default: those of the model in training.
            negative_prompt (`str`, *optional*): Also cache every row's condition with it, as the other branch of guidance.
        """
        args, model = self.args, model or self.video_model
        columns = ["prompt"]
        columns += ["image"] if model.family.image else []
        columns += ["fps"] if model.family.fps_argument else []

        def condition(row: dict, *size: int) -> tuple[dict, dict]:
            return self.condition(row, *size, model=model, negative=row.get("negative", False)).state()

        return build_cache(
            dataset,
            plan,
            encode=model.encode,
            condition=condition,
            text_only=text_only,
            condition_columns=tuple(columns),
            empty_prompt=self.caption_dropout > 0,
            negative_prompt=negative_prompt,
            cache_dir=args.cache_dir or os.path.join(constants.HF_HOME, "vidtrl"),
            fingerprint=self.cache_fingerprint(model),
            process_index=args.process_index,
            num_processes=args.world_size,
            wait=PartialState().wait_for_everyone,
        )

    def data_summary(self) -> dict:
        """What decides which clip each step sees: checkpoints record it, and resuming compares it."""
        dataset = self.train_dataset.dataset
        digest = hashlib.sha256(json.dumps([dataset.sample_ids, dataset.buckets]).encode())
        return {"num_clips": len(dataset), "sha256 of names and shapes": digest.hexdigest()[:16]}

    def condition(
        self,
        row: dict,
        height: int,
        width: int,
        num_frames: int,
        *,
        model: VideoModel | None = None,
        negative: bool = False,
    ) -> Condition:
        """The condition of one dataset row, as the stock pipeline (of another model, or for negative prompts) prepares it."""
        model = model or self.video_model
        return model.condition(
            row["prompt"],
            height,
            width,
            num_frames,
            image=row.get("image") if model.family.image else None,
            fps=row.get("fps"),
            negative=negative,
            **condition_kwargs(self.args),
        )

    def cache_fingerprint(self, model: VideoModel | None = None) -> dict:
        """All that changes what a model's encoders and pipeline return for a given clip and prompt."""
        args, model = self.args, model or self.video_model
        pipe = model.pipe
        encoders = {
            name: weights_fingerprint(module)
            for name, module in pipe.components.items()
            if isinstance(module, nn.Module) and name not in model.denoisers
        }
        config = dict(
            next(iter(model.denoisers.values())).config
        )  # pipelines compute rotary embeddings and masks from it
        config = {name: value for name, value in config.items() if name[0] != "_" and name != "use_cache"}
        return {
            "model": str(pipe.name_or_path or type(pipe).__name__),
            "denoiser": json.loads(json.dumps(config, default=str)),
            "revision": str((args.model_init_kwargs or {}).get("revision")),
            "pipeline": type(pipe).__name__,
            "encoders": encoders,
            "dtypes": {name: str(m.dtype) for name, m in pipe.components.items() if isinstance(m, nn.Module)},
            "max_sequence_length": args.max_sequence_length,
            "pipeline_kwargs": json.loads(json.dumps(args.pipeline_kwargs or {}, default=str)),
        }

    # ---- Batch ----

    def train_sampler(self, dataset: DrawDataset) -> DrawSampler:
        args = self.args
        order = BucketSampler(
            dataset.buckets,
            # one bucket per optimizer step, so that a step is the same however it is split into micro-batches
            batch_size=args.per_device_train_batch_size * args.gradient_accumulation_steps,
            num_processes=args.world_size,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )
        return DrawSampler(order, args.seed)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if not isinstance(dataset, DrawDataset):
            dataset = DrawDataset(self.prepare_dataset(dataset, "eval"))
        args, batches = self.args, []
        for bucket in sorted(set(dataset.buckets)):
            members = [i for i, b in enumerate(dataset.buckets) if b == bucket]
            keys = [(i, draw_seed(args.seed, i)) for i in members]
            size = args.per_device_eval_batch_size
            batches += [keys[start : start + size] for start in range(0, len(keys), size)]
        # every process runs equally many batches (sharded weights need that); surplus ones do not count
        surplus = [[(i, -1) for i, _ in batches[0]]] * (-len(batches) % args.world_size)
        mine = (batches + surplus)[args.process_index :: args.world_size]
        return DataLoader(
            dataset,
            batch_sampler=mine,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            generator=torch.Generator(),  # else each evaluation would advance the generator of training
        )

    def clean_latents(self, inputs: dict) -> tuple[Tensor, Tensor, Condition]:
        """Posterior mean and standard deviation, both (B, C, f, h, w) float32, and the condition of a batch."""
        if "mean" in inputs:
            return inputs["mean"], inputs["std"], inputs["condition"]
        mean, std = self.video_model.encode(inputs["videos"])
        num_frames, _, height, width = inputs["videos"][0].shape
        conditions = []
        for row, video in zip(inputs["rows"], inputs["videos"], strict=True):
            if self.video_model.family.image:
                given = row.get("image")
                image = as_image(video[0]) if given is None else condition_image(given, height, width)
                row = {**row, "image": image}
            conditions.append(self.condition(row, height, width, num_frames))
        return mean, std, Condition.cat(conditions)

    # ---- Validation videos ----

    def validation_prompts(self) -> list[str]:
        if self.args.validation_prompts:
            return self.args.validation_prompts
        dataset = self.eval_dataset if isinstance(self.eval_dataset, DrawDataset) else self.train_dataset
        prompts: list[str] = []
        for index in range(len(dataset)):
            prompt = dataset.dataset[index]["prompt"]
            if prompt not in prompts or self.video_model.family.image:  # the i-th image belongs to the i-th prompt
                prompts.append(prompt)
            if len(prompts) == self.args.num_validation_videos:
                break
        return prompts

    def validation_shape(self) -> tuple[int, int, int]:
        args = self.args
        if None not in (args.height, args.width, args.num_frames):
            return args.height, args.width, args.num_frames
        dataset = self.train_dataset.dataset
        shapes = dataset.plan.buckets if isinstance(dataset, VideoDataset) else dataset.shapes
        num_frames, height, width = shapes[Counter(dataset.buckets).most_common(1)[0][0]]
        return height, width, num_frames

    def validation_fps(self) -> float:
        plans = [plan for _, plan in self._clips.values()]
        return self.args.fps or (plans and plans[0].samples[0].fps) or 16

    def validation_image(self, index: int) -> Image.Image | None:
        if not self.video_model.family.image:
            return None
        dataset, plan = self._clips["eval" if "eval" in self._clips else "train"]
        if not self.prompts_only:
            return VideoDataset(dataset, plan, images=True)[index % len(plan.samples)]["image"]
        sample = plan.samples[index % len(plan.samples)]
        bucket = plan.buckets[sample.bucket]
        return condition_image(dataset[sample.index]["image"], bucket.height, bucket.width)


def collate(items: list[dict]) -> dict:
    """Join samples of one bucket: cached latents and conditions, prompts' conditions alone, or decoded clips and their rows."""
    batch = {"draws": [item["draw"] for item in items], "sample_ids": [item["sample_id"] for item in items]}
    batch["index"] = [item.get("index") for item in items]
    for name in items[0]:
        if name.endswith("condition"):
            batch[name] = Condition.cat([Condition.from_state(*item[name]) for item in items])
    if "mean" in items[0]:
        batch["mean"] = torch.stack([item["mean"].float() for item in items])
        batch["std"] = torch.stack([item["std"].float() for item in items])
    elif "video" in items[0]:
        batch["videos"] = [item["video"] for item in items]
        batch["rows"] = [{name: item.get(name) for name in ("prompt", "fps", "image")} for item in items]
    return batch
