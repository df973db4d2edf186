"""`vidtrl compare`: blinded Good/Same/Bad comparison of two folders of videos, in the browser.

Clips are paired by prompt and shown in random order, without saying which is which. Votes are on disk as soon as they
are given: stop with Ctrl-C, and the same command goes on. A and B are folders of mp4 files: videos/NAME of `vidtrl demo`,
completions/ or validation/step_N of a trainer, or any folder with a metadata.jsonl of {"file_name", "prompt"}.
"""

import argparse
import errno
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..report.compare import AXES, VOTES_FILE, Comparison, Gsb, export_preferences, gsb, read_votes
from ..report.compare_server import CompareServer
from .errors import Parser, UserError


def make_parser() -> Parser:
    """The options of `vidtrl compare`."""
    parser = Parser(prog="vidtrl compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", metavar="A", nargs="?", help="folder of videos; good means that A is better")
    parser.add_argument("b", metavar="B", nargs="?", help="folder of videos of the same prompts")
    parser.add_argument("--output", default="compare", help="folder of the votes, one a rater (default: %(default)s)")
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1 (default: a free one)")
    parser.add_argument("--seed", type=int, help="of the order of pairs and videos (default: drawn, then kept)")
    parser.add_argument(
        "--results", action="store_true", help="print what the votes in --output say, and exit; needs no A and B"
    )
    parser.add_argument(
        "--export", metavar="DIR", help="write the preferences as a dataset of prompt, chosen and rejected, and exit"
    )
    parser.add_argument(
        "--axis",
        choices=(*AXES, "overall"),
        default="overall",
        help="what decides in --export; overall is the majority of the axes (default: %(default)s)",
    )
    return parser


def print_results(names: tuple[str, str], results: Mapping[str, Gsb], done: int, total: int, console: Console) -> None:
    """The GSB table, one row an axis."""
    a, b = map(escape, names)
    table = Table(title=f"{done} of {total} pairs judged on every axis", title_justify="left")
    table.add_column("axis", no_wrap=True)
    for title in (f"G: {a} better", "S: same", f"B: {b} better", "GSB (95 % interval)"):
        table.add_column(title, justify="right", overflow="fold")
    for axis, (good, same, bad, value) in results.items():
        number = "-" if value is None else f"{value.value:+.2f} ({value.low:+.2f} to {value.high:+.2f})"
        table.add_row(axis.replace("_", " "), str(good), str(same), str(bad), number)
    console.print(table)
    console.print(
        f"GSB = (G - B) / (G + S + B), above 0 where {a} is preferred; bootstrap over prompts.", highlight=False
    )


def run(argv: Sequence[str]) -> int:
    """Serve the comparison until Ctrl-C, or print or export what it has."""
    args, console = make_parser().parse_args(argv), Console()
    if not 0 <= args.port <= 65535:
        raise UserError(f"--port is a number from 0 to 65535, not {args.port}")
    if args.results or args.export is not None:
        names, pairs = read_votes(args.output)
    if args.results:
        print_results(
            names, {axis: gsb(pairs, axis) for axis in AXES}, sum(p.done for p in pairs), len(pairs), console
        )
        if args.export is None:
            return 0
    if args.b is None:
        raise UserError("give two folders of videos: vidtrl compare A B")
    comparison = Comparison(args.a, args.b, args.output, args.seed)
    total = len(comparison.pairs)
    for name, alone in zip(comparison.names, (comparison.unpaired_a, comparison.unpaired_b), strict=True):
        if alone:
            some = f"{', '.join(alone[:3])}{', ...' if len(alone) > 3 else ''}"
            console.print(
                escape(f"{len(alone)} clips of {name} have no partner and are left out: {some}"), highlight=False
            )
    if args.export is not None:
        folder, rows, ties = export_preferences(comparison, args.export, args.axis)
        console.print(escape(f"{rows} preferences in {folder}, {ties} ties left out"), highlight=False)
        return 0
    _serve(comparison, args.port, console)
    with comparison.lock:  # a vote under way is written first
        print_results(comparison.names, comparison.results(), comparison.num_done, total, console)
    return 0


def _serve(comparison: Comparison, port: int, console: Console) -> None:
    """Until Ctrl-C."""
    try:
        server = CompareServer(comparison, port)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise UserError(
            f"port {port} cannot be had ({error.strerror}): choose another --port, or leave it out"
        ) from None
    votes = comparison.output / VOTES_FILE
    console.print(
        escape(f"{len(comparison.pairs)} pairs, {comparison.num_done} judged. Votes go to {votes}. Ctrl-C ends."),
        highlight=False,
    )
    print(f"Open {server.url}", flush=True)  # plain, so that a narrow terminal does not break the address
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    finally:
        server.server_close()
