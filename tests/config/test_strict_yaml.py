"""Strict YAML: the traps of YAML 1.1 are closed, nothing runs, nothing grows, and every place is known."""

from __future__ import annotations

import math
import resource
import time

import pytest
from config_samples import BASE, load_variant, problems_of, text_of

from longctx.config.load import loads
from longctx.config.problems import InvalidConfig
from longctx.config.strict_yaml import MAX_BYTES, MAX_DEPTH, parse, read

GOOD = text_of(BASE)


def only_code(text: str | bytes) -> str:
    """Return the code of the one problem that loading ``text`` has."""
    problems = problems_of(text).problems
    assert len(problems) == 1, problems
    return problems[0].code


# -- the nine traps: the meant value, or an error that names the key -------------------------------------------------


def test_trap_1_exponent_without_dot_is_a_number():
    assert load_variant(train__lr=1e-4).config.train.lr == 1e-4
    values = parse("[1e-4, 1E3, -2.5e+1, .5, 1., 1e4]", "").value
    assert values == [1e-4, 1e3, -25.0, 0.5, 1.0, 1e4]
    assert all(isinstance(value, float) for value in values)


def test_trap_2_on_is_a_word_also_as_a_key():
    assert parse("on: off", "").value == {"on": "off"}
    error = problems_of(GOOD + "on: 1\n")
    assert error.problems[0].key == "on" and error.problems[0].code == "unknown-key"


@pytest.mark.parametrize(("word", "meant"), [("no", "false"), ("off", "false"), ("yes", "true"), ("on", "true")])
def test_trap_3_no_is_not_a_boolean_and_says_so(word: str, meant: str):
    assert parse(word, "").value == word
    problem = problems_of(GOOD.replace("tensorboard: false", f"tensorboard: {word}")).problems[0]
    assert problem.key == "output.tensorboard" and f"did you mean '{meant}'" in problem.message


def test_trap_4_leading_zero_is_a_named_error():
    problem = problems_of(GOOD.replace("steps: 100", "steps: 0123")).problems[0]
    assert (problem.key, problem.code) == ("train.steps", "leading-zero") and "write 123" in problem.message


@pytest.mark.parametrize("word", ["22:22", "12:30:45", "1:1"])
def test_traps_5_and_6_base_sixty_is_text(word: str):
    assert parse(word, "").value == word
    problem = problems_of(GOOD.replace("steps: 100", f"steps: {word}")).problems[0]
    assert problem.key == "train.steps" and repr(word) in problem.message and "whole number" in problem.message


def test_trap_7_duplicate_keys_name_both_lines():
    text = GOOD.replace("  lr: 0.001\n", "  lr: 0.001\n  lr: 0.002\n")
    problem = problems_of(text).problems[0]
    lines = text.splitlines()
    assert problem.key == "train.lr" and problem.code == "duplicate-key"
    assert problem.place.line == lines.index("  lr: 0.002") + 1
    assert f"line {lines.index('  lr: 0.001') + 1}" in problem.message


def test_trap_8_twenty_thousand_brackets():
    for bomb in ("[" * 20_000, "{a: " * 10_000, "- " * 20_000, "? " * 20_000, "[" * 200 + "]" * 200):
        assert only_code(bomb) in ("too-deep", "syntax", "too-large")


def test_trap_9_alias_bomb_is_refused_before_it_grows():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [" + ", ".join([f"*a{n - 1}"] * 10) + "]" for n in range(1, 10)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert only_code("\n".join(lines)) == "too-large"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_also_nan_and_infinity_are_no_numbers_here():
    for word in (".nan", ".inf", "-.inf", "1e999"):
        problem = problems_of(GOOD.replace("lr: 0.001", f"lr: {word}")).problems[0]
        assert problem.key == "train.lr" and "a number" in problem.message


# -- other meanings --------------------------------------------------------------------------------------------------


def test_scalars_mean_what_they_look_like():
    text = "[1, -7, +3, 0, 1_000, 10k, 0x1F, 0o17, true, False, null, ~, 2024-01-02, 'true', \"1\", 1e]"
    expected = [1, -7, 3, 0, "1_000", "10k", "0x1F", "0o17", True, False, None, None, "2024-01-02", "true", "1", "1e"]
    assert parse(text, "").value == expected


@pytest.mark.parametrize(
    ("text", "number"),
    [("1_000", 1000), ("10k", 10_000), ("8Ki", 8192), ("1Mi", 2**20), ("2M", 2_000_000), ("1e4", 10_000), ("'64'", 64)],
)
def test_whole_numbers_as_people_write_them(text: str, number: int):
    loaded = loads(GOOD.replace("sequence_length: 4096", f"sequence_length: {text}"))
    assert loaded.config.data.sequence_length == number


@pytest.mark.parametrize("text", ["1_00", "10kb", "1.5", "k", "8 192", "8,192", "-5", "9" * 400, "--1", "1e400"])
def test_other_whole_numbers_are_refused(text: str):
    assert problems_of(GOOD.replace("sequence_length: 4096", f"sequence_length: {text}")).problems[0].key == (
        "data.sequence_length"
    )


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['echo pwned']",
        "!!python/object/new:subprocess.Popen [[ls]]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/tuple [1, 2]",
        "!!binary aGk=",
        "!!set {a}",
        "!!timestamp 2024-01-01",
        "!!str 1",
        "!!int '1'",
        "!custom x",
        "!<tag:yaml.org,2002:python/object/apply:os.getpid> []",
        "! x",
    ],
)
def test_every_tag_is_refused(tag: str):
    assert only_code(GOOD.replace("architecture: llama", f"architecture: {tag}")) == "tag"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("a: *b", "alias"),
        ("a: &a [*a]", "alias"),
        ("a: [1, 2", "syntax"),
        ("a:\n\tb: 1", "syntax"),
        ("a: 1\n---\nb: 2", "syntax"),
        ('a: "\\UFFFFFFFF"', "syntax"),
        ("%YAML " + "9" * 5000 + ".1\n---\na", "syntax"),
        ("a: \x00", "not-text"),
        (b"\xff\xfea\x00", "not-text"),
        (b"\x89PNG\r\n", "not-text"),
        ("# only a comment", "empty"),
        ("", "empty"),
        ("[1, 2]", "empty"),
        ("just text", "empty"),
        ("x" * (MAX_BYTES + 1), "too-large"),
    ],
)
def test_what_is_not_a_configuration(text: str | bytes, code: str):
    assert only_code(text) == code


def test_strange_keys_are_named():
    for key in ("1", "true", "null", "[a, b]", "{a: b}", "1.5", '"a\\x07b"', '"\\uD800"'):
        codes = [problem.code for problem in problems_of(GOOD + f"? {key}\n: 1\n").problems]
        assert codes == ["bad-key"], (key, codes)
    assert [p.code for p in problems_of(GOOD + "<<: {a: 1}\n").problems] == ["merge-key"]


@pytest.mark.parametrize("text", ['"\\x1b[31m"', '"a\\0b"', '"\\uDC80"', '"line\\x0cfeed"'])
def test_control_characters_and_surrogates_are_refused(text: str):
    problem = problems_of(GOOD.replace("folder: runs/test", f"folder: {text}")).problems[0]
    assert (problem.key, problem.code) == ("output.folder", "not-text")
    assert str(problem).isprintable()


@pytest.mark.parametrize("character", ["\x07", "\x1b", "\x7f", "\x92", "\ufffe", "\x00"])
def test_raw_control_characters_are_named_by_their_own_code_point(character: str):
    for text in (GOOD + f"# {character}\n", (GOOD + f"# {character}\n").encode()):
        (problem,) = problems_of(text).problems
        assert problem.code == "not-text" and f"character U+{ord(character):04X} is not" in problem.message


def test_aliases_are_read_where_they_stay_small():
    assert parse("a: &x [1, 2]\nb: *x", "").value == {"a": [1, 2], "b": [1, 2]}


def test_byte_order_mark_and_windows_line_ends_are_fine():
    text = b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode()
    assert loads(text).config == load_variant().config


def test_depth_limit_is_exact():
    assert parse("[" * MAX_DEPTH + "]" * MAX_DEPTH, "").value is not None
    with pytest.raises(InvalidConfig, match="nested deeper"):
        parse("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "")


def test_every_value_has_its_line_and_column():
    lines = GOOD.splitlines()
    places = load_variant().sources
    for section, block in BASE.items():
        start = lines.index(f"{section}:")
        for offset, key in enumerate(block, 1):
            place = places[f"{section}.{key}"]
            assert (place.line, place.column) == (start + offset + 1, len(key) + 5)


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo"])
def test_what_is_not_a_file(tmp_path, kind: str):
    import os

    path = tmp_path / "run.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    with pytest.raises(InvalidConfig) as caught:
        read(path)
    assert caught.value.problems[0].code == "no-file"


def test_largest_texts_take_less_than_a_second_of_cpu():
    size = MAX_BYTES - 10
    hostile = [
        "- 1\n" * (size // 4),
        "[" + "1," * (size // 2),
        "{" + "a: 1," * (size // 6) + "}",
        "? a\n: b\n" * (size // 8),
        "".join(" " * depth + "a:\n" for depth in range(20)) + "  b: 1\n" * (size // 8),
        "[" * 20 + "[a]," * (size // 4 - 20),
        "&a " * (size // 3),
        ":" * size,
        "9" * size,
    ]
    for text in hostile:
        start = time.process_time()
        try:
            parse(text, "")
        except InvalidConfig:
            pass
        assert time.process_time() - start < 1.0, text[:20]


def test_a_float_stays_the_same_float():
    for value in (3e-4, 1e-8, 0.1, 1 / 3, 123456.789, 5e300):
        assert parse(repr(value), "").value == value and math.isfinite(value)


@pytest.mark.parametrize("character", ["\x07", "\x1b", "\x00", "\x9f", "\ufffe"])
def test_a_refused_character_is_named_by_its_own_code_point(character: str):
    (problem,) = problems_of(f"a: {character}").problems
    assert f"U+{ord(character):04X}" in problem.message and problem.place[1:] == (1, 4)
