"""Uploads of a run that is under way: they never block it, and never fail in silence."""

import os
import shutil
import tempfile
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import CommitInfo, HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress, logging

from .upload import add_licence, create_branch, place, push_folder, stage


if TYPE_CHECKING:
    from ..trainer.base_trainer import VideoTrainer


logger = logging.get_logger(__name__)


class Pusher:
    """
    Uploads what a trainer has saved, in the background, in the order in which it was saved.

    What is uploaded is set aside at once (large files as links), so that neither the next save nor `save_total_limit` changes
    it on the way. An upload that fails for good is a warning and no more: the next save uploads again.

    Args:
        output_dir (`str` or `PathLike`): The run's directory, with the card.
        repo_id (`str`): Where to; it exists.
        token (`str`, *optional*): Default: `HF_TOKEN`, or the one `hf auth login` stored.
        revision (`str`, *optional*): Branch; created if missing.

    Raises:
        [`HubError`]: The branch cannot be created.
    """

    def __init__(
        self, output_dir: str | os.PathLike, repo_id: str, token: str | None = None, revision: str | None = None
    ):
        self.output_dir, self.repo_id, self.revision = Path(output_dir), repo_id, revision
        self.api = HfApi(token=token)
        create_branch(self.api, repo_id, "model", revision)

    def clear(self) -> None:
        """Remove what a run that was killed had set aside."""
        for leftover in self.output_dir.glob("_push-*"):
            shutil.rmtree(leftover)

    def submit(
        self, weights: Path, commit_message: str, checkpoint: str | None = None, watched: bool = True
    ) -> "Future[CommitInfo]":
        """
        Upload a model with the run's card.

        Args:
            weights (`Path`): Whose weights: a checkpoint, or `output_dir`.
            commit_message (`str`): Title of the commit.
            checkpoint (`str`, *optional*): Where in the repository to put the whole of `weights` as well, optimizer states
                and all, to resume from.
            watched (`bool`, *optional*, defaults to `True`): Whether somebody asks the future how it went; else a failure is
                a warning.

        Returns:
            `Future`: Of the commit; raises [`HubError`].
        """
        self.output_dir.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix="_push-", dir=self.output_dir))
        try:
            stage(weights, staging, self.repo_id, self.revision, page=self.output_dir)
            if checkpoint is not None:
                for path in sorted(weights.rglob("*")):
                    if path.is_file():
                        place(path, staging / checkpoint / path.relative_to(weights))
        except BaseException:
            shutil.rmtree(staging)
            raise
        # the samples are those on the card; of the last checkpoint, no file of an earlier one stays
        outdated = ["validation/*", *(["last-checkpoint/*"] if checkpoint == "last-checkpoint" else [])]

        def push() -> CommitInfo:
            try:
                add_licence(staging / "README.md", self.api.token)
                return push_folder(
                    self.api, staging, self.repo_id, "model", self.revision, commit_message, delete_patterns=outdated
                )
            except Exception as error:
                if not watched:
                    logger.warning(
                        f"not uploaded: {commit_message!r}: {error}. Training goes on, and the next save uploads again."
                    )
                raise
            finally:
                shutil.rmtree(staging)

        return self.api.run_as_future(push)


def push_checkpoint(trainer: "VideoTrainer", checkpoint: Path) -> None:
    """
    Upload a checkpoint in the background, as `hub_strategy` says. Call on the main process only.

    Args:
        trainer ([`VideoTrainer`]): Whose run it is; its `push_in_progress` holds what is under way.
        checkpoint (`Path`): The directory.
    """
    args, strategy = trainer.args, trainer.args.hub_strategy
    if strategy == HubStrategy.END:
        return
    step = f"step {trainer.state.global_step}"
    busy = trainer.push_in_progress is not None and not trainer.push_in_progress.is_done()
    if busy and not args.hub_always_push:
        logger.warning(
            f"{step} is not uploaded: the upload of an earlier one is still under way (hub_always_push=True queues it)"
        )
        return
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    trainer.create_model_card()
    paths = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
    job = trainer.pusher.submit(checkpoint, f"Training in progress, {step}", paths.get(strategy), watched=False)
    trainer.push_in_progress = PushInProgress([*(trainer.push_in_progress.jobs if busy else []), job])
