"""List the benchmarks and run the quick ones: `python -m benchmarks [--list] [--all]`."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.harness import BACKENDS, ROOT

EACH_BACKEND = "{backend}"
# (command, quick): what takes more than minutes, or makes an environment, runs with --all.
COMMANDS: tuple[tuple[str, bool], ...] = (
    ("compile_time", True),
    ("handwritten --workload W1 --steps 1 --order 2 --budget 10 --backend {backend}", True),
    ("scaling --quick --budget 10 --backend {backend}", True),
    ("loop --budget 10", True),
    ("eager_loop", True),
    ("distributed", False),
    ("ivy_comparison", False),
    ("peers", False),
    ("handwritten --workload W1 --backend {backend}", False),
    ("handwritten --workload W2 --backend {backend}", False),
    ("scaling --backend {backend}", False),
    ("memory --backend {backend}", False),
    ("attention --backend {backend}", False),
    ("long_loops --backend {backend}", False),
)


def commands(everything: bool) -> Iterator[str]:
    for command, quick in COMMANDS:
        if everything or quick:
            backends = BACKENDS if EACH_BACKEND in command else ("",)
            yield from (command.format(backend=backend) for backend in backends)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="what there is, and run nothing")
    parser.add_argument("--all", action="store_true", help="run the slow ones too: hours")
    options = parser.parse_args(argv)
    if options.list:
        for command, quick in COMMANDS:
            about = importlib.import_module(f"benchmarks.{command.split()[0]}").__doc__ or ""
            print(f"{'quick' if quick else '     '}  python -m benchmarks.{command}")
            print(f"       {about.splitlines()[0]}")
        return 0
    failed = 0
    for command in commands(options.all):
        done = subprocess.run(
            [sys.executable, "-m", *f"benchmarks.{command}".split()], cwd=ROOT, check=False
        )
        failed += done.returncode != 0
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
