"""The place of compiled kernels."""

import os

import pytest

from sterna.memory import kernelcache
from sterna.memory.kernelcache import UnsafeError, source_digest


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


def test_sources_that_have_changed_since_the_program_began_tell_nothing(package):
    changed = max(path.stat().st_ctime for path in package.rglob("*.py"))
    assert source_digest(package, changed) == source_digest(package)
    with pytest.raises(UnsafeError, match=r"layout\.py has changed since|kernels\.py has changed since"):
        source_digest(package, changed - 10)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of this program's, and an empty place for temporary files, with whatever umask."""
    before = os.umask(0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(kernelcache, "_not_written", {})
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(kernelcache, "_said", [])
    yield tmp_path / "cache"
    os.umask(before)
    assert not list((tmp_path / "tmp").iterdir())


def modes(cache):
    return {path.name: path.stat().st_mode & 0o777 for path in (cache / "sterna").rglob("*")}


def test_what_is_kept_is_read_and_nobody_elses(cache, capsys):
    assert kernelcache.read("one") is None
    kernelcache.write("one", b"code")
    assert kernelcache.read("one") == b"code"
    assert modes(cache) == {kernelcache.program_digest(): 0o700, "one": 0o600}
    assert (cache / "sterna").stat().st_mode & 0o777 == 0o700
    assert capsys.readouterr().err == ""


def others_may_write(path):
    path.chmod(path.stat().st_mode | 0o020)


def everybody_may_write(path):
    path.chmod(path.stat().st_mode | 0o002)


def it_is_a_link(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def it_is_anothers(path):
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    os.chown(path, 65534, 65534)


@pytest.mark.parametrize("which", ["parent", "directory", "file"])
@pytest.mark.parametrize("spoil", [others_may_write, everybody_may_write, it_is_a_link, it_is_anothers])
def test_what_somebody_else_could_have_written_is_not_read(cache, which, spoil, capsys):
    kernelcache.write("one", b"code")
    directory = kernelcache.cache_directory()
    spoil({"parent": directory.parent, "directory": directory, "file": directory / "one"}[which])
    assert kernelcache.read("one") is None
    assert kernelcache.read("one") is None
    said = capsys.readouterr().err
    assert said.startswith("sterna: kernels are compiled by each program anew: ")
    assert str(directory.parent) in said or "one" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("spoil", [others_may_write, it_is_a_link, it_is_anothers])
def test_nothing_is_written_where_somebody_else_could_exchange_it(cache, spoil, capsys):
    kernelcache.write("one", b"code")
    spoil(kernelcache.cache_directory())
    for name in ("two", "three"):
        kernelcache.write(name, b"code")
        assert kernelcache.read(name) == b"code", "this program has it all the same"
    assert capsys.readouterr().err.count("\n") == 1
    assert sorted(path.name for path in cache.rglob("t*")) == []


def test_a_cache_that_cannot_be_made_is_said_once_and_done_without(cache, capsys):
    cache.write_text("in the way")
    kernelcache.write("one", b"code")
    kernelcache.write("two", b"code")
    assert kernelcache.read("one") == b"code"
    assert capsys.readouterr().err.count("\n") == 1


def test_few_directories_are_kept_and_those_used_last(cache):
    parent = cache / "sterna"
    parent.mkdir(parents=True, mode=0o700)
    for n in range(12):
        (parent / f"other{n}").mkdir()
        os.utime(parent / f"other{n}", (n, n))
    (parent / "link").symlink_to("nowhere")
    kernelcache.write("one", b"code")
    kept = {path.name for path in parent.iterdir()}
    assert kept >= {kernelcache.program_digest(), "other11", "other6"}
    assert len(kept) <= 9
