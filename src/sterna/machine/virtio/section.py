"""Sections ``virtio-mmio@ADDRESS/NAME``, as QEMU 7.2 has them for devices of virtio 1."""

from collections.abc import Mapping
from typing import Any

from sterna.machine.virtio.kind import Kind
from sterna.machine.virtio.mmio import VERSION_1, Status, TransportState
from sterna.machine.virtio.queue import QueueState
from sterna.stream.vmstate import (
    SUBSECTIONS,
    DeviceState,
    StreamError,
    VmStateDescription,
    array,
    boolean,
    counted_array,
    counted_buffer,
    struct,
    u8,
    u16,
    u32,
    u64,
)

_QUEUES_ON_WIRE = 1024
_CONFIG_LIMIT = 256
_PAGE = 4096
_LOW = 0xFFFF_FFFF

_QUEUE = VmStateDescription(
    "virtio/queue", version=1, fields=(u32("num"), u32("align"), u64("desc"), u16("last_avail_idx"))
)
_RINGS = VmStateDescription("virtio/rings", version=1, fields=(u64("avail"), u64("used")))
_MMIO_QUEUE = VmStateDescription(
    "virtio_mmio/queue",
    version=1,
    fields=(
        u16("num"),
        boolean("enabled"),
        *(u32(f"{ring}_{half}") for ring in ("desc", "avail", "used") for half in ("low", "high")),
    ),
)
_MMIO_STATE = VmStateDescription(
    "virtio_mmio/state",
    version=1,
    fields=(array(u32("guest_features"), 2), array(struct("vqs", _MMIO_QUEUE), _QUEUES_ON_WIRE)),
)
_MMIO = VmStateDescription("virtio_mmio", version=1, fields=(), subsections=(_MMIO_STATE,))
_FEATURES = VmStateDescription("virtio/64bit_features", version=1, fields=(u64("guest_features"),))
_VIRTQUEUES = VmStateDescription(
    "virtio/virtqueues", version=1, fields=(array(struct("vq", _RINGS), _QUEUES_ON_WIRE),)
)
_EXTRA = VmStateDescription("virtio/extra_state", version=1, fields=(struct("extra_state", _MMIO),))
_RINGSIZE = VmStateDescription(
    "virtio/ringsize", version=1, fields=(array(u32("num_default"), _QUEUES_ON_WIRE),)
)
_BROKEN = VmStateDescription("virtio/broken", version=1, fields=(boolean("broken"),))
_STARTED = VmStateDescription("virtio/started", version=1, fields=(boolean("started"),))
_COMMON = (
    u32("device_features_sel"),
    u32("driver_features_sel"),
    u32("guest_page_shift"),
    u8("status"),
    u8("isr"),
    u16("queue_sel"),
    u32("guest_features_low"),
    u32("config_len"),
    counted_buffer("config", counted_by="config_len", limit=_CONFIG_LIMIT),
    u32("queues"),
    counted_array(struct("queue", _QUEUE), counted_by="queues", limit=_QUEUES_ON_WIRE),
)
_SUBSECTIONS = (_FEATURES, _VIRTQUEUES, _RINGSIZE, _BROKEN, _EXTRA, _STARTED)


def layout(kind: Kind) -> VmStateDescription:
    """How the sections of a kind of device are laid out."""
    virtio = VmStateDescription(
        "virtio", version=1, fields=(*_COMMON, *kind.fields), subsections=_SUBSECTIONS
    )
    return VmStateDescription(kind.name, version=kind.version, fields=(struct("virtio", virtio),))


def save_virtio(
    kind: Kind, name: str, state: TransportState, *, config: bytes, own: Mapping[str, Any]
) -> DeviceState:
    """A device's section.

    :param name: the section's
    :param config: the configuration space
    :param own: values of the kind's own fields
    """
    # QEMU stops when a stream has not all queues that its device has.
    queues = [*state.queues, *(QueueState(limit) for limit in kind.hidden_queues)]
    unused = [{"avail": 0, "used": 0}] * (_QUEUES_ON_WIRE - len(queues))
    rings = [{"avail": queue.avail, "used": queue.used} for queue in queues] + unused
    mmio = [_mmio_queue(queue) for queue in queues]
    mmio += [_mmio_queue(QueueState(0))] * (_QUEUES_ON_WIRE - len(queues))
    features = state.driver_features
    words = {"guest_features": [features & _LOW, features >> 32], "vqs": mmio}
    extra = {SUBSECTIONS: (DeviceState(_MMIO_STATE.name, 0, 1, words),)}
    subsections = [
        DeviceState(_FEATURES.name, 0, 1, {"guest_features": features}),
        DeviceState(_VIRTQUEUES.name, 0, 1, {"vq": rings}),
        DeviceState(_EXTRA.name, 0, 1, {"extra_state": extra}),
    ]
    if state.status & Status.NEEDS_RESET:
        subsections.append(DeviceState(_BROKEN.name, 0, 1, {"broken": True}))
    if state.status & Status.DRIVER_OK:
        subsections.append(DeviceState(_STARTED.name, 0, 1, {"started": True}))
    virtio: dict[str, Any] = {
        "device_features_sel": state.device_features_sel,
        "driver_features_sel": state.driver_features_sel,
        "guest_page_shift": 0,
        "status": state.status,
        "isr": state.interrupt_status,
        # One that does not fit selects no queue either.
        "queue_sel": min(state.queue_sel, 0xFFFF),
        "guest_features_low": features & _LOW,
        "config_len": len(config),
        "config": config,
        "queues": len(queues),
        "queue": [
            {
                "num": queue.num if queue.ready else queue.limit,
                "align": _PAGE,
                "desc": queue.desc if queue.ready else 0,
                "last_avail_idx": queue.last_avail,
            }
            for queue in queues
        ],
        **own,
        SUBSECTIONS: tuple(subsections),
    }
    return DeviceState(name, 0, kind.version, {"virtio": virtio})


def _mmio_queue(queue: QueueState) -> dict[str, Any]:
    values: dict[str, Any] = {"num": queue.num, "enabled": queue.ready}
    for ring in ("desc", "avail", "used"):
        address = getattr(queue, ring)
        values |= {f"{ring}_low": address & _LOW, f"{ring}_high": address >> 32}
    return values


def load_virtio(kind: Kind, section: DeviceState) -> TransportState:
    """A device's state but for its own fields. The queues' indices are not compared with RAM here.

    :raise StreamError: When it is one that the device cannot have.
    """
    virtio = section.fields["virtio"]
    parts = {part.name: part.fields for part in virtio.get(SUBSECTIONS, ())}
    for needed in (_FEATURES, _VIRTQUEUES, _EXTRA):
        if needed.name not in parts:
            raise StreamError(
                "the subsection is missing: the device is not one of virtio 1 "
                "(in QEMU: -global virtio-mmio.force-legacy=false)",
                section.name,
            ).inside(f"<{needed.name}>")
    features = int(parts[_FEATURES.name]["guest_features"])
    if unknown := features & ~(kind.features | VERSION_1):
        bits = ", ".join(str(bit) for bit in range(64) if unknown >> bit & 1)
        raise StreamError(
            f"the guest uses features that this device has not: bits {bits}", section.name
        ).inside("guest_features")
    states = {part.name: part.fields for part in parts[_EXTRA.name]["extra_state"].get(SUBSECTIONS, ())}
    if _MMIO_STATE.name not in states:
        raise StreamError("the subsection is missing", section.name).inside(f"<{_MMIO_STATE.name}>")
    mmio = states[_MMIO_STATE.name]["vqs"]
    count = len(kind.queue_limits)
    if len(virtio["queue"]) < count:
        raise StreamError(f"{len(virtio['queue'])} queues where {count} belong", section.name)
    rings = parts[_VIRTQUEUES.name]["vq"]
    queues = [
        _load_queue(limit, virtio["queue"][index], rings[index], mmio[index])
        for index, limit in enumerate(kind.queue_limits)
    ]
    for index, queue in enumerate(mmio[count:], count):
        if queue["enabled"]:
            raise StreamError(f"the guest uses queue {index}, which this device has not", section.name)
    status = int(virtio["status"])
    if _BROKEN.name in parts and parts[_BROKEN.name]["broken"]:
        status |= Status.NEEDS_RESET
    return TransportState(
        status=status,
        interrupt_status=int(virtio["isr"]),
        device_features_sel=int(virtio["device_features_sel"]),
        driver_features_sel=int(virtio["driver_features_sel"]),
        queue_sel=int(virtio["queue_sel"]),
        driver_features=features,
        queues=queues,
    )


def _load_queue(limit: int, main: dict[str, Any], rings: dict[str, Any], mmio: dict[str, Any]) -> QueueState:
    """What the transport has of a queue that is not ready, and what the device works with of one that is."""
    queue = QueueState(limit, ready=bool(mmio["enabled"]), last_avail=int(main["last_avail_idx"]))
    if queue.ready:
        queue.num, queue.desc = int(main["num"]), int(main["desc"])
        queue.avail, queue.used = int(rings["avail"]), int(rings["used"])
        return queue
    queue.num = int(mmio["num"])
    for ring in ("desc", "avail", "used"):
        setattr(queue, ring, int(mmio[f"{ring}_low"]) | int(mmio[f"{ring}_high"]) << 32)
    return queue
