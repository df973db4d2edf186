"""`vidtrl report`: one page of any run: its videos, rewards, learning curves and arguments.

DIR is the output directory of a trainer, or the completions/ or validation/ folder in it, also while the run goes on. The
page needs no network and no other file, unless its videos are linked.
"""

import argparse
import sys
import webbrowser
from collections.abc import Sequence

from .env import package_versions
from .errors import Parser, UserError


def make_parser() -> Parser:
    """The options of `vidtrl report`."""
    parser = Parser(prog="vidtrl report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "dir",
        metavar="DIR",
        help="output directory of a run, its completions/ or validation/ folder, or the output directory of vidtrl run",
    )
    parser.add_argument("--output", metavar="FILE", help="HTML file to write (default: DIR/report.html)")
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    parser.add_argument(
        "--link",
        action="store_true",
        help="link the videos relative to the page in place of embedding them; done anyway above 64 MiB of mp4",
    )
    parser.add_argument(
        "--max_videos",
        type=int,
        default=240,
        help="steps are left out evenly above so many videos, the first and the last never (default: %(default)s)",
    )
    return parser


def run(argv: Sequence[str]) -> int:
    """Write the page and print where it is."""
    args = make_parser().parse_args(argv)
    if args.max_videos < 1:
        raise UserError(f"--max_videos must be at least 1, got {args.max_videos}")
    if args.output and not args.output.lower().endswith((".html", ".htm")):
        raise UserError(f"--output {args.output!r} must be an .html file")
    from ..report.media import MAX_EMBEDDED
    from ..report.pipelines import is_pipeline, write_pipeline_report
    from ..report.runs import write_run_report

    write = write_pipeline_report if is_pipeline(args.dir) else write_run_report
    page, warnings = write(
        args.dir,
        args.output,
        max_videos=args.max_videos,
        max_embedded=0 if args.link else MAX_EMBEDDED,
        versions=package_versions(),
    )
    for text in warnings:
        print(f"vidtrl: warning: {' '.join(text.split())}", file=sys.stderr)
    print(page)
    if args.open and not webbrowser.open(page.resolve().as_uri()):
        print(f"vidtrl: warning: no browser could be started: open {page}", file=sys.stderr)
    return 0
