"""Fuzzing of every decoder of a peer's bytes, from real recordings: ``make fuzz MINUTES=10``.

An input is one or more byte strings (a main stream and its channels, say). It is made from a recording by mutations that
know the stream's marks (`tests.fuzz.mutate`), and run by a target (`tests.fuzz.targets`), which raises when a decoder
does anything but say in its own words what is wrong. Inputs that make a decoder say something new are kept and mutated
further. A crash of the interpreter, a hang and the use of much memory are findings as well.
"""
