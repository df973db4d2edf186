"""What the tests with several processes share: a port, the environment of each rank, and why one of them failed."""

import contextlib
import random
import re
import socket


def free_port() -> int:
    """A port that no connection of other tests is given while processes start, for seconds."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)  # below Linux's ephemeral ones; tests seed `random`
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def ranks(number: int, **environment: str) -> list[dict[str, str]]:
    """The environment that torchrun would give each of so many processes; of one alone, none."""
    if number == 1:
        return [{}]
    common = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(number), **environment)
    return [{**common, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(number)]


def finish(started, code: int = 0, timeout: float = 600) -> list[str]:
    """The logs of processes, of what a worker's `start` returns of each, that have all ended with this exit code."""
    for process, _ in started:
        process.join(timeout=timeout)
    logs = [log.read_text() for _, log in started]
    codes = [process.exitcode for process, _ in started]
    assert codes == [code] * len(codes), f"exit codes {codes}\n" + "\n".join(map(errors, logs))
    return logs


def errors(log: str, characters: int = 2500) -> str:
    """
    The end of each traceback in a log, a rank's that failed and those of the ranks that lost their connection to it.

    A launcher's own traceback, which comes last and says only that a rank has failed, is left out.
    """
    log = "\n".join(line for line in log.split("\n") if "warn" not in line.lower())
    pieces = re.split(r"^(?=(?:\[rank\d+\]: )?Traceback \(most recent call last\):$)", log, flags=re.MULTILINE)
    found = [p for p in pieces[1:] if "ChildFailedError" not in p] or [log]
    return "\n...\n".join(piece[-characters:] for piece in found)
