"""Pages that stand alone: one file each, with nothing to fetch, in the look of the server's pages."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

HERE = Path(__file__).parent
SHEET = HERE / "server" / "static" / "ropewalk.css"


def environment(folder: Path) -> Environment:
    """The templates of a folder, which extend standalone.html.j2."""
    made = Environment(loader=FileSystemLoader([folder, HERE]), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    made.globals["sheet"] = SHEET.read_text(encoding="utf-8")
    made.filters["percent"] = lambda share: f"{share:.0%}"
    return made
