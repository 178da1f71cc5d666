"""The guest's dirty log while it migrates."""

from sterna.migration.guest import MigratableGuest


class DirtyLogging:
    """The dirty log of one migration, and the throttle that goes with it: both end together, however the migration ends."""

    def __init__(self, guest: MigratableGuest) -> None:
        self._guest = guest
        self._on = False
        self._percent = 0

    def start(self) -> None:
        """Log writes to all RAM from now on."""
        self._on = True
        self._guest.start_dirty_logging()

    def throttle(self, percent: int) -> bool:
        """Let the guest's vCPUs stand still for so much of their time.

        :return: whether that is another share than before
        """
        if percent == self._percent:
            return False
        self._percent = percent
        self._guest.throttle(percent)
        return True

    def stop(self) -> None:
        """Let the guest run freely, and log no more. Does nothing when that is so."""
        try:
            self.throttle(0)
        finally:
            if self._on:
                self._on = False
                self._guest.stop_dirty_logging()
