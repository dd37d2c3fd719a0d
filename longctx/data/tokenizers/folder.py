"""List the files of a transformers tokenizer folder, and copy them unchanged.

All settings of the folder (chat template, padding side, model_max_length, special tokens) are kept because its files
are copied byte by byte rather than written from a parsed form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longctx.data.tokens.writer import disk_errors, publish_bytes
from longctx.errors import DataError

CONFIG = "config.json"
SETTINGS = "tokenizer_config.json"
_FILES = re.compile(
    r"tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.(json|jinja)"
    r"|vocab\.(json|txt)|merges\.txt|.*\.tiktoken|tekken\.json|(tokenizer|spiece|sentencepiece.*|source|target)\.(spm|model)"
)
_TEMPLATES = "additional_chat_templates"
_OF_THE_MODEL = ("model_type", "model_name", "tokenizer_class", "transformers_version")
"""keys of a model's config.json by which transformers chooses a tokenizer's class"""


def files(folder: Path) -> Iterator[Path]:
    """Yield the paths of a folder's tokenizer files, relative to it, sorted."""
    found = [path.relative_to(folder) for path in folder.iterdir() if _FILES.fullmatch(path.name) and path.is_file()]
    found += [path.relative_to(folder) for path in (folder / _TEMPLATES).glob("*.jinja") if path.is_file()]
    yield from sorted(found)


def copy(source: Path, target: Path) -> None:
    """Copy the tokenizer files of ``source`` into ``target`` byte by byte and remove other tokenizer files there.

    Raises:
        DataError: a file cannot be read or written.
    """
    with disk_errors(target):
        target.mkdir(parents=True, exist_ok=True)
    wanted = list(files(source))
    for name in set(files(target)).difference(wanted):
        (target / name).unlink()
    for name in wanted:
        try:
            content = (source / name).read_bytes()
        except OSError as error:
            raise DataError(f"{source / name} cannot be read: {error.strerror}; change its permissions") from None
        with disk_errors(target / name):
            (target / name).parent.mkdir(exist_ok=True)
        publish_bytes(content, target / name)


def copy_model_type(source: Path, target: Path) -> None:
    """Write the keys of ``source/config.json`` by which transformers chooses a tokenizer class, if it has any.

    The config.json of a model in ``target`` stays.
    """
    forget_model_type(target)
    content = read_json(source / CONFIG)
    kept = {key: content[key] for key in _OF_THE_MODEL if key in content}
    if kept and not (target / CONFIG).exists():
        publish_bytes(json.dumps(kept, indent=1).encode(), target / CONFIG)


def forget_model_type(folder: Path) -> None:
    """Remove the config.json that ``copy_model_type`` wrote into a folder, and no other."""
    if set(read_json(folder / CONFIG)) <= set(_OF_THE_MODEL):
        (folder / CONFIG).unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if there is no such file or it holds no object."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
