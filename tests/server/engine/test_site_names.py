from __future__ import annotations

import pytest

from server.engine.site_names import SiteNameError, parse_site


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("resid_post.14", ("resid_post", 14)),
        ("mlp_act.0", ("mlp_act", 0)),
        ("blocks.14.hook_resid_post", ("resid_post", 14)),
        ("blocks.0.hook_mlp_out", ("mlp_out", 0)),
        ("blocks.3.hook_attn_out", ("attn_out", 3)),
        ("blocks.3.attn.hook_z", ("head_out", 3)),
        ("blocks.3.mlp.hook_post", ("mlp_act", 3)),
    ],
)
def test_both_spellings_name_a_site(name: str, site: tuple[str, int]) -> None:
    assert parse_site(name) == site


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("resid_post", "resid_post.14"),
        ("resid_post.-1", "resid_post.14"),
        ("resid_mid.3", "the points are"),
        ("blocks.3.hook_resid_mid", "hook_resid_post"),
        ("blocks.3.hook_resid_pre", "resid_post.2, the same tensor"),
        ("resid_pre.3", "resid_post.2, the same tensor"),
        ("blocks.x.hook_resid_post", "blocks.14"),
        ("", "no site"),
    ],
)
def test_what_names_no_site_is_refused_with_what_to_write(name: str, word: str) -> None:
    with pytest.raises(SiteNameError, match=word):
        parse_site(name)
