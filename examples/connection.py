"""Where the other examples find a server: TANDEM_URL (default: what `make serve` prints), TANDEM_API_KEY, TANDEM_MODEL."""

from __future__ import annotations

import os

URL = os.environ.get("TANDEM_URL", "http://127.0.0.1:8000").rstrip("/")
API_KEY = os.environ.get("TANDEM_API_KEY", "none")  # the openai package wants one; a server without keys reads none
MODEL = os.environ.get("TANDEM_MODEL", "bundled")
