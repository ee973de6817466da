from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steering_store.errors import InvalidName, InvalidReference, UnsupportedFile
from steering_store.reference import (
    ALIAS_PATTERN,
    DIGEST_PATTERN,
    NAME_PATTERN,
    Reference,
    check_alias,
    check_file_path,
    parse_reference,
)

HEX = "ab" * 32


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sentiment", Reference("sentiment")),
        ("sentiment@3", Reference("sentiment", version=3)),
        ("sentiment@production", Reference("sentiment", alias="production")),
        ("sentiment@v1.2-rc_3", Reference("sentiment", alias="v1.2-rc_3")),
        (f"a.b-c_0@sha256:{HEX}", Reference("a.b-c_0", digest=f"sha256:{HEX}")),
    ],
)
def test_reference_is_read(text: str, expected: Reference) -> None:
    assert parse_reference(text) == expected


@pytest.mark.parametrize(
    "name",
    ["", "..", ".", "../x", "a/b", "a\\b", "a..b", "A", "-a", "_a", "a b", "a\n", "a\x00", "é", "x" * 65, "a%2f"],
)
def test_name_outside_the_grammar_is_refused(name: str) -> None:
    with pytest.raises(InvalidName) as caught:
        parse_reference(name + "@1")
    assert caught.value.param == "name"


@pytest.mark.parametrize(
    "ref", ["", "0", "01", "-1", "+1", "1.0", "1\n", "1@2", "latest", "sha256:", f"sha256:{HEX[:-1]}", f"SHA256:{HEX}",
            f"sha256:{HEX.upper()}", "٣", "9" * 10]
)  # fmt: skip
def test_ref_outside_the_grammar_is_refused(ref: str) -> None:
    with pytest.raises(InvalidReference) as caught:
        parse_reference("a@" + ref)
    assert caught.value.param == "ref"


@pytest.mark.parametrize("alias", ["latest", "", "3", "A", "sha256:0", "a@b", "a\n"])
def test_alias_outside_the_grammar_is_refused(alias: str) -> None:
    with pytest.raises(InvalidName) as caught:
        check_alias(alias)
    assert caught.value.param == "alias"


@settings(deadline=None)
@given(
    st.from_regex(NAME_PATTERN, fullmatch=True).filter(lambda name: ".." not in name),
    st.one_of(
        st.none(),
        st.integers(1, 999_999_999).map(str),
        st.from_regex(DIGEST_PATTERN, fullmatch=True),
        st.from_regex(ALIAS_PATTERN, fullmatch=True).filter(lambda alias: ".." not in alias and alias != "latest"),
    ),
)
def test_reference_is_written_as_it_was_read(name: str, ref: str | None) -> None:
    text = name if ref is None else f"{name}@{ref}"
    assert str(parse_reference(text)) == text


@pytest.mark.parametrize(
    "path", ["../v.safetensors", "/v.safetensors", "a/v.safetensors", "a\\v.safetensors", "..safetensors",
             ".safetensors", "a..safetensors", "", "v.safetensors\n", "v\x00.safetensors"]
)  # fmt: skip
def test_file_path_that_is_not_a_plain_name_is_refused(path: str) -> None:
    with pytest.raises(InvalidName):
        check_file_path(path)


@pytest.mark.parametrize("path", ["v.pt", "v.bin", "v.PKL", "v.safetensors.pt"])
def test_pickle_is_refused_with_the_remedy(path: str) -> None:
    with pytest.raises(UnsupportedFile, match="polyhelm artifact convert"):
        check_file_path(path)


@pytest.mark.parametrize("path", ["v.json", "v.npz", "v", "v.SAFETENSORS"])
def test_only_safetensors_and_labels_are_accepted(path: str) -> None:
    with pytest.raises(UnsupportedFile, match="safetensors"):
        check_file_path(path)
    assert [check_file_path(name) for name in ("v.safetensors", "l.jsonl")] == ["v.safetensors", "l.jsonl"]
