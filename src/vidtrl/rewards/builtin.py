"""The names that stand for built-in rewards in `reward_funcs` and in YAML files."""

import difflib
import importlib
from collections.abc import Callable


# name -> module and function; imported on first use, so that an optional dependency is asked for by its users alone
_BUILTIN = {
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


def get_reward(name: str) -> Callable:
    """
    The built-in reward function of a name.

    Args:
        name (`str`): One of [`builtin_rewards`], such as `"toy-color"`.

    Returns:
        `Callable`: Called with `prompts` and `videos` by keyword; returns one float or `None` a video.

    Raises:
        `ValueError`: If there is no reward of this name.
    """
    if name not in _BUILTIN:
        near = difflib.get_close_matches(name, _BUILTIN, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"there is no built-in reward {name!r}.{hint} Valid names: {', '.join(_BUILTIN)}. Or pass a function "
            "f(prompts, videos, **kwargs) that returns one float a video."
        )
    module, function = _BUILTIN[name]
    return getattr(importlib.import_module(module), function)
