"""A diffusers pipeline that enhances prompts before it encodes them."""

from typing import Any

from .enhancer import Enhancement, PromptEnhancer


class EnhancedPipeline:
    """
    What [`PromptEnhancer.wrap`] returns: the pipeline, with its prompts enhanced on the way in. Everything but the call is
    the pipeline's own (`wrapped.vae`, `wrapped.load_lora_weights(...)`).

    Args:
        pipe (`DiffusionPipeline`): Called with the enhanced prompt. Its negative prompt and given embeddings pass
            unchanged.
        enhancer ([`PromptEnhancer`]): Rewrites the prompts.

    Attributes:
        enhancements (`list[Enhancement]`): What became of the prompts of the last call; empty if it enhanced none.
    """

    def __init__(self, pipe: Any, enhancer: PromptEnhancer):
        self.pipe, self.enhancer = pipe, enhancer
        self.enhancements: list[Enhancement] = []

    def __call__(self, prompt: str | list[str] | None = None, *, enhance_prompt: bool = True, **kwargs) -> Any:
        """
        Args:
            prompt (`str` or `list[str]`, *optional*): What users wrote.
            enhance_prompt (`bool`, *optional*, defaults to `True`): `False` leaves the prompts as they are.
            **kwargs: For the pipeline.

        Returns:
            What the pipeline returns.
        """
        self.enhancements = []
        if prompt is None:
            return self.pipe(**kwargs)
        if enhance_prompt:
            self.enhancements = self.enhancer.enhance([prompt] if isinstance(prompt, str) else prompt)
            texts = [e.text for e in self.enhancements]
            prompt = texts[0] if isinstance(prompt, str) else texts
        return self.pipe(prompt=prompt, **kwargs)

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
