"""What the guest is made of."""

KERNEL_PACKAGE = "linux-image-armmp-lpae"
ARCHITECTURE = "armhf"

DEBIAN_PACKAGES = ("busybox-static", "dropbear-bin")

FILES = (
    "usr/bin/busybox",
    "usr/sbin/dropbear",
    "usr/lib/ld-linux-armhf.so.3",
    "usr/lib/arm-linux-gnueabihf/",
)
"""What of the packages is in the root file system: files, and folders with all that is below."""
LEFT_OUT = ("usr/lib/arm-linux-gnueabihf/gconv/", "usr/lib/arm-linux-gnueabihf/perl")

KERNEL_MODULES = ("virtio_mmio", "virtio_blk", "virtio_net", "virtio_rng", "crc32c_generic", "ext4")
"""In the initramfs, and loaded there; those that are not there are built into the kernel."""

EPOCH = 1_700_000_000
"""Time stamp of everything in the images."""

DISK_BYTES = 1 << 30
"""Size of the root file system; blocks that were never written take no room."""
