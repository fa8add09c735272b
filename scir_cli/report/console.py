"""The console of all tables, progress bars and live views.

Names of subsets, models and columns are text of others: nothing in them is markup, an emoji code or
a control sequence. `shown` makes every string safe before it is laid out.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from scir_cli.errors import shown

#: Characters of a cell, title or caption
LONGEST_CELL = 600


class PlainConsole(Console):
    """A console that prints strings as they are, with every character visible.

    stderr: print on stderr instead of stdout; more: further arguments of rich's Console
    """

    def __init__(self, *, stderr: bool = False, **more: Any) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False, **more)

    def render_str(self, text: str, **more: Any) -> Text:
        """The string as rich's Text. Every cell, title and printed string gets here."""
        more |= {"markup": False, "emoji": False}
        return super().render_str(shown(text, keep="\n", most=LONGEST_CELL), **more)
