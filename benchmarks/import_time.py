"""How long `import vidtrl` and `vidtrl --help` take, each in fresh processes.

    python benchmarks/import_time.py

The first run of each is left out (it may read the disk). Exit code 1 if a median misses its target.
"""

import statistics
import subprocess
import sys
import time


RUNS = 7
IMPORT = "import time; t = time.perf_counter(); import vidtrl; print(time.perf_counter() - t)"
LOADED = "import sys, vidtrl; print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
HELP = [sys.executable, "-c", "import sys; from vidtrl.cli.main import main; sys.exit(main(['--help']))"]


def import_seconds() -> float:
    """`import vidtrl` inside a fresh interpreter."""
    return float(subprocess.run([sys.executable, "-c", IMPORT], check=True, capture_output=True, text=True).stdout)


def help_seconds() -> float:
    """The whole of `vidtrl --help`, the interpreter's start included."""
    start = time.perf_counter()
    subprocess.run(HELP, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> int:
    loaded = subprocess.run([sys.executable, "-c", LOADED], check=True, capture_output=True, text=True).stdout.strip()
    print(f"heavy modules loaded by `import vidtrl`: {loaded}")
    missed = loaded != "[]"
    for name, measure, target in (("import vidtrl", import_seconds, 0.5), ("vidtrl --help", help_seconds, 1.0)):
        seconds = [measure() for _ in range(RUNS + 1)][1:]
        middle = statistics.median(seconds)
        print(f"{name}: median {middle:.3f} s, slowest {max(seconds):.3f} s of {RUNS} runs (target < {target} s)")
        missed |= middle >= target
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
