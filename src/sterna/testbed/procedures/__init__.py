"""What scenarios do, by the `kind` that their files name it with."""

from sterna.testbed.procedures.cancel import Cancel
from sterna.testbed.procedures.failover import Failover
from sterna.testbed.procedures.faults import Faults
from sterna.testbed.procedures.many import Many
from sterna.testbed.procedures.migrate import Migrate
from sterna.testbed.procedures.reclaim import Reclaim
from sterna.testbed.procedures.ssh import Ssh

Procedure = Cancel | Failover | Faults | Many | Migrate | Reclaim | Ssh

__all__ = ["Procedure"]
