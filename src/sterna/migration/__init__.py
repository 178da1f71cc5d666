"""Live migration: channels, the source and the destination, how a guest changes hands, and what is measured.

`controller.MigrationController` is the way in. What a machine must offer is `guest.MigratableGuest`. The protocol
between two sternas is described in `handshake`, the metrics in `statistics`.
"""
