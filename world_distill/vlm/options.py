"""What judges and annotators behind servers are told alike: key, more fields of a request, the model's name."""

import json
import os
from collections.abc import Mapping
from typing import Any

from world_distill.errors import UserError
from world_distill.vlm.client import Client, Refused, Server
from world_distill.vlm.complaints import server_kind


def api_key(variable: str | None, part: str) -> str | None:
    """The API key in an environment variable; None if none is named. Raises UserError if it is not set."""
    key = os.environ.get(variable, "").strip() if variable else None
    if variable and not key:
        raise UserError(f"the {part}'s API key is expected in the environment variable {variable}: not set")
    return key


def extra_fields(extra: Mapping[str, Any] | str, part: str) -> dict[str, Any]:
    """More fields of a request, of a mapping or JSON. Raises UserError if it is neither."""
    try:
        return dict(json.loads(extra or "{}") if isinstance(extra, str) else extra)
    except (ValueError, TypeError) as error:
        raise UserError(f"the {part}'s extra is a JSON object, not {extra!r} ({error})") from error


async def check_model(client: Client, server: Server, model: str, part: str) -> None:
    """Raises UserError if the server lists its models and this is none of them; Failure, Refused as `send` does.

    Notes the server's kind.
    """
    try:
        reply = json.loads(await client.send(server, "/models"))
        server.kind = server_kind(reply)
        names = [entry["id"] for entry in reply["data"]]
    except Refused as error:
        if error.status in (401, 403):
            raise
        return  # a server without such a list
    except (ValueError, KeyError, TypeError, RecursionError):
        return
    if names and model not in names:
        raise UserError(
            f"{part} server {server.label} does not serve {model!r}, but {', '.join(map(str, names[:10]))}: "
            f"set {part}.options.model"
        )
