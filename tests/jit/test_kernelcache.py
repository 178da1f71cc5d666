"""The place of compiled kernels."""

import contextlib
import errno
import io
import os

import pytest
from tests.refusal import Refusal, refusing

from sterna.jit import kernelcache


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


def test_what_is_kept_is_read_and_nobody_elses(cache, capsys):
    assert kernelcache.read("one") is None
    kernelcache.write("one", b"code")
    assert kernelcache.read("one") == b"code"
    modes = {path.name: path.stat().st_mode & 0o777 for path in cache.rglob("*")}
    assert modes == {"sterna-kernels": 0o700, "one": 0o600}
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


@pytest.mark.parametrize("which", ["directory", "file"])
@pytest.mark.parametrize("spoil", [others_may_write, everybody_may_write, it_is_a_link, it_is_anothers])
def test_what_somebody_else_could_have_written_is_not_read(cache, which, spoil, capsys):
    kernelcache.write("one", b"code")
    directory = kernelcache.cache_directory()
    spoil({"directory": directory, "file": directory / "one"}[which])
    assert kernelcache.read("one") is None
    assert kernelcache.read("one") is None
    said = capsys.readouterr().err
    assert said.startswith("sterna: kernels have to be compiled anew: ")
    assert str(directory if which == "directory" else directory / "one") in said
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


@pytest.mark.parametrize("call", ["write", "renameat"])
def test_a_disk_that_is_full_is_said_with_the_directory(cache, call):
    def write():
        with contextlib.redirect_stderr(io.StringIO()) as said:
            kernelcache.write("one", b"code")
        return said.getvalue()

    said = refusing(Refusal(call, errno.ENOSPC), write)
    directory = kernelcache.cache_directory()
    assert said == f"sterna: kernels have to be compiled anew: {directory}: No space left on device\n"
    assert kernelcache.read("one") == b"code", "this program has it all the same"
    assert list(directory.iterdir()) == []


def test_a_file_that_cannot_be_read_is_said_with_its_path(cache):
    kernelcache.write("one", b"code")
    with contextlib.redirect_stderr(io.StringIO()) as said:
        refusing(Refusal("read", errno.EIO), lambda: kernelcache.read("one"))
    path = kernelcache.cache_directory() / "one"
    assert said.getvalue() == f"sterna: kernels have to be compiled anew: {path}: Input/output error\n"


def test_few_files_are_kept_and_those_used_last(cache, monkeypatch):
    monkeypatch.setattr(kernelcache, "_MANY", 8)
    for n in range(8):
        kernelcache.write(f"other{n}", b"code")
        os.utime(kernelcache.cache_directory() / f"other{n}", (n, n))
    assert kernelcache.read("other0") == b"code"
    kernelcache.write("one", b"code")
    kept = {path.name for path in kernelcache.cache_directory().iterdir()}
    assert kept == {"one", "other0", "other6", "other7"}
