"""Pages on connections of their own beside the main channel: QEMU's multifd at the destination."""
