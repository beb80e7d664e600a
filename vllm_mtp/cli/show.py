"""What the demo puts on the screen: text with the tokens of each forward set apart, and tables of figures."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_mtp.outputs import Output

COLOURS = ("cyan", "yellow")
SEPARATOR = "|"


def coloured(output: Output) -> Text:
    """The completion, the tokens of each forward in the other colour than those of the one before."""
    text = Text()
    for number, piece in enumerate(output.pieces):
        text.append(piece, COLOURS[number % 2])
    return text


def separated(output: Output) -> str:
    """The completion for a screen without colours: a bar between the tokens of one forward and those of the next."""
    return SEPARATOR.join(output.pieces)


def print_completion(console: Console, prompt: str, output: Output, prompt_lines: int = 6) -> None:
    """The end of a prompt and its completion."""
    end = "\n".join(prompt.splitlines()[-prompt_lines:])
    if console.is_terminal:
        console.print(Text().append(end, "dim").append_text(coloured(output)))
    else:
        console.print(end + SEPARATOR + separated(output), markup=False, highlight=False, soft_wrap=True)


def print_error(error: Exception) -> None:
    """An error's message on standard error. It is not markup: shapes in it stand in square brackets."""
    Console(stderr=True).print(Text("error: ", "red") + Text(str(error)), soft_wrap=True)


def print_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table whose columns are figures where they have a title."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)
