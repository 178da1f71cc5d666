"""The test bed: hosts, links and VMs of several kinds, scenarios that migrate them, and the checks that judge it."""
