"""`vidtrl push`: upload a trained model, an enhancer, a student or a dataset of videos to the Hub.

Of a trainer's folder the model goes up with its card, videos and curves; not checkpoints, optimizer states or caches. A folder
of videos with a metadata.jsonl or metadata.parquet (completions/ of a trainer, what `vidtrl compare --export` wrote) becomes a dataset.

The token is that of `hf auth login`, or HF_TOKEN; it is no option, because options are seen by others and kept in histories.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from .errors import Parser, UserError


KINDS = ("model", "rollouts", "preferences", "sft")


def make_parser() -> Parser:
    """The options of `vidtrl push`."""
    parser = Parser(prog="vidtrl push", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIR", help="what was saved; also one checkpoint of a run")
    parser.add_argument("repo", metavar="REPO", help="NAME or OWNER/NAME; created if missing")
    parser.add_argument(
        "--private",
        action="store_true",
        help="a repository that is created is private; one that is public already is an error",
    )
    parser.add_argument("--revision", help="branch; created if missing (default: main)")
    parser.add_argument("--message", help="title of the commit")
    parser.add_argument("--kind", choices=KINDS, help="what it is (default: as its files say)")
    parser.add_argument("--steps", nargs="+", type=int, metavar="STEP", help="rollouts: only these steps")
    return parser


def run(argv: Sequence[str]) -> int:
    """Upload, and print the commit's address."""
    args = make_parser().parse_args(argv)
    kind = args.kind or _kind(Path(args.directory).expanduser())
    if args.steps is not None and kind != "rollouts":
        raise UserError("--steps is for rollouts: completions/ of a trainer")
    from .. import hub

    options = {
        "private": args.private or None,
        "revision": args.revision,
        "commit_message": args.message,
    }
    if kind == "model":
        commit = hub.push_to_hub(args.directory, args.repo, repo_type="model", **options)
    elif kind == "rollouts":
        commit = hub.push_rollouts(args.directory, args.repo, steps=args.steps, **options)
    else:
        push = hub.push_preferences if kind == "preferences" else hub.push_sft
        commit = push(args.directory, args.repo, **options)
    print(commit.commit_url)
    return 0


def _kind(directory: Path) -> str:
    """By the columns of its rows, if it has any."""
    from ..hub.datasets import metadata_file

    path = metadata_file(directory)
    if path is None:
        return "model"
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        columns = pq.read_schema(path).names
    else:
        with open(path, encoding="utf-8") as file:
            try:
                columns = json.loads(file.readline() or "{}")
            except ValueError as error:
                raise UserError(
                    f"the first line of {str(path)!r} is no JSON ({error}): write it again, or give --kind"
                ) from error
    if "chosen_file_name" in columns:
        return "preferences"
    return "rollouts" if "advantage" in columns else "sft"
