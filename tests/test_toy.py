import json
import random

import pytest
import torch

from vidtrl import toy
from vidtrl.data.video import read_video
from vidtrl.toy import world


CAPTIONS = toy.captions()


def clip(caption, quality="clean", seed=0):
    return toy.render(caption, quality, seed) / 255


def test_the_same_seed_draws_the_same_clip_and_another_seed_another():
    assert torch.equal(toy.render(CAPTIONS[5], seed=3), toy.render(CAPTIONS[5], seed=3))
    assert not torch.equal(toy.render(CAPTIONS[5], seed=3), toy.render(CAPTIONS[5], seed=4))
    assert toy.render(CAPTIONS[5]).shape == (17, 3, 64, 64) and toy.render(CAPTIONS[5]).dtype == torch.uint8


def test_there_are_72_captions_and_each_parses_back():
    assert len(set(CAPTIONS)) == 72
    assert toy.parse_caption("a red circle moving up") == {"color": "red", "shape": "circle", "direction": "up"}
    assert toy.parse_caption("a shape") == {"color": None, "shape": None, "direction": None}
    for caption in CAPTIONS:
        found = toy.parse_caption(caption)
        assert caption == f"a {found['color']} {found['shape']} moving {found['direction']}"


@pytest.mark.parametrize("quality", ["clean", "raw"])
def test_measurements_are_right_on_ground_truth_and_near_chance_on_other_captions(quality):
    clips = [clip(c, quality, seed=i) for i, c in enumerate(CAPTIONS * 2)]
    right = toy.score(clips, CAPTIONS * 2)
    for name in ("present", "color", "shape", "direction", "all"):
        assert right[name] >= 0.98, (name, right)
    wrong = CAPTIONS * 2
    random.Random(0).shuffle(wrong)
    chance = toy.score(clips, wrong)
    assert chance["color"] < 0.30 and chance["shape"] < 0.47 and chance["direction"] < 0.38 and chance["all"] < 0.08


def test_raw_clips_flicker_and_wobble_and_clean_ones_do_not():
    clean = toy.score([clip(c, "clean", i) for i, c in enumerate(CAPTIONS)], CAPTIONS)
    raw = toy.score([clip(c, "raw", i) for i, c in enumerate(CAPTIONS)], CAPTIONS)
    assert clean["flicker"] < 0.02 < 0.1 < raw["flicker"]
    assert clean["smoothness"] > 0.95 > 0.9 > raw["smoothness"]


def test_raw_captions_are_unreliable_at_the_stated_rates():
    kinds = {"wrong": 0, "vague": 0, "right": 0}
    for seed in range(2000):
        true, told = toy.parse_caption(CAPTIONS[seed % 72]), world.raw_caption(CAPTIONS[seed % 72], seed)
        parsed = toy.parse_caption(told)
        if None in parsed.values():
            kinds["vague"] += 1
        elif parsed["shape"] != true["shape"]:
            kinds["wrong"] += 1
        else:
            kinds["right"] += 1
            assert parsed == true
    assert abs(kinds["vague"] / 2000 - world.RAW_VAGUE) < 0.03
    assert abs(kinds["wrong"] / 2000 - world.RAW_WRONG_SHAPE * (1 - world.RAW_VAGUE)) < 0.04


def test_dataset_of_real_files_survives_h264(tmp_path):
    toy.write_dataset(tmp_path / "clips", num_clips=72, seed=1)
    rows = [json.loads(line) for line in (tmp_path / "clips" / "metadata.jsonl").read_text().splitlines()]
    assert [r["prompt"] for r in rows] == CAPTIONS
    clips = [read_video(tmp_path / "clips" / r["file_name"]) / 255 for r in rows]
    assert clips[0].shape == (17, 3, 64, 64)
    assert toy.score(clips, CAPTIONS)["all"] >= 0.98


REWARDS = [toy.color_reward, toy.shape_reward, toy.direction_reward, toy.attributes_reward, toy.accuracy_reward]


@pytest.mark.parametrize("reward", REWARDS, ids=lambda f: f.__name__)
def test_prompt_rewards_prefer_the_truth(reward):
    clips = [clip(c, "raw", i) for i, c in enumerate(CAPTIONS)]
    wrong = CAPTIONS[41:] + CAPTIONS[:41]  # another colour, shape and direction each
    right, other = reward(prompts=CAPTIONS, videos=clips), reward(prompts=wrong, videos=clips)
    assert len(right) == 72 and all(0 <= r <= 1 for r in right + other)
    assert sum(right) / 72 >= 0.85 and sum(right) - sum(other) > 0.25 * 72


def test_accuracy_falls_before_an_attribute_turns_and_no_other_attribute_makes_up_for_it():
    green, blue = (clip(f"a {color} circle moving up", seed=4) for color in ("green", "blue"))
    drifting = [green + share * (blue - green) for share in (0.0, 0.25, 0.35, 0.6, 1.0)]
    prompts = ["a green circle moving up"] * 5
    rewards, seen = toy.accuracy_reward(prompts=prompts, videos=drifting), [toy.measure(v).color for v in drifting]
    assert seen[:3] == ["green"] * 3 and rewards[0] == 1 > rewards[1] > rewards[2] > rewards[3] and rewards[4] == 0
    assert toy.color_reward(prompts=prompts, videos=drifting)[:3] == [1.0] * 3  # the control: it sees nothing coming
    # all wrong but one: the share of right attributes says 1/3, the product 0
    for wrong in ("a green square moving down", "a blue circle moving down", "a blue square moving up"):
        assert toy.accuracy_reward(prompts=[wrong], videos=[green]) == [0.0]
        assert toy.attributes_reward(prompts=[wrong], videos=[green]) == [pytest.approx(1 / 3)]
    # only what the prompt names counts, and an empty clip shows nothing
    assert toy.accuracy_reward(prompts=["a circle moving up"], videos=[blue]) == [1.0]
    assert toy.accuracy_reward(prompts=["a circle", ""], videos=[torch.full_like(green, 16 / 255)] * 2) == [0.0, 0.0]


def test_rewards_for_motion_quality_prefer_clean_clips_and_none_means_not_applicable():
    clean, raw = ([clip(c, q, i) for i, c in enumerate(CAPTIONS[:12])] for q in ("clean", "raw"))
    for reward in (toy.steadiness_reward, toy.smoothness_reward):
        worst_clean = min(reward(prompts=[""] * 12, videos=clean))
        assert worst_clean > 0.9 and worst_clean > max(reward(prompts=[""] * 12, videos=raw))
    assert toy.presence_reward(prompts=["", ""], videos=[clean[0], torch.full_like(clean[0], 16 / 255)]) == [1.0, 0.0]
    assert toy.color_reward(prompts=["a circle moving up"], videos=clean[:1]) == [None]


def test_an_empty_clip_scores_nothing():
    empty = torch.full((17, 3, 64, 64), 16 / 255)
    assert not toy.measure(empty).present
    assert toy.score([empty], CAPTIONS[:1])["all"] == 0


def test_user_mistakes_name_the_fix():
    with pytest.raises(ValueError, match="names no color"):
        toy.render("a circle moving up")
    with pytest.raises(ValueError, match="quality must be one of"):
        toy.render(CAPTIONS[0], quality="cleen")
    with pytest.raises(ValueError, match="divide uint8 frames by 255"):
        toy.measure(toy.render(CAPTIONS[0]))
    with pytest.raises(ValueError, match=r"\(F, 3, H, W\)"):
        toy.measure(torch.zeros(3, 17, 64, 64))
