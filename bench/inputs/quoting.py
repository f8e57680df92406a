"""Text as a value in the grammar of Hydra's overrides."""

from __future__ import annotations

import re


def quoted(text: str) -> str:
    """Return the text in quotes, with which no character of it has a meaning. A backslash is literal, except
    before a quote."""
    escaped = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + match[2].replace("'", "\\'"), text)
    return f"'{escaped}'"
