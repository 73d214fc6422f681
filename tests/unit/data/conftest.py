"""A way to write files of rows."""

import json

import pytest


@pytest.fixture()
def write(tmp_path):
    """Write text, bytes or what JSON holds -> the file's path."""

    def write(content, name="rows.json"):
        path = tmp_path / name
        if not isinstance(content, str | bytes):
            content = json.dumps(content, ensure_ascii=False)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write
