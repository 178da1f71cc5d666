"""What can go wrong with a migration, and whose doing it is.

::

    MigrationError
    ├── UriError            the user's URI is malformed or of an unknown kind
    ├── ParameterError      a parameter or capability is unknown, out of its limits, or not implemented
    ├── StateError          the call does not fit the migration's state (one is running already)
    ├── ChannelError        the host or the network: connecting, reading or writing failed
    │   ├── ConnectionRefused   nobody listens there
    │   └── Unsynced            the file with the guest is complete, but a power failure may undo that
    ├── Cancelled           the user cancelled
    ├── ProtocolError       the peer breaks the rules of the handover (`sterna.migration.handshake`)
    ├── Refused             the destination refused the guest; the text carries its reason
    ├── GivenUp             the policy sees no way to converge as asked; the text says why and what would do
    ├── VerificationError   both ends disagree about guest RAM
    ├── LostWriteError      the audit found a write that the dirty log has not
    └── InDoubt             nobody can say which of the two runs the guest

Corrupt streams raise `sterna.stream.wire.StreamError`, which names section and offset.
"""

from sterna.errors import Error


class MigrationError(Error):
    """A migration failed or cannot start; one line that says what and why."""


class UriError(MigrationError):
    """The migration URI is malformed."""


class ParameterError(MigrationError):
    """A migration parameter or capability is unknown, out of its limits, or not implemented."""


class StateError(MigrationError):
    """The call does not fit the migration's present state; the text names both."""


class ChannelError(MigrationError):
    """Connecting, reading or writing failed; the text names the peer and the cause."""


class ConnectionRefused(ChannelError):
    """The address refuses connections. That tells nothing about whoever listened there before."""


class Unsynced(ChannelError):
    """The file is complete and in its place; whether that outlasts a power failure is not known."""


class Cancelled(MigrationError):
    """The migration was cancelled."""


class Refused(MigrationError):
    """The destination refused the guest."""


class GivenUp(MigrationError):
    """The migration's policy gave it up."""


class VerificationError(MigrationError):
    """Guest RAM differs between source and destination."""


class LostWriteError(MigrationError):
    """A page was written after it was sent, and the dirty log does not have it."""


class ProtocolError(MigrationError):
    """The peer sent something that the rules of the handover do not allow."""


class InDoubt(MigrationError):
    """The destination was told to run the guest and could not be asked whether it does."""
