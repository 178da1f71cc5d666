"""What `sterna.migration.channels.gather` names of the C library, for the compiler."""

from numba import types

writev = types.ExternalFunction("writev", types.int64(types.int32, types.uint64, types.int32))
readv = types.ExternalFunction("readv", types.int64(types.int32, types.uint64, types.int32))
poll = types.ExternalFunction("poll", types.int32(types.uint64, types.uint64, types.int32))
clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.uint64))
errno_location = types.ExternalFunction("__errno_location", types.CPointer(types.int32)())
