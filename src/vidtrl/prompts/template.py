"""What a language model is told: a system text, worked examples and limits, as a data file."""

import difflib
import json
import os
from dataclasses import asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path


@dataclass(frozen=True)
class PromptTemplate:
    """
    Args:
        system (`str`): The task. `{min_words}`, `{max_words}` and `{language}` are filled in.
        user (`str`, *optional*, defaults to `"{prompt}"`): The user's turn for chat models.
        turn (`str`, *optional*): The user's turn for language models without a chat template; the answer follows it.
        static (`str`, *optional*, defaults to `"{prompt}"`): The prompt that is made without any language model.
        min_words (`int`, *optional*, defaults to `1`), max_words (`int`, *optional*, defaults to `120`): Length of the
            answer.
        examples (`list[dict]`, *optional*): Worked examples `{"prompt": ..., "enhanced": ...}`, shown before the user's.

    Raises:
        `ValueError`: If `{prompt}` is missing where it belongs, the limits contradict each other, or an example lacks a
            field.
    """

    system: str
    user: str = "{prompt}"
    turn: str = "Prompt: {prompt}\nDescription:"
    static: str = "{prompt}"
    min_words: int = 1
    max_words: int = 120
    examples: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self):
        for name in ("user", "turn", "static"):
            if "{prompt}" not in getattr(self, name):
                raise ValueError(f"a template's {name!r} must contain {{prompt}}, where the user's text goes")
        if not 1 <= self.min_words <= self.max_words:
            raise ValueError(f"a template needs 1 <= min_words <= max_words, not {self.min_words}, {self.max_words}")
        for example in self.examples:
            if set(example) != {"prompt", "enhanced"}:
                raise ValueError(f"a template's example has the fields 'prompt' and 'enhanced', not {sorted(example)}")

    @classmethod
    def load(cls, source: "str | os.PathLike | PromptTemplate") -> "PromptTemplate":
        """
        Args:
            source (`str`, `PathLike` or [`PromptTemplate`]): One of [`builtin_templates`], or a JSON file with the
                fields of this class.

        Raises:
            `ValueError`: If there is no such template or file, or the file is malformed.
        """
        if isinstance(source, cls):
            return source
        name = os.fspath(source)
        if name in builtin_templates():
            text = (files("vidtrl.prompts") / "templates" / f"{name}.json").read_text(encoding="utf-8")
            return cls(**json.loads(text))
        if not Path(name).is_file():
            near = difflib.get_close_matches(name, builtin_templates(), 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"there is no template {name!r}.{hint} Built in are {', '.join(builtin_templates())}; or give the path of "
                "a JSON file."
            )
        try:
            values = json.loads(Path(name).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"template {name!r} is not valid JSON: {error}") from error
        known = [f.name for f in fields(cls)]
        if not isinstance(values, dict) or "system" not in values or (set(values) - set(known)):
            raise ValueError(
                f"template {name!r} must be a JSON object with 'system' and any of {', '.join(known[1:])}"
            )
        return cls(**values)

    def to_dict(self) -> dict:
        """For a JSON file."""
        return asdict(self)

    def system_text(self, language: str | None = None) -> str:
        """The filled-in system text."""
        spoken = f"in {language}" if language else "in the language of the user's prompt"
        values = {"{min_words}": self.min_words, "{max_words}": self.max_words, "{language}": spoken}
        return _fill(self.system, values)

    def messages(self, prompt: str, language: str | None = None) -> list[dict[str, str]]:
        """The conversation that a chat model answers: system, examples as turns, the user's prompt."""
        system = self.system_text(language)
        turns = [{"role": "system", "content": system}] if system else []
        for example in self.examples:
            turns.append({"role": "user", "content": _fill(self.user, {"{prompt}": example["prompt"]})})
            turns.append({"role": "assistant", "content": example["enhanced"]})
        return [*turns, {"role": "user", "content": _fill(self.user, {"{prompt}": prompt})}]

    def plain(self, prompt: str, language: str | None = None) -> str:
        """The same as one text, for a language model without a chat template."""
        turns = [f"{_fill(self.turn, {'{prompt}': e['prompt']})} {e['enhanced']}" for e in self.examples]
        return "\n\n".join(
            part for part in (self.system_text(language), *turns, _fill(self.turn, {"{prompt}": prompt})) if part
        )

    def without_model(self, prompt: str) -> str:
        """The user's prompt in the template's fixed words: a baseline that needs no language model."""
        return _fill(self.static, {"{prompt}": prompt})


def builtin_templates() -> list[str]:
    """Names that [`PromptTemplate.load`] knows without a file."""
    folder = files("vidtrl.prompts") / "templates"
    return sorted(p.name.removesuffix(".json") for p in folder.iterdir() if p.name.endswith(".json"))


def _fill(text: str, values: dict[str, object]) -> str:
    """Not `str.format`: braces in a user's prompt are text. One pass over the parts, so that a prompt that contains a
    placeholder is not filled in either."""
    for name, value in values.items():
        head, found, tail = text.partition(name)
        if found:
            return _fill(head, values) + str(value) + _fill(tail, values)
    return text
