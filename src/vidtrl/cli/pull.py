"""`vidtrl pull`: download a model or a dataset from the Hub into a folder.

A connection that drops is taken up where it broke. Files that are complete are not downloaded again.
"""

import argparse
from collections.abc import Sequence

from .errors import Parser


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

    path = pull_from_hub(
        args.repo,
        args.directory or args.repo.rsplit("/", 1)[-1],
        repo_type="dataset" if args.dataset else "model",
        revision=args.revision,
        checkpoints=args.checkpoints,
    )
    print(path)
    return 0
