"""Migration URIs: which kinds there are, and what each can do."""

from collections.abc import Callable, Mapping

from sterna.migration.channels import exec as exec_channel
from sterna.migration.channels import fd, file, tcp, unix
from sterna.migration.errors import UriError

Uri = tcp.TcpUri | unix.UnixUri | exec_channel.ExecUri | fd.FdUri | file.FileUri
"""A parsed URI. Every kind has `connect`; `tcp:` and `unix:` have `listen`, the others `open_incoming`."""

ListeningUri = tcp.TcpUri | unix.UnixUri
"""The kinds a destination listens on; a source can reach it there more than once."""

_KINDS: Mapping[str, Callable[[str], Uri]] = {
    "tcp": tcp.parse,
    "unix": unix.parse,
    "exec": exec_channel.parse,
    "fd": fd.parse,
    "file": file.parse,
}
FORMS = ", ".join((tcp.FORM, unix.FORM, exec_channel.FORM, fd.FORM, file.FORM))


def parse(uri: str) -> Uri:
    """
    :raise UriError: When the kind is unknown or the rest malformed; it names what is wrong and the accepted
        forms.
    """
    shown = uri if len(uri) <= 100 else uri[:97] + "..."
    kind, colon, rest = uri.partition(":")
    if not colon:
        raise UriError(f"{shown!r} is not a migration URI: the kind is missing; expected one of {FORMS}")
    if kind not in _KINDS:
        raise UriError(f"{shown!r} is not a migration URI: no kind {kind[:20]!r}; expected one of {FORMS}")
    return _KINDS[kind](rest)


def parse_destination(uri: str) -> Uri:
    """The same of where somebody is to be connected to.

    :raise UriError: As `parse`, and when nobody can wait there.
    """
    target = parse(uri)
    if isinstance(target, tcp.TcpUri) and not target.port:
        raise UriError(
            f"{target}: nobody can be connected to at port 0, by which a destination has a free one chosen; "
            "give the one that it waits at"
        )
    return target
