"""What users of the toy world write: "crimson disc drifting east, cinematic" instead of "a red circle moving right".

The video model knows only its 72 captions. A grammar turns each of them into paraphrases: synonyms, other word orders and
clutter. Every synonym and every sentence belongs to one of three tiers, by where a language model may meet it:

- `"pairs"`: in pairs of a paraphrase and its caption, the material of supervised fine-tuning;
- `"prompts"`: in prompts without a caption, the material of reinforcement learning;
- `"held_out"`: in neither. The small language model that ships with vidtrl has met these words in its pretraining text
  and nowhere else.
"""

import random
from pathlib import Path

from .measurement import measure
from .world import COLORS, DIRECTIONS, SHAPES


TIERS = ("pairs", "prompts", "held_out")
# value -> two synonyms a tier
SYNONYMS = {
    "color": {
        "red": ("crimson", "scarlet", "ruby", "cherry", "vermilion", "carmine"),
        "green": ("emerald", "jade", "lime", "olive", "mint", "verdant"),
        "blue": ("azure", "navy", "cobalt", "sapphire", "cerulean", "indigo"),
        "yellow": ("golden", "amber", "lemon", "canary", "mustard", "saffron"),
        "purple": ("violet", "lavender", "plum", "lilac", "mauve", "amethyst"),
        "white": ("ivory", "snowy", "pearl", "chalky", "alabaster", "milky"),
    },
    "shape": {
        "circle": ("disc", "ball", "orb", "dot", "sphere", "coin"),
        "square": ("box", "block", "tile", "cube", "crate", "brick"),
        "triangle": ("wedge", "pyramid", "delta", "cone", "gable", "trigon"),
    },
    "direction": {
        "right": ("east", "rightward", "eastward", "starboard", "eastbound", "rightbound"),
        "left": ("west", "leftward", "westward", "larboard", "westbound", "leftbound"),
        "up": ("north", "upward", "skyward", "aloft", "northbound", "heavenward"),
        "down": ("south", "downward", "earthward", "groundward", "southbound", "floorward"),
    },
}
SENTENCES = {
    "pairs": (
        "{color} {shape} {verb} {direction}",
        "a {color} {shape} {verb} {direction}",
        "a {shape} , {color} , {verb} {direction}",
        "{verb} {direction} : a {color} {shape}",
    ),
    "prompts": (
        "show me a {shape} in {color} {verb} {direction}",
        "{direction} goes the {color} {shape}",
        "i want a {color} {shape} , it is {verb} {direction}",
        "{shape} {verb} {direction} , make it {color}",
    ),
    "held_out": (
        "a {shape} {verb} {direction} , colored {color}",
        "please make something {color} , a {shape} , {verb} {direction}",
        "{verb} {direction} , there is a {shape} in {color}",
        "watch how the {color} {shape} keeps {verb} {direction}",
    ),
}
VERBS = ("drifting", "gliding", "heading", "sliding", "travelling", "floating")
CLUTTER = (
    "cinematic",
    "highly detailed",
    "very nice",
    "for my sister",
    "in slow motion",
    "with soft light",
    "on a quiet morning",
    "trending",
    "nice and simple",
    "very beautiful",
)
_VALUE = {
    word: (attribute, value)
    for attribute, values in SYNONYMS.items()
    for value, synonyms in values.items()
    for word in (value, *synonyms)
}


def synonyms(value: str, tier: str) -> tuple[str, ...]:
    """
    The words of a tier for a value of an attribute.

    Args:
        value (`str`): Such as `"red"`, `"circle"` or `"right"`.
        tier (`str`): `"pairs"`, `"prompts"` or `"held_out"`.

    Returns:
        `tuple[str, ...]`: Two words.
    """
    if tier not in TIERS:
        raise ValueError(f"tier must be one of {TIERS}, not {tier!r}")
    first = 2 * TIERS.index(tier)
    return SYNONYMS[_VALUE[value][0]][value][first : first + 2]


def read_paraphrase(prompt: str) -> dict[str, str | None]:
    """
    The `color`, `shape` and `direction` that a prompt asks for, in the words of the captions; `None` for one that it does
    not name. It knows every word of the grammar: this is what judges a clip against what its user wrote.

    ```python
    >>> read_paraphrase("Crimson disc drifting east, cinematic")
    {'color': 'red', 'shape': 'circle', 'direction': 'right'}
    ```
    """
    found: dict[str, str | None] = {"color": None, "shape": None, "direction": None}
    for word in prompt.lower().replace(",", " ").replace(".", " ").replace(":", " ").split():
        attribute, value = _VALUE.get(word, (None, None))
        if attribute is not None and found[attribute] is None:
            found[attribute] = value
    return found


def caption_of(prompt: str) -> str:
    """
    The caption that a paraphrase stands for.

    Raises:
        `ValueError`: If the prompt does not name all three attributes.
    """
    want = read_paraphrase(prompt)
    if None in want.values():
        raise ValueError(f"{prompt!r} names no {', '.join(k for k, v in want.items() if v is None)}")
    return f"a {want['color']} {want['shape']} moving {want['direction']}"


def paraphrases(num: int, tier: str, seed: int = 0) -> list[dict[str, str]]:
    """
    Draw paraphrases of random captions.

    A sentence of a tier uses words of that tier; in `"prompts"` half of the words and sentences are those of `"pairs"`,
    as users repeat what is known. One in three carries clutter in front of it or behind it, and two in three sentences of
    `"pairs"` keep one of the caption's own words.

    Args:
        num (`int`): How many, all different from each other.
        tier (`str`): `"pairs"`, `"prompts"` or `"held_out"`.
        seed (`int`, *optional*, defaults to `0`): Equal arguments draw equal paraphrases.

    Returns:
        `list[dict[str, str]]`: Rows of `prompt` and `caption`.

    Raises:
        `ValueError`: For an unknown tier.
    """
    if tier not in TIERS:
        raise ValueError(f"tier must be one of {TIERS}, not {tier!r}")
    rng, rows = random.Random(f"{tier} {seed}"), {}
    while len(rows) < num:
        want = {
            "color": rng.choice(list(COLORS)),
            "shape": rng.choice(SHAPES),
            "direction": rng.choice(list(DIRECTIONS)),
        }
        source = lambda: rng.choice(("pairs", "prompts")) if tier == "prompts" else tier  # noqa: E731
        words = {attribute: rng.choice(synonyms(value, source())) for attribute, value in want.items()}
        if tier == "pairs" and rng.random() < 2 / 3:
            kept = rng.choice(list(want))
            words[kept] = want[kept]
        prompt = rng.choice(SENTENCES[source()]).format(verb=rng.choice(VERBS), **words)
        if rng.random() < 1 / 3:
            clutter = rng.choice(CLUTTER)
            prompt = f"{clutter} , {prompt}" if rng.random() < 0.5 else f"{prompt} , {clutter}"
        rows[prompt] = f"a {want['color']} {want['shape']} moving {want['direction']}"
    return [{"prompt": prompt, "caption": caption} for prompt, caption in rows.items()]


def intent_reward(prompts, videos, **kwargs) -> list[float | None]:
    """Share of the attributes that the user's words ask for which the clip shows: 0, 1/3, 2/3 or 1. `None` for a prompt
    that asks for none. `attributes_reward` with an ear for synonyms; like that one blind to flicker and trembling."""
    rewards = []
    for prompt, video in zip(prompts, videos, strict=True):
        want = {k: v for k, v in read_paraphrase(prompt).items() if v is not None}
        seen = measure(video) if want else None
        rewards.append(sum(getattr(seen, k) == v for k, v in want.items()) / len(want) if want else None)
    return rewards


def enhancer_path() -> str:
    """Folder of the small language model that ships with vidtrl: it has read the toy world's vocabulary, and is neither
    fine-tuned nor trained on rewards. `PromptEnhancer.from_pretrained` loads it."""
    return str(Path(__file__).parent / "enhancer")
