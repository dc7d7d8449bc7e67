"""The commands."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rich_click as click

from metaframe import __version__
from metaframe.backend.registry import available_backends
from metaframe.cli import applicable, datasets, presets, run_folder, runs
from metaframe.cli.errors import FAILED, INTERRUPTED, OK, USAGE, UsageError
from metaframe.cli.experiment import resolve
from metaframe.cli.options import GROUPS, given, setting_flags
from metaframe.cli.output import Output, described
from metaframe.cli.run_config import known_keys
from metaframe.errors import BackendNotInstalledError, MetaframeError, UnknownKeyError
from metaframe.learners import algorithms
from metaframe.training.interrupt import TERMINATED, Terminated

click.rich_click.TEXT_MARKUP = "rich"
click.rich_click.OPTION_GROUPS = {
    f"metaframe {command}": [
        {"name": name, "options": [f"--{n.replace('_', '-')}" for n in names if n in settings]}
        for name, names in GROUPS.items()
        if set(names) & set(settings)
    ]
    for command, settings in (("train", known_keys()), ("reproduce", presets.FREE))
}

Command = Callable[..., Any]


def run(argv: Sequence[str] | None) -> int:
    """Run a command; every outcome becomes an exit code and, if bad, one message."""
    stderr = Output().stderr
    try:
        cli.main(None if argv is None else list(argv), prog_name="metaframe", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return USAGE
    except (click.Abort, KeyboardInterrupt):
        stderr.print("interrupted", markup=False)
        return INTERRUPTED
    except (UsageError, UnknownKeyError, BackendNotInstalledError) as error:
        stderr.print(f"metaframe: {error}", markup=False)
        return USAGE
    except MetaframeError as error:
        stderr.print(f"metaframe: {error}", markup=False)
        return FAILED
    except OSError as error:  # a disk that is full, a folder that may not be written
        where = "" if error.filename is None else f"{error.filename}: "
        stderr.print(f"metaframe: {where}{error.strerror or error}", markup=False)
        return FAILED
    except Terminated:
        stderr.print("terminated", markup=False)
        return TERMINATED
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else FAILED
    return OK


def _modes(command: Command) -> Command:
    quiet = click.option("--quiet", "-q", is_flag=True, help="No progress and no remarks.")
    as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
    return quiet(as_json(command))


def _run_options(command: Command) -> Command:
    for option in (
        click.option("--plots/--no-plots", default=True, help="Draw plots at the end."),
        click.option("--tensorboard", is_flag=True, help="Write TensorBoard event files too."),
        click.option("--overwrite", is_flag=True, help="Start anew where there is a run already."),
        click.option("--out", type=click.Path(path_type=Path), help="The run's folder."),
    ):
        command = option(command)
    return command


_run_argument = click.argument("run", type=click.Path(path_type=Path))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="metaframe")
def cli() -> None:
    """Meta-learning on PyTorch, JAX and TensorFlow: train, evaluate, resume, reproduce, plot.

    Exit codes: 0 ok, 1 failed, 2 usage, 130 interrupted, 143 terminated.
    """


@cli.command()
@setting_flags()
@click.option("--config", "file", type=click.Path(), help="A TOML file with settings.")
@click.option("--preset", help="Start from the settings of a preset, see `metaframe list`.")
@_run_options
@_modes
def train(
    file: str | None,
    preset: str | None,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    plots: bool,
    tensorboard: bool,
    **flags: Any,
) -> None:
    """Meta-train, evaluate on held-out tasks, and leave everything in a run folder.

    Settings: defaults < preset < file < flags. Ctrl-C and SIGTERM save and exit; `resume` goes on.
    """
    output = Output(as_json=as_json, quiet=quiet)
    settings = presets.preset(preset).settings if preset else {}
    config = resolve(given(flags), file, settings)
    for warning in applicable.warnings(config):
        output.remark(f"warning: {warning}")
    folder = out or run_folder.default_folder(config)
    extras = runs.Extras(plots, tensorboard)
    with _saved(folder, f"metaframe resume {run_folder.quoted(folder)}", output):
        result = runs.train(config, folder, output, extras, overwrite=overwrite)
    _report(result, folder, output)


@cli.command()
@_run_argument
@click.option(
    "--iterations",
    type=int,
    help="Train up to so many outer steps in all. With a cosine schedule the rate then follows the "
    "longer curve, which is not the one of an uninterrupted run.",
)
@setting_flags(("patience", "backend", "device", "data"))
@click.option("--plots/--no-plots", default=True, help="Draw plots at the end.")
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard event files too.")
@_modes
def resume(
    run: Path,
    iterations: int | None,
    as_json: bool,
    quiet: bool,
    plots: bool,
    tensorboard: bool,
    **flags: Any,
) -> None:
    """Go on with an interrupted run, exactly where its last checkpoint left it.

    One that stopped early goes on with more --patience.
    """
    changes = given(flags) if iterations is None else {**given(flags), "iterations": iterations}
    config = run_folder.opened(run, changes)
    output = Output(as_json=as_json, quiet=quiet)
    with _saved(run, f"metaframe resume {run_folder.quoted(run)}", output):
        result = runs.go_on(config, run, output, runs.Extras(plots, tensorboard))
    _report(result, run, output)


@contextmanager
def _saved(folder: Path, command: str, output: Output) -> Iterator[None]:
    """After Ctrl-C or SIGTERM, say which command goes on."""
    try:
        yield
    except (KeyboardInterrupt, Terminated):
        if (folder / run_folder.CONFIG).exists():
            output.remark(f"saved; continue with: {command}")
        raise


def _report(result: Mapping[str, Any], folder: Path, output: Output) -> None:
    percent = result["metric"] == "accuracy"
    lines = described(result["evaluation"], percent=percent)
    if result["stopped"]:
        planned = result["config"]["iterations"]
        lines.append(f"stopped after {result['steps']} of {planned} steps: {result['stopped']}")
    output.result({"folder": str(folder), **result}, [*lines, f"everything is in {folder}"])


@cli.command()
@_run_argument
@click.option(
    "--checkpoint", help="best, latest or a file, of the run or any; default: best if there is one."
)
@setting_flags(("eval_tasks", "eval_steps", "eval_seed", "backend", "device", "data"))
@_modes
def evaluate(run: Path, checkpoint: str | None, as_json: bool, quiet: bool, **flags: Any) -> None:
    """Measure a trained run on held-out tasks, with a 95% confidence interval."""
    output = Output(as_json=as_json, quiet=quiet)
    result = runs.evaluate(run, run_folder.opened(run, given(flags)), checkpoint, output)
    output.result(result, described(result["evaluation"], percent=result["metric"] == "accuracy"))


@cli.command()
@_run_argument
@setting_flags(("backend", "device", "data"))
@_modes
def plot(run: Path, as_json: bool, quiet: bool, **flags: Any) -> None:
    """Draw the plots of a run: learning curve, accuracy by step, predictions."""
    output = Output(as_json=as_json, quiet=quiet)
    files = runs.plot(run, run_folder.opened(run, given(flags)), output)
    output.result(files, files)


class _OfPreset(click.RichCommand):
    """A command whose other settings are those of a preset."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            name = error.option_name.removeprefix("--").removeprefix("no-")
            if name.replace("-", "_") not in known_keys():
                raise
            raise UsageError(
                f"--{name} would change what is reproduced. For another experiment use "
                f"`metaframe train --preset NAME --{name} ...`."
            ) from None


@cli.command(cls=_OfPreset)
@click.argument("name")
@setting_flags(presets.FREE)
@_run_options
@_modes
def reproduce(
    name: str,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    plots: bool,
    tensorboard: bool,
    **flags: Any,
) -> None:
    """Run a preset and compare with the number it is expected to reach.

    The exit code is 1 if it does not. Where its run has begun already, it goes on.
    """
    chosen = presets.preset(name)
    config, most = (resolve(f, None, chosen.settings) for f in (given(flags), {}))
    if config.iterations > most.iterations:
        raise UsageError(
            f"{name} takes {most.iterations} iterations, received {config.iterations}. With more "
            "it would be another experiment; with fewer it can be tried out."
        )
    folder = out or Path("runs") / f"{name}-{config.backend}"
    output = Output(as_json=as_json, quiet=quiet)
    output.remark(f"{name}: {chosen.about}")
    extras = runs.Extras(plots, tensorboard)
    with _saved(folder, "the same command", output):
        if (folder / run_folder.CONFIG).exists() and not overwrite:
            run_folder.check_same(config, folder)
            runs.go_on(config, folder, output, extras)
        else:
            runs.train(config, folder, output, extras, overwrite=overwrite)
    verdict = presets.judge(chosen, folder)
    output.result(verdict.as_dict(), verdict.lines())
    if not verdict.met:
        sys.exit(FAILED)


@cli.command(context_settings={"ignore_unknown_options": True})
@click.option("--processes", "-n", type=click.IntRange(min=1), default=2, help="How many.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def launch(processes: int, command: tuple[str, ...]) -> None:
    """Run a command of metaframe in several processes of this machine, which share its tasks.

    For trying out on JAX and TensorFlow what torchrun does for torch: metaframe launch -n 2 train
    --backend jax. When a process fails, so do the others.
    """
    from metaframe.distributed.launch import launch

    code = launch([sys.executable, "-m", "metaframe.cli", *command], processes)
    if code:
        sys.exit(code)


@cli.command()
@click.option("--check", metavar="NAME", help="Run the conformance suite on this backend instead.")
@click.option("--clauses", default="*", help="With --check: which, such as 'ops/*,vmap/*'.")
@_modes
def backends(check: str | None, clauses: str, as_json: bool, quiet: bool) -> None:
    """The backends, whether they are installed, and their devices.

    With --check, the exit code is 1 if the backend does not keep the contract.
    """
    if check is not None:
        _check_backend(check, clauses.split(","), Output(as_json=as_json, quiet=quiet))
        return
    found = available_backends()
    data = [
        {"name": b.name, "version": b.version, "devices": list(b.devices), "install": b.install}
        for b in found
    ]
    rows = [
        (b.name, b.version or "not installed", ", ".join(b.devices) or b.install) for b in found
    ]
    output = Output(as_json=as_json, quiet=quiet)
    output.table(data, "backends", ("name", "version", "devices, or how to install"), rows)


def _check_backend(name: str, clauses: Sequence[str], output: Output) -> None:
    from metaframe.testing.conformance import check_backend

    report = check_backend(name, *clauses)
    output.result({"ok": report.ok, **dataclasses.asdict(report)}, report.lines())
    if not report.ok:
        sys.exit(FAILED)


@cli.command("list")
@_modes
def list_(as_json: bool, quiet: bool) -> None:
    """The data sets, algorithms and presets there are."""
    output = Output(as_json=as_json, quiet=quiet)
    groups = {
        "data sets": {name: entry.about for name, entry in datasets.DATASETS.items()},
        "algorithms": {name: entry.about for name, entry in algorithms().items()},
        "presets": {name: entry.about for name, entry in presets.PRESETS.items()},
    }
    if as_json:
        output.result(groups, [])
        return
    for title, entries in groups.items():
        output.table(None, title, ("name", ""), entries.items())


@cli.command()
@click.option("--workload", type=click.Choice(["W1", "W2"]), default="W1", help="See above.")
@click.option("--width", type=click.IntRange(min=1), help="Units of W1, 40; channels of W2, 64.")
@click.option("--tasks", type=click.IntRange(min=1), help="Tasks in a step; W1: 25, W2: 8.")
@click.option("--steps", type=click.IntRange(min=1), default=100, help="Steps to time.")
@setting_flags(("backend", "device", "inner_steps", "task_map", "chunk_size", "mode", "compiled"))
@_modes
def bench(
    workload: str,
    width: int | None,
    tasks: int | None,
    steps: int,
    as_json: bool,
    quiet: bool,
    **flags: Any,
) -> None:
    """Time a meta-step of MAML with its update, on data made up.

    W1: sinusoids, 25 tasks of 10 + 10 points, MLP 1-40-40-1. W2: 5-way 1-shot classification with
    25 queries, 8 tasks, Conv4 with 64 channels on 28x28 images.
    """
    from metaframe.cli.bench import time_steps
    from metaframe.cli.workloads import WORKLOADS

    output = Output(as_json=as_json, quiet=quiet)
    sizes = {n: size for n, size in (("width", width), ("tasks", tasks)) if size is not None}
    found = time_steps(WORKLOADS[workload](**sizes), resolve(given(flags)), steps)
    output.result(
        found,
        [
            f"{found['backend']}, {workload}: {found['step_ms']:.2f} ms a step, "
            f"{found['first_s']:.1f} s first"
        ],
    )


@cli.command()
@click.argument("target", metavar="MODULE:FUNCTION")
@click.option("--backend", help="Select a backend first; default: the function's arrays decide.")
@click.option("--compare", default="", help="Backends to compare with, such as jax,tensorflow.")
@_modes
def doctor(target: str, backend: str | None, compare: str, as_json: bool, quiet: bool) -> None:
    """Examine a meta-gradient, and say what is wrong with it.

    The function takes no arguments and returns those of metaframe.testing.check_meta_gradient as a
    dict: cost, variables, batch, and if you like adaptation and step. The exit code is 1 if
    anything is wrong or could not be told.
    """
    from metaframe.cli.doctor import examine

    output = Output(as_json=as_json, quiet=quiet)
    report = examine(target, backend, [name for name in compare.split(",") if name])
    output.result({"ok": report.ok, **dataclasses.asdict(report)}, report.lines())
    if not report.ok:
        sys.exit(FAILED)
