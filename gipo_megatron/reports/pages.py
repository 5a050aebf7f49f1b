"""HTML pages from the Jinja templates of a folder `templates/` (package data).

Pages open without a network and run no script: `base.html.j2` sets the content security policy.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gipo_megatron.screen import printable

TEMPLATES = Path(__file__).parent / "templates"  # base.html.j2, macros.html.j2, style.css


def render(template: str, folder: Path = TEMPLATES, **context: Any) -> str:
    """Return the page of `folder`/`template`, which may extend and import the templates here.

    Every value is escaped and made `printable`; only Markup is inserted as it is. Raises jinja2's
    UndefinedError for a name that `context` lacks.
    """
    environment = Environment(
        loader=FileSystemLoader([folder, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= {"number": number, "base64": _base64}
    return environment.get_template(template).render(context)


def number(value: float | None) -> str:
    """Return four significant digits, whole numbers without a point, a dash for None."""
    if value is None:
        return "–"
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e9 else f"{value:.4g}"


def _shown(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
