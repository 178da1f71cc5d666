"""`sterna testbed host`: an emulated host with the kernel's own KVM."""

import re
import sys
from pathlib import Path

import click

from sterna.cli.errors import CliError, UsageError
from sterna.cli.paths import NamedPath
from sterna.host.printable import printable

_FORWARD = re.compile(r"(?P<here>\d{1,5}):(?P<there>\d{1,5})", re.ASCII)
_MAX_PORT = 65535


@click.command("host")
@click.argument("architecture", type=click.Choice(["arm64"]))
@click.argument("words", metavar="[COMMAND]...", nargs=-1)
@click.option(
    "--cpu",
    type=click.Choice(["cortex-a57", "max"]),
    default="cortex-a57",
    help="cortex-a57: KVM apart from the kernel (nVHE), guests of 32 bits as well. max: KVM inside the kernel (VHE).",
)
@click.option(
    "--kernel",
    type=click.Choice(["stable", "backports"]),
    default="stable",
    help="Debian's stable kernel, or its later one, which has KVM's dirty ring.",
)
@click.option("--smp", type=click.IntRange(1, 8), default=2, help="CPUs of the host.")
@click.option("--memory", default="2G", help="RAM of the host, such as 2G.")
@click.option(
    "--gic", type=click.Choice(["2", "3"]), default="3", help="Version of the interrupt controller."
)
@click.option(
    "--tree",
    type=NamedPath(path_type=Path, exists=True, file_okay=False),
    help="The folder that COMMAND runs in a copy of; its src/ is where Python looks. Else sterna's own.",
)
@click.option(
    "--forward", multiple=True, metavar="PORT:PORT", help="Connects 127.0.0.1:PORT here with PORT there."
)
@click.option(
    "--timeout", type=click.FloatRange(min=1), metavar="SECONDS", help="End the host after so long."
)
@click.option("--update", is_flag=True, help="Build the host anew from today's packages.")
def host(
    architecture: str,
    words: tuple[str, ...],
    cpu: str,
    kernel: str,
    smp: int,
    memory: str,
    gic: str,
    tree: Path | None,
    forward: tuple[str, ...],
    timeout: float | None,
    update: bool,
) -> int:
    """Run COMMAND on an emulated arm64 host with a real KVM; without COMMAND, a shell.

    Debian's kernel and Python under qemu-system-aarch64, with a copy of sterna's sources. Built when first
    asked for, from packages that are fetched; kept in the user's cache. From the host, this machine is 10.0.2.2.

    Exit code: that of COMMAND; 1 when the host cannot be built or breaks.

    Example: sterna testbed host arm64 -- python3 -m sterna doctor
    """
    from sterna.machine.config import ConfigError, parse_memory
    from sterna.testbed.armhost import emulator, image
    from sterna.testbed.armhost.emulator import HostSettings
    from sterna.testbed.armhost.recipe import recipe_for
    from sterna.testbed.errors import ImageError

    if not words and not sys.stdin.isatty():
        raise UsageError("no COMMAND given, and no terminal for a shell")
    try:
        memory_bytes = parse_memory(memory)
    except ConfigError as error:
        raise UsageError(str(error)) from error
    _check_memory(memory_bytes)
    forwards = tuple(_parse_forward(text) for text in forward)
    taken = [here for here, _ in forwards]
    for port in taken:
        if taken.count(port) > 1:
            raise UsageError(f"--forward: port {port} here is given twice")
    settings = HostSettings(cpu, smp, memory_bytes >> 20, int(gic), forwards)

    def progress(text: str) -> None:
        print(f"sterna: {architecture} host: {text}", file=sys.stderr, flush=True)

    try:
        folder = tree or _own_tree()
        built = image.obtain(recipe_for(folder, kernel), update=update, progress=progress)
        return emulator.run(
            built.kernel,
            built.initramfs,
            words or ["sh"],
            settings=settings,
            tree=folder,
            out=sys.stdout.buffer if words else None,
            err=sys.stderr.buffer if words else None,
            timeout_s=timeout,
        )
    except ImageError as error:
        first, *more = str(error).splitlines()
        for line in more:
            print(printable(line), file=sys.stderr)
        raise CliError(first) from error


def _check_memory(size: int) -> None:
    from sterna.host.limits import most_bytes
    from sterna.testbed.armhost.emulator import LEAST_MEMORY_MIB

    if size >> 20 < LEAST_MEMORY_MIB:
        raise UsageError(
            f"--memory: {size >> 20} MiB are too few; the host's files are in its RAM, and it needs {LEAST_MEMORY_MIB} MiB"
        )
    most = most_bytes()
    if most is not None and size > most.size:
        raise UsageError(f"--memory: {size >> 20} MiB is more than the {most.size >> 20} MiB of {most.by}")


def _parse_forward(text: str) -> tuple[int, int]:
    """Two ports, here and there."""
    match = _FORWARD.fullmatch(text)
    here, there = (int(match["here"]), int(match["there"])) if match else (0, 0)
    if not 1 <= here <= _MAX_PORT or not 1 <= there <= _MAX_PORT:
        raise UsageError(f"--forward {text}: write two ports, here and there, such as 4321:4321")
    return here, there


def _own_tree() -> Path:
    """The checkout that this program runs from, or the package where it was installed without one."""
    import sterna

    package = Path(sterna.__file__).resolve().parent
    checkout = package.parent.parent
    return checkout if (checkout / "pyproject.toml").exists() else package
