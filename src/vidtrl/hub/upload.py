"""Folders to and from the Hub: what belongs to a trained model, retries, and errors that say what to do."""

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import CommitInfo, HfApi, ModelCard, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import filter_repo_objects, get_token
from transformers.utils import logging

from ..inference.distill_config import CONFIG_FILE as STUDENT_FILE
from ..prompts.enhancer import CONFIG_FILE as ENHANCER_FILE
from ..trainer.checkpoint import MANIFEST
from ..trainer.lora import ADAPTER_FILE


logger = logging.get_logger(__name__)

# of a trainer's directory, what the model is: never optimizer states, other checkpoints, caches or completions
MODEL_FILES = [
    "pytorch_lora_weights*.safetensors",
    "transformer/*",
    "transformer_2/*",
    "scheduler/*",
    "base_adapters/*",
    STUDENT_FILE,
    "training_args.json",
    MANIFEST,
]
# of the run: what its card shows, adapters of earlier stages, and TensorBoard's logs, which the Hub shows as well
PAGE_FILES = ["curves/*.png", "base_adapters/*", "runs/*"]
# never: pickles (transformers' training_args.bin holds the token), unfinished files, what is hidden
UNWANTED = [
    *("_*", "*/_*", ".*", "*/.*", "*.tmp", "*.partial"),
    *("*training_args.bin", "*.pt", "*.pth", "*.pkl"),
]
# of a model besides: training's state
LEFTOVERS = [
    *UNWANTED,
    *("checkpoint-*", "*/checkpoint-*", "last-checkpoint/*", "*optimizer*"),
    "config.yaml",  # how `vidtrl run` started a stage, with paths of this machine
]
ATTEMPTS = 3  # of a push or a pull as a whole; the client retries single requests
WAIT = 2.0  # seconds before the second attempt, doubled for the next
MAX_WAIT = 60.0


class HubError(ConnectionError):
    """The Hub could not be reached, or refused; the message says why and what to do."""


def push_to_hub(
    directory: str | os.PathLike,
    repo_id: str,
    *,
    repo_type: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """
    Upload what a trainer, [`PromptEnhancer`] or [`export_student`] saved, or a folder of videos with `metadata.jsonl` or `metadata.parquet`.

    Of a trainer's directory the model goes up (weights, configuration, scheduler, adapters of earlier stages) with its card
    and the videos and curves on it; not checkpoints, optimizer states, caches or completions. The card's code and videos are
    made to load from the repository.

    Args:
        directory (`str` or `PathLike`): What to upload; also one checkpoint.
        repo_id (`str`): `"name"` or `"organisation/name"`; created if missing.
        repo_type (`str`, *optional*): `"model"` or `"dataset"`. Default: `"dataset"` for a folder with such a file.
        private (`bool`, *optional*): Of a repository that is created; one that exists has to be private then. Default: as the
            account says.
        token (`str`, *optional*): Default: `HF_TOKEN`, or the one `hf auth login` stored.
        revision (`str`, *optional*): Branch; created if missing. Default: `main`.
        commit_message (`str`, *optional*): Title of the commit.

    Returns:
        `CommitInfo`: The commit; as a `str` its address.

    Raises:
        `ValueError`: There is nothing to upload, the card's metadata is invalid, or `private` is asked for and the repository
            is public.
        [`HubError`]: The Hub refused, or could not be reached.
    """
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        raise ValueError(f"there is no directory {os.fspath(directory)!r}: give what a trainer's save_model wrote")
    rows = any((directory / f"metadata.{name}").is_file() for name in ("jsonl", "parquet"))
    repo_type = repo_type or ("dataset" if rows else "model")
    is_dataset = repo_type == "dataset"
    api = HfApi(token=token)
    repo_id = create_repository(api, repo_id, repo_type, private, revision)
    beside = directory if os.access(directory, os.W_OK) else None  # where large files can be linked
    with tempfile.TemporaryDirectory(prefix="_push-", dir=beside) as staging:
        stage(directory, Path(staging), repo_id, revision, everything=is_dataset)
        if not is_dataset:
            add_licence(Path(staging, "README.md"), token)
        message = commit_message or f"Upload {directory.name}"
        outdated = None if is_dataset else ["validation/*"]  # samples are those on the card
        return push_folder(api, staging, repo_id, repo_type, revision, message, outdated)


def pull_from_hub(
    repo_id: str,
    directory: str | os.PathLike | None = None,
    *,
    repo_type: str = "model",
    token: str | None = None,
    revision: str | None = None,
    checkpoints: bool = False,
) -> Path:
    """
    Download a repository; what is there already and complete is not downloaded again.

    Args:
        repo_id (`str`): `"organisation/name"`.
        directory (`str` or `PathLike`, *optional*): Where to. Default: the Hub's cache.
        repo_type (`str`, *optional*, defaults to `"model"`): `"model"` or `"dataset"`.
        token (`str`, *optional*): Default: `HF_TOKEN`, or the one `hf auth login` stored.
        revision (`str`, *optional*): Branch, tag or commit.
        checkpoints (`bool`, *optional*, defaults to `False`): With the checkpoints that `hub_strategy` pushed.

    Returns:
        `Path`: Where it is.

    Raises:
        [`HubError`]: The Hub refused, or could not be reached.
    """

    def pull() -> str:
        return snapshot_download(
            repo_id,
            repo_type=repo_type,
            revision=revision,
            local_dir=directory,
            token=token,
            ignore_patterns=None if checkpoints else ["checkpoint-*", "last-checkpoint/*"],
        )

    return Path(retried(pull, f"cannot pull {repo_id}", token))


def create_repository(api: HfApi, repo_id: str, repo_type: str, private: bool | None, revision: str | None) -> str:
    """Make sure that a repository and a branch of it exist; the full id. Raises as [`check_private`]."""

    def create() -> str:
        return api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id

    full = retried(create, f"cannot create {repo_id}", api.token)
    check_private(api, full, repo_type, private)
    create_branch(api, full, repo_type, revision)
    return full


def check_private(api: HfApi, repo_id: str, repo_type: str, private: bool | None) -> None:
    """
    Refuse to publish what is meant to be private: a repository that exists keeps its visibility.

    Raises:
        `ValueError`: If `private` is asked for, and the repository is public.
        [`HubError`]: The Hub refused, or could not be reached.
    """
    if not private:
        return
    info = retried(lambda: api.repo_info(repo_id, repo_type=repo_type), f"cannot look at {repo_id}", api.token)
    if not info.private:
        kind = "" if repo_type == "model" else f"{repo_type}s/"
        raise ValueError(
            f"{repo_id} is there already and public, so nothing was uploaded to it: make it private at "
            f"{api.endpoint}/{kind}{repo_id}/settings, push to another name, or do not ask for a private one"
        )


def create_branch(api: HfApi, repo_id: str, repo_type: str, revision: str | None) -> None:
    """Make sure that a branch of an existing repository exists. Raises [`HubError`]."""
    if revision not in (None, constants.DEFAULT_REVISION):
        retried(
            lambda: api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True),
            f"cannot create the branch {revision} of {repo_id}",
            api.token,
        )


def push_folder(
    api: HfApi,
    folder: str | os.PathLike,
    repo_id: str,
    repo_type: str = "model",
    revision: str | None = None,
    commit_message: str | None = None,
    delete_patterns: list[str] | None = None,
) -> CommitInfo:
    """
    Upload all of a folder in one go. What an earlier attempt has uploaded is not sent again.

    Args:
        api (`HfApi`): Whose token is used.
        folder (`str` or `PathLike`): All of it.
        repo_id (`str`): An existing repository.
        repo_type (`str`, *optional*, defaults to `"model"`): `"model"` or `"dataset"`.
        revision (`str`, *optional*): An existing branch.
        commit_message (`str`, *optional*): Title of the commit.
        delete_patterns (`list[str]`, *optional*): What to delete of the repository, where the folder has no such file.

    Returns:
        `CommitInfo`: The commit; as a `str` its address.

    Raises:
        [`HubError`]: The Hub refused, or could not be reached.
    """

    def push() -> CommitInfo:
        return api.upload_folder(
            repo_id=repo_id,
            repo_type=repo_type,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            delete_patterns=delete_patterns,
        )

    return retried(push, f"cannot push to {repo_id}", api.token)


def retried(action: Callable[[], Any], what: str, token: str | bool | None = None) -> Any:
    """Do it, again after what a second attempt may mend; else a [`HubError`]."""
    wait = WAIT
    for attempt in range(ATTEMPTS):
        try:
            return action()
        except (HTTPError, OSError, RuntimeError) as error:  # the client wraps failed uploads in a RuntimeError
            cause = _cause(error)
            if cause is None:
                raise
            if not _may_pass(cause) or attempt == ATTEMPTS - 1:
                # not `from error`, whose texts may hold what must not be logged
                raise HubError(hide_tokens(f"{what}: {explain(cause)}", token)) from None
            again = min(_retry_after(cause) or wait, MAX_WAIT)
            logger.warning(hide_tokens(f"{what}: {explain(cause)}; trying again in {again:g} s", token))
        time.sleep(again)
        wait *= 2


def _cause(error: BaseException | None) -> BaseException | None:
    """The answer of the Hub, or the network's failure, behind an error; `None` if it has to do with neither."""
    while error is not None:
        if isinstance(error, (HTTPError, ConnectionError)):
            return error
        error = error.__cause__
    return None


def _status(error: BaseException) -> int | None:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _may_pass(error: BaseException) -> bool:
    return _status(error) in (None, 408, 429, 500, 502, 503, 504)


def _retry_after(error: BaseException) -> float | None:
    value = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return float(value) if value.isdigit() else None


def explain(error: BaseException) -> str:
    """One line on what went wrong and what to do."""
    status = _status(error)
    said = f" The Hub says: {error.server_message}" if status and getattr(error, "server_message", None) else ""
    advice = {
        400: "the Hub does not accept this.",
        401: "the token is missing or not valid, or there is no such repository (of private ones the Hub says the same): "
        "log in with `hf auth login`, or set HF_TOKEN.",
        403: "the token may not do this: log in with another one (`hf auth login`). A push needs write access to the "
        "namespace; a gated repository asks for its terms to be accepted on its page.",
        404: "there is no such repository, file or revision, or it is private and the token may not read it.",
        409: "the repository is being changed by somebody else.",
        413: "it is too large for the Hub.",
        429: "the Hub limits how often it can be asked: try again later.",
    }
    if status is not None:
        default = "the Hub is out of order: try again later." if status >= 500 else "the Hub refuses."
        return f"{advice.get(status, default)} ({status}){said}"
    return f"the connection to {constants.ENDPOINT} failed ({type(error).__name__}: {error}): check the network"


def hide_tokens(text: str, token: str | bool | None = None) -> str:
    """The text without tokens."""
    for secret in (token, get_token()):
        if isinstance(secret, str) and secret:
            text = text.replace(secret, "***")
    return re.sub(r"\bhf_\w{8,}", "***", text)


# ---- What goes up ----


def stage(
    directory: Path,
    staging: Path,
    repo_id: str,
    revision: str | None = None,
    *,
    page: Path | None = None,
    everything: bool = False,
) -> None:
    """
    Put what is to be uploaded into `staging`, where no training can change it any more. Large files are linked.

    Args:
        directory (`Path`): Whose weights: a trainer's directory, a checkpoint, an enhancer, a pipeline.
        staging (`Path`): An empty directory.
        repo_id (`str`): Where the card's code is to load from.
        revision (`str`, *optional*): Of the repository.
        page (`Path`, *optional*): Whose card. Default: `directory`, or of a checkpoint its run's.
        everything (`bool`, *optional*, defaults to `False`): All files but `UNWANTED`, as of a dataset.

    Raises:
        `ValueError`: There is no model.
    """
    names = [str(p.relative_to(directory).as_posix()) for p in sorted(directory.rglob("*")) if p.is_file()]
    enhancer, pipeline = (directory / ENHANCER_FILE).is_file(), (directory / "model_index.json").is_file()
    if enhancer:  # in whose folders are the steps of its training
        names = [name for name in names if "/" not in name]
    if everything or enhancer or pipeline:
        names = list(filter_repo_objects(names, ignore_patterns=UNWANTED if everything else LEFTOVERS))
    else:
        weights = list(filter_repo_objects(names, allow_patterns=[*MODEL_FILES[:3]]))
        if not weights:
            raise ValueError(
                f"there is no trained model in {os.fspath(directory)!r}: neither pytorch_lora_weights.safetensors nor "
                "transformer/, model_index.json, prompt_enhancer.json or (of a dataset) metadata.jsonl"
            )
        names = list(filter_repo_objects(names, allow_patterns=MODEL_FILES, ignore_patterns=LEFTOVERS))
    for name in names:
        place(directory / name, staging / name)
    if everything:
        return
    _rename_base_adapters(staging)
    if page is None:
        page = directory.parent if directory.name.startswith("checkpoint-") else directory
    card = page / "README.md"
    if not card.is_file():
        logger.warning(f"there is no README.md in {page}: the repository has no card")
        return
    text = card.read_text(encoding="utf-8")
    shown = [p.relative_to(page).as_posix() for p in sorted(page.rglob("*")) if p.is_file()]
    brought = (staging / "base_adapters").exists()
    for name in [*filter_repo_objects(shown, allow_patterns=PAGE_FILES, ignore_patterns=LEFTOVERS), *_media(text)]:
        if brought and name.startswith("base_adapters/"):
            continue
        if (page / name).is_file() and not (staging / name).exists():
            place(page / name, staging / name, copy=True)
    (staging / "README.md").unlink(missing_ok=True)  # may be a link to the file that is being read
    (staging / "README.md").write_text(card_for(text, repo_id, revision), encoding="utf-8")


def _rename_base_adapters(folder: Path) -> None:
    """Of several `pytorch_lora_weights.safetensors` in a repository, in whatever folders, `load_lora_weights(id)` takes the
    first: only the adapter that was trained may have that name, not those of earlier stages that a student brings along."""
    renamed = {}
    for path in folder.glob(f"base_adapters/*/{ADAPTER_FILE}"):
        path.rename(path.with_name("transformer.safetensors"))
        renamed[path.parent.relative_to(folder).as_posix()] = "transformer.safetensors"
    config = folder / STUDENT_FILE
    if renamed and config.is_file():
        values = json.loads(config.read_text(encoding="utf-8"))
        values["base_adapters"] = [f"{a}/{renamed[a]}" if a in renamed else a for a in values["base_adapters"]]
        config.unlink()  # a link to the file that training wrote
        config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def place(source: Path, target: Path, copy: bool = False) -> None:
    """Link (or, where that cannot be, copy) a file. Only files that are replaced, never rewritten, may be linked."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not copy:
        try:
            os.link(source, target)
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copyfile(source, target)


def add_licence(card: Path, token: str | None = None) -> None:
    """Where a card states no licence, that of the base model on the Hub that it names. Asks the Hub."""
    from .model_card import licence_of

    if not card.is_file():
        return
    loaded = ModelCard.load(card, ignore_metadata_errors=True)
    base = loaded.data.base_model
    if loaded.data.license is None and isinstance(base, str):
        for name, value in licence_of(base, token).items():
            setattr(loaded.data, name, value)
        loaded.save(card)


MARKER = re.compile(r'<!-- vidtrl: the code above loads from ("(?:[^"\\]|\\.)*") -->')
_VIDEO = re.compile(r'(<video [^>]*src=")(?!https?:)(?:\./)?([^"]+)(")')


def _media(text: str) -> list[str]:
    """Paths of the videos that a card shows, those outside its directory left out."""
    paths = [match[2] for match in _VIDEO.finditer(text)]
    return [p for p in paths if not p.startswith("/") and ".." not in Path(p).parts]


def card_for(text: str, repo_id: str, revision: str | None = None) -> str:
    """
    A card whose code loads from the repository, and whose videos the Hub's page plays.

    The page takes videos by their full address; the gallery's paths (`widget`) may stay relative.

    Args:
        text (`str`): The card.
        repo_id (`str`): Where it will be.
        revision (`str`, *optional*): Of that.
    """
    if (marker := MARKER.search(text)) is not None:
        before = json.loads(marker[1])
        for spelling in (marker[1], json.dumps(before)):
            text = text.replace(spelling, f'"{repo_id}"')
        text = re.sub(rf"{re.escape(f'{constants.ENDPOINT}/{before}/resolve/')}[^/\"]+/", "", text)
        if before.startswith("/"):  # what has no loader in diffusers is loaded by its path
            inside = re.compile(rf'"{re.escape(before)}/([^"]+)"')
            text = inside.sub(rf'hf_hub_download("{repo_id}", "\g<1>")', text)
    text = text.replace('"PATH_OR_REPOSITORY"', f'"{repo_id}"')
    branch = quote(revision or constants.DEFAULT_REVISION, safe="")  # as of a name with a slash
    base = f"{constants.ENDPOINT}/{repo_id}/resolve/{branch}/"
    return _VIDEO.sub(rf"\g<1>{base}\g<2>\g<3>", text)
