"""The place of compiled kernels."""

import os

import pytest

from sterna.memory.kernelcache import cache_directory, source_digest


@pytest.fixture
def package(tmp_path):
    package = tmp_path / "package"
    (package / "deep").mkdir(parents=True)
    (package / "deep" / "kernels.py").write_text("from numba import njit\n")
    (package / "deep" / "layout.py").write_text("WORDS = 512\n")
    (package / "other").mkdir()
    (package / "other" / "plain.py").write_text("x = 1\n")
    return package


def test_digest_follows_compiled_sources_and_what_they_are_compiled_with(package):
    before = source_digest(package)
    (package / "other" / "plain.py").write_text("x = 2  # numba is elsewhere\n")
    assert source_digest(package) == before
    (package / "deep" / "layout.py").write_text("WORDS = 1024\n")
    assert source_digest(package) != before
    before = source_digest(package)
    (package / "deep" / "kernels.py").write_text("from numba import njit  # changed\n")
    assert source_digest(package) != before


def test_directory_is_the_users_and_few_are_kept(package, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = set()
    for version in range(12):
        (package / "deep" / "kernels.py").write_text(f"import numba  # {version}\n")
        directory = cache_directory(package)
        os.utime(directory, (version, version))
        made.add(directory)
    assert len(made) == 12
    assert directory.is_dir()
    assert len(list((tmp_path / "cache" / "sterna").iterdir())) <= 9


def test_a_directory_in_use_is_kept(package, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kernels = package / "deep" / "kernels.py"
    mine = kernels.read_text()
    in_use = cache_directory(package)
    for version in range(20):
        kernels.write_text(f"import numba  # {version}\n")
        os.utime(cache_directory(package), (version, version))
        kernels.write_text(mine)
        assert cache_directory(package) == in_use
    assert in_use.is_dir()


def test_unwritable_cache_is_no_error(package, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_directory(package).is_dir()
