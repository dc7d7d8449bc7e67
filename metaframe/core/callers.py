"""The user's own code among the frames of a stack, which errors and warnings point at."""

from __future__ import annotations

import inspect
import sysconfig
import traceback
import warnings
from pathlib import Path


def is_library(filename: str) -> bool:
    """True for the source of metaframe, of its backends, of Python and of installed packages."""
    here = Path(__file__).parents[1]
    standard = sysconfig.get_paths()["stdlib"]
    libraries = (str(here), str(here.parent / "backends"), "<frozen", standard)
    return filename.startswith(libraries) or "site-packages" in filename


def warn_the_user(message: str) -> None:
    """A UserWarning at the line of the user's that led here."""
    stack = traceback.walk_stack(inspect.currentframe())
    levels = (n for n, (f, _) in enumerate(stack, 1) if not is_library(f.f_code.co_filename))
    warnings.warn(message, stacklevel=next(levels, 2))
