"""Paths as users write them: what `~` stands for, and what is no path at all."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from bench.inputs.errors import ConfigError
from bench.inputs.paths import LONGEST_NAME, user_path

USER = pwd.getpwuid(os.getuid())

PATHS = {
    "~": "{home}",
    "~/results": "{home}/results",
    "~/a/~": "{home}/a/~",
    "~" + USER.pw_name: USER.pw_dir,
    f"~{USER.pw_name}/x": USER.pw_dir + "/x",
    "results": "results",
    "./~": "~",
    "a/~/b": "a/~/b",
    "/absolute": "/absolute",
    "../beside": "../beside",
    "2024_11_26": "2024_11_26",
    "x" * LONGEST_NAME: "x" * LONGEST_NAME,
}


@pytest.mark.parametrize("text", PATHS, ids=[text[:20] for text in PATHS])
def test_only_a_tilde_at_the_start_is_a_home(
    text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("results_dir", text) == Path(PATHS[text].format(home=tmp_path))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "results_dir=''"),
        ("a\0b", "NUL"),
        ("~nosuchuser", "the home folder ~nosuchuser is not known"),
        ("~nosuchuser/results", "the home folder ~nosuchuser is not known"),
        ("x" * (LONGEST_NAME + 1), "255 bytes"),
        ("a/" + "ä" * 128, "255 bytes"),
    ],
)
def test_what_is_no_path_is_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as said:
        user_path("results_dir", text)
    assert "\n" not in str(said.value)
    assert len(str(said.value)) < 200


def test_without_the_variable_the_home_is_the_account_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    assert user_path("results_dir", "~/x") == Path(USER.pw_dir) / "x"
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 3)  # an account that the system does not know
    with pytest.raises(ConfigError, match="the home folder ~ is not known"):
        user_path("results_dir", "~/x")
