"""Whether the configuration at the head of a stream fits this machine. What does not is said in QEMU's words."""

import logging
import uuid

from sterna.memory.address import PAGE_SHIFT
from sterna.migration.guest import MigratableGuest
from sterna.migration.parameters import CAPABILITIES
from sterna.stream.sections import CONFIGURATION_SECTION, Configuration
from sterna.stream.wire import LEGACY_ARM_PAGE_BITS, StreamError

log = logging.getLogger(__name__)


def page_bits(configuration: Configuration) -> int:
    """Log2 of the stream's page size."""
    return LEGACY_ARM_PAGE_BITS if configuration.page_bits is None else configuration.page_bits


def configuration_error(configuration: Configuration, guest: MigratableGuest) -> StreamError | None:
    """What keeps a guest with this configuration out, if anything does."""
    if configuration.machine != guest.machine_type:
        return _error(
            f"Machine type received is '{configuration.machine}' and local is '{guest.machine_type}'"
        )
    bits = page_bits(configuration)
    if not LEGACY_ARM_PAGE_BITS <= bits <= PAGE_SHIFT:
        return _error(f"Received target_page_bits is {bits} but local is {PAGE_SHIFT}")
    # Those that are sent are needed to read the stream; none of them can be on here.
    for name in configuration.capabilities:
        if name not in CAPABILITIES:
            return _error(f"Received unknown capability {name}")
        return _error(f"Capability {name} is off, but received capability is on")
    if configuration.uuid is not None:
        return _compare_uuids(configuration.uuid, guest.uuid)
    return None


def _compare_uuids(theirs: bytes, ours: bytes | None) -> StreamError | None:
    received = uuid.UUID(bytes=theirs)
    if ours is None:
        log.warning("UUID is received %s, but local uuid isn't set", received)
    elif theirs != ours:
        return _error(f"UUID received is {received} and local is {uuid.UUID(bytes=ours)}")
    return None


def _error(message: str) -> StreamError:
    return StreamError(message, CONFIGURATION_SECTION)
