"""What holds for all tests."""

try:
    from hypothesis import settings
except ImportError:  # an emulated host has what its tests need
    pass
else:
    # How long an example takes says nothing here: kernels are compiled in the first, and machines are busy.
    settings.register_profile("sterna", deadline=None)
    settings.load_profile("sterna")
