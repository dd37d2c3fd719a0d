"""Recognise what a record holds: a prompt with its completion, or a conversation.

A record is an object of JSON, or a row of a table. It becomes one JSON text, which depends on nothing else: a survey
hashes it, and chat.py renders it with the tokenizer's chat template.

    {"prompt": "…", "completion": "…"}                       two texts
    {"messages": […], "prompt": 2, "tools": […], "options": {…}}
                           a conversation; its first ``prompt`` messages are only read, if the record says so
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from longctx.data.sources.document import CHAT, PAIR, Kind
from longctx.errors import DataError

MESSAGES = ("messages", "conversations")
COLUMNS = (*MESSAGES, "prompt", "completion", "tools", "chat_template_kwargs", "system")
"""keys of a record that are read, besides that of its text"""
HOLDS = "messages, and no prompt with a completion"
"""what a record lacks that holds no conversation"""
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "model", "bot"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
    "system": "system",
}
"""role of the message that ShareGPT's ``from`` names"""


def is_conversation(names: Mapping[str, Any] | list[str]) -> bool:
    """Return whether a record with these keys holds a conversation, or a prompt with its completion."""
    return any(name in names for name in MESSAGES) or ("prompt" in names and "completion" in names)


def conversation_of(record: Mapping[str, Any], where: str) -> tuple[Kind, str]:
    """Return the kind of a record for which ``is_conversation`` holds, and its JSON text.

    Raises:
        DataError: ``where``, with the key that is wrong.
    """
    name = next((name for name in MESSAGES if record.get(name) is not None), None)
    if name is not None:
        messages = _messages(record[name], name, where)
        if isinstance(record.get("system"), str) and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": record["system"]})
        return CHAT, _text({"messages": messages, **_settings(record, where)})
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return PAIR, _text({"prompt": prompt, "completion": completion})
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise DataError(
            f"{where}: prompt is {_kind(prompt)} and completion is {_kind(completion)}; give two texts, or two lists "
            "of messages"
        )
    first, second = _messages(prompt, "prompt", where), _messages(completion, "completion", where)
    return CHAT, _text({"messages": first + second, "prompt": len(first), **_settings(record, where)})


def without_nulls(value: Any) -> Any:
    """Remove the keys that a column of structures adds to every row: those whose value is null."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None or key == "content"}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _messages(value: Any, name: str, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {name} is {_kind(value)}, not a list of messages; repair or remove it")
    return [_message(message, f"{where}: {name}[{number}]") for number, message in enumerate(value)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise DataError(f"{where} is {_kind(message)}, not an object with role and content; repair or remove it")
    if "role" not in message and "from" in message:
        role = _ROLES.get(str(message["from"]))
        if role is None:
            raise DataError(f"{where}: from is {message['from']!r}; use one of {', '.join(_ROLES)}")
        rest = {key: value for key, value in message.items() if key not in ("from", "value")}
        message = {"role": role, "content": message.get("value"), **rest}
    if not isinstance(message.get("role"), str):
        raise DataError(f"{where} has no role (found: {', '.join(map(repr, list(message)[:8]))}); repair or remove it")
    if not isinstance(message.get("content"), str | list | None):
        raise DataError(f"{where}: content is {_kind(message['content'])}, not text; repair or remove it")
    return message


def _settings(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the tools of a conversation, and further values that its template reads."""
    found: dict[str, Any] = {}
    for key, name, kind in (("tools", "tools", list), ("chat_template_kwargs", "options", dict)):
        value = record.get(key)
        try:
            value = json.loads(value) if isinstance(value, str) and value.strip() else value
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: {key} is text that is not JSON ({error}); repair or remove it") from None
        if value:
            if not isinstance(value, kind):
                raise DataError(f"{where}: {key} is {_kind(value)}, not {_KINDS[kind.__name__]}; repair or remove it")
            found[name] = value
    return found


_KINDS = {"NoneType": "null", "dict": "an object", "list": "an array", "bool": "true or false", "str": "text"}


def _kind(value: Any) -> str:
    """Return what a value of JSON is, in words."""
    return "empty" if value == [] else _KINDS.get(type(value).__name__, "a number")


def _text(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
