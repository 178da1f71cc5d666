"""Set up at the destination: what the stream says before its first section."""

from contextlib import ExitStack

from sterna.migration.destination.configuration import configuration_error, page_bits
from sterna.migration.destination.context import DestinationContext
from sterna.migration.destination.greeting import Greeting
from sterna.migration.destination.receive import Receive
from sterna.migration.errors import Refused
from sterna.migration.phase import Phase
from sterna.migration.statistics import MigrationStatus
from sterna.stream.reader import CommandPiece
from sterna.stream.sections import Configuration


class SetUp(Phase):
    """Compares configurations, and greets a source that greets."""

    def __init__(self, context: DestinationContext, greeting: Greeting) -> None:
        self._context, self._greeting = context, greeting

    def run(self, stack: ExitStack) -> Receive:
        context, greeting, pending_channels = (
            self._context,
            self._greeting,
            self._context.wait.pending_channels,
        )
        if pending_channels is not None:
            pending_channels.open(context.multifd.admit)
        elif context.parameters.multifd_channels:
            raise Refused(
                f"multifd is on here, and needs several connections: {context.channel.peer} is one; use tcp: or unix:"
            )
        configuration = context.reader.next()
        assert isinstance(configuration, Configuration)
        # The source is told why once it can be: a sterna greets next, a QEMU opens the return path.
        greeting.configuration_error = configuration_error(configuration, context.guest)
        if greeting.configuration_error is None:
            # Not before: what connects is no guest yet, and people are told of this status.
            context.progress.enter(MigrationStatus.ACTIVE)
        while isinstance(event := context.reader.next(), CommandPiece):
            greeting.obey(event)
        greeting.require_configuration()
        return Receive(context, greeting, page_bits(configuration), event)
