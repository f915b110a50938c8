"""How many examples the property tests try: `FISH_TUNING_EXAMPLES=2000 pytest ...` looks harder."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

DEFAULT_EXAMPLES = 25


def settings(**changes: Any) -> hypothesis_settings:
    """Settings for `@fuzz.settings()`: the same examples in every run, no time limit, nothing kept on disk."""
    defaults: dict[str, Any] = {
        "max_examples": int(os.environ.get("FISH_TUNING_EXAMPLES", DEFAULT_EXAMPLES)),
        "deadline": None,
        "derandomize": True,
        "database": None,
        # A test's tmp_path is one folder for all its examples, which is what these tests want.
        "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    }
    return hypothesis_settings(**(defaults | changes))
