"""Guest programs under QEMU: an independent machine to run the images on."""

import json
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fdt
import numpy as np
import pytest
from numpy.typing import NDArray
from tests.needs import qemu_program

from sterna.guests import find
from sterna.guests.layout import STATUS_BYTES, STATUS_OFFSET, Status, read_status

QEMU = {
    "virt": ("qemu-system-arm", "-M", "virt", "-cpu", "cortex-a15"),
    "vexpress-a15": ("qemu-system-arm", "-M", "vexpress-a15", "-cpu", "cortex-a15"),
    "virt-arm64": ("qemu-system-aarch64", "-M", "virt,gic-version=2", "-cpu", "cortex-a57"),
}
RAM_BASE = {"virt": 0x40000000, "vexpress-a15": 0x80000000, "virt-arm64": 0x40000000}
DEADLINE_S = 300.0


def vexpress_tree(cpus: int, memory_bytes: int) -> bytes:
    """The least that QEMU's vexpress-a15 and the guest programs want of a device tree."""
    tree = fdt.FDT()
    tree.header.version = 17
    for path, name, value in (
        ("/", "#address-cells", 2),
        ("/", "#size-cells", 2),
        ("/", "compatible", "arm,vexpress,v2p-ca15"),
        ("/memory@80000000", "device_type", "memory"),
        ("/memory@80000000", "reg", [0, 0x80000000, 0, memory_bytes]),
        ("/interrupt-controller@2c001000", "compatible", "arm,cortex-a15-gic"),
        ("/interrupt-controller@2c001000", "phandle", 1),
        *((f"/cpus/cpu@{cpu}", "compatible", "arm,cortex-a15") for cpu in range(cpus)),
    ):
        tree.set_property(name, value, path)
    return bytes(tree.to_dtb(17))


class QemuGuest:
    """A guest program in QEMU, with its UART and QMP at hand."""

    def __init__(
        self,
        folder: Path,
        program: str,
        append: str,
        board: str,
        cpus: int,
        memory_bytes: int,
        dtb: bytes | None,
    ) -> None:
        self.board, self.memory_bytes, self.folder = board, memory_bytes, folder
        self.text = ""
        self._gdb = folder / "gdb"
        qmp, peer = socket.socketpair()
        command = [*QEMU[board], "-smp", str(cpus), "-m", f"{memory_bytes >> 20}M"]
        command += [
            "-display",
            "none",
            "-nodefaults",
            "-serial",
            "stdio",
            "-kernel",
            str(find(program, board)),
        ]
        command += ["-chardev", f"socket,id=qmp,fd={peer.fileno()}"]
        command += ["-mon", "chardev=qmp,mode=control", "-gdb", f"unix:{self._gdb},server=on,wait=off"]
        if append:
            command += ["-append", append]
        if dtb is not None:
            (folder / "board.dtb").write_bytes(dtb)
            command += ["-dtb", str(folder / "board.dtb")]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[peer.fileno()],
        )
        peer.close()
        qmp.settimeout(DEADLINE_S)
        self._socket = qmp
        self._qmp = qmp.makefile("rw", encoding="utf-8")
        self._qmp.readline()
        self.qmp("qmp_capabilities")

    def qmp(self, command: str, **arguments: Any) -> Any:
        self._qmp.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._qmp.flush()
        while True:
            answer = json.loads(self._qmp.readline())
            if "return" in answer:
                return answer["return"]
            assert "error" not in answer, answer

    def wait_for_text(self, text: str) -> str:
        """Read the UART until it has said `text`; all it has said so far."""
        assert self.process.stdout is not None
        end = time.monotonic() + DEADLINE_S
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while text not in self.text:
                assert selector.select(max(0, end - time.monotonic())), f"no {text!r} in: {self.text}"
                data = os.read(self.process.stdout.fileno(), 65536)
                assert data, f"qemu is gone: {self.process.stderr.read()!r}"  # type: ignore[union-attr]
                self.text += data.decode()
        return self.text

    def freeze(self, milliseconds: int) -> None:
        """Keep the whole of QEMU from running until its UART has been silent for some time; its clock goes on."""
        assert self.process.stdout is not None
        self.process.send_signal(signal.SIGSTOP)
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while selector.select(milliseconds / 1000):
                self.text += os.read(self.process.stdout.fileno(), 65536).decode()
        self.process.send_signal(signal.SIGCONT)

    def wait_for(self, condition: Callable[[Status], bool]) -> Status:
        """The first status of the started guest, of some taken one after the other, that meets `condition`."""
        end = time.monotonic() + DEADLINE_S
        while True:
            page = self._save(STATUS_OFFSET, STATUS_BYTES)
            # Before its first instructions the page is as in the image, without program or CPUs.
            if page[0x14]:
                status = read_status(page)
                if condition(status):
                    return status
            assert time.monotonic() < end, f"the guest has not got there: {page[:0x800].tobytes()!r}"

    def _save(self, offset: int, size: int) -> NDArray[np.uint8]:
        path = self.folder / "ram"
        self.qmp("pmemsave", val=RAM_BASE[self.board] + offset, size=size, filename=str(path))
        return np.fromfile(path, dtype=np.uint8)

    def status(self) -> Status:
        return read_status(self._save(STATUS_OFFSET, STATUS_BYTES))

    def stopped_ram(self) -> NDArray[np.uint8]:
        """All of RAM, the guest stopped."""
        self.qmp("stop")
        return self._save(0, self.memory_bytes)

    def poke(self, offset: int, data: bytes) -> None:
        """Change RAM behind the guest's back, through QEMU's gdb server."""
        packet = f"M{RAM_BASE[self.board] + offset:x},{len(data):x}:{data.hex()}"
        with socket.socket(socket.AF_UNIX) as gdb:
            gdb.settimeout(DEADLINE_S)
            gdb.connect(str(self._gdb))
            for text in (packet, "D"):
                gdb.sendall(b"+$%s#%02x" % (text.encode(), sum(text.encode()) % 256))
                answer = b""
                while b"$OK#9a" not in answer:
                    part = gdb.recv(4096)
                    assert part, f"gdb server closed after {answer!r}"
                    answer += part
            gdb.sendall(b"+")

    def close(self) -> None:
        self._qmp.close()
        self._socket.close()
        self.process.kill()
        self.process.communicate()


Launch = Callable[..., QemuGuest]


@pytest.fixture
def launch(qemu: str, tmp_path: Path) -> Iterator[Launch]:
    """Starts guest programs under QEMU; ends them with the test."""
    for name in sorted({command[0] for command in QEMU.values()}):
        qemu_program(name)
    guests: list[QemuGuest] = []

    def start(
        program: str,
        append: str = "",
        board: str = "virt",
        cpus: int = 1,
        memory_bytes: int = 64 << 20,
        tree: bool = True,
    ) -> QemuGuest:
        folder = tmp_path / str(len(guests))
        folder.mkdir()
        dtb = vexpress_tree(cpus, memory_bytes) if tree and board == "vexpress-a15" else None
        guests.append(QemuGuest(folder, program, append, board, cpus, memory_bytes, dtb))
        return guests[-1]

    yield start
    for guest in guests:
        guest.close()
