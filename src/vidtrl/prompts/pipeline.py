"""A diffusers pipeline that enhances prompts before it encodes them."""

from collections.abc import Iterator
from typing import Any

from .enhancer import Enhancement, PromptEnhancer


Prompt = str | list[str]


class EnhancedPipeline:
    """
    What [`PromptEnhancer.wrap`] returns: the pipeline, with its prompts enhanced on the way in. Everything but the call is
    the pipeline's own (`wrapped.vae`, `wrapped.load_lora_weights(...)`).

    Args:
        pipe (`DiffusionPipeline`): Called with the enhanced prompt. Its negative prompt and given embeddings pass
            unchanged.
        enhancer ([`PromptEnhancer`]): Rewrites the prompts.

    Attributes:
        enhancements (`list[Enhancement]`): What became of the prompts of the last call; empty if it enhanced none. Of a stream
            with those that it was switched to.
    """

    def __init__(self, pipe: Any, enhancer: PromptEnhancer):
        self.pipe, self.enhancer = pipe, enhancer
        self.enhancements: list[Enhancement] = []

    def __call__(self, prompt: str | list[str] | None = None, *, enhance_prompt: bool = True, **kwargs) -> Any:
        """
        Args:
            prompt (`str` or `list[str]`, *optional*): What users wrote; of a [`~vidtrl.inference.CausalVideoPipeline`] also a
                schedule `{block: prompt}`.
            enhance_prompt (`bool`, *optional*, defaults to `True`): `False` leaves the prompts as they are.
            **kwargs: For the pipeline.

        Returns:
            What the pipeline returns.
        """
        self.enhancements = []
        if prompt is None:
            return self.pipe(**kwargs)
        return self.pipe(prompt=self._enhanced(prompt) if enhance_prompt else prompt, **kwargs)

    def stream(self, prompt: Prompt | dict[int, Prompt], *, enhance_prompt: bool = True, **kwargs) -> "EnhancedStream":
        """
        Of a [`~vidtrl.inference.CausalVideoPipeline`]: generate block after block.

        Args:
            prompt (`str`, `list[str]` or `dict`): What users wrote, or a schedule `{block: prompt}`.
            enhance_prompt (`bool`, *optional*, defaults to `True`): `False` leaves the prompts as they are.
            **kwargs: For the pipeline's `stream`.

        Returns:
            [`EnhancedStream`]: The pipeline's stream, which enhances the prompts that it is switched to as well.
        """
        self.enhancements = []
        stream = self.pipe.stream(self._enhanced(prompt) if enhance_prompt else prompt, **kwargs)
        return EnhancedStream(stream, self)

    def _enhanced(self, prompt: Prompt | dict[int, Prompt]) -> Prompt | dict[int, Prompt]:
        """The same form with enhanced texts; what became of each is kept."""
        if isinstance(prompt, dict):
            return {block: self._enhanced(one) for block, one in prompt.items()}
        made = self.enhancer.enhance([prompt] if isinstance(prompt, str) else prompt)
        self.enhancements += made
        texts = [e.text for e in made]
        return texts[0] if isinstance(prompt, str) else texts

    def to(self, *args, **kwargs) -> "EnhancedPipeline":
        """Move the pipeline; the language model stays where it is."""
        self.pipe.to(*args, **kwargs)
        return self

    def __getattr__(self, name: str) -> Any:
        if name == "pipe":  # not set yet, as while unpickling
            raise AttributeError(name)
        return getattr(self.pipe, name)

    def __repr__(self) -> str:
        return f"EnhancedPipeline({self.pipe!r})"


class EnhancedStream(Iterator):
    """
    What [`EnhancedPipeline.stream`] returns. Everything but `switch` is the pipeline's own stream.

    Args:
        stream ([`~vidtrl.inference.causal_pipeline.VideoStream`]): It.
        pipeline ([`EnhancedPipeline`]): Whose enhancer rewrites what the stream is switched to.
    """

    def __init__(self, stream: Any, pipeline: EnhancedPipeline):
        self._stream, self._pipeline = stream, pipeline

    def __next__(self) -> Any:
        return next(self._stream)

    def switch(self, prompt: Prompt, *, enhance_prompt: bool = True) -> None:
        """
        Go on with another prompt from the next block on.

        Args:
            prompt (`str` or `list[str]`): As many as there are clips.
            enhance_prompt (`bool`, *optional*, defaults to `True`): `False` leaves the prompts as they are.
        """
        self._stream.switch(self._pipeline._enhanced(prompt) if enhance_prompt else prompt)

    def __getattr__(self, name: str) -> Any:
        if name == "_stream":  # not set yet, as while unpickling
            raise AttributeError(name)
        return getattr(self._stream, name)
