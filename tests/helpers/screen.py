"""What a terminal shows after a program has written to it: carriage returns, line feeds and cursor-up are obeyed."""

import io

from gspo.system.cells import width


class Screen(io.StringIO):
    """A terminal of so many columns, without an end below; `lines` is what it shows."""

    def __init__(self, columns: int = 80):
        super().__init__()
        self.columns = columns

    def isatty(self) -> bool:
        return True

    @property
    def lines(self) -> list[str]:
        cells, row, column = [{}], 0, 0
        text = self.getvalue()
        while text:
            if text.startswith("\x1b[A"):
                text, row = text[3:], max(0, row - 1)
                continue
            character, text = text[0], text[1:]
            if character == "\r":
                column = 0
            elif character == "\n":
                row, column = row + 1, 0  # as a terminal's driver does
            else:
                if column + width(character) > self.columns:
                    row, column = row + 1, 0
                while row >= len(cells):
                    cells.append({})
                cells[row] |= {column + k: "" for k in range(width(character))} | {column: character}
                column += width(character)
            while row >= len(cells):
                cells.append({})
        return ["".join(line.get(k, " ") for k in range(max(line, default=-1) + 1)).rstrip() for line in cells]
