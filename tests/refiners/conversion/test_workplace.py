"""Conversions that are stopped, continued, started twice or find no room."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from refiners.conversion import Progress, convert_directory
from refiners.errors import FileFormatError, UnwritableFileError
from tests.refiners.conversion.toy_bundles import BUNDLES, assert_converted, files_below, write_folder

KILLED = """
import os, signal, sys
from refiners.conversion import convert_directory
from tests.refiners.conversion.toy_bundles import BUNDLES

done = 0
def report(step):
    global done
    done += not step.verified
    if done == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

convert_directory(sys.argv[1], sys.argv[2], BUNDLES, report=report)
"""


def kill_at(source: Path, target: Path, count: int) -> None:
    """Converts in another process that is killed after so many tensors."""
    command = [sys.executable, "-c", KILLED, str(source), str(target), str(count)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL


def stop_at(source: Path, target: Path, count: int) -> None:
    """Converts, and is stopped by Ctrl-C after so many tensors."""
    steps: list[Progress] = []

    def report(step: Progress) -> None:
        steps.append(step)
        if len(steps) == count:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_directory(source, target, BUNDLES, report=report)


def test_a_killed_conversion_goes_on_where_it_was(tmp_path: Path) -> None:
    source, target = write_folder(tmp_path / "in"), tmp_path / "out"
    convert_directory(source, tmp_path / "at_once", BUNDLES)
    written: list[Progress] = []
    for count in (4, 7):  # in the first file, and in the second
        kill_at(source, target, count)
        assert not target.exists()
    result = convert_directory(source, target, BUNDLES, report=lambda step: written.append(step))
    assert {name: part.kept for name, part in result.parts.items()} == {"net": 6, "head": 1}
    assert not any(step for step in written if not step.kept and not step.verified)
    assert files_below(target) == files_below(tmp_path / "at_once")


def test_a_line_of_the_journal_that_was_cut_off_is_done_again(tmp_path: Path) -> None:
    source, target = write_folder(tmp_path / "in"), tmp_path / "out"
    stop_at(source, target, 3)
    journal = tmp_path / "out.converting" / "net.safetensors.journal"
    journal.write_bytes(journal.read_bytes()[:-9])
    result = convert_directory(source, target, BUNDLES)
    assert result.parts["net"].kept == 2
    assert_converted(target)


def test_bytes_that_changed_since_they_were_written_are_found(tmp_path: Path) -> None:
    source, target = write_folder(tmp_path / "in"), tmp_path / "out"
    stop_at(source, target, 3)
    partial = tmp_path / "out.converting" / "net.safetensors.partial"
    content = bytearray(partial.read_bytes())
    start = int.from_bytes(content[:8], "little") + 8
    content[start] ^= 1
    partial.write_bytes(content)
    with pytest.raises(UnwritableFileError, match="reading it again gives other bytes at Query.weight"):
        convert_directory(source, target, BUNDLES)
    assert not target.exists()
    convert_directory(source, target, BUNDLES)
    assert_converted(target)


def test_a_conversion_of_changed_files_does_not_go_on(tmp_path: Path) -> None:
    source, target = write_folder(tmp_path / "in"), tmp_path / "out"
    stop_at(source, target, 3)
    os.utime(source / "net" / "diffusion_pytorch_model.safetensors", ns=(1, 1))
    with pytest.raises(FileFormatError, match="the beginnings of another conversion.*--force"):
        convert_directory(source, target, BUNDLES)
    result = convert_directory(source, target, BUNDLES, overwrite=True)
    assert result.parts["net"].kept == 0
    assert_converted(target)


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    source, target = write_folder(tmp_path / "in"), tmp_path / "out"
    errors: list[BaseException] = []

    def report(step: Progress) -> None:
        try:
            convert_directory(source, target, BUNDLES)
        except FileFormatError as error:
            errors.append(error)

    convert_directory(source, target, BUNDLES, report=report)
    assert "Another process is converting to" in str(errors[0])
    assert isinstance(errors[0], BlockingIOError)
    assert_converted(target)


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    source = write_folder(tmp_path / "in")
    with pytest.raises(UnwritableFileError, match=r"it needs .* MB, and .* has 0.0 MB free. Make room"):
        convert_directory(source, tmp_path / "out", BUNDLES)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
