"""The toy world's paraphrases, its small language model, and that training it teaches words that no pair has."""

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerCallback

from vidtrl import toy
from vidtrl.prompts.text import required_words
from vidtrl.toy.enhancement import (
    EnhancementSettings,
    fine_tune,
    load_enhancer,
    make_video_reward,
    reinforce,
    right_clips,
)
from vidtrl.toy.paraphrases import (
    CLUTTER,
    SENTENCES,
    SYNONYMS,
    TIERS,
    VERBS,
    caption_of,
    enhancer_path,
    intent_reward,
    paraphrases,
    read_paraphrase,
    synonyms,
)


ROOT = Path(__file__).parents[1]
ATTRIBUTE_WORDS = {w for values in SYNONYMS.values() for v, words in values.items() for w in (v, *words)}


def words_of(tier):
    return {w for values in SYNONYMS.values() for value in values for w in synonyms(value, tier)}


# ---- The grammar ----


def test_every_word_has_one_meaning_and_one_tier():
    every = [w for values in SYNONYMS.values() for v, words in values.items() for w in (v, *words)]
    assert len(every) == len(set(every)) == 13 * 7
    assert all(len(words_of(tier)) == 26 for tier in TIERS)
    other = {w for text in (*CLUTTER, *VERBS, *sum(SENTENCES.values(), ())) for w in text.split()}
    assert not other & ATTRIBUTE_WORDS  # clutter never names an attribute
    assert not required_words(" ".join(CLUTTER))


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(TIERS), st.integers(0, 10**6))
def test_paraphrases_mean_their_caption_in_words_of_their_tier(tier, seed):
    rows = paraphrases(20, tier, seed)
    assert rows == paraphrases(20, tier, seed) and len({r["prompt"] for r in rows}) == 20
    allowed = {
        "pairs": words_of("pairs") | set(toy.captions()[0].split()),
        "prompts": words_of("pairs") | words_of("prompts"),
    }
    for row in rows:
        assert caption_of(row["prompt"]) == row["caption"] in toy.captions()
        named = ATTRIBUTE_WORDS & set(row["prompt"].split())
        if tier == "held_out":
            assert named <= words_of("held_out")
        elif tier == "prompts":
            assert named <= allowed["prompts"]
        else:
            assert named <= words_of("pairs") | set(SYNONYMS["color"]) | set(SYNONYMS["shape"]) | set(
                SYNONYMS["direction"]
            )


def test_held_out_words_and_sentences_are_in_no_training_material():
    learned = [r["prompt"] for tier in ("pairs", "prompts") for r in paraphrases(2000, tier)]
    seen = {w for text in learned for w in text.split()}
    assert not seen & words_of("held_out")
    assert words_of("pairs") | words_of("prompts") <= seen
    frames = {frozenset(s.split()) for s in SENTENCES["held_out"]}
    assert not frames & {frozenset(s.split()) for tier in ("pairs", "prompts") for s in SENTENCES[tier]}


def test_reading_and_rewarding():
    clip = toy.render("a red circle moving right", seed=1) / 255
    assert read_paraphrase("a nice day") == dict.fromkeys(("color", "shape", "direction"))
    prompts = ["Vermilion coin drifting eastbound.", "a jade coin, eastbound", "a brick", "a nice day"]
    assert intent_reward(prompts, [clip] * 4) == [1.0, 2 / 3, 0.0, None]
    assert toy.attributes_reward(prompts[:1], [clip]) == [0.0]  # the captions' own words are all it knows
    with pytest.raises(ValueError, match="names no color, direction"):
        caption_of("a brick")
    with pytest.raises(ValueError, match="tier must be one of"):
        paraphrases(1, "test")


# ---- The shipped language model ----


def test_shipped_model_is_small_and_knows_every_word():
    folder = Path(enhancer_path())
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 6e6
    enhancer = load_enhancer()
    assert sum(p.numel() for p in enhancer.model.parameters()) <= 3e6
    unknown = enhancer.tokenizer.unk_token_id
    for tier in TIERS:
        for row in paraphrases(100, tier):
            assert unknown not in enhancer.tokenizer(f"{row['prompt']} {row['caption']}")["input_ids"]
    assert enhancer.tokenizer("zeppelin")["input_ids"] == [unknown]


def test_untrained_it_does_not_answer_with_captions():
    rows = paraphrases(50, "held_out", seed=3)
    texts = load_enhancer().generate([r["prompt"] for r in rows])
    assert sum(t.strip() == r["caption"] for t, r in zip(texts, rows, strict=True)) <= 2


# ---- Training ----


def right(enhancer, tier):
    rows = paraphrases(100, tier, seed=77)
    texts = enhancer.generate([r["prompt"] for r in rows])
    return sum(t.strip() == r["caption"] for t, r in zip(texts, rows, strict=True)) / len(rows)


def test_pairs_teach_words_that_they_do_not_contain(tmp_path):
    enhancer = load_enhancer()
    more = dataclasses.replace(EnhancementSettings(), num_pairs=16)
    fine_tune(enhancer, tmp_path, seed=0, settings=more, disable_tqdm=True)
    assert right(enhancer, "pairs") > 0.6
    assert right(enhancer, "held_out") > 0.3  # guessing gives 1/72


class StepCounter(TrainerCallback):
    count = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1


def test_rewards_from_videos_train_the_language_model_alone(tmp_path, capsys):
    enhancer = load_enhancer()
    pipe = WanPipeline.from_pretrained(toy.pipeline_path(), dtype=torch.float32)
    frozen = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    short = EnhancementSettings(num_prompts=8)
    short.sft.update(max_steps=15)
    short.video.update(num_inference_steps=2, seeds=(0,))
    short.grpo.update(max_steps=2, per_device_train_batch_size=16, logging_steps=1)
    fine_tune(enhancer, tmp_path / "sft", settings=short, disable_tqdm=True)
    before = {k: v.clone() for k, v in enhancer.model.state_dict().items()}
    steps = StepCounter()
    trainer = reinforce(enhancer, pipe, tmp_path / "grpo", settings=short, callbacks=[steps], disable_tqdm=True)
    assert steps.count == 2 and "'reward'" not in capsys.readouterr().out
    after = enhancer.model.state_dict()
    changed = {k for k in after if not torch.equal(after[k], before[k])}
    assert changed and all("lora" in k for k in changed)
    assert all(torch.equal(frozen[k], v) for k, v in pipe.transformer.state_dict().items())
    logs = {name for entry in trainer.state.log_history for name in entry}
    assert {"video/intent_reward", "rewards/video_reward/mean", "rewards/structure_reward/std"} <= logs
    enhancer.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()
    prompts = [row["prompt"] for row in paraphrases(20, "held_out")]
    assert load_enhancer(tmp_path / "saved").generate(prompts) == enhancer.generate(prompts)


def test_right_clips_measures_what_users_asked_for():
    pipe = WanPipeline.from_pretrained(toy.pipeline_path(), dtype=torch.float32)
    reward = make_video_reward(pipe, load_enhancer(), num_inference_steps=2)
    videos = {}
    clip = toy.render("a red circle moving right", seed=1)
    for i, text in enumerate(["x", "y"]):  # what it would have rendered
        videos[text, 5 + i] = clip
    reward._cache.update(videos)
    assert right_clips(
        reward, ["crimson disc drifting east", "crimson box drifting east"], ["x", "y"], first_seed=5
    ) == [
        True,
        False,
    ]
    assert reward.renders == 0


def test_settings_are_plain_data():
    assert dataclasses.asdict(EnhancementSettings())["video"]["guidance_scale"] == 1.0
