"""Datasets for the stock trainers of TRL."""

from collections.abc import Iterable
from typing import Any

from datasets import Dataset

from .enhancer import PromptEnhancer
from .rewards import USER_PROMPT


def pairs_dataset(enhancer: PromptEnhancer, rows: Dataset | Iterable[dict[str, Any]]) -> Dataset:
    """
    Pairs for `trl.SFTTrainer`, in its prompt-completion format: the loss is on the completion alone.

    Args:
        enhancer ([`PromptEnhancer`]): Its template frames the prompts, as at inference.
        rows (`Dataset` or `Iterable[dict]`): Columns `prompt` (what a user wrote) and `enhanced`. Others are dropped.

    Returns:
        `Dataset`: Columns `prompt` and `completion`, conversational for a chat model.

    Raises:
        `ValueError`: If a column is missing, a pair is empty, or an enhanced prompt loses what it must keep: a model would
            learn it.
    """
    pairs = []
    for index, row in enumerate(rows):
        _require(row, "prompt", "enhanced")
        prompt, enhanced = row["prompt"], row["enhanced"].strip()
        judged = enhancer.judge(prompt, enhanced)
        if not prompt.strip() or not judged.enhanced:
            reason = judged.reason or "the prompt is empty"
            raise ValueError(f"pair {index} ({prompt!r}) is no example to learn from: {reason}. Mend or drop it.")
        completion = [{"role": "assistant", "content": enhanced}] if enhancer.is_chat else f" {enhanced}"
        pairs.append({"prompt": enhancer.format(prompt), "completion": completion})
    return Dataset.from_list(pairs)


def prompts_dataset(enhancer: PromptEnhancer, rows: Dataset | Iterable[dict[str, Any]]) -> Dataset:
    """
    Prompts for `trl.GRPOTrainer`.

    Args:
        enhancer ([`PromptEnhancer`]): Its template frames the prompts.
        rows (`Dataset` or `Iterable[dict]`): Column `prompt` (what a user wrote); the others reach the rewards.

    Returns:
        `Dataset`: `prompt` as the model sees it, `user_prompt` as its user wrote it, and the other columns.

    Raises:
        `ValueError`: If the column is missing or a prompt is empty.
    """
    framed = []
    for index, row in enumerate(rows):
        _require(row, "prompt")
        if not row["prompt"].strip():
            raise ValueError(f"prompt {index} is empty: drop it")
        framed.append({**row, "prompt": enhancer.format(row["prompt"]), USER_PROMPT: row["prompt"]})
    return Dataset.from_list(framed)


def _require(row: dict[str, Any], *columns: str) -> None:
    for column in columns:
        if not isinstance(row.get(column), str):
            raise ValueError(f"the dataset needs a column {column!r} of strings; it has {', '.join(sorted(row))}")
