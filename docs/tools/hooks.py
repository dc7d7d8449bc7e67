"""Hooks of mkdocs: the command line's reference, the algorithms, and formulas.

Formulas, in `$$` on lines of their own or between single `$`, become MathML, which browsers render
without a script.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import latex2mathml.converter
import rich_click as click

from metaframe.cli.app import cli
from metaframe.cli.options import GROUPS
from metaframe.learners import algorithms

CLI_MARK = "<!-- commands -->"
ALGORITHMS_MARK = "<!-- algorithms -->"
FENCE = re.compile(r"(^```.*?^```$|`[^`\n]*`)", re.DOTALL | re.MULTILINE)
BLOCK = re.compile(r"^\$\$\n(.*?)\n\$\$$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(?<![\\$\w])\$([^$\n]+)\$(?![\w$])")


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """The text of a page before it becomes HTML."""
    del kwargs
    filled = markdown.replace(CLI_MARK, commands()).replace(ALGORITHMS_MARK, algorithms_table())
    parts = FENCE.split(filled)
    return "".join(part if i % 2 else formulas(part) for i, part in enumerate(parts))


def formulas(text: str) -> str:
    """LaTeX as MathML, outside code."""
    text = BLOCK.sub(lambda found: _mathml(found[1], "block"), text)
    return INLINE.sub(lambda found: _mathml(found[1], "inline"), text)


def _mathml(latex: str, display: str) -> str:
    converted = latex2mathml.converter.convert(latex.replace("\n", " "), display=display)
    # In a line of text Markdown takes a bare <math> for a block.
    return (
        f'<div class="formula">{converted}</div>'
        if display == "block"
        else f"<span>{converted}</span>"
    )


def commands() -> str:
    """Every command with its arguments and options, as the command itself knows them."""
    with click.Context(cli, info_name="metaframe") as parent:
        sections = [_command(cli.commands[name], parent) for name in sorted(cli.commands)]
    return "\n\n".join(sections)


def algorithms_table() -> str:
    """Every registered algorithm in a line."""
    rows = [f"| `{name}` | {entry.about} |" for name, entry in algorithms().items()]
    return "\n".join(["| algorithm | |", "| --- | --- |", *rows])


def _command(command: click.Command, parent: click.Context) -> str:
    context = click.Context(command, parent, info_name=command.name)
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    parts = [f"## metaframe {command.name}", _prose(command.help), f"```text\n{usage}\n```"]
    options = {p.name: p for p in command.params if isinstance(p, click.Option)}
    grouped = {name for names in GROUPS.values() for name in names}
    full = command.name in ("train", "reproduce")
    for title, names in GROUPS.items() if full else ():
        rows = [options[name] for name in names if name in options]
        parts += [f"**{title}**", _table(rows)] if rows else []
    rest = [o for name, o in options.items() if not full or name not in grouped]
    parts += ["**Options**" if full else "", _table(rest)] if rest else []
    return "\n\n".join(part for part in parts if part)


def _prose(text: str | None) -> str:
    return re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(text or ""))


def _table(options: list[click.Option]) -> str:
    rows = [f"| {_names(option)} | {_help(option)} |" for option in options]
    return "\n".join(["| option | |", "| --- | --- |", *rows])


def _names(option: click.Option) -> str:
    names = "/".join([*option.opts, *option.secondary_opts])
    if option.is_flag or option.secondary_opts:
        return f"`{names}`"
    if isinstance(option.type, click.Choice):
        return f"`{names}` " + ", ".join(f"`{choice}`" for choice in option.type.choices)
    return f"`{names} {option.metavar or option.type.name.upper()}`"


def _help(option: click.Option) -> str:
    text = re.sub(r"\[/?dim\]", "", option.help or "").replace("\\[", "[")
    return text.replace("|", "\\|")
