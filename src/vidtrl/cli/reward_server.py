r"""`vidtrl reward-server`: serve reward functions over HTTP, so that a judge has a device of its own.

    vidtrl reward-server --reward motion-magnitude
    vidtrl reward-server --reward judges.py:get_judge --kwargs '{"model_id": "Qwen/Qwen3-VL-8B-Instruct"}'
    VIDTRL_REWARD_TOKEN=... vidtrl reward-server --reward my_rewards:smooth --host 0.0.0.0 --port 8000

A trainer uses it as `--reward_funcs http://host:8000`, or as `RemoteReward("http://host:8000")` in Python. SIGTERM and Ctrl-C
let running requests finish; a second one ends at once.
"""

import argparse
import errno
import importlib.util
import inspect
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from .errors import Parser, UserError
from .grpo import resolve_reward


TOKEN_VARIABLE = "VIDTRL_REWARD_TOKEN"


def make_parser() -> Parser:
    """The options of `vidtrl reward-server`."""
    parser = Parser(
        prog="vidtrl reward-server", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--reward",
        nargs="+",
        required=True,
        metavar="REWARD",
        help="built-in name, module:function or path/to/file.py:function. Several have different names; which one is meant "
        "stands behind # in a client's URL",
    )
    parser.add_argument(
        "--kwargs", type=_json_object, help="JSON object: REWARD is a factory, called with these to make the function"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="interface; any but a loopback one needs a token (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    parser.add_argument(
        "--token_file", metavar="FILE", help=f"file with the token that clients must send; else ${TOKEN_VARIABLE}"
    )
    parser.add_argument("--tls_cert", metavar="FILE", help="certificate (PEM), for https")
    parser.add_argument("--tls_key", metavar="FILE", help="its private key (PEM)")
    parser.add_argument("--device", help="where the function gets its videos (default: the GPU if there is one)")
    parser.add_argument(
        "--batch_size", type=int, default=0, help="join waiting requests into calls of up to so many videos"
    )
    parser.add_argument(
        "--max_body_mb", type=int, default=1024, help="size of a request in MiB (default: %(default)s)"
    )
    parser.add_argument("--max_queue", type=int, default=16, help="requests in memory at once (default: %(default)s)")
    parser.add_argument(
        "--read_timeout", type=float, default=120.0, help="seconds for a request to arrive (default: %(default)s)"
    )
    parser.add_argument(
        "--request_timeout", type=float, default=600.0, help="seconds for waiting and scoring (default: %(default)s)"
    )
    parser.add_argument(
        "--grace", type=float, default=60.0, help="seconds that running requests get at the end (default: %(default)s)"
    )
    parser.add_argument("--tracebacks", action="store_true", help="send clients the traceback of a function's error")
    return parser


def load_reward(name: str, kwargs: dict | None = None) -> tuple[str, Callable]:
    """
    A reward function for the server, and the name under which it is served.

    Args:
        name (`str`): A built-in reward, `module:function`, or `path/to/file.py:function`.
        kwargs (`dict`, *optional*): Call what `name` stands for with these; what it returns is the function.

    Returns:
        `tuple[str, Callable]`: Name and function.

    Raises:
        [`UserError`]: If there is no such module, file or function, or it does not take `kwargs`.
    """
    from ..rewards import get_reward
    from ..rewards.builtin import is_url

    if is_url(name):
        raise UserError(f"{name!r} is a reward server already: give clients its address")
    path, colon, function = name.rpartition(":")
    if colon and path.endswith(".py"):
        found = _from_file(Path(path), function)
    else:
        found = resolve_reward(name)
    if isinstance(found, str):
        if kwargs is not None:
            raise UserError(
                f"--kwargs are for a factory of yours: bind the settings of {name!r} in a function in a file"
            )
        return name, get_reward(name)
    if kwargs is not None:
        try:
            inspect.signature(found).bind(**kwargs)
        except TypeError as error:
            raise UserError(f"--kwargs do not fit {name!r}: {error}") from error
        found = found(**kwargs)
        if not callable(found):
            raise UserError(f"{name!r} called with --kwargs returned {type(found).__name__}, not a reward function")
    return function, found


def _from_file(path: Path, function: str) -> Callable:
    if not path.is_file():
        raise UserError(f"there is no file {str(path)!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickling in the file look for it there
    sys.path.insert(0, str(path.parent.resolve()))  # as `python file.py` does
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        names = ", ".join(name for name, value in vars(module).items() if inspect.isfunction(value)) or "none"
        raise UserError(f"{str(path)!r} has no function {function!r}; it has {names}")
    return getattr(module, function)


def read_token(token_file: str | None) -> str | None:
    """The token from a file or the environment, from which it is removed: reward functions need not see it."""
    token = os.environ.pop(TOKEN_VARIABLE, None)
    if token_file is not None:
        try:
            token = Path(token_file).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--token_file {token_file!r} cannot be read: {error.__class__.__name__}") from None
        if not token:
            raise UserError(f"--token_file {token_file!r} is empty")
    return token or None


def run(argv: Sequence[str]) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    args = make_parser().parse_args(argv)
    if not 0 <= args.port <= 65535:
        raise UserError(f"--port is a number from 0 to 65535, not {args.port}")
    if (args.tls_cert is None) != (args.tls_key is None):
        raise UserError("--tls_cert and --tls_key go together")
    if args.kwargs is not None and len(args.reward) > 1:
        raise UserError("--kwargs are for one --reward: start one server for each")
    token = read_token(args.token_file)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    from ..rewards import RewardServer

    rewards: dict[str, Callable] = {}
    for spec in args.reward:
        name, function = load_reward(spec, args.kwargs)
        if name in rewards:
            raise UserError(f"two rewards are named {name!r}: give one of the functions another name")
        rewards[name] = function
    try:
        server = RewardServer(
            rewards,
            host=args.host,
            port=args.port,
            token=token,
            device=args.device,
            max_body=args.max_body_mb << 20,
            max_queue=args.max_queue,
            batch_size=args.batch_size,
            read_timeout=args.read_timeout,
            request_timeout=args.request_timeout,
            tracebacks=args.tracebacks,
            tls=(args.tls_cert, args.tls_key) if args.tls_cert else None,
        )
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL):
            raise
        raise UserError(f"{args.host} port {args.port} cannot be had ({error.strerror}): choose another") from None

    stop = threading.Event()

    def end(number, frame):
        if stop.is_set():
            os._exit(128 + number)  # the second time: a function that never returns must not keep the process
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    server.start()
    guard = "token required" if token else "no token"
    print(
        f"Serving {', '.join(rewards)} on {server.url} ({guard}, videos on {server.device}). Ctrl-C ends.", flush=True
    )
    while not stop.wait(1.0):  # a wait without end would not let Windows see Ctrl-C
        pass
    server.send_away()  # before the line that says so
    print("Stopping; running requests may finish.", flush=True)
    if not server.stop(args.grace):
        print(f"Requests were still running after {args.grace:g} s.", flush=True)
    return 0


def _json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object, such as '{\"threshold\": 0.5}'")
    return value
