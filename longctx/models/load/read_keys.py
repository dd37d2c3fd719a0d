"""Find the keys of a config.json that its transformers class reads: declared, renamed, or taken from keyword arguments.

Any other key is left out of the config: transformers would set it as an attribute, even over a method of that name, and
such attributes have led it to execute code.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from functools import cache

_COMMON = frozenset({"rope_scaling", "rope_theta", "torch_dtype", "dtype", "num_labels", "per_layer_config"})
_TAKES = ("pop", "get", "setdefault")  # of a dictionary of keywords


@cache
def accepted_keys(config_class: type) -> frozenset[str]:
    """Return every key of a config.json that ``config_class`` reads."""
    declared = {field.name for field in dataclasses.fields(config_class)}  # also private ones: _sliding_window_pattern
    mapped = {name for pair in getattr(config_class, "attribute_map", {}).items() for name in pair}
    for part in _parts(config_class):  # older files have the language model's keys at the top level
        mapped |= accepted_keys(part)
    own = {name for base in _own_bases(config_class) for name in _mentioned(base)}
    return frozenset(declared | mapped | _COMMON | {name for name in own if not name.startswith("_")})


def _parts(config_class: type) -> list[type]:
    """Return the config classes that a composite class names as its parts."""
    parts: list[type] = list(getattr(config_class, "sub_configs", {}).values())
    return [part for part in parts if part is not config_class and dataclasses.is_dataclass(part)]


def _own_bases(config_class: type) -> list[type]:
    """Return the class and those of its bases that belong to a model rather than to transformers' base classes."""
    bases = (base for base in config_class.__mro__ if base is not object)
    return [base for base in bases if ".models." in f"{base.__module__}."]


@cache
def _mentioned(base: type) -> frozenset[str]:
    """Return the keyword arguments that the code of a class reads, and the attributes that it sets."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
    except (OSError, TypeError, SyntaxError):  # created at run time (converted models): read their bases
        return frozenset()
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _TAKES:
            first = node.args[0] if node.args else None
            found.add(first.value if isinstance(first, ast.Constant) else None)
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            found.add(node.slice.value)
        elif isinstance(node, ast.Compare) and isinstance(node.left, ast.Constant):
            found.add(node.left.value)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                found.add(node.attr)
    return frozenset(name for name in found if isinstance(name, str) and not callable(getattr(base, name, None)))
