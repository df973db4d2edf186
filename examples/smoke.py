"""What `bash run.sh --smoke` of a recipe runs: its own script and settings, on toy models and toy data, for two updates.

    python ../smoke.py config.yaml DIR/config.yaml

writes the recipe's settings with small values in place of the real ones, and everything that they name beside it. A recipe that
you copy needs none of this.
"""

import copy
import json
import socket
import sys
from pathlib import Path

import yaml

from vidtrl.toy import captions, pipeline_path, write_dataset
from vidtrl.toy.paraphrases import enhancer_path, paraphrases


QUICK = {
    "max_steps": 2,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "logging_steps": 1,
}
SHAPE = {"height": 64, "width": 64, "num_frames": 17}
TRAINER = (
    QUICK
    | SHAPE
    | {"max_sequence_length": 16, "check_model": False, "gradient_accumulation_steps": 1, "warmup_steps": 0}
)
HELD_OUT = {"dataset_train_split": "train[:75%]", "dataset_test_split": "train[75%:]", "eval_steps": 2}


def clips(folder, images=False):
    """Settings of a recipe that learns from eight clips; every other one with an image of its own."""
    data = write_dataset(folder / "clips", num_clips=8, seed=0, fps=8)
    if images:
        from PIL import Image

        (data / "images").mkdir(exist_ok=True)
        rows = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
        for i, row in enumerate(rows):
            row["image"] = f"images/{i}.png" if i % 2 else None
            Image.new("RGB", (96, 64), "white").save(data / "images" / f"{i}.png")
        (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"dataset_name": str(data), "fps": 8, "cache_dir": str(folder / "cache"), "validation_steps": None}
    return TRAINER | HELD_OUT | own | {"model_name_or_path": pipeline_path(), "per_device_train_batch_size": 2}


def prompts(folder):
    """Settings of a recipe that learns from eight prompts."""
    path = folder / "prompts.txt"
    path.write_text("\n".join(captions()[::9]) + "\n")
    return TRAINER | {"model_name_or_path": pipeline_path(), "dataset_name": str(path), "fps": 8}


def grpo(folder):
    """Two prompts of four videos, on two processes; one on one."""
    sampling = {
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "num_inference_steps": 4,
        "eval_num_inference_steps": 2,
    }
    return prompts(folder) | HELD_OUT | sampling


def distill(folder):
    """One update of each role."""
    few = {"per_device_train_batch_size": 2, "fake_updates_per_student": 1, "validation_steps": None}
    return prompts(folder) | few | {"cache_dir": str(folder / "cache")}


def two_experts(folder):
    """The toy pipeline as Wan 2.2 A14B is built: a second denoiser for low noise levels."""
    from diffusers import WanPipeline

    parts = WanPipeline.from_pretrained(pipeline_path()).components
    parts["transformer_2"] = copy.deepcopy(parts["transformer"])
    WanPipeline(**parts, boundary_ratio=0.875).save_pretrained(folder / "model")
    return {"model_name_or_path": str(folder / "model")}


def image_to_video(folder):
    """The toy pipeline as Wan's image-to-video models are built: the image and its mask are 20 more input channels."""
    import torch
    from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel

    parts = WanPipeline.from_pretrained(pipeline_path()).components
    weights, old = parts["transformer"].state_dict(), parts["transformer"].config
    denoiser = WanTransformer3DModel.from_config(old, in_channels=old.in_channels + 20)
    first = weights["patch_embedding.weight"]
    weights["patch_embedding.weight"] = torch.zeros_like(denoiser.patch_embedding.weight)
    weights["patch_embedding.weight"][:, : first.shape[1]] = first
    denoiser.load_state_dict(weights)
    parts |= {"transformer": denoiser, "image_encoder": None, "image_processor": None}
    WanImageToVideoPipeline(**parts).save_pretrained(folder / "model")
    return {"model_name_or_path": str(folder / "model")}


def judge(folder):
    """A vision-language model with random weights, whose vocabulary are bytes, and a free port for its server."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )  # fmt: skip

    bytes_only = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    bytes_only.pre_tokenizer, bytes_only.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, pad_token="<pad>", eos_token="<end>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    template = "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] if c['type'] == 'text' else '<image>' }}{% endfor %}{% endfor %}"
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    sizes = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(images, tokenizer, chat_template=template, **sizes).save_pretrained(folder / "judge")
    torch.manual_seed(0)
    few = {"intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=16, image_size=16, patch_size=8, **few),
        text_config=LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, initializer_range=0.5, **few),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder / "judge")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def language(folder):
    """The language model of the toy world, eight pairs and eight prompts, as users write them."""
    pairs = [{"prompt": row["prompt"], "enhanced": row["caption"]} for row in paraphrases(8, "pairs")]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "prompts.txt").write_text("\n".join(row["prompt"] for row in paraphrases(8, "prompts")) + "\n")
    names = {
        "model_name_or_path": enhancer_path(),
        "template": None,
        "max_new_tokens": 8,
        "video_model_name_or_path": pipeline_path(),
    }
    data = {"pairs_dataset_name": str(folder / "pairs.jsonl"), "dataset_name": str(folder / "prompts.txt")}
    reward = {"reward_funcs": ["vidtrl.toy.paraphrases:intent_reward"], "reward_weights": [1.0]}
    video = {"num_inference_steps": 2, "guidance_scale": 1.0, "pipeline_kwargs": {"max_sequence_length": 16}}
    return SHAPE | names | data | reward | video | {"num_frames": 5}


def four_stages(config, folder):
    """The file of `vidtrl run` with the toy model, small videos and a few updates."""
    if not (folder / "clips").exists():  # a smoke run that is started again goes on with the same data
        write_dataset(folder / "clips", num_clips=8, quality="clean", seed=0, fps=8)
    language(folder)
    (folder / "captions.txt").write_text("\n".join(captions()[::9]) + "\n")
    pipeline = config | {"model": pipeline_path(), "output_dir": str(folder / "out")}
    pipeline["shared"] |= {
        "height": 32,
        "width": 32,
        "fps": 8,
        "max_sequence_length": 16,
        "save_steps": 1,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "check_model": False,
    }
    few = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "logging_steps": 1}
    small = {"num_frames": 5, "lora_r": 8, "lora_alpha": 8, "gradient_accumulation_steps": 1, "max_steps": 2}
    stages = pipeline["stages"]
    halves = {"dataset_train_split": "train[:75%]", "dataset_test_split": "train[75%:]", "eval_steps": 1}
    stages["sft"] |= (
        small | halves | {"dataset_name": str(folder / "clips"), "per_device_train_batch_size": 2, "warmup_steps": 0}
    )
    stages["grpo"] |= (
        small
        | halves
        | {
            "dataset_name": str(folder / "captions.txt"),
            "reward_funcs": ["toy-color", "toy-steadiness", "toy-presence"],
            "num_generations": 2,
            "per_device_train_batch_size": 4,
            "num_inference_steps": 4,
            "eval_num_inference_steps": 4,
        }
    )
    stages["prompt"] |= {
        "model_name_or_path": enhancer_path(),
        "template": None,
        "lora_r": 8,
        "lora_alpha": 8,
        "num_frames": 5,
        "pairs_dataset_name": str(folder / "pairs.jsonl"),
        "dataset_name": str(folder / "prompts.txt"),
        "reward_funcs": ["vidtrl.toy.paraphrases:intent_reward"],
        "reward_weights": [1.0],
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "pipeline_kwargs": {"max_sequence_length": 16},
    }
    stages["prompt"]["sft"] |= few | {"max_steps": 4}
    stages["prompt"]["grpo"] |= few | {
        "max_steps": 2,
        "num_generations": 4,
        "gradient_accumulation_steps": 1,
        "save_steps": 1,
    }
    stages["distill"] |= small | {
        "dataset_name": str(folder / "prompts.txt"),
        "per_device_train_batch_size": 2,
        "fake_updates_per_student": 1,
        "teacher_guidance_scale": 1.5,
        "validation_steps": None,
        "cache_dir": str(folder / "cache"),
    }
    return pipeline


def small(source, folder):
    """The settings of a recipe's file, made small."""
    config, recipe = yaml.safe_load(Path(source).read_text()), Path(source).resolve().parent.name
    sft = QUICK | {"max_steps": 4, "num_train_epochs": 1}
    lm_grpo = QUICK | {"num_generations": 4, "gradient_accumulation_steps": 1, "save_strategy": "no"}
    match recipe, Path(source).stem:
        case "sft_lora_wan", _:
            config |= clips(folder)
        case "sft_wan22_a14b", _:
            config |= clips(folder) | two_experts(folder)
        case "i2v_lora_wan", _:
            config |= clips(folder, images=True) | image_to_video(folder)
        case "grpo_flash_wan" | "diffusion_nft_wan", _:
            config |= grpo(folder)
        case "grpo_multi_reward_vlm", _:
            config |= grpo(folder) | {"reward_funcs": [judge(folder), *config["reward_funcs"][1:]]}
        case "distill_4_steps_wan", _:
            config |= distill(folder)
        case "self_forcing_wan", "causal_sft":
            return config | clips(folder) | {"frames_per_block": 1, "output_dir": str(folder / "causal_sft")}
        case "self_forcing_wan", _:
            own = {
                "frames_per_block": 1,
                "teacher_model_name_or_path": None,
                "init_adapter": str(folder / "causal_sft"),
            }
            config |= distill(folder) | own
        case "prompt_enhancer", _:
            nested = {"sft": config["sft"] | sft, "grpo": config["grpo"] | lm_grpo}
            config |= language(folder) | nested
        case "four_stages_wan", _:
            return four_stages(config, folder)
        case "joint_prompt_video", _:
            video = (
                config["video"]
                | TRAINER
                | {"num_frames": 5, "num_generations": 4, "per_device_train_batch_size": 4, "num_inference_steps": 4}
            )
            nested = {"sft": config["sft"] | sft, "grpo": config["grpo"] | lm_grpo, "video": video}
            config |= language(folder) | nested | {"rounds": 2}
    return config | {"output_dir": str(folder / "out")}


if __name__ == "__main__":
    target = Path(sys.argv[2])
    target.write_text(yaml.safe_dump(small(sys.argv[1], target.parent), sort_keys=False))
    print(f"smoke run: {target}", flush=True)
