"""Everything that makes sense on an accelerator, on each framework that sees one.

    python -m benchmarks.gpu

Times are wall times after a warm-up, waiting for the device; memory is the device allocator's.
"""

from __future__ import annotations

import argparse

from benchmarks.harness import BACKENDS, run_python

DEVICES = {"jax": "cuda", "torch": "cuda", "tensorflow": "GPU:0"}
COMMANDS = (
    ("benchmarks.handwritten", "--workload", "W1"),
    ("benchmarks.handwritten", "--workload", "W2"),
    ("benchmarks.scaling",),
    ("benchmarks.memory",),
)
# JAX and TensorFlow take the whole device's memory unless told not to.
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_FORCE_GPU_ALLOW_GROWTH": "true"}
SEES = """
import metaframe, sys
backend, device = sys.argv[1:]
with metaframe.use_backend(backend, device=device):
    print(metaframe.ops.zeros((2,)))
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    options = parser.parse_args(argv)
    for backend in options.backend:
        device = DEVICES[backend]
        try:
            run_python("-c", SEES, backend, device, env=SHARED)
        except RuntimeError as error:
            print(f"{backend}: no {device} here: {str(error).splitlines()[-1]}")
            continue
        for command in COMMANDS:
            where = ("--backend", backend, "--device", device)
            print(run_python("-m", *command, *where, env=SHARED, timeout=3600), flush=True)


if __name__ == "__main__":
    main()
