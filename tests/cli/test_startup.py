"""What the command line costs before it does anything."""

import subprocess
import sys

import pytest

from sterna.cli import COMMANDS

HEAVY = ("numpy", "numba", "unicorn", "rich", "msgspec", "elftools", "xxhash", "sterna.machine", "asyncio")


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [(["--help"], ()), (["--version"], ()), (["migrate", "--help"], ()), (["run", "--help"], ("asyncio",))],
)
def test_help_imports_nothing_heavy(arguments: list[str], allowed: tuple[str, ...]) -> None:
    script = (
        "import sys\nfrom sterna.cli import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n    print(*sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=600, check=True
    )
    imported = set(done.stderr.split())
    assert "sterna.cli" in imported
    assert not [name for name in HEAVY if name in imported and name not in allowed]


@pytest.mark.slow
def test_help_names_every_command_and_each_has_its_own() -> None:
    command = [sys.executable, "-m", "sterna"]
    listing = subprocess.run(
        [*command, "--help"], capture_output=True, text=True, timeout=600, check=True
    ).stdout
    assert {"run", "migrate", "demo", "doctor"} <= set(COMMANDS)
    for name in COMMANDS:
        assert f"  {name} " in listing
        shown = subprocess.run(
            [*command, name, "--help"], capture_output=True, text=True, timeout=600, check=True
        )
        assert shown.stdout.startswith(f"Usage: sterna {name} ")


def test_a_program_that_calls_no_kernel_loads_no_compiler() -> None:
    """As the one that starts a demo's machines, or a test bed's."""
    script = (
        "import sys, sterna.cli.demo, sterna.cli.demorun, sterna.cli.testbedrun, sterna.testbed.runner\n"
        "import sterna.cli.kernels\n"
        "assert 'sterna.memory.bitmap' in sys.modules\n"
        "assert 'numba' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
