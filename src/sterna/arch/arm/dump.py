"""What the registers of both ARMs have alike, as text."""


def flags(status: int) -> str:
    """The condition flags of a program status register."""
    return "".join(
        letter if status >> bit & 1 else "-" for letter, bit in zip("NZCV", (31, 30, 29, 28), strict=True)
    )
