"""`sterna stream` on streams that a migration wrote, and on files that are none."""

import json
import random
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from tests.analysis.test_survey import END, HEADER
from tests.migration.pairs import hosts, source_guest

from sterna.analysis.ram_survey import PageSurvey
from sterna.cli.pagemap import page_runs, show_page_maps
from sterna.memory.ram import RamBlock
from sterna.migration.statistics import MigrationStatus
from sterna.stream.multifd.format import Init
from sterna.stream.ram.decoder import RamDecoder
from sterna.stream.reader import SectionPiece, StreamReader
from sterna.stream.wire import SectionType


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A running guest, written to a file with its digests."""
    path = tmp_path_factory.mktemp("streams") / "guest.stream"
    with hosts(source_guest(16)) as (here,):
        here.controller.set_parameters({"x-sterna-verify": "on"})
        assert here.migrate(f"file:{path}").status is MigrationStatus.COMPLETED
    return path


def one_line(error: str) -> str:
    assert error.startswith("sterna: error: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error


def test_info(cli, stream: Path) -> None:
    code, out, error = cli("stream", "info", str(stream))
    assert (code, error) == (0, "")
    for text in ("double-1.0", "double.ram", "cpu", "disk", "sterna/ram-digest", "page data", "Passes"):
        assert text in out
    assert not [line for line in out.splitlines() if line != line.rstrip()]


def test_info_json(cli, stream: Path) -> None:
    code, out, error = cli("stream", "info", "--json", str(stream))
    assert (code, error) == (0, "")
    report = json.loads(out)
    size = stream.stat().st_size
    assert report["bytes"] == size == sum(report["bytes_by_kind"].values())
    assert (report["machine"], report["page_bytes"], report["fault"]) == ("double-1.0", 4096, None)
    [block] = report["ram_blocks"]
    assert (block["name"], block["pages"], block["sent"]) == ("double.ram", 16, 16)
    sections = {section["name"]: section for section in report["sections"]}
    assert sections["disk"]["fields"] == {"cache": list(range(24))}
    assert sections["cpu"]["fields"]["running"] == 1
    assert report["passes"][0]["normal"] + report["passes"][0]["zero"] == 16


def test_page_maps(cli, stream: Path, tmp_path: Path) -> None:
    code, out, error = cli("stream", "info", "--pages", str(stream))
    assert (code, error) == (0, "")
    [line] = [line for line in out.splitlines() if line.startswith("        0  ")]
    [block] = json.loads(cli("stream", "info", "--pages", "--json", str(stream))[1])["ram_blocks"]
    times = [often for _, pages, often in block["page_runs"] for _ in range(pages)]
    assert line.split()[1] == "".join(str(often) for often in times)
    assert (len(times), max(times), sum(often > 0 for often in times)) == (16, block["most"], block["sent"])
    assert "page_runs" not in json.loads(cli("stream", "info", "--json", str(stream))[1])["ram_blocks"][0]
    # Up to where it is broken, some pages have not come.
    cut = tmp_path / "cut"
    cut.write_bytes(stream.read_bytes()[:9000])
    out = cli("stream", "info", "--pages", str(cut))[1]
    [line] = [line for line in out.splitlines() if line.startswith("        0  ")]
    assert set(line.split()[1]) == {"1", "_"}


def test_a_page_map_of_much_ram_has_many_pages_to_a_character(capsys: pytest.CaptureFixture[str]) -> None:
    times = np.ones(3000, dtype=np.uint32)
    times[1000:1004] = 0
    times[2000] = 12
    times[2999] = 2
    show_page_maps([PageSurvey("ram", 3000, times, np.zeros(0, dtype=np.uint64))])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "Pages of ram, 3 to a character"
    rows = [line.split() for line in lines[2:-2]]
    assert [int(first) for first, _ in rows] == list(range(0, 3000, 192))
    estimate = "".join(row for _, row in rows)
    assert len(estimate) == 1000
    assert (estimate[332:336], estimate[666], estimate[-1]) == ("1??1", "+", "2")
    assert page_runs(times) == [
        [0, 1000, 1],
        [1000, 4, 0],
        [1004, 996, 1],
        [2000, 1, 12],
        [2001, 998, 1],
        [2999, 1, 2],
    ]
    assert page_runs(times[:0]) == []


def test_digests(cli, stream: Path, tmp_path: Path) -> None:
    code, out, error = cli("stream", "info", "--digests", "--json", str(stream))
    assert (code, error) == (0, "")
    report = json.loads(out)
    sections = {section["name"]: section["fields"] for section in report["sections"]}
    digest = f"{sections['sterna/ram-digest']['root']:016x}"
    assert report["ram_digest"] == {"all": digest, "blocks": {"double.ram": digest}}
    assert digest in cli("stream", "info", "--digests", str(stream))[1]
    content = stream.read_bytes()
    memory = tmp_path / "memory"
    memory.write_bytes(bytes(16 * 4096))
    assert digest not in cli("stream", "digest", f"double.ram={memory}")[1]
    memory.write_bytes(ram_of(content))
    code, out, error = cli("stream", "digest", f"double.ram={memory}")
    assert (code, error) == (0, "")
    assert out.count(digest) == 2
    report = json.loads(cli("stream", "digest", "--json", f"double.ram={memory}")[1])
    assert report == {"all": digest, "blocks": {"double.ram": digest}}
    empty, odd = tmp_path / "empty", tmp_path / "odd"
    empty.touch()
    odd.write_bytes(bytes(4097))
    for arguments, text in (
        (["memory"], "expected BLOCK=FILE"),
        (["a=/none/such"], "No such file"),
        ([f"a={empty}"], f"{empty}: the file is empty"),
        ([f"a={odd}"], f"{odd}: 4097 bytes are not whole pages of 4096 bytes"),
        ([f"a={memory}", f"b={memory}", f"a={memory}"], "block 'a' is given twice"),
    ):
        code, out, error = cli("stream", "digest", *arguments)
        assert (code, out) == (2, "")
        assert text in one_line(error)


def ram_of(content: bytes) -> bytes:
    """Guest RAM of the stream, from its records."""
    with RamBlock("double.ram", 16 * 4096) as block:
        reader = StreamReader(BytesIO(content))
        reader.next()
        decoder = RamDecoder([block])
        while isinstance(piece := reader.next(), SectionPiece) and piece.header.name == "ram":
            if piece.type is SectionType.START:
                decoder.read_setup(reader)
            else:
                decoder.read_records(reader)
        return block.data.tobytes()


def test_verify(cli, stream: Path) -> None:
    code, out, error = cli("stream", "verify", str(stream))
    assert (code, error) == (0, "")
    assert f"ok: {stream.stat().st_size} bytes, 1 RAM block with 16 pages" in out
    assert "3 device sections (3 decoded)" in out
    assert json.loads(cli("stream", "verify", "--json", str(stream))[1])["ok"] is True


def test_a_channel_that_is_none_or_is_not_read_is_said(cli, stream: Path, tmp_path: Path) -> None:
    empty, channel, without_ram = tmp_path / "empty", tmp_path / "channel", tmp_path / "without-ram"
    empty.touch()
    channel.write_bytes(Init(bytes(16), 0).encode())
    without_ram.write_bytes(HEADER + END)
    for main, channels, expected, code in (
        (stream, [empty], f"section '{empty}', offset 0x0: the stream is cut short here", 1),
        (stream, [channel, channel], f"the channel {channel} is given twice", 2),
        (
            without_ram,
            [channel],
            f"section '{channel}': nothing of it was read: the main stream has no guest RAM",
            1,
        ),
    ):
        for command in ("info", "verify"):
            given = [part for one in channels for part in ("--channel", str(one))]
            left, _, error = cli("stream", command, str(main), *given)
            assert (one_line(error), left) == (f"sterna: error: {main}: {expected}\n", code)


def test_verify_names_the_first_bad_byte(cli, stream: Path, tmp_path: Path) -> None:
    content = stream.read_bytes()
    footer = content.index(b"\x04\0\0\0\3\4disk") + 5 + 5 + 8 + 24
    assert content[footer] == 0x7E
    bad = tmp_path / "bad"
    bad.write_bytes(content[:footer] + b"\x7f" + content[footer + 1 :])
    for arguments in (["verify"], ["info"], ["verify", "--json"], ["info", "--json"]):
        code, out, error = cli("stream", *arguments, str(bad))
        assert code == 1
        expected = f"section 'disk', offset {footer:#x}: the section's footer is missing: 0x7f in its place"
        assert expected in one_line(error)
        if "--json" in arguments:
            assert json.loads(out)["fault"]["offset"] == footer
        elif arguments == ["info"]:
            assert "double.ram" in out


def test_diff(cli, stream: Path, tmp_path: Path) -> None:
    assert cli("stream", "diff", str(stream), str(stream))[0] == 0
    content = bytearray(stream.read_bytes())
    content[content.rindex(bytes(range(24))) + 5] = 0xFF
    content[content.rindex(b"double.ram", 0, len(content) // 2) + 100] ^= 1
    other = tmp_path / "other"
    other.write_bytes(content)
    code, out, error = cli("stream", "diff", str(stream), str(other))
    assert (code, error) == (1, "")
    assert "cache[5]" in out
    code, out, _ = cli("stream", "diff", "--json", str(stream), str(other))
    assert code == 1
    report = json.loads(out)
    assert report["equal"] is False
    assert [one["field"] for one in report["fields"]] == ["cache[5]"]
    assert (report["fields"][0]["left"], report["fields"][0]["right"]) == ("5", "255")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "No such file"),
        (b"", "the file is empty"),
        (b"#!/bin/sh\necho hello\n", "no migration stream"),
        (random.Random(1).randbytes(100_000), "no migration stream"),
        (b"QEVM", "cut short"),
        (b"\x11\x22\x33\x44" + bytes(60), "multifd"),
        (b"QEVM\0\0\0\3\7\0\0\0\3\x1b[2\x42", "no part of a stream begins with the byte 0x42"),
    ],
)
def test_files_that_are_no_streams(
    cli, tmp_path: Path, content: bytes | None, expected: str, stream: Path
) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    unread = content is None
    for arguments, code in (
        (["info"], 2 if unread else 1),
        (["verify"], 2 if unread else 1),
        (["diff", str(stream)], 2),
        (["info", "--json"], 2 if unread else 1),
        (["diff", "--json", str(stream)], 2),
    ):
        found, out, error = cli("stream", *arguments, str(path))
        assert found == code
        assert str(path) in one_line(error)
        assert "\x1b" not in out + error
        assert expected in error
        assert (out.count("\n") == 1 and bool(json.loads(out))) == ("--json" in arguments)
        if unread and out:
            assert json.loads(out) == {"status": "error", "error": error[len("sterna: error: ") : -1]}


def spliced(content: bytes, kind: str) -> bytes:
    """The stream with something in it that cannot be read here, as QEMUs write it."""
    records = content.index(b"\x02\0\0\0\1") + 5
    match kind:
        case "compress":
            return content[:records] + (0x100).to_bytes(8, "big") + content[records + 8 :]
        case "multifd":
            setup_end = content.index((0x10).to_bytes(8, "big") + b"\x7e")
            return content[:setup_end] + (0x200).to_bytes(8, "big") + content[setup_end:]
        case "postcopy":
            opening = content.index(b"\x01\0\0\0\1\3ram")
            return content[:opening] + b"\x08\0\7\0\4\0\0\0\0" + content[opening:]
        case _:
            last = content.rindex(b"\x03\0\0\0\1")
            return content[:last] + b"\x02" + content[last + 1 :]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("compress", "streams with the capability compress cannot be read"),
        ("multifd", "those of QEMU 8 and later cannot be read"),
        ("postcopy", "streams with postcopy cannot be read"),
        ("no-end", "before the last part of: ram; with background-snapshot"),
    ],
)
def test_what_cannot_be_read_is_not_called_damaged(
    cli, tmp_path: Path, kind: str, expected: str, stream: Path
) -> None:
    path = tmp_path / kind
    path.write_bytes(spliced(stream.read_bytes(), kind))
    for arguments in (["info"], ["verify"], ["info", "--json"], ["verify", "--json"], ["diff", str(stream)]):
        code, out, error = cli("stream", *arguments, str(path))
        assert expected in one_line(error)
        assert code == 7
        if "--json" in arguments:
            report = json.loads(out)
            assert report["fault"]["unsupported"] is True
            assert report.get("ok") is None


def test_other_things_that_cannot_be_read(cli, stream: Path, tmp_path: Path) -> None:
    for path, expected in (
        (tmp_path, f"{tmp_path}: no main.stream in it"),
        ("/dev/zero", "no migration stream"),
        (f"{stream}/x", "directory"),
    ):
        code, _, error = cli("stream", "verify", str(path))
        assert code == (1 if path == "/dev/zero" else 2)
        assert expected in one_line(error)


def test_cuts_and_trailing_bytes(cli, stream: Path, tmp_path: Path) -> None:
    content = stream.read_bytes()
    path = tmp_path / "changed"
    for cut in (10, 70, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:cut])
        code, _, error = cli("stream", "verify", str(path))
        assert code == 1
        assert f"offset {cut:#x}: " in one_line(error)
    path.write_bytes(content + b"more")
    for arguments in (["verify"], ["info"], ["info", "--json"]):
        code, out, error = cli("stream", *arguments, str(path))
        assert code == 1
        assert f"offset {len(content):#x}: 4 bytes after the end of the stream" in one_line(error)
    assert json.loads(out)["bytes_by_kind"]["trailing"] == 4


@pytest.mark.parametrize(
    "arguments",
    [
        ("stream",),
        ("stream", "nope"),
        ("stream", "info"),
        ("stream", "diff", "x"),
        ("stream", "info", "--x", "y"),
    ],
)
def test_wrong_calls(cli, arguments: tuple[str, ...]) -> None:
    code, _, error = cli(*arguments)
    assert code == 2
    assert "Traceback" not in error


def test_what_a_terminal_would_obey_is_not_printed(cli, stream: Path, tmp_path: Path) -> None:
    path = tmp_path / "hostile"
    path.write_bytes(
        stream.read_bytes()
        .replace(b"double.ram", b"\x1b[2J[red]\n")
        .replace(b"double-1.0", b"\x1b]0;pwn\x07..")
    )
    code, out, _ = cli("stream", "info", str(path))
    assert code == 0
    assert "\x1b" not in out
    assert "\x07" not in out
    assert r"\x1b[2J[red]\n" in out
    assert cli("stream", "diff", str(stream), str(path))[0] == 1
