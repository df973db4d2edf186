"""The metric of a reward. This file is also the script that `evaluate.load` takes: it copies the file elsewhere and
runs the copy, so nothing here may be imported relatively, and no other metric class may stand in the module."""

import math
import os
import re
from collections.abc import Callable, Sequence

import datasets
import evaluate

from vidtrl.data import probe_video, read_video
from vidtrl.rewards import RewardError, RewardRunner, builtin_rewards


def load(reward: str | Callable, **kwargs) -> "VideoMetric":
    """
    The metric of a reward.

    Args:
        reward (`str` or `Callable`): One of [`~vidtrl.rewards.builtin_rewards`], the address of a reward server, or a
            reward function, such as `get_motion_magnitude_reward(target=0.01)` or your own.
        kwargs: Further arguments of [`VideoMetric`].

    Returns:
        [`VideoMetric`].

    Raises:
        `ValueError`: If there is no reward of this name; the message lists those that are. `ImportError` if it needs a
            package that is not installed.

    Example:

    ```python
    >>> from vidtrl import metrics

    >>> metric = metrics.load("motion-direction")
    >>> metric.compute(predictions=["a.mp4", "b.mp4"], references=["a boat sailing left", "a boat"])
    {'motion-direction': 0.9, 'motion-direction/num_scored': 1, 'motion-direction/num_not_applicable': 1}
    ```
    """
    return VideoMetric(reward=reward, **kwargs)


def script_path() -> str:
    """The script for `evaluate.load(script_path(), "flicker")`, whose second argument names the reward."""
    return os.path.abspath(__file__)


class VideoMetric(evaluate.Metric):
    """
    A reward as an `evaluate.Metric`: `predictions` are video files, `references` their prompts.

    Every frame of a file is given to the reward, as float32 in [0, 1], one clip at a time, through [`RewardRunner`] as
    in training: sync and async functions, checked values. `compute` takes, beside `predictions` and `references`,

    - `per_clip` (`bool`): also return the score of each clip;
    - every column that the reward reads, such as `direction`: a list with one value a clip.

    It returns, under the reward's name, the mean over the clips that the reward applies to (`None` where there are
    none); how many they are and how many the others, `{name}/num_scored` and `{name}/num_not_applicable`; and with
    `per_clip` `{name}/scores`, a list with a float or `None` a clip.

    Args:
        config_name (`str`, *optional*): Name of the reward: what `evaluate.load` passes as its second argument.
        reward (`str` or `Callable`, *optional*): See [`load`]. Takes the place of `config_name`.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where the reward gets the clips.
        kwargs: Of `evaluate.Metric`: `num_process`, `process_id`, `experiment_id`, `cache_dir`, `keep_in_memory`.

    Raises:
        `ValueError`: If the name is unknown or missing. `compute` raises it for a file that is missing or no video,
            before any clip is scored. `RewardError` names the file on which a reward fails.
    """

    def __init__(self, config_name: str | None = None, reward: str | Callable | None = None, device="cpu", **kwargs):
        reward = config_name if reward is None else reward
        if reward is None:
            raise ValueError(f"name the reward to measure, one of {', '.join(builtin_rewards())}")
        self.runner, self.device = RewardRunner(reward), device
        (name,) = self.runner.names
        super().__init__(config_name=re.sub(r"\W+", "-", name), **kwargs)  # a folder of evaluate's cache
        self.info.module_name = name  # with which evaluate.combine tells its metrics apart

    def _info(self):
        return evaluate.MetricInfo(
            description=f"The reward {self.runner.names[0]!r} of vidtrl, over video files.",
            citation="",
            inputs_description="predictions: paths of video files; references: the prompt of each.",
            features=datasets.Features({name: datasets.Value("string") for name in ("predictions", "references")}),
        )

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """
        Add clips.

        Args:
            predictions (`list[str | PathLike]`): Video files, such as mp4.
            references (`list[str]`): The prompt of each.

        Raises:
            `TypeError` or `ValueError`: If they are no lists of these, or of different lengths.
        """
        for name, values, kind in (("predictions", predictions, (str, os.PathLike)), ("references", references, str)):
            if values is None or isinstance(values, str) or not all(isinstance(value, kind) for value in values):
                raise TypeError(
                    "pass predictions=[paths of video files] and references=[the prompt of each, '' where the reward "
                    f"reads none]; {name} is {values!r:.200}"
                )
        if len(predictions) != len(references):
            raise ValueError(
                f"{len(predictions)} predictions but {len(references)} references: give each file its prompt"
            )
        super().add_batch(predictions=list(map(os.fspath, predictions)), references=list(references), **kwargs)

    def add(self, *, prediction=None, reference=None, **kwargs):
        """Add one clip: see `add_batch`."""
        one = {"predictions": prediction, "references": reference, **kwargs}  # evaluate.combine says predictions here
        self.add_batch(**{name: [value] for name, value in one.items()})

    def _compute(self, predictions, references, per_clip=False, **columns):
        for name, values in columns.items():
            if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != len(predictions):
                raise ValueError(
                    f"{name!r} is no option of this metric; as a column it must be a list of {len(predictions)} "
                    "values, one a clip"
                )
        for path in predictions:  # what is missing shows now, and not after an hour
            probe_video(path)
        (name,) = self.runner.names
        scores = []
        for i, (path, prompt) in enumerate(zip(predictions, references, strict=True)):
            scores.append(self._score(path, prompt, {column: [values[i]] for column, values in columns.items()}))
        scored = [score for score in scores if score is not None]
        result = {
            name: sum(scored) / len(scored) if scored else None,
            f"{name}/num_scored": len(scored),
            f"{name}/num_not_applicable": len(scores) - len(scored),
        }
        return result | {f"{name}/scores": scores} if per_clip else result

    def _score(self, path, prompt, columns) -> float | None:
        video = read_video(path).float().div_(255).to(self.device)
        try:
            score = self.runner.collect(self.runner.submit([prompt], [video], columns)).item()
        except RewardError as error:  # its message knows the prompt, but not the file
            name, cause = self.runner.names[0], error.__cause__
            raise RewardError(f"{name!r} failed on {path}: {type(cause).__name__}: {cause}") from cause
        return None if math.isnan(score) else score
