"""A quick check that the Hugging Face hub can be reached. Its own clients retry for minutes."""

from __future__ import annotations

import os
import re
import ssl
import threading

from gipo_megatron.errors import UserError

PATIENCE = 6.0  # seconds
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def is_hub_name(spec: str) -> bool:
    """Check for the form `name` or `owner/name`."""
    return _NAME.fullmatch(spec) is not None


def offline() -> bool:
    """Check whether the environment allows the local cache only."""
    return any(os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON") for name in _OFFLINE)


def reach_hub(name: str, where: str, fix: str, patience: float = PATIENCE) -> None:
    """Return when the hub sends any response.

    Raises UserError when it sends none within `patience` seconds, or when the environment forbids
    the request.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if offline():
        raise UserError(
            f"{name!r} is no local path and not in the local cache (HF_HUB_OFFLINE is set)",
            where=where,
            fix=fix,
        )
    found: list[str] = []
    # A look-up of a host name has no time limit, so it runs in a thread.
    thread = threading.Thread(
        target=lambda: found.append(_problem(endpoint, patience)), daemon=True
    )
    thread.start()
    thread.join(patience)
    problem = found[0] if found else f"no answer in {patience:g} s"
    if problem:
        raise UserError(
            f"{name!r} is no local path, and the hub ({endpoint}) cannot be reached: {problem}",
            where=where,
            fix=fix,
        )


def _problem(endpoint: str, patience: float) -> str:
    """Return why the endpoint cannot be reached, or ""."""
    import urllib.error  # slow to import
    import urllib.request

    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=patience).close()
    except urllib.error.HTTPError as error:
        error.close()
    except urllib.error.URLError as error:
        return "" if isinstance(error.reason, ssl.SSLError) else str(error.reason)
    except (OSError, ValueError) as error:
        return str(error)
    return ""
