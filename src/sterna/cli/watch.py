"""Following one migration to its end through QMP, with a display and a way to cancel."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from sterna.cli.display import Display
from sterna.cli.errors import CliError, ExitCode
from sterna.cli.progressestimate import ProgressEstimate, ProgressEstimator
from sterna.launch.signals import Interrupts
from sterna.launch.watch import watch
from sterna.monitor.answers import BegunMigration, MigrationParameters, RunState
from sterna.monitor.client import ConnectionLost, QmpClient
from sterna.monitor.protocol import QmpError

_POLL_SECONDS = 0.1


def watch_migration(
    client: QmpClient,
    display: Display,
    interrupts: Interrupts,
    on_estimate: Callable[[ProgressEstimate], None] = lambda estimate: None,
    poll_seconds: float = _POLL_SECONDS,
) -> Mapping[str, Any]:
    """Show a migration until it has an outcome. The first interrupt cancels it, the second leaves it alone.

    :param on_estimate: called with each estimate
    :return: the last answer of query-migrate, and as `run-state` what query-status says
    :raise CliError: When the connection is lost, the VM does not say how the migration goes, or the user left.
    """
    cancelled = continued = warned = False

    def on_progress(info: Mapping[str, Any]) -> None:
        nonlocal cancelled, continued, warned
        estimate = estimator.update(info)
        least_ms = info.get("x-sterna", {}).get("least-downtime-ms")
        if not warned and least_ms is not None and least_ms > limit_ms:
            warned = True
            display.note(
                f"a switchover takes some {least_ms:.0f} ms here even with nothing left to send: with a downtime limit of "
                f"{limit_ms} ms the guest only stops after a pass that leaves nothing"
            )
        display.show(estimate)
        if estimate.status == "pre-switchover" and not continued:
            continued = True
            display.note("pre-switchover: the guest is stopped, as pause-before-switchover asks; continuing")
            client.command("migrate-continue", state="pre-switchover")
        on_estimate(estimate)
        if interrupts.count > 1:
            raise CliError("interrupted again: the migration was left being cancelled", ExitCode.INTERRUPTED)
        if interrupts.count and not cancelled:
            cancelled = True
            client.command("migrate_cancel")

    try:
        limit_ms = client.query("query-migrate-parameters", MigrationParameters)["downtime-limit"]
        estimator = ProgressEstimator(limit_ms)
        info = watch(
            lambda: client.query("query-migrate", BegunMigration),
            on_progress,
            lambda: time.sleep(poll_seconds),
        )
        # Where the guest is, its machine says: an outcome alone does not.
        return {**info, "run-state": client.query("query-status", RunState)["status"]}
    except ConnectionLost as error:
        raise CliError(
            f"the VM was lost during the migration, its outcome is unknown here: {error}", ExitCode.LOST
        ) from error
    except QmpError as error:
        raise CliError(
            f"the VM refused a command during the migration, its outcome is unknown here: {error.desc}",
            ExitCode.LOST,
        ) from error
