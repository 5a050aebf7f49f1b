"""HTTP client of every server that a run uses: the recipe's server alone, and bounded answers."""

from __future__ import annotations

from typing import Any

import httpx2

LONGEST = 64 * 2**20  # bytes of an answer, unpacked
# of an answer as it was sent; its content is unpacked here, and JSON is UTF-8
_REPLACED = ("content-encoding", "content-length", "content-type", "transfer-encoding")


class AnswerTooLong(httpx2.RequestError):
    """An answer has more than LONGEST bytes."""


class HttpClient(httpx2.AsyncClient):
    """Reads whole answers, of at most LONGEST bytes; the length that they declare has no effect.

    No redirect is followed: prompts, responses and keys are for the server that the user named.
    """

    async def send(
        self, request: httpx2.Request, *, stream: bool = False, **settings: Any
    ) -> httpx2.Response:
        """Return the answer, with its body read. Raises httpx2.RequestError."""
        settings |= {"stream": True, "follow_redirects": False}
        answer = await super().send(request, **settings)
        body = bytearray()
        try:
            async for piece in answer.aiter_bytes():
                body += piece
                if len(body) > LONGEST:
                    what = f"an answer of more than {LONGEST >> 20} MiB"
                    raise AnswerTooLong(what, request=request)
        finally:
            await answer.aclose()
        if answer.has_redirect_location:
            body = bytearray(_redirect(answer).encode())
        headers = [pair for pair in answer.headers.items() if pair[0].lower() not in _REPLACED]
        return httpx2.Response(
            answer.status_code, headers=headers, content=bytes(body), request=request
        )


def _redirect(answer: httpx2.Response) -> str:
    try:
        url = answer.request.url.join(answer.headers["location"])
        place = f"{url.scheme}://{url.netloc.decode('ascii', 'replace')}{url.path}"
    except (httpx2.InvalidURL, ValueError):
        place = "an address that is none"
    return f"a redirect to {place}, which is not followed: give the address itself"
