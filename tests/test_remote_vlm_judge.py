"""The example judge on a tiny vision-language model with random weights: parsing, batching, and behind a server."""

import asyncio
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vidtrl.cli.reward_server import load_reward
from vidtrl.rewards import RemoteReward, RewardServer
from vidtrl.rewards.wire import dequantize, quantize


EXAMPLE = Path(__file__).parent.parent / "examples" / "grpo_multi_reward_vlm" / "remote_vlm_judge.py"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}"
    "{{ c['text'] }}{% endif %}{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
PROMPTS = ["a cat", "a much longer prompt about a dog and a ball", "x"]
VIDEOS = [torch.rand(5, 3, 20, 30, generator=torch.Generator().manual_seed(i)) for i in range(3)]


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLE.parent))
    import remote_vlm_judge

    sys.path.remove(str(EXAMPLE.parent))
    return remote_vlm_judge


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm")
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.5,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>")
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("4", 4), ("Score: 4.5", 4.5), ("4/5", 4), ("I give it a 3 out of 5", 3), ("The score is 2.", 2),
        ("From 1 to 5, I say 4.", 4), ("Final Score: 3.25/5", 3.25), ("2 because of 1 flaw: 3 / 5", 3),
        ("10", None), ("5.5", None), ("45", None), ("3,5", None), ("0", None), ("", None), ("very good", None),
    ],
)  # fmt: skip
def test_scores_are_read(example, answer, score):
    assert example.parse_score(answer) == score


@given(st.text(max_size=60))
def test_any_answer_is_a_score_in_range_or_none(text):
    sys.path.insert(0, str(EXAMPLE.parent))
    from remote_vlm_judge import parse_score

    sys.path.remove(str(EXAMPLE.parent))
    assert parse_score(text) is None or 1 <= parse_score(text) <= 5


def test_frames_are_spread_from_first_to_last(example):
    video = torch.arange(9).view(9, 1, 1, 1).expand(9, 3, 2, 2) / 255
    assert [frame.getpixel((0, 0))[0] for frame in example.pick_frames(video, 3)] == [0, 4, 8]
    assert len(example.pick_frames(video, 20)) == 9


def test_expected_score_is_the_mean_of_the_digits(example):
    logits = torch.full((2, 20), 9.0)
    logits[:, 10:15] = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 20.0, 0]])
    assert example.expected_score(logits, [10, 11, 12, 13, 14]).tolist() == pytest.approx([3.0, 4.0], abs=1e-6)


def test_batches_change_nothing_and_videos_and_prompts_count(example, model_path):
    judge = example.get_judge(model_path, num_frames=2, batch_size=2, device="cpu")
    metrics = {}
    scores = judge(prompts=PROMPTS, videos=VIDEOS, log_metric=metrics.__setitem__)
    assert metrics == {"judge/unreadable": 0.0} and all(0 < score < 1 for score in scores)
    for i, score in enumerate(scores):
        assert judge(prompts=[PROMPTS[i]], videos=[VIDEOS[i]])[0] == pytest.approx(score, abs=1e-4)
    assert abs(judge(prompts=["another"], videos=VIDEOS[:1])[0] - scores[0]) > 1e-3
    assert abs(judge(prompts=PROMPTS[:1], videos=VIDEOS[1:2])[0] - scores[0]) > 1e-3


def test_generated_answers_are_logged_and_those_without_a_score_are_none(example, model_path):
    judge = example.get_judge(model_path, num_frames=2, batch_size=2, device="cpu", expected=False, max_new_tokens=5)
    columns = {}
    scores = judge(prompts=PROMPTS, videos=VIDEOS, log_extra=columns.__setitem__)
    assert len(columns["answer"]) == 3  # of random weights: any bytes
    assert scores == [
        None if score is None else (score - 1) / 4 for score in map(example.parse_score, columns["answer"])
    ]


def test_the_judge_behind_a_server(model_path):
    name, judge = load_reward(f"{EXAMPLE}:get_judge", {"model_id": model_path, "num_frames": 2, "device": "cpu"})
    local = judge(prompts=PROMPTS, videos=[dequantize(quantize(video)) for video in VIDEOS])
    with RewardServer({name: judge}, device="cpu") as server:
        remote = RemoteReward(server.url)
        assert asyncio.run(remote(prompts=PROMPTS, videos=VIDEOS)) == local
