"""Draw what a command prints as a picture: python docs/record.py docs/demo.svg sterna demo"""

import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text


def main() -> None:
    out, *command = sys.argv[1:]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    console = Console(record=True, width=112, file=open("/dev/null", "w"))  # noqa: SIM115 - for the process's life
    console.print(Text("$ " + " ".join(command), style="bold"))
    for line in result.stdout.splitlines():
        # Spaces at the start of a line are lost in a picture.
        line = "\N{NO-BREAK SPACE}" * (len(line) - len(line.lstrip())) + line.lstrip()
        console.print(Text(line, style="bold green" if line == "VERIFIED" else ""))
    picture = console.export_svg(title=" ".join(command))
    # Whoever looks at it has a monospaced font; fetching one from elsewhere is not for a picture to do.
    Path(out).write_text(re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL))


if __name__ == "__main__":
    main()
