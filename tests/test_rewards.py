import doctest
import importlib.util
import io
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from vidtrl import rewards, toy
from vidtrl.rewards import RewardRunner, builtin_rewards, get_reward
from vidtrl.rewards.checks import even_frames


NAMES = [n for n in builtin_rewards() if n != "prompt-ocr"]
OCR = importlib.util.find_spec("rapidocr") is not None and importlib.util.find_spec("onnxruntime") is not None
PROMPT = "a red square moving up"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def texture():
    """A smooth random texture (3, 192, 512) in [0, 1]."""
    return F.interpolate(torch.rand(1, 3, 20, 54, generator=seeded()), (192, 512), mode="bicubic").clamp(0, 1)[0]


def crops(texture, shifts, size=96):
    """A camera over the texture: (x, y) of each frame's upper left corner, fractions by bilinear sampling."""
    frames = []
    for x, y in shifts:
        rows, columns = torch.arange(size) + 16 + y, torch.arange(size) + 176 + x
        grid = torch.stack(torch.meshgrid(rows / 191 * 2 - 1, columns / 511 * 2 - 1, indexing="ij")[::-1], -1)
        frames.append(F.grid_sample(texture[None], grid[None], align_corners=True)[0])
    return torch.stack(frames).clamp(0, 1)


def clips():
    clean = toy.render(PROMPT, "clean", 0) / 255
    still = clean[:1].repeat(17, 1, 1, 1)
    light = (0.7 + 0.3 * torch.sin(torch.arange(17.0))).view(-1, 1, 1, 1)
    noise = torch.randn(17, 3, 64, 64, generator=seeded())
    return {
        "clean": clean,
        "raw": toy.render(PROMPT, "raw", 0) / 255,
        "still": still,
        "still in flickering light": still * light,
        "still with noise": (still + 0.1 * noise).clamp(0, 1),
        "still with weak noise": (still + 0.02 * noise).clamp(0, 1),
        "noise": torch.rand(17, 3, 64, 64, generator=seeded()),
        "grey": torch.full((17, 3, 64, 64), 0.5),
        "black": torch.zeros(17, 3, 64, 64),
        "white": torch.ones(17, 3, 64, 64),
    }


CLIPS = clips()


def score(name, *videos, prompts=None, **columns):
    values = get_reward(name)(prompts=prompts or [PROMPT] * len(videos), videos=list(videos), **columns)
    return values if len(videos) > 1 else values[0]


def test_every_public_name_imports_and_none_of_it_loads_torch_early():
    for name in rewards.__all__:
        assert callable(getattr(rewards, name))
    code = "import sys, vidtrl.rewards; from vidtrl.rewards import builtin_rewards; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize("name", NAMES)
def test_every_reward_keeps_its_range_on_every_clip_whatever_the_size(name):
    videos = [*CLIPS.values(), torch.rand(3, 3, 40, 24), toy.render(PROMPT)[:, :, 3:60, :] / 255]
    values = score(name, *videos)
    assert len(values) == len(videos) and all(type(v) is float and 0 <= v <= 1 for v in values)
    assert values == [score(name, v) for v in videos]  # each video on its own
    assert RewardRunner(name).collect(RewardRunner(name).submit([PROMPT], videos[:1])).item() == pytest.approx(
        values[0]
    )


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("toy-")])
def test_bad_clips_are_refused_with_the_fix(name):
    bad = {
        "divide uint8": toy.render(PROMPT),
        r"\(F, 3, H, W\)": torch.rand(3, 5, 64, 64),
        "clamp what the VAE returns": torch.rand(5, 3, 32, 32) * 3 - 1,
        "nan": torch.rand(5, 3, 32, 32).index_fill(0, torch.tensor([2]), torch.nan),
    }
    for message, video in bad.items():
        with pytest.raises(ValueError, match=message):
            score(name, video)
    if name in ("temporal-smoothness", "flicker") or name.startswith("motion"):
        with pytest.raises(ValueError, match="3 consecutive frames, the clip has 2"):
            score(name, torch.rand(2, 3, 32, 32))


def test_temporal_smoothness_and_flicker_are_what_they_say():
    alternating = 0.5 + 0.025 * (-1.0) ** torch.arange(16).view(-1, 1, 1, 1) * torch.ones(16, 3, 8, 8)
    fade = torch.linspace(0.2, 0.8, 16).view(-1, 1, 1, 1) * torch.ones(16, 3, 8, 8)
    assert rewards.temporal_roughness(alternating).item() == pytest.approx(4 * 0.025, rel=1e-4)
    assert rewards.flicker(alternating).item() == pytest.approx(4 * 0.05, rel=1e-4)
    assert rewards.flicker(fade).item() < 1e-4 and rewards.temporal_roughness(fade).item() < 1e-6
    assert score("flicker", alternating) == pytest.approx(np.exp(-2), rel=1e-4)
    assert score("temporal-smoothness", alternating) == pytest.approx(np.exp(-2), rel=1e-4)
    assert score("flicker", fade) > 0.999
    # each sees its own fault: noise leaves the light of whole frames steady, flicker is no noise
    assert (
        score("flicker", CLIPS["still with noise"]) > 0.8 > 0.2 > score("flicker", CLIPS["still in flickering light"])
    )
    assert score("temporal-smoothness", CLIPS["still with noise"]) < 0.1


def test_raw_toy_clips_are_worse_than_clean_ones():
    pairs = [
        (toy.render(c, "clean", i) / 255, toy.render(c, "raw", i) / 255) for i, c in enumerate(toy.captions()[::19])
    ]
    for name in ("temporal-smoothness", "flicker", "motion-smoothness"):
        assert all(a > b for a, b in zip(*(score(name, *side) for side in zip(*pairs, strict=True)), strict=True)), (
            name
        )


@pytest.mark.parametrize("shift", [(1.0, 0.0), (0.0, -2.0), (2.5, 1.5), (-5.0, 0.5), (0.4, 0.0)], ids=str)
def test_optical_flow_finds_the_shift(texture, shift):
    video = crops(
        texture, [(-shift[0] * t, -shift[1] * t) for t in range(5)], 160
    )  # the scene moves against the camera
    flow = rewards.optical_flow(video)
    moving = flow.square().sum(1) > 0
    assert moving.float().mean() > 0.1
    found = flow.permute(0, 2, 3, 1)[moving] * 160
    error = (found - torch.tensor(shift)).norm(dim=1)
    assert error.median() < 0.25 and (error < 0.5).float().mean() > 0.8
    backwards = rewards.optical_flow(video.flip(0))
    assert (backwards[:, :, 40:-40, 40:-40].mean((0, 2, 3)) + flow[:, :, 40:-40, 40:-40].mean((0, 2, 3))).norm() < 2e-3


def test_flow_sees_objects_that_move_against_each_other(texture):
    video = torch.full((5, 3, 128, 128), 0.4)
    for t in range(5):
        video[t, :, 10:50, 10 + 2 * t : 50 + 2 * t] = texture[:, 10:50, 10:50]
        video[t, :, 70:110, 70 - 2 * t : 110 - 2 * t] = texture[:, 60:100, 200:240]
    flow = rewards.optical_flow(video) * 128
    top, bottom = flow[:, 0, :60], flow[:, 0, 60:]
    assert top[top != 0].median() == pytest.approx(2, abs=0.1) and bottom[bottom != 0].median() == pytest.approx(
        -2, abs=0.1
    )
    assert score("motion-magnitude", video) > 0.95  # opposite motions do not cancel
    assert score("motion-direction", video, prompts=["cars moving left"]) < 0.1


def test_motion_rewards_give_a_frozen_clip_nothing(texture):
    still = crops(texture, [(0, 0)] * 9)
    for name in ("motion-magnitude", "motion-direction", "motion-smoothness"):
        assert score(name, CLIPS["still"], still, CLIPS["grey"], CLIPS["black"], prompts=[PROMPT] * 4) == [0, 0, 0, 0]
        assert score(name, CLIPS["clean"]) > 0.5  # the control
    light = (0.8 + 0.2 * torch.sin(torch.arange(9.0))).view(-1, 1, 1, 1)
    fakes = {
        "noise": (still + 0.05 * torch.randn(still.shape, generator=seeded())).clamp(0, 1),
        "light": still * light,
        "light from the left": still * (1 - (1 - light) * torch.linspace(1, 0, 96)),
        "shake": crops(texture, [(0, 0), (3, 0)] * 4),
        "uneven shake": crops(
            texture, (torch.rand(9, 2, generator=seeded()) * torch.tensor([[0], [8]]).repeat(5, 1)[:9]).tolist()
        ),
    }
    fakes |= {k: v for k, v in CLIPS.items() if k.startswith(("still", "noise"))}
    for fake, video in fakes.items():
        for name in ("motion-magnitude", "motion-direction", "motion-smoothness"):
            assert score(name, video) < 0.05, (fake, name)


def test_motion_magnitude_grows_with_speed_up_to_the_target_and_counts_frames_that_move(texture):
    speeds = [0.12, 0.24, 0.48, 0.96, 1.92]
    pans = [crops(texture, [(s * t, 0) for t in range(9)]) for s in speeds]
    found = rewards.get_motion_magnitude_reward(target=0.01)(videos=pans)  # 0.96 pixels of 96
    assert found[1:] == pytest.approx([0.25, 0.5, 1, 1], abs=0.06)
    assert found[0] < 0.15  # 0.12 % of the short side may go unseen
    jump = crops(texture, [(0, 0)] * 5 + [(4, 0)] * 6)
    assert score("motion-magnitude", jump) <= 1 / 9
    with pytest.raises(ValueError, match="target must be a positive speed"):
        rewards.get_motion_magnitude_reward(target=0)


def test_motion_direction_follows_the_prompt_or_the_column():
    for name in ("right", "left", "up", "down"):
        video = toy.render(f"a blue circle moving {name}", seed=4) / 255
        for asked in ("right", "left", "up", "down"):
            reward = score("motion-direction", video, prompts=[f"a blue circle moving {asked}"])
            assert reward > 0.9 if asked == name else reward < 0.1, (name, asked)
        assert score("motion-direction", video, prompts=["a circle"], direction=[name]) > 0.9
        assert score("motion-direction", video, prompts=[f"moving {name}"], direction=[None]) is None
    with pytest.raises(ValueError, match="'direction' holds 'north'; use one of right, left, up, down"):
        score("motion-direction", video, direction=["north"])


@pytest.mark.parametrize(
    "prompt, direction",
    [
        ("a red circle moving right", "right"),
        ("A boat sails slowly to the left.", "left"),
        ("smoke rising upwards", "up"),
        ("a ball falls down the stairs", "down"),
        ("a train runs from left to right", None),  # no verb with "to right": "runs from left to right" counts, below
        ("a man on the left side of the street", None),
        ("she stands up", None),
        ("birds flying up and fish swimming down", None),
        ("the camera pans left", None),
        ("a red circle", None),
    ],
)
def test_prompt_direction(prompt, direction):
    if "from left" in prompt:
        direction = "right"
    assert rewards.prompt_direction(prompt) == direction


def test_colorfulness_is_the_published_formula(texture):
    video = torch.rand(2, 3, 16, 16, generator=seeded())
    found = []
    for r, g, b in (255 * video).double().numpy():
        rg, yb = r - g, (r + g) / 2 - b
        found.append(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()))
    assert rewards.colorfulness(video).item() == pytest.approx(np.mean(found), rel=1e-5)
    vivid = torch.zeros(1, 3, 6, 8)
    for i in range(6):
        vivid[0, i % 3, i] = 1
    grey = video.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    natural = 0.25 * video + 0.75 * grey
    assert (
        score("colorfulness", grey) < 0.01
        and score("colorfulness", vivid) == 0
        and score("colorfulness", natural) == 1
    )
    with pytest.raises(ValueError, match="0 < low <= high"):
        rewards.get_colorfulness_reward(low=50, high=40)


def test_exposure_counts_black_and_white():
    video = torch.full((2, 3, 10, 10), 0.5)
    assert rewards.clipped_light(video) == 0
    video[:, :, :2], video[:, :, 2:4] = 0, 1
    assert rewards.clipped_light(video).item() == pytest.approx(0.4)
    assert score("exposure", video) == pytest.approx(0.6 / 0.9)
    assert score("exposure", CLIPS["black"], CLIPS["white"]) == pytest.approx([0, 0], abs=1e-6)
    assert score("exposure", CLIPS["clean"]) == 1
    with pytest.raises(ValueError, match=r"tolerance must be in \[0, 1\)"):
        rewards.get_exposure_reward(tolerance=1)


def test_jpeg_size_is_that_of_the_files():
    video = torch.rand(1, 3, 32, 48, generator=seeded())
    file = io.BytesIO()
    pixels = (video[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(file, format="JPEG", quality=95)
    assert rewards.jpeg_bits_per_pixel(video) == 8 * len(file.getvalue()) / (32 * 48)
    blank, plain, noise = score("jpeg-compressibility", CLIPS["grey"], CLIPS["clean"], CLIPS["noise"])
    assert blank > plain > noise
    opposite = score("jpeg-incompressibility", CLIPS["grey"], CLIPS["clean"], CLIPS["noise"])
    assert opposite == pytest.approx([1 - blank, 1 - plain, 1 - noise])


@pytest.mark.parametrize(
    "measure", [rewards.temporal_roughness, rewards.flicker, rewards.colorfulness, rewards.clipped_light]
)
def test_what_is_called_differentiable_agrees_with_finite_differences(measure):
    video = (torch.rand(4, 3, 6, 6, generator=seeded()) * 0.9 + 0.02).requires_grad_()
    video.data[:, :, :2] = 0.02 + 0.01 * torch.rand(
        4, 3, 2, 6, generator=seeded(1)
    )  # inside the ramp of clipped_light
    measure(video).backward()
    direction, step = video.grad / video.grad.norm(), 1e-3
    with torch.no_grad():
        moved = measure((video + step * direction).clamp(0, 1)) - measure((video - step * direction).clamp(0, 1))
    assert video.grad.norm() > 0 and moved.item() / (2 * step) == pytest.approx(video.grad.norm().item(), rel=0.02)
    flat = torch.full((4, 3, 6, 6), 0.5, requires_grad=True)
    measure(flat).backward()
    assert flat.grad.isfinite().all()


def test_frames_are_taken_from_the_whole_clip():
    frames = torch.arange(17.0).view(-1, 1, 1, 1)
    assert even_frames(frames, 5).flatten().tolist() == [0, 4, 8, 12, 16]
    assert even_frames(frames, 99).flatten().tolist() == list(range(17))
    assert even_frames(frames, 1).flatten().tolist() == [0]


def test_quoted_text():
    assert rewards.quoted_text('a sign that says "Open 24 hours"') == "Open 24 hours"
    assert rewards.quoted_text("two signs, “IN” and “OUT”") == "IN OUT"
    for without in ("a sign that says open", 'empty ""', 'no letters "!?"', "the dog's bowl and the cat's"):
        assert rewards.quoted_text(without) is None


@pytest.mark.parametrize(
    "wanted, read, similarity",
    [
        ("OPEN", "open", 1),
        ("Open 24 hours!", "OPEN24 HOURS", 1),
        ("OPEN", "we are open today", 1),
        ("OPEN", "we are OPFN today", 0.75),
        ("OPEN", "CLOSED", 0),
        ("OPEN", "", 0),
        ("two words", "tuo vords", 0.75),
    ],
)
def test_text_similarity(wanted, read, similarity):
    assert rewards.text_similarity(wanted, read) == pytest.approx(similarity)


@settings(max_examples=100, deadline=None)
@given(st.text("abcde ", min_size=1).filter(str.strip), st.text("abcde "), st.text("abcde "))
def test_text_similarity_is_full_exactly_for_texts_that_contain_the_wanted_one(wanted, before, after):
    assert rewards.text_similarity(wanted, before + wanted + after) == 1
    other = rewards.text_similarity(wanted, before)
    assert 0 <= other <= 1 and (other == 1) == (wanted.replace(" ", "") in before.replace(" ", ""))


def sign(text):
    frame = Image.new("RGB", (192, 96), (40, 60, 120))
    ImageDraw.Draw(frame).text((10, 25), text, font=ImageFont.load_default(36), fill=(250, 240, 200))
    return torch.from_numpy(np.array(frame)).permute(2, 0, 1) / 255


@pytest.mark.skipif(not OCR, reason="needs vidtrl[ocr]")
def test_prompt_ocr_reads_the_whole_clip():
    read = rewards.get_prompt_ocr_reward(num_frames=2)
    runner = RewardRunner(read)
    videos = [
        torch.stack([sign("OPEN")] * 3),
        torch.stack([sign("OPEN"), sign(""), sign("")]),  # only at its start
        torch.stack([sign("CLOSED")] * 3),
        torch.stack([sign("OPEN")] * 3),
    ]
    prompts = ['a sign that says "Open"'] * 3 + ["a sign"]
    found = runner.collect(runner.submit(prompts, videos)).flatten()
    assert found[:3].tolist() == [1, 0.5, 0] and found[3].isnan()
    assert runner.extra["ocr_text"] == ["OPEN", "", "CLOSED", None]


@pytest.mark.skipif(OCR, reason="vidtrl[ocr] is installed")
def test_prompt_ocr_without_its_engine_says_what_to_install():
    with pytest.raises(ImportError, match=r"pip install 'vidtrl\[ocr\]'"):
        RewardRunner("prompt-ocr")


@pytest.mark.parametrize("name", ["RewardRunner", "get_motion_magnitude_reward", "temporal_smoothness_reward"])
def test_docstring_examples(name):
    text = getattr(rewards, name).__doc__.replace("```python", "").replace("```", "")
    example = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
    assert example.examples and doctest.DocTestRunner().run(example).failed == 0


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'motion-magnitude'"):
        get_reward("motion_magnitude")
    with pytest.raises(ValueError, match="no built-in reward 'xyz'. Valid names: temporal-smoothness, flicker"):
        get_reward("xyz")
