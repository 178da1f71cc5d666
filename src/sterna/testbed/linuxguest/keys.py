"""The keys of ssh: made once by OpenSSH's ssh-keygen, and given to dropbear in the form that it reads."""

import base64
import shutil
from dataclasses import dataclass
from pathlib import Path

from sterna.testbed.debian.apt import run
from sterna.testbed.errors import ImageError

HOST, CLIENT = "host_key", "client_key"

_MAGIC = b"openssh-key-v1\0"
_TYPE = b"ssh-ed25519"
_PRIVATE_BYTES = 64
"""Seed and public key."""


@dataclass(frozen=True)
class Keys:
    """A folder with a key for the guest, and one that it lets in.

    :ivar client: the private key, for ssh's `-i`
    """

    folder: Path

    @property
    def client(self) -> Path:
        return self.folder / CLIENT

    def public(self, name: str) -> str:
        """One line, as in known_hosts behind the host's name, and in authorized_keys."""
        return " ".join((self.folder / f"{name}.pub").read_text().split()[:2])

    def host_for_dropbear(self) -> bytes:
        """The guest's private key.

        :raise ImageError: When ssh-keygen's file is not what it was.
        """
        return to_dropbear((self.folder / HOST).read_text())

    def make(self) -> None:
        """Make those that are not there.

        :raise ImageError: When ssh-keygen is missing or fails.
        """
        if shutil.which("ssh-keygen") is None:
            raise ImageError("ssh-keygen is missing: apt install openssh-client")
        self.folder.mkdir(parents=True, exist_ok=True)
        for key in (self.folder / HOST, self.client):
            if not key.with_suffix(".pub").exists():
                key.unlink(missing_ok=True)
                run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "sterna", "-f", str(key)], "keys")


def to_dropbear(text: str) -> bytes:
    """An Ed25519 key in dropbear's form, from OpenSSH's (PROTOCOL.key) without a pass phrase.

    :raise ImageError: When it is none.
    """
    lines = [line for line in text.splitlines() if not line.startswith("-----")]
    try:
        data = base64.b64decode("".join(lines), validate=True)
        if not data.startswith(_MAGIC):
            raise ValueError("no OpenSSH key")
        at = len(_MAGIC)
        for _ in range(3):  # cipher, key derivation, its options
            _, at = _string(data, at)
        at += 4  # number of keys
        _, at = _string(data, at)  # the public key
        private, _ = _string(data, at)
        kind, at = _string(private, 8)  # behind two check values
        public, at = _string(private, at)
        key, _ = _string(private, at)
        if kind != _TYPE or len(key) != _PRIVATE_BYTES or key[32:] != public:
            raise ValueError("no Ed25519 key without a pass phrase")
    except ValueError as error:
        raise ImageError(f"cannot read ssh-keygen's key: {error}") from error
    return b"".join(len(part).to_bytes(4, "big") + part for part in (_TYPE, key))


def _string(data: bytes, at: int) -> tuple[bytes, int]:
    """A string of RFC 4251, and what is behind it."""
    length = int.from_bytes(data[at : at + 4], "big")
    end = at + 4 + length
    if at + 4 > len(data) or end > len(data):
        raise ValueError("cut short")
    return data[at + 4 : end], end
