"""What every dirty log does, whoever keeps it: a suite of tests for hypervisors, ours and others.

``pytest -p sterna.testing.conformance.plugin --pyargs sterna.testing.conformance --backend mypackage:MyBackend`` runs it on a
hypervisor of your own: `MyBackend` is a `sterna.testing.Backend`, or a class of that kind. Without `--backend` it runs on those
of this package that the host has.
"""
