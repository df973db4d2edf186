"""`vidtrl pull`: download a model or a dataset from the Hub into a folder.

A connection that drops is taken up where it broke. Files that are complete are not downloaded again.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from .errors import Parser, UserError


MARK = Path(".cache", "vidtrl.json")  # in the folder, beside the client's own notes: what was pulled into it


def make_parser() -> Parser:
    """The options of `vidtrl pull`."""
    parser = Parser(prog="vidtrl pull", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo", metavar="REPO", help="OWNER/NAME")
    parser.add_argument("directory", metavar="DIR", nargs="?", help="where to (default: NAME, in this folder)")
    parser.add_argument("--revision", help="branch, tag or commit (default: main)")
    parser.add_argument("--dataset", action="store_true", help="it is a dataset")
    parser.add_argument("--checkpoints", action="store_true", help="with the checkpoints that hub_strategy pushed")
    return parser


def run(argv: Sequence[str]) -> int:
    """Download, and print where it is."""
    args = make_parser().parse_args(argv)
    from ..hub import pull_from_hub

    repo_type = "dataset" if args.dataset else "model"
    directory = Path(args.directory or args.repo.rsplit("/", 1)[-1])
    mark, this = directory / MARK, {"repo": args.repo, "type": repo_type}
    if args.directory is None:
        refuse_other(directory, mark, this)
    try:
        path = pull_from_hub(
            args.repo, directory, repo_type=repo_type, revision=args.revision, checkpoints=args.checkpoints
        )
    finally:  # one that broke off goes on as well
        if args.directory is None and directory.is_dir():
            mark.parent.mkdir(exist_ok=True)
            mark.write_text(json.dumps(this), encoding="utf-8")
    print(path)
    return 0


def refuse_other(directory: Path, mark: Path, this: dict[str, str]) -> None:
    """What is in a folder that nobody has named stays as it is, unless it came from the same repository."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not mark.is_file() or json.loads(mark.read_text(encoding="utf-8")) != this:
        raise UserError(
            f"{str(directory)!r} is here already, and not from an earlier pull of {this['repo']}: name another folder, as in "
            f"`vidtrl pull {this['repo']} DIR` (or this one, to download into it)"
        )
