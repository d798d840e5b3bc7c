"""The frame every script runs in, and files that appear whole or not at all."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from animatediff.utils import UserError, remove_leftovers, replacing, run_main

ROOT = Path(__file__).parents[1]


def test_a_script_whose_output_nobody_reads_ends_without_a_word():
    code = "from animatediff.utils import run_main\nrun_main(lambda: [print(i, flush=True) for i in range(100000)])"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as script:
        assert script.stdout.readline() == b"0\n"
        script.stdout.close()
        assert script.stderr.read() == b"" and script.wait() == 141


@pytest.mark.parametrize("folder", [False, True])
def test_files_and_folders_are_replaced_whole_or_not_at_all(tmp_path, folder):
    def write(path, text):
        if folder:
            path.mkdir()
        (path / "part" if folder else path).write_text(text)

    def read():
        return (path / "part" if folder else path).read_text()

    path = tmp_path / ("long" * 60)
    for text in ("old", "new"):
        with replacing(path) as temporary:
            write(temporary, text)
        assert read() == text
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        write(temporary, "half")
        raise KeyboardInterrupt
    assert read() == "new" and list(tmp_path.iterdir()) == [path]


def test_what_the_system_refuses_names_the_file(tmp_path):
    def fill(path):
        with replacing(path) as temporary:
            raise OSError(errno.ENOSPC, "No space left on device", str(temporary))

    with pytest.raises(UserError, match="x.bin to write to, expected .* room and permission: No space left on device"):
        fill(tmp_path / "x.bin")
    with pytest.raises(UserError, match="none.x.bin to write to, expected an existing folder .*: No such file"):
        fill(tmp_path / "none/x.bin")
    with pytest.raises(FileNotFoundError, match="source"), replacing(tmp_path / "x.bin") as temporary:
        temporary.write_bytes((tmp_path / "source").read_bytes())
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed(tmp_path):
    code = """
import os, sys
from pathlib import Path
from animatediff.utils import replacing, run_main
with replacing(Path(sys.argv[1]) / "deep/x.bin") as temporary:
    temporary.write_text("half")
    os._exit(9)
"""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/kept.txt").write_text("whole")
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT)
    assert len(list((tmp_path / "deep").iterdir())) == 2
    remove_leftovers(tmp_path)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["kept.txt"]


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried …")]
)
def test_a_full_memory_is_one_line(capsys, error):
    def main():
        raise error

    with pytest.raises(SystemExit) as exit:
        run_main(main)
    assert exit.value.code == 2 and capsys.readouterr().err.startswith("error: got a task that takes more memory")


def test_other_errors_are_not_hidden():
    with pytest.raises(RuntimeError, match="a fault"):
        run_main(lambda: (_ for _ in ()).throw(RuntimeError("a fault")))
