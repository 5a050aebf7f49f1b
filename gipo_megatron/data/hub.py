"""The Hugging Face hub: is it there? Asked with a short patience, since its clients retry for
minutes."""

from __future__ import annotations

import os
import re
import ssl
import threading
import urllib.error
import urllib.request

from gipo_megatron.errors import UserError

PATIENCE = 6.0  # seconds
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def is_hub_name(spec: str) -> bool:
    """`name` or `owner/name`."""
    return _NAME.fullmatch(spec) is not None


def offline() -> bool:
    """The user asked for the local cache only."""
    return any(
        os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON")
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    )


def reach_hub(name: str, where: str, fix: str, patience: float = PATIENCE) -> None:
    """Returns when the hub answers anything at all.

    Raises UserError within `patience` seconds when it does not, or when the environment forbids
    asking.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if offline():
        raise UserError(
            f"{name!r} is no local path and not in the local cache (HF_HUB_OFFLINE is set)",
            where=where,
            fix=fix,
        )
    answer: list[str] = []
    # Looking up a host name has no timeout of its own, hence the thread.
    thread = threading.Thread(target=lambda: answer.append(_ask(endpoint, patience)), daemon=True)
    thread.start()
    thread.join(patience)
    problem = answer[0] if answer else f"no answer in {patience:g} s"
    if problem:
        raise UserError(
            f"{name!r} is no local path, and the hub ({endpoint}) cannot be reached: {problem}",
            where=where,
            fix=fix,
        )


def _ask(endpoint: str, patience: float) -> str:
    """Empty when something answered, else the reason."""
    try:
        urllib.request.urlopen(
            urllib.request.Request(endpoint, method="HEAD"), timeout=patience
        ).close()
    except urllib.error.HTTPError as error:
        error.close()
    except urllib.error.URLError as error:
        return "" if isinstance(error.reason, ssl.SSLError) else str(error.reason)
    except (OSError, ValueError) as error:
        return str(error)
    return ""
