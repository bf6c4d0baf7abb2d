"""Where things are kept that can be made again."""

import sys
from pathlib import Path

import pytest

import cmr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows names its folder otherwise")
def test_the_cache_folder_is_where_the_user_says_or_the_system(monkeypatch):
    for name, value, wanted in (
        ("CMR_CACHE", "/mine", "/mine/cmr"),
        ("XDG_CACHE_HOME", "/xdg", "/xdg/cmr"),
        ("HOME", "/home/lily", "/home/lily/.cache/cmr"),
    ):
        for other in ("CMR_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv(name, value)
        assert cmr.cache_folder() == Path(wanted)
    monkeypatch.setenv("CMR_CACHE", "/mine")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cmr.cache_folder() == Path("/mine/cmr")
    for name in ("CMR_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name)
    assert cmr.cache_folder() is None


@pytest.mark.skipif(sys.platform == "win32", reason="the test names a folder of other systems")
def test_kernels_lie_in_the_same_folder(monkeypatch):
    from cmr.ops.kernels import machine_code

    monkeypatch.setenv("CMR_CACHE", "/mine")
    assert machine_code.cache_folder().parent == cmr.cache_folder()
