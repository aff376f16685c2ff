"""A server home with a registered model, made once for all tests with real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.federation import prepare_home


@pytest.fixture(scope="session")
def prepared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home to copy; no server ever runs on it."""
    return prepare_home(tmp_path_factory.mktemp("prepared"))
