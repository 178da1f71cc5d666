"""Builds the guest images: ``python -m sterna.guests.build [DIRECTORY]``.

One ELF per program and board, with the clang and lld of the PyPI package ``ziglang``. The images hold no paths, dates or
compiler names, so the same compiler makes the same bytes anywhere. ``images/COMPILER`` names the version that made
the committed ones: another version may make others that work as well.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from sterna.guests.catalog import BOARDS, IMAGES, LINUX, LINUX_PROGRAMS, PROGRAMS
from sterna.guests.errors import GuestError
from sterna.host.pythonprogram import module_command

SOURCES = Path(__file__).parent / "src"
COMPILER_FILE = "COMPILER"

_COMMON = ("main.c", "counter.c", "uart.c")
_BARE = (*_COMMON, "fdt.c")
_ARM_SOURCES = ("start-arm.S", "arm.c", "exception.c", "gicv2.c", *_BARE)
_SOURCES = {
    "virt": _ARM_SOURCES,
    "vexpress-a15": _ARM_SOURCES,
    "virt-arm64": ("start-arm64.S", "arm64.c", "exception.c", "gicv2.c", *_BARE),
    "pc-min": ("start-x86_64.S", "x86_64.c", *_BARE),
    LINUX: ("start-linux-arm.S", "linux-arm.c", *_COMMON),
}
"""What a board needs, by its name."""
_DRIVERS = {"net": ("virtionet.c",)}
"""And what a program does."""
# No floating point or vectors from the compiler: `random` keeps values of its own in all such registers.
_ARM_FLAGS = (
    "-target",
    "arm-freestanding-eabi",
    "-mcpu=cortex_a15-neon-vfp4-vfp3-vfp2-fp16-fpregs",
    "-mfloat-abi=soft",
    "-marm",
    "-mno-unaligned-access",  # with the MMU off, memory is strongly ordered and unaligned accesses abort
)
_ARM64_FLAGS = (
    "-target",
    "aarch64-freestanding-none",
    "-mcpu=generic-neon-fp_armv8",
    "-mno-unaligned-access",
)
_X86_FLAGS = (
    "-target",
    "x86_64-freestanding-none",
    "-mcpu=x86_64",
    "-mno-sse",
    "-mno-mmx",
    "-mno-80387",
    "-msoft-float",
)
_TARGET_FLAGS = {
    "virt": _ARM_FLAGS,
    "vexpress-a15": _ARM_FLAGS,
    "virt-arm64": _ARM64_FLAGS,
    "pc-min": _X86_FLAGS,
    LINUX: _ARM_FLAGS,
}
_FLAGS = (
    "-std=c11",
    "-O2",
    "-g0",
    "-ffreestanding",
    "-fno-builtin",
    "-fno-pic",
    "-fno-sanitize=undefined",
    "-fno-stack-protector",
    "-nostdlib",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unused-command-line-argument",
    "-s",
    "-Wl,--build-id=none",
    "-Wl,-z,max-page-size=4096",
)


class BuildError(GuestError):
    """A guest program cannot be built: the compiler is missing or refuses a source."""


def compiler_version() -> str:
    """The version of ``ziglang`` that `build` uses.

    :raise BuildError: When it is not installed.
    """
    return _zig(["version"], SOURCES).strip()


def build(program: str, board: str, directory: Path) -> Path:
    """Compile one image into `directory`.

    :raise BuildError: When the compiler is missing or fails; the text holds its messages.
    """
    image = directory.resolve() / f"{program}-{board}.elf"
    define = "BOARD_" + board.upper().replace("-", "_")
    # Relative names, from the folder of the sources: no path of this machine can get into the image.
    _zig(
        [
            "cc",
            *_TARGET_FLAGS[board],
            *_FLAGS,
            f"-D{define}",
            f"-Wl,-T,{board}.ld",
            "-o",
            str(image),
            *_SOURCES[board],
            *_DRIVERS.get(program, ()),
            f"{program}.c",
        ],
        SOURCES,
    )
    return image


def build_all(directory: Path) -> list[Path]:
    """Compile all images into `directory`, and write the compiler's version beside them.

    :raise BuildError: As `build`.
    """
    version = compiler_version()
    wanted = [(program, board) for program in PROGRAMS for board in BOARDS]
    wanted += [(program, LINUX) for program in LINUX_PROGRAMS]
    images = [build(program, board, directory) for program, board in wanted]
    (directory / COMPILER_FILE).write_text(f"ziglang {version}\n")
    return images


def _zig(arguments: list[str], directory: Path) -> str:
    with tempfile.TemporaryDirectory(prefix="sterna-guests-") as cache:
        # A cache of its own: what earlier builds left cannot make the images look as if they agreed with the sources.
        environment = os.environ | {"ZIG_LOCAL_CACHE_DIR": cache, "ZIG_GLOBAL_CACHE_DIR": cache}
        result = subprocess.run(
            module_command("ziglang", *arguments),
            cwd=directory,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    if result.returncode:
        raise BuildError(f"zig {arguments[0]} failed (pip install ziglang?):\n{result.stderr.strip()}")
    return result.stdout


def main(arguments: list[str]) -> int:
    """The command line; gives the exit code."""
    if len(arguments) > 1 or arguments[:1] in (["-h"], ["--help"]):
        print("usage: python -m sterna.guests.build [DIRECTORY]")
        return 2 if len(arguments) > 1 else 0
    directory = Path(arguments[0]) if arguments else IMAGES
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for image in build_all(directory):
            print(f"{image}: {image.stat().st_size} bytes")
    except (BuildError, OSError) as error:
        print(f"sterna.guests.build: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
