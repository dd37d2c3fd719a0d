"""The fields of a decode call, of which the operator's schema consists."""

from __future__ import annotations

import pytest
import torch

from longctx.kernels.decode.terms import Operands, Terms


@pytest.mark.parametrize("name", [*Terms._fields[1:-2]])
def test_every_term_but_the_scale_is_an_extra(name: str) -> None:
    """Tiles are chosen by it: further terms need registers and shared memory."""
    assert not Terms(0.5, offset=3).extras
    assert Terms(0.5, **{name: 1.0 if name == "softcap" else torch.ones(1)}).extras
    assert Terms(0.5, causal=True).extras


def test_fields_are_named_and_frozen() -> None:
    terms, operands = Terms(0.5), Operands(torch.ones(1), torch.ones(1), None, 1, 1, 1)
    for fields, name in ((terms, "scale"), (operands, "heads")):
        with pytest.raises(AttributeError):
            setattr(fields, name, 2)
    assert terms._replace(scale=1.0).scale == 1.0 and (*operands, *terms)[6] == 0.5
