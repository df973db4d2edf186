"""Rewards as metrics of 🤗 evaluate, over real mp4 files."""

import os
import subprocess
import sys
import weakref
from pathlib import Path

import evaluate
import pytest
import torch

from vidtrl import metrics, toy
from vidtrl.data import read_video, write_video
from vidtrl.rewards import RewardError, builtin_rewards, get_motion_magnitude_reward, get_reward


PROMPTS = ["a red square moving up", "a blue circle moving left", "a green triangle moving down"]


def clips():
    steady, moving, other = (toy.render(prompt, seed=seed) / 255 for seed, prompt in enumerate(PROMPTS))
    light = (0.6 + 0.4 * torch.sin(2.0 * torch.arange(17))).view(-1, 1, 1, 1)
    return {
        "steady": steady,
        "flickering": steady * light,
        "frozen": steady[:1].repeat(17, 1, 1, 1),
        "moving": moving,
        "other": other,
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for name, clip in clips().items():
        write_video(folder / f"{name}.mp4", clip, fps=8)
    return {name: str(folder / f"{name}.mp4") for name in clips()}


@pytest.fixture
def load(tmp_path):
    return lambda reward, **kwargs: metrics.load(reward, cache_dir=str(tmp_path / "cache"), **kwargs)


@pytest.mark.parametrize("name", [name for name in builtin_rewards() if name != "prompt-ocr"])
def test_a_metric_is_its_reward_on_what_the_file_holds(name, files, load):
    chosen = ["steady", "flickering", "moving", "other"]
    prompts = [PROMPTS[0], *PROMPTS]
    found = load(name).compute(predictions=[files[n] for n in chosen], references=prompts, per_clip=True)
    reward = get_reward(name)
    decoded = reward(prompts=prompts, videos=[read_video(files[n]) / 255 for n in chosen])
    assert found[f"{name}/scores"] == torch.tensor(decoded).tolist()  # float32, as the trainer has them
    assert found[name] == pytest.approx(sum(decoded) / len(decoded)) and found[f"{name}/num_scored"] == len(chosen)
    # h264 moves them a little
    written = torch.tensor(reward(prompts=prompts, videos=[clips()[n] for n in chosen]))
    assert (written - torch.tensor(decoded)).abs().max() < 0.15


@pytest.mark.parametrize(
    "name, worse", [("flicker", "flickering"), ("toy-steadiness", "flickering"), ("motion-magnitude", "frozen")]
)
def test_a_worse_file_scores_worse(name, worse, files, load):
    metric, key = load(name), {"references": PROMPTS[:1]}
    good, bad = (metric.compute(predictions=[files[n]], **key)[name] for n in ("steady", worse))
    assert good > bad + 0.5
    assert metric.compute(predictions=[files["steady"]], **key)[name] == good  # nothing of the others is left


def test_what_a_reward_does_not_apply_to_is_left_out_and_counted(files, load):
    metric = load("toy-color")
    found = metric.compute(
        predictions=[files["steady"], files["moving"], files["other"]],
        references=["a red square", "something that moves", "a blue triangle"],
        per_clip=True,
    )
    assert found == {
        "toy-color": 0.5,
        "toy-color/num_scored": 2,
        "toy-color/num_not_applicable": 1,
        "toy-color/scores": [1.0, None, 0.0],
    }
    none = metric.compute(predictions=[files["steady"]], references=["something"])
    assert none == {"toy-color": None, "toy-color/num_scored": 0, "toy-color/num_not_applicable": 1}


def test_batches_paths_columns_and_functions(files, load):
    async def judged(prompts, videos, **kwargs):
        return [float(len(prompt) + len(video)) for prompt, video in zip(prompts, videos, strict=True)]

    metric = load(judged)
    assert metric.name == "judged"
    metric.add_batch(predictions=[files["steady"]], references=["a"])
    metric.add_batch(predictions=(Path(files["moving"]),), references=("abc",))
    metric.add(prediction=files["other"], reference="abcde")
    assert len(metric) == 3
    assert metric.compute(per_clip=True)["judged/scores"] == [18.0, 20.0, 22.0]

    directed = load("motion-direction")
    both = {"predictions": [files["steady"]] * 2, "references": ["", ""], "per_clip": True}
    up, down = directed.compute(direction=["up", "down"], **both)["motion-direction/scores"]
    assert up > 0.9 and down == 0
    with pytest.raises(ValueError, match="'per_clips' is no option.*list of 2 values"):
        directed.compute(per_clips=True, **both)

    default, strict = (
        load(reward).compute(predictions=[files["steady"]], references=[""], per_clip=True)
        for reward in ("motion-magnitude", get_motion_magnitude_reward(target=0.2))
    )
    assert default["motion-magnitude"] > 2 * strict["motion_magnitude_reward"] > 0


def test_one_clip_is_in_memory_at_a_time(files, load):
    alive = []

    def watching(videos, **kwargs):
        assert len(videos) == 1 and not any(ref() is not None for ref in alive)
        alive.append(weakref.ref(videos[0]))
        return [0.0]

    load(watching).compute(predictions=[files["steady"]] * 3, references=[""] * 3)
    assert len(alive) == 3


def test_mistakes_say_what_to_do(files, load, tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'flicker'.*temporal-smoothness.*toy-steadiness"):
        load("fliker")
    with pytest.raises(ValueError, match="name the reward.*temporal-smoothness.*toy-steadiness"):
        metrics.VideoMetric()

    seen = []

    def counting(videos, **kwargs):
        seen.extend(videos)
        return [0.0] * len(videos)

    metric, steady = load(counting), files["steady"]
    whole = Path(steady).read_bytes()
    broken = {"gone": None, "empty": b"", "text": b"no video at all", "half": whole[: len(whole) // 2]}
    for name, content in broken.items():
        path = tmp_path / f"{name}.mp4"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.mp4 (cannot be|is truncated)"):
            metric.compute(predictions=[steady, str(path)], references=["", ""])
    assert not seen  # all files are looked at before the first is scored

    with pytest.raises(ValueError, match="2 predictions but 1 references"):
        metric.compute(predictions=[steady, steady], references=[""])
    for wrong in (
        {"predictions": steady, "references": [""]},
        {"predictions": [steady]},
        {"predictions": [steady], "references": [None]},
        {"predictions": [read_video(steady)], "references": [""]},
    ):
        with pytest.raises(TypeError, match=r"pass predictions=\[paths.*references=\[the prompt"):
            metric.compute(**wrong)
    write_video(tmp_path / "short.mp4", torch.zeros(2, 3, 64, 64), fps=8)
    with pytest.raises(RewardError, match="'flicker' failed on .*short.mp4: ValueError: .*3 consecutive frames"):
        load("flicker").compute(predictions=[str(tmp_path / "short.mp4")], references=[""])
    # and none of it stays behind in the metric
    assert metric.compute(predictions=[steady], references=[""])["counting/num_scored"] == 1 == len(seen)


def test_combined_metrics_keep_their_names(files, load):
    both = evaluate.combine([load("flicker"), load("toy-color")])
    both.add(files["steady"], PROMPTS[0])
    both.add_batch([files["flickering"]], ["something"])
    found = both.compute()
    assert found["toy-color"] == 1 and found["toy-color/num_not_applicable"] == 1
    assert 0 < found["flicker"] < 1 and found["flicker/num_scored"] == 2
    prefixed = evaluate.combine([load("flicker"), load("toy-color")], force_prefix=True)
    assert "flicker_flicker" in prefixed.compute(predictions=[files["steady"]], references=PROMPTS[:1])


def test_evaluate_loads_the_script(files, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path / "modules")
    monkeypatch.setattr(sys, "path", [*sys.path])
    metric = evaluate.load(metrics.script_path(), "toy-color", cache_dir=str(tmp_path / "cache"))
    assert (metric.name, metric.module_type) == ("toy-color", "metric") and "'references'" in repr(metric)
    found = metric.compute(predictions=[files["steady"], files["moving"]], references=["a red square"] * 2)
    assert found["toy-color"] == 0.5
    with pytest.raises(ValueError, match="name the reward"):
        evaluate.load(metrics.script_path(), cache_dir=str(tmp_path / "cache"))


@pytest.mark.slow
def test_processes_are_gathered(files, tmp_path):
    """In new processes, with a home and a cache of their own, offline."""
    code = (
        "import sys, evaluate, vidtrl.metrics\n"
        "assert 'vidtrl.metrics.video_metric' not in sys.modules\n"
        "rank, path = int(sys.argv[1]), sys.argv[2]\n"
        "script = vidtrl.metrics.script_path()\n"
        "metric = evaluate.load(script, 'toy-color', num_process=2, process_id=rank, experiment_id='one')\n"
        "print(metric.compute(predictions=[path], references=[sys.argv[3]], per_clip=True))\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_EVALUATE_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), files["steady"], prompt],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank, prompt in enumerate(["a red square", "a blue square"])
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[1][0].strip() == "None"
    assert "'toy-color': 0.5" in outputs[0][0] and "[1.0, 0.0]" in outputs[0][0]


def test_the_import_is_light():
    code = (
        "import sys, vidtrl, vidtrl.metrics\nprint({'torch', 'diffusers', 'evaluate', 'datasets'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
    assert all(callable(getattr(metrics, name)) for name in metrics.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        metrics.lode  # noqa: B018
