"""How long `microscale --help` takes beside `python -c pass`: python benchmarks/help_time.py."""

import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import microscale": ["-c", "import microscale"],
    "microscale --help": ["-m", "microscale", "--help"],
}
REPEATS = 15
LIMIT = 0.3


def seconds(arguments: list[str]) -> float:
    """Run the interpreter once and return the time it took."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Print median and slowest of interleaved runs; fail where help misses its limit."""
    rounds = [[seconds(command) for command in COMMANDS.values()] for _ in range(REPEATS + 1)]
    for name, times in zip(COMMANDS, zip(*rounds[1:], strict=True), strict=True):
        middle = statistics.median(times)
        print(f"{name:18} median {middle:.3f} s, slowest {max(times):.3f} s")
    if middle > LIMIT:
        sys.exit(f"--help takes {middle:.3f} s; the limit is {LIMIT} s")


if __name__ == "__main__":
    main()
