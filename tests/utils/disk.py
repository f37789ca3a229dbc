"""A disk that is full, for tests of whole or absent files."""

import builtins


def full_disk(monkeypatch, after: int = 5) -> None:
    """Files that `issp.utils.files` opens take `after` bytes and then fail."""

    def open_full(path, mode):
        file = builtins.open(path, mode)  # noqa: SIM115  (closed by __exit__)

        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                file.close()

            def fileno(self):
                return file.fileno()

            def write(self, content):
                file.write(content[:after])
                raise OSError(28, "No space left on device")

        return Full()

    monkeypatch.setattr("issp.utils.files.open", open_full, raising=False)
