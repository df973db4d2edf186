"""The names that stand for built-in rewards in `reward_funcs` and in YAML files."""

import difflib
import importlib
from collections.abc import Callable


# name -> module and function; imported on first use, so that an optional dependency is asked for by its users alone.
# A get_* factory is called with its defaults.
_BUILTIN = {
    "temporal-smoothness": ("vidtrl.rewards.quality", "temporal_smoothness_reward"),
    "flicker": ("vidtrl.rewards.quality", "flicker_reward"),
    "motion-magnitude": ("vidtrl.rewards.motion", "get_motion_magnitude_reward"),
    "motion-direction": ("vidtrl.rewards.motion", "get_motion_direction_reward"),
    "motion-smoothness": ("vidtrl.rewards.motion", "motion_smoothness_reward"),
    "colorfulness": ("vidtrl.rewards.quality", "get_colorfulness_reward"),
    "exposure": ("vidtrl.rewards.quality", "get_exposure_reward"),
    "jpeg-compressibility": ("vidtrl.rewards.quality", "jpeg_compressibility_reward"),
    "jpeg-incompressibility": ("vidtrl.rewards.quality", "jpeg_incompressibility_reward"),
    "prompt-ocr": ("vidtrl.rewards.ocr", "get_prompt_ocr_reward"),
    "toy-accuracy": ("vidtrl.toy.rewards", "accuracy_reward"),
    "toy-attributes": ("vidtrl.toy.rewards", "attributes_reward"),
    "toy-color": ("vidtrl.toy.rewards", "color_reward"),
    "toy-direction": ("vidtrl.toy.rewards", "direction_reward"),
    "toy-presence": ("vidtrl.toy.rewards", "presence_reward"),
    "toy-shape": ("vidtrl.toy.rewards", "shape_reward"),
    "toy-smoothness": ("vidtrl.toy.rewards", "smoothness_reward"),
    "toy-steadiness": ("vidtrl.toy.rewards", "steadiness_reward"),
}


def builtin_rewards() -> list[str]:
    """The names that [`get_reward`] knows."""
    return list(_BUILTIN)


def is_url(name: str) -> bool:
    """Whether a reward's name is the address of a reward server."""
    return name.startswith(("http://", "https://"))


def get_reward(name: str) -> Callable:
    """
    The built-in reward function of a name.

    Args:
        name (`str`): One of [`builtin_rewards`], such as `"motion-magnitude"`; or the address of a reward server, such as
            `"http://host:8000#motion-magnitude"`, for a [`RemoteReward`] with its default settings.

    Returns:
        `Callable`: Called with `prompts` and `videos` by keyword; returns one float or `None` a video.

    Raises:
        `ValueError`: If there is no reward of this name. `ImportError` if it needs a package that is not installed.
    """
    if is_url(name):
        from .remote import RemoteReward

        return RemoteReward(name)
    if name not in _BUILTIN:
        near = difflib.get_close_matches(name, _BUILTIN, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"there is no built-in reward {name!r}.{hint} Valid names: {', '.join(_BUILTIN)}. Or pass a function "
            "f(prompts, videos, **kwargs) that returns one float a video."
        )
    module, function = _BUILTIN[name]
    found = getattr(importlib.import_module(module), function)
    return found() if function.startswith("get_") else found
