"""Which keys of a config.json its transformers class knows: declared, renamed, or taken from keywords by its code.

A key that nothing in the class mentions is left out of the config: transformers would set it as an attribute, over a
method if it has a method's name, and has followed such attributes to code before.
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
    declared = {field.name for field in dataclasses.fields(config_class)}  # some are private: _sliding_window_pattern
    mapped = {name for pair in getattr(config_class, "attribute_map", {}).items() for name in pair}
    for part in _parts(config_class):  # older files hold the keys of the language model at the top
        mapped |= accepted_keys(part)
    own = {name for base in _own_bases(config_class) for name in _mentioned(base)}
    return frozenset(declared | mapped | _COMMON | {name for name in own if not name.startswith("_")})


def _parts(config_class: type) -> list[type]:
    """Return the config classes that a composite one is put together from, as far as it names them."""
    parts: list[type] = list(getattr(config_class, "sub_configs", {}).values())
    return [part for part in parts if part is not config_class and dataclasses.is_dataclass(part)]


def _own_bases(config_class: type) -> list[type]:
    """Return the class and its bases that belong to a model, not to transformers' machinery."""
    bases = (base for base in config_class.__mro__ if base is not object)
    return [base for base in bases if ".models." in f"{base.__module__}."]


@cache
def _mentioned(base: type) -> frozenset[str]:
    """Return the keywords that the code of a class takes, and the attributes that it sets."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
    except (OSError, TypeError, SyntaxError):  # made at run time, as converted models are: their bases are read
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
