"""What comparisons with other projects share."""

from __future__ import annotations

import pytest

ROTARY_USERS = ("layers", "longformer", "reformer", "routing")


@pytest.fixture
def without_rotary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out rotary positions, which every variant here adds to its method and no other project does."""
    for module in ROTARY_USERS:
        monkeypatch.setattr(f"variants.{module}.rotary", lambda x: x)
