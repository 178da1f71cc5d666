"""When a migration stops its guest, how much it slows it down before, and when it gives up."""
