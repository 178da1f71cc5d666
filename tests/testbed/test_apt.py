"""Where packages come from, and that those which are kept are still what the signed index says. apt itself is stood in for."""

import hashlib
from pathlib import Path

import pytest

from sterna.testbed.debian import apt
from sterna.testbed.debian.apt import Apt
from sterna.testbed.errors import ImageError

APT = """#!/bin/sh
case "$*" in
*indextargets*) cat "$STAND_IN/targets";;
*--print-uris*) cat "$STAND_IN/uris";;
*download*)
    echo "$*" | sed 's/.* download/download/' >> "$STAND_IN/downloads"
    cp "$STAND_IN"/served/* .;;
esac
"""
CONTENTS = {"one_1%3a2-3_arm64.deb": b"first", "two_5_all.deb": b"second", "doc_1_all.deb": b"left out"}


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What apt prints, serves and was asked for, as files."""
    programs, files = tmp_path / "bin", tmp_path / "stand-in"
    (files / "served").mkdir(parents=True)
    programs.mkdir()
    for name in ("apt-get", "dpkg-deb"):
        (programs / name).write_text(APT)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("STAND_IN", str(files))
    monkeypatch.delenv("STERNA_DEBIAN_MIRROR", raising=False)
    (tmp_path / "keyring").touch()
    monkeypatch.setattr(apt, "_KEYRING", tmp_path / "keyring")
    (files / "targets").write_text("http://archive.example/debian/ Debian\n")
    for name, content in CONTENTS.items():
        if name != "doc_1_all.deb":
            (files / "served" / name).write_bytes(content)
    (files / "uris").write_text(
        "Reading package lists...\n"
        + "".join(
            f"'http://archive.example/pool/{name}' {name} {len(content)} SHA256:{hashlib.sha256(content).hexdigest()}\n"
            for name, content in CONTENTS.items()
        )
    )
    return files


def fetched(tmp_path: Path) -> dict[str, bytes]:
    packages = Apt(tmp_path / "state", "arm64").packages(["one"], left_out=["doc"])
    return {path.name: path.read_bytes() for path in packages}


def sources(tmp_path: Path) -> str:
    return (tmp_path / "state/bookworm/arm64/etc/sources.list").read_text().split("] ")[1]


def asked_for(stand_in: Path) -> list[str]:
    log = stand_in / "downloads"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


WANTED = {name: content for name, content in CONTENTS.items() if not name.startswith("doc")}


def test_what_is_kept_is_not_fetched_again(stand_in: Path, tmp_path: Path) -> None:
    assert fetched(tmp_path) == WANTED
    assert asked_for(stand_in) == ["download one=1:2-3 two=5"]
    assert fetched(tmp_path) == WANTED
    assert asked_for(stand_in) == []


@pytest.mark.parametrize("spoilt", [b"secons", b"second ", b""])
def test_what_is_no_longer_what_the_index_says_is_fetched_anew(
    stand_in: Path, tmp_path: Path, spoilt: bytes
) -> None:
    fetched(tmp_path)
    asked_for(stand_in)
    (tmp_path / "state/archives/two_5_all.deb").write_bytes(spoilt)
    assert fetched(tmp_path) == WANTED
    assert asked_for(stand_in) == ["download two=5"]


def test_what_is_fetched_is_compared_too(stand_in: Path, tmp_path: Path) -> None:
    (stand_in / "served/two_5_all.deb").write_bytes(b"another")
    with pytest.raises(ImageError, match=r"apt-get downloaded no two_5_all\.deb as the index has it"):
        fetched(tmp_path)


def test_the_archive_is_the_one_that_the_machine_uses(stand_in: Path, tmp_path: Path) -> None:
    (stand_in / "targets").write_text(
        "http://other.example/debian-security/ Debian-Security\nhttp://archive.example/here/ Debian\n"
    )
    fetched(tmp_path)
    assert sources(tmp_path) == "http://archive.example/here/ bookworm main\n"


def test_before_an_update_it_is_told_by_its_path(stand_in: Path, tmp_path: Path) -> None:
    (stand_in / "targets").write_text("http://a.example/debian-security/ \nhttp://a.example/debian/ \n")
    fetched(tmp_path)
    assert sources(tmp_path) == "http://a.example/debian/ bookworm main\n"


def test_or_the_one_that_is_named(stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STERNA_DEBIAN_MIRROR", "http://named.example/debian")
    fetched(tmp_path)
    assert sources(tmp_path) == "http://named.example/debian bookworm main\n"


def test_without_either_it_is_said_what_to_do(stand_in: Path, tmp_path: Path) -> None:
    (stand_in / "targets").write_text("http://archive.example/ubuntu/ Ubuntu\n")
    with pytest.raises(ImageError, match="name one by STERNA_DEBIAN_MIRROR=URL"):
        fetched(tmp_path)
