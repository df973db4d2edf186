"""`PromptEnhancer`: a language model behind a template, whose answers are checked before they take a prompt's place."""

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TopPLogitsWarper,
)

from .template import PromptTemplate
from .text import clean_output, find_problem


CONFIG_FILE = "prompt_enhancer.json"
RETRY_TEMPERATURE = 0.7  # a second attempt has to differ from the first


class PromptFallbackWarning(UserWarning):
    """A prompt could not be enhanced and is used as its user wrote it."""


@dataclass(frozen=True)
class Enhancement:
    """
    Args:
        prompt (`str`): What the user wrote.
        text (`str`): What to generate from: the enhanced prompt, or `prompt` itself after a fallback.
        enhanced (`bool`): Whether `text` is the model's.
        reason (`str` or `None`): Why not, if it is not.
        raw (`str`): The model's last answer, as generated.
    """

    prompt: str
    text: str
    enhanced: bool
    reason: str | None = None
    raw: str = ""


class PromptEnhancer:
    """
    Rewrite users' prompts for a video model with a language model.

    The model may be any causal language model of transformers. One with a chat template gets the template as a
    conversation, another one as plain text. Answers are cleaned and checked ([`clean_output`]): quoted text and numbers
    must be kept. An answer that fails is tried again, and then the user's prompt is used, with a
    [`PromptFallbackWarning`].

    Equal prompts, settings and seeds give equal results, in whatever batches they come: every prompt has its own random
    numbers. (Padding may change logits in their last digits, and with them, rarely, a token.)

    Args:
        model (`str`, `PathLike`, `PreTrainedModel` or `None`): Id on the Hub, folder, or loaded model (PEFT models as
            well). `None` applies the template's fixed words and needs no model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Loaded from where the model comes from by default.
        template (`str`, `PathLike` or [`PromptTemplate`], *optional*, defaults to `"neutral"`): `"wan"`,
            `"hunyuan-video"`, `"ltx-video"`, `"neutral"`, a JSON file, or an object.
        language (`str`, *optional*): The language of the enhanced prompts, such as `"English"`. By default that of the
            user's prompt.
        max_new_tokens (`int`, *optional*, defaults to `256`): Of one answer. The template limits its words.
        temperature (`float`, *optional*, defaults to `0.7`): 0 takes the most likely tokens.
        top_p (`float`, *optional*, defaults to `0.95`): In (0, 1].
        seed (`int`, *optional*, defaults to `42`): Of the sampling.
        num_retries (`int`, *optional*, defaults to `1`): Further attempts for an answer that is not valid.
        batch_size (`int`, *optional*, defaults to `8`): Prompts that are answered at once.
        chat_template_kwargs (`dict`, *optional*): Such as `{"enable_thinking": False}` for Qwen3.

    Raises:
        `ValueError` or `TypeError`: For settings that do not fit, with the fix in the message.

    Example:

    ```python
    >>> enhancer = PromptEnhancer("Qwen/Qwen2.5-0.5B-Instruct", template="wan")
    >>> enhancer("a cat on a skateboard")  # one text, or a list for a list
    >>> enhancer.enhance(['a sign that says "OPEN"'])[0].enhanced  # False after a fallback
    >>> pipe = enhancer.wrap(pipe)
    >>> pipe("a cat on a skateboard")
    >>> pipe("a cat on a skateboard", enhance_prompt=False)
    ```
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        template: str | os.PathLike | PromptTemplate = "neutral",
        language: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.7,
        top_p: float = 0.95,
        seed: int = 42,
        num_retries: int = 1,
        batch_size: int = 8,
        chat_template_kwargs: dict[str, Any] | None = None,
    ):
        self.template = PromptTemplate.load(template)
        for name, value, low in (("max_new_tokens", max_new_tokens, 1), ("batch_size", batch_size, 1)):
            if value < low:
                raise ValueError(f"{name} must be at least {low}, not {value}")
        if temperature < 0:
            raise ValueError(f"temperature must be at least 0 (greedy), not {temperature}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], not {top_p}")
        if num_retries < 0:
            raise ValueError(f"num_retries must be at least 0, not {num_retries}")
        self.language, self.max_new_tokens, self.temperature, self.top_p = language, max_new_tokens, temperature, top_p
        self.seed, self.num_retries, self.batch_size = seed, num_retries, batch_size
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        if isinstance(model, (str, os.PathLike)):
            source = os.fspath(model)
            model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
            tokenizer = AutoTokenizer.from_pretrained(source) if tokenizer is None else tokenizer
        elif model is not None:
            if not callable(getattr(model, "generate", None)):
                raise TypeError(
                    f"model must be a causal language model of transformers, an id, a folder or None, not "
                    f"{type(model).__name__}"
                )
            if tokenizer is None:
                tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
        self.model, self.tokenizer = model, tokenizer
        if model is not None:
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token
            tokenizer.padding_side = "left"

    def to(self, device: torch.device | str) -> "PromptEnhancer":
        """Move the language model to a device, in place: one that was loaded here is on the CPU."""
        if self.model is not None:
            self.model.to(device)
        return self

    @property
    def is_chat(self) -> bool:
        """Whether the model is spoken to in a conversation."""
        return self.tokenizer is not None and self.tokenizer.chat_template is not None

    # ---- What the model sees ----

    def format(self, prompt: str) -> list[dict[str, str]] | str:
        """
        The model's input for a prompt: messages for a chat model, else text. Datasets for TRL's trainers hold this
        ([`pairs_dataset`], [`prompts_dataset`]).

        The tokenizer's special tokens are taken out of the prompt: a user cannot end their turn and speak as the system.
        """
        for token in sorted(self._special_tokens(), key=len, reverse=True):
            prompt = prompt.replace(token, " ")
        prompt = " ".join(prompt.split())
        if self.is_chat:
            return self.template.messages(prompt, self.language)
        return self.template.plain(prompt, self.language)

    def _special_tokens(self) -> list[str]:
        if self.tokenizer is None:
            return []
        added = [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        return [t for t in {*self.tokenizer.all_special_tokens, *added} if t.strip()]

    def _text(self, prompt: str) -> str:
        framed = self.format(prompt)
        if not self.is_chat:
            return framed
        options = {"add_generation_prompt": True, "tokenize": False, **self.chat_template_kwargs}
        return self.tokenizer.apply_chat_template(framed, **options)

    def _encode(self, prompts: Sequence[str]):
        texts, special = [self._text(p) for p in prompts], not self.is_chat  # a chat template has written its own
        encoded = self.tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=special)
        return encoded.to(self.model.device)

    def _fits(self, prompt: str) -> bool:
        length = len(self.tokenizer(self._text(prompt))["input_ids"])
        return length + self.max_new_tokens <= self.tokenizer.model_max_length

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], seed: int | None = None, temperature: float | None = None) -> list[str]:
        """
        The model's answers as they come, neither cleaned nor checked.

        Args:
            prompts (`Sequence[str]`): What users wrote.
            seed (`int`, *optional*), temperature (`float`, *optional*): Instead of the enhancer's own.

        Returns:
            `list[str]`: One a prompt.
        """
        seed = self.seed if seed is None else seed
        temperature = self.temperature if temperature is None else temperature
        eos = self.model.generation_config.eos_token_id
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=False,  # what is random is in the processor below
            eos_token_id=self.tokenizer.eos_token_id if eos is None else eos,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        was_training, answers = self.model.training, []
        self.model.eval()
        try:
            for first in range(0, len(prompts), self.batch_size):
                batch = prompts[first : first + self.batch_size]
                inputs = self._encode(batch)
                processors = LogitsProcessorList()
                if temperature > 0:
                    processors.append(_SeededSampling(batch, seed, temperature, self.top_p))
                inputs = {k: inputs[k] for k in ("input_ids", "attention_mask")}
                output = self.model.generate(**inputs, generation_config=config, logits_processor=processors)
                new = output[:, inputs["input_ids"].shape[1] :]
                answers += self.tokenizer.batch_decode(new, skip_special_tokens=True)
        finally:
            self.model.train(was_training)
        return answers

    # ---- What becomes of the answer ----

    def judge(self, prompt: str, answer: str, words: list[str] | None = None) -> Enhancement:
        """
        Clean and check one answer; training on rewards sees completions through the same eyes.

        Args:
            prompt (`str`): What the user wrote.
            answer (`str`): As generated.
            words (`list[str]`, *optional*): Words that have to be kept besides quoted text and numbers.

        Returns:
            [`Enhancement`]: The user's prompt with a reason, if the answer is not valid.
        """
        template, text = self.template, answer
        if not self.is_chat:  # a plain language model goes on with a next example
            label = template.turn.partition("{prompt}")[0].strip()
            text = text.strip().split("\n\n")[0].split(f"\n{label}")[0] if label else text.strip().split("\n\n")[0]
        text = clean_output(text, template.max_words)
        problem = find_problem(prompt, text, template.min_words, self.language, words)
        return Enhancement(prompt, prompt if problem else text, problem is None, problem, answer)

    def enhance(self, prompts: Sequence[str], seed: int | None = None) -> list[Enhancement]:
        """
        Enhance prompts and tell what became of each.

        Args:
            prompts (`Sequence[str]`): What users wrote. An empty one stays empty.
            seed (`int`, *optional*): Instead of the enhancer's own.

        Returns:
            `list[Enhancement]`: One a prompt, in order.

        Raises:
            `TypeError`: If `prompts` is no list of strings.
        """
        prompts = list(prompts) if not isinstance(prompts, str) else None
        if prompts is None or not all(isinstance(p, str) for p in prompts):
            raise TypeError("enhance() takes a list of strings; for one prompt call enhancer(prompt)")
        if self.model is None:
            return [Enhancement(p, self.template.without_model(p), True) if p.strip() else _empty(p) for p in prompts]
        results: dict[int, Enhancement] = {i: _empty(p) for i, p in enumerate(prompts) if not p.strip()}
        todo = [i for i in range(len(prompts)) if i not in results]
        too_long = [i for i in todo if not self._fits(prompts[i])]
        results |= {i: Enhancement(prompts[i], prompts[i], False, "it is too long for the model") for i in too_long}
        todo = [i for i in todo if i not in too_long]
        seed = self.seed if seed is None else seed
        for attempt in range(self.num_retries + 1):
            temperature = self.temperature if attempt == 0 else max(self.temperature, RETRY_TEMPERATURE)
            answers = self.generate([prompts[i] for i in todo], seed + 7919 * attempt, temperature) if todo else []
            results |= {i: self.judge(prompts[i], answer) for i, answer in zip(todo, answers, strict=True)}
            todo = [i for i in todo if not results[i].enhanced]
        for i in sorted([*todo, *too_long]):
            warnings.warn(
                f"the prompt {prompts[i]!r} is used as it is: {results[i].reason}", PromptFallbackWarning, stacklevel=3
            )
        return [results[i] for i in range(len(prompts))]

    def __call__(self, prompts: str | Sequence[str], seed: int | None = None) -> str | list[str]:
        """
        Args:
            prompts (`str` or `Sequence[str]`): What users wrote.
            seed (`int`, *optional*): Instead of the enhancer's own.

        Returns:
            `str` or `list[str]`: What to generate from; see [`~PromptEnhancer.enhance`] for whether it is enhanced.
        """
        texts = [r.text for r in self.enhance([prompts] if isinstance(prompts, str) else prompts, seed)]
        return texts[0] if isinstance(prompts, str) else texts

    def wrap(self, pipe: Any):
        """
        A pipeline that enhances prompts before it encodes them.

        Args:
            pipe (`DiffusionPipeline`): It is neither copied nor changed.

        Returns:
            [`EnhancedPipeline`]: Called as `pipe` is, with `enhance_prompt=False` to leave a prompt as it is.
        """
        from .pipeline import EnhancedPipeline

        return EnhancedPipeline(pipe, self)

    # ---- Saving ----

    def settings(self) -> dict[str, Any]:
        """What [`~PromptEnhancer.save_pretrained`] writes besides the model."""
        names = ("language", "max_new_tokens", "temperature", "top_p", "seed", "num_retries", "batch_size")
        own = {name: getattr(self, name) for name in (*names, "chat_template_kwargs")}
        return {**own, "template": self.template.to_dict(), "has_model": self.model is not None}

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write model (of a PEFT model the adapter alone), tokenizer, `prompt_enhancer.json` and a model card."""
        if self.model is not None:
            self.model.save_pretrained(directory)
            self.tokenizer.save_pretrained(directory)
        self.save_settings(directory)

    def save_settings(self, directory: str | os.PathLike) -> None:
        """Write all but the model and the tokenizer, beside which a trainer's `save_model` has put them."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.settings(), indent=2, ensure_ascii=False)
        (directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        self.model_card().save(directory / "README.md")

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, model: Any = None, tokenizer: Any = None, **settings: Any):
        """
        Load what [`~PromptEnhancer.save_pretrained`] wrote.

        Args:
            source (`str` or `PathLike`): Folder, or id on the Hub.
            model, tokenizer (*optional*): Use these instead of loading them.
            **settings: Arguments of [`PromptEnhancer`] that replace the saved ones.

        Returns:
            [`PromptEnhancer`]

        Raises:
            `ValueError`: If there is no enhancer.
        """
        source = os.fspath(source)
        path = Path(source) / CONFIG_FILE
        if not Path(source).is_dir():
            try:
                path = Path(hf_hub_download(source, CONFIG_FILE))
            except (EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError, ValueError) as error:
                raise ValueError(_not_found(source)) from error
        if not path.is_file():
            raise ValueError(_not_found(source))
        saved = json.loads(path.read_text(encoding="utf-8"))
        has_model, template = saved.pop("has_model"), PromptTemplate(**saved.pop("template"))
        if model is None and has_model:
            model = source
        return cls(model, tokenizer, **{**saved, "template": template, **settings})

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
        """
        Upload what [`~PromptEnhancer.save_pretrained`] writes.

        Args:
            repo_id (`str`): Created if missing.
            private (`bool`, *optional*): Of a repository that is created; one that exists has to be private then.
            token (`str`, *optional*): Default: the one `hf auth login` stored.

        Returns:
            `str`: The commit's URL.

        Raises:
            [`~vidtrl.hub.HubError`]: The Hub refused, or could not be reached.
        """
        from ..hub.upload import create_repository, push_folder  # it imports this module

        api = HfApi(token=token)
        repo_id = create_repository(api, repo_id, "model", private, None)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            self.model_card(repo_id).save(Path(folder) / "README.md")
            return str(push_folder(api, folder, repo_id, commit_message="Upload prompt enhancer"))

    def model_card(self, repo_id: str = "PATH_OR_REPOSITORY") -> ModelCard:
        """The card, with a snippet that loads the enhancer from `repo_id`."""
        name = "" if self.model is None else str(self.model.config.name_or_path)
        on_hub = name.count("/") == 1 and not os.path.exists(name)
        data = ModelCardData(
            library_name="vidtrl",
            pipeline_tag="text-generation",
            tags=["vidtrl", "prompt-enhancement", "text-to-video"],
            base_model=name if on_hub else None,
        )
        text = (files("vidtrl.prompts") / "templates" / "model_card.md").read_text(encoding="utf-8")
        return ModelCard.from_template(
            data, template_str=text, repo_id=repo_id, base_model=name if on_hub else "", template=self.template
        )


class _SeededSampling(LogitsProcessor):
    """Makes greedy decoding draw from softmax(logits / temperature), truncated to `top_p`: the largest of logits plus
    Gumbel noise is such a draw (https://huggingface.co/papers/1611.01144, eq. 1). Each row has a generator seeded by its
    prompt, so a result does not depend on what else is in the batch."""

    def __init__(self, prompts: Sequence[str], seed: int, temperature: float, top_p: float):
        digests = (hashlib.blake2b(f"{seed} {p}".encode(), digest_size=8).digest() for p in prompts)
        self.generators = [torch.Generator().manual_seed(int.from_bytes(d, "big") >> 1) for d in digests]
        self.temperature = temperature
        self.warper = TopPLogitsWarper(top_p) if top_p < 1 else None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.float() / self.temperature
        if self.warper is not None:
            scores = self.warper(input_ids, scores)
        uniform = torch.stack([torch.rand(scores.shape[1], generator=g) for g in self.generators])
        noise = -torch.log(-torch.log(uniform.clamp(1e-10, 1 - 1e-7)))
        return scores + noise.to(scores.device)


def _empty(prompt: str) -> Enhancement:
    return Enhancement(prompt, prompt, False, "the prompt is empty")


def _not_found(source: str) -> str:
    return (
        f"{source!r} has no {CONFIG_FILE}, in a folder or on the Hub: it is no saved enhancer. To use a language model that "
        f"was not saved by PromptEnhancer.save_pretrained, write PromptEnhancer({source!r}, template=...)."
    )
