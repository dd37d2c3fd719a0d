"""A document's pieces, joined."""

from __future__ import annotations

from longctx.data.sources.document import Document


def test_the_text_is_all_pieces_in_order() -> None:
    assert Document("x", iter(["one ", "", "two"])).text == "one two"
