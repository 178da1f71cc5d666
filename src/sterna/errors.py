"""What this program raises, and whose doing it is.

::

    Error
    ├── InternalError       a fault of this program
    ├── HostError           files, addresses and names of this computer (`sterna.host`)
    ├── UnknownName         nothing is registered under a name (`sterna.registry`)
    ├── PluginError         another distribution's entry point that cannot be loaded
    ├── KernelError         a kernel that cannot be compiled, or failed (`sterna.jit`)
    ├── RamError            guest RAM that the host does not give
    ├── OutOfTablesError    a stage-2 table that finds no room
    ├── DirtyLogError       a range that a dirty log does not have
    ├── HypervisorError     what a hypervisor refuses; Unsupported: this host has not what a VM needs
    ├── MachineError        a machine that cannot be made as asked, or not do what it was told
    ├── GuestError          a guest program, or what it left in memory
    ├── StreamError         a migration stream that breaks its rules; it names section and offset
    ├── MigrationError      a migration, and the rules between its two ends (`sterna.migration.errors`)
    ├── NotTheOwner         a guest that may run elsewhere is not to run here
    ├── MonitorError        QMP: a command that fails, a peer that does not speak it
    ├── LaunchError         processes of virtual machines, and test beds of them
    ├── BenchError          a measurement that cannot be made
    └── CliError            what the command line tells its user

A few are built-in errors besides, where callers expect these. `tests/test_errors.py` holds that nothing grows beside the tree.
"""


class Error(Exception):
    """Something is wrong with what was asked for, with what a peer, a guest or a file said, or with what this host has.

    The text is one line for people, which says what is wrong.
    """


class InternalError(Error):
    """Something that cannot be: a fault of this program, not of its user, a peer or the host."""
