"""The assignment of heads to the ranks of a ulysses group."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx.attention.heads import Share, assign_heads
from longctx.errors import AttentionError


@settings(deadline=None, max_examples=300)
@given(kv_heads=st.integers(1, 12), group=st.integers(1, 12), members=st.integers(1, 40))
def test_every_head_is_assigned_once_with_the_key_heads_it_reads(kv_heads: int, group: int, members: int) -> None:
    heads = kv_heads * group
    if members > heads:
        with pytest.raises(AttentionError, match=f"at most ulysses={heads}"):
            assign_heads(heads, kv_heads, members)
        return
    shares = assign_heads(heads, kv_heads, members)
    assert [h for share in shares for h in range(heads)[share.queries]] == list(range(heads))
    assert {share.query_count for share in shares} <= {heads // members, -(-heads // members)}
    for share in shares:
        read = [h // group for h in range(heads)[share.queries]]
        keys = list(range(kv_heads)[share.keys])
        assert keys == sorted(set(read))  # no key head more than is read
        blocks = list(range(len(keys))) if share.expand is None else list(share.expand)
        assert len(read) % len(blocks) == 0
        assert read == [keys[blocks[i * len(blocks) // len(read)]] for i in range(len(read))]


def test_key_heads_are_copied_only_if_they_serve_unequal_numbers_of_query_heads() -> None:
    assert assign_heads(8, 2, 2) == (Share(slice(0, 4), slice(0, 1), None), Share(slice(4, 8), slice(1, 2), None))
    first, second = assign_heads(6, 2, 2)[0], assign_heads(6, 3, 4)[1]
    assert first == Share(slice(0, 3), slice(0, 1), None)
    assert second == Share(slice(1, 3), slice(0, 2), None)
    assert assign_heads(10, 2, 3)[1] == Share(slice(3, 6), slice(0, 2), (0, 0, 1))  # two heads read key 0, one key 1
